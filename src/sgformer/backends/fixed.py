"""Parts of the network at one image size, as runtimes compute them fastest: plain operators with constant shapes.

:func:`sgformer.backends.traceable.traceable` puts them into its copy. No shape depends on a tensor (the batch is the -1
of every reshape), linear maps see matrices, norms of images see rows, and windows are one transposition.

Legend: B batch, H x W token grid, N = H * W, C channels, h heads, s side of a window, M pooled tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgformer.models.layers import ConvNorm, Mlp


class Rows(nn.Module):
    """A linear map of all tokens as one matrix, so that the bias is part of the product: (..., C_in) -> (..., C)."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        inner = [int(n) for n in x.shape[1:-1]]
        return self.linear(x.reshape(-1, int(x.shape[-1]))).reshape(-1, *inner, self.linear.out_features)


def image(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)  # (B, H, W, C) -> (B, C, H, W)


def tokens(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)  # (B, C, H, W) -> (B, H, W, C)


class FixedMlp(nn.Module):
    """The MLP with ``x + depthwise(x)`` as one convolution."""

    def __init__(self, folded: Any):
        super().__init__()
        self.fc1, self.act, self.conv, self.fc2 = Rows(folded.fc1), folded.act, folded.conv, Rows(folded.fc2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(tokens(self.act(self.conv(image(self.fc1(x))))))


class FixedConvNorm(nn.Module):
    """``ConvNorm`` with its norm over rows: the order of values does not matter to their mean and variance."""

    def __init__(self, part: ConvNorm):
        super().__init__()
        self.conv, self.norm, self.act = part.conv, part.norm, part.act

    def forward(self, x: Tensor) -> Tensor:
        x = tokens(self.conv(x))
        H, W, C = (int(n) for n in x.shape[1:])
        one = x.new_ones(1)
        row = F.instance_norm(x.reshape(-1, 1, H * W * C), weight=one, bias=0 * one, eps=self.norm.eps).reshape(-1, H, W, C)
        return image(self.act(row * self.norm.weight + self.norm.bias))


class FixedPosition(nn.Module):
    """``PositionTable`` resized once."""

    def __init__(self, position: Any):
        super().__init__()
        self.table = position.table

    def forward(self, x: Tensor) -> Tensor:
        size = int(x.shape[1]), int(x.shape[2])
        return x + resized(self.table, size)


def resized(table: Tensor, size: tuple[int, int]) -> Tensor:
    with torch.no_grad():
        if tuple(table.shape[:2]) == size:
            return table
        return F.interpolate(table.permute(2, 0, 1)[None], size=size, mode="bicubic", align_corners=False)[0].permute(
            1, 2, 0
        )


def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(B, h, N, d), twice (B, h, M, d) -> (B, h, N, d) and the weights (B, h, N, M)."""
    weights = (q @ (k * int(k.shape[-1]) ** -0.5).transpose(-2, -1)).softmax(-1)
    return weights @ v, weights


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, ..., C) -> (B, h, N, d)."""
    C = int(x.shape[-1])
    return x.reshape(-1, count(x), heads, C // heads).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """(B, h, N, d) -> (B, N, C)."""
    heads, N, d = (int(n) for n in x.shape[1:])
    return x.transpose(1, 2).reshape(-1, N, heads * d)


def count(x: Tensor) -> int:
    n = 1
    for side in x.shape[1:-1]:
        n *= int(side)
    return n


def cut(x: Tensor, s: int, heads: int) -> Tensor:
    """(B, H, W, D) -> (B n, h, s s, d): windows that tile the grid."""
    H, W, D = (int(n) for n in x.shape[1:])
    parts = x.reshape(-1, H // s, s, W // s, s, heads, D // heads).permute(0, 1, 3, 5, 2, 4, 6)
    return parts.reshape(-1, heads, s * s, D // heads)


def uncut(x: Tensor, s: int, H: int, W: int) -> Tensor:
    """(B n, h, s s, d) -> (B, H, W, D)."""
    heads, d = int(x.shape[1]), int(x.shape[3])
    parts = x.reshape(-1, H // s, W // s, heads, s, s, d).permute(0, 1, 4, 2, 5, 3, 6)
    return parts.reshape(-1, H * W, heads * d)


def local_term(conv: nn.Module, x: Tensor) -> Tensor:
    return tokens(conv(image(x))).reshape(-1, count(x), int(x.shape[-1]))


class FixedPlain(nn.Module):
    def __init__(self, attn: Any):
        super().__init__()
        self.heads, self.local = attn.heads, attn.local
        self.proj_in, self.proj = Rows(attn.proj_in), Rows(attn.proj)

    def forward(self, x: Tensor) -> Tensor:
        H, W, C = (int(n) for n in x.shape[1:])
        q, k, v, local = self.proj_in(x).split((C,) * 4, dim=-1)
        out, _ = attend(*(split_heads(t, self.heads) for t in (q, k, v)))
        return self.proj(join_heads(out) + local_term(self.local, local)).reshape(-1, H, W, C)


class FixedHybrid(nn.Module):
    def __init__(self, attn: Any):
        super().__init__()
        self.attn = attn
        self.proj_in, self.proj, self.kv = Rows(attn.proj_in), Rows(attn.proj), Rows(attn.kv_coarse)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attn = self.attn
        H, W, C = (int(n) for n in x.shape[1:])
        D, r, s = C // 2, attn.reduction, attn.window
        q_coarse, q, k, v, local = self.proj_in(x).split((D, D, D, D, C), dim=-1)
        reduced = F.gelu(attn.reduce_norm(tokens(attn.reduce(image(x)))))
        k_coarse, v_coarse = self.kv(reduced).split((D, D), dim=-1)
        heads = attn.heads
        out, weights = attend(*(split_heads(t, heads) for t in (q_coarse, k_coarse, v_coarse)))
        received = weights.mean((1, 2))  # (B, M)
        rows, cols = (torch.arange(n) // r for n in (H, W))
        coarse = received.index_select(1, (rows[:, None] * (W // r) + cols).flatten()).reshape(-1, H, W)
        out_fine, weights = attend(*(cut(t, s, heads) for t in (q, k, v)))
        fine = weights.mean((1, 2)).reshape(-1, H // s, W // s, s, s).transpose(2, 3).reshape(-1, H, W)
        both = torch.cat([join_heads(out), uncut(out_fine, s, H, W)], dim=-1)
        return self.proj(both + local_term(attn.local, local)).reshape(-1, H, W, C), coarse, fine


class FixedGuided(nn.Module):
    def __init__(self, attn: Any):
        super().__init__()
        self.heads, self.local, self.aggregate = attn.heads, attn.local, attn.aggregate
        self.proj_in, self.proj, self.kv = Rows(attn.proj_in), Rows(attn.proj), Rows(attn.kv)

    def forward(self, x: Tensor, significance: Tensor) -> tuple[Tensor, list[Tensor]]:
        H, W, C = (int(n) for n in x.shape[1:])
        q, local = self.proj_in(x).split((C, C), dim=-1)
        pooled, grouped = self.aggregate(x.reshape(-1, H * W, C), significance.reshape(-1, H * W))
        k, v = self.kv(pooled).split((C, C), dim=-1)
        out, _ = attend(*(split_heads(t, self.heads) for t in (q, k, v)))
        return self.proj(join_heads(out) + local_term(self.local, local)).reshape(-1, H, W, C), grouped

    def describe(self, grouped: list[Tensor], grid: tuple[int, ...]) -> Any:
        return self.aggregate.describe(grouped, grid)


class GatherRows(torch.autograd.Function):
    """x (B, N, C) and index (B, S) -> (B, S, C)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))

    @staticmethod
    def symbolic(g: Any, x: Any, index: Any) -> Any:
        axis = g.op("Constant", value_t=torch.tensor([2]))
        return g.op("GatherND", x, g.op("Unsqueeze", index, axis), batch_dims_i=1)


class FixedAggregation(nn.Module):
    def __init__(self, inner: Any, ties: str, groups: Any):
        super().__init__()
        self.inner, self.ties, self.ends = inner, ties, groups

    def forward(self, x: Tensor, significance: Tensor) -> tuple[Tensor, list[Tensor]]:
        N, C = int(x.shape[1]), int(x.shape[2])
        if self.ties == "topk":
            order = significance.topk(N, dim=1, largest=False).indices
        else:
            order = significance.argsort(dim=1, stable=True)
        grouped = self.ends(order)
        sizes = [(int(g.shape[1]), int(g.shape[2])) for g in grouped]
        index = torch.cat([g.reshape(-1, G * r) for g, (G, r) in zip(grouped, sizes, strict=True)], 1)
        if sum(G * r for G, r in sizes) == N:
            index = order  # FIXME
        members = GatherRows.apply(x, index)
        parts = members.split([G * r for G, r in sizes], dim=1)
        pooled = []
        for part, (G, r), w in zip(parts, sizes, self.inner, strict=True):
            t = part.reshape(-1, G, r, C)
            pooled.append((w.spread(r) @ t).reshape(-1, G, C) + w.bias)
        return torch.cat(pooled, 1), grouped

    def describe(self, grouped: list[Tensor], grid: tuple[int, ...]) -> Any:
        return self.inner.describe(grouped, grid)
