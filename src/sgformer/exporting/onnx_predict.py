"""Prediction with the ONNX files of `sgformer export`: onnxruntime, numpy and Pillow do it, torch is not imported.

The file says how images are to be prepared; what is done here is what `sgformer predict` does with the run itself.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sgformer.core.errors import UserError, first_line, require
from sgformer.data.image import fit_size, short_and_longest
from sgformer.results import SHOWN, Detections, Prediction, Segments, coco_result, find_images, named, open_image

Images = str | os.PathLike[str] | Image.Image | Sequence[str | os.PathLike[str] | Image.Image]


class ExportedNetwork:
    """A network in an ONNX file, ready to run on the CPU.

    Args:
        path: a file that `sgformer export` wrote.
        threads: of onnxruntime; by default as it chooses.

    Attributes:
        metadata: what the file says of itself: `task`, `classes`, `image_size`, `mean`, `std` and so on.
        input_size: (height, width) that it takes; None where any will do.

    Raises:
        UserError: no such file, or not one of ours; onnxruntime is not installed.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int | None = None):
        runtime = require("onnxruntime", extra="onnx")
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{path}: no such file")
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        if threads:
            options.intra_op_num_threads = threads
        try:
            self.session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has no common base for what it raises
            raise UserError(f"{path}: not an ONNX file that can be run ({first_line(error)})") from None
        stored = self.session.get_modelmeta().custom_metadata_map
        if "sgformer" not in stored:
            raise UserError(f"{path}: was not written by sgformer export, so how to prepare images is not known")
        self.metadata: dict[str, Any] = json.loads(stored["sgformer"])
        self.input_size: tuple[int, int] | None = None
        if self.metadata["input_size"] is not None:
            self.input_size = (self.metadata["input_size"][0], self.metadata["input_size"][1])

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Normalised images (B, 3, H, W) float32 -> every output by name."""
        names = [output.name for output in self.session.get_outputs()]
        return dict(zip(names, self.session.run(names, {"image": images.astype(np.float32, copy=False)}), strict=True))

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.metadata["classes"])

    def normalised(self, pixels: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 -> (3, H, W) float32, mean and deviation removed."""
        mean, std = (np.array(self.metadata[name], np.float32)[:, None, None] for name in ("mean", "std"))
        return (pixels.transpose(2, 0, 1).astype(np.float32) / np.float32(255) - mean) / std


File = str | os.PathLike[str] | ExportedNetwork


def predict(
    file: File, images: Images, *, top: int = 5, batch_size: int = 32, image_size: Any = None
) -> list[Prediction]:
    """The most probable classes of images, as `sgformer.predict` gives them.

    Args:
        file: an exported classifier, or its network if that is open already.
        images: one or several files, folders (searched for images, also nested) or PIL images.
        top: number of classes per image.
        batch_size: images at a time.
        image_size: pixels, or (height, width); by default as trained. Only where the file leaves it open.

    Raises:
        UserError: file or image cannot be read, or the size does not do.
    """
    network = _open(file, "classify", image_size)
    size = image_size or network.input_size or network.metadata["image_size"]
    size = (size, size) if isinstance(size, int) else (size[0], size[1])
    _check_size(network, size)
    sources = _sources(images)
    result = []
    for start in range(0, len(sources), batch_size):
        part = sources[start : start + batch_size]
        batch = np.stack([network.normalised(centre(open_image(s), size, network.metadata["crop_pct"])) for s in part])
        shares = _softmax(network(batch)["logits"].astype(np.float32), 1)
        for i, (source, row) in enumerate(zip(part, shares, strict=True), start):
            order = np.argsort(-row, kind="stable")[:top]
            labels = tuple((network.classes[k], float(row[k])) for k in order)
            result.append(Prediction(_name(source, i), labels))
    return result


def predict_segmentation(file: File, images: Images, *, image_size: Any = None) -> Iterator[Segments]:
    """The class of every pixel of images, as `api_segment.predict_segmentation` gives it, one image at a time.

    A file of fixed size is moved over the image as a window, two thirds of itself at a time.

    Args:
        file: an exported segmenter, or its network.
        images: as of :func:`predict`.
        image_size: short side in pixels; by default as trained.

    Raises:
        UserError: file or image cannot be read, or the size does not do.
    """
    network = _open(file, "segment")
    short = network.metadata["short_side"] if image_size is None else image_size
    if not isinstance(short, int) or short < 32:
        raise UserError(f"--image-size is one number from 32 up, the short side; got {image_size}")
    if network.input_size:
        short = max(short, *network.input_size)  # so that the window fits in
    for i, source in enumerate(_sources(images)):
        image = open_image(source)
        size = (image.height, image.width)
        target = fit_multiple(image, short, 1 if network.input_size else network.metadata["multiple"])
        pixels = resize_smooth(network.normalised(np.asarray(image)), target)
        logits = network(pixels[None])["logits"][0] if network.input_size is None else _slide(network, pixels)
        labels = resize(logits.astype(np.float32), size).argmax(0)
        yield Segments(_name(source, i), labels, network.classes, int(network.metadata["reduce_zero_label"]))


def predict_detections(
    file: File, images: Images, *, score: float = SHOWN, image_size: Any = None
) -> Iterator[Detections]:
    """Boxes, classes, scores and masks of images, as `api_detect.predict_detections` gives them, one image at a time.

    An image is scaled as for the weights themselves or, where that would not fit, to the file's size, and lies in its
    upper left corner. Answers are those of the weights where it fills the file (but for less than 32 pixels, which
    weights pad with, too); elsewhere it is seen smaller, or with a larger empty rest.

    Args:
        file: an exported whole detector, or its network.
        images: as of :func:`predict`.
        score: detections of less confidence are left out; from .05 up.
        image_size: must be left out: a detector's file takes one size.

    Raises:
        UserError: file or image cannot be read, the file holds a part of a detector only, or a value does not do.
    """
    if not 0 <= score <= 1:
        raise UserError(f"--score must be in [0, 1], got {score}")
    network = _open(file, "detect", image_size)
    metadata = network.metadata
    if metadata["part"] != "whole" or network.input_size is None:
        raise UserError(f"{network.path}: holds {metadata['part']}, not a whole detector")
    sides = short_and_longest(metadata["image_size"])
    for i, source in enumerate(_sources(images)):
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
        name = _name(source, i)
        results = [
            coco_result(name, label, box.tolist(), sure, None if masks is None else paste_mask(masks[k], box, size))
            for k, (box, label, sure) in enumerate(rows)
        ]
        yield Detections(name, named(results, metadata["category_ids"], network.classes), size)


# -- preparing images -------------------------------------------------------------------------------------------------


def centre(image: Image.Image, size: tuple[int, int], crop_pct: float) -> np.ndarray:
    """Resize (bicubic) to ``size / crop_pct``, crop the centre: (height, width, 3) uint8. As timm evaluates."""
    goal = [math.floor(side / crop_pct) for side in size]
    if goal[0] == goal[1]:
        short, long = sorted(image.size)
        sides = goal[0], int(goal[0] * long / short)
        width, height = sides if image.width <= image.height else sides[::-1]
    else:
        ratio = min(image.height / goal[0], image.width / goal[1])
        height, width = round(image.height / ratio), round(image.width / ratio)
    image = image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC)
    top, left = round((height - size[0]) / 2), round((width - size[1]) / 2)
    return np.asarray(image.crop((left, top, left + size[1], top + size[0])))


def fit_multiple(image: Image.Image, short_side: int, step: int) -> tuple[int, int]:
    """The (height, width) at which segmentation looks at an image, each side rounded to a multiple of ``step``."""
    height, width = fit_size(image.height, image.width, short_side)
    return step * round(height / step), step * round(width / step)


def resize_smooth(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear resize with antialiasing: (C, H, W) float32 -> (C, *size)."""
    if image.shape[1:] == size:
        return image
    height, width = size
    return np.stack([np.asarray(Image.fromarray(c).resize((width, height), Image.Resampling.BILINEAR)) for c in image])


def resize(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear resize, corners not aligned, without antialiasing: (C, H, W) -> (C, *size)."""
    for axis, length in enumerate(size, 1):
        have = x.shape[axis]
        if have == length:
            continue
        at = np.maximum((np.arange(length) + 0.5) * (have / length) - 0.5, 0)
        low = np.minimum(at.astype(np.int64), have - 1)
        share = (at - low).astype(x.dtype).reshape((-1, 1) if axis == 1 else (-1,))
        above = np.minimum(low + 1, have - 1)
        x = x.take(low, axis) * (1 - share) + x.take(above, axis) * share
    return x


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


def _slide(network: ExportedNetwork, image: np.ndarray) -> np.ndarray:
    """Logits (classes, H, W), averaged over overlapping windows of the size that the network takes."""
    assert network.input_size is not None
    total, count = np.zeros(()), np.zeros(image.shape[1:], np.float32)
    (rows, high), (cols, wide) = (
        ([*range(0, length - side, max(1, side * 2 // 3)), length - side], side)
        for length, side in zip(image.shape[1:], network.input_size, strict=True)
    )
    for top in rows:
        for left in cols:
            rows_in, cols_in = slice(top, top + high), slice(left, left + wide)
            logits = network(image[None, :, rows_in, cols_in])["logits"][0].astype(np.float32)
            if total.ndim == 0:
                total = np.zeros((len(logits), *image.shape[1:]), np.float32)
            total[:, rows_in, cols_in] += logits
            count[rows_in, cols_in] += 1
    return total / count


# -- small things -----------------------------------------------------------------------------------------------------


def _open(file: File, task: str, image_size: Any = None) -> ExportedNetwork:
    network = file if isinstance(file, ExportedNetwork) else ExportedNetwork(file)
    path = network.path
    if network.metadata["task"] != task:
        raise UserError(f"{path}: is for {network.metadata['task']}, not for {task}")
    if image_size is not None and network.input_size is not None:
        raise UserError(f"{path}: takes {network.input_size[0]} x {network.input_size[1]} pixels and no other size")
    return network


def _check_size(network: ExportedNetwork, size: tuple[int, int]) -> None:
    step = network.metadata["multiple"]
    if network.input_size is None and (min(size) < 32 or size[0] % step or size[1] % step):
        steps = f" in steps of {step}" if step > 1 else ""
        raise UserError(f"{network.path}: takes images from 32 pixels up{steps}, got {size[0]} x {size[1]}")


def _sources(images: Images) -> list[Path | Image.Image]:
    return list(find_images([images] if isinstance(images, (str, os.PathLike, Image.Image)) else images))


def _name(source: Path | Image.Image, number: int) -> str:
    return str(number) if isinstance(source, Image.Image) else str(source)


def _softmax(x: np.ndarray, axis: int) -> np.ndarray:
    shifted = np.exp(x - x.max(axis, keepdims=True))
    return shifted / shifted.sum(axis, keepdims=True)
