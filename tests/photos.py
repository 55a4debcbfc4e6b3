"""A tiny data set in the ImageNet layout: noise, tinted by class."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

CLASSES = ("ant", "bee", "cat")


def make_photos(root: Path, train: int = 6, val: int = 3, classes: tuple[str, ...] = CLASSES, size: int = 40) -> Path:
    """`train` and `val` images of every class below `root`, the same at every call."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for number, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 160, (size, size, 3), dtype=np.uint8)
                pixels[..., number % 3] += 90
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def tensors(value):
    """All tensors in nested containers, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in tensors(v)]
    return [t for v in value for t in tensors(v)] if isinstance(value, (list, tuple)) else []


# A run that takes a second or two; everything random is on.
QUICK: dict = {
    "model": "sgformer_n",
    "weights": "none",
    "image_size": 32,
    "batch_size": 4,
    "epochs": 2,
    "warmup_epochs": 1,
    "lr": 0.02,
    "workers": 0,
    "drop_path": 0.2,
    "log_every": 1,
}
