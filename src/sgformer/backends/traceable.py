"""The network for exporters: the same function, written so that batch, height and width may stay unknown.

An exporter traces one run and records how every size depends on the input's. The backbone branches on sizes (do
windows tile the grid? is the matrix small enough to keep?), and each branch taken would be recorded for all images.
There are no such branches here: windows, regions and enlarged maps are indices, computed from the sizes by integer
arithmetic, and padding is always masked. At a fixed size most parts are those of :mod:`~.fixed` instead. Tests compare
each part with the backbone's own.

Legend: B batch, H x W token grid, N = H * W, C channels, h heads, n windows, M keys of a window.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgformer import ops
from sgformer.backends import fixed as at_one_size
from sgformer.backends.eligibility import intact
from sgformer.backends.native_autograd import restore
from sgformer.backends.optimize import FoldedMlp
from sgformer.models.backbone import HybridScaleAttention, MultiScaleAttention, PlainAttention, SelfGuidedAttention
from sgformer.models.config import SGFormerConfig
from sgformer.models.layers import ConvNorm, Mlp, PositionTable, convolve, resize_table
from sgformer.models.significance import LinearAggregation, MeanAggregation

#: Smallest token grid of a guided stage, in tokens, for images from 32 x 32 pixels: 8 x 8, 4 x 4, 2 x 2.
SMALLEST = (64, 16, 4)


def traceable(model: nn.Module, ties: str = "stable", fixed: bool = False) -> nn.Module:
    """A frozen copy in evaluation mode that exporters can trace, of any module with SG-Formers and our heads inside.

    Args:
        model: not changed.
        ties: how tokens of equal significance are ordered: "stable", by a stable sort; "topk", by a top-k operator,
            for runtimes whose operator (unlike torch's) puts the lower index first.
        fixed: height and width are those of the example, and all indices and shapes constants.
    """
    result = copy.deepcopy(model).eval().requires_grad_(False)
    restore(result)
    for module in list(result.modules()):
        for name, child in module.named_children():
            if intact(child, Mlp):
                mlp = FoldedMlp(child)
                setattr(module, name, at_one_size.FixedMlp(mlp) if fixed else mlp)
            elif fixed and intact(child, ConvNorm):
                setattr(module, name, at_one_size.FixedConvNorm(child))
            elif fixed and intact(child, PlainAttention):
                setattr(module, name, at_one_size.FixedPlain(child))
            elif fixed and intact(child, SelfGuidedAttention):
                setattr(module, name, at_one_size.FixedGuided(child, Aggregation(child.aggregate, ties, fixed)))
            elif type(child) is PositionTable:
                setattr(module, name, Position(child, fixed))
            elif type(child) in (HybridScaleAttention, MultiScaleAttention):
                setattr(module, name, HybridScale(child, fixed))
            elif type(child) in (LinearAggregation, MeanAggregation):
                setattr(module, name, Aggregation(child, ties, fixed))
            elif hasattr(child, "traceable"):  # a head's part
                setattr(module, name, child.traceable(fixed))
    return result


def sides(x: Tensor, first: int, fixed: bool) -> tuple[Any, Any]:
    """Two sizes of x from dimension ``first`` on; as constants for the tracer if fixed."""
    H, W = x.shape[first], x.shape[first + 1]
    return (int(H), int(W)) if fixed else (H, W)


def why_unsupported(config: SGFormerConfig) -> str | None:
    """Why a network cannot be exported at all; None if it can."""
    if config.aggregation not in ("linear", "mean"):
        return f"aggregation {config.aggregation!r} has no equivalent in the formats"
    if config.significance == "random":
        return "random significance is drawn for a fixed size, outside the network"
    return None


def why_fixed_size(config: SGFormerConfig) -> str | None:
    """Why a network can be exported for one image size only; None if sizes may stay open."""
    guided = [stage for stage in config.stages if stage.reduction is not None]
    for stage, tokens in zip(guided, SMALLEST, strict=False) if config.pairs == "guided" else ():
        if any(region.share * tokens < 1 for region in stage.regions):
            return f"a region of {min(r.share for r in stage.regions):g} would be empty in small images"
    return None


# -- windows ----------------------------------------------------------------------------------------------------------


class Windows(NamedTuple):
    """The partition of a token grid into windows, as indices.

    Attributes:
        token: (n * M,) int64, the token at every place of every window; padding repeats the last row or column.
        real: (n, M) bool, which places are tokens; None if all are known to be.
        place: (N,) int64, the place of every token: the inverse.
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
    """``ops.attend_windows`` with tokens in rows: q (B, N, D), k and v (B, N', D) -> (B, N, D) and (B, N')."""
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
        self.tiled = at_one_size.FixedHybrid(attn) if fixed and intact(attn, HybridScaleAttention) else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.tiled is not None and self.tiled.suits(x):
            return self.tiled(x)  # type: ignore[no-any-return]
        attn, B, C, (H, W) = self.attn, x.shape[0], x.shape[3], sides(x, 1, self.fixed)
        if isinstance(attn, HybridScaleAttention):
            q_coarse, q_fine, kv_fine, local = attn.proj_in(x).split((C // 2, C // 2, C, C), dim=-1)
            reduced = self.reduce(x, attn.reduce, attn.reduce_norm)
            kv, is_global = attn.kv_coarse(reduced), attn.coarse == "global"
            out_coarse, coarse = self.attend_scale(q_coarse, kv, attn.reduction, is_global)
            out_fine, fine = self.attend_scale(q_fine, kv_fine, 1, False)
            return attn.proj(torch.cat([out_coarse, out_fine], dim=-1) + convolve(attn.local, local)), coarse, fine
        queries, local = attn.proj_in(x).split((C, C), dim=-1)
        outs, coarse, fine = [], x.new_zeros(B, H, W), x.new_zeros(B, H, W)
        groups = zip(
            attn.scales, queries.chunk(len(attn.scales), -1), attn.reduce, attn.reduce_norm, attn.kv, strict=True
        )
        for scale, q, conv, norm, kv in groups:
            pooled = x if scale == 1 else self.reduce(x, conv, norm)
            out, received = self.attend_scale(q, kv(pooled), scale, scale > 1 and attn.coarse == "global")
            outs.append(out)
            coarse, fine = (coarse + received, fine) if scale > 1 else (coarse, fine + received)
        return attn.proj(torch.cat(outs, dim=-1) + convolve(attn.local, local)), coarse, fine

    def reduce(self, x: Tensor, conv: Any, norm: nn.Module) -> Tensor:
        r, (H, W) = conv.kernel_size[0], sides(x, 1, self.fixed)
        image = F.pad(x.permute(0, 3, 1, 2), (0, -W % r, 0, -H % r))
        return F.gelu(norm(conv(image).permute(0, 2, 3, 1)))

    def attend_scale(self, q: Tensor, kv: Tensor, scale: int, is_global: bool) -> tuple[Tensor, Tensor]:
        """Heads of one scale; see ``backbone.attend_scale``."""
        B, D, (H, W), (h, w) = q.shape[0], q.shape[3], sides(q, 1, self.fixed), sides(kv, 1, self.fixed)
        q, (k, v) = q.reshape(B, H * W, D), kv.reshape(B, h * w, 2 * D).chunk(2, dim=-1)
        heads, side = self.attn.heads, self.attn.window
        if is_global:
            k, v, q = (ops.split_heads(t, heads) for t in (k, v, q))
            weights = (q @ (k * k.shape[-1] ** -0.5).transpose(-2, -1)).softmax(-1)
            # By rows and columns: for sums of more than 4096 values a compiler generates other code, and recompiles.
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

    symbolic = True  # see ops.sizes.outside_graph

    def __init__(self, inner: Any, ties: str, fixed: bool):
        super().__init__()
        self.inner, self.ties, self.fixed = inner, ties, fixed

    def forward(self, x: Tensor, significance: Tensor) -> tuple[Tensor, list[Tensor]]:
        if self.ties == "topk":
            tokens = int(significance.shape[1]) if self.fixed else significance.shape[1]
            order = significance.topk(tokens, dim=1, largest=False).indices
        else:
            order = significance.argsort(dim=1, stable=True)
        groups = self.groups(order)
        if self.fixed and type(self.inner) is LinearAggregation:
            return at_one_size.pool(self.inner, x, groups), groups
        return self.inner.pool(x, groups), groups

    def groups(self, order: Tensor) -> list[Tensor]:
        """See ``ops.group_tokens``: region ends are cumulative shares of N, rounded half up; positions are even."""
        B, N = order.shape[0], int(order.shape[1]) if self.fixed else order.shape[1]
        groups, start = [], 0
        for i, (whole, rate) in enumerate(zip(self.inner.ends, self.inner.rates, strict=True)):
            end = N if i == len(self.inner.ends) - 1 else ops.share_of(N, whole)
            length = end - start
            count = (length + rate - 1) // rate
            if self.fixed and length == count * rate:  # all of them, as they are
                groups.append(order[:, start:end].reshape(-1, count, rate))
                start = end
                continue
            places = (2 * torch.arange(count * rate, device=order.device) + 1) * length // (2 * count * rate) + start
            groups.append(order.index_select(1, places).view(-1 if self.fixed else B, count, rate))
            start = end
        return groups

    def describe(self, grouped: list[Tensor], grid: tuple[int, ...]) -> Any:
        return self.inner.describe(grouped, grid)


# -- resizing ---------------------------------------------------------------------------------------------------------


class Position(nn.Module):
    """``PositionTable``, always resized: the identity if the grid is the table's own."""

    def __init__(self, position: PositionTable, fixed: bool):
        super().__init__()
        self.table, self.fixed = position.table, fixed

    def forward(self, x: Tensor) -> Tensor:
        image, size = self.table.permute(2, 0, 1)[None], sides(x, 1, self.fixed)
        if self.fixed:
            return x + resize_table(self.table, size)
        return x + F.interpolate(image, size=size, mode="bicubic", align_corners=False)[0].permute(1, 2, 0)
