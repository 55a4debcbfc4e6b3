"""The network that finds keypoints: a backbone and the heads of Keypoint R-CNN."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sgformer.core.errors import UserError
from sgformer.heads.keypoint_rcnn import KeypointHeads
from sgformer.models.load import Weights
from sgformer.models.pyramid import Pyramid, pyramid_backbone
from sgformer.tasks.detect.network import Detector, start
from sgformer.tasks.keypoints.config import KeypointsConfig


class KeypointDetector(Detector):
    """A backbone with the heads of Keypoint R-CNN.

    Args:
        backbone: four feature maps.
        num_classes: without the background.
        keypoints: number of keypoints of each object.
        width: of the heads; 256 is the standard.
        options: of `heads.mask_rcnn.RCNNHeads`.
    """

    task = "keypoints"

    def __init__(self, backbone: Pyramid, num_classes: int, keypoints: int, width: int = 256, **options: Any):
        heads = KeypointHeads(backbone.channels, backbone.strides, num_classes, keypoints, width, **options)
        self._assemble(backbone, heads, {"num_classes": num_classes, "keypoints": keypoints, "width": width})

    @property
    def kinds(self) -> tuple[str, ...]:
        return ("box", "keypoints")

    @classmethod
    def build(cls, architecture: Mapping[str, Any], **options: Any) -> KeypointDetector:
        backbone = pyramid_backbone(architecture["backbone"])
        return cls(backbone, *(architecture[name] for name in ("num_classes", "keypoints", "width")), **options)

    @classmethod
    def from_weights(cls, weights: Weights) -> KeypointDetector:
        """A trained network, in evaluation mode.

        Raises:
            UserError: the tensors do not fit.
        """
        model = super().from_weights(weights)
        named, count = weights.metadata.get("keypoints"), model.architecture["keypoints"]
        if named is not None and len(named) != count:
            raise UserError(f"{weights.path}: names {len(named)} keypoints, but its network finds {count}")
        return model  # type: ignore[return-value]


def new_keypoint_detector(
    config: KeypointsConfig, keypoints: int, weights: Weights | None = None, classes: Sequence[str] = ()
) -> Detector:
    """The network to train; see `tasks.detect.network.start`."""

    def build(backbone: Pyramid) -> Detector:
        return KeypointDetector(backbone, len(classes), keypoints, config.head_width, rois=config.rois)

    return start(KeypointDetector, build, config, weights, classes)
