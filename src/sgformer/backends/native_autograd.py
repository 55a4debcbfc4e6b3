"""Training on the CPU with native kernels, forward and backward: the same numbers, sooner and in half the memory.

:func:`accelerate` puts into a network the functions here in place of torch's. Each covers half a block and keeps for
the backward pass what it could not cheaply make again: of attention its input, what the projections made of it, and
what the attention gave, but no attention matrix; of an MLP its input and what the first linear map made of it; of stem
and downsampling the results of the convolutions. Norms, GELUs, softmaxes and depthwise convolutions are computed twice.

Legend: B batch, H x W token grid, N = H * W, C channels. Tokens are (B, H, W, C), contiguous, float32, on the CPU.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.modules import module as _modules

from sgformer import ops
from sgformer.backends import native
from sgformer.backends.eligibility import HOOKS, plain, readable
from sgformer.models.backbone import (
    Block,
    GuidedBlock,
    HybridBlock,
    HybridScaleAttention,
    PlainAttention,
    PlainBlock,
    SelfGuidedAttention,
)
from sgformer.models.layers import ConvNorm, Downsample, Mlp, Stem

aten = torch.ops.aten

Grads = list[Tensor | None]
Network = TypeVar("Network", bound=nn.Module)


def accelerate(model: Network) -> Network:
    """Let a network train on the CPU with native kernels: the same gradients, sooner, in about half the memory.

    It is changed in place and stays what it was: the same parameters under the same names, to be saved, copied, moved
    and wrapped as before (in FSDP: wrap afterwards). Where the kernels do not serve (on another device, in another
    dtype, within autocast, traced, compiled, or where a part was hooked, replaced or set otherwise) the network
    computes as it did before. They serve evaluation, too, but :func:`sgformer.optimize` is quicker there. A block with
    an attention or a significance of another kind keeps torch's attention. Gradients of gradients and batches of
    gradients (``is_grads_batched``) cannot be had.

    Args:
        model: an SGFormer, in any mode, or what contains some, for instance a detector.

    Returns:
        The model.

    Raises:
        ValueError: there is nothing of an SGFormer in it.
        sgformer.backends.native.UnavailableError: the kernels cannot be compiled here.
    """
    native.library()
    kinds = {usual: fast for fast, usual in USUAL.items()}
    for module in model.modules():
        module.__class__ = kinds.get(type(module), type(module))
    if not any(type(module) in USUAL for module in model.modules()):
        raise ValueError(
            f"accelerate is for networks of sgformer, before they are wrapped (got {type(model).__name__})"
        )
    return model


def restore(model: nn.Module) -> None:
    """Undo :func:`accelerate`, in place."""
    for module in model.modules():
        module.__class__ = USUAL.get(type(module), type(module))


def _served(x: Tensor, parts: Mapping[nn.Module, type[nn.Module]]) -> bool:
    """Whether native kernels can stand for ``parts`` of an input x, here and now, if these are of the kinds given.

    Not where somebody looks on: hooks within expect to be called, and modes to see torch's operations.
    """
    return (
        plain(x)
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.peek_interpreter_stack()
        and not torch._C._len_torch_dispatch_stack()
        and not any(getattr(_modules, f"_global_{hooks}") for hooks in HOOKS)
        and all(readable(part, kind) for part, kind in parts.items())
        and _available()
    )


@functools.cache
def _available() -> bool:
    """Whether there are kernels: a network can be loaded where there are none, having been accelerated elsewhere."""
    try:
        native.library()
    except native.UnavailableError:
        return False
    return True


# -- blocks -----------------------------------------------------------------------------------------------------


class _FastBlock(Block):
    """Both halves natively, each with its norm and what it is added to; either of them in torch where it must be."""

    def _serves(self, x: Tensor, norm: nn.Module, part: nn.Module, kind: type[nn.Module]) -> bool:
        drop = DropPath if type(self.drop_path) is DropPath else nn.Identity
        return _served(x, {norm: nn.LayerNorm, part: kind, self.drop_path: drop})

    def _scale(self, x: Tensor) -> Tensor | None:
        """What stochastic depth has for every image, (B, 1, 1, 1), drawn as it draws; None where that is 1."""
        drop = self.drop_path
        dropping = isinstance(drop, DropPath) and drop.training and drop.drop_prob
        return drop(x.new_ones(len(x), 1, 1, 1)) if dropping else None

    def feed_forward(self, x: Tensor) -> Tensor:
        if not self._serves(x, self.norm2, self.mlp, Mlp):
            return super().feed_forward(x)
        mlp = self.mlp
        parameters = [*_pair(self.norm2), *_pair(mlp.fc1), *_pair(mlp.conv), *_pair(mlp.fc2)]
        return MlpFunction.apply(x, self._scale(x), self.norm2.eps, *parameters)


class FastHybrid(_FastBlock, HybridBlock):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not self._serves(x, self.norm1, self.attn, HybridScaleAttention):
            return super().forward(x)
        attn: Any = self.attn
        parameters = [*_pair(self.norm1), *_pair(attn.proj_in), *_pair(attn.local), *_pair(attn.proj)]
        parameters += [*_pair(attn.reduce), *_pair(attn.reduce_norm), *_pair(attn.kv_coarse)]
        options = (self.norm1.eps, attn.reduce_norm.eps, attn.heads, attn.reduction, attn.window, attn.coarse)
        x, coarse, fine = HybridFunction.apply(x, self._scale(x), options, *parameters)
        return self.feed_forward(x), coarse, fine


class FastGuided(_FastBlock, GuidedBlock):
    def forward(self, x: Tensor, coarse: Tensor, fine: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        usual = not isinstance(self.source, nn.Module)  # one of parameters would also gate the tokens
        if not usual or not self._serves(x, self.norm1, self.attn, SelfGuidedAttention):
            return super().forward(x, coarse, fine)
        attn: Any = self.attn
        significance = self.source(x, coarse, fine)
        order = ops.sort_tokens(significance.expand(x.shape[:-1]).flatten(1))
        groups = ops.group_tokens(order, attn.aggregate.shares, attn.aggregate.rates)
        parameters = [*_pair(self.norm1), *_pair(attn.proj_in), *_pair(attn.local), *_pair(attn.proj)]
        parameters += [*_pair(attn.kv), *(m.weight for m in attn.aggregate), *(m.bias for m in attn.aggregate)]
        x = GuidedFunction.apply(x, self._scale(x), (self.norm1.eps, attn.heads), groups, *parameters)
        return self.feed_forward(x), significance, groups


class FastPlain(_FastBlock, PlainBlock):
    def forward(self, x: Tensor) -> Tensor:
        if not self._serves(x, self.norm1, self.attn, PlainAttention):
            return super().forward(x)
        attn: Any = self.attn
        parameters = [*_pair(self.norm1), *_pair(attn.proj_in), *_pair(attn.local), *_pair(attn.proj)]
        return self.feed_forward(PlainFunction.apply(x, self._scale(x), (self.norm1.eps, attn.heads), *parameters))


def _pair(module: Any) -> tuple[Tensor, Tensor]:
    return module.weight, module.bias


# -- their halves -----------------------------------------------------------------------------------------------


class HybridFunction(Function):
    """x and what norm and :class:`~sgformer.models.backbone.HybridScaleAttention` add; coarse and fine significance."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor | None, options: tuple[Any, ...], *parameters: Tensor) -> Any:
        eps, reduce_eps, heads, r, _, _ = ctx.options = options
        normed, wide = _enter(x := x.contiguous(), eps, *parameters[:4])
        C = x.shape[-1]
        reduce, shift, gain, offset, weight, bias = parameters[8:]
        reduced = _linear(_patches(normed, r), _kernel_rows(reduce), shift)
        kv = _linear(F.gelu(native.layer_norm(reduced, gain, offset, reduce_eps)), weight, bias)
        attended = torch.empty_like(x)
        coarse_windows, fine_windows = HybridFunction.windows(x, kv, options)
        coarse = native.attend(wide[..., : C // 2], kv, heads, *coarse_windows, attended[..., : C // 2], r)
        fine = native.attend(
            wide[..., C // 2 : C], wide[..., C : 2 * C], heads, *fine_windows, attended[..., C // 2 :], 1
        )
        ctx.save_for_backward(x, scale, wide, reduced, kv, attended, *parameters)
        ctx.mark_non_differentiable(coarse, fine)
        return _leave(x, scale, attended, wide[..., 2 * C :], *parameters[4:8]), coarse, fine

    @staticmethod
    def windows(x: Tensor, kv: Tensor, options: tuple[Any, ...]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """Windows of queries and of keys, for coarse and for fine heads."""
        r, window, coarse = options[3:]
        near = (window, window)
        if coarse == "global":
            return [((x.shape[1], x.shape[2]), (kv.shape[1], kv.shape[2])), (near, near)]
        return [((window * r, window * r), near), (near, near)]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> Any:
        gradient = gradient.contiguous()
        x, scale, wide, reduced, kv, attended, *parameters = ctx.saved_tensors
        eps, reduce_eps, heads, r, _, _ = ctx.options
        needed = ctx.needs_input_grad[3:]
        C = x.shape[-1]
        g_wide, g_kv = torch.empty_like(wide), torch.empty_like(kv)
        local, g_local = wide[..., 2 * C :], g_wide[..., 2 * C :]
        g_attended, leaving = _leave_backward(gradient, scale, attended, local, g_local, parameters[4:8], needed[4:8])
        coarse_windows, fine_windows = HybridFunction.windows(x, kv, ctx.options)
        half = C // 2
        native.attend_backward(
            wide[..., :half], kv, g_attended[..., :half], g_wide[..., :half], g_kv, heads, *coarse_windows
        )
        native.attend_backward(
            wide[..., half:C], wide[..., C : 2 * C], g_attended[..., half:], g_wide[..., half:C],
            g_wide[..., C : 2 * C], heads, *fine_windows,
        )  # fmt: skip
        normed = native.layer_norm(x, parameters[0], parameters[1], eps)
        g_normed, entering = _linear_backward(g_wide, normed, parameters[2], needed[2:4])
        g_patches, reducing = _reduce_backward(g_kv, normed, reduced, r, reduce_eps, parameters[8:], needed[8:])
        g_normed += _unpatched(g_patches, r, (x.shape[1], x.shape[2]))
        g_x, *norm = native.layer_norm_backward(g_normed, x, parameters[0], parameters[1], eps, gradient)
        return g_x, None, None, *norm, *entering, *leaving, *reducing


class GuidedFunction(Function):
    """x plus norm and :class:`~sgformer.models.backbone.SelfGuidedAttention`: softmax, linear maps, grouped tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor | None,
        options: tuple[Any, ...],
        groups: Sequence[Tensor],
        *parameters: Tensor,
    ) -> Tensor:
        eps, heads = ctx.options = options
        every, kept = x, _kept(scale)
        x, scale, *groups = _of(kept, x.contiguous(), scale, *groups)
        normed, wide = _enter(x, eps, *parameters[:4])
        C = x.shape[-1]
        weights, biases = parameters[10 : 10 + len(groups)], parameters[10 + len(groups) :]
        few = native.aggregate(normed.flatten(1, 2), groups, weights, biases)[:, None]  # (B, 1, M, C)
        kv = _linear(few, *parameters[8:10])
        attended = torch.empty_like(x)
        grid = (x.shape[1], x.shape[2])
        native.attend(wide[..., :C], kv, heads, grid, (1, kv.shape[2]), attended)
        ctx.save_for_backward(kept, x, scale, wide, few, kv, attended, *groups, *parameters)
        ctx.regions = len(groups)
        return _among(every, kept, _leave(x, scale, attended, wide[..., C:], *parameters[4:8]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        kept, x, scale, wide, few, kv, attended, *saved = ctx.saved_tensors
        every, (gradient,) = gradient, _of(kept, gradient.contiguous())
        groups, parameters = saved[: ctx.regions], saved[ctx.regions :]
        eps, heads = ctx.options
        needed = ctx.needs_input_grad[4:]
        C = x.shape[-1]
        g_wide, g_kv = torch.empty_like(wide), torch.empty_like(kv)
        g_attended, leaving = _leave_backward(
            gradient, scale, attended, wide[..., C:], g_wide[..., C:], parameters[4:8], needed[4:8]
        )
        native.attend_backward(
            wide[..., :C], kv, g_attended, g_wide[..., :C], g_kv, heads, (x.shape[1], x.shape[2]), (1, kv.shape[2])
        )
        g_few, projecting = _linear_backward(g_kv, few, parameters[8], needed[8:10])
        normed = native.layer_norm(x, parameters[0], parameters[1], eps)
        g_normed, entering = _linear_backward(g_wide, normed, parameters[2], needed[2:4])
        weights = parameters[10 : 10 + len(groups)]
        aggregating = native.aggregate_backward(
            g_few[:, 0], normed.flatten(1, 2), groups, weights, g_normed.flatten(1, 2)
        )
        g_x, *norm = native.layer_norm_backward(g_normed, x, parameters[0], parameters[1], eps, gradient)
        made = [*norm, *entering, *leaving, *projecting, *aggregating[0], *aggregating[1]]
        return _among(every, kept, g_x), None, None, None, *made


class PlainFunction(Function):
    """x and what norm and :class:`~sgformer.models.backbone.PlainAttention` add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor | None, options: tuple[Any, ...], *parameters: Tensor) -> Tensor:
        eps, heads = ctx.options = options
        every, kept = x, _kept(scale)
        x, scale = _of(kept, x.contiguous(), scale)
        _, wide = _enter(x, eps, *parameters[:4])
        C = x.shape[-1]
        attended = torch.empty_like(x)
        grid = (x.shape[1], x.shape[2])
        native.attend(wide[..., :C], wide[..., C : 3 * C], heads, grid, grid, attended)
        ctx.save_for_backward(kept, x, scale, wide, attended, *parameters)
        return _among(every, kept, _leave(x, scale, attended, wide[..., 3 * C :], *parameters[4:8]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        kept, x, scale, wide, attended, *parameters = ctx.saved_tensors
        every, (gradient,) = gradient, _of(kept, gradient.contiguous())
        eps, heads = ctx.options
        needed = ctx.needs_input_grad[3:]
        C, grid = x.shape[-1], (x.shape[1], x.shape[2])
        g_wide = torch.empty_like(wide)
        local, g_local = wide[..., 3 * C :], g_wide[..., 3 * C :]
        g_attended, leaving = _leave_backward(gradient, scale, attended, local, g_local, parameters[4:8], needed[4:8])
        native.attend_backward(
            wide[..., :C], wide[..., C : 3 * C], g_attended, g_wide[..., :C], g_wide[..., C : 3 * C], heads, grid, grid
        )
        normed = native.layer_norm(x, parameters[0], parameters[1], eps)
        g_normed, entering = _linear_backward(g_wide, normed, parameters[2], needed[2:4])
        g_x, *norm = native.layer_norm_backward(g_normed, x, parameters[0], parameters[1], eps, gradient)
        return _among(every, kept, g_x), None, None, *norm, *entering, *leaving


class MlpFunction(Function):
    """x and what norm and :class:`~sgformer.models.layers.Mlp` add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor | None, eps: float, *parameters: Tensor) -> Tensor:
        gain, shift, weight1, bias1, weight, bias, weight2, bias2 = parameters
        every, kept = x, _kept(scale)
        x, scale = _of(kept, x.contiguous(), scale)
        hidden, taps = len(weight1), native.taps_plus_input(weight)
        normed = native.layer_norm(x, gain, shift, eps)
        maps = [(native.pack(w), native.padded(b, len(w)), len(w)) for w, b in ((weight1, bias1), (weight2, bias2))]
        h, out = x.new_empty(*x.shape[:-1], hidden), torch.empty_like(x)
        spare = _memory(h)
        for few in _parts(h):
            native.linear(normed[few], *maps[0], h[few])
            a = native.depthwise_gelu(h[few], taps, bias, spare[: len(h[few])])
            native.linear(a, *maps[1], out[few], x[few] if scale is None else None)
        ctx.save_for_backward(kept, x, scale, h, *parameters)
        ctx.eps = eps
        return _among(every, kept, out if scale is None else torch.addcmul(x, out, scale, out=out))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        kept, x, scale, h, *parameters = ctx.saved_tensors
        every, (gradient,) = gradient, _of(kept, gradient.contiguous())
        gain, shift, weight1, _, weight, bias, weight2, _ = parameters
        taps = native.taps_plus_input(weight)
        C, hidden = x.shape[-1], h.shape[-1]
        g_out = gradient if scale is None else gradient * scale
        back1, back2 = native.pack(weight1, transposed=True), native.pack(weight2, transposed=True)
        none1, none2 = native.padded(None, C), native.padded(None, hidden)
        sums = [p.new_empty(p.shape) for p in (*parameters[2:4], *parameters[6:8])]  # fc1, fc2
        g_taps = taps.new_zeros(10, hidden)
        normed, g_normed = native.layer_norm(x, gain, shift, ctx.eps), torch.empty_like(x)
        spare, other = _memory(h), _memory(h)
        for few in _parts(h):
            g_h, a = spare[: len(h[few])], other[: len(h[few])]
            native.linear(g_out[few], back2, none2, hidden, g_h)
            g_taps += native.depthwise_backward(h[few], g_h, taps, g_h, bias, a)
            native.linear_gradient(g_out[few], a, sums[2], sums[3], few.start > 0)
            native.linear_gradient(g_h, normed[few], sums[0], sums[1], few.start > 0)
            native.linear(g_h, back1, none1, C, g_normed[few])
        g_x, *norm = native.layer_norm_backward(g_normed, x, gain, shift, ctx.eps, gradient)
        return _among(every, kept, g_x), None, None, *norm, *sums[:2], *_depthwise_gradients(g_taps), *sums[2:]


def _kept(scale: Tensor | None) -> Tensor | None:
    """The images whose branch stochastic depth keeps, (K,) int64; None where it keeps all. Others need no computing."""
    if scale is None or scale.all():
        return None
    return scale.flatten().nonzero()[:, 0]


def _of(kept: Tensor | None, *tensors: Any) -> Sequence[Any]:
    """Those images of every tensor."""
    return tensors if kept is None else [None if t is None else t.index_select(0, kept) for t in tensors]


def _among(every: Tensor, kept: Tensor | None, few: Tensor) -> Tensor:
    """``few`` in the place of those images of ``every``."""
    return few if kept is None else every.index_copy(0, kept, few)


def _memory(h: Tensor) -> Tensor:
    """For as many images of h as are taken at a time."""
    return torch.empty_like(h[: _at_a_time(h)])


def _parts(h: Tensor) -> list[slice]:
    step = _at_a_time(h)
    return [slice(i, i + step) for i in range(0, max(1, len(h)), step)]


def _at_a_time(h: Tensor) -> int:
    return max(1, native.CHUNK // math.prod(h.shape[1:]))


def _depthwise_gradients(made: Tensor) -> tuple[Tensor, Tensor]:
    """(10, C) to those of the weight (C, 1, 3, 3) and of the bias."""
    return made[:9].t().reshape(-1, 1, 3, 3), made[9]


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None = None) -> Tensor:
    width = len(weight)
    return native.linear(x.contiguous(), native.pack(weight), native.padded(bias, width), width, add=add)


def _linear_backward(gradient: Tensor, x: Tensor, weight: Tensor, needed: Sequence[bool]) -> tuple[Tensor, Grads]:
    n = weight.shape[1]
    g_x = native.linear(gradient, native.pack(weight, transposed=True), native.padded(None, n), n)
    if not any(needed):
        return g_x, [None, None]
    g_weight, g_bias = weight.new_empty(weight.shape), weight.new_empty(len(weight))
    native.linear_gradient(gradient, x, g_weight, g_bias)
    return g_x, [g_weight, g_bias]


def _enter(x: Tensor, eps: float, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Norm and linear map: the normalised, the result."""
    normed = native.layer_norm(x, scale, shift, eps)
    return normed, _linear(normed, weight, bias)


def _reduce_backward(
    gradient: Tensor,
    normed: Tensor,
    reduced: Tensor,
    r: int,
    eps: float,
    parameters: Sequence[Tensor],
    needed: Sequence[bool],
) -> tuple[Tensor, Grads]:
    """From the gradient of coarse heads' keys and values to that of the patches they are made of."""
    reduce, _, scale, bias, weight, _ = parameters
    made = native.layer_norm(reduced, scale, bias, eps)
    gradient, linear = _linear_backward(gradient, F.gelu(made), weight, needed[4:])
    gradient, *norm = native.layer_norm_backward(aten.gelu_backward(gradient, made), reduced, scale, bias, eps)
    g_patches, (g_reduce, shift) = _linear_backward(
        gradient, _patches(normed, r).contiguous(), _kernel_rows(reduce), needed[:2]
    )
    if g_reduce is not None:
        g_reduce = g_reduce.unflatten(1, (r, r, -1)).permute(0, 3, 1, 2)
    return g_patches, [g_reduce, shift, *norm, *linear]


def _leave(
    x: Tensor,
    scale: Tensor | None,
    attended: Tensor,
    local: Tensor,
    taps: Tensor,
    shift: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> Tensor:
    """Adds the local term to ``attended``, in place, projects the sum, and adds that to x."""
    native.depthwise_add(local, native.tap_major(taps), shift, attended)
    if scale is None:
        return _linear(attended, weight, bias, x)
    out = _linear(attended, weight, bias)
    return torch.addcmul(x, out, scale, out=out)


def _leave_backward(
    gradient: Tensor,
    scale: Tensor | None,
    attended: Tensor,
    local: Tensor,
    g_local: Tensor,
    parameters: Sequence[Tensor],
    needed: Sequence[bool],
) -> tuple[Tensor, Grads]:
    gradient = gradient if scale is None else gradient * scale
    g_attended, linear = _linear_backward(gradient, attended, parameters[2], needed[2:])
    made = native.depthwise_backward(local, g_attended, native.tap_major(parameters[0]), g_local)
    return g_attended, [*_depthwise_gradients(made), *linear]


def _patches(x: Tensor, r: int) -> Tensor:
    """(B, H, W, C) -> (B, ceil(H / r), ceil(W / r), r * r * C): what a convolution with step r multiplies."""
    _, H, W, _ = x.shape
    if H % r or W % r:
        x = F.pad(x, (0, 0, 0, -W % r, 0, -H % r))
    return x.unflatten(2, (-1, r)).unflatten(1, (-1, r)).transpose(2, 3).flatten(3)


def _unpatched(patches: Tensor, r: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of :func:`_patches`."""
    x = patches.unflatten(3, (r, r, -1)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return x[:, : grid[0], : grid[1]]


def _kernel_rows(weight: Tensor) -> Tensor:
    """Weight of a convolution (out, C, r, r) as the linear map of a patch."""
    return weight.permute(0, 2, 3, 1).flatten(1)


# -- stem and downsampling --------------------------------------------------------------------------------------


class FastStem(Stem):
    def forward(self, x: Tensor) -> Tensor:
        if not _served(x, dict.fromkeys((self.conv1, self.conv2, self.conv3), ConvNorm)):
            return super().forward(x)
        return self.position(self.norm(_convolved(x.permute(0, 2, 3, 1), self.conv1, self.conv2, self.conv3)))


class FastDownsample(Downsample):
    def forward(self, x: Tensor) -> Tensor:
        layers = (self.expand, self.reduce, self.mix)
        return _convolved(x, *layers) if _served(x, dict.fromkeys(layers, ConvNorm)) else super().forward(x)


def _convolved(x: Tensor, *layers: ConvNorm) -> Tensor:
    options = [
        (m.conv.stride[0], m.conv.padding[0], m.conv.groups, m.norm.eps, isinstance(m.act, nn.GELU)) for m in layers
    ]
    return ChainFunction.apply(x, options, *(p for m in layers for p in (m.conv.weight, *_pair(m.norm))))


class ChainFunction(Function):
    """Convolutions, each with its GroupNorm and perhaps a GELU: (B, H, W, C_in) to (B, H', W', C)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, options: list[tuple[Any, ...]], *parameters: Tensor) -> Tensor:
        saved = [x := x.contiguous()]
        for i, (stride, padding, groups, eps, act) in enumerate(options):
            weight, scale, shift = parameters[3 * i : 3 * i + 3]
            saved.append(_convolve(x, weight, stride, padding, groups))
            x = native.group_norm(saved[-1], scale, shift, eps, act)
        ctx.save_for_backward(*saved, *parameters)
        ctx.options = options
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        count = len(ctx.options)
        x, *kept = ctx.saved_tensors
        made, parameters = kept[:count], kept[count:]
        grads: Grads = []
        g_x: Any = gradient.contiguous()
        for i in reversed(range(count)):
            stride, padding, groups, eps, act = ctx.options[i]
            weight, scale, shift = parameters[3 * i : 3 * i + 3]
            g_x, *norm = native.group_norm_backward(g_x, made[i], scale, shift, eps, act)
            source = x
            if i:
                before = ctx.options[i - 1]
                source = native.group_norm(made[i - 1], parameters[3 * i - 2], parameters[3 * i - 1], *before[3:])
            wanted = i > 0 or ctx.needs_input_grad[0]
            g_x, g_weight = _convolve_backward(g_x, source, weight, stride, padding, groups, wanted)
            grads = [g_weight, *norm, *grads]
        return g_x, None, *grads


def _by_winograd(weight: Tensor, stride: int, padding: int, groups: int) -> bool:
    width, C, k, _ = weight.shape
    return k == 3 and stride == padding == groups == 1 and width % native.lanes() == C % native.lanes() == 0


def _convolve(x: Tensor, weight: Tensor, stride: int, padding: int, groups: int) -> Tensor:
    if weight.shape[2] == 1:
        return _linear(x, weight.flatten(1), None)
    if _by_winograd(weight, stride, padding, groups):
        return native.winograd(x, native.winograd_panels(weight), len(weight))
    image = F.conv2d(x.permute(0, 3, 1, 2), weight, None, stride, padding, groups=groups)
    return image.permute(0, 2, 3, 1).contiguous()


def _convolve_backward(
    gradient: Any, x: Tensor, weight: Tensor, stride: int, padding: int, groups: int, wanted: bool
) -> tuple[Tensor | None, Tensor]:
    """Gradients of the input, where it is wanted, and of the weight."""
    if weight.shape[2] == 1:
        back, (g_weight, _) = _linear_backward(gradient, x, weight.flatten(1), [True])
        return back, g_weight.view_as(weight)  # type: ignore[union-attr]
    if _by_winograd(weight, stride, padding, groups):  # the same taps the other way round
        turned = native.winograd_panels(weight.flip(2, 3).transpose(0, 1))
        g_x = native.winograd(gradient, turned, weight.shape[1]) if wanted else None
        return g_x, native.winograd_gradient(gradient, x)
    by_torch = groups > 1 or weight.shape[1] % native.lanes() != 0
    made: Any = (None, None)
    if wanted or by_torch:
        made = aten.convolution_backward(
            gradient.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2), weight, None, [stride] * 2, [padding] * 2, [1, 1],
            False, [0, 0], groups, [wanted, by_torch, False],
        )  # fmt: skip
    g_x = made[0].permute(0, 2, 3, 1).contiguous() if wanted else None
    return g_x, made[1] if by_torch else native.conv_gradient(gradient, x, weight.shape[2], stride, padding)


#: What :func:`accelerate` makes of what.
USUAL: dict[type[nn.Module], type[nn.Module]] = {
    FastHybrid: HybridBlock,
    FastGuided: GuidedBlock,
    FastPlain: PlainBlock,
    FastStem: Stem,
    FastDownsample: Downsample,
}
