"""Chains of convolutions, each with its GroupNorm and optionally a GELU, as one autograd function of native kernels.

The results of the convolutions are saved for the backward pass; norms and GELUs are recomputed.
Legend: B batch, H x W grid, C channels. Images are (B, H, W, C), contiguous, float32, on the CPU.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from sgformer.backends import native
from sgformer.backends.native_functions import Grads, linear, linear_backward

aten = torch.ops.aten


class ChainFunction(Function):
    """Convolutions, each with its GroupNorm and optionally a GELU: (B, H, W, C_in) to (B, H', W', C)."""

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
            needs_input = i > 0 or ctx.needs_input_grad[0]
            g_x, g_weight = _convolve_backward(g_x, source, weight, stride, padding, groups, needs_input)
            grads = [g_weight, *norm, *grads]
        return g_x, None, *grads


def _by_winograd(weight: Tensor, stride: int, padding: int, groups: int) -> bool:
    width, C, k, _ = weight.shape
    return k == 3 and stride == padding == groups == 1 and width % native.lanes() == C % native.lanes() == 0


def _convolve(x: Tensor, weight: Tensor, stride: int, padding: int, groups: int) -> Tensor:
    if weight.shape[2] == 1:
        return linear(x, weight.flatten(1), None)
    if _by_winograd(weight, stride, padding, groups):
        return native.winograd(x, native.winograd_panels(weight), len(weight))
    image = F.conv2d(x.permute(0, 3, 1, 2), weight, None, stride, padding, groups=groups)
    return image.permute(0, 2, 3, 1).contiguous()


def _convolve_backward(
    gradient: Any, x: Tensor, weight: Tensor, stride: int, padding: int, groups: int, needs_input: bool
) -> tuple[Tensor | None, Tensor]:
    """Gradients of the input, if needed, and of the weight."""
    if weight.shape[2] == 1:
        back, (g_weight, _) = linear_backward(gradient, x, weight.flatten(1), [True])
        return back, g_weight.view_as(weight)  # type: ignore[union-attr]
    if _by_winograd(weight, stride, padding, groups):  # with the kernel rotated
        turned = native.winograd_panels(weight.flip(2, 3).transpose(0, 1))
        g_x = native.winograd(gradient, turned, weight.shape[1]) if needs_input else None
        return g_x, native.winograd_gradient(gradient, x)
    by_torch = groups > 1 or weight.shape[1] % native.lanes() != 0
    made: Any = (None, None)
    if needs_input or by_torch:
        made = aten.convolution_backward(
            gradient.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2), weight, None, [stride] * 2, [padding] * 2, [1, 1],
            False, [0, 0], groups, [needs_input, by_torch, False],
        )  # fmt: skip
    g_x = made[0].permute(0, 2, 3, 1).contiguous() if needs_input else None
    return g_x, made[1] if by_torch else native.conv_gradient(gradient, x, weight.shape[2], stride, padding)
