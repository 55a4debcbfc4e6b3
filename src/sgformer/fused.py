"""What :func:`sgformer.optimize` puts in the place of a network's parts: the same functions, for inference only.

``Native...`` are made of the kernels of :mod:`sgformer.ops.native`, the others of torch's own operations.
Legend: B batch, H x W token grid, C channels. Tokens are (B, H, W, C).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from sgformer.backbone import Block, HybridScaleAttention, PlainAttention, SelfGuidedAttention, look
from sgformer.guidance import LinearAggregation
from sgformer.layers import ConvNorm, DepthwiseConv, Mlp
from sgformer import ops
from sgformer.ops import native

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
        self.fc1, self.fc2 = PackedLinear(mlp.fc1), PackedLinear(mlp.fc2)
        self.weight, self.bias = native.tap_major(mlp.conv.weight), mlp.conv.bias
        self.weight[4] += 1

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(native.depthwise_gelu_(self.fc1(x), self.weight, self.bias))


class NativeNorm(nn.Module):
    """LayerNorm."""

    def __init__(self, norm: nn.LayerNorm):
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        return native.layer_norm(x, self.weight, self.bias, self.eps, add)


class NativeConvNorm(nn.Module):
    """Convolution, GroupNorm and GELU of :class:`~sgformer.layers.ConvNorm`, the last two in place; NCHW."""

    def __init__(self, block: ConvNorm):
        super().__init__()
        self.conv, self.norm, self.gelu = block.conv, block.norm, isinstance(block.act, nn.GELU)
        if self.conv.kernel_size == (1, 1):
            self.conv = PackedLinear(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.conv, PackedLinear):
            x = self.conv(x.permute(0, 2, 3, 1))
        else:
            x = self.conv(x).permute(0, 2, 3, 1).contiguous()
        x = native.group_norm_(x, self.norm.weight, self.norm.bias, self.norm.eps, self.gelu)
        return x.permute(0, 3, 1, 2)


class NativeReduce(nn.Module):
    """``reduce_grid`` with the convolution, whose patches do not overlap, as a linear map of patches."""

    def __init__(self, conv: nn.Conv2d, norm: nn.LayerNorm):
        super().__init__()
        self.rate, self.norm = conv.kernel_size[0], NativeNorm(norm)
        linear = nn.Linear(self.rate**2 * conv.in_channels, conv.out_channels)
        linear.weight.data, linear.bias.data = conv.weight.data.permute(0, 2, 3, 1).flatten(1), conv.bias.data
        self.map = PackedLinear(linear)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        r = self.rate
        if H % r or W % r:
            x = F.pad(x, (0, 0, 0, -W % r, 0, -H % r))
        patches = x.unflatten(2, (-1, r)).unflatten(1, (-1, r)).transpose(2, 3).reshape(B, -(-H // r), -(-W // r), -1)
        return torch.ops.aten.gelu_(self.norm(self.map(patches)))


class NativeHybrid(nn.Module):
    """:class:`~sgformer.backbone.HybridScaleAttention`; heads write side by side, and the local term is added there."""

    def __init__(self, attn: HybridScaleAttention):
        super().__init__()
        self.heads, self.reduction, self.window, self.coarse = attn.heads, attn.reduction, attn.window, attn.coarse
        self.reduce = NativeReduce(attn.reduce, attn.reduce_norm)
        self.kv_coarse, self.proj_in, self.proj = map(PackedLinear, (attn.kv_coarse, attn.proj_in, attn.proj))
        self.weight, self.bias = native.tap_major(attn.local.weight), attn.local.bias

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        C = x.shape[-1]
        q_coarse, q_fine, kv_fine, local = self.proj_in(x).split((C // 2, C // 2, C, C), dim=-1)
        out = torch.empty_like(x)

        def attend(where: Tensor) -> Any:
            return functools.partial(native.attend_windows, out=where)

        far, near = out.chunk(2, dim=-1)
        kv_coarse, everywhere = self.kv_coarse(self.reduce(x)), self.coarse == "global"
        _, coarse = look(q_coarse, kv_coarse, self.heads, self.reduction, self.window, everywhere, attend(far))
        _, fine = look(q_fine, kv_fine, self.heads, 1, self.window, attend=attend(near))
        return self.proj(native.depthwise_add_(out, local, self.weight, self.bias)), coarse, fine


class NativeAggregation(nn.Module):
    """:class:`~sgformer.guidance.LinearAggregation`."""

    def __init__(self, aggregate: LinearAggregation):
        super().__init__()
        self.group = aggregate.group
        self.weights, self.bias = [m.weight for m in aggregate], [m.bias for m in aggregate]

    def forward(self, x: Tensor, significance: Tensor) -> tuple[Tensor, list[Tensor]]:
        groups = self.group(significance)
        return native.aggregate(x, groups, self.weights, self.bias), groups


class NativeGuided(nn.Module):
    """:class:`~sgformer.backbone.SelfGuidedAttention` with softmax attention."""

    def __init__(self, attn: SelfGuidedAttention):
        super().__init__()
        self.heads, self.describe = attn.heads, attn.aggregate.describe
        self.aggregate = NativeAggregation(attn.aggregate) if type(attn.aggregate) is LinearAggregation else attn.aggregate
        self.kv, self.proj_in, self.proj = map(PackedLinear, (attn.kv, attn.proj_in, attn.proj))
        self.weight, self.bias = native.tap_major(attn.local.weight), attn.local.bias

    def forward(self, x: Tensor, significance: Tensor) -> tuple[Tensor, list[Tensor]]:
        q, local = self.proj_in(x).chunk(2, dim=-1)
        few, grouped = self.aggregate(x.flatten(1, 2), significance.flatten(1))
        out = native.attend_few(q, self.kv(few), self.heads)
        return self.proj(native.depthwise_add_(out, local, self.weight, self.bias)), grouped


class NativePlain(nn.Module):
    """:class:`~sgformer.backbone.PlainAttention`."""

    def __init__(self, attn: PlainAttention):
        super().__init__()
        self.heads = attn.heads
        self.proj_in, self.proj = map(PackedLinear, (attn.proj_in, attn.proj))
        self.weight, self.bias = native.tap_major(attn.local.weight), attn.local.bias

    def forward(self, x: Tensor) -> Tensor:
        _, H, W, C = x.shape
        q, kv, local = self.proj_in(x).split((C, 2 * C, C), dim=-1)
        out, _ = native.attend_windows(q, kv, self.heads, (H, W), (H, W), count=False)
        return self.proj(native.depthwise_add_(out, local, self.weight, self.bias))


def make_native(model: nn.Module) -> None:
    """Put the native parts into a frozen network on the CPU in float32, wherever there is one for the part."""
    for module in list(model.modules()):
        if isinstance(module, Block):
            module.add = functools.partial(_add_in_place, module)
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


def _add_in_place(block: Block, x: Tensor, out: Tensor) -> Tensor:
    """``Block.add``; ``out`` is overwritten, which is the attention's own, and not ``x``, which others may hold."""
    normed = block.norm2(out, add=x)
    return block.mlp(normed).add_(out)
