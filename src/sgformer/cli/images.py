"""What `predict` and `explain` do about images that cannot be read, and their exit status."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from sgformer.core.errors import UserError
from sgformer.core.terminal import say

if TYPE_CHECKING:
    from sgformer.data.image import Images

#: Exit status if something was done, and something left out.
PARTLY = 1


def open_images(paths: list[str], bad_images: str, **options: Any) -> Images:
    """The images of a command line; those left out are named on stderr. A single unreadable image is an error."""
    from sgformer.data.image import Images  # not at the head: help needs neither Pillow nor NumPy

    images = Images(paths, bad_images, on_skip=lambda line: say(f"left out: {line}", file=sys.stderr), **options)
    if len(images) == 1 and not images.skipped:
        images.skips = False
    return images


def exit_status(images: Images, done: int) -> int:
    """0 if all images were read, 1 if some were left out.

    Raises:
        UserError: none was read.
    """
    if not images.skipped:
        return 0
    if not done:
        raise UserError(f"none of the {len(images.skipped)} images could be read")
    say(f"{done} of {done + len(images.skipped)} images read, {len(images.skipped)} left out", file=sys.stderr)
    return PARTLY
