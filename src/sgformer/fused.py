"""What :func:`sgformer.optimize` puts in the place of a network's parts: the same functions, for inference only.

``Native...`` are made of the kernels of :mod:`sgformer.ops.native`, the others of torch's own operations.
Legend: B batch, H x W token grid, C channels. Tokens are (B, H, W, C).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from sgformer.backbone import (
    Block,
    HybridScaleAttention,
    PlainAttention,
    SelfGuidedAttention,
    Stage,
    windows_of,
)
from sgformer.guidance import LinearAggregation
from sgformer.layers import ConvNorm, DepthwiseConv, Mlp, Stem
from sgformer import ops
from sgformer.ops import native

PART = 1 << 21  # floats: of tensors larger than these 8 MiB, fewer images are taken at a time


class FoldedMlp(nn.Module):
    """The MLP with ``x + depthwise(x)`` as one convolution."""

    def __init__(self, mlp: Mlp):
        super().__init__()
        self.fc1, self.conv, self.act, self.fc2 = mlp.fc1, mlp.conv, nn.GELU(), mlp.fc2
        self.conv.weight[:, :, 1, 1] += 1

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.conv(self.fc1(x))))


class InplaceGELU(nn.Module):
    """GELU that overwrites its input: one large tensor less to ask the system for."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten.gelu_(x)


class PackedLinear(nn.Module):
    """A linear map, or a 1 x 1 convolution of tokens, with its weight in oneDNN's own layout, which saves the packing at
    every call."""

    def __init__(self, linear: nn.Linear | nn.Conv2d):
        super().__init__()
        weight = linear.weight.detach().flatten(1)
        self.out_features, self.in_features = weight.shape
        self.bias = linear.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class NativeMlp(nn.Module):
    """The MLP with all that lies between its linear maps in one pass, in place."""

    def __init__(self, mlp: Mlp):
        super().__init__()
        self.fc1, self.fc2 = NativeLinear(mlp.fc1), NativeLinear(mlp.fc2)
        self.weight, self.bias = native.tap_major(mlp.conv.weight), mlp.conv.bias
        self.weight[4] += 1

    def add_to(self, out: Tensor, x: Tensor) -> Tensor:
        """``out`` plus the MLP of x, in place."""
        return self.fc2(native.depthwise_gelu_(self.fc1(x), self.weight, self.bias), add=out, out=out)


class NativeNorm(nn.Module):
    """LayerNorm."""

    def __init__(self, norm: nn.LayerNorm):
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor, add: Tensor | None = None, gelu: bool = False) -> Tensor:
        return native.layer_norm(x, self.weight, self.bias, self.eps, add, gelu)


class NativeLinear(nn.Module):
    """A linear map, or a 1 x 1 convolution, of tokens; (..., in) to (..., out), plus ``add``."""

    def __init__(self, linear: nn.Linear | nn.Conv2d):
        super().__init__()
        weight = linear.weight.detach().flatten(1)
        self.out_features, self.in_features = weight.shape
        self.weight, self.bias = native.panels(weight, linear.bias)

    def forward(self, x: Tensor, add: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        if x.dim() != 4:
            grid = x.contiguous().view(1, 1, -1, self.in_features)
            return self(grid).view(*x.shape[:-1], self.out_features)
        return native.linear(x, self.weight, self.bias, self.out_features, add, out)


class NativeConv(nn.Module):
    """A convolution, (B, H, W, C) to the same. Where its last step sticks out, what lies outside is zero."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.kernel, self.stride, self.padding = conv.kernel_size[0], conv.stride[0], conv.padding[0]
        self.out_channels, self.groups = conv.out_channels, conv.groups
        plain = (self.kernel, self.stride, self.padding, conv.bias) == (3, 1, 1, None)
        self.winograd = plain and conv.in_channels % native.lanes() == conv.out_channels % native.lanes() == 0
        if self.groups > 1:
            self.weight = native.tap_major(conv.weight)
        elif self.winograd:
            self.weight = native.winograd_panels(conv.weight)
        else:
            self.weight, self.bias = native.panels(conv.weight.detach().permute(0, 2, 3, 1).flatten(1), conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.groups > 1:
            return native.depthwise_halve(x, self.weight)
        if self.winograd:
            return native.winograd(x, self.weight, self.out_channels)
        return native.conv(x, self.weight, self.bias, self.out_channels, self.kernel, self.stride, self.padding)


class NativeConvNorm(nn.Module):
    """Convolution, GroupNorm and GELU of :class:`~sgformer.layers.ConvNorm`, the last two in place; NCHW."""

    def __init__(self, block: ConvNorm):
        super().__init__()
        self.norm, self.gelu = block.norm, isinstance(block.act, nn.GELU)
        self.conv = NativeLinear(block.conv) if block.conv.kernel_size == (1, 1) else NativeConv(block.conv)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x.permute(0, 2, 3, 1))
        return native.group_norm_(x, self.norm.weight, self.norm.bias, self.norm.eps, self.gelu).permute(0, 3, 1, 2)


class NativeHybrid(nn.Module):
    """:class:`~sgformer.backbone.HybridScaleAttention`; heads write side by side, and the local term is added there."""

    def __init__(self, attn: HybridScaleAttention):
        super().__init__()
        self.heads, self.reduction, self.window, self.coarse = attn.heads, attn.reduction, attn.window, attn.coarse
        self.reduce, self.reduce_norm = NativeConv(attn.reduce), NativeNorm(attn.reduce_norm)
        self.kv_coarse, self.proj_in, self.proj = map(NativeLinear, (attn.kv_coarse, attn.proj_in, attn.proj))
        self.weight, self.bias = native.tap_major(attn.local.weight), attn.local.bias

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        C = x.shape[-1]
        q_coarse, q_fine, kv_fine, local = self.proj_in(x).split((C // 2, C // 2, C, C), dim=-1)
        out = torch.empty_like(x)

        far, near = out.chunk(2, dim=-1)
        reduced = self.reduce_norm(self.reduce(x), gelu=True)
        coarse = self._look(q_coarse, self.kv_coarse(reduced), self.reduction, self.coarse == "global", far)
        fine = self._look(q_fine, kv_fine, 1, False, near)
        return self.proj(native.depthwise_add_(out, local, self.weight, self.bias)), coarse, fine

    def _look(self, q: Tensor, kv: Tensor, scale: int, everywhere: bool, out: Tensor) -> Tensor:
        return native.attend_windows(
            q, kv, self.heads, *windows_of(q, kv, scale, self.window, everywhere), out, spread=scale
        )


class NativeAggregation(nn.Module):
    """:class:`~sgformer.guidance.LinearAggregation`."""

    def __init__(self, aggregate: LinearAggregation):
        super().__init__()
        self.shares, self.rates = aggregate.shares, aggregate.rates
        self.weights, self.bias = [m.weight for m in aggregate], [m.bias for m in aggregate]

    def forward(self, x: Tensor, significance: Tensor) -> tuple[Tensor, list[Tensor]]:
        groups = ops.group_tokens(native.sort_tokens(significance.contiguous()), self.shares, self.rates)
        return native.aggregate(x, groups, self.weights, self.bias), groups


class NativeGuided(nn.Module):
    """:class:`~sgformer.backbone.SelfGuidedAttention` with softmax attention."""

    def __init__(self, attn: SelfGuidedAttention):
        super().__init__()
        self.heads, self.describe = attn.heads, attn.aggregate.describe
        self.aggregate = (
            NativeAggregation(attn.aggregate) if type(attn.aggregate) is LinearAggregation else attn.aggregate
        )
        self.kv, self.proj_in, self.proj = map(NativeLinear, (attn.kv, attn.proj_in, attn.proj))
        self.weight, self.bias = native.tap_major(attn.local.weight), attn.local.bias

    def forward(self, x: Tensor, significance: Tensor) -> tuple[Tensor, list[Tensor]]:
        q, local = self.proj_in(x).chunk(2, dim=-1)
        few, grouped = self.aggregate(x.flatten(1, 2), significance.flatten(1))
        out = native.attend(q, self.kv(few), self.heads)
        return self.proj(native.depthwise_add_(out, local, self.weight, self.bias)), grouped


class NativePlain(nn.Module):
    """:class:`~sgformer.backbone.PlainAttention`."""

    def __init__(self, attn: PlainAttention):
        super().__init__()
        self.heads = attn.heads
        self.proj_in, self.proj = map(NativeLinear, (attn.proj_in, attn.proj))
        self.weight, self.bias = native.tap_major(attn.local.weight), attn.local.bias

    def forward(self, x: Tensor) -> Tensor:
        C = x.shape[-1]
        q, kv, local = self.proj_in(x).split((C, 2 * C, C), dim=-1)
        out, grid = torch.empty_like(x), (x.shape[1], x.shape[2])
        native.attend_windows(q, kv, self.heads, grid, grid, out)
        return self.proj(native.depthwise_add_(out, local, self.weight, self.bias))


def make_native(model: nn.Module) -> None:
    """Put the native parts into a frozen network on the CPU in float32, wherever there is one for the part."""
    for module in list(model.modules()):
        if isinstance(module, Block):
            module.add = functools.partial(_add_in_place, module)
        if isinstance(module, Stem | Stage):
            module.forward = functools.partial(_in_parts, module, module.forward)
        for name, child in module.named_children():
            kind = _NATIVE.get(type(child))
            if isinstance(child, SelfGuidedAttention) and not _is_plain(child):
                kind = None
            if kind is not None:
                setattr(module, name, kind(child))


_NATIVE: dict[type[nn.Module], Any] = {
    Mlp: NativeMlp,
    ConvNorm: NativeConvNorm,
    HybridScaleAttention: NativeHybrid,
    SelfGuidedAttention: NativeGuided,
    PlainAttention: NativePlain,
    nn.LayerNorm: NativeNorm,
}


def _is_plain(attn: SelfGuidedAttention) -> bool:
    return attn.attend is ops.attend and isinstance(attn.local, DepthwiseConv)


def _in_parts(module: Stem | Stage, forward: Any, x: Tensor, *inspected: Any) -> Tensor:
    """The forward of a stem or stage, on as many images at a time as have their widest tensors in ``PART``.

    Smaller tensors stay in the cache, and freed ones with the process: what is larger the system takes and gives anew.
    """
    if isinstance(module, Stem):
        floats = module.conv1.norm.num_channels * x[0, 0].numel() // 4
    else:
        stride = 1 if isinstance(module.downsample, nn.Identity) else 4
        floats = max(x[0].numel(), module.blocks[0].mlp.fc1.out_features * x[0, ..., 0].numel() // stride)
    step = max(1, PART // floats)
    if step >= len(x) or any(argument is not None for argument in inspected[:1]):
        return forward(x, *inspected)
    return torch.cat([forward(few) for few in x.split(step)])


def _add_in_place(block: Block, x: Tensor, out: Tensor) -> Tensor:
    """``Block.add``; ``out`` is overwritten, which is the attention's own, and not ``x``, which others may hold."""
    return block.mlp.add_to(out, block.norm2(out, add=x))
