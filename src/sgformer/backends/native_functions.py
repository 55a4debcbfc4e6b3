"""Half a block as one autograd function of native kernels, forward and backward.

Each saves for the backward pass what is costly to recompute: of attention its input, the projections and the output,
but no attention matrix; of an MLP its input and the output of the first linear map. Norms, GELUs, softmaxes and
depthwise convolutions are recomputed.

Legend: B batch, H x W token grid, C channels. Tokens are (B, H, W, C), contiguous, float32, on the CPU. ``scale`` is
the stochastic depth factor of every image, (B, 1, 1, 1), or None.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from sgformer.backends import native

aten = torch.ops.aten

Grads = list[Tensor | None]


class HybridFunction(Function):
    """x plus norm and :class:`~sgformer.models.backbone.HybridScaleAttention`; coarse and fine significance."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor | None, options: tuple[Any, ...], *parameters: Tensor) -> Any:
        eps, reduce_eps, heads, r, _, _ = ctx.options = options
        normed, wide = _norm_project(x := x.contiguous(), eps, *parameters[:4])
        C = x.shape[-1]
        reduce, shift, gain, offset, weight, bias = parameters[8:]
        reduced = linear(_patches(normed, r), _kernel_rows(reduce), shift)
        kv = linear(F.gelu(native.layer_norm(reduced, gain, offset, reduce_eps)), weight, bias)
        attended = torch.empty_like(x)
        coarse_windows, fine_windows = HybridFunction.windows(x, kv, options)
        coarse = native.attend(wide[..., : C // 2], kv, heads, *coarse_windows, attended[..., : C // 2], r)
        fine = native.attend(
            wide[..., C // 2 : C], wide[..., C : 2 * C], heads, *fine_windows, attended[..., C // 2 :], 1
        )
        ctx.save_for_backward(x, scale, wide, reduced, kv, attended, *parameters)
        ctx.mark_non_differentiable(coarse, fine)
        return _local_project(x, scale, attended, wide[..., 2 * C :], *parameters[4:8]), coarse, fine

    @staticmethod
    def windows(x: Tensor, kv: Tensor, options: tuple[Any, ...]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """Windows of queries and of keys, for coarse and for fine heads."""
        r, window, coarse = options[3:]
        fine = (window, window)
        if coarse == "global":
            return [((x.shape[1], x.shape[2]), (kv.shape[1], kv.shape[2])), (fine, fine)]
        return [((window * r, window * r), fine), (fine, fine)]

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
        g_attended, leaving = _local_project_backward(
            gradient, scale, attended, local, g_local, parameters[4:8], needed[4:8]
        )
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
        g_normed, entering = linear_backward(g_wide, normed, parameters[2], needed[2:4])
        g_patches, reducing = _reduce_backward(g_kv, normed, reduced, r, reduce_eps, parameters[8:], needed[8:])
        g_normed += _merge_patches(g_patches, r, (x.shape[1], x.shape[2]))
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
        every, kept = x, _kept_images(scale)
        x, scale, *groups = _take_images(kept, x.contiguous(), scale, *groups)
        normed, wide = _norm_project(x, eps, *parameters[:4])
        C = x.shape[-1]
        weights, biases = parameters[10 : 10 + len(groups)], parameters[10 + len(groups) :]
        pooled = native.aggregate(normed.flatten(1, 2), groups, weights, biases)[:, None]  # (B, 1, M, C)
        kv = linear(pooled, *parameters[8:10])
        attended = torch.empty_like(x)
        grid = (x.shape[1], x.shape[2])
        native.attend(wide[..., :C], kv, heads, grid, (1, kv.shape[2]), attended)
        ctx.save_for_backward(kept, x, scale, wide, pooled, kv, attended, *groups, *parameters)
        ctx.regions = len(groups)
        return _scatter_images(every, kept, _local_project(x, scale, attended, wide[..., C:], *parameters[4:8]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        kept, x, scale, wide, pooled, kv, attended, *saved = ctx.saved_tensors
        every, (gradient,) = gradient, _take_images(kept, gradient.contiguous())
        groups, parameters = saved[: ctx.regions], saved[ctx.regions :]
        eps, heads = ctx.options
        needed = ctx.needs_input_grad[4:]
        C = x.shape[-1]
        g_wide, g_kv = torch.empty_like(wide), torch.empty_like(kv)
        g_attended, leaving = _local_project_backward(
            gradient, scale, attended, wide[..., C:], g_wide[..., C:], parameters[4:8], needed[4:8]
        )
        native.attend_backward(
            wide[..., :C], kv, g_attended, g_wide[..., :C], g_kv, heads, (x.shape[1], x.shape[2]), (1, kv.shape[2])
        )
        g_pooled, projecting = linear_backward(g_kv, pooled, parameters[8], needed[8:10])
        normed = native.layer_norm(x, parameters[0], parameters[1], eps)
        g_normed, entering = linear_backward(g_wide, normed, parameters[2], needed[2:4])
        weights = parameters[10 : 10 + len(groups)]
        aggregating = native.aggregate_backward(
            g_pooled[:, 0], normed.flatten(1, 2), groups, weights, g_normed.flatten(1, 2)
        )
        g_x, *norm = native.layer_norm_backward(g_normed, x, parameters[0], parameters[1], eps, gradient)
        made = [*norm, *entering, *leaving, *projecting, *aggregating[0], *aggregating[1]]
        return _scatter_images(every, kept, g_x), None, None, None, *made


class PlainFunction(Function):
    """x plus norm and :class:`~sgformer.models.backbone.PlainAttention`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor | None, options: tuple[Any, ...], *parameters: Tensor) -> Tensor:
        eps, heads = ctx.options = options
        every, kept = x, _kept_images(scale)
        x, scale = _take_images(kept, x.contiguous(), scale)
        _, wide = _norm_project(x, eps, *parameters[:4])
        C = x.shape[-1]
        attended = torch.empty_like(x)
        grid = (x.shape[1], x.shape[2])
        native.attend(wide[..., :C], wide[..., C : 3 * C], heads, grid, grid, attended)
        ctx.save_for_backward(kept, x, scale, wide, attended, *parameters)
        return _scatter_images(every, kept, _local_project(x, scale, attended, wide[..., 3 * C :], *parameters[4:8]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        kept, x, scale, wide, attended, *parameters = ctx.saved_tensors
        every, (gradient,) = gradient, _take_images(kept, gradient.contiguous())
        eps, heads = ctx.options
        needed = ctx.needs_input_grad[3:]
        C, grid = x.shape[-1], (x.shape[1], x.shape[2])
        g_wide = torch.empty_like(wide)
        local, g_local = wide[..., 3 * C :], g_wide[..., 3 * C :]
        g_attended, leaving = _local_project_backward(
            gradient, scale, attended, local, g_local, parameters[4:8], needed[4:8]
        )
        native.attend_backward(
            wide[..., :C], wide[..., C : 3 * C], g_attended, g_wide[..., :C], g_wide[..., C : 3 * C], heads, grid, grid
        )
        normed = native.layer_norm(x, parameters[0], parameters[1], eps)
        g_normed, entering = linear_backward(g_wide, normed, parameters[2], needed[2:4])
        g_x, *norm = native.layer_norm_backward(g_normed, x, parameters[0], parameters[1], eps, gradient)
        return _scatter_images(every, kept, g_x), None, None, *norm, *entering, *leaving


class MlpFunction(Function):
    """x plus norm and :class:`~sgformer.models.layers.Mlp`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor | None, eps: float, *parameters: Tensor) -> Tensor:
        gain, shift, weight1, bias1, weight, bias, weight2, bias2 = parameters
        every, kept = x, _kept_images(scale)
        x, scale = _take_images(kept, x.contiguous(), scale)
        hidden, taps = len(weight1), native.taps_plus_input(weight)
        normed = native.layer_norm(x, gain, shift, eps)
        maps = [(native.pack(w), native.padded(b, len(w)), len(w)) for w, b in ((weight1, bias1), (weight2, bias2))]
        h, out = x.new_empty(*x.shape[:-1], hidden), torch.empty_like(x)
        spare = _chunk_like(h)
        for chunk in _chunks(h):
            native.linear(normed[chunk], *maps[0], h[chunk])
            a = native.depthwise_gelu(h[chunk], taps, bias, spare[: len(h[chunk])])
            native.linear(a, *maps[1], out[chunk], x[chunk] if scale is None else None)
        ctx.save_for_backward(kept, x, scale, h, *parameters)
        ctx.eps = eps
        return _scatter_images(every, kept, out if scale is None else torch.addcmul(x, out, scale, out=out))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        kept, x, scale, h, *parameters = ctx.saved_tensors
        every, (gradient,) = gradient, _take_images(kept, gradient.contiguous())
        gain, shift, weight1, _, weight, bias, weight2, _ = parameters
        taps = native.taps_plus_input(weight)
        C, hidden = x.shape[-1], h.shape[-1]
        g_out = gradient if scale is None else gradient * scale
        back1, back2 = native.pack(weight1, transposed=True), native.pack(weight2, transposed=True)
        none1, none2 = native.padded(None, C), native.padded(None, hidden)
        sums = [p.new_empty(p.shape) for p in (*parameters[2:4], *parameters[6:8])]  # fc1, fc2
        g_taps = taps.new_zeros(10, hidden)
        normed, g_normed = native.layer_norm(x, gain, shift, ctx.eps), torch.empty_like(x)
        spare, other = _chunk_like(h), _chunk_like(h)
        for chunk in _chunks(h):
            g_h, a = spare[: len(h[chunk])], other[: len(h[chunk])]
            native.linear(g_out[chunk], back2, none2, hidden, g_h)
            g_taps += native.depthwise_backward(h[chunk], g_h, taps, g_h, bias, a)
            native.linear_gradient(g_out[chunk], a, sums[2], sums[3], chunk.start > 0)
            native.linear_gradient(g_h, normed[chunk], sums[0], sums[1], chunk.start > 0)
            native.linear(g_h, back1, none1, C, g_normed[chunk])
        g_x, *norm = native.layer_norm_backward(g_normed, x, gain, shift, ctx.eps, gradient)
        return _scatter_images(every, kept, g_x), None, None, *norm, *sums[:2], *_depthwise_gradients(g_taps), *sums[2:]


def _kept_images(scale: Tensor | None) -> Tensor | None:
    """The images whose branch stochastic depth keeps, (K,) int64, as others need no computing; None if it keeps all."""
    if scale is None or scale.all():
        return None
    return scale.flatten().nonzero()[:, 0]


def _take_images(kept: Tensor | None, *tensors: Any) -> Sequence[Any]:
    """The kept images of every tensor."""
    return tensors if kept is None else [None if t is None else t.index_select(0, kept) for t in tensors]


def _scatter_images(every: Tensor, kept: Tensor | None, images: Tensor) -> Tensor:
    """``every`` with the kept images replaced by ``images``."""
    return images if kept is None else every.index_copy(0, kept, images)


def _chunk_like(h: Tensor) -> Tensor:
    """A buffer for one chunk of h."""
    return torch.empty_like(h[: _chunk(h)])


def _chunks(h: Tensor) -> list[slice]:
    step = _chunk(h)
    return [slice(i, i + step) for i in range(0, max(1, len(h)), step)]


def _chunk(h: Tensor) -> int:
    return max(1, native.CHUNK // math.prod(h.shape[1:]))


def _depthwise_gradients(made: Tensor) -> tuple[Tensor, Tensor]:
    """(10, C) -> gradients of the weight (C, 1, 3, 3) and of the bias."""
    return made[:9].t().reshape(-1, 1, 3, 3), made[9]


def _norm_project(
    x: Tensor, eps: float, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """The outputs of norm and linear map."""
    normed = native.layer_norm(x, scale, shift, eps)
    return normed, linear(normed, weight, bias)


def _reduce_backward(
    gradient: Tensor,
    normed: Tensor,
    reduced: Tensor,
    r: int,
    eps: float,
    parameters: Sequence[Tensor],
    needed: Sequence[bool],
) -> tuple[Tensor, Grads]:
    """Backward from the keys and values of the coarse heads to the patches."""
    reduce, _, scale, bias, weight, _ = parameters
    made = native.layer_norm(reduced, scale, bias, eps)
    gradient, g_linear = linear_backward(gradient, F.gelu(made), weight, needed[4:])
    gradient, *norm = native.layer_norm_backward(aten.gelu_backward(gradient, made), reduced, scale, bias, eps)
    g_patches, (g_reduce, shift) = linear_backward(
        gradient, _patches(normed, r).contiguous(), _kernel_rows(reduce), needed[:2]
    )
    if g_reduce is not None:
        g_reduce = g_reduce.unflatten(1, (r, r, -1)).permute(0, 3, 1, 2)
    return g_patches, [g_reduce, shift, *norm, *g_linear]


def _local_project(
    x: Tensor,
    scale: Tensor | None,
    attended: Tensor,
    local: Tensor,
    taps: Tensor,
    shift: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> Tensor:
    """Add the local term to ``attended``, in place, project the sum, and add it to x."""
    native.depthwise_add(local, native.tap_major(taps), shift, attended)
    if scale is None:
        return linear(attended, weight, bias, x)
    out = linear(attended, weight, bias)
    return torch.addcmul(x, out, scale, out=out)


def _local_project_backward(
    gradient: Tensor,
    scale: Tensor | None,
    attended: Tensor,
    local: Tensor,
    g_local: Tensor,
    parameters: Sequence[Tensor],
    needed: Sequence[bool],
) -> tuple[Tensor, Grads]:
    gradient = gradient if scale is None else gradient * scale
    g_attended, g_linear = linear_backward(gradient, attended, parameters[2], needed[2:])
    made = native.depthwise_backward(local, g_attended, native.tap_major(parameters[0]), g_local)
    return g_attended, [*_depthwise_gradients(made), *g_linear]


def _patches(x: Tensor, r: int) -> Tensor:
    """(B, H, W, C) -> (B, ceil(H / r), ceil(W / r), r * r * C): the inputs of a convolution of stride r."""
    _, H, W, _ = x.shape
    if H % r or W % r:
        x = F.pad(x, (0, 0, 0, -W % r, 0, -H % r))
    return x.unflatten(2, (-1, r)).unflatten(1, (-1, r)).transpose(2, 3).flatten(3)


def _merge_patches(patches: Tensor, r: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of :func:`_patches`."""
    x = patches.unflatten(3, (r, r, -1)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return x[:, : grid[0], : grid[1]]


def _kernel_rows(weight: Tensor) -> Tensor:
    """Weight of a convolution (out, C, r, r) as a linear map of patches."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None = None) -> Tensor:
    width = len(weight)
    return native.linear(x.contiguous(), native.pack(weight), native.padded(bias, width), width, add=add)


def linear_backward(gradient: Tensor, x: Tensor, weight: Tensor, needed: Sequence[bool]) -> tuple[Tensor, Grads]:
    n = weight.shape[1]
    g_x = native.linear(gradient, native.pack(weight, transposed=True), native.padded(None, n), n)
    if not any(needed):
        return g_x, [None, None]
    g_weight, g_bias = weight.new_empty(weight.shape), weight.new_empty(len(weight))
    native.linear_gradient(gradient, x, g_weight, g_bias)
    return g_x, [g_weight, g_bias]
