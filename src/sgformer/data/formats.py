"""The layouts that data sets come in, by what they hold; a new one is a function or two, here or in a plugin.

    def detects(root):                              # a path or an address
        return (Path(root) / "train.csv").is_file()

    def open_csv(root, split, classes=None):        # -> a listing
        ...

    sgformer.register_format("csv", "classes", detects, open_csv)

Then `--data ROOT` is opened by it in training, evaluation and the data check.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sgformer.core.errors import StalledError, UserError
from sgformer.core.names import is_address
from sgformer.data.coco import find_coco, is_coco, read_coco
from sgformer.data.imagefolder import Listing, is_image_folder, scan, scan_splits
from sgformer.data.layouts import hint
from sgformer.data.shards import has_tars_only, is_shards, open_split, open_splits

Root = str | os.PathLike[str]

KINDS = ("classes", "objects")
#: The layout of each kind's usual format.
LAYOUTS = {"classes": "imagenet", "objects": "coco"}


@dataclass(frozen=True)
class Format:
    """See `register_format`."""

    name: str
    kind: str
    detects: Callable[[Root], bool]
    open: Callable[..., Any]
    open_both: Callable[[Root], tuple[Listing, Listing]] | None = None


#: In the order of their registration. Of each kind the first one is the usual one, whose words explain what is wrong
#: with a folder that is in no format at all.
FORMATS: dict[str, Format] = {}


def register_format(
    name: str,
    kind: str,
    detects: Callable[[Root], bool],
    open: Callable[..., Any],
    open_both: Callable[[Root], tuple[Listing, Listing]] | None = None,
) -> None:
    """Let `--data` be in another format. Formats that are registered later are tried first.

    Args:
        name: for messages.
        kind: "classes", of images with a class each, or "objects", of images with boxes and maybe masks.
        detects: whether a path or address is in the format; looks at names of files and no further.
        open: ``(root, split, classes=None)`` to the listing of a split, "train" or "val". With `classes`, the class
            indices follow them: they are the training's names or, of "objects", its `data.coco.Category` entries. Of
            "classes", a listing is a :class:`sgformer.data.imagefolder.Listing`, e.g. an `ImageFolder`. Of "objects" it
            is a `data.coco.CocoListing`, e.g. of `data.coco.make_listing`, and `open` also takes the keywords `masks`,
            `drop_empty` and `check_files` of that function, and `images`, the folder that the user named or None.
        open_both: of "classes", (train, val) at once, with the class indices of train, where that is quicker.

    Raises:
        ValueError: no such kind, or the name is taken.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is one of {', '.join(KINDS)}, got {kind!r}")
    if name in FORMATS and FORMATS[name].open is not open:
        raise ValueError(f"there is a format of the name {name!r} already")
    FORMATS[name] = Format(name, kind, detects, open, open_both)


def find_format(kind: str, root: Root) -> Format | None:
    """The format of a data set; None where none knows it."""
    return next((f for f in reversed(FORMATS.values()) if f.kind == kind and f.detects(root)), None)


def open_data(kind: str, root: Root, split: str, classes: Any = None, **options: Any) -> Any:
    """The listing of a split, in whatever format.

    Args:
        kind, root, split, classes, options: see `register_format`.

    Raises:
        UserError: no format knows it, or it is not as its format should be.
    """
    found = find_format(kind, root)
    with naming_formats(kind, root, found is not None):
        return (found or usual_format(kind)).open(root, split, classes, **options)


def open_both(root: Root) -> tuple[Listing, Listing]:
    """`train` and `val` of images with a class each, with the class indices of `train`.

    Raises:
        UserError: as of `open_data`.
    """
    found = find_format("classes", root) or usual_format("classes")
    if found.open_both is None:
        train = open_data("classes", root, "train")
        return train, open_data("classes", root, "val", train.classes)
    with naming_formats("classes", root, found.detects(root)):
        return found.open_both(root)


def usual_format(kind: str) -> Format:
    """The format that comes first: image folders, COCO."""
    return next(f for f in FORMATS.values() if f.kind == kind)


@contextmanager
def naming_formats(kind: str, root: Root, known: bool) -> Iterator[None]:
    """Inside, UserErrors also tell what the data set looks like instead; or if it is in none, the formats there are."""
    try:
        yield
    except StalledError:
        raise
    except UserError as error:
        if says := "" if is_address(root) else hint(root, LAYOUTS[kind]):
            raise UserError(f"{error}; {says}") from None
        if known:
            raise
        names = ", ".join(f.name for f in FORMATS.values() if f.kind == kind)
        raise UserError(f"{error}; known formats: {names}") from None


def open_coco(root: Root, split: str, classes: Any = None, images: Any = None, **options: Any) -> Any:
    """A split in the COCO layout, see `data.coco`."""
    found = find_coco(root, split, images, options.get("keypoints"))
    return read_coco(*found, categories=classes, **options)


register_format("image-folder", "classes", is_image_folder, scan, scan_splits)
register_format("shards", "classes", lambda root: is_shards(root) or has_tars_only(root), open_split, open_splits)
register_format("coco", "objects", is_coco, open_coco)
