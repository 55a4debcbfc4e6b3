"""The network for exporters: the same function, written so that batch, height and width may stay unknown.

An exporter follows one run and writes down how every size depends on the input's. The backbone asks about sizes on
its way (do windows tile the grid? is the matrix small enough to keep?), and each answer would be written down as if it
held for all images. Here nothing is asked: windows, regions and enlarged maps are indices, computed from the sizes by
integer arithmetic, and padding is always masked. Tests hold each part against the backbone's own.

Legend: B batch, H x W token grid, N = H * W, C channels, h heads, n windows, M keys of a window.
"""

from __future__ import annotations

import copy
from fractions import Fraction
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgformer import ops
from sgformer.backends.eligibility import intact
from sgformer.backends.native_autograd import restore
from sgformer.backends.optimize import FoldedMlp
from sgformer.models.backbone import HybridScaleAttention, MultiScaleAttention
from sgformer.models.config import SGFormerConfig
from sgformer.models.layers import Mlp, PositionTable
from sgformer.models.significance import LinearAggregation, MeanAggregation

#: Smallest token grid of a guided stage, in tokens, for images from 32 x 32 pixels: 8 x 8, 4 x 4, 2 x 2.
SMALLEST = (64, 16, 4)


def traceable(model: nn.Module, ties: str = "stable", fixed: bool = False) -> nn.Module:
    """A frozen copy in evaluation mode that exporters can follow; any module with SG-Formers and our heads inside.

    Args:
        model: left as it is.
        ties: how equal significance is put in order: "stable", by a stable sort; "topk", by a top-k operator, for
            runtimes where that (unlike torch's) puts the lower index first.
        fixed: height and width are those of the example, and all indices constants.
    """
    result = copy.deepcopy(model).eval().requires_grad_(False)
    restore(result)
    for module in list(result.modules()):
        for name, child in module.named_children():
            if intact(child, Mlp):
                setattr(module, name, FoldedMlp(child))
            elif type(child) is PositionTable:
                setattr(module, name, Position(child, fixed))
            elif type(child) in (HybridScaleAttention, MultiScaleAttention):
                setattr(module, name, HybridScale(child, fixed))
            elif type(child) in (LinearAggregation, MeanAggregation):
                setattr(module, name, Aggregation(child, ties, fixed))
            elif hasattr(child, "traceable"):  # of a head
                setattr(module, name, child.traceable(fixed))
    return result


def sides(x: Tensor, first: int, fixed: bool) -> tuple[Any, Any]:
    """Two sizes of x from dimension ``first`` on; where they are fixed, as numbers that no tracer follows."""
    H, W = x.shape[first], x.shape[first + 1]
    return (int(H), int(W)) if fixed else (H, W)


def why_unsupported(config: SGFormerConfig) -> str | None:
    """Why a network cannot be exported at all; None where it can."""
    if config.aggregation not in ("linear", "mean"):
        return f"aggregation {config.aggregation!r} has no counterpart in the formats"
    if config.significance == "random":
        return "random significance is drawn for a size, outside of the network"
    return None


def why_fixed_size(config: SGFormerConfig) -> str | None:
    """Why a network can be exported for one image size only; None where sizes may stay open."""
    guided = [stage for stage in config.stages if stage.reduction is not None]
    for stage, tokens in zip(guided, SMALLEST, strict=False) if config.pairs == "guided" else ():
        if any(region.share * tokens < 1 for region in stage.regions):
            return f"a region of {min(r.share for r in stage.regions):g} would be empty in small images"
    return None


# -- windows ----------------------------------------------------------------------------------------------------------


class Windows(NamedTuple):
    """How the tokens of a grid fall into windows, as indices.

    Attributes:
        token: (n * M,) int64, the token of every place of every window; what sticks out repeats the last row or column.
        real: (n, M) bool, which places are tokens; None where all are, for certain.
        place: (N,) int64, where every token went: the inverse.
        shape: (n, M).
    """

    token: Tensor
    real: Tensor | None
    place: Tensor
    shape: tuple[Any, Any]

    @classmethod
    def cut(
        cls, grid: tuple[Any, Any], side: int, count: tuple[Any, Any], device: torch.device, fixed: bool = False
    ) -> Windows:
        """``count`` windows (rows, columns) of ``side`` x ``side``, which together cover the grid."""
        rows, cols = (torch.arange(c * side, device=device) for c in count)  # of the padded grid
        inside = (rows < grid[0])[:, None] & (cols < grid[1])  # (rows * side, cols * side)
        token = rows.clamp(max=grid[0] - 1)[:, None] * grid[1] + cols.clamp(max=grid[1] - 1)

        def windowed(x: Tensor) -> Tensor:
            return x.view(count[0], side, count[1], side).transpose(1, 2).reshape(count[0] * count[1], side * side)

        i, j = torch.arange(grid[0], device=device)[:, None], torch.arange(grid[1], device=device)
        place = ((i // side) * count[1] + j // side) * side**2 + (i % side) * side + j % side
        tiled = fixed and all(g == c * side for g, c in zip(grid, count, strict=True))
        return cls(
            windowed(token).flatten(),
            None if tiled else windowed(inside),
            place.flatten(),
            (count[0] * count[1], side * side),
        )


def attend_windows(
    q: Tensor, k: Tensor, v: Tensor, queries: Windows, keys: Windows, heads: int
) -> tuple[Tensor, Tensor]:
    """As ``ops.attend_windows``, with tokens in rows: q (B, N, D), k and v (B, N', D) -> (B, N, D) and (B, N')."""
    B, _, D = q.shape

    def windowed(x: Tensor, windows: Windows) -> Tensor:  # (B, n, h, M, d)
        n, M = windows.shape
        return x.index_select(1, windows.token).view(B, n, M, heads, D // heads).transpose(2, 3)

    k = windowed(k, keys) * (D // heads) ** -0.5
    scores = windowed(q, queries) @ k.transpose(-2, -1)
    if keys.real is not None:
        scores = scores.masked_fill(~keys.real[:, None, None, :], float("-inf"))
    weights = scores.softmax(-1)  # (B, n, h, M_q, M_k)
    out = (weights @ windowed(v, keys)).transpose(2, 3).reshape(B, queries.shape[0] * queries.shape[1], D)
    if queries.real is not None:
        weights = weights * queries.real[:, None, :, None].to(weights.dtype)
    received = weights.sum(3).mean(2).reshape(B, keys.shape[0] * keys.shape[1])
    return out.index_select(1, queries.place), received.index_select(1, keys.place)


class HybridScale(nn.Module):
    """``HybridScaleAttention`` or ``MultiScaleAttention``."""

    def __init__(self, attn: Any, fixed: bool):
        super().__init__()
        self.attn, self.fixed = attn, fixed

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attn, B, C, (H, W) = self.attn, x.shape[0], x.shape[3], sides(x, 1, self.fixed)
        if isinstance(attn, HybridScaleAttention):
            q_coarse, q_fine, kv_fine, local = attn.proj_in(x).split((C // 2, C // 2, C, C), dim=-1)
            reduced = self.reduce(x, attn.reduce, attn.reduce_norm)
            far, coarse = self.attend_scale(q_coarse, attn.kv_coarse(reduced), attn.reduction, attn.coarse == "global")
            near, fine = self.attend_scale(q_fine, kv_fine, 1, False)
            return attn.proj(torch.cat([far, near], dim=-1) + attn.local(local)), coarse, fine
        queries, local = attn.proj_in(x).split((C, C), dim=-1)
        outs, coarse, fine = [], x.new_zeros(B, H, W), x.new_zeros(B, H, W)
        groups = zip(
            attn.scales, queries.chunk(len(attn.scales), -1), attn.reduce, attn.reduce_norm, attn.kv, strict=True
        )
        for scale, q, conv, norm, kv in groups:
            seen = x if scale == 1 else self.reduce(x, conv, norm)
            out, received = self.attend_scale(q, kv(seen), scale, scale > 1 and attn.coarse == "global")
            outs.append(out)
            coarse, fine = (coarse + received, fine) if scale > 1 else (coarse, fine + received)
        return attn.proj(torch.cat(outs, dim=-1) + attn.local(local)), coarse, fine

    def reduce(self, x: Tensor, conv: Any, norm: nn.Module) -> Tensor:
        r, (H, W) = conv.kernel_size[0], sides(x, 1, self.fixed)
        image = F.pad(x.permute(0, 3, 1, 2), (0, -W % r, 0, -H % r))
        return F.gelu(norm(conv(image).permute(0, 2, 3, 1)))

    def attend_scale(self, q: Tensor, kv: Tensor, scale: int, is_global: bool) -> tuple[Tensor, Tensor]:
        """Heads of one scale; as ``backbone.attend_scale``."""
        B, D, (H, W), (h, w) = q.shape[0], q.shape[3], sides(q, 1, self.fixed), sides(kv, 1, self.fixed)
        q, (k, v) = q.reshape(B, H * W, D), kv.reshape(B, h * w, 2 * D).chunk(2, dim=-1)
        heads, side = self.attn.heads, self.attn.window
        if is_global:
            k, v, q = (ops.split_heads(t, heads) for t in (k, v, q))
            weights = (q @ (k * k.shape[-1] ** -0.5).transpose(-2, -1)).softmax(-1)
            # By rows and columns: for sums of more than 4096 numbers a compiler makes other code, and compiles anew.
            total = weights.unflatten(2, (H, W)).sum(2).sum(2)
            out, significance = ops.join_heads(weights @ v), total.mean(1) / (H * W)
        else:
            count = ((h + side - 1) // side, (w + side - 1) // side)
            queries = Windows.cut((H, W), side * scale, count, q.device, self.fixed)
            keys = Windows.cut((h, w), side, count, q.device, self.fixed) if scale > 1 else queries
            out, received = attend_windows(q, k, v, queries, keys, heads)
            significance = received / (side * scale) ** 2
        if scale > 1:  # nearest
            rows, cols = (torch.arange(size, device=q.device) // scale for size in (H, W))
            significance = significance.index_select(1, (rows[:, None] * w + cols).flatten())
        return out.reshape(B, H, W, D), significance.reshape(B, H, W)


# -- regions ----------------------------------------------------------------------------------------------------------


class Aggregation(nn.Module):
    """``LinearAggregation`` or ``MeanAggregation``."""

    def __init__(self, inner: Any, ties: str, fixed: bool):
        super().__init__()
        self.inner, self.ties, self.fixed = inner, ties, fixed
        ends = [Fraction(end).limit_denominator(1 << 20) for end in accumulate(inner.shares)]
        self.ends = [(end.numerator, end.denominator) for end in ends]

    def forward(self, x: Tensor, significance: Tensor) -> tuple[Tensor, list[Tensor]]:
        if self.ties == "topk":
            tokens = int(significance.shape[1]) if self.fixed else significance.shape[1]
            order = significance.topk(tokens, dim=1, largest=False).indices
        else:
            order = significance.argsort(dim=1, stable=True)
        groups = self.groups(order)
        if isinstance(self.inner, LinearAggregation):
            weights, bias = [m.weight for m in self.inner], [m.bias for m in self.inner]
        else:
            weights, bias = self.inner._weights(x)
        return ops.aggregate(x, groups, weights, bias), groups

    def groups(self, order: Tensor) -> list[Tensor]:
        """As ``ops.group_tokens``: region ends are cumulated shares of N, rounded half up; positions sampled evenly."""
        B, N = order.shape[0], int(order.shape[1]) if self.fixed else order.shape[1]
        groups, start = [], 0
        for i, ((above, below), rate) in enumerate(zip(self.ends, self.inner.rates, strict=True)):
            end = N if i == len(self.ends) - 1 else (2 * above * N + below) // (2 * below)
            length = end - start
            count = (length + rate - 1) // rate
            places = (2 * torch.arange(count * rate, device=order.device) + 1) * length // (2 * count * rate) + start
            groups.append(order.index_select(1, places).view(B, count, rate))
            start = end
        return groups

    def describe(self, grouped: list[Tensor], grid: tuple[int, ...]) -> Any:
        return self.inner.describe(grouped, grid)


# -- resizing ---------------------------------------------------------------------------------------------------------


class Position(nn.Module):
    """``PositionTable``: always resized, which changes nothing where the grid is the table's own."""

    def __init__(self, position: PositionTable, fixed: bool):
        super().__init__()
        self.table, self.fixed = position.table, fixed

    def forward(self, x: Tensor) -> Tensor:
        image, size = self.table.permute(2, 0, 1)[None], sides(x, 1, self.fixed)
        return x + F.interpolate(image, size=size, mode="bicubic", align_corners=False)[0].permute(1, 2, 0)
