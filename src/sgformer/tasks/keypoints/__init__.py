"""Keypoints: COCO annotations in; boxes, classes, scores and the keypoints of each object out."""

from __future__ import annotations

from typing import Any

from sgformer.training.task import Task


class Keypoints(Task):
    name = "keypoints"
    title = "keypoint detection"
    about = "train a network that finds objects and their keypoints, on COCO annotations"
    description = "Train Keypoint R-CNN on a data set in the COCO layout whose categories name keypoints."
    example = "--data coco --weights runs/imagenet"
    data_help = "the COCO folder, or its val JSON"
    eval_options = frozenset({"images"})
    predict_options = frozenset({"score"})
    score = "keypoints_ap"
    pictures = (
        ("Precision and recall", "validation/precision_recall.png"),
        ("Best and worst images", "validation/examples.png"),
    )
    written = "per class, results, curves and examples"
    quantity = "confidence"
    extras = (("pycocotools", "detect"),)
    needs = ("classes", "category_ids", "image_size", "keypoints", "skeleton", "sigmas")

    def scores(self, module: Any) -> tuple[str, ...]:
        return ("keypoints_ap", "box_ap")

    def nothing(self, score: float) -> str:
        return f"No object with a confidence of at least {100 * score:.0f} %."

    def measured(self, model: Any) -> Any:
        return model.backbone  # the cost of the heads depends on the detections
