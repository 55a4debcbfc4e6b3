"""Keypoints: COCO annotations in; boxes, classes, scores and the keypoints of each object out."""

from __future__ import annotations

from typing import Any

from sgformer.tasks.detect import Detect


class Keypoints(Detect):
    name = "keypoints"
    title = "keypoint detection"
    about = "train a network that finds objects and their keypoints, on COCO annotations"
    description = "Train Keypoint R-CNN on a data set in the COCO layout whose categories name keypoints."
    example = "--data coco --weights runs/imagenet"
    score = "keypoints_ap"
    needs = (*Detect.needs, "keypoints", "skeleton", "sigmas")

    def scores(self, module: Any) -> tuple[str, ...]:
        return ("keypoints_ap", "box_ap")
