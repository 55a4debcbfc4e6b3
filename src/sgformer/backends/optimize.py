"""Optimizing a network for inference: the same results, faster.

:func:`optimize` is what ``sgformer bench --backend optimize`` measures. docs/performance.md lists each step's gain.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from sgformer.backends import native as kernels
from sgformer.backends.eligibility import intact, readable
from sgformer.backends.native_autograd import restore
from sgformer.backends.native_modules import FoldedMlp, InplaceGELU, NativeLinear, PackedLinear, make_native
from sgformer.models.backbone import SGFormer
from sgformer.models.layers import ConvNorm, DropPath, Mlp


def optimize(
    model: SGFormer,
    pack: bool | None = None,
    compile: bool = False,
    dynamic: bool = False,
    native: bool | None = None,
    precision: str = "fp32",
) -> SGFormer:
    """A copy of a network that infers faster and computes the same function. The original is not changed.

    The copy is frozen and in evaluation mode, and ``x + depthwise(x)`` of every MLP is one convolution. Where weights
    are packed, stem and blocks run in native kernels, a block in one call; without them linear maps go to oneDNN in its
    own layout, bias within the kernel, and GELUs overwrite their input. Modules that were hooked, replaced or
    reconfigured since the network was built are called as they are. ``forward_features``, ``forward_intermediates`` and
    ``inspect`` work as before; a packed copy cannot be trained, saved or moved to another device: do that with the
    original, and optimize it again.

    Args:
        model: any SGFormer, in any mode and dtype, on the device where it will run.
        pack: whether to pack weights. None: if possible, that is on the CPU in float32 without ``compile``. False keeps
            to operations that any exporter and compiler supports.
        compile: also run ``torch.compile`` on the blocks, once per kind of block, not per block: S has 23 blocks of
            seven kinds. The first call compiles, and so does every new image or batch size.
        dynamic: with ``compile``, the compiled blocks accept other image sizes, too. Slower at the first call and, if
            windows tile the grid, afterwards. Only batches of one and larger ones are compiled separately, and stages
            of less than 20,480 values per image on the CPU, where torch uses another convolution.
        native: whether packed networks use kernels that the machine's C++ compiler builds for its own processor, in a
            few seconds the first time, and caches in ``~/.cache/sgformer``. None: if weights are packed and there is a
            compiler (g++ or clang++ with OpenMP).

    Raises:
        TypeError: not an SGFormer.
        ValueError: ``pack=True`` if not possible, or with ``compile``; ``dynamic`` without ``compile``, or for a
            network that must know the size; ``native=True`` without packed weights.
        sgformer.backends.native.UnavailableError: ``native=True``, and the kernels cannot be compiled here.
    """
    if not isinstance(model, SGFormer):
        raise TypeError(f"optimize takes an SGFormer (got {type(model).__name__}); pass the network inside a wrapper")
    if dynamic and not compile:
        raise ValueError("dynamic is for compiled networks; others take any size anyway (got compile=False)")
    fast: Any
    if dynamic:
        from sgformer.backends import traceable as traceable  # without control flow on sizes

        if reason := traceable.why_unsupported(model.config) or traceable.why_fixed_size(model.config):
            raise ValueError(f"cannot be compiled for all sizes at once: {reason}; leave dynamic=False")
        fast = traceable.traceable(model)
    else:
        fast = copy.deepcopy(model).eval().requires_grad_(False)
        restore(fast)
    first = next(fast.parameters())
    possible = first.device.type == "cpu" and first.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    if pack and compile:
        raise ValueError("packed weights are opaque to torch.compile (got pack=True and compile=True)")
    if pack and not possible:
        raise ValueError(f"weights are packed on the CPU in float32 (got {first.dtype} on {first.device})")
    pack = possible and not compile if pack is None else pack
    if native and not pack:
        raise ValueError("native kernels are for packed weights, on the CPU in float32 (got native=True)")
    if pack and native is not False:
        native = _use_kernels(required=bool(native))
    if native:
        make_native(fast, precision)
    for module in list(fast.modules()):
        for name, child in module.named_children():
            if intact(child, Mlp):
                setattr(module, name, FoldedMlp(child))
    if pack:
        for module in list(fast.modules()):
            if isinstance(module, FoldedMlp | ConvNorm) and intact(module.act, nn.GELU):
                module.act = InplaceGELU()
            for name, child in module.named_children():
                if readable(child, nn.Linear):
                    setattr(module, name, NativeLinear(child) if native else PackedLinear(child))
    for block in (b for stage in fast.stages for b in stage.blocks):
        if type(getattr(block, "drop_path", None)) is DropPath:
            block.drop_path = nn.Identity()  # its rate differs between blocks and would be compiled in
        if dynamic:
            block.forward = _compiled_for_all_grids(block.forward)
        elif compile:
            block.compile(dynamic=False)
    return fast


def _use_kernels(required: bool) -> bool:
    try:
        kernels.library()
    except kernels.UnavailableError:
        if required:
            raise
        return False
    return True


def _compiled_for_all_grids(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function of (B, H, W, ...) tensors once for all H and W, which may differ."""
    compiled = torch.compile(forward)

    def call(*args: Tensor) -> Any:
        for tensor in args:
            torch._dynamo.mark_dynamic(tensor, (1, 2))
        return compiled(*args)

    return call
