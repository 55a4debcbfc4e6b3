"""From a PIL image to the tensor a trained network sees: resize, centre crop, normalise. No randomness.

Neither timm nor torchvision is imported here, as each costs seconds at every `sgformer predict`; a test holds the
result against timm's evaluation transform.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from sgformer.data.image import centre, height_and_width

#: Of ImageNet's channels.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Normalization(NamedTuple):
    """Mean and standard deviation of the channels of images in 0..1: subtracted, and divided by.

    ImageNet's unless weights from elsewhere were trained with others, which they keep.
    """

    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    def __call__(self, pixels: np.ndarray | Image.Image) -> torch.Tensor:
        """(H, W, 3) uint8 -> float32 (3, H, W), normalised; a third of the passes of two steps."""
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in self)
        channels = torch.from_numpy(np.array(pixels)).permute(2, 0, 1).contiguous()
        return channels.float().mul_(1 / (255 * std)).sub_(mean / std)

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> Normalization:
        """As weights remember it."""
        return cls(tuple(metadata.get("mean", MEAN)), tuple(metadata.get("std", STD)))

    def to_metadata(self) -> dict[str, list[float]]:
        """What weights remember: nothing where it is ImageNet's."""
        return {} if self == IMAGENET else {"mean": list(self.mean), "std": list(self.std)}


IMAGENET = Normalization()


@dataclass(frozen=True)
class EvalTransform:
    """PIL RGB image -> float32 (3, height, width): resized to `image_size / crop_pct`, centre cropped, normalised."""

    image_size: tuple[int, int]
    crop_pct: float
    interpolation: str
    normalization: Normalization

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return self.normalization(centre(image, self.image_size, self.crop_pct, self.interpolation))


def eval_transform(
    image_size: tuple[int, int],
    crop_pct: float = 0.9,
    interpolation: str = "bicubic",
    normalization: Normalization = IMAGENET,
) -> EvalTransform:
    """The evaluation transform of classification, and of whatever takes images as they are (`crop_pct` 1)."""
    return EvalTransform(image_size, crop_pct, interpolation, normalization)


def denormalize(images: torch.Tensor, normalization: Normalization = IMAGENET) -> torch.Tensor:
    """Undo the normalisation: float (..., 3, H, W) -> values in 0..1 for showing."""
    mean = torch.tensor(normalization.mean).view(3, 1, 1)
    std = torch.tensor(normalization.std).view(3, 1, 1)
    return (images.float().cpu() * std + mean).clamp(0, 1)


def preprocessing(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """`eval_transform`'s arguments as weights remember them."""
    return {
        "image_size": height_and_width(metadata.get("image_size", 224)),
        "crop_pct": metadata.get("crop_pct", 0.9),
        "interpolation": metadata.get("interpolation", "bicubic"),
        "normalization": Normalization.of(metadata),
    }
