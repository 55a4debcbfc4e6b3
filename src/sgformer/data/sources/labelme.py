"""labelme: a JSON file per image with shapes in pixels; image flags give a class per image."""

from __future__ import annotations

import base64
import binascii
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sgformer.core.errors import UserError, require
from sgformer.data.image import read_image
from sgformer.data.sources.base import Found, Picture, Reading, Thing, ellipse, first_files, head, number, read_json

LINES = "points and lines, which have no area, left out"
EMBEDDED = "images taken from the JSON files themselves"


class _LeftOut(Exception):
    """An image is left out; that is counted."""


def detects(root: Path) -> bool:
    """Whether the first JSON file has shapes and a path of an image."""
    for path in first_files(root, ".json"):
        text = head(path, 2**16)
        if '"shapes"' in text and ('"imagePath"' in text or '"imageData"' in text or '"version"' in text):
            return True
    return False


def read(reading: Reading) -> Found:
    """See the package."""
    pictures: list[Picture] = []
    missing: list[str] = []
    labels: set[str] = set()
    for path in reading.files(".json"):
        about = read_json(path)
        if not isinstance(about, dict) or not isinstance(about.get("shapes"), list):
            if reading.root.is_file():
                raise UserError(f"{path}: not labelme's JSON: no list 'shapes'")
            continue
        picture = _picture(about, path, reading, missing)
        if picture is None:
            continue
        assert picture.size is not None
        if reading.layout == "imagenet":
            picture.label = _flag(about.get("flags"), path)
            labels.add(picture.label)
        else:
            try:
                picture.things = _things(about["shapes"], path, picture.size, reading)
            except _LeftOut:
                continue
            labels |= {thing.label for thing in picture.things}
        reading.notes[EMBEDDED] += picture.data is not None
        pictures.append(picture)
    reading.missing(missing, reading.root)
    return Found(pictures, tuple(sorted(labels)))


def _picture(about: dict[str, Any], path: Path, reading: Reading, missing: list[str]) -> Picture | None:
    name = about.get("imagePath")
    image = reading.image(name, path.parent) if isinstance(name, str) else None
    image = image or reading.image(path.stem, path.parent)
    split = reading.split(path)
    if image is not None:
        size = reading.size(image)
        return None if size is None else Picture(image, split or reading.split(image), size)
    if isinstance(embedded := about.get("imageData"), str):
        where = f"{path}: imageData"
        if (data := reading.readable(lambda: _decoded(embedded, where))) is None:
            return None
        suffix = Path(name).suffix if isinstance(name, str) else ""
        size = reading.size(data, where)
        return None if size is None else Picture(path.with_suffix(suffix or ".png"), split, size, data=data)
    missing.append(str(name or path.stem))
    return None


def _decoded(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise UserError(f"{where} is not base64") from None


def _flag(flags: Any, path: Path) -> str:
    on = [str(name) for name, value in flags.items() if value is True] if isinstance(flags, dict) else []
    if len(on) != 1:
        raise UserError(f"{path}: {len(on)} flags are set; a class per image needs exactly one")
    return on[0]


def _things(shapes: list[Any], path: Path, size: tuple[int, int], reading: Reading) -> list[Thing]:
    """Shapes of one label and group_id are one object.

    Raises:
        _LeftOut: a mask among them cannot be read, and images may be left out.
    """
    result: list[Thing] = []
    groups: dict[tuple[str, Any], int] = {}
    for place, shape in enumerate(shapes):
        where = f"{path}: shape {place}"
        if not isinstance(shape, dict) or not isinstance(label := shape.get("label"), (str, int)):
            raise UserError(f"{where} needs a label")
        polygon = _outline(shape, where, size, reading)
        if polygon is None:
            reading.notes[LINES] += 1
            continue
        group = shape.get("group_id")
        key = (str(label), group) if isinstance(group, (int, str)) else None
        if key is not None and key in groups and isinstance(polygon, list):
            known = result[groups[key]]
            if isinstance(known.polygons, list):
                result[groups[key]] = Thing(known.label, None, [*known.polygons, *polygon])
                continue
        if key is not None:
            groups[key] = len(result)
        result.append(Thing(str(label), None, polygon))
    return result


def _outline(shape: dict[str, Any], where: str, size: tuple[int, int], reading: Reading) -> Any:
    """Polygons or RLE of a shape; None if it has no area."""
    kind = shape.get("shape_type") or "polygon"
    points = shape.get("points")
    if not isinstance(points, list) or not all(isinstance(p, list) and len(p) == 2 for p in points):
        raise UserError(f"{where}: points must be a list of [x, y]")
    xy = [(number(x, where, "a point"), number(y, where, "a point")) for x, y in points]
    if kind == "rectangle" and len(xy) >= 2:
        x1, x2 = min(x for x, _ in xy), max(x for x, _ in xy)
        y1, y2 = min(y for _, y in xy), max(y for _, y in xy)
        return [[x1, y1, x2, y1, x2, y2, x1, y2]]
    if kind == "circle" and len(xy) == 2:
        radius = math.dist(*xy)
        return [ellipse(*xy[0], radius, radius)]
    if kind == "mask" and len(xy) == 2 and isinstance(shape.get("mask"), str):
        pixels = reading.readable(lambda: _mask_pixels(shape["mask"], f"{where}: its mask"))
        if pixels is None:
            raise _LeftOut
        return _mask(pixels, xy, size)
    if kind in ("polygon", "rotated_rectangle", "oriented_rectangle") and len(xy) >= 3:
        return [[v for point in xy for v in point]]
    if kind in ("point", "points", "line", "linestrip") or len(xy) < 3:
        return None
    raise UserError(f"{where}: shape_type {str(kind)[:40]!r} is not known")


def _mask_pixels(text: str, where: str) -> np.ndarray:
    return np.asarray(read_image(io.BytesIO(_decoded(text, where)), where))[..., 0] > 0


def _mask(small: np.ndarray, corners: list[tuple[float, float]], size: tuple[int, int]) -> dict[str, Any]:
    """A small picture of a mask at its place, as RLE."""
    width, height = size
    left, top = (round(v) for v in corners[0])
    whole = Image.new("L", size)
    whole.paste(Image.fromarray(small.astype(np.uint8)), (left, top))
    rle = require("pycocotools.mask", "detect").encode(np.asfortranarray(np.asarray(whole)))
    return {"size": [height, width], "counts": rle["counts"].decode()}
