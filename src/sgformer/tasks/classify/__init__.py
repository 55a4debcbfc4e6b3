"""Image classification: `train/CLASS/*` in, one class per image out."""

from __future__ import annotations

from typing import Any

from sgformer.training.task import Task


class Classify(Task):
    name = "classify"
    title = "classification"
    about = "train an image classifier on a folder of images"
    description = "Train an image classifier on DATA/train/CLASS/*, validate it on DATA/val/CLASS/*."
    example = "--data photos --run runs/photos"
    data_help = "the folder with val/CLASS/*, or folder or URL of shards"
    eval_options = frozenset({"crop_pct"})
    predict_options = frozenset({"top", "batch_size", "precision"})
    score = "top1"
    pictures = (("Confusion", "validation/confusion.png"),)
    written = "per class and confusion"
    quantity = "probability"

    def scores(self, module: Any) -> tuple[str, ...]:
        return ("top1", "top5")
