"""The ONNX files of `sgformer export`, run by onnxruntime with numpy and Pillow, without torch.

The file's metadata describe the preprocessing. `tasks/TASK/predict_onnx.py` turns outputs into results.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sgformer.core.errors import UserError, first_line, require
from sgformer.data.image import fit_size
from sgformer.models.metadata import parse_metadata
from sgformer.models.metadata import require as require_entries


class ExportedNetwork:
    """A network in an ONNX file, ready to run on the CPU.

    Args:
        path: a file that `sgformer export` wrote.
        threads: of onnxruntime; by default its own choice.

    Attributes:
        metadata: stored in the file: `task`, `classes`, `image_size`, `mean`, `std` and so on.
        input_size: its fixed (height, width); None if open.

    Raises:
        UserError: the file is missing or not of `sgformer export`, its metadata are invalid, or onnxruntime is not
            installed.
    """

    #: What every file states; `tasks/TASK/predict_onnx.py` asks for more.
    needs = ("task", "classes", "mean", "std", "image_size", "input_size", "multiple")

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
        except Exception as error:  # onnxruntime's exceptions have no common base
            raise UserError(f"{path}: not an ONNX file that onnxruntime can run ({first_line(error)})") from None
        stored = self.session.get_modelmeta().custom_metadata_map
        if "sgformer" not in stored:
            raise UserError(f"{path}: was not written by sgformer export, so its preprocessing is unknown")
        self.metadata: dict[str, Any] = parse_metadata(stored["sgformer"], path)
        self.require(*self.needs)
        if [one.name for one in self.session.get_inputs()] != ["image"]:
            raise UserError(f"{path}: its inputs are not the image alone")
        self.input_size: tuple[int, int] | None = None
        if self.metadata["input_size"] is not None:
            self.input_size = (self.metadata["input_size"][0], self.metadata["input_size"][1])

    def require(self, *keys: str) -> None:
        """Raise UserError if entries of the metadata are missing."""
        require_entries(self.metadata, keys, self.path)

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Normalised images (B, 3, H, W) float32 -> every output by name.

        Raises:
            UserError: the file cannot be run on them.
        """
        names = [output.name for output in self.session.get_outputs()]
        try:
            found = self.session.run(names, {"image": images.astype(np.float32, copy=False)})
        except Exception as error:  # onnxruntime's exceptions have no common base
            raise UserError(f"{self.path}: onnxruntime cannot run it ({first_line(error)})") from None
        return dict(zip(names, found, strict=True))

    def logits(self, images: np.ndarray, dims: int) -> np.ndarray:
        """Normalised images -> the output `logits` of so many dimensions, with a score of every class, float32.

        Raises:
            UserError: there is no such output.
        """
        found = np.asarray(self(images).get("logits"))
        if found.ndim != dims or found.shape[:2] != (len(images), len(self.classes)) or found.dtype.kind != "f":
            shape = "x".join(map(str, found.shape))
            raise UserError(
                f"{self.path}: its output logits is {shape or 'missing'}, not for {len(self.classes)} classes"
            )
        return found.astype(np.float32)

    def refuse_size(self, image_size: Any) -> None:
        """Raise UserError if an image size is given and the file's is fixed."""
        if image_size is not None and self.input_size is not None:
            height, width = self.input_size
            raise UserError(f"{self.path}: takes {height} x {width} pixels only, without --image-size")

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.metadata["classes"])

    def normalised(self, pixels: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 -> (3, H, W) float32, mean and deviation removed."""
        mean, std = (np.array(self.metadata[name], np.float32)[:, None, None] for name in ("mean", "std"))
        return (pixels.transpose(2, 0, 1).astype(np.float32) / np.float32(255) - mean) / std


# -- preparing images -------------------------------------------------------------------------------------------------


def fit_multiple(image: Image.Image, short_side: int, step: int) -> tuple[int, int]:
    """The (height, width) that segmentation resizes an image to, each side rounded to a multiple of ``step``."""
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
    return _resize_axis(_resize_axis(x, 1, size[0]), 2, size[1])


def _resize_axis(x: np.ndarray, axis: int, length: int, part: slice = slice(None)) -> np.ndarray:
    """`resize` of axis 1 or 2 alone, or a part of its result."""
    size_in = x.shape[axis]
    if size_in == length:
        return x[:, part] if axis == 1 else x[:, :, part]
    at = np.maximum((np.arange(length)[part] + 0.5) * (size_in / length) - 0.5, 0)
    low = np.minimum(at.astype(np.int64), size_in - 1)
    share = (at - low).astype(x.dtype).reshape((-1, 1) if axis == 1 else (-1,))
    above = np.minimum(low + 1, size_in - 1)
    return x.take(low, axis) * (1 - share) + x.take(above, axis) * share


#: Bytes of class scores that are resized at once.
PART = 2**26


def labels_of(logits: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The class of the largest of resized logits (C, h, w) at each pixel: (H, W) int64, in bounded memory."""
    step = max(1, PART // (logits.itemsize * len(logits) * size[1]))
    parts = []
    for top in range(0, size[0], step):
        rows = _resize_axis(logits, 1, size[0], slice(top, min(top + step, size[0])))
        parts.append(_resize_axis(rows, 2, size[1]).argmax(0))
    return np.concatenate(parts)


def softmax(x: np.ndarray, axis: int) -> np.ndarray:
    """Shares that sum to 1 along an axis."""
    shifted = np.exp(x - x.max(axis, keepdims=True))
    return shifted / shifted.sum(axis, keepdims=True)
