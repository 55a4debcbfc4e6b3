"""timm's optimisers, by name."""

from __future__ import annotations

import functools
from typing import Any

import timm.optim.muon
import torch
from timm.optim import create_optimizer_v2, list_optimizers

from sgformer.core.errors import UserError
from sgformer.core.names import nearest

_newton_schulz = timm.optim.muon.zeropower_via_newtonschulz


def check_optimizer(name: str) -> None:
    """Raise UserError unless timm has an optimiser with this name."""
    known = [str(one) for one in list_optimizers()]
    if name.lower() not in known:
        raise UserError(f"unknown --opt {name}{nearest(name, known)}")


def create_optimizer(parameters: Any, **options: Any) -> torch.optim.Optimizer:
    """Build an optimiser of timm.

    Muon orthogonalises in bfloat16, which on a processor without products of that type takes 30 times as long as in
    float32; there it runs in float32.

    Args:
        parameters: a network or parameter groups.
        options: of `timm.optim.create_optimizer_v2`.
    """
    optimizer = create_optimizer_v2(parameters, **options)
    if isinstance(optimizer, timm.optim.muon.Muon) and not _has_bfloat16(optimizer):
        optimizer.register_step_pre_hook(lambda *_: _set_dtype(torch.float32))
        optimizer.register_step_post_hook(lambda *_: _set_dtype(None))
    return optimizer


def _has_bfloat16(optimizer: torch.optim.Optimizer) -> bool:
    on_cpu = optimizer.param_groups[0]["params"][0].device.type == "cpu"
    return not on_cpu or (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _set_dtype(dtype: torch.dtype | None) -> None:
    """By timm's module, as its optimiser has no option for it."""
    changed = functools.partial(_newton_schulz, dtype=dtype) if dtype else _newton_schulz
    timm.optim.muon.zeropower_via_newtonschulz = changed  # type: ignore[assignment]
