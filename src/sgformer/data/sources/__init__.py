"""Readers of what labelling tools write; `data.converting` writes it in the layouts that training reads.

A format is a file here with two functions and a line in `FORMATS`:

    def detects(root: Path) -> bool                     # looks at names, and at the beginning of a file or two
    def read(reading: Reading) -> Found                 # reads annotations and image headers, no pixels

By hand: supervision (458 MB installed) turns polygons into bitmaps and back and reads a third of these formats;
datumaro (563 MB) stops where a class is not one of VOC's own, in a traceback (docs/notes/libraries.md).
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType

from sgformer.core.errors import UserError
from sgformer.data.sources.base import Found, Reading

#: Format -> what it is called, in the order in which they are tried: the surest signs first.
FORMATS = {
    "coco": "COCO annotations",
    "predictions": "a classifier's predictions",
    "openimages": "Open Images CSV",
    "voc": "PASCAL VOC XML",
    "labelme": "labelme JSON",
    "via": "VIA annotations",
    "yolo": "YOLO labels",
    "csv": "a CSV list of files and labels",
    "colours": "colour-coded masks with a colour table",
}
#: Layout -> what a source must hold to be written so.
LAYOUTS = {"coco": "objects", "ade20k": "objects with outlines or masks", "imagenet": "a class per image"}


def reader(name: str) -> ModuleType:
    """The module that reads a format."""
    return importlib.import_module(f"sgformer.data.sources.{name}")


def recognize(root: str | os.PathLike[str]) -> str | None:
    """The format of a file or folder, None if it is in none of them."""
    path = Path(root)
    if not path.exists():
        return None
    try:
        return next((name for name in FORMATS if reader(name).detects(path)), None)
    except OSError:  # a folder that may not be listed
        return None


def read(
    root: str | os.PathLike[str],
    layout: str,
    form: str | None = None,
    images: str | os.PathLike[str] | None = None,
    table: str | os.PathLike[str] | None = None,
    bad_images: str = "stop",
) -> Found:
    """Read a data set.

    Args:
        root: file or folder.
        layout: what it will be written as, one of `LAYOUTS`.
        form: one of `FORMATS`; by default as recognized.
        images: the folder of the images, if they are not below `root`.
        table: a file of class names (and colours), if it is not below `root`.
        bad_images: "stop" or "skip", on an image whose header cannot be read.

    Raises:
        UserError: the format is not recognized, or a file is not as its format should be; names the file.
    """
    path = Path(root)
    if not path.exists():
        raise UserError(f"{root}: no such file or folder")
    if form is not None and form not in FORMATS:
        raise UserError(f"--format is one of {', '.join(FORMATS)}, got {form}")
    name = form or recognize(path)
    if name is None:
        raise UserError(
            f"{root}: in none of the formats that can be converted: {'; '.join(FORMATS.values())}; "
            f"--format {{{','.join(FORMATS)}}} says which it is meant to be"
        )
    reading = Reading(path, layout, images, table, bad_images == "skip")
    found = reader(name).read(reading)
    if not found.pictures:
        raise UserError(f"{root}: no images that belong to {FORMATS[name]}; name their folder with --images")
    reading.notes.update(found.notes)
    for note in [note for note, count in reading.notes.items() if not count]:
        del reading.notes[note]
    found.notes = reading.notes  # the same counter: masks are read later
    return found
