"""From a PIL image to the tensor the network sees: timm's training augmentation, and the evaluation crop."""

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
    """Mean and standard deviation of the channels of images in 0..1: subtracted, and divided by.

    ImageNet's unless weights from elsewhere were trained with others, which they keep.
    """

    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> Normalization:
        """As weights remember it."""
        return cls(tuple(metadata.get("mean", MEAN)), tuple(metadata.get("std", STD)))

    def to_metadata(self) -> dict[str, list[float]]:
        """What weights remember: nothing where it is ImageNet's."""
        return {} if self == IMAGENET else {"mean": list(self.mean), "std": list(self.std)}


IMAGENET = Normalization()


def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keep so many bits of each value: all from 8 up; none, at a policy's full strength, leaves black."""
    if bits < 1:
        return Image.new(image.mode, image.size)
    return image if bits >= 8 else ImageOps.posterize(image, bits)


# timm leaves 0 bits to Pillow, which refuses them from version 13 on: one image in a thousand would end a training.
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
    """Random crop and flip, RandAugment (or colour jitter where that is off), normalisation, random erasing.

    Args:
        image_size: (height, width) in pixels.
        auto_augment: a timm policy string, or None.
        crop_scale: smallest share of the image's area in a crop.
        normalization: of the result.

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
            f"--auto-augment {auto_augment}: {error}; a policy of timm is e.g. rand-m9-mstd0.5-inc1"
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
        if isinstance(step, ResizeKeepRatio):  # of sides that differ; older versions of timm resize these bilinearly
            step.interpolation = InterpolationMode(interpolation)
    return _fused(transform)


class ToNormalizedTensor:
    """PIL RGB image -> float32 (3, H, W), normalised; a third of the passes of two steps."""

    def __init__(self, mean: torch.Tensor, std: torch.Tensor):
        self.scale, self.shift = 1 / (255 * std.view(3, 1, 1)), (mean / std).view(3, 1, 1)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return pixels.float().mul_(self.scale).sub_(self.shift)


def _fused(transform: Compose) -> Compose:
    steps = list(transform.transforms)
    at = next(i for i, step in enumerate(steps) if isinstance(step, Normalize))
    if not isinstance(steps[at - 1], MaybeToTensor):
        raise TypeError(f"expected timm to convert images just before it normalises them (got {steps[at - 1]})")
    return Compose([*steps[: at - 1], ToNormalizedTensor(steps[at].mean, steps[at].std), *steps[at + 1 :]])


def denormalize(images: torch.Tensor, normalization: Normalization = IMAGENET) -> torch.Tensor:
    """Undo the normalisation: float (..., 3, H, W) -> values in 0..1 for showing."""
    mean = torch.tensor(normalization.mean).view(3, 1, 1)
    std = torch.tensor(normalization.std).view(3, 1, 1)
    return (images.float().cpu() * std + mean).clamp(0, 1)


def preprocessing(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """`eval_transform`'s arguments as weights remember them."""
    size = metadata.get("image_size", 224)
    return {
        "image_size": (size, size) if isinstance(size, int) else tuple(size),
        "crop_pct": metadata.get("crop_pct", 0.9),
        "interpolation": metadata.get("interpolation", "bicubic"),
        "normalization": Normalization.of(metadata),
    }
