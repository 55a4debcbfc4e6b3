"""The typical size of a data set's images."""

from __future__ import annotations

import statistics
from functools import partial
from pathlib import Path
from typing import Any

from sgformer.core.errors import StalledError, UserError
from sgformer.data.image import in_time, probe_image


def typical_side(listing: Any, sample: int = 48) -> int | None:
    """The median short side in pixels of a sample of a listing's images, spread evenly over it.

    Reads nothing but headers (of shards: the files) and leaves out unreadable images.

    Args:
        listing: of any task.
        sample: number of images to look at.

    Returns:
        The short side, or None if none of the sample is readable.

    Raises:
        StalledError: the disk or network mount does not respond.
    """
    count = min(sample, len(listing))
    indices = [i * len(listing) // count for i in range(count)]
    sides = []
    sources: list[Any] = [listing.path(index) for index in indices]
    if not all(isinstance(source, Path) for source in sources):  # names of images in shards
        sources = listing.read_bytes(indices)
    for source in sources:
        try:
            if isinstance(source, UserError):
                raise source
            header = in_time(partial(probe_image, source), source) if isinstance(source, Path) else probe_image(source)
        except StalledError:
            raise
        except UserError:
            continue
        sides.append(min(header.width, header.height))
    return round(statistics.median(sides)) if sides else None
