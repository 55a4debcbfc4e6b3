"""The typical size of a data set's images."""

from __future__ import annotations

import statistics
from typing import Any

from sgformer.core.errors import StalledError, UserError
from sgformer.data.image import probe_image


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
    if hasattr(listing, "read_bytes"):
        sources: list[Any] = listing.read_bytes(indices)
    else:
        sources = [listing.path(index) for index in indices]
    for source in sources:
        if isinstance(source, StalledError):
            raise source
        if isinstance(source, UserError):
            continue
        try:
            header = probe_image(source)
        except UserError:
            continue
        sides.append(min(header.width, header.height))
    return round(statistics.median(sides)) if sides else None
