"""Joint transforms of an image with boxes and masks for detection: resize, crop, flip."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from sgformer.data.image import SHORT, short_and_longest

# Sizes of the published recipes in pixels, for a short side of 800; they scale with the short side.
MULTI_SCALE = tuple(range(480, 801, 32))
BEFORE_CROP = (400, 500, 600)
CROP = (384, 600)


def train_transform(image_size: int | tuple[int, int], multi_scale: bool, hflip: float = 0.5) -> v2.Transform:
    """Resize and flip; with `multi_scale` the policy of the 3x recipes.

    Multi-scale: half of the images are resized to a short side of 480 to 800 in steps of 32; the others first to a
    short side of 400, 500 or 600, then cropped to 384 to 600 in each direction, then resized in the same way. Sizes
    scale with `image_size`. Objects smaller than one pixel are dropped.

    Args:
        image_size: see `short_and_longest`.
        multi_scale: whether to use that policy.
        hflip: probability of a horizontal flip.

    Returns:
        (PIL RGB, target) -> (float32 (3, H, W) in [0, 1], target); random numbers come from torch.
    """
    short, longest = short_and_longest(image_size)

    def scaled(*sizes: int) -> list[int]:
        return [max(1, round(size * short / SHORT)) for size in sizes]

    if multi_scale:
        resize = ShortestSize(scaled(*MULTI_SCALE), longest)
        crop = RangeCrop(*scaled(*CROP))
        steps = [v2.RandomChoice([resize, v2.Compose([ShortestSize(scaled(*BEFORE_CROP)), crop, resize])])]
    else:
        steps = [ShortestSize([short], longest)]
    return v2.Compose([*steps, v2.RandomHorizontalFlip(hflip), *_to_tensors()])


def eval_transform(image_size: int | tuple[int, int]) -> v2.Transform:
    """Deterministic resize to `image_size`; otherwise as `train_transform`. Also accepts an image alone."""
    short, longest = short_and_longest(image_size)
    to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()]
    return v2.Compose([ShortestSize([short], longest), *to_tensor])


def _to_tensors() -> list[nn.Module]:
    return [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.ClampBoundingBoxes(),
        v2.SanitizeBoundingBoxes(),
        v2.ToPureTensor(),
    ]


class ShortestSize(v2.RandomShortestSize):
    """torchvision's, except that no side becomes shorter than a pixel: that of 8,000 x 8 would vanish."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = super().make_params(flat_inputs)["size"]
        return {"size": (max(1, height), max(1, width))}


class RangeCrop(v2.Transform):
    """A random crop with height and width between `minimum` and `maximum` pixels, at most the image's."""

    def __init__(self, minimum: int, maximum: int):
        super().__init__()
        self.minimum, self.maximum = minimum, maximum

    def make_params(self, flat_inputs: list[Any]) -> dict[str, int]:
        def draw(low: int, high: int) -> int:
            return int(torch.randint(low, high + 1, ()))

        height, width = v2.query_size(flat_inputs)
        h, w = (draw(min(side, self.minimum), min(side, self.maximum)) for side in (height, width))
        return {"top": draw(0, height - h), "left": draw(0, width - w), "height": h, "width": w}

    def transform(self, inpt: Any, params: dict[str, int]) -> Any:
        return F.crop(inpt, **params)
