"""Object detection and instance segmentation: COCO annotations in, boxes, classes, scores and masks out."""

from __future__ import annotations

from typing import Any, ClassVar

from sgformer.training.task import Task


class Detect(Task):
    name = "detect"
    title = "detection"
    about = "train a detector of boxes and masks on COCO annotations"
    description = "Train Mask R-CNN, or Faster R-CNN if there are no masks, on a data set in the COCO layout."
    example = "--data coco --config recipes/detect_s_1x.yaml --weights runs/imagenet"
    data_help = "the COCO folder, or its val JSON"
    eval_options = frozenset({"images"})
    predict_options = frozenset({"score"})
    score = "box_ap"
    pictures = (
        ("Precision and recall", "validation/precision_recall.png"),
        ("Best and worst images", "validation/examples.png"),
    )
    written = "per class, results, curves and examples"
    quantity = "confidence"
    extras = (("pycocotools", "detect"),)
    needs: ClassVar[tuple[str, ...]] = ("classes", "category_ids", "image_size")

    def scores(self, module: Any) -> tuple[str, ...]:
        return ("mask_ap", "box_ap") if module.model.masks else ("box_ap", "box_ap50")

    def nothing(self, score: float) -> str:
        return f"No object with a confidence of at least {100 * score:.0f} %."

    def measured(self, model: Any) -> Any:
        return model.backbone  # the cost of the heads depends on the detections
