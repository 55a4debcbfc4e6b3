"""The weights that come with the package. No torch here: settings and help texts ask which there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TAG = "tiny_imagenet"  # of timm's tagged names, as in sgformer_n.tiny_imagenet
FOLDER = Path(__file__).parents[1] / "weights"

SUFFIXES = (".safetensors", ".pth", ".pt", ".tar", ".bin", ".ckpt")  # of weights files

# By name: what timm should know of them. The files' metadata say the same.
PRETRAINED: dict[str, dict[str, Any]] = {
    "sgformer_n": {
        "num_classes": 200,
        "input_size": (3, 128, 128),
        "pool_size": (4, 4),
        "crop_pct": 1.0,
        "license": "other",  # of the photographs: ImageNet's terms, research (docs/models.md)
    }
}

TRAINED_AT = {"sgformer_n": (96, 96)}  # pixels of the files' position tables; images of other sizes resize them


def pretrained_file(name: str) -> Path | None:
    """The file of the weights of this name, with or without its tag; None if the package has none."""
    name = name.removesuffix(f".{TAG}")
    return FOLDER / f"{name}.{TAG}.safetensors" if name in PRETRAINED else None
