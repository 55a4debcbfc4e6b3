"""Preparing a network for inference: the same numbers, sooner.

:func:`optimize` is what ``sgformer bench --backend optimize`` measures. docs/performance.md says what each step brings.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from sgformer.backbone import SGFormer
from sgformer.layers import Mlp


def optimize(model: SGFormer, pack: bool | None = None, compile: bool = False, dynamic: bool = False) -> SGFormer:
    """A copy of a network that infers faster and computes the same function. The original is left as it is.

    The copy is frozen and in evaluation mode, and ``x + depthwise(x)`` of every MLP is one convolution. Where weights
    are packed, linear maps go to oneDNN in its own layout, bias within the kernel, and GELUs overwrite their input.
    ``forward_features``, ``forward_intermediates`` and ``inspect`` work as before; training a packed copy, saving it
    and moving it to another device do not: do that with the original, and prepare again.

    Args:
        model: any SGFormer, in any mode and dtype, on the device where it will run.
        pack: whether to pack weights. None: where it is possible, that is on the CPU in float32, unless ``compile`` is
            asked for. False leaves operations that any exporter and compiler knows.
        compile: also let ``torch.compile`` compile the blocks, each kind of block once and not each block: S has 23
            blocks of seven kinds. It happens in the first call, and anew for another image or batch size.
        dynamic: with ``compile``, what was compiled serves other image sizes, too. Slower at the first call and, where
            windows tile the grid, afterwards. Only a batch of one and larger ones are compiled each for themselves, and
            stages of less than 20,480 numbers an image on the CPU, where torch takes another convolution.

    Raises:
        TypeError: not an SGFormer.
        ValueError: ``pack=True`` where it is not possible, or with ``compile``; ``dynamic`` without ``compile``, or for
            a network that has to know the size.
    """
    if not isinstance(model, SGFormer):
        raise TypeError(f"optimize prepares an SGFormer (got {type(model).__name__}); of a wrapper, pass what it wraps")
    if dynamic and not compile:
        raise ValueError("dynamic is for compiled networks; others take any size as they are (got compile=False)")
    fast: Any
    if dynamic:
        from sgformer.exporting import portable  # written for those who must not ask about sizes

        if reason := portable.refusal(model.config) or portable.obstacle(model.config):
            raise ValueError(f"cannot be compiled for all sizes at once: {reason}; leave dynamic=False")
        fast = portable.portable(model)
    else:
        fast = copy.deepcopy(model).eval().requires_grad_(False)
    first = next(fast.parameters())
    possible = first.device.type == "cpu" and first.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    if pack and compile:
        raise ValueError("packed weights are opaque to torch.compile (got pack=True and compile=True)")
    if pack and not possible:
        raise ValueError(f"weights are packed on the CPU in float32 (got {first.dtype} on {first.device})")
    pack = possible and not compile if pack is None else pack
    for module in list(fast.modules()):
        for name, child in module.named_children():
            if isinstance(child, Mlp):
                setattr(module, name, FoldedMlp(child))
    if pack:
        for path, module in list(fast.named_modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.GELU):
                    setattr(module, name, InplaceGELU())
                if type(child) is nn.Linear and "aggregate" not in f"{path}.{name}":  # those are read, not called
                    setattr(module, name, PackedLinear(child))
    for block in (b for stage in fast.stages for b in stage.blocks):
        block.drop_path = nn.Identity()  # its rate, which differs from block to block, would be compiled in
        if dynamic:
            block.forward = _compiled_for_all_grids(block.forward)
        elif compile:
            block.compile(dynamic=False)
    return fast


def _compiled_for_all_grids(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Of tensors that begin with (B, H, W): compiled once for all H and W, which need not be the same."""
    compiled = torch.compile(forward)

    def call(*args: Tensor) -> Any:
        for tensor in args:
            torch._dynamo.mark_dynamic(tensor, (1, 2))
        return compiled(*args)

    return call


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
    """A linear map with its weight in oneDNN's own layout, which saves the packing at every call."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
