"""Optimizing a network for inference: the same results, faster.

:func:`optimize` is what ``sgformer bench --backend optimize`` measures. docs/performance.md lists each step's gain.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from sgformer.backends import native as kernels
from sgformer.backends.eligibility import intact, readable
from sgformer.backends.native_autograd import accelerate, restore
from sgformer.backends.native_modules import (
    FoldedMlp,
    InplaceGELU,
    KeptPositions,
    NativeConv,
    NativeLinear,
    PackedLinear,
    make_native,
)
from sgformer.backends.triton import check
from sgformer.core.errors import UserError
from sgformer.models.backbone import SGFormer
from sgformer.models.layers import ClassifierHead, ConvNorm, DropPath, Mlp, PositionTable

log = logging.getLogger("sgformer")


def optimize(
    model: SGFormer,
    pack: bool | None = None,
    compile: bool = False,
    dynamic: bool = False,
    native: bool | None = None,
    precision: str = "fp32",
    triton: bool = False,
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
        precision: what linear maps are computed in, by native kernels only: "fp32"; "bf16", operands rounded to
            bfloat16, on processors with AVX512-BF16; "int8", on those with AVX512-VNNI: weights in 255 steps per output
            channel, activations in 256 per token, from its least to its largest number: nothing has to be calibrated.
            Those with AMX multiply both in tiles, which is quicker. Sums are exact or float32, and so are the
            activations between operations. What is more sensitive or no linear map stays in float32: the stem,
            attention's products, norms, depthwise convolutions, the classifier and, next to int8, downsampling; with
            AMX, stem and downsampling are bfloat16 at either precision. ``wide`` of the result names the layers with
            float32 weights, among them those of parts that were modified.
        native: whether packed networks use kernels that the machine's C++ compiler builds for its own processor, in a
            few seconds the first time, and caches in ``~/.cache/sgformer``. None: if weights are packed and there is a
            compiler (g++ or clang++ with OpenMP).
        triton: on a CUDA device, attention that also counts what tokens receive, and aggregation, in Triton's kernels,
            in float32, bfloat16 and float16; other dtypes stay in torch. Off, because they have not been measured.

    Raises:
        TypeError: not an SGFormer.
        UserError: a ``precision`` other than "fp32" that is unknown, or that this network or machine does not support.
            Also ``triton`` without the package of this name, or for a network that is not on a CUDA device.
        ValueError: ``pack=True`` if not possible, or with ``compile``; ``dynamic`` without ``compile``, or for a
            network that must know the size; ``native=True`` without packed weights; ``triton`` with ``compile``.
        sgformer.backends.native.UnavailableError: ``native=True``, and the kernels cannot be compiled here.
    """
    if not isinstance(model, SGFormer):
        raise TypeError(f"optimize takes an SGFormer (got {type(model).__name__}); pass the network inside a wrapper")
    if triton:
        if compile:
            raise ValueError("Triton's kernels are opaque to torch.compile (got triton=True and compile=True)")
        check(next(model.parameters()).device)
        pack = False if pack is None else pack
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
    kind = 0
    if precision != "fp32":
        kind = _narrow_kind(precision, pack and native is not False)
        native = True
    elif pack and native is not False:
        native = _use_kernels(required=bool(native))
    if native:
        make_native(fast, kind)
    if triton:
        accelerate(fast, triton=True)
    for module in list(fast.modules()):
        for name, child in module.named_children():
            if intact(child, Mlp):
                setattr(module, name, FoldedMlp(child))
    if pack:
        if readable(fast.stem.position, PositionTable):
            fast.stem.position = KeptPositions(fast.stem.position)
        for module in list(fast.modules()):
            if isinstance(module, FoldedMlp | ConvNorm) and intact(module.act, nn.GELU):
                module.act = InplaceGELU()
            for name, child in module.named_children():
                if readable(child, nn.Linear):
                    narrow = 0 if isinstance(module, ClassifierHead) else kind
                    setattr(module, name, NativeLinear(child, narrow) if native else PackedLinear(child))
    for block in (b for stage in fast.stages for b in stage.blocks):
        if type(getattr(block, "drop_path", None)) is DropPath:
            block.drop_path = nn.Identity()  # its rate differs between blocks and would be compiled in
        if dynamic:
            block.forward = _compiled_for_all_grids(block.forward)
        elif compile:
            block.compile(dynamic=False)
    if kind:
        fast.wide = tuple(name for name, module in fast.named_modules() if _is_wide(module))
    return fast


def _narrow_kind(precision: str, possible: bool) -> int:
    if precision not in kernels.PRECISIONS:
        raise UserError(f"precision is one of {', '.join(kernels.PRECISIONS)} (got {precision!r})")
    if not possible:
        raise UserError(
            f"precision {precision} is for native kernels, on the CPU in float32 without compile; take fp32"
        )
    try:
        kind = kernels.kind(precision)
    except kernels.UnavailableError as error:
        raise UserError(f"precision {precision} is not possible here: {error}; take fp32") from error
    if kind == kernels.BF16_SINGLE:
        log.warning("note: this processor multiplies bfloat16 no faster than float32; int8 and fp32 are faster here")
    return kind


def _is_wide(module: nn.Module) -> bool:
    """Whether it is a linear map or a convolution with weights in float32."""
    if isinstance(module, NativeLinear | NativeConv):
        return not module.kind
    return isinstance(module, PackedLinear | nn.Linear | nn.Conv2d)


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
