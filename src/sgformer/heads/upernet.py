"""UPerNet: pyramid pooling, a feature pyramid on top of it, all levels fused (Xiao et al., ECCV 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgformer.heads.common import ConvNormAct, PixelClassifier, resize
from sgformer.heads.registry import register_head


class PyramidPooling(nn.Module):
    """The map itself and its averages over 1, 2 x 2, 3 x 3 and 6 x 6 cells: (B, C, H, W) -> (B, dim, H, W)."""

    def __init__(self, dim_in: int, dim: int, pools: Sequence[int]):
        super().__init__()
        self.pools = tuple(pools)
        self.reduce = nn.ModuleList(ConvNormAct(dim_in, dim, 1) for _ in self.pools)
        self.fuse = ConvNormAct(dim_in + len(self.pools) * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        pooled = [conv(F.adaptive_avg_pool2d(x, n)) for n, conv in zip(self.pools, self.reduce, strict=True)]
        return self.fuse(torch.cat([x, *(resize(p, x) for p in pooled)], dim=1))

    def traceable(self, fixed: bool) -> nn.Module:
        """A copy for exporters, whose sizes they can trace or, if `fixed`, take as constants."""
        return TraceablePooling(self, fixed)


class TraceablePooling(nn.Module):
    """`PyramidPooling` with adaptive averages as matrix products, as no exporter supports adaptive pooling."""

    def __init__(self, pooling: PyramidPooling, fixed: bool):
        super().__init__()
        self.fixed = fixed
        self.pools, self.reduce, self.fuse = pooling.pools, pooling.reduce, pooling.fuse

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[-2:]
        maps, grid = [x], (int(H), int(W)) if self.fixed else (H, W)
        for cells, conv in zip(self.pools, self.reduce, strict=True):
            rows, cols = (averages(cells, size, x) for size in grid)
            pooled = conv(rows @ x @ cols.transpose(0, 1))
            maps.append(F.interpolate(pooled, size=grid, mode="bilinear", align_corners=False))
        return self.fuse(torch.cat(maps, dim=1))


def averages(cells: int, size: Any, like: Tensor) -> Tensor:
    """(cells, size): row i averages positions floor(i * size / cells) to ceil((i + 1) * size / cells)."""
    i, at = torch.arange(cells, device=like.device)[:, None], torch.arange(size, device=like.device)
    start, end = i * size // cells, ((i + 1) * size + cells - 1) // cells
    return ((at >= start) & (at < end)).to(like.dtype) / (end - start).to(like.dtype)


@register_head("upernet")
class UPerNet(nn.Module):
    """Four maps to class logits at the first one's resolution, with an auxiliary FCN head on the third map.

    Args:
        channels: of the maps, finest first.
        strides: of the maps in pixels; only their order matters here.
        num_classes: of the logits.
        dim: width of every convolution; the auxiliary head is half as wide.
        pools: cells per side of the pyramid pooling.
        dropout: probability that a channel is dropped before a classifier.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        dim: int = 512,
        pools: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
    ):
        super().__init__()
        if sorted(strides) != list(strides):
            raise ValueError(f"feature maps must be finest first (got strides {list(strides)})")
        self.pooling = PyramidPooling(channels[-1], dim, pools)
        self.lateral = nn.ModuleList(ConvNormAct(c, dim, 1) for c in channels[:-1])
        self.smooth = nn.ModuleList(ConvNormAct(dim, dim) for _ in channels[:-1])
        self.fuse = ConvNormAct(len(channels) * dim, dim)
        self.classifier = PixelClassifier(dim, num_classes, dropout)
        self.fcn = nn.Sequential(ConvNormAct(channels[2], dim // 2), PixelClassifier(dim // 2, num_classes, dropout))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """(B, C_i, H_i, W_i), finest first -> (B, num_classes, H_0, W_0)."""
        levels = [conv(x) for conv, x in zip(self.lateral, features[:-1], strict=True)]
        levels.append(self.pooling(features[-1]))
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + resize(levels[i], levels[i - 1])
        levels = [*(conv(x) for conv, x in zip(self.smooth, levels[:-1], strict=True)), levels[-1]]
        fused = self.fuse(torch.cat([levels[0], *(resize(x, levels[0]) for x in levels[1:])], dim=1))
        return self.classifier(fused)

    def auxiliary(self, features: Sequence[Tensor]) -> Tensor:
        """The auxiliary head's logits, for training only: (B, num_classes, H_2, W_2)."""
        return self.fcn(features[2])
