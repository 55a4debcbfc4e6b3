"""SG-Former written the plain way the paper reads: the yardstick of every speed and memory figure.

It computes what ``sgformer`` computes, with the same weights (in the released layout), and does nothing clever: tokens
are (B, N, C) and are transposed and copied around every convolution; every projection is a matrix of its own; every
attention matrix is made and kept; the aggregated sequence is built twice, from row-major and from column-major tokens,
once for each half of the heads. It stands in for the published code, which carries no licence.

    sgformer bench --models sgformer_s plain_s          # times and memory
    python benchmarks/plain.py --model sgformer_s       # how far the two networks are apart

Legend: B batch, H x W token grid, N = H * W, C channels, h heads, d = C / h.
"""

from __future__ import annotations

import argparse
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import sgformer
from sgformer.models.config import SGFormerConfig, StageConfig
from sgformer.models.layers import init_module
from sgformer.models.released import to_released
from sgformer.ops.regroup import group_positions, region_lengths, sort_tokens


def to_image(x: Tensor, grid: tuple[int, int]) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], -1, *grid).contiguous()  # (B, N, C) -> (B, C, H, W)


def to_tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2).contiguous()  # (B, C, H, W) -> (B, N, C)


def heads_first(x: Tensor, heads: int) -> Tensor:
    return x.reshape(x.shape[0], x.shape[1], heads, -1).permute(0, 2, 1, 3).contiguous()  # (B, N, C) -> (B, h, N, d)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Output (B, N, C) and the whole attention matrix (B, h, N, M); ``valid`` (B, M) marks keys that are tokens."""
    weights = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    if valid is not None:
        weights = weights.masked_fill(~valid[:, None, None], -math.inf)
    weights = weights.softmax(dim=-1)
    return (weights @ v).transpose(1, 2).flatten(2), weights


def cut(x: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """(B, N, C) tokens to (B * windows, side * side, C), zero-padded right and bottom."""
    (H, W), (B, _, C) = grid, x.shape
    x = F.pad(x.reshape(B, H, W, C), (0, 0, 0, -W % side, 0, -H % side))
    x = x.reshape(B, x.shape[1] // side, side, x.shape[2] // side, side, C)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, side * side, C)


def uncut(x: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """The inverse of :func:`cut`."""
    rows, cols = -(-grid[0] // side), -(-grid[1] // side)
    x = x.reshape(-1, rows, cols, side, side, x.shape[-1]).permute(0, 1, 3, 2, 4, 5)
    x = x.reshape(x.shape[0], rows * side, cols * side, -1)[:, : grid[0], : grid[1]]
    return x.reshape(x.shape[0], grid[0] * grid[1], -1)


class ConvNorm(nn.Module):
    def __init__(self, dim_in: int, dim: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__()
        self.c = nn.Conv2d(dim_in, dim, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.GroupNorm(1, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.c(x))


class Stem(nn.Module):
    def __init__(self, dim_in: int, dim: int):
        super().__init__()
        layers = [ConvNorm(dim_in, dim, 3, 2), nn.GELU(), ConvNorm(dim, dim, 3), nn.GELU(), ConvNorm(dim, dim, 3, 2)]
        self.conv = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(dim, eps=1e-5)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x = self.conv(x)
        return self.norm(to_tokens(x)), (x.shape[2], x.shape[3])


class Downsample(nn.Module):
    def __init__(self, dim_in: int, dim: int):
        super().__init__()
        self.conv1 = ConvNorm(dim_in, dim, 1)
        self.conv2 = ConvNorm(dim, dim, 3, 2, dim)
        self.conv3 = ConvNorm(dim, dim, 1)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        x = self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(to_image(x, grid))))))
        return to_tokens(x), (x.shape[2], x.shape[3])


class DepthwiseConv(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return to_tokens(self.dwconv(to_image(x, grid)))


class Mlp(nn.Module):
    def __init__(self, dim: int, ratio: float):
        super().__init__()
        self.fc1 = nn.Linear(dim, int(dim * ratio))
        self.dwconv = DepthwiseConv(int(dim * ratio))
        self.fc2 = nn.Linear(int(dim * ratio), dim)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        x = self.fc1(x)
        return self.fc2(F.gelu(x + self.dwconv(x, grid)))


class Attention(nn.Module):
    """What the three attentions share: the local positional term and the output projection."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.lepe_linear = nn.Linear(dim, dim)
        self.lepe_conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.proj = nn.Linear(dim, dim)

    def finish(self, out: Tensor, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.proj(out + to_tokens(self.lepe_conv(to_image(self.lepe_linear(x), grid))))


class HybridAttention(Attention):
    def __init__(self, dim: int, heads: int, reduction: int, window: int, coarse: str):
        super().__init__(dim, heads // 2)
        self.reduction, self.window, self.coarse = reduction, window, coarse
        self.sr = nn.Conv2d(dim, dim, reduction, reduction)
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.q1 = nn.Linear(dim, dim // 2)
        self.kv1 = nn.Linear(dim, dim)
        self.q2 = nn.Linear(dim, dim // 2)
        self.kv2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        (H, W), r, w = grid, self.reduction, self.window
        image = F.pad(to_image(x, grid), (0, -W % r, 0, -H % r))
        reduced = self.sr(image)
        small = tuple(reduced.shape[2:])
        k, v = self.kv1(F.gelu(self.norm(to_tokens(reduced)))).chunk(2, dim=-1)
        if self.coarse == "window":
            far, received = self._windows(self.q1(x), k, v, grid, small, w * r, w)
            received = received / (w * r) ** 2
        else:
            far, weights = self._attend(self.q1(x), k, v)
            received = weights.detach().mean(dim=(1, 2))
        copied = F.interpolate(received.reshape(-1, 1, *small), scale_factor=r, mode="nearest")[:, 0, :H, :W]
        fine_k, fine_v = self.kv2(x).chunk(2, dim=-1)
        near, fine = self._windows(self.q2(x), fine_k, fine_v, grid, grid, w, w)
        significance = copied.reshape(-1, H * W) + fine / w**2
        return self.finish(torch.cat([far, near], dim=-1), x, grid), significance

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, real_k: Tensor | None = None) -> tuple[Tensor, Tensor]:
        q, k, v = (heads_first(t, self.heads) for t in (q, k, v))
        return softmax_attention(q, k, v, real_k)

    def _windows(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_grid: tuple[int, int],
        k_grid: tuple[int, int],
        q_side: int,
        k_side: int,
    ) -> tuple[Tensor, Tensor]:
        """Attention window by window, and each key's received attention: mean over heads, sum over real queries."""
        B = q.shape[0]
        real_q = cut(q.new_ones(B, q.shape[1], 1), q_grid, q_side)  # (B * windows, queries, 1)
        real_k = cut(q.new_ones(B, k.shape[1], 1), k_grid, k_side)[..., 0] > 0
        q, k, v = cut(q, q_grid, q_side), cut(k, k_grid, k_side), cut(v, k_grid, k_side)
        out, weights = self._attend(q, k, v, real_k)
        received = (weights.detach() * real_q[:, None]).sum(2).mean(1)
        return uncut(out, q_grid, q_side), uncut(received[..., None], k_grid, k_side)[..., 0]


class GuidedAttention(Attention):
    def __init__(self, dim: int, stage: StageConfig):
        super().__init__(dim, stage.heads)
        self.regions = stage.regions
        self.q = nn.Linear(dim, dim)
        self.kv1 = nn.Linear(dim, dim)
        self.kv2 = nn.Linear(dim, dim)
        for i, region in enumerate(stage.regions, start=1):
            setattr(self, f"f{i}", nn.Linear(region.rate, 1))

    def condense(self, x: Tensor, significance: Tensor) -> Tensor:
        """(B, N, C) tokens and (B, N) significance -> (B, few, C)."""
        order = sort_tokens(significance)
        ordered = x.gather(1, order[..., None].expand_as(x))
        lengths = region_lengths(x.shape[1], [region.share for region in self.regions])
        out = []
        for i, tokens in enumerate(ordered.split(lengths, dim=1), start=1):
            rate = self.regions[i - 1].rate
            if tokens.shape[1] % rate:
                tokens = tokens[:, group_positions(tokens.shape[1], rate, x.device).flatten()]
            members = tokens.reshape(tokens.shape[0], -1, rate, tokens.shape[2]).transpose(2, 3)  # (B, G, C, r)
            out.append(getattr(self, f"f{i}")(members).squeeze(-1))
        return torch.cat(out, dim=1)

    def forward(self, x: Tensor, significance: Tensor, grid: tuple[int, int]) -> Tensor:
        column_major = to_image(x, grid).transpose(2, 3).contiguous()
        few_rows = self.condense(x, significance)
        few_cols = self.condense(to_tokens(column_major), significance.reshape(-1, *grid).transpose(1, 2).flatten(1))
        k1, v1 = self.kv1(few_rows).chunk(2, dim=-1)
        k2, v2 = self.kv2(few_cols).chunk(2, dim=-1)
        q1, q2 = self.q(x).chunk(2, dim=-1)
        out1, _ = softmax_attention(*(heads_first(t, self.heads // 2) for t in (q1, k1, v1)))
        out2, _ = softmax_attention(*(heads_first(t, self.heads // 2) for t in (q2, k2, v2)))
        return self.finish(torch.cat([out1, out2], dim=-1), x, grid)


class PlainAttention(Attention):
    def __init__(self, dim: int, heads: int):
        super().__init__(dim, heads)
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        k, v = self.kv(x).chunk(2, dim=-1)
        out, _ = softmax_attention(*(heads_first(t, self.heads) for t in (self.q(x), k, v)))
        return self.finish(out, x, grid)


class Block(nn.Module):
    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, mlp_ratio)

    def forward(self, x: Tensor, significance: Tensor | None, grid: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        if isinstance(self.attn, HybridAttention):
            out, significance = self.attn(self.norm1(x), grid)
        elif isinstance(self.attn, GuidedAttention):
            out = self.attn(self.norm1(x), significance, grid)
        else:
            out = self.attn(self.norm1(x), grid)
        x = x + out
        return x + self.mlp(self.norm2(x), grid), significance


class Plain(nn.Module):
    """The network of a config (without drop path and dropout), with parameters named as in released checkpoints.

    Raises:
        ValueError: the config's image size is not square, or it has no classifier; the released layout knows neither.
    """

    def __init__(self, config: SGFormerConfig):
        super().__init__()
        if config.img_size[0] != config.img_size[1] or not config.num_classes:
            raise ValueError(f"the released layout has a square position table and a classifier (got {config})")
        self.config, dims = config, [stage.dim for stage in config.stages]
        self.side = -(-config.img_size[0] // 4)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.side**2, dims[0]))
        self.patch_embed1 = Stem(config.in_chans, dims[0])
        for s, stage in enumerate(config.stages, start=1):
            if s > 1:
                setattr(self, f"patch_embed{s}", Downsample(dims[s - 2], stage.dim))
            attentions = [self._attention(stage, i) for i in range(stage.depth)]
            setattr(self, f"block{s}", nn.ModuleList(Block(stage.dim, a, config.mlp_ratio) for a in attentions))
            setattr(self, f"norm{s}", nn.LayerNorm(stage.dim, eps=1e-6))
        self.head = nn.Linear(dims[-1], config.num_classes)
        self.grad_checkpointing = False
        self.apply(init_module)

    def _attention(self, stage: StageConfig, i: int) -> nn.Module:
        if stage.reduction is None:
            return PlainAttention(stage.dim, stage.heads)
        if i % 2:
            return GuidedAttention(stage.dim, stage)
        return HybridAttention(stage.dim, stage.heads, stage.reduction, self.config.window, self.config.coarse)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def position(self, grid: tuple[int, int]) -> Tensor:
        side = self.side
        if grid == (side, side):
            return self.pos_embed
        table = self.pos_embed.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        return to_tokens(F.interpolate(table, size=grid, mode="bicubic", align_corners=False))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, num_classes)."""
        x, grid = self.patch_embed1(x)
        x = x + self.position(grid)
        for s in range(1, len(self.config.stages) + 1):
            if s > 1:
                x, grid = getattr(self, f"patch_embed{s}")(x, grid)
            significance = None
            for block in getattr(self, f"block{s}"):
                if self.grad_checkpointing and self.training:
                    x, significance = checkpoint(block, x, significance, grid, use_reentrant=False)
                else:
                    x, significance = block(x, significance, grid)
            x = getattr(self, f"norm{s}")(x)
        return self.head(x.mean(dim=1))


def from_ours(model: sgformer.SGFormer) -> Plain:
    """The plain network with a copy of this model's weights, in its dtype and mode."""
    weights = to_released(model)
    plain = Plain(model.config).to(weights["head.weight"].dtype)
    plain.load_state_dict(weights)
    return plain.train(model.training)


def create(size: str = "s", **config: object) -> Plain:
    """A plain network of a published size with fresh weights: what ``sgformer bench --models plain_s`` runs."""
    return Plain(sgformer.models.config.VARIANTS[f"sgformer_{size}"].replace(**config))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sgformer_s")
    parser.add_argument("--image-size", type=int, nargs="+", default=[224, 250])
    args = parser.parse_args()
    torch.manual_seed(0)
    ours = sgformer.create_model(args.model, dtype=torch.float64).eval()
    plain = from_ours(ours)
    for size in args.image_size:
        image = torch.randn(1, 3, size, size, dtype=torch.float64)
        with torch.no_grad():
            a, b = ours(image), plain(image)
        print(f"{args.model} at {size}: largest relative difference {((a - b).abs().max() / b.abs().max()).item():.1e}")


if __name__ == "__main__":
    main()
