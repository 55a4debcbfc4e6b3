"""The settings of a classification run; see `sgformer.training.config`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from sgformer.core.errors import UserError
from sgformer.core.names import dashed
from sgformer.training.config import RunConfig, option


@dataclass(frozen=True)
class ClassifyConfig(RunConfig):
    """Image classification on the ImageNet layout."""

    data: str | None = option(
        None, "Run", "folder with train/CLASS/* and val/CLASS/*, or folder or URL of shards", main=True
    )

    layer_decay: float | None = option(None, "Optimiser", "rate multiplier per layer, from the classifier down")
    warmup_epochs: float = option(5, "Optimiser", "linear warm-up")
    warmup_lr: float = option(1e-6, "Optimiser", "rate that the warm-up starts from, scaled like --lr")
    min_lr: float = option(1e-5, "Optimiser", "rate that the cosine ends at, scaled like --lr")
    cooldown_epochs: int = option(0, "Optimiser", "epochs at --min-lr after --epochs")

    teacher: str | None = option(
        None, "Distillation", "network to learn from: a timm network's name, run, weights, or NAME=FILE of a state dict"
    )
    teacher_labels: Literal["soft", "hard"] = option(
        "soft", "Distillation", "learn the teacher's probabilities (soft) or its most probable class (hard)"
    )
    teacher_weight: float = option(0.5, "Distillation", "the teacher's part of the loss; the labels have the rest")
    teacher_temperature: float = option(2.0, "Distillation", "softens the probabilities of both networks")
    teacher_classes: str | None = option(
        None, "Distillation", "file for classes not found by name; lines: CLASS, a tab, the teacher's INDEX[,INDEX]"
    )

    auto_augment: str | None = option("rand-m9-mstd0.5-inc1", "Augmentation", "timm policy; null: none")
    color_jitter: float = option(0.4, "Augmentation", "used if auto-augment is null")
    interpolation: Literal["random", "bilinear", "bicubic"] = option("random", "Augmentation", "of training crops")
    crop_scale: float = option(0.08, "Augmentation", "smallest fraction of the image in a training crop")
    hflip: float = option(0.5, "Augmentation", "probability of a horizontal flip")
    reprob: float = option(0.25, "Augmentation", "probability of random erasing")
    mixup: float = option(0.8, "Augmentation", "alpha; 0: off")
    cutmix: float = option(1.0, "Augmentation", "alpha; 0: off")
    mix_prob: float = option(1.0, "Augmentation", "probability per batch of either")
    smoothing: float = option(0.1, "Augmentation", "label smoothing")
    crop_pct: float = option(0.9, "Augmentation", "evaluation: resize to size / crop-pct, crop the centre")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("warmup_epochs", "warmup_lr", "min_lr", "cooldown_epochs"):
            self._check(name, lambda v: v >= 0, "must be 0 or more")
        self._check("layer_decay", lambda v: 0 < v <= 1, "must be in (0, 1]")
        for name in ("hflip", "reprob", "mix_prob", "smoothing"):
            self._check(name, lambda v: 0 <= v <= 1, "must be in [0, 1]")
        for name in ("crop_scale", "crop_pct"):
            self._check(name, lambda v: 0 < v <= 1, "must be in (0, 1]")
        for name in ("mixup", "cutmix", "color_jitter"):
            self._check(name, lambda v: v >= 0, "must be 0 or more")
        self._check("teacher_weight", lambda v: 0 < v <= 1, "must be above 0 and at most 1")
        self._check("teacher_temperature", lambda v: v > 0, "must be above 0")
        self._check_teacher()

    def _check_teacher(self) -> None:
        changed = [f.name for f in fields(self) if f.name[:8] == "teacher_" and getattr(self, f.name) != f.default]
        if self.teacher is None and changed:
            raise UserError(f"--{dashed(changed[0])} is for runs with --teacher")
        if self.teacher_labels == "hard" and "teacher_temperature" in changed:
            raise UserError("--teacher-temperature is for --teacher-labels soft; hard labels have none")


Config = ClassifyConfig
