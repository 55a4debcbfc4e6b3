"""VIA, the VGG Image Annotator: one JSON or CSV file with the regions of all images in pixels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sgformer.core.errors import UserError
from sgformer.core.names import some
from sgformer.core.parse import parse_json
from sgformer.data.sources.base import (
    Found,
    Picture,
    Reading,
    Thing,
    ellipse,
    first_files,
    head,
    number,
    read_csv,
    read_json,
)

LINES = "points and lines, which have no area, left out"
UNNAMED = "regions without an attribute, taken as class 'object'"
OBJECT = "object"
#: Of several attributes of a region, the one that is its class.
CLASS = ("class", "label", "name", "category", "type")
#: Words of a project of VIA 3.
THIRD = ('"data_format_version"', '"vid"')


def detects(root: Path) -> bool:
    """Whether a file has shapes as VIA writes them, or is one of its projects."""
    for path in first_files(root, ".json", ".csv"):
        text = head(path, 2**16)
        if any(word in text for word in ("shape_attributes", '"_via_')) or all(word in text for word in THIRD):
            return True
    return False


def read(reading: Reading) -> Found:
    """See the package."""
    pictures: dict[Path, Picture] = {}
    missing: list[str] = []
    for path in reading.files(".json", ".csv"):
        for name, entry in _rows(path) if path.suffix.lower() == ".csv" else _entries(read_json(path), path):
            image = reading.image(name, path.parent)
            if image is None:
                missing.append(name)
                continue
            if image in pictures:
                raise UserError(f"{path}: {name} means {image}, which has annotations already")
            if (size := reading.size(image)) is None:
                continue
            things = _things(entry.get("regions") or [], f"{path}: {name}", reading)
            pictures[image] = Picture(image, reading.split(path) or reading.split(image), size, things)
    reading.missing(missing, reading.root)
    return Found(list(pictures.values()), tuple(sorted({t.label for p in pictures.values() for t in p.things})))


def _entries(about: Any, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The images' names and what is said about them."""
    entries = about.get("_via_img_metadata", about) if isinstance(about, dict) else None
    if not isinstance(entries, dict):
        raise UserError(f"{path}: not VIA's JSON: no images by name")
    if "view" in entries and "metadata" in entries:
        raise UserError(f"{path}: a project of VIA 3, which is not read: export it as COCO")
    for key, entry in entries.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("filename"), str):
            raise UserError(f"{path}: entry {key[:40]!r} needs a filename")
        yield entry["filename"], entry


def _rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """As `_entries`, of a CSV file, which has a line for each region."""
    columns, *rows = read_csv(path) or [[]]
    wanted = ("filename", "region_shape_attributes", "region_attributes")
    if any(name not in columns for name in wanted):
        raise UserError(f"{path}: not VIA's CSV: it needs the columns {', '.join(wanted)}")
    regions: dict[str, list[Any]] = {}
    for line, row in enumerate(rows, 2):
        if len(row) != len(columns):
            raise UserError(f"{path}: line {line} has {len(row)} values, not {len(columns)}")
        name, shape, attributes = (row[columns.index(column)] for column in wanted)
        known = regions.setdefault(name, [])
        shape = parse_json(shape or "{}", path)
        if shape:  # a line without a shape is an image without regions
            known.append({"shape_attributes": shape, "region_attributes": parse_json(attributes or "{}", path)})
    return [(name, {"regions": found}) for name, found in regions.items()]


def _things(regions: Any, where: str, reading: Reading) -> list[Thing]:
    things = []
    listed = regions.values() if isinstance(regions, dict) else regions  # VIA 1 numbers them
    for place, region in enumerate(listed if isinstance(regions, list | dict) else [None]):
        here = f"{where}: region {place}"
        shape = region.get("shape_attributes") if isinstance(region, dict) else None
        if not isinstance(shape, dict):
            raise UserError(f"{here} needs shape_attributes")
        outline = _outline(shape, here)
        if outline is None:
            reading.notes[LINES] += 1
            continue
        label = _label(region.get("region_attributes"), here)
        reading.notes[UNNAMED] += label is None
        things.append(Thing(OBJECT if label is None else label, None, [outline]))
    return things


def _label(attributes: Any, where: str) -> str | None:
    """The class of a region; None if it has no attributes."""
    given = attributes if isinstance(attributes, dict) else {}
    texts = {}
    for name, value in given.items():
        chosen = [key for key, on in value.items() if on] if isinstance(value, dict) else [value]  # boxes to tick
        if len(chosen) == 1 and str(chosen[0]).strip():
            texts[name] = str(chosen[0]).strip()
    if len(texts) > 1:
        texts = {name: texts[name] for word in CLASS for name in texts if name.lower() == word} or texts
    if len(texts) > 1 and next(iter(texts)).lower() not in CLASS:
        raise UserError(
            f"{where}: which of its attributes {some(list(texts))} is the class? call it class, or export COCO from VIA"
        )
    if given and not texts:
        raise UserError(f"{where}: its attributes have no value, or several: {some(list(given))}")
    return next(iter(texts.values()), None)


def _outline(shape: dict[str, Any], where: str) -> list[float] | None:
    """A flat polygon; None of a shape without area."""

    def value(key: str) -> float:
        return number(shape.get(key), where, key)

    kind = shape.get("name")
    if kind in ("point", "polyline", "line"):
        return None
    if kind == "rect":
        x1, y1 = value("x"), value("y")
        x2, y2 = x1 + value("width"), y1 + value("height")
        return [x1, y1, x2, y1, x2, y2, x1, y2]
    if kind == "circle":
        return ellipse(value("cx"), value("cy"), value("r"), value("r"))
    if kind == "ellipse":
        turned = number(shape.get("theta", 0), where, "theta")
        return ellipse(value("cx"), value("cy"), value("rx"), value("ry"), turned)
    xs, ys = shape.get("all_points_x"), shape.get("all_points_y")
    if kind != "polygon" or not isinstance(xs, list) or not isinstance(ys, list) or len(xs) != len(ys):
        raise UserError(f"{where}: shape {str(kind)[:40]!r} is not known, or lacks its points")
    if len(xs) < 3:
        return None
    return [number(v, where, "a point") for point in zip(xs, ys, strict=True) for v in point]
