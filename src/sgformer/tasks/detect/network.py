"""The network of object detection and instance segmentation: a backbone and heads, by default those of Mask R-CNN."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F

from sgformer.core.errors import UserError
from sgformer.data.identity import class_differences
from sgformer.data.preparing import MEAN, STD, Normalization
from sgformer.heads.mask_rcnn import paste_masks
from sgformer.heads.registry import DETECTORS
from sgformer.models.load import Weights, check_classes, check_dense, load_dense, save_weights, take_fitting
from sgformer.models.pyramid import Pyramid, pyramid_backbone
from sgformer.results import coco_result
from sgformer.tasks.detect.config import DetectConfig, ObjectsConfig

PAD_TO = 32  # pixels: the batch's sides are multiples of it


class Detector(nn.Module):
    """A backbone with a detector's heads.

    Args:
        backbone: four feature maps.
        num_classes: without the background.
        masks: without `head`, whether it is Mask R-CNN, which also predicts masks, or Faster R-CNN.
        width: of the heads; 256 is the standard.
        head: a name of `heads.registry.DETECTORS`.
        options: of the heads, e.g. of `RCNNHeads`.

    Attributes:
        architecture: a plain dict from which `build` makes the same network.
        masks: whether it predicts masks.

    Raises:
        UserError: `head` is unknown.
    """

    mean: Tensor
    std: Tensor
    task = "detect"
    metadata: dict[str, Any]  # of the file it was loaded from

    def __init__(
        self,
        backbone: Pyramid,
        num_classes: int,
        masks: bool = True,
        width: int = 256,
        head: str | None = None,
        **options: Any,
    ):
        head = head or standard_head(masks)
        heads = DETECTORS.get(head)(backbone.channels, backbone.strides, num_classes, width=width, **options)
        self._assemble(backbone, heads, {"head": head, "num_classes": num_classes, "width": width})

    def _assemble(self, backbone: Pyramid, heads: Any, architecture: dict[str, Any]) -> None:
        super().__init__()
        self.architecture = {"backbone": backbone.architecture, **architecture}
        self.num_classes = architecture["num_classes"]
        self.backbone, self.heads = backbone, heads
        self.masks = bool(heads.masks)
        for name, value in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1), persistent=False)

    @property
    def kinds(self) -> tuple[str, ...]:
        """What its detections are measured by, of `tasks.detect.metrics.KINDS`; the last one is the main one."""
        return ("box", "mask") if self.masks else ("box",)

    def forward(
        self,
        images: Sequence[Tensor],
        targets: list[dict[str, Tensor]] | None = None,
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Losses in training mode, detections in evaluation mode.

        Args:
            images: (3, H_i, W_i) floats in 0..1, of any sizes.
            targets: in training mode; see `RCNNHeads.forward`.
            sizes: (height, width) of each image that its detections refer to; by default its own.

        Returns:
            The losses by name; or per image `boxes` (N, 4) [x1, y1, x2, y2], `labels` (N,) class indices from 0,
            `scores` (N,) descending, and `masks` (N, 1, 28, 28), to be pasted by `heads.mask_rcnn.paste_masks`, or
            `keypoints` (N, K, 3), x, y and score.
        """
        own = [(int(image.shape[-2]), int(image.shape[-1])) for image in images]
        batch = self.batch(images)
        detections, losses = self.heads(self.backbone(batch), batch, own, targets)
        if self.training:
            return losses
        for found, size, original in zip(detections, own, sizes or own, strict=True):
            factors = [original[1] / size[1], original[0] / size[0]] * 2
            found["boxes"] = found["boxes"] * torch.tensor(factors, device=batch.device)
            if "keypoints" in found:
                found["keypoints"] = found["keypoints"] * torch.tensor([*factors[:2], 1.0], device=batch.device)
            found["labels"] = found["labels"] - 1
        return detections

    def batch(self, images: Sequence[Tensor]) -> Tensor:
        """Normalised images in one (B, 3, H, W), zeros to the right and below, H and W multiples of 32."""
        height, width = (-(-max(image.shape[d] for image in images) // PAD_TO) * PAD_TO for d in (-2, -1))
        return torch.stack(
            [
                F.pad((image - self.mean) / self.std, [0, 0, width - image.shape[-1], height - image.shape[-2]])
                for image in images
            ]
        )

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the backbone; the heads' shapes differ from image to image."""
        self.backbone.compile(*args, **kwargs)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that do not decay, besides norms."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    def normalize_as(self, normalization: Normalization) -> None:
        """Normalise images by these values instead of ImageNet's."""
        for name, values in zip(("mean", "std"), normalization, strict=True):
            buffer = getattr(self, name)
            buffer.copy_(torch.tensor(values).view(3, 1, 1))

    def save(self, path: str | os.PathLike[str], metadata: Mapping[str, Any]) -> None:
        """Write weights and metadata to a safetensors file, atomically."""
        save_weights(self, path, {**metadata, "task": self.task})

    @classmethod
    def build(cls, architecture: Mapping[str, Any], **options: Any) -> Detector:
        """A network with fresh weights from an `architecture`; see the class for options."""
        backbone = pyramid_backbone(architecture["backbone"])
        head, width = architecture["head"], architecture["width"]
        return cls(backbone, architecture["num_classes"], width=width, head=head, **options)

    @classmethod
    def from_weights(cls, weights: Weights) -> Detector:
        """A trained network, in evaluation mode.

        Raises:
            UserError: the tensors do not fit.
        """
        model = load_dense(cls.build, weights)
        check_classes(weights, model.num_classes)
        model.normalize_as(Normalization.of(weights.metadata))
        return model


def standard_head(masks: bool) -> str:
    """The standard heads of a detector with or without masks."""
    return "mask-rcnn" if masks else "faster-rcnn"


def named_head(config: DetectConfig, weights: Weights | None) -> str | None:
    """The heads of the settings, else those of a detector's weights; None for the standard ones of weights, which the
    data decide on."""
    if config.head is not None or weights is None or weights.architecture is None or weights.task != "detect":
        return config.head
    stored = weights.architecture["head"]
    return None if stored in (standard_head(True), standard_head(False)) else stored


def new_detector(
    config: DetectConfig, num_classes: int, masks: bool, weights: Weights | None = None, classes: Sequence[str] = ()
) -> Detector:
    """The network to train; see `start`."""
    head = named_head(config, weights)

    def build(backbone: Pyramid) -> Detector:
        return Detector(backbone, num_classes, masks, config.head_width, head, rois=config.rois)

    return start(Detector, build, config, weights, classes)


def start(
    kind: type[Detector],
    build: Callable[[Pyramid], Detector],
    config: ObjectsConfig,
    weights: Weights | None = None,
    classes: Sequence[str] = (),
) -> Detector:
    """The network to train: fresh, on the backbone of some weights, or from the weights of a whole one of its kind.

    With the latter, layers that depend on the classes are initialised anew if those are others.

    Args:
        kind: of network.
        build: makes it, with fresh heads.
        config: the settings.
        weights: to start from.
        classes: names of the classes.

    Raises:
        UserError: weights of another network, or with heads of another width.
    """
    known = weights.metadata.get("classes") if weights else None
    others = class_differences(known, classes) if known and classes else []
    whole = weights is not None and weights.task == kind.task
    if whole:
        check_dense(kind.build, weights)  # type: ignore[arg-type]
    if whole and (width := weights.architecture["width"]) != config.head_width:  # type: ignore[union-attr, index]
        raise UserError(
            f"{config.weights} has heads of width {width}, not {config.head_width}: pass --head-width {width}"
        )
    backbone = pyramid_backbone(
        weights.architecture["backbone"] if whole else config.model,  # type: ignore[union-attr, index]
        weights=None if whole else weights,
        drop_path=config.drop_path,
        coarse=config.coarse,
        guidance=config.guidance,
        freeze_stages=config.freeze_stages,
        grad_checkpointing=config.grad_checkpointing,
    )
    model = build(backbone)
    if weights is not None:
        model.normalize_as(Normalization.of(weights.metadata))
    return (take_fitting(model, weights, others) if whole else model).train()  # type: ignore[arg-type]


def coco_results(
    found: Mapping[str, Tensor], image_id: Any, category_ids: Sequence[Any], size: tuple[int, int]
) -> list[dict[str, Any]]:
    """Detections of one image in COCO's results format: boxes and, if present, masks as RLE or keypoints.

    Args:
        found: what `Detector` returned for the image.
        image_id: in the results.
        category_ids: by class index; detections of a class with None are left out.
        size: the image's (height, width), to which the boxes refer.
    """
    boxes, labels, scores = (found[name].cpu().tolist() for name in ("boxes", "labels", "scores"))
    masks = paste_masks(found["masks"], found["boxes"], size) if "masks" in found else [None] * len(boxes)
    points = found["keypoints"].cpu().tolist() if "keypoints" in found else [None] * len(boxes)
    return [
        coco_result(image_id, category_ids[label], box, score, None if mask is None else mask.numpy(), keypoints)
        for box, label, score, mask, keypoints in zip(boxes, labels, scores, masks, points, strict=True)
        if category_ids[label] is not None
    ]
