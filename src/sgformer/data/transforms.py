"""From a PIL image to the tensor the network sees in training: timm's augmentation."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from PIL import Image, ImageOps
from timm.data import auto_augment as timm_policies
from timm.data import create_transform
from timm.data.transforms import MaybeToTensor
from torchvision.transforms import Compose, Normalize

from sgformer.core.errors import UserError
from sgformer.data.preparing import IMAGENET, Normalization

Transform = Callable[[Image.Image], torch.Tensor]


def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keep the highest `bits` bits of each value: all for 8 or more; 0, at a policy's maximum strength, gives black."""
    if bits < 1:
        return Image.new(image.mode, image.size)
    return image if bits >= 8 else ImageOps.posterize(image, bits)


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
            ),
            normalization,
        )
    except AssertionError as error:
        raise UserError(
            f"--auto-augment {auto_augment}: {error}; an example of a timm policy: rand-m9-mstd0.5-inc1"
        ) from None


def _fused(transform: Compose, normalization: Normalization) -> Compose:
    """The same with conversion and normalisation in one step, and with our `posterize`.

    timm passes 0 bits to Pillow, which rejects them from version 13 on: one image in a thousand would stop a training.
    timm's own table of operations stays as it is, for other programs in this process.
    """
    steps = list(transform.transforms)
    for policy in steps:
        for operation in (*getattr(policy, "ops", ()), *chain.from_iterable(getattr(policy, "policy", ()))):
            if operation.aug_fn is timm_policies.posterize:
                operation.aug_fn = posterize
    at = next(i for i, step in enumerate(steps) if isinstance(step, Normalize))
    if not isinstance(steps[at - 1], MaybeToTensor):
        raise TypeError(f"expected timm to convert images just before it normalises them (got {steps[at - 1]})")
    return Compose([*steps[: at - 1], normalization, *steps[at + 1 :]])
