"""The settings of a run on COCO annotations, and of detection; see `sgformer.training.config`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sgformer.core.errors import UserError
from sgformer.heads.registry import DETECTORS
from sgformer.training.config import DataFacts, RunConfig, option

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class ObjectsConfig(RunConfig):
    """The settings of all networks that find objects, on the COCO layout."""

    base_batch = 16

    data: str | None = option(None, "Run", "COCO folder (annotations/*.json, images), or its train JSON", main=True)
    val_data: str | None = option(None, "Data", "JSON to validate on, if --data is a JSON", main=True)
    images: str | None = option(None, "Data", "folder of the images, if not beside the JSON", main=True)
    drop_empty: bool = option(False, "Data", "leave out training images without objects")

    epochs: float = option(12, "Schedule", "passes over the training images", main=True, auto=True)
    batch_size: int = option(
        16, "Schedule", "images per update, over all devices and --accumulate parts", main=True, auto=True
    )
    image_size: int | tuple[int, int] = option(
        800, "Schedule", "short side (bound on the long one in proportion), or [SHORT,LONGEST]", main=True, auto=True
    )
    lr: float = option(1e-4, "Schedule", "learning rate for 16 images; x batch-size/16", main=True, auto=True)
    lr_drops: tuple[float, ...] = option(
        (8, 11), "Schedule", "epochs after which the rate falls to a tenth; auto: 2/3 and 11/12 of the run", auto=True
    )

    freeze_stages: int = option(-1, "Network", "freeze the stem and this many stages; -1: train all")
    head_width: int = option(256, "Network", "channels of FPN and heads; fewer are faster, 256 is standard", auto=True)
    rois: int = option(512, "Network", "proposals per image that the heads train on; 512 is the standard", auto=True)
    ema: float = option(0.0, "Network", "decay of the averaged weights, which are evaluated and saved; 0: off")

    warmup_steps: int | None = option(
        None, "Optimiser", "updates of linear warm-up; auto: 1000, at most a tenth of the run", auto=True
    )
    warmup_factor: float = option(0.001, "Optimiser", "fraction of --lr that the warm-up starts from")
    weight_decay: float = option(0.05, "Optimiser", "except on norms and the position table")

    multi_scale: bool = option(False, "Augmentation", "resize to 480..800, or crop before (3x recipes)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.lr_drops, list):  # YAML and JSON have no tuples
            object.__setattr__(self, "lr_drops", tuple(self.lr_drops))
        for name in ("head_width", "rois"):
            self._check(name, lambda v: v > 0, "must be above 0")
        self._check("warmup_steps", lambda v: v >= 0, "must be 0 or more")
        self._check("warmup_factor", lambda v: 0 < v <= 1, "must be in (0, 1]")
        self._check("freeze_stages", lambda v: -1 <= v <= 4, "must be -1 to 4")
        if self.freeze and self.freeze_stages >= 0:
            raise UserError("--freeze freezes the whole backbone: leave out --freeze-stages")
        self._check("lr_drops", lambda v: all(e > 0 for e in v), "must be epochs above 0")
        if isinstance(self.image_size, tuple) and self.image_size[0] > self.image_size[1]:
            raise UserError("--image-size is [SHORT,LONGEST], got [{},{}]".format(*self.image_size))

    def choose(self, data: DataFacts) -> Self:
        """From weights, as many epochs as show 3,000 images, at least 6; from scratch three times as many."""
        cpu = data.device == "cpu"
        held = {} if data.architecture is None else {"head_width": data.architecture["width"]}
        config = self.fill(
            image_size=data.side(192, 320 if cpu else 800),
            batch_size=data.batch(4, 8 if cpu else 16),
            **{**({"head_width": 64, "rois": 128} if cpu else {}), **held},
            opt="adamw",  # Muon has not been tried on detectors
            drop_path=0.0,
            clip_grad=1.0,
        )
        config = config.choose_coarse(data).choose_optimiser(muon=1e-3, adam=1e-3, most_adam=1e-3)
        config = config.fill(epochs=min(max(round(3000 / data.images), 6), 40) * (1 if data.pretrained else 3))
        updates = max(1, data.images // config.batch_size) * config.epochs
        drops = tuple(round(config.epochs * part, 4) for part in (2 / 3, 11 / 12))
        return config.fill(lr_drops=drops, warmup_steps=min(1000, int(updates) // 10))

    def check_schedule(self, total_steps: int, steps_per_pass: float) -> None:
        self._check_warmup("warmup_steps", total_steps, "updates")

    def warmup_updates(self, total_steps: int) -> int:
        """Updates of warm-up."""
        return min(1000, total_steps // 10) if self.warmup_steps is None else self.warmup_steps

    def rate(self, step: int, steps_per_epoch: int, total_steps: int) -> float:
        """The learning rate of an update, as a fraction of `scaled(lr)`."""
        warmup = self.warmup_updates(total_steps)
        warm = min(1.0, self.warmup_factor + (1 - self.warmup_factor) * step / warmup) if warmup else 1.0
        return warm * 0.1 ** sum(step >= epoch * steps_per_epoch for epoch in self.lr_drops)


@dataclass(frozen=True)
class DetectConfig(ObjectsConfig):
    """Object detection and instance segmentation."""

    masks: bool | None = option(None, "Data", "false: boxes only; default: masks if most objects have one", main=True)
    head: str | None = option(
        None, "Network", f"{', '.join(DETECTORS.names())} [mask-rcnn or, without masks, faster-rcnn]"
    )
    hflip: float = option(0.5, "Augmentation", "probability of a horizontal flip")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head is not None:
            DETECTORS.check(self.head, "--head")
        self._check("hflip", lambda v: 0 <= v <= 1, "must be in [0, 1]")


Config = DetectConfig
