"""Keypoint R-CNN on a feature pyramid: torchvision's keypoint head beside the proposals and boxes of Mask R-CNN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, KeypointRCNN
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads as KeypointConvs
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNPredictor

from sgformer.heads.mask_rcnn import Detections, RCNNHeads


class KeypointHeads(RCNNHeads):
    """Boxes, classes and the keypoints of each object; one set of keypoints for all classes.

    Args:
        channels, strides, num_classes, width: see `RCNNHeads`; the keypoint head has eight convolutions of 2 x width.
        keypoints: their number.
        options: of `RCNNHeads`.
    """

    masks = False

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        keypoints: int,
        width: int = 256,
        **options: Any,
    ):
        self.keypoints = keypoints
        super().__init__(channels, strides, num_classes, width=width, **options)

    def parts(self, width: int, num_classes: int) -> tuple[type[FasterRCNN], dict[str, nn.Module]]:
        return KeypointRCNN, {
            "keypoint_head": KeypointConvs(width, (2 * width,) * 8),
            "keypoint_predictor": Heatmaps(2 * width, self.keypoints),
        }

    def forward(
        self, maps: Sequence[Tensor], batch: Tensor, sizes: list[tuple[int, int]], targets: Detections | None = None
    ) -> tuple[Detections, dict[str, Tensor]]:
        """See `RCNNHeads.forward`.

        Targets have `keypoints`, (N, K, 3) float32: x, y, and above 0 for those to learn. Detections have `keypoints`,
        (N, K, 3): x, y, and a score in [0, 1], the probability of the most probable of the box's 56 x 56 cells.
        """
        detections, losses = super().forward(maps, batch, sizes, targets)
        for found in detections:
            found["keypoints"] = found["keypoints"].clone()
            found["keypoints"][..., 2] = found.pop("keypoints_scores").exp().clamp(max=1)
        return detections, losses


class Heatmaps(KeypointRCNNPredictor):
    """torchvision's, as logarithms of probabilities: (N, C, 14, 14) -> (N, K, 56, 56).

    Loss and places are the same as of its logits, which have no scale of their own to tell sure from unsure by.
    """

    def forward(self, x: Tensor) -> Tensor:
        maps = super().forward(x)
        return maps.flatten(2).log_softmax(-1).view_as(maps)
