"""The settings of a semantic segmentation run; see `sgformer.training.config`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from sgformer.heads.registry import HEADS
from sgformer.training.config import RunConfig, option


@dataclass(frozen=True)
class SegmentConfig(RunConfig):
    """Semantic segmentation on the ADE20K layout."""

    base_batch = 16
    former_names: ClassVar[Mapping[str, str]] = {"most_of_one_class": "cat_max_ratio"}

    data: str | None = option(None, "Run", "folder with images/training, annotations/training ...", main=True)
    head: str = option("upernet", "Run", f"segmentation head: {', '.join(HEADS.names())}", main=True)

    classes: int | None = option(
        None, "Data", "number; default: from classes.txt, objectInfo150.txt or the labels", main=True
    )
    reduce_zero_label: bool = option(False, "Data", "label 0 is ignored, label n is class n - 1 (ADE20K)", main=True)
    short_side: int | None = option(None, "Data", "of images before --scale-*; default: of --image-size", main=True)

    steps: int = option(80000, "Schedule", "updates; the rate decays over all of them", main=True)
    epochs: int | None = option(None, "Schedule", "instead of --steps: passes over the images")  # type: ignore[assignment]
    val_every: int = option(8000, "Schedule", "updates between validations", main=True)
    batch_size: int = option(16, "Schedule", "images per update, over all devices and --accumulate parts", main=True)
    image_size: int | tuple[int, int] = option(512, "Schedule", "training crop: a number, or [HEIGHT,WIDTH]", main=True)
    lr: float = option(1e-4, "Schedule", "peak learning rate for 16 images; x batch-size/16", main=True)

    ema: float = option(0.0, "Network", "decay of the averaged weights, which are evaluated and saved; 0: off")
    head_width: int | None = option(None, "Network", "channels; default: the head's own standard")
    auxiliary: float = option(0.4, "Network", "weight of the head's auxiliary loss, if it has one (upernet)")

    weight_decay: float = option(1e-4, "Optimiser", "except on norms and the position table")
    warmup_steps: int = option(0, "Optimiser", "updates of linear warm-up")
    power: float = option(0.9, "Optimiser", "after the warm-up, rate = lr * (1 - share done) ^ power")

    scale_min: float = option(0.5, "Augmentation", "smallest factor on --short-side")
    scale_max: float = option(2.0, "Augmentation", "largest factor on --short-side")
    hflip: float = option(0.5, "Augmentation", "probability of a horizontal flip")
    cat_max_ratio: float = option(0.75, "Augmentation", "redraw crops of which one class covers this fraction")
    distortion: bool = option(True, "Augmentation", "change brightness, contrast, saturation, hue")

    def __post_init__(self) -> None:
        super().__post_init__()
        HEADS.check(self.head, "--head")
        for name in ("steps", "val_every", "power", "scale_min", "scale_max", "cat_max_ratio", "head_width"):
            self._check(name, lambda v: v > 0, "must be above 0")
        for name in ("warmup_steps", "auxiliary"):
            self._check(name, lambda v: v >= 0, "must be 0 or more")
        self._check("hflip", lambda v: 0 <= v <= 1, "must be in [0, 1]")
        self._check("classes", lambda v: v >= 2, "must be 2 or more")
        self._check("short_side", lambda v: v >= 32, "must be 32 pixels or more")
        self._check("scale_max", lambda v: v >= self.scale_min, f"must not be below --scale-min {self.scale_min}")

    @property
    def short(self) -> int:
        """The short side of images before random scaling, and in evaluation, in pixels."""
        return self.short_side or min(self.image_hw)

    def total_steps(self, steps_per_pass: float) -> int:
        """Updates of the full schedule, given those per pass over the images."""
        return max(1, round(self.epochs * steps_per_pass)) if self.epochs else self.steps


Config = SegmentConfig
