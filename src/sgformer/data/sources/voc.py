"""PASCAL VOC XML: one file per image, `bndbox` in pixels; as VOC, labelImg, CVAT and Roboflow write it.

VOC counts pixels from 1 and includes the last one. Tools that write edges from 0 show themselves by a 0 or a fraction
somewhere; then numbers are taken as they are.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from sgformer.core.errors import UserError
from sgformer.data.sources.base import (
    MAX_XML,
    Found,
    Picture,
    Reading,
    Thing,
    first_files,
    head,
    number,
    read_lines,
    read_text,
)

DIFFICULT = "difficult objects, kept as crowd regions"
NO_BOX = "objects without a bndbox, left out"
UNLISTED = "annotations in no list of ImageSets, left out"
FROM_ZERO = "files with boxes, whose pixels count from 0: there is a 0 or a fraction among them"
FROM_ONE = "files with boxes, whose pixels count from 1 and include the last one, as VOC's"


class _Box(NamedTuple):
    label: str
    corners: tuple[float, float, float, float]
    difficult: bool


def detects(root: Path) -> bool:
    """Whether the first XML file is an annotation."""
    return any("<annotation" in head(path) for path in first_files(root, ".xml"))


def read(reading: Reading) -> Found:
    """See the package."""
    split_of = _image_sets(reading.folder)
    read_boxes: list[tuple[Picture, list[_Box]]] = []
    missing = []
    for path in reading.files(".xml"):
        about = _parse(path)
        if about.tag != "annotation":
            continue
        if split_of and path.stem not in split_of:
            reading.notes[UNLISTED] += 1
            continue
        name = (about.findtext("filename") or "").strip()
        # The name of the XML file is surer than what is written in it: labelImg keeps that of the first save.
        image = reading.image(path.stem, path.parent) or (reading.image(name, path.parent) if name else None)
        if image is None:
            missing.append(name or path.stem)
            continue
        size = reading.size(image)
        if size is not None:
            split = split_of[path.stem] if split_of else reading.split(path) or reading.split(image)
            read_boxes.append((Picture(image, split, size), _boxes(about, path, reading.notes)))
    reading.missing(missing, reading.root)
    numbers = [v for _, boxes in read_boxes for box in boxes for v in box.corners]
    shift = 0 if any(v == 0 or v != int(v) for v in numbers) else 1
    for picture, boxes in read_boxes:
        picture.things = [
            Thing(label, (x1 - shift, y1 - shift, x2, y2), crowd=difficult)
            for label, (x1, y1, x2, y2), difficult in boxes
        ]
    if numbers:
        reading.notes[FROM_ONE if shift else FROM_ZERO] += sum(bool(boxes) for _, boxes in read_boxes)
    classes = sorted({box.label for _, boxes in read_boxes for box in boxes})
    return Found([picture for picture, _ in read_boxes], tuple(classes))


def _image_sets(folder: Path) -> dict[str, str]:
    """Stem -> split, of the lists in ImageSets, "" if only in `trainval`; empty without a list of a single split."""
    result: dict[str, str] = {}
    for kind in ("Main", "Segmentation", "Layout", ""):
        for name, split in (("trainval", ""), ("test", "test"), ("val", "val"), ("train", "train")):
            path = folder / "ImageSets" / kind / f"{name}.txt"
            if path.is_file():
                result.update({Path(line.split()[0]).stem: split for line in read_lines(path)})
        if any(result.values()):
            return result
    return {}


def _parse(path: Path) -> ElementTree.Element:
    text = read_text(path, MAX_XML)
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise UserError(f"{path}: has a document type, which annotations do not need: refused")
    try:
        # As text: what the file says about its encoding has been decided.
        return ElementTree.fromstring(text.partition("?>")[2] if text.lstrip().startswith("<?xml") else text)
    except (ElementTree.ParseError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: malformed XML ({error})") from None


def _boxes(about: ElementTree.Element, path: Path, notes: Counter[str]) -> list[_Box]:
    result = []
    for place, thing in enumerate(about.findall("object"), 1):
        where = f"{path}: object {place}"
        label = (thing.findtext("name") or "").strip()
        if not label:
            raise UserError(f"{where} has no name")
        box = thing.find("bndbox")
        if box is None:
            notes[NO_BOX] += 1
            continue
        x1, y1, x2, y2 = (number(box.findtext(side), where, side) for side in ("xmin", "ymin", "xmax", "ymax"))
        difficult = (thing.findtext("difficult") or "0").strip().lower() in ("1", "true")
        notes[DIFFICULT] += difficult
        result.append(_Box(label, (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)), difficult))
    return result
