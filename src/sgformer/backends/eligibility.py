"""Whether parts of a network are unmodified, so that kernels that assume their internals may replace them.

Users modify networks: they replace, hook, adapt, reconfigure and cast layers. A modified layer must be called as it is.
:mod:`sgformer.backends.native_autograd` checks at every call, :func:`sgformer.optimize` once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from sgformer import ops
from sgformer.models.backbone import (
    GuidedBlock,
    HybridBlock,
    HybridScaleAttention,
    PlainAttention,
    PlainBlock,
    SelfGuidedAttention,
)
from sgformer.models.layers import (
    ConvNorm,
    DepthwiseConv,
    DropPath,
    Mlp,
    PositionTable,
    ResidualDepthwiseConv,
    WeightedSum,
)
from sgformer.models.significance import LinearAggregation

HOOKS = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")


def intact(part: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a part is of exactly this type, and neither it nor anything within it was modified."""
    return type(part) is kind and _usual(part)


def readable(part: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a part is intact, with parameters that kernels can read."""
    return intact(part, kind) and _plainly(part)


def _plainly(module: Any) -> bool:
    for parameter in module._parameters.values():
        if parameter is not None and not plain(parameter):
            return False
    return all(map(_plainly, module._modules.values()))


def plain(x: Tensor) -> bool:
    """Whether kernels can read a tensor: float32, on the CPU, strided, and not of a tensor subclass."""
    return type(x) in (Tensor, nn.Parameter) and x.dtype == torch.float32 and x.is_cpu and x.layout == torch.strided


def observed() -> bool:
    """Whether torch's operations are recorded or transformed as they run, by what could not see those of kernels."""
    return (
        torch.jit.is_tracing()
        or torch.compiler.is_compiling()
        or bool(torch._C._functorch.peek_interpreter_stack())
        or bool(torch._C._len_torch_dispatch_stack())
    )


def untouched(module: nn.Module) -> bool:
    """Whether a module, whatever it consists of, is called as its class says, and nothing observes that."""
    own = vars(module)  # a step of N checks 217 modules, and a loop over HOOKS takes twice as long
    return (
        "forward" not in own
        and not own["_forward_hooks"]
        and not own["_forward_pre_hooks"]
        and not own["_backward_hooks"]
        and not own["_backward_pre_hooks"]
    )


def _usual(module: Any) -> bool:
    as_built, own = KNOWN.get(type(module)), vars(module)
    return (
        as_built is not None and untouched(module) and as_built(module) and all(map(_usual, own["_modules"].values()))
    )


def _holds(module: nn.Module, **kinds: type[nn.Module] | tuple[type[nn.Module], ...]) -> bool:
    """Whether its children are exactly these, by name and type."""
    found = module._modules
    return found.keys() == kinds.keys() and all(
        type(found[name]) in (kind if isinstance(kind, tuple) else (kind,)) for name, kind in kinds.items()
    )


def _attends(attn: nn.Module, **others: type[nn.Module]) -> bool:
    return _holds(attn, proj_in=nn.Linear, local=DepthwiseConv, proj=nn.Linear, **others)


def _adds(block: nn.Module, attn: type[nn.Module]) -> bool:
    return _holds(block, norm1=nn.LayerNorm, attn=attn, norm2=nn.LayerNorm, mlp=Mlp, drop_path=(nn.Identity, DropPath))


def _convolves(conv: nn.Conv2d, kernel: int, stride: int, padding: int, groups: int) -> bool:
    found = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    return found == ((kernel,) * 2, (stride,) * 2, (padding,) * 2, (1, 1), groups, "zeros")


def _square(conv: nn.Conv2d) -> bool:
    sides = (conv.kernel_size, conv.stride, conv.padding)
    return all(isinstance(side, tuple) and side[0] == side[1] for side in sides)


def _halves_or_mixes(conv: nn.Conv2d) -> bool:
    """Whether a ConvNorm's convolution halves the grid if depthwise, and keeps it if 1 x 1; others may do either."""
    if conv.groups > 1:
        return _convolves(conv, 3, 2, 1, conv.in_channels) and conv.out_channels == conv.in_channels
    return conv.kernel_size != (1, 1) or _convolves(conv, 1, 1, 0, 1)


#: The supported types, each with a check that a module is configured as in the networks here.
KNOWN: dict[type[nn.Module], Callable[[Any], bool]] = {
    **dict.fromkeys((nn.Identity, DropPath, PositionTable, ResidualDepthwiseConv, WeightedSum), lambda m: True),
    nn.Linear: lambda m: m.bias is not None,
    nn.LayerNorm: lambda m: m.bias is not None and len(m.normalized_shape) == 1,
    nn.GroupNorm: lambda m: m.num_groups == 1 and m.affine,
    nn.GELU: lambda m: m.approximate == "none",
    nn.Conv2d: lambda m: (m.dilation, m.padding_mode) == ((1, 1), "zeros") and _square(m),
    DepthwiseConv: lambda m: _convolves(m, 3, 1, 1, m.in_channels) and m.bias is not None,
    ConvNorm: lambda m: (
        _holds(m, conv=nn.Conv2d, norm=nn.GroupNorm, act=(nn.GELU, nn.Identity))
        and m.conv.bias is None
        and _halves_or_mixes(m.conv)
    ),
    Mlp: lambda m: _holds(m, fc1=nn.Linear, conv=ResidualDepthwiseConv, fc2=nn.Linear),
    LinearAggregation: lambda m: all(type(child) is WeightedSum for child in m),
    HybridScaleAttention: lambda m: (
        _attends(m, reduce=nn.Conv2d, reduce_norm=nn.LayerNorm, kv_coarse=nn.Linear)
        and _convolves(m.reduce, m.reduction, m.reduction, 0, 1)
        and m.reduce.bias is not None
    ),
    SelfGuidedAttention: lambda m: _attends(m, aggregate=LinearAggregation, kv=nn.Linear) and m.attend is ops.attend,
    PlainAttention: _attends,
    HybridBlock: lambda m: _adds(m, HybridScaleAttention),
    GuidedBlock: lambda m: _adds(m, SelfGuidedAttention) and "source" in vars(m),  # a function, not a module
    PlainBlock: lambda m: _adds(m, PlainAttention),
}
