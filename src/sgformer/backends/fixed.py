"""Parts of the network at one image size, as runtimes compute them fastest: few operators, with constant shapes.

:func:`sgformer.backends.traceable.traceable` puts them into its copy. The batch is the -1 of every reshape, so that no
shape depends on a tensor. Linear maps see matrices, which makes the bias part of the product; norms of images see rows,
in the order in which convolutions keep them; windows and heads are one transposition. A convolution's tokens are made
rows before anything is added to them, because with four dimensions runtimes would keep the convolution's order.

Legend: B batch, H x W token grid, N = H * W, C channels, h heads, d channels of a head, n windows of s x s tokens,
M pooled tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgformer.models.backbone import HybridScaleAttention, PlainAttention, SelfGuidedAttention
from sgformer.models.layers import ConvNorm
from sgformer.models.significance import LinearAggregation


def sizes(x: Tensor) -> list[int]:
    """All sizes but the batch, as constants for a tracer."""
    return [int(n) for n in x.shape[1:]]


def image(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)  # (B, H, W, C) -> (B, C, H, W)


def tokens(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)  # (B, C, H, W) -> (B, H, W, C)


def divide(linear: nn.Linear, parts: Sequence[int], key: int | None, d: int) -> nn.ModuleList:
    """The parts of a linear map's output as maps of their own, which saves copying them out of it.

    Part ``key`` is attention's keys, of heads of ``d`` channels: it includes the scale of the scores.
    """
    result = nn.ModuleList()
    weights, biases = linear.weight.split(list(parts)), linear.bias.split(list(parts))
    for i, values in enumerate(zip(weights, biases, strict=True)):
        with torch.device("meta"):
            part = nn.Linear(linear.in_features, parts[i])
        scale = d**-0.5 if i == key else 1
        part.weight, part.bias = (nn.Parameter(value * scale, requires_grad=False) for value in values)
        result.append(part)
    return result


def apply(parts: nn.ModuleList, x: Tensor) -> list[Tensor]:
    return [part(x) for part in parts]


def rows(x: Tensor) -> Tensor:
    return x.reshape(-1, sizes(x)[-1])  # (B, ..., C) -> (B N, C)


class FixedMlp(nn.Module):
    """The MLP with ``x + depthwise(x)`` as one convolution, from :class:`~.native_modules.FoldedMlp`."""

    def __init__(self, folded: Any):
        super().__init__()
        self.fc1, self.conv, self.act, self.fc2 = folded.fc1, folded.conv, folded.act, folded.fc2

    def forward(self, x: Tensor) -> Tensor:
        H, W, C = sizes(x)
        hidden = self.fc1(rows(x)).reshape(-1, H, W, self.fc1.out_features)
        return self.fc2(rows(tokens(self.act(self.conv(image(hidden)))))).reshape(-1, H, W, C)


class FixedConvNorm(nn.Module):
    """``ConvNorm``. Mean and variance are those of all values, in any order."""

    def __init__(self, part: ConvNorm):
        super().__init__()
        self.conv, self.norm, self.act = part.conv, part.norm, part.act

    def forward(self, x: Tensor) -> Tensor:
        x = tokens(self.conv(x))
        H, W, C = sizes(x)
        row = x.reshape(-1, 1, H * W * C)
        row = F.instance_norm(row, weight=x.new_ones(1), bias=x.new_zeros(1), eps=self.norm.eps)
        return image(self.act(row.reshape(-1, H, W, C) * self.norm.weight + self.norm.bias))


def split_heads(x: Tensor, N: int, heads: int) -> Tensor:
    return x.reshape(-1, N, heads, sizes(x)[0] // heads).transpose(1, 2)  # (B N, C) -> (B, h, N, d)


def join_heads(x: Tensor) -> Tensor:
    h, _, d = sizes(x)
    return x.transpose(1, 2).reshape(-1, h * d)  # (B, h, N, d) -> (B N, C)


def split_windows(x: Tensor, grid: tuple[int, int], s: int, heads: int) -> Tensor:
    """(B N, D) -> (B n, h, s s, d): n windows, which tile the grid (H, W)."""
    d = sizes(x)[0] // heads
    parts = x.reshape(-1, grid[0] // s, s, grid[1] // s, s, heads, d).permute(0, 1, 3, 5, 2, 4, 6)
    return parts.reshape(-1, heads, s * s, d)


def join_windows(x: Tensor, grid: tuple[int, int], s: int) -> Tensor:
    """(B n, h, s s, d) -> (B N, D): the inverse."""
    h, _, d = sizes(x)
    return x.reshape(-1, grid[0] // s, grid[1] // s, h, s, s, d).permute(0, 1, 4, 2, 5, 3, 6).reshape(-1, h * d)


def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(B, h, N, d), and scaled keys and values (B, h, M, d) -> the output (B, h, N, d) and the weights (B, h, N, M)."""
    weights = (q @ k.transpose(-2, -1)).softmax(-1)
    return weights @ v, weights


class Local(nn.Module):
    """The local term, and the map of its sum with attention's output."""

    def __init__(self, attn: Any):
        super().__init__()
        self.conv, self.proj = attn.local, attn.proj

    def forward(self, out: Tensor, local: Tensor, grid: tuple[int, int]) -> Tensor:
        """Twice (B N, C) -> (B, H, W, C)."""
        C = sizes(out)[0]
        local = self.conv(image(local.reshape(-1, *grid, C)))
        return self.proj(out + rows(tokens(local))).reshape(-1, *grid, C)  # type: ignore[no-any-return]


class FixedPlain(nn.Module):
    """``PlainAttention``."""

    def __init__(self, attn: PlainAttention):
        super().__init__()
        C = attn.proj.out_features
        self.heads, self.finish = attn.heads, Local(attn)
        self.proj_in = divide(attn.proj_in, (C,) * 4, 1, C // attn.heads)

    def forward(self, x: Tensor) -> Tensor:
        H, W, _ = sizes(x)
        *qkv, local = apply(self.proj_in, rows(x))
        out, _ = attend(*(split_heads(t, H * W, self.heads) for t in qkv))
        return self.finish(join_heads(out), local, (H, W))  # type: ignore[no-any-return]


class FixedGuided(nn.Module):
    """``SelfGuidedAttention``, with an aggregation that can be traced."""

    def __init__(self, attn: SelfGuidedAttention, aggregate: nn.Module):
        super().__init__()
        C = attn.proj.out_features
        self.heads, self.finish, self.aggregate = attn.heads, Local(attn), aggregate
        self.proj_in = divide(attn.proj_in, (C, C), None, 1)
        self.kv = divide(attn.kv, (C, C), 0, C // attn.heads)

    def forward(self, x: Tensor, significance: Tensor) -> tuple[Tensor, list[Tensor]]:
        H, W, C = sizes(x)
        q, local = apply(self.proj_in, rows(x))
        pooled, grouped = self.aggregate(x.reshape(-1, H * W, C), significance.reshape(-1, H * W))
        k, v = apply(self.kv, rows(pooled))
        M = sizes(pooled)[0]
        out, _ = attend(*(split_heads(t, n, self.heads) for t, n in ((q, H * W), (k, M), (v, M))))
        return self.finish(join_heads(out), local, (H, W)), grouped

    def describe(self, grouped: list[Tensor], grid: tuple[int, ...]) -> Any:
        return self.aggregate.describe(grouped, grid)  # type: ignore[operator]


class FixedHybrid(nn.Module):
    """``HybridScaleAttention`` with global coarse heads, on a grid that windows and the reducing convolution tile."""

    def __init__(self, attn: HybridScaleAttention):
        super().__init__()
        C, heads = attn.proj.out_features, attn.heads
        D = C // 2
        self.heads, self.window, self.reduction, self.coarse = heads, attn.window, attn.reduction, attn.coarse
        self.reduce, self.norm, self.finish = attn.reduce, attn.reduce_norm, Local(attn)
        self.proj_in = divide(attn.proj_in, (D, D, D, D, C), 2, D // heads)
        self.kv = divide(attn.kv_coarse, (D, D), 0, D // heads)

    def suits(self, x: Tensor) -> bool:
        H, W, _ = sizes(x)
        return self.coarse == "global" and not any(n % side for n in (H, W) for side in (self.window, self.reduction))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        H, W, _ = sizes(x)
        s, r = self.window, self.reduction
        q, *fine, local = apply(self.proj_in, rows(x))
        k, v = apply(self.kv, rows(F.gelu(self.norm(tokens(self.reduce(image(x)))))))
        M = H * W // r**2
        out_coarse, weights = attend(*(split_heads(t, n, self.heads) for t, n in ((q, H * W), (k, M), (v, M))))
        i, j = (torch.arange(n, device=x.device) // r for n in (H, W))
        reduced = (i[:, None] * (W // r) + j).flatten()  # (N,) the reduced token of every token
        coarse = weights.mean((1, 2)).index_select(1, reduced).reshape(-1, H, W)
        out_fine, weights = attend(*(split_windows(t, (H, W), s, self.heads) for t in fine))
        received = weights.mean((1, 2)).reshape(-1, H // s, W // s, s, s)
        out = torch.cat([join_heads(out_coarse), join_windows(out_fine, (H, W), s)], dim=-1)
        return self.finish(out, local, (H, W)), coarse, received.transpose(2, 3).reshape(-1, H, W)


class GatherRows(torch.autograd.Function):
    """x (B, N, C) and index (B, S) -> (B, S, C), one operator of ONNX, for which torch has none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))

    @staticmethod
    def symbolic(g: Any, x: Any, index: Any) -> Any:
        last = g.op("Constant", value_t=torch.tensor([2]))
        return g.op("GatherND", x, g.op("Unsqueeze", index, last), batch_dims_i=1)


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    gather = GatherRows.apply if torch.onnx.is_in_onnx_export() else lambda *args: GatherRows.forward(None, *args)
    return gather(x, index)  # type: ignore[no-any-return,no-untyped-call]


def pool(inner: LinearAggregation, x: Tensor, groups: list[Tensor]) -> Tensor:
    """``inner.pool``: (B, N, C) and one (B, G, r) per region -> (B, M, C)."""
    pooled = []
    for region, group in zip(inner, groups, strict=True):
        (G, r), C = sizes(group), sizes(x)[1]
        members, weights = gather_rows(x, group.reshape(-1, G * r)), region.spread(r)
        y = members * weights[0] if r == 1 else (weights @ members.reshape(-1, G, r, C)).reshape(-1, G, C)
        pooled.append(y + region.bias)
    return torch.cat(pooled, dim=1)
