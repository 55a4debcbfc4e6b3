"""Building blocks of the network: stem, position table, downsampling, MLP, parameter initialisation.

Legend: B batch, H x W token grid, C channels. Tokens are (B, H, W, C), a channels-last image to convolutions.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor, fx

from sgformer import ops
from sgformer.ops.sizes import known


class ConvNorm(nn.Sequential):
    """Convolution without bias, GroupNorm with one group, and a GELU if `act`. NCHW."""

    def __init__(self, dim_in: int, dim: int, kernel: int, stride: int = 1, groups: int = 1, act: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(dim_in, dim, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.norm = nn.GroupNorm(1, dim)
        self.act = nn.GELU() if act else nn.Identity()


class PositionTable(nn.Module):
    """A learned position embedding per grid cell, initialised to 2-D sine-cosine and resized to other grids."""

    def __init__(self, dim: int, grid: tuple[int, int]):
        super().__init__()
        self.table = nn.Parameter(torch.empty(*grid, dim))

    @torch.no_grad()
    def init_weights(self) -> None:
        H, W, dim = self.table.shape
        frequency = 10000 ** -(torch.arange(dim // 4, device=self.table.device, dtype=torch.float64) / (dim // 4))

        def waves(n: int) -> Tensor:  # (n, dim / 2)
            angle = torch.arange(n, device=frequency.device)[:, None] * frequency
            return torch.cat([angle.sin(), angle.cos()], dim=1)

        rows, cols = waves(H)[:, None].expand(H, W, -1), waves(W)[None].expand(H, W, -1)
        self.table.copy_(torch.cat([cols, rows], dim=-1))

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[1], x.shape[2]
        if torch.jit.is_tracing():  # windows and regions become those of this grid: at others, the sum below shall fail
            H, W = int(H), int(W)
        return x + resize_table(self.table, (H, W))


@fx.wrap
def resize_table(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resize a (H, W, C) position table to ``grid`` bicubically; returns the table itself if the grid is the same."""
    if known(table.shape[0] == grid[0]) and known(table.shape[1] == grid[1]):
        return table
    resized = F.interpolate(table.permute(2, 0, 1)[None], size=grid, mode="bicubic", align_corners=False)
    return resized[0].permute(1, 2, 0)


class Stem(nn.Module):
    """The image at stride 4, with its positions: (B, in_chans, H, W) -> (B, C, ceil(H / 4), ceil(W / 4))."""

    def __init__(self, in_chans: int, dim: int, img_size: tuple[int, int]):
        super().__init__()
        self.conv1 = ConvNorm(in_chans, dim, 3, stride=2)
        self.conv2 = ConvNorm(dim, dim, 3)
        self.conv3 = ConvNorm(dim, dim, 3, stride=2, act=False)
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.position = PositionTable(dim, (-(-img_size[0] // 4), -(-img_size[1] // 4)))

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # channels last, so that the tokens need no copy
        x = self.conv3(self.conv2(self.conv1(x)))
        return self.position(self.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


class Downsample(nn.Module):
    """Halves the grid between stages: (B, H, W, C_in) -> (B, ceil(H / 2), ceil(W / 2), C)."""

    def __init__(self, dim_in: int, dim: int):
        super().__init__()
        self.expand = ConvNorm(dim_in, dim, 1)
        self.reduce = ConvNorm(dim, dim, 3, stride=2, groups=dim)
        self.mix = ConvNorm(dim, dim, 1, act=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.reduce(self.expand(x.permute(0, 3, 1, 2)))).permute(0, 2, 3, 1)


# Tools change layers by their type: they quantize, prune and adapt every linear layer, and load its weights when it is
# called. So a layer with torch's type is used as torch's, called, on tensors laid out as torch's.
class DepthwiseConv(nn.Conv2d):
    """3 x 3 depthwise convolution of images, (B, C, H, W) to the same; of tokens with :func:`convolve`."""

    def __init__(self, dim: int):
        super().__init__(dim, dim, 3, padding=1, groups=dim)


def convolve(conv: nn.Module, x: Tensor) -> Tensor:
    """A convolution of tokens, (B, H, W, C_in) -> (B, H', W', C)."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class ResidualDepthwiseConv(nn.Module):
    """x + 3 x 3 depthwise convolution of x, of tokens (B, H, W, C), in one pass by adding 1 to each centre tap."""

    def __init__(self, dim: int):
        super().__init__()
        conv = DepthwiseConv(dim)  # its draws, so that a seed keeps its network
        self.weight, self.bias = conv.weight, conv.get_parameter("bias")

    def forward(self, x: Tensor) -> Tensor:
        image = x.permute(0, 3, 1, 2)
        return convolve_plus(image, self.weight, self.bias).permute(0, 2, 3, 1)


def convolve_plus(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x + 3 x 3 depthwise convolution of x, (B, C, H, W)."""
    if torch.onnx.is_in_onnx_export():  # its operator wants a constant kernel
        return x + F.conv2d(x, weight, bias, padding=1, groups=x.shape[1])
    weight = weight + F.pad(weight.new_ones(1, 1, 1, 1), (1, 1, 1, 1))
    return F.conv2d(x, weight, bias, padding=1, groups=x.shape[1])


class WeightedSum(nn.Module):
    """A learned weight for each of r members and a bias, the same for all channels: (B, G, r, C) -> (B, G, C).

    Other numbers of members than r get resampled weights.
    """

    def __init__(self, members: int):
        super().__init__()
        linear = nn.Linear(members, 1)  # its draws, so that a seed keeps its network
        self.members, self.weight, self.bias = members, linear.weight, linear.bias  # (1, r), (1,)

    def forward(self, x: Tensor, members: int | None = None) -> Tensor:
        return ops.weighted_sum(x, self.spread(members), self.bias)

    def spread(self, members: int | None) -> Tensor:
        """(1, members): the weights for so many members; by default, and for r, the parameter itself."""
        return self.weight if members in (None, self.members) else ops.resample_weights(self.weight, members)


class Mlp(nn.Module):
    """fc1, GELU of (h + depthwise convolution of h), fc2."""

    def __init__(self, dim: int, ratio: float):
        super().__init__()
        hidden = int(dim * ratio)
        self.fc1 = nn.Linear(dim, hidden)
        self.conv = ResidualDepthwiseConv(hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.conv(self.fc1(x))))


class DropPath(nn.Module):
    """Stochastic depth of (B, H, W, C): in training, each image's residual branch is left out with this probability.

    The draws are those of timm's module of the same name; timm itself would cost seconds at every `sgformer predict`.
    """

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.drop_prob):
            return x
        kept = 1 - self.drop_prob
        return x * torch.empty_like(x[:, :1, :1, :1]).bernoulli_(kept).div_(kept)


class ClassifierHead(nn.Module):
    """Pooling, dropout and a linear classifier, with the interface of timm's: (B, C, H, W) -> (B, num_classes).

    Args:
        dim: channels C.
        num_classes: 0 leaves the classifier out.
        global_pool: "avg"; "" pools nothing, for networks without classifier; or another name of timm's.
        drop_rate: probability of dropout before the classifier.
    """

    def __init__(self, dim: int, num_classes: int, global_pool: str = "avg", drop_rate: float = 0.0):
        super().__init__()
        self.in_features = dim
        self.drop = nn.Dropout(drop_rate)
        self.reset(num_classes, global_pool)

    def reset(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier, and another pooling if one is given."""
        if global_pool is not None:
            if not global_pool and num_classes:
                raise ValueError("a classifier needs pooled features (got global_pool='' and num_classes above 0)")
            self.global_pool = _pooling(global_pool)
        self.num_features = self.in_features * self.global_pool.feat_mult()
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.drop(self.global_pool(x))
        return x if pre_logits else self.fc(x)


class AveragePool(nn.Module):
    """(B, C, H, W) -> (B, C); or nothing."""

    def __init__(self, pool_type: str):
        super().__init__()
        self.pool_type = pool_type

    def feat_mult(self) -> int:
        return 1

    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x, 1).flatten(1) if self.pool_type else x


def _pooling(name: str) -> Any:
    if name in ("avg", ""):
        return AveragePool(name)
    from timm.layers import SelectAdaptivePool2d  # costs seconds to import, and these kinds are rare

    return SelectAdaptivePool2d(pool_type=name, flatten=True)


def truncated_normal_(tensor: Tensor, std: float) -> Tensor:
    """Fill in place from a normal distribution cut off at -2 and 2, through the inverse error function.

    The same numbers as timm's `trunc_normal_`, which initialises the networks of this field; torch's draws others.
    """
    bound = math.erf(2 / (std * math.sqrt(2)))
    return tensor.uniform_(-bound, bound).erfinv_().mul_(std * math.sqrt(2)).clamp_(-2, 2)


@torch.no_grad()
def init_module(module: nn.Module) -> None:
    """Linear: truncated normal, std .02. Convolution: normal, std sqrt(2 / fan out). Biases 0, norms 1 and 0."""
    if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
        return  # nothing to fill; torch would import its compiler to do so, which costs seconds
    if isinstance(module, nn.Linear | WeightedSum):
        # Sampled in float32: in half precision the inverse error function overflows and leaves weights at the bounds.
        module.weight.copy_(truncated_normal_(torch.empty_like(module.weight, dtype=torch.float32), std=0.02))
    elif isinstance(module, nn.Conv2d | ResidualDepthwiseConv):
        groups = len(module.weight) if isinstance(module, ResidualDepthwiseConv) else module.groups
        fan_out = math.prod(module.weight.shape[2:]) * len(module.weight) // groups
        module.weight.normal_(0, math.sqrt(2 / fan_out))
    elif isinstance(module, nn.LayerNorm | nn.GroupNorm):
        module.weight.fill_(1)
    elif isinstance(module, PositionTable):
        module.init_weights()
    if getattr(module, "bias", None) is not None:
        module.bias.zero_()  # type: ignore[operator]


@contextlib.contextmanager
def created_on(device: torch.device | str | None, dtype: torch.dtype | None) -> Iterator[None]:
    """Create parameters on ``device`` and in ``dtype`` within the block; None keeps the default."""
    before = torch.get_default_dtype()
    try:
        if dtype is not None:
            torch.set_default_dtype(dtype)
        with torch.device(device) if device is not None else contextlib.nullcontext():
            yield
    finally:
        torch.set_default_dtype(before)
