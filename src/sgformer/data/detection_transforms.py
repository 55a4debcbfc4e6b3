"""Joint transforms of an image with boxes and masks for detection: resize, crop, flip."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from sgformer.data.image import SHORT, short_and_longest

# Sizes of the published recipes in pixels, for a short side of 800; they scale with the short side.
MULTI_SCALE = tuple(range(480, 801, 32))
BEFORE_CROP = (400, 500, 600)
CROP = (384, 600)


def train_transform(
    image_size: int | tuple[int, int], multi_scale: bool, hflip: float = 0.5, mirrored: Sequence[int] | None = None
) -> v2.Transform:
    """Resize and flip; with `multi_scale` the policy of the 3x recipes.

    Multi-scale: half of the images are resized to a short side of 480 to 800 in steps of 32; the others first to a
    short side of 400, 500 or 600, then cropped to 384 to 600 in each direction, then resized in the same way. Sizes
    scale with `image_size`. Objects smaller than one pixel are dropped.

    Args:
        image_size: see `short_and_longest`.
        multi_scale: whether to use that policy.
        hflip: probability of a horizontal flip.
        mirrored: of keypoints, their order after it (`data.keypoints.mirror_order`); None: there are none.

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
    if mirrored is None:
        return v2.Compose([*steps, v2.RandomHorizontalFlip(hflip), *_to_tensors()])
    return v2.Compose([*steps, SidedFlip(hflip, mirrored), join_keypoints, *_to_tensors(_of_objects)])


def eval_transform(image_size: int | tuple[int, int]) -> v2.Transform:
    """Deterministic resize to `image_size`; otherwise as `train_transform`. Also accepts an image alone."""
    short, longest = short_and_longest(image_size)
    to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()]
    return v2.Compose([ShortestSize([short], longest), *to_tensor])


def _to_tensors(labels: Any = "default") -> list[nn.Module]:
    return [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.ClampBoundingBoxes(),
        v2.SanitizeBoundingBoxes(labels_getter=labels),
        v2.ToPureTensor(),
    ]


def _of_objects(inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What an object that is dropped takes along, besides its mask."""
    return inputs[1]["labels"], inputs[1]["keypoints"]


def join_keypoints(image: Any, target: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """`points` (N * K, 4), boxes without area, and `visible` (N, K) as `keypoints` (N, K, 3): x, y, 1 for those
    that are labelled and in the image, else zeros."""
    height, width = target["points"].canvas_size
    at = target["points"].as_subclass(torch.Tensor)[:, :2].reshape(*target["visible"].shape, 2)
    inside = ((at > 0) & (at < torch.tensor([width, height]))).all(-1)  # cropping leaves what is outside at the edge
    seen = (inside & (target["visible"] > 0)).to(at.dtype)
    rest = {name: value for name, value in target.items() if name not in ("points", "visible")}
    return image, {**rest, "keypoints": torch.cat([at * seen[..., None], seen[..., None]], -1)}


class SidedFlip(nn.Module):
    """A horizontal flip with a probability, after which left keypoints are right ones."""

    def __init__(self, probability: float, order: Sequence[int]):
        super().__init__()
        self.probability, self.order, self.flip = probability, list(order), v2.RandomHorizontalFlip(1.0)

    def forward(self, image: Any, target: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if torch.rand(()) >= self.probability:
            return image, target
        image, target = self.flip(image, target)
        points, visible = target["points"], target["visible"]
        swapped = points.as_subclass(torch.Tensor).reshape(*visible.shape, 4)[:, self.order].reshape(-1, 4)
        return image, {**target, "points": tv_tensors.wrap(swapped, like=points), "visible": visible[:, self.order]}


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
