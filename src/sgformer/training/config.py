"""The settings common to all runs: a frozen dataclass, the single source of options, help and `config.yaml`.

Each task extends it. No torch here: `sgformer train TASK --help` imports nothing heavier.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from sgformer.core import parse
from sgformer.core.errors import UserError
from sgformer.core.names import dashed, is_remote, nearest, without_login
from sgformer.models.config import (
    AGGREGATION,
    SIGNIFICANCE,
    TOKEN_BUDGETS,
    VARIANTS,
    parse_regions,
    parse_scales,
    with_stages,
)
from sgformer.models.metadata import MAX_SIDE
from sgformer.models.pretrained import PRETRAINED, SUFFIXES, TAG, pretrained_file

if TYPE_CHECKING:
    from typing_extensions import Self

# `lr`, `min_lr` and `warmup_lr` refer to this many images per update and scale linearly with the batch size.
LR_BASE_BATCH = 1024

# The value of an option that a run derives from its data; see `RunConfig.resolved`.
AUTO = "auto"

#: Optimisers -> their peak rate, as a multiple of AdamW's: updates of its kin are as large as its own, those of Lion
#: have the size of a sign, those of SGD that of the gradient.
OPTIMISERS = {
    "adam adamw adamc adamp adopt adoptw adabelief laprop nadam nadamw nadamc radam radamw radabelief": 1.0,
    "lion": 0.2,
    "sgd momentum nesterov sgdw nesterovw sgdp": 25.0,
}
# Element-wise optimisers, whose update of a shard equals that of the full tensor. Others (muon, lamb, adafactor ...)
# need norms or products of full tensors.
ELEMENTWISE = ("sgd", "momentum", "adam", "adamw", "nadam", "nadamw", "radam", "adamax", "rmsprop", "lion")

LARGEST = 10**30  # of any whole number: Python refuses to print those of thousands of digits
MOST_PROCESSES, MOST_IMAGES = 1024, 2**20

# Options for fields of SGFormerConfig or its stages; None: as published, or as in --weights.
GUIDANCE = ("significance", "aggregation", "attention", "pairs", "regions", "scales")


def option(default: Any, group: str, help: str, *, main: bool = False, auto: bool = False) -> Any:
    """A dataclass field with command-line help.

    Args:
        default: the value where the option is not given.
        group, help: its heading and its phrase in the help.
        main: give it a line of its own in `--help`.
        auto: the default is `auto`: derived from the data (`RunConfig.choose`); `default` is for what has no data.
    """
    about = {"group": group, "help": help, "main": main, "auto": auto}
    return field(default=AUTO if auto else default, metadata={**about, "standard": default} if auto else about)


@dataclass(frozen=True)
class DataFacts:
    """What the automatic settings of a run follow from.

    Attributes:
        images: number of training images.
        pixels: their typical short side, the median of a sample; None if unknown.
        classes: number of classes.
        device: "cpu", "cuda" or "mps".
        parts: processes x accumulation, which the batch size must be a multiple of.
        pretrained: whether the run starts from weights.
        weights_size: the shorter side of the images that those weights were trained on, in pixels; None if it is
            unknown or was for another task.
        weights_coarse: the reach of their coarse heads; None if they are of no SG-Former.
        architecture: that of the weights if they are a whole network of this task, heads included; else None.
    """

    images: int
    pixels: int | None
    classes: int
    device: str = "cpu"
    parts: int = 1
    pretrained: bool = False
    weights_size: int | None = None
    weights_coarse: str | None = None
    architecture: Mapping[str, Any] | None = None

    def __str__(self) -> str:
        size = f" of {self.pixels} pixels" if self.pixels else ""
        start = "from weights" if self.pretrained else "from scratch"
        return f"{self.images} images{size}, {self.classes} classes, {start}, on {self.device}"

    def side(self, least: int, most: int) -> int:
        """The images' typical short side, down to a multiple of 32 and within limits; `most` if it is unknown.

        Args:
            least: pixels.
            most: pixels; that of the weights if it is larger.
        """
        most = max(most, (self.weights_size or 0) // 32 * 32)
        return most if self.pixels is None else min(max(self.pixels // 32 * 32, least), most)

    def batch(self, least: int, most: int) -> int:
        """A batch size, a power of two that gives some 16 updates per pass, within limits; a multiple of `parts`."""
        power = 1 << max(0, (self.images // 16).bit_length() - 1)
        return max(1, round(min(max(power, least), most) / self.parts)) * self.parts


@dataclass(frozen=True)
class RunConfig:
    """The settings common to all training tasks."""

    base_batch = LR_BASE_BATCH  # images per update that learning rates refer to
    former_names: ClassVar[Mapping[str, str]] = {}  # keys in the config.yaml of older runs -> current names
    downloads: ClassVar[tuple[str, ...]] = ()  # options that take the name of something to download

    data: str | None = option(None, "Run", "folder with the images", main=True)
    model: str = option("sgformer_n", "Run", "sgformer_{n,t,s,m,b} or any timm model", main=True)
    weights: str | None = option(
        "auto",
        "Run",
        "to start from: a run, a file, none; auto: the package's for N",
        main=True,
    )
    run: str | None = option(None, "Run", "output folder [runs/TASK-MODEL-TIME]", main=True)

    val_split: float | None = option(
        None, "Data", "if there are no validation images: keep this fraction of the training images for it, e.g. .2"
    )
    split_seed: int = option(0, "Data", "of --val-split: another seed, another split")

    epochs: float = option(100, "Schedule", "passes over the training images", main=True, auto=True)
    minutes: float | None = option(
        None, "Schedule", "instead of --epochs: as many as these minutes allow, measured at the start", main=True
    )
    patience: int | None = option(None, "Schedule", "stop after this many validations without a better score")
    max_steps: int | None = option(
        None, "Schedule", "stop after this many updates; does not change the schedule", main=True
    )
    batch_size: int = option(
        128, "Schedule", "images per update, over all devices and --accumulate parts", main=True, auto=True
    )
    accumulate: int = option(1, "Schedule", "gradient accumulation: split each batch into this many parts")
    image_size: int | tuple[int, int] = option(
        224, "Schedule", "pixels: a number, or [HEIGHT,WIDTH] as one word", main=True, auto=True
    )
    lr: float = option(
        1e-3,
        "Schedule",
        f"peak learning rate for {LR_BASE_BATCH} images; x batch-size/{LR_BASE_BATCH}",
        main=True,
        auto=True,
    )
    seed: int = option(0, "Schedule", "random seed; runs with the same seed are the same", main=True)

    device: str = option("auto", "Machine", "auto, cpu, cuda, cuda:1, mps", main=True)
    devices: int | Literal["auto"] = option("auto", "Machine", "processes on this machine, one per GPU", main=False)
    workers: int = option(4, "Machine", "data loading processes; 0: none. Never changes the result", main=True)
    strategy: Literal["ddp", "fsdp"] = option(
        "ddp",
        "Machine",
        "ddp: weights and optimizer state on every process; fsdp: sharded over processes",
    )
    precision: Literal["fp32", "bf16", "fp16"] = option(
        "fp32", "Machine", "bf16 and fp16 are mixed precision", main=True
    )
    compile: bool = option(False, "Machine", "torch.compile the network")
    native: Literal["auto", "on", "off"] = option(
        "auto", "Machine", "native kernels, for sgformer on the CPU in fp32; auto: if there is a C++ compiler"
    )
    grad_checkpointing: bool = option(False, "Machine", "less memory, more time")
    deterministic: bool = option(False, "Machine", "bit-for-bit reproducible on a GPU, too; slower")

    freeze: bool = option(False, "Network", "train the head alone, on the backbone of --weights", main=True)
    drop_path: float = option(0.1, "Network", "stochastic depth rate", auto=True)
    coarse: Literal["global", "window"] = option(
        "global", "Network", "reach of the coarse heads (sgformer); auto: as in --weights, or by image size", auto=True
    )
    significance: str | None = option(
        None, "Network", f"ranking of tokens: {', '.join(SIGNIFICANCE)} [hybrid, or as in --weights]"
    )
    aggregation: str | None = option(
        None, "Network", f"pooling of ranked tokens: {', '.join(AGGREGATION)} [linear, or as in --weights]"
    )
    attention: Literal["softmax", "linear"] | None = option(
        None, "Network", "attention of self-guided blocks [softmax, or as in --weights]"
    )
    pairs: Literal["guided", "hybrid", "single"] | None = option(
        None, "Network", "the block after a hybrid one: guided, another hybrid, or none (single) [guided]"
    )
    regions: str | None = option(
        None,
        "Network",
        "SHARE:RATE,... per guided stage, least to most significant, separated by /, e.g. .5:28,.5:7/.5:4,.5:2/1:1",
    )
    scales: str | None = option(None, "Network", "reductions of the head groups per guided stage, e.g. 8,4,1/4,1/2,1")
    token_budget_range: str | None = option(
        None, "Network", "LEAST,MOST: draw the token budget of each update from these, e.g. .25,2 [always 1]"
    )
    ema: float = option(0.9998, "Network", "decay of the averaged weights, which are evaluated and saved; 0: off")

    opt: str = option(
        "adamw",
        "Optimiser",
        "any of timm's optimisers; auto: adamw if --lr is given or for detection, else muon",
        auto=True,
    )
    weight_decay: float = option(0.05, "Optimiser", "except on norms, biases and the position table")
    clip_grad: float | None = option(None, "Optimiser", "clip gradients to this norm", auto=True)

    bad_images: Literal["stop", "skip"] = option("stop", "Logging", "on an unreadable image: stop, or skip and count")
    log_every: int = option(50, "Logging", "updates between rows of metrics.csv")
    checkpoint_every: int = option(1000, "Logging", "updates between checkpoints; also after each epoch")
    record_significance: int = option(
        0, "Logging", "record 4 validation images every this many epochs (segmentation: validations); 0: never"
    )

    def __post_init__(self) -> None:
        if isinstance(self.image_size, list):  # YAML and JSON have no tuples
            object.__setattr__(self, "image_size", tuple(self.image_size))
        if isinstance(self.epochs, float) and self.epochs.is_integer():
            object.__setattr__(self, "epochs", int(self.epochs))
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            parts = value if isinstance(value, tuple) else (value,)
            if any(isinstance(part, int) and abs(part) >= LARGEST for part in parts):
                raise UserError(f"--{dashed(spec.name)} is too large a number")
        for name in (
            "epochs",
            "minutes",
            "patience",
            "max_steps",
            "batch_size",
            "accumulate",
            "lr",
            "clip_grad",
            "log_every",
            "checkpoint_every",
        ):
            self._check(name, lambda v: v > 0, "must be above 0")
        self._check("val_split", lambda v: 0 < v < 1, "must be in (0, 1), e.g. .2")
        for name in ("epochs", "minutes"):
            self._check(name, math.isfinite, "must be finite")
        for name in ("workers", "seed", "split_seed", "weight_decay", "record_significance"):
            self._check(name, lambda v: v >= 0, "must be 0 or more")
        self._check("seed", lambda v: v < 2**32, "must be below 2^32, as NumPy's generators require")
        for name in ("drop_path", "ema"):
            self._check(name, lambda v: 0 <= v < 1, "must be in [0, 1)")
        self._check("devices", lambda v: v == "auto" or v > 0, "must be auto or above 0")
        for name in ("devices", "workers"):
            self._check(name, lambda v: v == "auto" or v <= MOST_PROCESSES, f"must be at most {MOST_PROCESSES}")
        self._check("batch_size", lambda v: v <= MOST_IMAGES, f"must be at most {MOST_IMAGES}")
        self._check("image_size", lambda v: min(self.image_hw) >= 32, "must be 32 pixels or more")
        self._check("image_size", lambda v: max(self.image_hw) <= MAX_SIDE, f"must be {MAX_SIDE} pixels or less")
        self._check_minutes("epochs")
        if self.coarse not in ("global", AUTO) and not self.model.startswith("sgformer_"):
            raise UserError(f"--coarse {self.coarse} is for sgformer models; {self.model} has no coarse heads")
        for name, known in (("significance", SIGNIFICANCE), ("aggregation", AGGREGATION)):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise UserError(f"--{name} must be one of {', '.join(known)}, got {value}{nearest(value, known)}")
        for name in GUIDANCE:
            if getattr(self, name) is not None and not self.model.startswith("sgformer_"):
                raise UserError(f"--{name} is for sgformer models; {self.model} reallocates no tokens")
        if self.record_significance and (not self.model.startswith("sgformer_") or self.pairs not in (None, "guided")):
            raise UserError("--record-significance is for sgformer models with self-guided blocks")
        self.guidance  # noqa: B018 - raises on invalid values
        self.token_budgets  # noqa: B018 - the same
        self._check("native", lambda v: v in ("auto", "on", "off"), "must be auto, on or off")
        if self.native == "on" and not self.model.startswith("sgformer_"):
            raise UserError(f"--native on is for sgformer models; there are no kernels for {self.model}")
        if self.native == "on" and (self.precision != "fp32" or self.compile or self.device not in ("auto", "cpu")):
            raise UserError("--native on requires --device cpu and --precision fp32, without --compile")
        if self.strategy == "fsdp":
            self._check_fsdp()
        if self.batch_size != AUTO and self.batch_size % self.accumulate:
            raise UserError(f"--batch-size {self.batch_size} does not divide into --accumulate {self.accumulate} parts")

    @property
    def token_budgets(self) -> tuple[float, ...]:
        """What updates draw from: the ends of `token_budget_range` and, between them, steps of the square root of 2.

        Few values, because `--compile` compiles the network for each.
        """
        if self.token_budget_range is None:
            return (1.0,)
        try:
            low, high = map(float, self.token_budget_range.split(","))
        except ValueError:
            low = high = math.nan
        if not TOKEN_BUDGETS[0] <= low < high <= TOKEN_BUDGETS[1]:
            raise UserError(
                f"--token-budget-range must be LEAST,MOST between {TOKEN_BUDGETS[0]:g} and {TOKEN_BUDGETS[1]:g}, e.g. "
                f".25,2, got {self.token_budget_range}"
            )
        if not self.model.startswith("sgformer_") or self.pairs not in (None, "guided"):
            raise UserError("--token-budget-range is for sgformer models with self-guided blocks")
        between = (2 ** (step / 2) for step in range(-8, 9))
        return (low, *(budget for budget in between if low < budget < high), high)

    def _check_fsdp(self) -> None:
        if self.opt.lower() not in (*ELEMENTWISE, AUTO):
            raise UserError(
                f"--strategy fsdp supports --opt {', '.join(ELEMENTWISE)}; {self.opt} needs unsharded tensors "
                "(use --strategy ddp)"
            )
        if self.precision == "fp16":
            raise UserError("--strategy fsdp supports --precision fp32 or bf16, not fp16")
        if self.compile:
            raise UserError("--strategy fsdp does not support --compile; drop one of them")
        if self.device == "mps":
            raise UserError("--strategy fsdp runs on cuda or cpu, not mps")

    # Not jsonargparse.typing: its errors take two lines, and it does not check the options of sgformer.train.
    def _check(self, name: str, holds: Any, rule: str) -> None:
        value = getattr(self, name)
        if value is not None and not self.is_auto(name) and not holds(value):
            raise UserError(f"--{dashed(name)} {rule}, got {value}")

    def _check_minutes(self, *names: str) -> None:
        given = [name for name in names if not self.is_auto(name) and getattr(self, name) is not None]
        if self.minutes is not None and given:
            raise UserError(f"--minutes plans the number of {given[0]}: leave out --{dashed(given[0])}, or --minutes")

    # -- what follows from the data -----------------------------------------------------------------------------------

    def is_auto(self, name: str) -> bool:
        """Whether an option is yet to be derived from the data."""
        return bool(getattr(self, name) == AUTO) and name in self.automatic()

    @classmethod
    def automatic(cls) -> dict[str, Any]:
        """The options that may be `auto`, with their values where there is no data to derive them from."""
        return {f.name: f.metadata["standard"] for f in dataclasses.fields(cls) if f.metadata["auto"]}

    def fill(self, **values: Any) -> Self:
        """The settings with these values where they are still `auto`."""
        return dataclasses.replace(self, **{name: value for name, value in values.items() if self.is_auto(name)})

    def with_weights(self) -> Self:
        """The settings with the name of the weights that `auto` stands for; None for `none`."""
        if self.weights not in (AUTO, "none"):
            return self
        own = f"{self.model}.{TAG}" if self.weights == AUTO and self.model in PRETRAINED else None
        return dataclasses.replace(self, weights=own)

    def resolved(self, data: DataFacts | None = None) -> Self:
        """The settings without any `auto`: as the data suggest or, without data, standard values.

        Raises:
            UserError: a value that was given does not fit those that follow from the data.
        """
        config = self.with_weights()
        if data is not None and any(map(config.is_auto, config.automatic())):
            config = config.choose(data)
        return config.fill(**config.standard())

    def standard(self) -> dict[str, Any]:
        """The values of `automatic` options that nothing else decides."""
        return self.automatic()

    def choose(self, data: DataFacts) -> Self:
        """The settings with what the data suggest for `auto`; a task may leave options to their standard values."""
        return self

    def for_updates(self, updates: int, steps_per_pass: float) -> Self:
        """The settings with a schedule of so many updates."""
        return self.fill(epochs=round(updates / steps_per_pass, 6))

    def per_validation(self, updates: int, steps_per_pass: float) -> int:
        """Updates from one validation to the next in a run of so many updates."""
        return int(steps_per_pass)

    def check_schedule(self, total_steps: int, steps_per_pass: float) -> None:
        """Raise UserError if the warm-up does not end within the run, or the schedule is otherwise cut off."""

    def _check_warmup(self, name: str, total: float, unit: str) -> None:
        value = getattr(self, name) or 0
        if value >= total:
            raise UserError(
                f"--{dashed(name)} {value:g} is not below the {total:g} {unit} of the run: lower it, or leave it out"
            )

    def choose_coarse(self, data: DataFacts) -> Self:
        """The reach of SG-Former's coarse heads: as in the weights; or windows below 224 pixels, where the coarse term
        of a global one would drown the fine one in significance."""
        if not self.model.startswith("sgformer_"):
            return self.fill(coarse="global")
        return self.fill(coarse=data.weights_coarse or ("window" if max(self.image_hw) < 224 else "global"))

    def choose_optimiser(self, muon: float, adam: float, most_adam: float) -> Self:
        """The optimiser and its peak rate: Muon, or AdamW if a rate is given, which refers to AdamW, or for FSDP.

        Args:
            muon, adam: peak rates at a batch of 32 images; they grow with the square root of the batch.
            most_adam: the peak rate of AdamW does not exceed this; that of Muon three times this. Those of others
                follow from AdamW's by `OPTIMISERS`.

        Raises:
            UserError: nothing is known of the rates of an optimiser that was given without one.
        """
        config = self.fill(opt="muon" if self.is_auto("lr") and self.strategy != "fsdp" else "adamw")
        if not config.is_auto("lr"):
            return config
        name = config.opt.lower()
        factor = next((factor for names, factor in OPTIMISERS.items() if name in names.split()), None)
        if factor is None and name != "muon":
            known = ["muon", *(name for names in OPTIMISERS for name in names.split())]
            raise UserError(
                f"--opt {config.opt} has no automatic learning rate: give one with --lr{nearest(name, known)}"
            )
        peak, most = (muon, 3 * most_adam) if factor is None else (adam * factor, most_adam * factor)
        wanted = min(peak * (config.batch_size / 32) ** 0.5, most)
        return config.fill(lr=_short(wanted * config.base_batch / config.batch_size))

    def remote(self) -> dict[str, str]:
        """The options that open a connection; a resumed run needs them again, on its command line."""
        return remote(type(self), self.to_dict())

    @property
    def image_hw(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @property
    def guidance(self) -> dict[str, Any]:
        """The fields of `SGFormerConfig` set by options, besides `coarse`.

        Raises:
            UserError: the values do not fit the network or each other.
        """
        values = {name: getattr(self, name) for name in GUIDANCE if getattr(self, name) is not None}
        regions, scales = values.pop("regions", None), values.pop("scales", None)
        if self.model not in VARIANTS:
            return values
        try:
            if regions or scales:
                stages = with_stages(
                    VARIANTS[self.model],
                    regions=parse_regions(regions) if regions else None,
                    scales=parse_scales(scales) if scales else None,
                ).stages
                values["stages"] = stages
            VARIANTS[self.model].replace(**values)
        except ValueError as error:
            raise UserError(f"--model {self.model}: {error}") from None
        return values

    def scaled(self, rate: float) -> float:
        """Scale a learning rate from `base_batch` images per update to this run's batch size."""
        return rate * self.batch_size / self.base_batch

    def to_dict(self) -> dict[str, Any]:
        """Every setting by name, in types that YAML has."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _short(value: float) -> float:
    """Three significant digits."""
    return float(f"{value:.3g}")


def read_yaml(path: str | os.PathLike[str], config_class: type[RunConfig]) -> dict[str, Any]:
    """Read the keys and values of a recipe or of a run's `config.yaml`; types are not checked.

    Raises:
        UserError: the file is missing or not a YAML mapping, or has an unknown key (named, with the nearest option).
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    values = parse.read_yaml(path)
    if not isinstance(values or {}, Mapping):
        raise UserError(f"{path}: expected lines of `key: value`, got {type(values).__name__}")
    known = [f.name for f in dataclasses.fields(config_class)]
    renamed = {str(key).replace("-", "_"): value for key, value in (values or {}).items()}
    renamed = {config_class.former_names.get(key, key): value for key, value in renamed.items()}
    for key in renamed:
        if key not in known:
            raise UserError(f"{path}: unknown key {key[:80]!r}{nearest(key[:80], known)}")
    for key, value in renamed.items():
        if isinstance(value, str):  # which the command line's parser reads as YAML, where the option is not text
            parse.check_text(value, f"{path}: {key}")
    return renamed


def remote(config_class: type[RunConfig], values: Mapping[str, Any]) -> dict[str, str]:
    """Those values that open a connection when they are used: addresses, shares of Windows, names to download."""
    texts = {name: value for name, value in values.items() if isinstance(value, str)}
    return {
        name: value
        for name, value in texts.items()
        if is_remote(value) or (name in config_class.downloads and _is_downloaded(value))
    }


def _is_downloaded(name: str) -> bool:
    """Whether weights of this name are neither a file nor the package's own."""
    is_file = "=" in name or Path(name).suffix in SUFFIXES or Path(name).exists()
    return not is_file and pretrained_file(name) is None


def refuse_remote(
    source: str | os.PathLike[str],
    config_class: type[RunConfig],
    values: Mapping[str, Any],
    given: Mapping[str, Any],
    downloads: bool = True,
) -> None:
    """Raise UserError if a file makes the program open a connection: whoever wrote it may have chosen where to.

    Args:
        source: the file.
        config_class: of the values.
        values: of the file.
        given: the options of the command line, which overrule the file's.
        downloads: False: names of published networks are allowed.
    """
    standard = {f.name: f.default for f in dataclasses.fields(config_class)}
    for name, value in remote(config_class, values).items():
        if given.get(name) in (None, standard.get(name)) and (downloads or is_remote(value)):
            raise UserError(
                f"{source}: {dashed(name)} is elsewhere, {value}: connections are opened to what the command line "
                f"names; add --{dashed(name)} {value}"
            )


def to_yaml(values: Mapping[str, Any]) -> str:
    """YAML text in field order; addresses lose their passwords."""
    import yaml

    shown = {name: without_login(value) if isinstance(value, str) else value for name, value in values.items()}
    return yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)


Config = TypeVar("Config", bound=RunConfig)


def make_config(config_class: type[Config], options: Mapping[str, Any]) -> Config:
    """Build a config from keyword options.

    Raises:
        UserError: an option is unknown (named, with the nearest one) or has a value of the wrong type.
    """
    known = [f.name for f in dataclasses.fields(config_class)]
    for name in options:
        if name not in known:
            raise UserError(f"unknown option {name!r}{nearest(name, known)}")
    try:
        return config_class(**options)
    except (TypeError, AttributeError) as error:  # values that did not pass through a parser
        raise UserError(f"an option has a value of the wrong type ({error})") from None
