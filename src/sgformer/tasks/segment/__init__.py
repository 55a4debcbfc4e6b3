"""Semantic segmentation: label maps in, a class for every pixel out."""

from __future__ import annotations

from typing import Any

from sgformer.training.task import Task


class Segment(Task):
    name = "segment"
    title = "segmentation"
    about = "train a network that labels every pixel with a class"
    description = "Train a network that labels every pixel with a class, on label maps in the ADE20K layout."
    example = "--data photos --model sgformer_t --head semantic-fpn --steps 2000"
    data_help = "the folder with images/validation and annotations/validation"
    eval_options = predict_options = frozenset({"multi_scale", "flip", "sliding"})
    score = "miou"
    unit = "step"
    pictures = (
        ("Worst and best images", "validation/examples.png"),
        ("Confusion", "validation/confusion.png"),
    )
    written = "per class, confusion and examples"
    needs = ("classes", "image_size", "short_side", "reduce_zero_label")
    quantity = "share of the image"

    def scores(self, module: Any) -> tuple[str, ...]:
        return ("miou", "macc", "pixel_accuracy")
