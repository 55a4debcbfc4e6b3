"""Transforms from a PIL image to the network's input: timm's training augmentation, and the evaluation crop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.auto_augment import NAME_TO_OP
from timm.data.transforms import MaybeToTensor, ResizeKeepRatio
from torchvision.transforms import Compose, InterpolationMode, Normalize

from sgformer.core.errors import UserError

Transform = Callable[[Image.Image], torch.Tensor]

MEAN, STD = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


class Normalization(NamedTuple):
    """Channel mean and standard deviation for images in [0, 1].

    ImageNet's, unless foreign weights were trained with others.
    """

    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> Normalization:
        """Read the normalisation from weights' metadata."""
        return cls(tuple(metadata.get("mean", MEAN)), tuple(metadata.get("std", STD)))

    def to_metadata(self) -> dict[str, list[float]]:
        """The metadata entries; empty for ImageNet's values."""
        return {} if self == IMAGENET else {"mean": list(self.mean), "std": list(self.std)}


IMAGENET = Normalization()


def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keep the highest `bits` bits of each value: all for 8 or more; 0, at a policy's maximum strength, gives black."""
    if bits < 1:
        return Image.new(image.mode, image.size)
    return image if bits >= 8 else ImageOps.posterize(image, bits)


# timm passes 0 bits to Pillow, which rejects them from version 13 on: one image in a thousand would stop a training.
NAME_TO_OP.update(dict.fromkeys(("Posterize", "PosterizeIncreasing", "PosterizeOriginal"), posterize))


def train_transform(
    image_size: tuple[int, int],
    *,
    auto_augment: str | None = "rand-m9-mstd0.5-inc1",
    color_jitter: float = 0.4,
    interpolation: str = "random",
    crop_scale: float = 0.08,
    hflip: float = 0.5,
    reprob: float = 0.25,
    normalization: Normalization = IMAGENET,
) -> Transform:
    """Random crop and flip, RandAugment (or colour jitter if that is off), normalisation, random erasing.

    Args:
        image_size: (height, width) in pixels.
        auto_augment: a timm policy string, or None.
        color_jitter: strength of the jitter, used if `auto_augment` is None.
        interpolation: of the crop's resize; "random" picks bilinear or bicubic.
        crop_scale: minimum area of a crop as a fraction of the image's.
        hflip, reprob: probabilities of a horizontal flip and of random erasing.
        normalization: mean and standard deviation.

    Returns:
        PIL RGB image -> float32 (3, height, width), normalised. Random numbers come from the
        global generators of `random`, numpy and torch.

    Raises:
        UserError: timm does not know the policy.
    """
    try:
        return _fused(
            create_transform(
                (3, *image_size),
                is_training=True,
                auto_augment=auto_augment,
                color_jitter=color_jitter,
                interpolation=interpolation,
                scale=(crop_scale, 1.0),
                hflip=hflip,
                re_prob=reprob,
                re_mode="pixel",
                mean=normalization.mean,
                std=normalization.std,
            )
        )
    except AssertionError as error:
        raise UserError(
            f"--auto-augment {auto_augment}: {error}; an example of a timm policy: rand-m9-mstd0.5-inc1"
        ) from None


def eval_transform(
    image_size: tuple[int, int],
    crop_pct: float = 0.9,
    interpolation: str = "bicubic",
    normalization: Normalization = IMAGENET,
) -> Transform:
    """Resize to `image_size / crop_pct`, crop the centre, normalise. No randomness.

    Returns:
        PIL RGB image -> float32 (3, height, width).
    """
    transform = create_transform(
        (3, *image_size),
        interpolation=interpolation,
        crop_pct=crop_pct,
        mean=normalization.mean,
        std=normalization.std,
    )
    for step in transform.transforms:
        if isinstance(step, ResizeKeepRatio):  # non-square sizes, which older versions of timm resize bilinearly
            step.interpolation = InterpolationMode(interpolation)
    return _fused(transform)


class ToNormalizedTensor:
    """PIL RGB image -> float32 (3, H, W), normalised; fused, with a third of the passes over memory."""

    def __init__(self, mean: torch.Tensor, std: torch.Tensor):
        self.scale, self.shift = 1 / (255 * std.view(3, 1, 1)), (mean / std).view(3, 1, 1)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return pixels.float().mul_(self.scale).sub_(self.shift)


def _fused(transform: Compose) -> Compose:
    steps = list(transform.transforms)
    at = next(i for i, step in enumerate(steps) if isinstance(step, Normalize))
    if not isinstance(steps[at - 1], MaybeToTensor):
        raise TypeError(f"expected timm to convert images right before normalising them (got {steps[at - 1]})")
    return Compose([*steps[: at - 1], ToNormalizedTensor(steps[at].mean, steps[at].std), *steps[at + 1 :]])


def denormalize(images: torch.Tensor, normalization: Normalization = IMAGENET) -> torch.Tensor:
    """Undo the normalisation: float (..., 3, H, W) -> float32 in [0, 1] for display."""
    mean = torch.tensor(normalization.mean).view(3, 1, 1)
    std = torch.tensor(normalization.std).view(3, 1, 1)
    return (images.float().cpu() * std + mean).clamp(0, 1)


def preprocessing(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """`eval_transform`'s arguments from weights' metadata."""
    size = metadata.get("image_size", 224)
    return {
        "image_size": (size, size) if isinstance(size, int) else tuple(size),
        "crop_pct": metadata.get("crop_pct", 0.9),
        "interpolation": metadata.get("interpolation", "bicubic"),
        "normalization": Normalization.of(metadata),
    }
