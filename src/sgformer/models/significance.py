"""The guidance of self-guided blocks: sources of significance, and aggregation of sorted tokens.

The paper sorts by the attention received from coarse and fine heads, and aggregates with a learned linear map. The
alternatives here are selected by name and serve ablations. A new source is a function or a module:

    @sgformer.register_significance("centre")
    def centre(x, coarse, fine):                    # (B, H, W, C), (B, H, W), (B, H, W)
        rows, columns = (torch.linspace(-1, 1, n, device=x.device) for n in x.shape[1:3])
        return -(rows[:, None] ** 2 + columns**2).expand(len(x), -1, -1)

    model = sgformer.create_model("sgformer_n", significance="centre")

Legend: B batch, H x W token grid (or length N, for sequences), C channels, M pooled tokens.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor, fx

from sgformer import ops
from sgformer.models.config import AGGREGATION, SIGNIFICANCE, TOKEN_BUDGETS, Region
from sgformer.models.layers import WeightedSum
from sgformer.ops import MergedTokens, TokenGroups

# -- significance -----------------------------------------------------------------------------------------------------

Source = Callable[[Tensor, Tensor, Tensor], Tensor]
SOURCES: dict[str, Any] = {}


def register_significance(name: str) -> Callable[[Any], Any]:
    """Decorator: register a source of significance for ``SGFormerConfig(significance=name)``.

    The source is a function ``(x, coarse, fine) -> significance``, or an ``nn.Module`` class constructed with the
    stage's channels whose forward has that signature. x (B, H, W, C) is the self-guided block's input; coarse and fine
    (B, H, W) float32 are the attention received in the previous hybrid-scale block. The result is (B, H, W) float32:
    higher is more significant, and only the order matters. A module's result also gates the tokens (:func:`gate`),
    through which its parameters are trained.

    Weights store the name, so the source must be registered before they are loaded.

    Raises:
        ValueError: the name is taken by another source.
    """

    def add(source: Any) -> Any:
        if name in SIGNIFICANCE and SOURCES.get(name, source) is not source:
            raise ValueError(f"a significance named {name!r} is already registered")
        SOURCES[name] = source
        SIGNIFICANCE.setdefault(name, (source.__doc__ or "registered by the user").strip().splitlines()[0])
        return source

    return add


def make_source(name: str, dim: int) -> Source:
    """The source's function, or a new module for tokens of ``dim`` channels."""
    source = SOURCES[name]
    return source(dim) if isinstance(source, type) and issubclass(source, nn.Module) else source


@register_significance("hybrid")
def hybrid(x: Tensor, coarse: Tensor, fine: Tensor) -> Tensor:
    return coarse + fine


@register_significance("coarse")
def coarse_only(x: Tensor, coarse: Tensor, fine: Tensor) -> Tensor:
    return coarse


@register_significance("fine")
def fine_only(x: Tensor, coarse: Tensor, fine: Tensor) -> Tensor:
    return fine


@register_significance("inverted")
def inverted(x: Tensor, coarse: Tensor, fine: Tensor) -> Tensor:
    return -(coarse + fine)


@register_significance("uniform")
def uniform(x: Tensor, coarse: Tensor, fine: Tensor) -> Tensor:
    return x.new_zeros(x.shape[:-1], dtype=_precise(x))


@register_significance("random")
def random(x: Tensor, coarse: Tensor, fine: Tensor) -> Tensor:
    return _random_ranks(x)


@fx.wrap
def _random_ranks(x: Tensor) -> Tensor:
    grid = tuple(x.shape[1:-1])
    order = torch.tensor(_random_order(int(math.prod(grid))), dtype=_precise(x), device=x.device)
    return order.view(1, *grid).expand(x.shape[:-1])


@register_significance("feature-norm")
def feature_norm(x: Tensor, coarse: Tensor, fine: Tensor) -> Tensor:
    return x.detach().to(_precise(x)).norm(dim=-1)


@register_significance("learned")
class LearnedSignificance(nn.Module):
    """A norm and a linear map to one score per token, trained through the gate."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.score = nn.Linear(dim, 1, bias=False)  # a bias would not change the order

    def forward(self, x: Tensor, coarse: Tensor, fine: Tensor) -> Tensor:
        return self.score(self.norm(x))[..., 0].to(_precise(x))


def gate(x: Tensor, significance: Tensor) -> Tensor:
    """Scale tokens by 2 sigmoid(significance), which is 1 at initialisation and gives the source a gradient.

    Sorting has no gradient. As in top-k pooling (Gao and Ji, "Graph U-Nets", ICML 2019), the score therefore also
    scales the sorted tokens: if a token is useful as key and value, its score rises and it moves towards the salient
    end.
    """
    return x * (2 * significance.sigmoid()).to(x.dtype)[..., None]


@fx.wrap
def _precise(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@functools.lru_cache(maxsize=64)
def _random_order(tokens: int) -> list[int]:
    # A fixed seed gives the same order on every device and in every run. NumPy, because a tracer would record torch's
    # sampling without its seed, and a cached value must not be a tensor of some tracing mode.
    return np.random.RandomState(0).permutation(tokens).tolist()  # type: ignore[no-any-return]


# -- aggregation ------------------------------------------------------------------------------------------------------

# What depends on the number of tokens is a step of its own to symbolic tracing, which does not know the number.


@fx.wrap
def group(significance: Tensor, ends: list[tuple[int, int]], rates: list[int]) -> list[Tensor]:
    """(B, N) -> one (B, G_i, r_i) int64 tensor per region: the tokens of each group."""
    return ops.group_at(ops.sort_tokens(significance), ends, rates)


@fx.wrap
def gather(x: Tensor, groups: list[Tensor]) -> list[Tensor]:
    """See :func:`sgformer.ops.gather_groups`."""
    return ops.gather_groups(x, groups)


class Budgeted:
    """Regions whose rates follow a token budget.

    Attributes:
        shares: fraction of the tokens in each region, least significant first.
        ends: the cumulative shares in whole numbers (:func:`sgformer.ops.regroup.cumulative`), which a compiler takes
            as they are; real numbers become symbols to it.
        rates: tokens per key/value token of each region, at the present budget.
        token_budget: 1 as built and trained; .5 makes half as many key/value tokens, 2 twice as many.
    """

    def divide(self, regions: Sequence[Region]) -> None:
        self.shares, self._rates = [r.share for r in regions], [r.rate for r in regions]
        self.ends = ops.cumulative(self.shares)
        self.set_token_budget(1.0)

    def set_token_budget(self, budget: float) -> None:
        """Divide every rate by ``budget`` and round, half up, to at least 1: there are never more than all tokens."""
        self.token_budget = budget
        self.rates = [max(1, int(rate / budget + 0.5)) for rate in self._rates]


def set_token_budget(network: nn.Module, budget: float) -> None:
    """Make fewer or more key/value tokens in every self-guided block of a network, in place and without training.

    Half the budget pools twice as many tokens into one key/value token, in every region; whole numbers being what is
    pooled, budgets between powers of two are met approximately. Regions keep their shares, so that the tokens stay
    dense where significance is high, and their learned weights are spread over the new number of tokens. A budget of 1
    is the network as trained, to the bit. ``inspect(x).tokens`` counts what became of it.

    Args:
        network: an :class:`~sgformer.models.backbone.SGFormer` or any module that contains one, plain or prepared by
            :func:`sgformer.optimize` or :func:`sgformer.accelerate`. ``torch.compile`` compiles anew for each budget.
            Exported files keep theirs.
        budget: .25 to 4.

    Raises:
        ValueError: the budget is out of range, or no block of the network makes tokens.
    """
    least, most = TOKEN_BUDGETS
    if not least <= budget <= most:
        raise ValueError(f"a token budget must be between {least:g} and {most:g} (got {budget})")
    makers = [module for module in network.modules() if isinstance(module, Budgeted)]
    if not makers:
        raise ValueError("this network makes no key/value tokens that a budget could set: it is not an SG-Former")
    for maker in makers:
        maker.set_token_budget(float(budget))


def token_budget(network: nn.Module) -> float:
    """The budget set last; 1 for a network without tokens."""
    return next((module.token_budget for module in network.modules() if isinstance(module, Budgeted)), 1.0)


class Aggregation(Budgeted, nn.Module):
    """Pools sorted tokens: ``forward`` maps (B, N, C) and significance (B, N) to (B, M, C) and the grouping;
    ``describe`` converts the grouping for :class:`~sgformer.models.backbone.Inspection`."""

    def __init__(self, regions: Sequence[Region]):
        super().__init__()
        self.divide(regions)

    def forward(self, x: Tensor, significance: Tensor) -> tuple[Tensor, list[Tensor]]:
        raise NotImplementedError

    def describe(self, grouped: list[Tensor], grid: tuple[int, ...]) -> TokenGroups | MergedTokens:
        raise NotImplementedError


class LinearAggregation(Budgeted, nn.ModuleList):
    """y = sum over k of w_i[k] x[k] + b_i (section 3.3), with one learned sum per region.

    At another token budget the learned weights are spread over the rate that it gives
    (:func:`sgformer.ops.regroup.resample_weights`).
    """

    def __init__(self, regions: Sequence[Region]):
        super().__init__(WeightedSum(region.rate) for region in regions)
        self.divide(regions)

    def weights(self) -> list[Tensor]:
        """(1, r_i) of each region, at the present budget; the parameters themselves at a budget of 1."""
        return [region.spread(rate) for region, rate in zip(self, self.rates, strict=True)]

    def forward(self, x: Tensor, significance: Tensor) -> tuple[Tensor, list[Tensor]]:
        groups = group(significance, self.ends, self.rates)
        return self.pool(x, groups), groups

    def pool(self, x: Tensor, groups: list[Tensor]) -> Tensor:
        """(B, N, C) and the groups of each region -> (B, M, C)."""
        members = gather(x, groups)
        return torch.cat([region(members[i], self.rates[i]) for i, region in enumerate(self)], dim=1)

    def describe(self, grouped: list[Tensor], grid: tuple[int, ...]) -> TokenGroups:
        return TokenGroups(grid, grouped, [w.detach()[0] for w in self.weights()], [m.bias.detach()[0] for m in self])


class MeanAggregation(Aggregation):
    """The mean of each group."""

    def forward(self, x: Tensor, significance: Tensor) -> tuple[Tensor, list[Tensor]]:
        groups = group(significance, self.ends, self.rates)
        return self.pool(x, groups), groups

    def pool(self, x: Tensor, groups: list[Tensor]) -> Tensor:
        """(B, N, C) and the groups of each region -> (B, M, C)."""
        return _aggregate(x, groups, *self._weights(x))

    def describe(self, grouped: list[Tensor], grid: tuple[int, ...]) -> TokenGroups:
        return TokenGroups(grid, grouped, *self._weights(grouped[0].new_zeros((), dtype=torch.float32)))

    def _weights(self, like: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        return [like.new_full((r,), 1 / r) for r in self.rates], [like.new_zeros(()) for _ in self.rates]


class WeightedAggregation(Aggregation):
    """The mean of each group, weighted by the softmax of significance standardised over the image's tokens."""

    def pool(self, x: Tensor, groups: list[Tensor], scaled: Tensor) -> Tensor:
        """(B, N, C), the groups of each region, and standardised significance (B, N) -> (B, M, C)."""
        return _weighted_mean(x, scaled, groups)

    def forward(self, x: Tensor, significance: Tensor) -> tuple[Tensor, list[Tensor]]:
        groups = group(significance, self.ends, self.rates)
        return self.pool(x, groups, standardise(significance)), groups

    def describe(self, grouped: list[Tensor], grid: tuple[int, ...]) -> TokenGroups:
        # The weights differ by group; drawing needs only the grouping.
        return TokenGroups(grid, grouped, [], [])


def standardise(significance: Tensor, valid: Tensor | None = None) -> Tensor:
    """(B, N) with mean 0 and standard deviation 1, over the tokens that are ``valid``, (B, N) bool."""
    if valid is None:
        centred = significance - significance.mean(1, keepdim=True)
        return centred * (centred.square().mean(1, keepdim=True) + 1e-12).rsqrt()
    count = valid.sum(1, keepdim=True)
    mean = significance.where(valid, 0).sum(1, keepdim=True) / count
    centred = (significance - mean).where(valid, 0)
    return centred * (centred.square().sum(1, keepdim=True) / count + 1e-12).rsqrt()


@fx.wrap
def _weighted_mean(x: Tensor, scaled: Tensor, groups: list[Tensor]) -> Tensor:
    pooled = []
    for index in groups:
        flat = index.flatten(1)
        weights = scaled.gather(1, flat).view(index.shape).softmax(-1).to(x.dtype)  # (B, G, r)
        members = x.gather(1, flat[..., None].expand(-1, -1, x.shape[2])).view(*index.shape, x.shape[2])
        pooled.append((weights[..., None, :] @ members).squeeze(2))
    return torch.cat(pooled, 1)


@fx.wrap
def _aggregate(x: Tensor, groups: list[Tensor], weights: list[Tensor], bias: list[Tensor]) -> Tensor:
    return ops.aggregate(x, groups, weights, bias)


@fx.wrap
def _merge(
    x: Tensor, significance: Tensor, ends: list[tuple[int, int]], rates: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    return ops.merge_similar(x, ops.sort_tokens(significance), ends, rates)


class MergeAggregation(Aggregation):
    """The mean of similar tokens; see :func:`sgformer.ops.merge_similar`."""

    def forward(self, x: Tensor, significance: Tensor) -> tuple[Tensor, list[Tensor]]:
        pooled, token, region = _merge(x, significance, self.ends, self.rates)
        return pooled, [token, region]

    def describe(self, grouped: list[Tensor], grid: tuple[int, ...]) -> MergedTokens:
        token, region = grouped
        lengths = ops.lengths_at(token.shape[1], self.ends)
        return MergedTokens(grid, token, region, sum(-(-n // r) for n, r in zip(lengths, self.rates, strict=True)))


AGGREGATIONS: dict[str, type[nn.Module]] = {
    "linear": LinearAggregation,
    "mean": MeanAggregation,
    "weighted": WeightedAggregation,
    "merge": MergeAggregation,
}
assert set(AGGREGATIONS) == set(AGGREGATION)
