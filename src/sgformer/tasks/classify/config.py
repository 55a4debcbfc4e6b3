"""The settings of a classification run; see `sgformer.training.config`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from sgformer.core.errors import UserError
from sgformer.core.names import dashed
from sgformer.models.metadata import MIN_CROP
from sgformer.training.config import AUTO, DataFacts, RunConfig, option

if TYPE_CHECKING:
    from typing_extensions import Self

# From this many epochs on, a run takes the strong augmentation of published recipes; shorter ones would underfit.
LONG_RUN = 100

#: What shorter runs take instead.
LIGHT: dict[str, Any] = {
    "drop_path": 0.0,
    "clip_grad": 1.0,
    "auto_augment": None,
    "color_jitter": 0.2,
    "interpolation": "bilinear",
    "crop_scale": 0.4,
    "reprob": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "crop_pct": 1.0,
}


@dataclass(frozen=True)
class ClassifyConfig(RunConfig):
    """Image classification on the ImageNet layout."""

    data: str | None = option(
        None, "Run", "folder with train/CLASS/* and val/CLASS/*, or folder or URL of shards", main=True
    )

    balance: Literal["none", "weights", "sampling"] = option(
        "none",
        "Optimiser",
        "let rare classes count as much as common ones: by weights in the loss, or drawn more often",
    )
    layer_decay: float | None = option(None, "Optimiser", "rate multiplier per layer, from the classifier down")
    warmup_epochs: float = option(5, "Optimiser", "linear warm-up", auto=True)
    warmup_lr: float = option(1e-6, "Optimiser", "rate that the warm-up starts from, scaled like --lr", auto=True)
    min_lr: float = option(1e-5, "Optimiser", "rate that the cosine ends at, scaled like --lr", auto=True)
    cooldown_epochs: int = option(0, "Optimiser", "epochs at --min-lr after --epochs")

    downloads = ("teacher",)

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

    auto_augment: str | None = option("rand-m9-mstd0.5-inc1", "Augmentation", "timm policy; null: none", auto=True)
    color_jitter: float = option(0.4, "Augmentation", "used if auto-augment is null", auto=True)
    interpolation: Literal["random", "bilinear", "bicubic"] = option(
        "random", "Augmentation", "of training crops", auto=True
    )
    crop_scale: float = option(0.08, "Augmentation", "smallest fraction of the image in a training crop", auto=True)
    hflip: float = option(0.5, "Augmentation", "probability of a horizontal flip")
    reprob: float = option(0.25, "Augmentation", "probability of random erasing", auto=True)
    mixup: float = option(0.8, "Augmentation", "alpha; 0: off", auto=True)
    cutmix: float = option(1.0, "Augmentation", "alpha; 0: off", auto=True)
    mix_prob: float = option(1.0, "Augmentation", "probability per batch of either")
    smoothing: float = option(0.1, "Augmentation", "label smoothing")
    crop_pct: float = option(0.9, "Augmentation", "evaluation: resize to size / crop-pct, crop the centre", auto=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("warmup_epochs", "warmup_lr", "min_lr", "cooldown_epochs"):
            self._check(name, lambda v: v >= 0, "must be 0 or more")
        self._check("layer_decay", lambda v: 0 < v <= 1, "must be in (0, 1]")
        for name in ("hflip", "reprob", "mix_prob", "smoothing"):
            self._check(name, lambda v: 0 <= v <= 1, "must be in [0, 1]")
        self._check("crop_scale", lambda v: 0 < v <= 1, "must be in (0, 1]")
        self._check("crop_pct", lambda v: MIN_CROP <= v <= 1, f"must be in [{MIN_CROP}, 1]")
        for name in ("mixup", "cutmix", "color_jitter"):
            self._check(name, lambda v: v >= 0, "must be 0 or more")
        self._check("balance", lambda v: v in ("none", "weights", "sampling"), "must be none, weights or sampling")
        self._check("teacher_weight", lambda v: 0 < v <= 1, "must be above 0 and at most 1")
        self._check("teacher_temperature", lambda v: v > 0, "must be above 0")
        self._check_teacher()

    def _check_teacher(self) -> None:
        changed = [f.name for f in fields(self) if f.name[:8] == "teacher_" and getattr(self, f.name) != f.default]
        if self.teacher is None and changed:
            raise UserError(f"--{dashed(changed[0])} is for runs with --teacher")
        if self.teacher_labels == "hard" and "teacher_temperature" in changed:
            raise UserError("--teacher-temperature is for --teacher-labels soft; hard labels have none")

    def choose(self, data: DataFacts) -> Self:
        """From weights, as many epochs as make 800 updates, at least 8; from scratch three times as many."""
        cpu = data.device == "cpu"
        config = self.fill(image_size=data.side(64, 128 if cpu else 224), batch_size=data.batch(8, 32 if cpu else 128))
        config = config.choose_coarse(data).choose_optimiser(muon=1e-3, adam=5e-4, most_adam=1e-3)
        epochs = round(800 * config.batch_size / data.images) if config.is_auto("epochs") else 0
        config = config.fill(epochs=min(max(epochs, 8), 40) * (1 if data.pretrained else 3))
        if config.lr != AUTO:
            config = config.fill(warmup_lr=config.lr / 1000, min_lr=config.lr / 100)
        return config.fill(
            warmup_epochs=min(5.0, round(config.epochs / 10, 4)), **(LIGHT if config.epochs < LONG_RUN else {})
        )

    def standard(self) -> dict[str, Any]:
        values = self.automatic()
        epochs = values["epochs"] if self.is_auto("epochs") else self.epochs
        return values | {"warmup_epochs": min(values["warmup_epochs"], epochs / 2)}

    def for_updates(self, updates: int, steps_per_pass: float) -> Self:
        if updates / steps_per_pass <= self.cooldown_epochs:
            raise UserError(
                f"--minutes allows {updates / steps_per_pass:.1f} epochs here, not even --cooldown-epochs "
                f"{self.cooldown_epochs}: raise it, or leave the cool-down out"
            )
        return super().for_updates(round(updates - self.cooldown_epochs * steps_per_pass), steps_per_pass)

    def total_steps(self, steps_per_pass: int) -> int:
        """Updates of the full schedule, given those per pass over the images."""
        return max(1, round(steps_per_pass * (self.epochs + self.cooldown_epochs)))

    def check_schedule(self, total_steps: int, steps_per_pass: float) -> None:
        self._check_warmup("warmup_epochs", self.epochs, "epochs")

    def warmup_updates(self, steps_per_epoch: int) -> int:
        """Updates of warm-up."""
        return round(self.warmup_epochs * steps_per_epoch)


Config = ClassifyConfig
