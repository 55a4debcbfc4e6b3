"""A COCO data set small enough to be solved by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def rectangle(x: float, y: float, w: float, h: float) -> list[list[float]]:
    """A rectangle as COCO polygons."""
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def thing(image: Any, category: Any, box: list[float], **more: Any) -> dict[str, Any]:
    """An annotation with a rectangular mask; ids come with `write_coco`."""
    return {
        "image_id": image,
        "category_id": category,
        "bbox": box,
        "area": box[2] * box[3],
        "iscrowd": 0,
        "segmentation": rectangle(*box),
        **more,
    }


def content(
    annotations: list[dict[str, Any]], images: int = 2, size: tuple[int, int] = (64, 48), **more: Any
) -> dict[str, Any]:
    """A file's content: images 10, 20 ... of (width, height), classes cat (3) and dog (7): ids with gaps."""
    return {
        "images": [
            {"id": 10 * i, "file_name": f"{10 * i}.png", "width": size[0], "height": size[1]}
            for i in range(1, images + 1)
        ],
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
        "annotations": [{"id": i, **a} for i, a in enumerate(annotations, 1)],
        **more,
    }


#: Keypoints of a category, two of which have sides, and of an object: a point each at its corners.
POINTS = {"keypoints": ["nose", "left_eye", "right_eye", "tail"], "skeleton": [[1, 2], [1, 3], [1, 4]]}


def pointed(image: Any, category: Any, box: list[float], **more: Any) -> dict[str, Any]:
    """A `thing` with `POINTS`: visible ones at its corners, clockwise from the upper left, the last one hidden."""
    x, y, w, h = box
    corners = [(x, y, 2), (x + w - 1, y, 2), (x + w - 1, y + h - 1, 2), (x, y + h - 1, 1)]
    return thing(image, category, box, **{"keypoints": [v for corner in corners for v in corner], **more})


def pointed_content(annotations: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """`content` of classes that have `POINTS`."""
    whole = content(annotations, **more)
    return {**whole, "categories": [{**category, **POINTS} for category in whole["categories"]]}


def write_coco(root: Path, data: dict[str, Any], split: str = "train") -> Path:
    """Write `annotations/instances_SPLIT.json` and images in `SPLIT/`, bright boxes on noise; returns the JSON."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / split).mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(data["images"]):
        size = (image.get("height", 48), image.get("width", 64), 3)
        pixels = np.random.default_rng(number).integers(0, 120, size, dtype=np.uint8)
        for a in data["annotations"]:
            if a["image_id"] == image["id"]:
                x, y, w, h = (max(0, int(v)) for v in a["bbox"])
                pixels[y : y + h, x : x + w, 0 if a["category_id"] == 3 else 2] = 250
        Image.fromarray(pixels).save(root / split / image["file_name"])
    file = root / "annotations" / f"instances_{split}.json"
    file.write_text(json.dumps(data))
    return file
