"""The settings of a semantic segmentation run; see `sgformer.training.config`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sgformer.heads.registry import HEADS
from sgformer.models.metadata import MAX_SIDE
from sgformer.training.config import AUTO, DataFacts, RunConfig, option

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class SegmentConfig(RunConfig):
    """Semantic segmentation on the ADE20K layout."""

    base_batch = 16
    former_names: ClassVar[Mapping[str, str]] = {"most_of_one_class": "cat_max_ratio"}

    data: str | None = option(None, "Run", "folder with images/training, annotations/training ...", main=True)
    head: str = option("upernet", "Run", f"segmentation head: {', '.join(HEADS.names())}", main=True, auto=True)

    classes: int | None = option(
        None, "Data", "number; default: from classes.txt, objectInfo150.txt or the labels", main=True
    )
    reduce_zero_label: bool = option(False, "Data", "label 0 is ignored, label n is class n - 1 (ADE20K)", main=True)
    short_side: int | None = option(None, "Data", "of images before --scale-*; default: of --image-size", main=True)

    steps: int = option(80000, "Schedule", "updates; the rate decays over all of them", main=True, auto=True)
    epochs: float | None = option(None, "Schedule", "instead of --steps: passes over the images")  # type: ignore[assignment]
    val_every: int = option(8000, "Schedule", "updates between validations", main=True, auto=True)
    batch_size: int = option(
        16, "Schedule", "images per update, over all devices and --accumulate parts", main=True, auto=True
    )
    image_size: int | tuple[int, int] = option(
        512, "Schedule", "training crop: a number, or [HEIGHT,WIDTH]", main=True, auto=True
    )
    lr: float = option(1e-4, "Schedule", "peak learning rate for 16 images; x batch-size/16", main=True, auto=True)

    ema: float = option(0.0, "Network", "decay of the averaged weights, which are evaluated and saved; 0: off")
    head_width: int | None = option(None, "Network", "channels; null: the head's own standard", auto=True)
    auxiliary: float = option(0.4, "Network", "weight of the head's auxiliary loss, if it has one (upernet)")

    weight_decay: float = option(1e-4, "Optimiser", "except on norms and the position table")
    warmup_steps: int = option(0, "Optimiser", "updates of linear warm-up", auto=True)
    power: float = option(0.9, "Optimiser", "after the warm-up, rate = lr * (1 - share done) ^ power")

    scale_min: float = option(0.5, "Augmentation", "smallest factor on --short-side")
    scale_max: float = option(2.0, "Augmentation", "largest factor on --short-side")
    hflip: float = option(0.5, "Augmentation", "probability of a horizontal flip")
    cat_max_ratio: float = option(0.75, "Augmentation", "redraw crops of which one class covers this fraction")
    distortion: bool = option(True, "Augmentation", "change brightness, contrast, saturation, hue")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_minutes("epochs", "steps")
        if self.head != AUTO:
            HEADS.check(self.head, "--head")
        for name in ("steps", "val_every", "power", "scale_min", "scale_max", "cat_max_ratio", "head_width"):
            self._check(name, lambda v: v > 0, "must be above 0")
        for name in ("warmup_steps", "auxiliary"):
            self._check(name, lambda v: v >= 0, "must be 0 or more")
        self._check("hflip", lambda v: 0 <= v <= 1, "must be in [0, 1]")
        self._check("classes", lambda v: v >= 2, "must be 2 or more")
        self._check("short_side", lambda v: 32 <= v <= MAX_SIDE, f"must be 32 to {MAX_SIDE} pixels")
        self._check("scale_max", lambda v: v >= self.scale_min, f"must not be below --scale-min {self.scale_min}")

    @property
    def short(self) -> int:
        """The short side of images before random scaling, and in evaluation, in pixels."""
        return self.short_side or min(self.image_hw)

    def choose(self, data: DataFacts) -> Self:
        """From weights, as many updates as show 4,000 images, or each image ten times up to 12,000, or each four times,
        whichever is most; from scratch three times as many."""
        cpu, held = data.device == "cpu", data.architecture
        least = max(4, 2 * data.parts)  # UPerNet's batch norm needs two images at a time
        config = self.fill(head=held["head"], head_width=held["width"]) if held else self
        config = config.fill(
            head="semantic-fpn" if cpu else "upernet",
            image_size=data.side(64, 192 if cpu else 512),
            batch_size=data.batch(least, max(least, 8 if cpu else 16)),
            drop_path=0.0,
            clip_grad=1.0,
        )
        if cpu and config.head == "semantic-fpn":
            config = config.fill(head_width=64)
        config = config.choose_coarse(data).choose_optimiser(muon=2.8e-3, adam=1.4e-3, most_adam=1e-3)
        samples = max(4 * data.images, min(10 * data.images, 12000), 4000) * (1 if data.pretrained else 3)
        passes = samples / data.images if config.epochs is None else config.epochs
        config = config.fill(steps=max(1, round(passes * data.images / config.batch_size)))
        return config.fill(val_every=self.per_validation(config.steps, 0), warmup_steps=config.steps // 20)

    def per_validation(self, updates: int, steps_per_pass: float) -> int:
        return -(-updates // 8) if self.is_auto("val_every") else self.val_every

    def for_updates(self, updates: int, steps_per_pass: float) -> Self:
        return self.fill(steps=updates)

    def check_schedule(self, total_steps: int, steps_per_pass: float) -> None:
        self._check_warmup("warmup_steps", total_steps, "updates")

    def total_steps(self, steps_per_pass: float) -> int:
        """Updates of the full schedule, given those per pass over the images."""
        return max(1, round(self.epochs * steps_per_pass)) if self.epochs else self.steps


Config = SegmentConfig
