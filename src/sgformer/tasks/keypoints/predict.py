"""Finding keypoints with trained weights, and evaluating them."""

from __future__ import annotations

import os
from typing import Any

from sgformer.data.coco import CocoListing
from sgformer.data.keypoints import Skeleton, require_same
from sgformer.models.load import Weights
from sgformer.tasks.detect.metrics import CocoMetric
from sgformer.tasks.detect.predict import finish, measure, predict
from sgformer.tasks.keypoints.data import READING, keypoint_metric, require_coco, require_labelled
from sgformer.tasks.keypoints.network import KeypointDetector

__all__ = ["evaluate", "finish", "network", "predict"]  # the functions that `Task` calls

network = KeypointDetector.from_weights


def evaluate(
    weights: Weights, data: str | os.PathLike[str], *, out: str | os.PathLike[str] | None = None, **options: Any
) -> Any:
    """The twelve COCO metrics for boxes and the ten for keypoints; see `tasks.detect.predict.measure`.

    Raises:
        UserError: weights or data are invalid, or do not match.
    """
    require_coco(data)
    model, metadata = network(weights), weights.metadata

    def metric_of(listing: CocoListing) -> CocoMetric:
        require_same(listing.skeleton, Skeleton.of(metadata), listing.json, str(weights.path))
        require_labelled(listing)
        return keypoint_metric(listing, metadata["sigmas"])

    return measure(model, weights, data, metric_of, READING, out=out, **options)
