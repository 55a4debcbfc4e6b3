"""Detecting objects with an exported file: onnxruntime, numpy and Pillow only, without torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from sgformer.core.errors import UserError
from sgformer.data.image import Images, short_and_longest
from sgformer.exporting.onnx_predict import ExportedNetwork, resize, resize_smooth
from sgformer.results import SHOWN, Detections, coco_result, named


def predict(
    network: ExportedNetwork,
    images: Images,
    *,
    score: float = SHOWN,
    image_size: Any = None,
) -> Iterator[tuple[Detections, Image.Image]]:
    """See `Task.predict`.

    An image is scaled as for the weights or, if that does not fit, to fit the file's size, and placed in its upper
    left corner. Results are those of the weights if it fills the file up to the less than 32 pixels that weights pad
    with, too; otherwise the image is smaller, or its padding larger.

    Args:
        network: an exported whole detector.
        images: the images.
        score: minimum confidence, of .05 or more.
        image_size: must be None: the file of a detector has a fixed size.

    Raises:
        UserError: an image cannot be read, the file holds only a part of a detector, or a value is invalid.
    """
    if not 0 <= score <= 1:
        raise UserError(f"--score must be in [0, 1], got {score}")
    network.refuse_size(image_size)
    network.require("part", "category_ids")
    metadata = network.metadata
    if metadata["task"] == "keypoints":
        network.require("keypoints", "skeleton")
    if metadata["part"] != "whole" or network.input_size is None:
        raise UserError(f"{network.path}: holds {metadata['part']}, not a whole detector")
    sides = short_and_longest(metadata["image_size"])
    for name, image in images:
        size = image.height, image.width
        height, width = _fit_inside(size, sides, network.input_size)
        found = _checked(network, network(_in_corner(network, image, (height, width))))
        boxes = np.minimum(
            found["boxes"], np.array([width, height] * 2, np.float32)
        )  # the file clips at its own edges only
        keep = (found["scores"] >= score) & (boxes[:, 2:] > boxes[:, :2]).all(1)
        boxes = boxes[keep] * np.array([size[1] / width, size[0] / height] * 2, np.float32)
        rows = zip(boxes, found["labels"][keep].tolist(), found["scores"][keep].tolist(), strict=True)
        masks = found["masks"][keep][:, 0] if "masks" in found else None
        points = None
        if "keypoints" in found:
            factors = np.array([size[1] / width, size[0] / height, 1], np.float32)
            points = np.minimum(found["keypoints"][keep], np.array([width, height, 1], np.float32)) * factors
        results = [
            coco_result(
                name,
                label,
                box.tolist(),
                conf,
                None if masks is None else paste_mask(masks[k], box, size),
                None if points is None else points[k].tolist(),
            )
            for k, (box, label, conf) in enumerate(rows)
        ]
        yield Detections(name, named(results, metadata["category_ids"], network.classes), size), image


def prepare(network: ExportedNetwork, image: Image.Image) -> np.ndarray:
    """An image as input of an exported detector: (1, 3, H, W) float32."""
    assert network.input_size is not None
    return resize_smooth(network.normalised(np.asarray(image)), network.input_size)[None]


def _checked(network: ExportedNetwork, found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs of a detector.

    Raises:
        UserError: they are of another kind or shape, or their classes unknown.
    """
    count = len(found["boxes"]) if found.get("boxes") is not None and found["boxes"].ndim == 2 else -1
    shapes = {"boxes": (count, 4), "scores": (count,), "labels": (count,)}
    fits = all(name in found and found[name].shape == shape for name, shape in shapes.items())
    masks = found.get("masks")
    fits = fits and (masks is None or (masks.ndim == 4 and masks.shape[:2] == (count, 1) and masks[:1].size < 2**16))
    if (named := network.metadata.get("keypoints")) is not None:
        points = found.get("keypoints")
        fits = fits and points is not None and points.shape == (count, len(named), 3)
    if not fits or not np.isin(found["labels"], range(len(network.classes))).all():
        raise UserError(f"{network.path}: its outputs are not those of a detector of {len(network.classes)} classes")
    return found


def _fit_inside(size: tuple[int, int], sides: tuple[int, int], limits: tuple[int, int]) -> tuple[int, int]:
    """The (height, width) that an image is scaled to: sides as trained, or smaller to fit the limits."""
    (height, width), (short, longest) = size, sides
    ratio = min(short / min(size), longest / max(size), limits[0] / height, limits[1] / width)
    return max(1, int(height * ratio)), max(1, int(width * ratio))


def _in_corner(network: ExportedNetwork, image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """An image resized to (height, width) and normalised, in the upper left corner of the file's input:
    (1, 3, H, W), zeros elsewhere."""
    assert network.input_size is not None
    height, width = size
    scaled = image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BILINEAR)
    filled = np.zeros((1, 3, *network.input_size), np.float32)
    filled[0, :, :height, :width] = network.normalised(np.asarray(scaled))
    return filled


def paste_mask(mask: np.ndarray, box: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The mask of a whole image: (H, W) bool.

    Args:
        mask: (28, 28), the fraction of each cell of the box that an object covers.
        box: [x1, y1, x2, y2] in pixels of the image.
        size: its (height, width).
    """
    cells = len(mask)
    # One more cell on every side, so that the edge of the mask is soft, too.
    half = (box[2:] - box[:2]) * np.float32(0.5 * (cells + 2) / cells)
    middle = (box[2:] + box[:2]) * np.float32(0.5)
    (x1, y1), (x2, y2) = (middle - half).astype(np.int64), (middle + half).astype(np.int64)
    pasted = resize(np.pad(mask, 1)[None], (int(y2 - y1 + 1), int(x2 - x1 + 1)))[0] > 0.5
    whole = np.zeros(size, bool)
    top, left = max(y1, 0), max(x1, 0)
    bottom, right = min(y2 + 1, size[0]), min(x2 + 1, size[1])
    whole[top:bottom, left:right] = pasted[top - y1 : bottom - y1, left - x1 : right - x1]
    return whole
