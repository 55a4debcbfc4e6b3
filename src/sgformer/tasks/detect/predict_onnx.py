"""Detecting objects with an exported file: onnxruntime, numpy and Pillow do it, torch is not imported."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sgformer.core.errors import UserError
from sgformer.data.image import open_image, short_and_longest, source_name
from sgformer.exporting.onnx_predict import ExportedNetwork, resize, resize_smooth
from sgformer.results import SHOWN, Detections, coco_result, named


def predict(
    network: ExportedNetwork,
    sources: Sequence[Path | Image.Image],
    *,
    score: float = SHOWN,
    image_size: Any = None,
) -> Iterator[tuple[Detections, Image.Image]]:
    """As of `Task.predict`.

    An image is scaled as for the weights themselves or, where that would not fit, to the file's size, and lies in its
    upper left corner. Results are those of the weights where it fills the file (but for less than 32 pixels, which
    weights pad with, too); elsewhere it is seen smaller, or with a larger empty rest.

    Args:
        network: an exported whole detector.
        sources: files or PIL images.
        score: detections of less confidence are left out; from .05 up.
        image_size: must be left out: a detector's file takes one size.

    Raises:
        UserError: an image cannot be read, the file holds a part of a detector only, or a value is invalid.
    """
    if not 0 <= score <= 1:
        raise UserError(f"--score must be in [0, 1], got {score}")
    network.refuse_size(image_size)
    metadata = network.metadata
    if metadata["part"] != "whole" or network.input_size is None:
        raise UserError(f"{network.path}: holds {metadata['part']}, not a whole detector")
    sides = short_and_longest(metadata["image_size"])
    for i, source in enumerate(sources):
        image = open_image(source)
        size = image.height, image.width
        height, width = _fit_inside(size, sides, network.input_size)
        found = network(_in_corner(network, image, (height, width)))
        boxes = np.minimum(
            found["boxes"], np.array([width, height] * 2, np.float32)
        )  # the file knows its own edges only
        keep = (found["scores"] >= score) & (boxes[:, 2:] > boxes[:, :2]).all(1)
        boxes = boxes[keep] * np.array([size[1] / width, size[0] / height] * 2, np.float32)
        rows = zip(boxes, found["labels"][keep].tolist(), found["scores"][keep].tolist(), strict=True)
        masks = found["masks"][keep][:, 0] if "masks" in found else None
        name = source_name(source, i)
        results = [
            coco_result(name, label, box.tolist(), sure, None if masks is None else paste_mask(masks[k], box, size))
            for k, (box, label, sure) in enumerate(rows)
        ]
        yield Detections(name, named(results, metadata["category_ids"], network.classes), size), image


def prepare(network: ExportedNetwork, image: Image.Image) -> np.ndarray:
    """An image as an exported detector takes it: (1, 3, H, W) float32."""
    assert network.input_size is not None
    return resize_smooth(network.normalised(np.asarray(image)), network.input_size)[None]


def _fit_inside(size: tuple[int, int], sides: tuple[int, int], room: tuple[int, int]) -> tuple[int, int]:
    """The (height, width) at which a detector looks at an image: sides as trained, or less where the room is less."""
    (height, width), (short, longest) = size, sides
    ratio = min(short / min(size), longest / max(size), room[0] / height, room[1] / width)
    return max(1, int(height * ratio)), max(1, int(width * ratio))


def _in_corner(network: ExportedNetwork, image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """An image of a (height, width) in the upper left corner of what a file takes, normalised, zeros elsewhere:
    (1, 3, H, W)."""
    assert network.input_size is not None
    height, width = size
    scaled = image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BILINEAR)
    filled = np.zeros((1, 3, *network.input_size), np.float32)
    filled[0, :, :height, :width] = network.normalised(np.asarray(scaled))
    return filled


def paste_mask(mask: np.ndarray, box: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The mask of a whole image: (H, W) bool.

    Args:
        mask: (28, 28), the share of a box's cells that an object covers.
        box: [x1, y1, x2, y2] in pixels of the image.
        size: its (height, width).
    """
    cells = len(mask)
    # A cell more on every side, so that the edge of the mask is soft, too.
    half = (box[2:] - box[:2]) * np.float32(0.5 * (cells + 2) / cells)
    middle = (box[2:] + box[:2]) * np.float32(0.5)
    (x1, y1), (x2, y2) = (middle - half).astype(np.int64), (middle + half).astype(np.int64)
    laid = resize(np.pad(mask, 1)[None], (int(y2 - y1 + 1), int(x2 - x1 + 1)))[0] > 0.5
    whole = np.zeros(size, bool)
    top, left = max(y1, 0), max(x1, 0)
    bottom, right = min(y2 + 1, size[0]), min(x2 + 1, size[1])
    whole[top:bottom, left:right] = laid[top - y1 : bottom - y1, left - x1 : right - x1]
    return whole
