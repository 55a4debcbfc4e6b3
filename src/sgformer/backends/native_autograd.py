"""Training on the CPU with native kernels, forward and backward: the same results, faster and in half the memory.

:func:`accelerate` puts the modules here into a network; they call native functions where eligible, else torch's. The
functions, and what they save for the backward pass, are in
:mod:`~sgformer.backends.native_functions` and :mod:`~sgformer.backends.native_convolutions`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.modules import module as _modules

from sgformer import ops
from sgformer.backends import native
from sgformer.backends.eligibility import HOOKS, observed, plain, readable
from sgformer.backends.native_convolutions import ChainFunction
from sgformer.backends.native_functions import GuidedFunction, HybridFunction, MlpFunction, PlainFunction
from sgformer.backends.triton import check
from sgformer.models.backbone import (
    Block,
    GuidedBlock,
    HybridBlock,
    HybridScaleAttention,
    PlainAttention,
    PlainBlock,
    SelfGuidedAttention,
)
from sgformer.models.layers import ConvNorm, Downsample, DropPath, Mlp, Stem

Network = TypeVar("Network", bound=nn.Module)


def accelerate(model: Network, triton: bool = False) -> Network:
    """Train a network on the CPU with native kernels: the same gradients, faster, in about half the memory.

    The network is changed in place and keeps its parameters and their names: it can be saved, copied, moved and wrapped
    as before (FSDP: wrap afterwards). Where the kernels are not eligible (on another device, in another dtype, within
    autocast, traced, compiled, or if a part was hooked, replaced or reconfigured) the network runs in torch as before.
    The kernels also run in evaluation, but :func:`sgformer.optimize` is faster there. A block with another kind of
    attention or significance keeps torch's attention. Higher-order and batched gradients (``is_grads_batched``) are not
    supported.

    Args:
        model: an SGFormer, in any mode, or a module that contains some, e.g. a detector.
        triton: on a CUDA device instead: attention that also counts what tokens receive, and aggregation, in Triton's
            kernels, in float32, bfloat16 and float16. Off, because they have not been measured. Whatever was hooked or
            replaced is called as before. On other devices, traced or compiled, the network runs in torch.

    Returns:
        The model.

    Raises:
        ValueError: the model contains no SGFormer.
        UserError: ``triton`` without the package of this name, or without a CUDA device.
        sgformer.backends.native.UnavailableError: the kernels cannot be compiled here.
    """
    if triton:
        check()
        from sgformer.backends.triton.modules import EAGER as by_triton  # imports triton

        kinds = {eager: fast for fast, eager in by_triton.items()}
    else:
        native.library()
        kinds = {eager: fast for fast, eager in EAGER.items()}
    for module in model.modules():
        module.__class__ = kinds.get(type(module), type(module))
    if not any(type(module) in kinds.values() for module in model.modules()):
        raise ValueError(
            f"accelerate is for networks of sgformer, before they are wrapped (got {type(model).__name__})"
        )
    return model


def restore(model: nn.Module) -> None:
    """Undo :func:`accelerate`, in place."""
    # Triton's modules are only known where something imported them.
    by_triton = sys.modules.get("sgformer.backends.triton.modules")
    eager = {**EAGER, **(by_triton.EAGER if by_triton else {})}
    for module in model.modules():
        module.__class__ = eager.get(type(module), type(module))


def _served(x: Tensor, parts: Mapping[nn.Module, type[nn.Module]]) -> bool:
    """Whether native kernels can replace ``parts``, of the given types, for the input x in the current context.

    Not if something observes them: hooks expect to be called, and dispatch modes to see torch's operations.
    """
    # Checked at every call, not left to torch's dispatcher by torch.library.custom_op: an operator adds at least 37 us
    # to a call and saves 2 of the 15 us of these checks; a training step of N with operators takes 1.04 times as long
    # (benchmarks/native_autograd.py, docs/notes/native_autograd.md).
    return (
        plain(x)
        and not torch.is_autocast_enabled("cpu")
        and not observed()
        and not any(getattr(_modules, f"_global_{hooks}") for hooks in HOOKS)
        and all(readable(part, kind) for part, kind in parts.items())
        and _available()
    )


@functools.cache
def _available() -> bool:
    """Whether the kernels compile: a network accelerated elsewhere may be loaded on a machine where they do not."""
    try:
        native.library()
    except native.UnavailableError:
        return False
    return True


# -- blocks -----------------------------------------------------------------------------------------------------


class _FastBlock(Block):
    """Both halves in native kernels, each with its norm and residual; in torch where a half is not eligible."""

    def _serves(self, x: Tensor, norm: nn.Module, part: nn.Module, kind: type[nn.Module]) -> bool:
        drop = DropPath if type(self.drop_path) is DropPath else nn.Identity
        return _served(x, {norm: nn.LayerNorm, part: kind, self.drop_path: drop})

    def _scale(self, x: Tensor) -> Tensor | None:
        """The stochastic depth factor of every image, (B, 1, 1, 1), drawn like in torch; None if it is 1."""
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
        gates = isinstance(self.source, nn.Module)  # a source with parameters also gates the tokens
        if gates or not self._serves(x, self.norm1, self.attn, SelfGuidedAttention):
            return super().forward(x, coarse, fine)
        attn: Any = self.attn
        significance = self.source(x, coarse, fine)
        order = ops.sort_tokens(significance.expand(x.shape[:-1]).flatten(1))
        groups = ops.group_at(order, attn.aggregate.ends, attn.aggregate.rates)
        parameters = [*_pair(self.norm1), *_pair(attn.proj_in), *_pair(attn.local), *_pair(attn.proj)]
        parameters += [*_pair(attn.kv), *attn.aggregate.weights(), *(m.bias for m in attn.aggregate)]
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


# -- stem and downsampling --------------------------------------------------------------------------------------


class FastStem(Stem):
    def forward(self, x: Tensor) -> Tensor:
        if not _served(x, dict.fromkeys((self.conv1, self.conv2, self.conv3), ConvNorm)):
            return super().forward(x)
        x = self.norm(_convolved(x.permute(0, 2, 3, 1), self.conv1, self.conv2, self.conv3))
        return self.position(x).permute(0, 3, 1, 2)


class FastDownsample(Downsample):
    def forward(self, x: Tensor) -> Tensor:
        layers = (self.expand, self.reduce, self.mix)
        return _convolved(x, *layers) if _served(x, dict.fromkeys(layers, ConvNorm)) else super().forward(x)


def _convolved(x: Tensor, *layers: ConvNorm) -> Tensor:
    options = [
        (m.conv.stride[0], m.conv.padding[0], m.conv.groups, m.norm.eps, isinstance(m.act, nn.GELU)) for m in layers
    ]
    return ChainFunction.apply(x, options, *(p for m in layers for p in (m.conv.weight, *_pair(m.norm))))


#: Native module -> the module that :func:`accelerate` replaces with it.
EAGER: dict[type[nn.Module], type[nn.Module]] = {
    FastHybrid: HybridBlock,
    FastGuided: GuidedBlock,
    FastPlain: PlainBlock,
    FastStem: Stem,
    FastDownsample: Downsample,
}
