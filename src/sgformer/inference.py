"""Preparing a network for inference, and compiling its blocks: the same numbers, sooner.

:func:`optimize` is what ``sgformer bench --backend optimize`` measures. docs/performance.md says what each step brings.
"""

from __future__ import annotations

import copy

import torch
import torch.nn as nn
from torch import Tensor

from sgformer.backbone import SGFormer
from sgformer.layers import Mlp


def optimize(model: SGFormer, pack: bool | None = None) -> SGFormer:
    """A copy of a network that infers faster and computes the same function. The original is left as it is.

    The copy is frozen and in evaluation mode, and ``x + depthwise(x)`` of every MLP is one convolution. Where weights
    are packed, linear maps go to oneDNN in its own layout, bias within the kernel, and GELUs overwrite their input.
    ``forward_features``, ``forward_intermediates`` and ``inspect`` work as before; training a packed copy, saving it
    and moving it to another device do not: do that with the original, and prepare again.

    Args:
        model: any SGFormer, in any mode and dtype, on the device where it will run.
        pack: whether to pack weights. None: where it is possible, that is on the CPU in float32. False leaves
            operations that any exporter and compiler knows.

    Raises:
        TypeError: not an SGFormer.
        ValueError: ``pack=True`` where it is not possible.
    """
    if not isinstance(model, SGFormer):
        raise TypeError(f"optimize prepares an SGFormer (got {type(model).__name__}); of a wrapper, pass what it wraps")
    fast = copy.deepcopy(model).eval().requires_grad_(False)
    first = next(fast.parameters())
    possible = first.device.type == "cpu" and first.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    if pack and not possible:
        raise ValueError(f"weights are packed on the CPU in float32 (got {first.dtype} on {first.device})")
    pack = possible if pack is None else pack
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
    return fast


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


def compile_blocks(model: nn.Module, dynamic: bool | None = False) -> nn.Module:
    """Let ``torch.compile`` compile a network's blocks, each kind of block once and not each block; in place.

    Blocks of one stage share their code, so a network of 23 blocks needs seven compilations of a block instead of one
    of a graph of 23; they happen in the first call. For training and for inference.

    Args:
        model: an SGFormer.
        dynamic: True: code for any image and batch size, so that another size compiles nothing anew; False: code for the
            sizes that come, a little quicker. None: torch decides.

    Returns:
        The same model.
    """
    for block in (b for stage in model.stages for b in stage.blocks):
        block.compile(dynamic=dynamic)
    return model
