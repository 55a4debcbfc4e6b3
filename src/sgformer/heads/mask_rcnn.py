"""Mask R-CNN and Faster R-CNN on a feature pyramid: torchvision's FPN, RPN and RoI heads with the standard settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads as MaskConvs
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from sgformer.heads.registry import register_detector

Detections = list[dict[str, Tensor]]


class RCNNHeads(nn.Module):
    """FPN of five levels, region proposals, and heads for boxes, classes and, optionally, masks.

    Anchors are 8 x stride in size, with ratios 1:2, 1:1 and 2:1. At test: score above .05, NMS at .5, at most 100
    detections per image. Everything runs in float32, also under mixed precision: box coordinates beyond 256 pixels are
    not whole numbers of bfloat16.

    Args:
        channels: of the four maps.
        strides: of the four maps, in pixels.
        num_classes: without the background.
        masks: True for Mask R-CNN, False for Faster R-CNN; None: the class attribute.
        width: channels of FPN and mask head; the box head has 4 x width. 256 is the standard.
        rois: proposals per image that the heads train on.
        score_threshold, nms_threshold, detections: at test time.
    """

    masks = True

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        masks: bool | None = None,
        width: int = 256,
        rois: int = 512,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        detections: int = 100,
    ):
        super().__init__()
        if masks is not None:
            self.masks = masks
        self.num_classes = num_classes
        self.fpn = FeaturePyramidNetwork(list(channels), width, LastLevelMaxPool())
        stub = nn.Identity()
        stub.out_channels = width  # type: ignore[assignment] # all that torchvision needs of the backbone here
        kind, parts = self.parts(width, num_classes)
        rcnn = kind(
            stub,
            rpn_anchor_generator=Anchors([*strides, 2 * strides[-1]]),
            box_head=TwoMLPHead(width * 7 * 7, 4 * width),
            box_predictor=FastRCNNPredictor(4 * width, num_classes + 1),
            box_batch_size_per_image=rois,
            box_score_thresh=score_threshold,
            box_nms_thresh=nms_threshold,
            box_detections_per_img=detections,
            **parts,
        )
        self.rpn, self.roi_heads = rcnn.rpn, rcnn.roi_heads

    def parts(self, width: int, num_classes: int) -> tuple[type[FasterRCNN], dict[str, nn.Module]]:
        """torchvision's network, and what its heads find besides boxes and classes, by argument."""
        if not self.masks:
            return FasterRCNN, {}
        return MaskRCNN, {
            "mask_head": MaskConvs(width, (width,) * 4, dilation=1),
            "mask_predictor": MaskRCNNPredictor(width, width, num_classes + 1),
        }

    def forward(
        self, maps: Sequence[Tensor], batch: Tensor, sizes: list[tuple[int, int]], targets: Detections | None = None
    ) -> tuple[Detections, dict[str, Tensor]]:
        """Detections (in evaluation mode) and losses (in training mode); the other one is empty.

        Args:
            maps: four, (B, channels[i], H / strides[i], W / strides[i]).
            batch: the images, (B, 3, H, W); only its shape is used.
            sizes: (height, width) of each image without its padding.
            targets: in training, a dict per image with `boxes` (N, 4) [x1, y1, x2, y2] in pixels of `batch`, `labels`
                (N,) int64 from 1, and `masks` (N, h, w) uint8.

        Returns:
            Per image `boxes` (N, 4), `labels` (N,), `scores` (N,) descending, and `masks` (N, 1, 28, 28), the fraction
            of each cell of the box that the object covers; and the losses by name.
        """
        levels = self.fpn({str(i): m for i, m in enumerate(maps)})
        with torch.autocast(batch.device.type, enabled=False):
            levels = {name: level.float() for name, level in levels.items()}
            images = ImageList(batch.float(), sizes)
            proposals, proposal_losses = self.rpn(images, levels, targets)
            detections, losses = self.roi_heads(levels, proposals, sizes, targets)
        return detections, {**losses, **proposal_losses}


@register_detector("mask-rcnn")
class MaskRCNNHeads(RCNNHeads):
    """Boxes, classes and masks."""


@register_detector("faster-rcnn")
class FasterRCNNHeads(RCNNHeads):
    """Boxes and classes."""

    masks = False


class Anchors(AnchorGenerator):
    """Anchors at the levels' true strides; torchvision derives strides from sizes, wrongly if those are odd.

    Args:
        strides: of the levels, in pixels.
        scale: the anchors' side in strides.
        ratios: of height to width, one anchor each.
    """

    def __init__(self, strides: Sequence[int], scale: int = 8, ratios: Sequence[float] = (0.5, 1.0, 2.0)):
        super().__init__(tuple((scale * stride,) for stride in strides), (tuple(ratios),) * len(strides))
        self.strides = list(strides)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """All anchors (A, 4) of every image."""
        like = feature_maps[0]
        self.set_cell_anchors(like.dtype, like.device)
        strides = [[torch.tensor(s, device=like.device)] * 2 for s in self.strides]
        anchors = self.grid_anchors([list(m.shape[-2:]) for m in feature_maps], strides)
        return [torch.cat(anchors)] * len(image_list.image_sizes)


def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Iterator[Tensor]:
    """Masks of a whole image, one at a time: a hundred at once would fill the memory for large images.

    Args:
        masks: (N, 1, 28, 28) of `RCNNHeads`.
        boxes: (N, 4) [x1, y1, x2, y2] in pixels of the image.
        size: its (height, width).

    Yields:
        (height, width) bool on the CPU, for each object.
    """
    masks, boxes = masks.cpu().float(), boxes.cpu().float()
    for i in range(len(boxes)):
        yield paste_masks_in_image(masks[i : i + 1], boxes[i : i + 1], size)[0, 0] > 0.5
