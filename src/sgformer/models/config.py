"""Network configurations as data.

A size of SG-Former is a :class:`SGFormerConfig`: four stages and a few numbers. Nothing here imports torch, so a config
can be read, printed, compared and stored anywhere. To define a new size, write a config and pass it to
``sgformer.create_model(config)``.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

# Beyond what a network of this kind can use. A config may come with weights of strangers, and sizes that no tensor in
# their file bears out cost memory as soon as the network sees an image.
MAX_DIM = 2**14
MAX_DEPTH = 512  # of a stage
MAX_PARTS = 16  # stages, regions, scales
MAX_REACH = 512  # tokens along the side of what one window or one reduced token covers
MAX_RATE = 2**14
MAX_CLASSES = 2**20
MAX_IMAGE = 2**14  # pixels along a side


class Region(NamedTuple):
    """A contiguous part of the tokens sorted by significance, and its pooling rate.

    Attributes:
        share: fraction of all tokens that fall in the region, in (0, 1].
        rate: number of neighbours in sorted order that form one key/value token, at least 1.
    """

    share: float
    rate: int


@dataclass(frozen=True)
class StageConfig:
    """One level of the pyramid.

    Attributes:
        dim: channels C; a multiple of ``heads``.
        heads: attention heads; even in hybrid/guided stages, where half are coarse and half fine.
        depth: number of blocks; even in hybrid/guided stages, where blocks come in pairs.
        reduction: r, the coarse heads' reduction: one reduced token covers r x r tokens. None: a stage of global
            attention blocks.
        regions: least significant first; the shares sum to 1. Empty if reduction is None.
        scales: one per head group, e.g. (8, 4, 1): the heads are split evenly, and group j attends to a grid reduced
            s_j times (1: windows of the grid itself). Empty: the published two groups, (reduction, 1).
    """

    dim: int
    heads: int
    depth: int
    reduction: int | None = None
    regions: tuple[Region, ...] = ()
    scales: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _few("regions", self.regions)
        _few("scales", self.scales)
        regions = (Region(*r) for r in self.regions)
        _set(
            self, "regions", tuple(Region(_number("share", r.share), _whole("rate", r.rate, MAX_RATE)) for r in regions)
        )
        _set(self, "scales", tuple(_whole("scales", s, MAX_REACH) for s in self.scales))
        for name, most in (("dim", MAX_DIM), ("heads", MAX_DIM), ("depth", MAX_DEPTH)):
            _set(self, name, _whole(name, getattr(self, name), most))
        if self.reduction is not None:
            _set(self, "reduction", _whole("reduction", self.reduction, MAX_REACH))
        _require(self.dim > 0 and self.heads > 0 and self.depth > 0, "dim, heads and depth must be positive", self)
        _require(self.dim % self.heads == 0, "dim must be a multiple of heads", self)
        if self.reduction is None:
            _require(not self.regions and not self.scales, "a stage with reduction=None has no regions or scales", self)
            return
        _require(self.reduction >= 1, "reduction must be at least 1", self)
        _require(bool(self.scales) or self.heads % 2 == 0, "heads must be even: half are coarse, half fine", self)
        _require(all(s >= 1 for s in self.scales), "scales must be at least 1", self)
        _require(self.heads % max(1, len(self.scales)) == 0, "heads must divide into the groups of scales", self)
        _require(self.depth % 2 == 0, "depth must be even: blocks come in hybrid/guided pairs", self)
        _require(bool(self.regions), "a hybrid/guided stage needs regions", self)
        _require(all(r.share > 0 and r.rate >= 1 for r in self.regions), "shares and rates must be positive", self)
        _require(abs(sum(r.share for r in self.regions) - 1) < 1e-6, "the regions' shares must sum to 1", self)


@dataclass(frozen=True)
class SGFormerConfig:
    """The configuration of a network.

    Attributes:
        stages: the pyramid, stride 4, 8, 16, 32.
        in_chans: image channels.
        num_classes: classifier outputs; 0 leaves the classifier out.
        img_size: (H, W) in pixels of the position table's grid. Other image sizes resize the table.
        window: side of the fine heads' windows in tokens (and of the coarse windows in reduced tokens).
        coarse: "global": every query sees every reduced token (the published code); "window": windows of
            ``window`` x ``window`` reduced tokens, so that cost stays linear in pixels and the coarse term of
            significance keeps its mean of 1 / 49 at every size (the paper's text). They agree at 224 pixels.
        significance: the values by which self-guided blocks sort tokens: "hybrid" (the paper), another name of
            :data:`SIGNIFICANCE`, or one added with ``sgformer.register_significance``.
        aggregation: how a group of sorted tokens is pooled to one key/value token: a name of :data:`AGGREGATION`.
        attention: attention of self-guided blocks over the pooled tokens: "softmax" (the paper) or "linear".
        pairs: the block after a hybrid-scale block: "guided", a self-guided one (the paper); "hybrid", another
            hybrid-scale one, for the same depth without reallocation; "single", none.
        mlp_ratio: hidden width of the MLP as a multiple of C.
        drop_rate: dropout before the classifier, probability.
        drop_path_rate: stochastic depth of the last block, probability; grows linearly from 0 at the first.
    """

    stages: tuple[StageConfig, ...]
    in_chans: int = 3
    num_classes: int = 1000
    img_size: tuple[int, int] = (224, 224)
    window: int = 7
    coarse: str = "global"
    significance: str = "hybrid"
    aggregation: str = "linear"
    attention: str = "softmax"
    pairs: str = "guided"
    mlp_ratio: float = 4.0
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        _few("stages", self.stages)
        stages = (s if isinstance(s, StageConfig) else StageConfig(**s) for s in self.stages)
        _set(self, "stages", tuple(stages))
        sides = (self.img_size, self.img_size) if isinstance(self.img_size, int) else tuple(self.img_size)
        size = tuple(_whole("img_size", side, MAX_IMAGE) for side in sides)
        _set(self, "img_size", size)
        for name, most in (("in_chans", MAX_DIM), ("num_classes", MAX_CLASSES), ("window", MAX_REACH)):
            _set(self, name, _whole(name, getattr(self, name), most))
        for name in ("mlp_ratio", "drop_rate", "drop_path_rate"):
            _set(self, name, _number(name, getattr(self, name)))
        _require(len(self.stages) > 0, "stages must not be empty", self.stages)
        _require(len(size) == 2 and min(size) >= 32, "img_size must be (H, W), both at least 32", size)
        _require(self.in_chans >= 1, "in_chans must be at least 1", self.in_chans)
        _require(self.num_classes >= 0, "num_classes must be 0 or more", self.num_classes)
        _require(self.window >= 1, "window must be at least 1", self.window)
        for name, known in CHOICES.items():
            value = getattr(self, name)
            _require(isinstance(value, str) and value in known, f"{name} must be one of {', '.join(known)}", value)
        if self.coarse == "window":
            reach = self.window * max(max(s.reduction or 1, *s.scales, 1) for s in self.stages)
            _require(reach <= MAX_REACH, f"window x reduction must be at most {MAX_REACH} tokens", reach)
        _require(all(1 <= s.dim * self.mlp_ratio <= 2**18 for s in self.stages), "mlp_ratio is too small or large",
                 self.mlp_ratio)  # fmt: skip
        if self.pairs != "guided":
            for name, default in (("significance", "hybrid"), ("aggregation", "linear"), ("attention", "softmax")):
                value = getattr(self, name)
                _require(value == default, f"{name} is for self-guided blocks, and pairs={self.pairs} has none", value)
        _require(self.stages[0].dim % 4 == 0, "the first stage's dim must be a multiple of 4", self.stages[0].dim)
        for name in ("drop_rate", "drop_path_rate"):
            _require(0 <= getattr(self, name) < 1, f"{name} must be in [0, 1)", getattr(self, name))

    def replace(self, **changes: Any) -> SGFormerConfig:
        """A copy with some fields changed; an unknown name raises ValueError."""
        _known(changes, SGFormerConfig)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable lists, dicts and numbers. ``from_dict`` is the inverse."""
        return {
            **dataclasses.asdict(self),
            "img_size": list(self.img_size),
            "stages": [
                {**dataclasses.asdict(s), "regions": [list(r) for r in s.regions], "scales": list(s.scales)}
                for s in self.stages
            ],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SGFormerConfig:
        """Build from ``to_dict``'s output; unknown keys raise a ValueError that names them."""
        _known(values, cls)
        _few("stages", values.get("stages", ()))
        for stage in values.get("stages", ()):
            _known(stage, StageConfig)
        return cls(**values)


COARSE = ("global", "window")

#: Significance sources and their descriptions. ``sgformer.register_significance`` adds to them.
SIGNIFICANCE: dict[str, str] = {
    "hybrid": "the attention received from coarse and fine heads (the paper)",
    "coarse": "the attention received from coarse heads alone",
    "fine": "the attention received from fine heads alone",
    "uniform": "nothing: all tokens are equal and stay in raster order",
    "random": "one random order, the same for every image and block of a grid",
    "inverted": "the negative of hybrid: most tokens where attention is lowest",
    "feature-norm": "the norm of the token's features",
    "learned": "a small head, trained with the task",
}
AGGREGATION: dict[str, str] = {
    "linear": "a learned weight for every position of a group, and a bias (the paper)",
    "mean": "their mean",
    "weighted": "their mean, weighted by the softmax of significance",
    "merge": "grouped by similarity instead of rank: tokens join the most similar of a region's seeds (after ToMe)",
}
CHOICES: dict[str, Any] = {
    "coarse": COARSE,
    "significance": SIGNIFICANCE,
    "aggregation": AGGREGATION,
    "attention": ("softmax", "linear"),
    "pairs": ("guided", "hybrid", "single"),
}


def parse_regions(text: str) -> tuple[tuple[Region, ...], ...]:
    """Parse the guided stages' regions, least significant first: ``.25:196,.5:56,.25:28/.25:49,.5:14,.25:7/1:1``.

    Raises:
        ValueError: not of this form; the message has the text.
    """
    try:
        stages = [[part.split(":") for part in stage.split(",")] for stage in text.split("/")]
        return tuple(tuple(Region(float(share), int(rate)) for share, rate in stage) for stage in stages)
    except (ValueError, TypeError):
        raise ValueError(
            f"regions must be SHARE:RATE,SHARE:RATE for each guided stage, separated by / (got {text!r})"
        ) from None


def parse_scales(text: str) -> tuple[tuple[int, ...], ...]:
    """Parse the scales of the guided stages' head groups: ``8,1/4,2,1/2,1``.

    Raises:
        ValueError: not of this form; the message has the text.
    """
    try:
        return tuple(tuple(int(scale) for scale in stage.split(",")) for stage in text.split("/"))
    except ValueError:
        raise ValueError(f"scales must be NUMBER,NUMBER for each guided stage, separated by / (got {text!r})") from None


def with_stages(config: SGFormerConfig, **values: tuple[Any, ...] | None) -> SGFormerConfig:
    """A copy with other ``regions`` or ``scales`` in its guided stages: one value per guided stage.

    Raises:
        ValueError: the number of values differs from the number of guided stages, or a value is invalid.
    """
    guided = [i for i, stage in enumerate(config.stages) if stage.reduction is not None]
    stages = list(config.stages)
    for name, each in values.items():
        if each is None:
            continue
        _require(len(each) == len(guided), f"{name}: one entry for each of the {len(guided)} guided stages", each)
        for i, value in zip(guided, each, strict=True):
            stages[i] = dataclasses.replace(stages[i], **{name: value})
    return config.replace(stages=tuple(stages))


def _require(condition: bool, message: str, value: Any) -> None:
    if not condition:
        raise ValueError(f"{message} (got {value!s:.200})")


def _set(config: Any, name: str, value: Any) -> None:
    object.__setattr__(config, name, value)


def _few(name: str, values: Any) -> None:
    """Raise ValueError unless the values are a list or tuple of at most `MAX_PARTS`."""
    _require(isinstance(values, list | tuple), f"{name} must be a list", values)
    _require(len(values) <= MAX_PARTS, f"{name} must be at most {MAX_PARTS}", f"{len(values)} of them")


def _whole(name: str, value: Any, most: int) -> int:
    """The value as an int; NumPy's are numbers, too."""
    try:
        whole = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number (got {value!r:.200})") from None
    _require(whole <= most, f"{name} must be at most {most}", whole if abs(whole) < 10**18 else "more than 10^18")
    return whole


def _number(name: str, value: Any) -> float:
    """The value as a finite float."""
    try:
        number = float(value) if not isinstance(value, str | bytes) else math.nan
    except (TypeError, OverflowError):
        number = math.nan
    _require(math.isfinite(number), f"{name} must be a finite number", value)
    return number


def _known(values: Mapping[str, Any], cls: type) -> None:
    _require(isinstance(values, Mapping), f"{cls.__name__} must be a mapping", type(values).__name__)
    known = {f.name for f in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"unknown {cls.__name__} field: {', '.join(unknown)} (known: {', '.join(sorted(known))})")


# The published constants: the same for every size, in stages 1, 2 and 3.
REDUCTIONS = (8, 4, 2)
REGIONS = (
    (Region(1 / 4, 196), Region(1 / 2, 56), Region(1 / 4, 28)),
    (Region(1 / 4, 49), Region(1 / 2, 14), Region(1 / 4, 7)),
    (Region(1 / 2, 2), Region(1 / 2, 1)),
)


#: Smallest and largest token budget, a factor of the key/value tokens that a network is built with.
TOKEN_BUDGETS = (0.25, 4.0)

# SG-Former-N's own: more key/value tokens, as its maps are small (docs/models.md).
NANO_REDUCTIONS = (4, 2, 2)
NANO_REGIONS = (
    (Region(1 / 4, 32), Region(1 / 2, 16), Region(1 / 4, 8)),
    (Region(1 / 4, 16), Region(1 / 2, 8), Region(1 / 4, 4)),
    (Region(1 / 2, 2), Region(1 / 2, 1)),
)


def pyramid(
    dims: tuple[int, ...],
    heads: tuple[int, ...],
    depths: tuple[int, ...],
    reductions: tuple[int, ...] = REDUCTIONS,
    regions: tuple[tuple[Region, ...], ...] = REGIONS,
    **options: Any,
) -> SGFormerConfig:
    """A four-stage SG-Former with the published reductions and regions; ``options`` are SGFormerConfig's fields."""
    guided = zip(dims[:3], heads[:3], depths[:3], reductions, regions, strict=True)
    return SGFormerConfig((*(StageConfig(*s) for s in guided), StageConfig(dims[3], heads[3], depths[3])), **options)


# S, M and B are the paper's. T and N are ours, for small machines.
VARIANTS: dict[str, SGFormerConfig] = {
    "sgformer_n": pyramid(
        (32, 64, 128, 256),
        (2, 2, 4, 8),
        (2, 2, 4, 1),
        NANO_REDUCTIONS,
        NANO_REGIONS,
        mlp_ratio=2.0,
        drop_path_rate=0.05,
    ),
    "sgformer_t": pyramid((32, 64, 192, 384), (2, 2, 6, 12), (2, 2, 10, 1), drop_path_rate=0.1),
    "sgformer_s": pyramid((64, 128, 256, 512), (2, 4, 8, 16), (2, 4, 16, 1), drop_path_rate=0.1),
    "sgformer_m": pyramid((64, 128, 256, 512), (2, 4, 8, 16), (2, 6, 28, 2), drop_path_rate=0.2),
    "sgformer_b": pyramid((96, 192, 384, 768), (4, 6, 12, 24), (4, 6, 24, 2), drop_path_rate=0.4),
}
