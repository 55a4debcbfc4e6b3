"""Segmenting images with an exported file: onnxruntime, numpy and Pillow only, without torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from sgformer.core.errors import UserError
from sgformer.data.image import Images
from sgformer.exporting.onnx_predict import ExportedNetwork, fit_multiple, labels_of, resize_smooth
from sgformer.results import Segments


def predict(
    network: ExportedNetwork,
    images: Images,
    *,
    image_size: Any = None,
) -> Iterator[tuple[Segments, Image.Image]]:
    """See `Task.predict`. A file of fixed size slides over the image as a window, by two thirds of itself.

    Args:
        network: an exported segmenter.
        images: the images.
        image_size: short side in pixels; by default as trained.

    Raises:
        UserError: an image cannot be read, or the size is invalid.
    """
    network.require("short_side", "reduce_zero_label")
    short = network.metadata["short_side"] if image_size is None else image_size
    if not isinstance(short, int) or short < 32:
        raise UserError(f"--image-size is one number from 32 up, the short side; got {image_size}")
    if network.input_size:
        short = max(short, *network.input_size)  # so that the window fits
    for name, image in images:
        target = fit_multiple(image, short, 1 if network.input_size else network.metadata["multiple"])
        pixels = resize_smooth(network.normalised(np.asarray(image)), target)
        logits = network.logits(pixels[None], 4)[0] if network.input_size is None else slide(network, pixels)
        labels = labels_of(logits, (image.height, image.width))
        yield Segments(name, labels, network.classes, int(network.metadata["reduce_zero_label"])), image


def prepare(network: ExportedNetwork, image: Image.Image) -> np.ndarray:
    """An image as input of an exported segmenter: (1, 3, H, W) float32."""
    about = network.metadata
    target = network.input_size or fit_multiple(image, about["short_side"], about["multiple"])
    return resize_smooth(network.normalised(np.asarray(image)), target)[None]


def slide(network: ExportedNetwork, image: np.ndarray) -> np.ndarray:
    """Logits (classes, H, W), averaged over overlapping windows of the network's input size."""
    assert network.input_size is not None
    total, count = np.zeros(()), np.zeros(image.shape[1:], np.float32)
    (rows, high), (cols, wide) = (
        ([*range(0, length - side, max(1, side * 2 // 3)), length - side], side)
        for length, side in zip(image.shape[1:], network.input_size, strict=True)
    )
    for top in rows:
        for left in cols:
            rows_in, cols_in = slice(top, top + high), slice(left, left + wide)
            logits = network.logits(image[None, :, rows_in, cols_in], 4)[0]
            if total.ndim == 0:
                total = np.zeros((len(logits), *image.shape[1:]), np.float32)
            total[:, rows_in, cols_in] += logits
            count[rows_in, cols_in] += 1
    return total / count
