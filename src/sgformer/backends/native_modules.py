"""The modules that :func:`sgformer.optimize` puts into a network: the same functions, for inference only.

``Native...`` use the kernels of :mod:`sgformer.backends.native`, the others torch's own operations.
Legend: B batch, H x W token grid, C channels. Tokens are (B, H, W, C).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from sgformer import ops
from sgformer.backends import native
from sgformer.backends.eligibility import readable, untouched
from sgformer.models.backbone import Block, GuidedBlock, HybridBlock, PlainBlock, Stage
from sgformer.models.layers import (
    ConvNorm,
    DepthwiseConv,
    Downsample,
    Mlp,
    PositionTable,
    Stem,
    convolve,
    resize_table,
)
from sgformer.models.significance import LinearAggregation
from sgformer.ops import TokenGroups


class FoldedMlp(nn.Module):
    """The MLP with ``x + depthwise(x)`` as one convolution."""

    def __init__(self, mlp: Mlp):
        super().__init__()
        self.fc1, self.act, self.fc2 = mlp.fc1, nn.GELU(), mlp.fc2
        with torch.device("meta"):
            self.conv = DepthwiseConv(len(mlp.conv.weight))
        self.conv.weight, self.conv.bias = mlp.conv.weight, mlp.conv.bias
        self.conv.weight[:, :, 1, 1] += 1

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(convolve(self.conv, self.fc1(x))))


class InplaceGELU(nn.Module):
    """GELU that overwrites its input, which saves allocating a large tensor."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten.gelu_(x)


class KeptPositions(nn.Module):
    """A position table that keeps what it was last resized to: a twentieth of a small network's time otherwise."""

    def __init__(self, position: PositionTable):
        super().__init__()
        self.table = position.table
        self._kept: tuple[Any, Any, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        kept, state = self._kept, (x.shape[1], x.shape[2], self.table._version, self.table.device)
        if kept is None or kept[0] is not self.table or kept[1] != state:
            with torch.inference_mode(False), torch.no_grad():
                resized = resize_table(self.table, (x.shape[1], x.shape[2])).contiguous()
            self._kept = kept = self.table, state, resized  # in one step, as threads may share the network
        return x + kept[2]


class PackedLinear(nn.Module):
    """A linear map with its weight in oneDNN's own layout, which saves packing it at every call."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()  # within autocast, torch's outputs are half precision
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class NativeNorm(nn.Module):
    """LayerNorm."""

    def __init__(self, norm: nn.LayerNorm):
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        return native.layer_norm(x.contiguous(), self.weight, self.bias, self.eps)


class NativeLinear(nn.Module):
    """A linear map, or a 1 x 1 convolution, of tokens; (..., in) to (..., out)."""

    def __init__(self, linear: nn.Linear | nn.Conv2d, kind: int = 0):
        super().__init__()
        weight, self.kind = linear.weight.detach().flatten(1), kind
        self.out_features, self.in_features = weight.shape
        self.weight, self.bias = native.narrow_panels(weight, linear.bias, kind)

    def forward(self, x: Tensor) -> Tensor:
        grid = x.float().contiguous().view(1, 1, -1, self.in_features)  # see PackedLinear
        out = native.narrow_linear(grid, self.weight, self.bias, self.out_features, self.kind)
        return out.view(*x.shape[:-1], self.out_features)


class NativeConv(nn.Module):
    """A convolution of (B, H, W, C), zero-padded where its last window extends beyond the grid."""

    def __init__(self, conv: nn.Conv2d, kind: int = 0):
        super().__init__()
        self.kind = kind if conv.groups == 1 and kind == native.BF16_TILES else 0  # others gain nothing
        self.kernel, self.stride, self.padding = conv.kernel_size[0], conv.stride[0], conv.padding[0]
        self.out_channels, self.groups = conv.out_channels, conv.groups
        plain = (self.kernel, self.stride, self.padding, conv.bias) == (3, 1, 1, None)
        self.winograd = (
            not self.kind and plain and conv.in_channels % native.lanes() == conv.out_channels % native.lanes() == 0
        )
        self.bias: Tensor | None = None
        if self.groups > 1:
            self.weight = native.tap_major(conv.weight)
        elif self.winograd:
            self.weight = native.winograd_panels(conv.weight)
        elif self.kind:
            self.weight, self.bias = native.narrow_panels(native.conv_matrix(conv.weight), conv.bias, self.kind)
        else:
            self.weight, self.bias = native.conv_panels(conv.weight, conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.groups > 1:
            return native.depthwise_stride2(x, self.weight)
        if self.winograd:
            return native.winograd(x, self.weight, self.out_channels)
        shape = self.out_channels, self.kernel, self.stride
        if self.kind:
            return native.narrow_conv(x, self.weight, self.bias, *shape, self.kind, self.padding)
        return native.conv(x, self.weight, self.bias, *shape, self.padding)


class NativeConvNorm(nn.Module):
    """Convolution, GroupNorm and GELU of :class:`~sgformer.models.layers.ConvNorm`, the last two in place; NCHW."""

    def __init__(self, block: ConvNorm, kind: int = 0):
        super().__init__()
        self.norm, self.gelu = block.norm, isinstance(block.act, nn.GELU)
        self.conv = NativeLinear(block.conv, kind) if block.conv.kernel_size == (1, 1) else NativeConv(block.conv, kind)

    def layer(self) -> tuple[tuple[Any, ...], tuple[Tensor | None, ...]]:
        """For ``native.ConvNorms``."""
        conv, norm = self.conv, self.norm
        if isinstance(conv, NativeLinear):
            how = 1, 1, 0, conv.out_features, False, False, conv.kind
        else:
            how = (
                *(conv.kernel, conv.stride, conv.padding, conv.out_channels),
                *(conv.groups > 1, conv.winograd, conv.kind),
            )
        # Copies, as addresses are kept and torch moves parameters, for one in `share_memory`.
        return (*how, self.gelu, norm.eps), (conv.weight, conv.bias, *(t.detach().clone() for t in norm.parameters()))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x.permute(0, 2, 3, 1).contiguous())
        x = native.group_norm(x, self.norm.weight, self.norm.bias, self.norm.eps, self.gelu, inplace=True)
        return x.permute(0, 3, 1, 2)


class ConvNormChain:
    """Several :class:`NativeConvNorm` in one call, unless one was replaced or changed, or is observed by hooks."""

    def __init__(self) -> None:
        self._built: tuple[list[nn.Module], native.ConvNorms] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_built": None}  # a copy has modules of its own

    def __call__(self, parts: list[Any], x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H', W', C')."""
        within = [*parts, *(child for part in parts for child in part._modules.values())]
        if not (all(type(part) is NativeConvNorm for part in parts) and all(map(untouched, within))):
            image = x.permute(0, 3, 1, 2)
            for part in parts:
                image = part(image)
            return image.permute(0, 2, 3, 1)
        built = self._built
        if built is None or built[0] != within:
            self._built = built = within, native.ConvNorms(*zip(*(part.layer() for part in parts), strict=True))
        return built[1](x)


class NativeStem(Stem):
    """The stem with its convolutions in one call."""

    def __init__(self, stem: Stem):
        nn.Module.__init__(self)
        self.conv1, self.conv2, self.conv3 = stem.conv1, stem.conv2, stem.conv3
        self.norm, self.position, self.chain = stem.norm, stem.position, ConvNormChain()

    def forward(self, x: Tensor) -> Tensor:
        x = self.chain([self.conv1, self.conv2, self.conv3], x.permute(0, 2, 3, 1).contiguous())
        return self.position(self.norm(x)).permute(0, 3, 1, 2)


class NativeDownsample(Downsample):
    """Downsampling in one call."""

    def __init__(self, downsample: Downsample):
        nn.Module.__init__(self)
        self.expand, self.reduce, self.mix = downsample.expand, downsample.reduce, downsample.mix
        self.chain = ConvNormChain()

    def forward(self, x: Tensor) -> Tensor:
        return self.chain([self.expand, self.reduce, self.mix], x.contiguous())


class NativeHybrid(HybridBlock):
    """A whole block with :class:`~sgformer.models.backbone.HybridScaleAttention`."""

    def __init__(self, block: HybridBlock, kind: int = 0):
        nn.Module.__init__(self)
        attn, self.kind = block.attn, kind
        self.parts = native.Weights(
            "HybridWeights",
            norm=_pair(block.norm1),
            proj_in=_linear(attn.proj_in, kind),
            reduce=native.narrow_panels(native.conv_matrix(attn.reduce.weight), attn.reduce.bias, kind),
            reduce_norm=_pair(attn.reduce_norm),
            kv_coarse=_linear(attn.kv_coarse, kind),
        )
        self.tail = _tail(block, kind)
        self.options = (block.mlp.fc1.out_features, attn.heads, attn.reduction, attn.window, attn.coarse == "global")
        self.eps = (block.norm1.eps, attn.reduce_norm.eps)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return native.hybrid_block(x, self.parts, self.tail, *self.options, *self.eps, self.kind)


class NativeGuided(GuidedBlock):
    """A whole block with :class:`~sgformer.models.backbone.SelfGuidedAttention`, softmax and learned maps of regions.

    Args:
        block: one whose significance is a function; a module's would also gate the tokens.
    """

    def __init__(self, block: GuidedBlock, kind: int = 0):
        nn.Module.__init__(self)
        attn, self.kind = block.attn, kind
        self.source, self.attn = block.source, NativeGroups(attn.aggregate)
        norm, proj_in, kv = _pair(block.norm1), _linear(attn.proj_in, kind), _linear(attn.kv, kind)
        self.parts = native.Weights("GuidedWeights", norm=norm, proj_in=proj_in, kv=kv)
        self.tail = _tail(block, kind)
        self.options = (block.mlp.fc1.out_features, attn.heads)
        self.eps = block.norm1.eps

    def forward(self, x: Tensor, coarse: Tensor, fine: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        significance = self.source(x, coarse, fine).float().expand(x.shape[:-1]).contiguous()
        lengths = ops.lengths_at(x.shape[1] * x.shape[2], self.attn.aggregate.ends)
        regions = list(zip(lengths, self.attn.aggregate.rates, strict=True))
        weights = (self.parts, self.tail, self.attn.maps())
        out = native.guided_block(x, significance, *weights, *self.options, regions, self.eps, self.kind)
        return out, significance, [significance]


class NativeGroups(nn.Module):
    """How a :class:`NativeGuided` grouped its tokens, computed on request."""

    def __init__(self, aggregate: LinearAggregation):
        super().__init__()
        self.aggregate = aggregate
        self._maps: tuple[list[int], list[tuple[Tensor, Tensor]]] = ([], [])

    def maps(self) -> list[tuple[Tensor, Tensor]]:
        """Weights and bias of each region at the present token budget, made once for each."""
        rates = self.aggregate.rates
        if self._maps[0] != rates:
            pairs = zip(self.aggregate.weights(), self.aggregate, strict=True)
            self._maps = (rates, [(weight.detach(), region.bias.detach()) for weight, region in pairs])
        return self._maps[1]

    def describe(self, grouped: list[Tensor], grid: tuple[int, ...]) -> TokenGroups:
        order = native.argsort(grouped[0].flatten(1))
        return self.aggregate.describe(ops.group_at(order, self.aggregate.ends, self.aggregate.rates), grid)


class NativePlain(PlainBlock):
    """A whole block with :class:`~sgformer.models.backbone.PlainAttention`."""

    def __init__(self, block: PlainBlock, kind: int = 0):
        nn.Module.__init__(self)
        attn, self.kind = block.attn, kind
        self.parts = native.Weights("PlainWeights", norm=_pair(block.norm1), proj_in=_linear(attn.proj_in, kind))
        self.tail = _tail(block, kind)
        self.options, self.eps = (block.mlp.fc1.out_features, attn.heads), block.norm1.eps

    def forward(self, x: Tensor) -> Tensor:
        return native.plain_block(x, self.parts, self.tail, *self.options, self.eps, self.kind)


def _pair(module: nn.Module) -> tuple[Tensor, Tensor]:
    return module.weight.detach(), module.bias.detach()


def _linear(linear: nn.Linear, kind: int) -> tuple[Tensor, Tensor]:
    return native.narrow_panels(linear.weight, linear.bias, kind)


def _tail(block: Block, kind: int) -> native.Weights:
    """The parameters of the operations that every block ends with."""
    local, mlp = block.attn.local, block.mlp
    return native.Weights(
        "TailWeights",
        local=(native.tap_major(local.weight), local.bias.detach()),
        proj=_linear(block.attn.proj, kind),
        norm=_pair(block.norm2),
        fc1=_linear(mlp.fc1, kind),
        conv=(native.taps_plus_input(mlp.conv.weight), mlp.conv.bias.detach()),
        fc2=_linear(mlp.fc2, kind),
    )


#: Module -> the native one that replaces it.
NATIVE: dict[type[nn.Module], Callable[[Any, int], nn.Module]] = {
    HybridBlock: NativeHybrid,
    GuidedBlock: NativeGuided,
    PlainBlock: NativePlain,
    ConvNorm: NativeConvNorm,
}

#: Those that keep their parts, but call them together.
TOGETHER: dict[type[nn.Module], Callable[[Any], nn.Module]] = {Stem: NativeStem, Downsample: NativeDownsample}

#: How downsampling is computed next to int8, which would make half of all its error there.
WIDER = {native.INT8: native.FLOAT32, native.INT8_TILES: native.BF16_TILES}


def make_native(model: nn.Module, kind: int = 0) -> None:
    """Replace all parts of a frozen float32 network on the CPU that have a native version.

    ``kind``: how linear maps of blocks and, but for :data:`WIDER`, of downsampling are computed, of ``native.kind``.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) in TOGETHER and untouched(child):
                setattr(module, name, TOGETHER[type(child)](child))
    for module in list(model.modules()):
        if isinstance(module, Stem | Stage):
            if readable(module.norm, nn.LayerNorm):
                module.norm = NativeNorm(module.norm)
            # Weights in int8 are small enough to be read four times as often.
            floats = _widest(module) * (4 if kind in native.EIGHT_BITS else 1)
            module.forward = functools.partial(_in_parts, module.forward, floats)
        for name, child in module.named_children():
            if type(child) in NATIVE and readable(child, type(child)):
                chosen = WIDER.get(kind, kind) if type(child) is ConvNorm else kind
                setattr(module, name, NATIVE[type(child)](child, chosen))


def _widest(module: Stem | Stage) -> float:
    """Floats in its widest tensor per position of its input."""
    if isinstance(module, Stem):
        channels: int = module.conv1.conv.out_channels
        return channels / 4
    hidden = max((part.fc1.out_features for part in module.blocks.modules() if isinstance(part, Mlp)), default=1)
    if not isinstance(module.downsample, Downsample):
        return hidden
    expanded: int = module.downsample.expand.conv.out_channels
    return max(hidden / 4, expanded)


def _in_parts(forward: Any, floats: float, x: Tensor, inspection: Any = None, name: str = "") -> Tensor:
    """The forward of a stem or stage, on as many images at a time as keep the widest tensor within ``native.CHUNK``.

    Smaller tensors stay in the cache, and in the process when freed; larger ones are returned to the system.
    """
    extra = () if inspection is None else (inspection, name)
    step = max(1, int(native.CHUNK // (floats * x.shape[2] * x.shape[3])))
    if step >= len(x) or extra:
        return forward(x, *extra)
    return torch.cat([forward(few).permute(0, 2, 3, 1) for few in x.split(step)]).permute(0, 3, 1, 2)
