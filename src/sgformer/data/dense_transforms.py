"""Joint transforms of an image and its label map: augmentation and evaluation for semantic segmentation.

All are torchvision v2 transforms of (`tv_tensors.Image` uint8, `tv_tensors.Mask`), so they compose with others. Random
numbers come from torch's global generator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as TF

from sgformer.data.image import fit_size
from sgformer.data.preparing import IMAGENET, Normalization

DenseTransform = Callable[[Image.Image, np.ndarray], tuple[torch.Tensor, torch.Tensor]]


def train_transform(
    crop: tuple[int, int],
    *,
    short_side: int = 512,
    scale: tuple[float, float] = (0.5, 2.0),
    hflip: float = 0.5,
    cat_max_ratio: float = 0.75,
    distortion: bool = True,
    ignore: int = 255,
    normalization: Normalization = IMAGENET,
) -> DenseTransform:
    """Ratio resize, diverse crop, flip, photometric distortion, normalisation, padding to the crop's size.

    Args:
        crop: (height, width) in pixels.
        short_side: see `RatioResize`.
        scale: range of the scaling factor.
        hflip: probability of a horizontal flip.
        cat_max_ratio: see `DiverseCrop`.
        distortion: whether to apply `PhotometricDistortion`.
        ignore: the label for no class, also used for padding.
        normalization: mean and standard deviation.

    Returns:
        (PIL RGB image, (H, W) integer label array) -> float32 (3, height, width), normalised,
        and int64 (height, width).
    """
    return _on_arrays(
        RatioResize(short_side, scale),
        DiverseCrop(crop, cat_max_ratio, ignore),
        v2.RandomHorizontalFlip(hflip),
        *([PhotometricDistortion()] if distortion else []),
        *_normalized(normalization),
        PadTo(crop, {tv_tensors.Image: 0, tv_tensors.Mask: ignore}),  # after normalising: 0 is the mean colour
    )


def as_tensors(image: Image.Image, labels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """The transform of evaluation: unchanged, (3, H, W) uint8 and (H, W) in the labels' smallest integer type.

    Of a photograph of 12 megapixels, 48 MB instead of 240; `normalized` makes the network's input of it.
    """
    small = labels.astype(np.uint8 if labels.max(initial=0) <= 255 else np.int32)
    return TF.pil_to_tensor(image), torch.from_numpy(small)


def normalized(image: torch.Tensor, normalization: Normalization = IMAGENET) -> torch.Tensor:
    """(..., 3, H, W) uint8 -> float32, normalised."""
    pixels = TF.to_dtype(image, torch.float32, scale=True)
    return TF.normalize(pixels, list(normalization.mean), list(normalization.std), inplace=True)


class RatioResize(v2.Transform):
    """Resize by `fit_size` with a factor sampled uniformly from `scale`; labels by nearest neighbour."""

    def __init__(self, short_side: int, scale: tuple[float, float]):
        super().__init__()
        self.short_side, self.scale = short_side, scale

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        factor = torch.empty(()).uniform_(*self.scale).item()
        height, width = flat_inputs[0].shape[-2:]
        return {"size": fit_size(height, width, self.short_side, factor)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if isinstance(inpt, tv_tensors.Mask):
            # "nearest" is shifted up and left of the image's sampling positions; "nearest exact" matches them.
            labels = inpt.as_subclass(torch.Tensor)[None]
            exact = TF.resize_image(labels, list(params["size"]), InterpolationMode.NEAREST_EXACT)[0]
            return tv_tensors.wrap(exact, like=inpt)
        return TF.resize(inpt, list(params["size"]), InterpolationMode.BILINEAR, antialias=True)


class DiverseCrop(v2.Transform):
    """A random crop in which every class covers less than `max_ratio` of the labelled area (mmseg's `cat_max_ratio`).

    After `attempts` failures any crop is accepted. Image sides shorter than the crop are kept.
    """

    def __init__(self, size: tuple[int, int], max_ratio: float = 0.75, ignore: int = 255, attempts: int = 10):
        super().__init__()
        self.size, self.max_ratio, self.ignore, self.attempts = size, max_ratio, ignore, attempts

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        labels = next(x for x in flat_inputs if isinstance(x, tv_tensors.Mask)).as_subclass(torch.Tensor)
        height, width = (min(crop, side) for crop, side in zip(self.size, labels.shape[-2:], strict=True))
        for _ in range(self.attempts + 1):
            top = int(torch.randint(labels.shape[-2] - height + 1, ()))
            left = int(torch.randint(labels.shape[-1] - width + 1, ()))
            counts = torch.bincount(labels[top : top + height, left : left + width].flatten())
            counts[self.ignore : self.ignore + 1] = 0
            if counts.max() < self.max_ratio * counts.sum():
                break
        return {"top": top, "left": left, "height": height, "width": width}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return TF.crop(inpt, **params)


class PhotometricDistortion(v2.RandomPhotometricDistort):
    """torchvision's photometric distortion (brightness, contrast, saturation, hue, each with probability .5) without
    the channel permutation, which suits detection only: in scenes, colour distinguishes sky from grass."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {**super().make_params(flat_inputs), "channel_permutation": None}


class PadTo(v2.Transform):
    """Pad right and bottom to at least `size` (height, width)."""

    def __init__(self, size: tuple[int, int], fill: dict[type, int]):
        super().__init__()
        self.size, self.fill = size, fill

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        down, right = (max(0, target - side) for target, side in zip(self.size, inpt.shape[-2:], strict=True))
        return TF.pad(inpt, [0, 0, right, down], fill=self.fill[type(inpt)]) if down or right else inpt


def _normalized(normalization: Normalization) -> list[v2.Transform]:
    dtypes = {tv_tensors.Image: torch.float32, "others": None}
    return [v2.ToDtype(dtypes, scale=True), v2.Normalize(list(normalization.mean), list(normalization.std))]


def _on_arrays(*transforms: v2.Transform) -> DenseTransform:
    return ArrayTransform(v2.Compose(list(transforms)))


class ArrayTransform:
    """Applies a v2 transform to a PIL image and a label array; returns plain tensors."""

    def __init__(self, transform: v2.Transform):
        self.transform = transform

    def __call__(self, image: Image.Image, labels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        mask = tv_tensors.Mask(torch.from_numpy(labels.astype(np.int64)))
        pixels, mask = self.transform(tv_tensors.Image(TF.pil_to_tensor(image)), mask)
        return pixels.as_subclass(torch.Tensor), mask.as_subclass(torch.Tensor)
