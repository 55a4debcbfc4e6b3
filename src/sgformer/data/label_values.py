"""Which values the label maps of a split hold, and whether they mean what the classes say."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np

from sgformer.core.errors import StalledError, UserError
from sgformer.core.names import quoted
from sgformer.data.ade20k import LabelledFolder, read_label_map

#: Label maps that are read, evenly spread over the split: some seconds.
LIMIT = 500


@dataclasses.dataclass(frozen=True)
class Values:
    """The values in label maps.

    Attributes:
        pixels: value in the file -> number of pixels.
        read: number of label maps read.
        total: number of label maps in the split.
    """

    pixels: Counter[int]
    read: int
    total: int

    @property
    def where(self) -> str:
        """`4 label maps` or `500 of 20210 label maps`."""
        return f"{self.read}{f' of {self.total}' if self.read < self.total else ''} label maps"


def read_values(listing: LabelledFolder, limit: int = LIMIT) -> Values:
    """Count the values in at most `limit` label maps; unreadable ones are passed over."""
    step = max(1, -(-len(listing) // limit))
    pixels: Counter[int] = Counter()
    read = 0
    for path in listing.labels[::step]:
        try:
            values = read_label_map(path)
        except StalledError:
            raise
        except UserError:
            continue
        read += 1
        if values.dtype == np.uint8:
            counts = np.bincount(values.ravel(), minlength=256)
            pixels.update({int(value): int(counts[value]) for value in counts.nonzero()[0]})
        else:
            pixels.update(dict(zip(*(part.tolist() for part in np.unique(values, return_counts=True)), strict=True)))
    return Values(pixels, read, len(listing))


def check_values(
    listing: LabelledFolder, binary: bool | None = None, limit: int = LIMIT
) -> tuple[LabelledFolder, list[str]]:
    """Compare the values in label maps with the classes.

    A mask of 0 and 255 is read as two classes if two are named; everywhere else 255 means "no class".

    Args:
        listing: the split.
        binary: whether the training read 255 as the second class; None: this is the training.
        limit: see `read_values`.

    Returns:
        The listing, `binary` if 255 is its second class, and notes: one line each, on that and on classes without a
        pixel.

    Raises:
        UserError: no pixel has a class; or the files are masks of 0 and 255 and there are not two classes, or
            anti-aliased masks.
    """
    values = read_values(listing, limit)
    stored, none, first = set(values.pixels), listing.ignore, int(listing.reduce_zero_label)
    where, names = f"{listing.root}: {listing.split}", listing.classes
    if not values.read:
        return listing, []
    if _is_soft_mask(values.pixels, listing):
        between = sum(count for value, count in values.pixels.items() if 0 < value < 255)
        raise UserError(
            f"{where}: {values.where} hold mostly 0 and 255, and {100 * between / values.pixels.total():.2g} % values "
            "between: they look like masks with soft (anti-aliased) edges; save them with 0 and 1 only "
            "(or 0 and 255, with two names in classes.txt)"
        )
    notes = []
    # Where training read 255 as a class, maps of 0 alone are such masks too: those that were not read may hold 255.
    if stored <= {0, 255} and (255 in stored or binary) and none == 255:
        if len(names) == 2 and not first and binary is not False:
            listing = dataclasses.replace(listing, binary=True)
            if len(stored) == 2:
                notes.append(f"{listing.split}: {values.where} hold 0 and 255 only: 255 is read as class {names[1]}")
            stored = {value // 255 for value in stored}
        elif binary is None and (0 not in stored or first or len(names) != 2):
            held = " and ".join(map(str, sorted(stored)))
            raise UserError(
                f"{where}: {values.where} hold {held} only, and 255 means 'no class': "
                "for masks of two classes, 0 and 255, name both in classes.txt or pass --classes 2, without "
                "--reduce-zero-label"
            )
    labels = stored - {none} - ({0} if first else set())
    if not labels:
        raise UserError(f"{where}: no pixel of {values.where} has a class (they hold {_shown(stored)})")
    if absent := [name for value, name in enumerate(names, first) if value not in labels]:
        what = f"{len(absent)} of {len(names)} classes {'have' if len(absent) > 1 else 'has'} no pixel"
        hint = f"; {none} means 'no class'" if none in stored else ""
        notes.append(f"{listing.split}: {what} in {values.where}: {quoted(absent)}{hint}")
    return listing, notes


def _is_soft_mask(pixels: Counter[int], listing: LabelledFolder) -> bool:
    """Whether values between 0 and 255 are a soft edge and no labels: they go beyond the classes, or to more than a
    hundred that nobody named, while nearly everything is 0 or 255."""
    between = [value for value in pixels if 0 < value < 255]
    beyond = between and max(between) >= (len(listing.classes) + listing.reduce_zero_label if listing.named else 128)
    ends = pixels[0] + pixels[255]
    return bool(beyond) and listing.ignore == 255 and min(pixels[0], pixels[255]) > 0 and ends > 0.6 * pixels.total()


def _shown(values: set[int]) -> str:
    return ", ".join(map(str, sorted(values)[:8])) + (" ..." if len(values) > 8 else "")
