"""Token reallocation: sort tokens by significance, cut them into regions, condense each region at its own rate.

Legend: B batch, N tokens, C channels; region i holds L_i sorted tokens and makes G_i groups of r_i.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from sgformer.ops.kernels import serving
from sgformer.ops.sizes import fixed, known


def sort_tokens(significance: Tensor) -> Tensor:
    """Token indices by ascending significance; equal ones in raster order, so that constant images are well-defined.

    Args:
        significance: (B, N).

    Returns:
        (B, N) int64.
    """
    if torch.onnx.is_in_onnx_export():  # ONNX has no stable sort, but its TopK puts the lower index first among ties
        return significance.topk(significance.shape[1], dim=1, largest=False).indices
    return significance.argsort(dim=1, stable=True)


def cumulative(shares: Sequence[float]) -> list[tuple[int, int]]:
    """The end of each region as a fraction of all tokens, in whole numbers: (numerator, denominator).

    So regions end at the same token on every machine, for every compiler and in every exported graph, which round real
    numbers differently or not at all.
    """
    ends = (Fraction(end).limit_denominator(1 << 20) for end in accumulate(shares))
    return [(end.numerator, end.denominator) for end in ends]


def region_lengths(tokens: int, shares: Sequence[float]) -> list[int]:
    """The number of sorted tokens in each region.

    The cumulative shares are rounded, half up; no region is left empty unless there are fewer tokens than regions.
    """
    return lengths_at(tokens, cumulative(shares))


def lengths_at(tokens: int, ends: Sequence[tuple[int, int]]) -> list[int]:
    """:func:`region_lengths` for the ends of :func:`cumulative`. A symbol is taken to be large enough for all."""
    if not fixed(tokens):
        places = [share_of(tokens, end) for end in ends[:-1]]
        return [end - start for start, end in pairwise([0, *places, tokens])]
    tokens, places = int(tokens), [0]
    for i, end in enumerate(ends, start=1):
        places.append(max(places[-1], min(max(share_of(tokens, end), i), tokens - (len(ends) - i))))
    return [end - start for start, end in pairwise(places)]


def share_of(tokens: Any, end: tuple[int, int]) -> Any:
    """A fraction of a number of tokens, be it a symbol or a tensor, rounded half up."""
    above, below = end
    return (2 * above * tokens + below) // (2 * below)


def group_positions(length: int, rate: int, device: torch.device) -> Tensor:
    """The sorted positions of each group of a region: (G, rate) int64 with G = ceil(length / rate).

    The identity if ``rate`` divides ``length``. Otherwise G * rate positions are sampled evenly: a few tokens count
    twice, none is dropped, and none is padding.
    """
    groups = (length + rate - 1) // rate
    samples = groups * rate
    positions = torch.arange(samples, device=device)
    if not known(samples == length):
        positions = torch.div((2 * positions + 1) * length, 2 * samples, rounding_mode="floor")
    return positions.view(groups, rate)


@dataclass(frozen=True)
class TokenGroups:
    """The origin of every key/value token of a self-guided block.

    Attributes:
        grid: (H, W) of the token grid, where a token's index is row * W + column; or (N,) of a sequence.
        indices: one (B, G_i, r_i) int64 tensor per region, least significant region first: the tokens of each group.
        weights: one (r_i,) tensor per region: the weight of each position in a group.
        bias: one 0-d tensor per region, added to each of its groups.
    """

    grid: tuple[int, ...]
    indices: list[Tensor]
    weights: list[Tensor]
    bias: list[Tensor]

    def __len__(self) -> int:
        """Number of key/value tokens of an image."""
        return sum(i.shape[1] for i in self.indices)

    def region_map(self) -> Tensor:
        """(B, H, W) int64: the region of each token, 0 the least significant."""
        return self._paint([torch.full_like(i, n) for n, i in enumerate(self.indices)])

    def token_map(self) -> Tensor:
        """(B, H, W) int64: the key/value token that each token was merged into (the last of two)."""
        starts = accumulate((i.shape[1] for i in self.indices), initial=0)
        labels = zip(starts, self.indices, strict=False)
        return self._paint([(s + torch.arange(i.shape[1], device=i.device))[:, None].expand_as(i) for s, i in labels])

    def _paint(self, labels: list[Tensor]) -> Tensor:
        B = self.indices[0].shape[0]
        canvas = torch.full((B, math.prod(self.grid)), -1, device=self.indices[0].device)
        for index, label in zip(self.indices, labels, strict=True):
            canvas.scatter_(1, index.flatten(1), label.flatten(1))
        return canvas.view(B, *self.grid)


def group_tokens(order: Tensor, shares: Sequence[float], rates: Sequence[int]) -> list[Tensor]:
    """Cut sorted tokens into regions and groups.

    Args:
        order: (B, N) int64 from :func:`sort_tokens`.
        shares: fraction of the tokens in each region, least significant first.
        rates: r_i of each region.

    Returns:
        One (B, G_i, r_i) int64 tensor per region: token indices.
    """
    return group_at(order, cumulative(shares), rates)


def group_at(order: Tensor, ends: Sequence[tuple[int, int]], rates: Sequence[int]) -> list[Tensor]:
    """:func:`group_tokens` for the ends of :func:`cumulative`."""
    lengths = lengths_at(order.shape[1], ends)
    regions = order.split(lengths, dim=1)
    return [
        region.unflatten(1, (length // rate, rate))
        if known(length % rate == 0)
        else region[:, group_positions(length, rate, order.device)]
        for region, length, rate in zip(regions, lengths, rates, strict=True)
    ]


def group_sequences(
    order: Tensor, lengths: Tensor, ends: Sequence[tuple[int, int]], rates: Sequence[int]
) -> tuple[list[Tensor], list[Tensor]]:
    """As :func:`group_tokens` for sequences of unequal lengths: each is divided as it would be alone.

    Args:
        order: (B, N) int64, the tokens of each sequence from the least significant on, its padding last.
        lengths: (B,) int64, the number of tokens of each sequence, at least 1.
        ends, rates: of each region, the ends from :func:`cumulative`.

    Returns:
        One (B, G_i, r_i) int64 tensor per region, G_i being that of the longest: token indices; and one (B, G_i) bool
        tensor per region, False where a sequence has no such group, and the indices mean nothing.
    """
    groups, valid = [], []
    places = _region_ends(lengths, ends)
    for start, end, rate in zip(places, places[1:], rates, strict=False):
        length = (end - start)[:, None, None]  # (B, 1, 1)
        counts = (length + rate - 1) // rate
        most = int(counts.max())
        positions = torch.arange(most * rate, device=order.device).view(1, most, rate)
        positions = torch.div((2 * positions + 1) * length, (2 * counts * rate).clamp(min=1), rounding_mode="floor")
        positions = (start[:, None, None] + positions).clamp(max=order.shape[1] - 1)
        groups.append(order.gather(1, positions.flatten(1)).view(positions.shape))
        valid.append(torch.arange(most, device=order.device) < counts[:, 0])
    return groups, valid


def _region_ends(lengths: Tensor, ends: Sequence[tuple[int, int]]) -> list[Tensor]:
    """0 and the cumulative :func:`lengths_at` of every sequence, each (B,)."""
    places = [torch.zeros_like(lengths)]
    for i, end in enumerate(ends, start=1):
        place = share_of(lengths, end).clamp(min=i)
        places.append(torch.maximum(places[-1], torch.minimum(place, lengths - (len(ends) - i))))
    return [*places[:-1], lengths]


def aggregate(x: Tensor, groups: Sequence[Tensor], weights: Sequence[Tensor], bias: Sequence[Tensor]) -> Tensor:
    """Condense groups of tokens: y = sum_k w[k] x[k] + b, the weights over positions shared by all channels.

    Args:
        x: (B, N, C).
        groups: one (B, G_i, r_i) int64 tensor per region.
        weights: one tensor of r_i weights per region.
        bias: one one-element tensor per region.

    Returns:
        (B, sum of G_i, C).
    """
    if kernels := serving(x, *weights, *bias):
        return kernels.aggregate(x, groups, weights, bias)
    parts = zip(gather_groups(x, groups), weights, bias, strict=True)
    return torch.cat([weighted_sum(members, weight, b) for members, weight, b in parts], dim=1)


def gather_groups(x: Tensor, groups: Sequence[Tensor]) -> list[Tensor]:
    """The members of each group: x (B, N, C) and one (B, G_i, r_i) per region -> one (B, G_i, r_i, C) per region."""
    B, N, C = x.shape
    rows = x.reshape(B * N, C)  # row gathers are far faster than an element-wise gather of (B, N, C)
    index = torch.cat([group.flatten(1) for group in groups], dim=1)  # (B, S): one gather for all regions
    if not known(B == 1) or torch.jit.is_tracing():  # a traced network takes other batches
        index = index + N * torch.arange(B, device=x.device)[:, None]
    members = rows.index_select(0, index.flatten()).view(B, index.shape[1], C)
    parts = members.split([group.shape[1] * group.shape[2] for group in groups], dim=1)
    return [part.unflatten(1, group.shape[1:]) for part, group in zip(parts, groups, strict=True)]


def resample_weights(weight: Tensor, members: int) -> Tensor:
    """Weights of r sorted members as weights of another number of members that stand for the same tokens.

    The weights are read as a density over the group that is constant within each of r equal parts, and integrated over
    ``members`` equal parts. Their sum stays; ``members = 2 r`` halves each weight and repeats it, ``members = r / 2``
    sums pairs.

    Args:
        weight: (..., r).
        members: at least 1.

    Returns:
        (..., members), differentiable in ``weight``.
    """
    return weight @ _overlaps(weight.shape[-1], members, weight.device, weight.dtype)


def _overlaps(old: int, new: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(old, new): the fraction of each of ``old`` equal parts of an interval that lies in each of ``new`` parts."""
    starts_old = torch.arange(old, device=device)[:, None] * new  # in units of 1 / (old * new), exactly
    starts_new = torch.arange(new, device=device)[None] * old
    common = torch.minimum(starts_old + new, starts_new + old) - torch.maximum(starts_old, starts_new)
    return (common.clamp(min=0).double() / new).to(dtype)


def weighted_sum(members: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """sum over k of w[k] x[k] + b: (B, G, r, C), r weights and one bias -> (B, G, C)."""
    return (weight.view(1, -1) @ members).squeeze(2) + bias
