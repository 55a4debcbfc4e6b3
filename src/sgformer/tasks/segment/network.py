"""The network of semantic segmentation, a backbone and a head, and its inference on images of any size."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgformer.core.errors import UserError
from sgformer.data.identity import class_differences
from sgformer.data.image import fit_size
from sgformer.heads.common import resize
from sgformer.heads.registry import HEADS
from sgformer.models.load import Weights, check_classes, check_dense, load_dense, save_weights, take_fitting
from sgformer.models.pyramid import Pyramid, pyramid_backbone
from sgformer.tasks.segment.config import SegmentConfig

#: The factors of multi-scale evaluation.
MULTI_SCALE = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


class Segmenter(nn.Module):
    """A backbone with a segmentation head.

    Args:
        backbone: four feature maps.
        head: a name of `heads.registry.HEADS`.
        num_classes: of the logits.
        width: of the head; None: its own standard.

    Attributes:
        architecture: a plain dict from which `Segmenter.build` makes the same network.

    Raises:
        UserError: `head` is unknown.
    """

    task = "segment"
    metadata: dict[str, Any]  # of the file it was loaded from

    def __init__(self, backbone: Pyramid, head: str, num_classes: int, width: int | None = None):
        super().__init__()
        self.architecture = {
            "backbone": backbone.architecture,
            "head": head,
            "num_classes": num_classes,
            "width": width,
        }
        self.num_classes = num_classes
        self.backbone = backbone
        standard = {} if width is None else {"dim": width}
        self.head = HEADS.get(head)(backbone.channels, backbone.strides, num_classes, **standard)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> {"out": logits (B, num_classes, H, W)}; in training also "aux" if the head has one."""
        features = self.backbone(images)
        outputs = {"out": self.head(features)}
        if self.training and hasattr(self.head, "auxiliary"):
            outputs["aux"] = self.head.auxiliary(features)  # type: ignore[operator]
        return {name: resize(logits, images) for name, logits in outputs.items()}

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that do not decay, besides norms and biases."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    def save(self, path: str | os.PathLike[str], metadata: Mapping[str, Any]) -> None:
        """Write weights and metadata to a safetensors file, atomically."""
        save_weights(self, path, {**metadata, "task": "segment"})

    @classmethod
    def build(cls, architecture: Mapping[str, Any]) -> Segmenter:
        """A network with fresh weights from an `architecture`."""
        backbone = pyramid_backbone(architecture["backbone"])
        return cls(backbone, architecture["head"], architecture["num_classes"], architecture["width"])

    @classmethod
    def from_weights(cls, weights: Weights) -> Segmenter:
        """A trained network, in evaluation mode.

        Raises:
            UserError: the tensors do not fit.
        """
        model = load_dense(cls.build, weights)
        check_classes(weights, model.num_classes)
        return model


def new_segmenter(
    config: SegmentConfig, num_classes: int, weights: Weights | None = None, classes: Sequence[str] = ()
) -> Segmenter:
    """The network to train: fresh, on the backbone of some weights, or from a whole segmentation network's weights.

    With the latter, layers that depend on the classes are initialised anew if those are others.

    Raises:
        UserError: weights of another network or head.
    """
    known = weights.metadata.get("classes") if weights else None
    others = class_differences(known, classes) if known and classes else []
    source: Any = config.model
    whole = weights is not None and weights.task == "segment"
    if whole:
        assert weights is not None
        check_dense(Segmenter.build, weights)
        arch: Any = weights.architecture
        source = arch["backbone"]
        if (arch["head"], arch["width"]) != (config.head, config.head_width):
            raise UserError(
                f"{config.weights} holds {source['model']} with {arch['head']} of width {arch['width'] or 'standard'}, "
                f"not --model {config.model} --head {config.head} --head-width {config.head_width or 'standard'}"
            )
    backbone = pyramid_backbone(
        source,
        weights=None if whole else weights,
        drop_path=config.drop_path,
        coarse=config.coarse,
        guidance=config.guidance,
        grad_checkpointing=config.grad_checkpointing,
    )
    model = Segmenter(backbone, config.head, num_classes, config.head_width)
    return take_fitting(model, weights, others) if whole else model  # type: ignore[arg-type]


@dataclass(frozen=True)
class InferenceSettings:
    """How the network runs on an image of any size.

    Attributes:
        short_side: images are resized to this short side (long side at most 4 times that), in pixels.
        window: (height, width) of a sliding window, moved by two thirds of itself; None: the whole image at once.
        scales: factors on the short side; the class probabilities are averaged over them.
        flip: also average with the mirrored image.
    """

    short_side: int = 512
    window: tuple[int, int] | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False


def class_probabilities(model: nn.Module, images: Tensor, how: InferenceSettings) -> Tensor:
    """Normalised images (B, 3, H, W) of any size -> class probabilities (B, num_classes, H, W), float32."""
    return torch.cat([part for _, part in probabilities_by_rows(model, images, how)], 2)


#: Bytes of class probabilities that are computed at once.
PART = 2**24


def predicted_labels(model: nn.Module, images: Tensor, how: InferenceSettings) -> Tensor:
    """Normalised images (B, 3, H, W) of any size -> the most probable class of every pixel, (B, H, W) int64."""
    # Written into one tensor: small ones kept between large ones make the allocator take fresh memory for each part.
    labels = torch.empty(images.shape[0], *images.shape[-2:], dtype=torch.int64, device=images.device)
    for rows, part in probabilities_by_rows(model, images, how):
        labels[:, rows] = part.argmax(1)
    return labels


@torch.no_grad()
def probabilities_by_rows(model: nn.Module, images: Tensor, how: InferenceSettings) -> Iterator[tuple[slice, Tensor]]:
    """Class probabilities from top to bottom in parts of bounded size: those of a large photograph fill the memory.

    Args:
        model, images, how: see `class_probabilities`.

    Yields:
        The rows, and their probabilities (B, num_classes, rows, W), float32. Of images up to `PART` one part.
    """
    size = (int(images.shape[-2]), int(images.shape[-1]))
    passes = list(_passes(model, images, how))
    row = 4 * passes[0].shape[0] * passes[0].shape[1] * size[1]
    step = max(1, PART // row)
    for top in range(0, size[0], step):
        rows = slice(top, min(top + step, size[0]))
        total: Tensor | None = None
        for logits in passes:
            probabilities = _resize_rows(logits, size, rows).softmax(1)
            total = probabilities if total is None else total + probabilities
        assert total is not None
        yield rows, total / len(passes)


def _passes(model: nn.Module, images: Tensor, how: InferenceSettings) -> Iterator[Tensor]:
    """The logits (B, num_classes, h, w) of every scale, as they are and mirrored."""
    size = images.shape[-2:]
    for factor in how.scales:
        target = fit_size(size[0], size[1], how.short_side, factor)
        scaled = images
        if target != tuple(size):
            scaled = F.interpolate(images, target, mode="bilinear", align_corners=False, antialias=True)
        for mirrored in (False, True) if how.flip else (False,):
            x = scaled.flip(-1) if mirrored else scaled
            logits = (model(x)["out"] if how.window is None else slide(model, x, how.window)).float()
            yield logits.flip(-1) if mirrored else logits


def _resize_rows(x: Tensor, size: tuple[int, int], rows: slice) -> Tensor:
    """The rows of a bilinear resize (corners not aligned) of (B, C, h, w) to `size`; all of them as `F.interpolate`."""
    if rows == slice(0, size[0]):
        return F.interpolate(x, size, mode="bilinear", align_corners=False)
    height = x.shape[-2]
    at = (torch.arange(rows.start, rows.stop, device=x.device) + 0.5) * (height / size[0]) - 0.5
    at = at.clamp(min=0)
    low = at.long().clamp(max=height - 1)
    share = (at - low)[:, None]
    between = x[..., low, :] * (1 - share) + x[..., (low + 1).clamp(max=height - 1), :] * share
    return F.interpolate(between, (len(low), size[1]), mode="bilinear", align_corners=False)


def slide(model: nn.Module, images: Tensor, window: tuple[int, int]) -> Tensor:
    """Logits (B, num_classes, H, W) of (B, 3, H, W), averaged over overlapping windows that cover the image."""
    spans = [_spans(length, side) for length, side in zip(images.shape[-2:], window, strict=True)]
    total, count = torch.zeros(()), torch.zeros(images.shape[-2:], device=images.device)
    for top, bottom in spans[0]:
        for left, right in spans[1]:
            logits = model(images[..., top:bottom, left:right])["out"].float()
            if total.ndim == 0:
                total = logits.new_zeros(*logits.shape[:2], *images.shape[-2:])
            total[..., top:bottom, left:right] += logits
            count[top:bottom, left:right] += 1
    return total / count


def _spans(length: int, side: int) -> list[tuple[int, int]]:
    """Starts and ends of windows of `side` pixels over `length`, two thirds apart, the last one flush with the end."""
    side = min(side, length)
    starts = [*range(0, length - side, max(1, side * 2 // 3)), length - side]
    return [(start, start + side) for start in starts]
