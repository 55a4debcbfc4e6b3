"""Training keypoints: the module of detection, with another network and metric."""

from __future__ import annotations

from sgformer.models.load import Weights
from sgformer.tasks.detect.module import DetectionModule, make_module
from sgformer.tasks.keypoints.config import KeypointsConfig
from sgformer.tasks.keypoints.data import keypoint_metric
from sgformer.tasks.keypoints.network import new_keypoint_detector
from sgformer.training.task import Splits


def build(config: KeypointsConfig, splits: Splits, weights: Weights | None) -> DetectionModule:
    """See `Task.module`."""
    about = splits.metadata
    model = new_keypoint_detector(config, len(about["keypoints"]), weights, about["classes"])
    return make_module(model, config, splits, keypoint_metric(splits.val.listing, about["sigmas"]))
