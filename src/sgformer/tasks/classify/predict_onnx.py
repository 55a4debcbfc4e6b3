"""Classifying images with an exported file: onnxruntime, numpy and Pillow only, without torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from sgformer.core.errors import UserError
from sgformer.data.image import Images, centre, height_and_width
from sgformer.exporting.onnx_predict import ExportedNetwork, softmax
from sgformer.results import Prediction


def predict(
    network: ExportedNetwork,
    images: Images,
    *,
    top: int = 5,
    batch_size: int = 32,
    image_size: Any = None,
) -> Iterator[tuple[Prediction, Image.Image]]:
    """See `Task.predict`.

    Args:
        network: an exported classifier.
        images: the images.
        top: number of classes per image.
        batch_size: images per batch.
        image_size: pixels, or (height, width); by default as trained. Only if the file leaves it open.

    Raises:
        UserError: an image cannot be read, or the size is invalid.
    """
    network.refuse_size(image_size)
    network.require("crop_pct")
    size = height_and_width(image_size or network.input_size or network.metadata["image_size"])
    step = network.metadata["multiple"]
    if network.input_size is None and (min(size) < 32 or size[0] % step or size[1] % step):
        steps = f" in steps of {step}" if step > 1 else ""
        raise UserError(f"{network.path}: takes images from 32 pixels up{steps}, got {size[0]} x {size[1]}")
    for batch in images.batches(batch_size):
        pixels = np.concatenate([_prepare(network, image, size) for _, image in batch])
        shares = softmax(network.logits(pixels, 2), 1)
        for (name, image), row in zip(batch, shares, strict=True):
            order = np.argsort(-row, kind="stable")[:top]
            labels = tuple((network.classes[k], float(row[k])) for k in order)
            yield Prediction(name, labels), image


def prepare(network: ExportedNetwork, image: Image.Image) -> np.ndarray:
    """An image as input of an exported classifier: (1, 3, H, W) float32."""
    return _prepare(network, image, height_and_width(network.input_size or network.metadata["image_size"]))


def _prepare(network: ExportedNetwork, image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    about = network.metadata
    return network.normalised(centre(image, size, about["crop_pct"], about.get("interpolation", "bicubic")))[None]
