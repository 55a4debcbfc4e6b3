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

    On a CPU Muon orthogonalises in float32 instead of bfloat16: for matrices of a few hundred rows that takes half the
    time with AVX512-BF16, and a thirtieth without.

    Args:
        parameters: a network or parameter groups.
        options: of `timm.optim.create_optimizer_v2`.
    """
    optimizer = create_optimizer_v2(parameters, **options)
    if isinstance(optimizer, timm.optim.muon.Muon) and _on_cpu(optimizer):
        optimizer.register_step_pre_hook(lambda *_: _set_dtype(torch.float32))
        optimizer.register_step_post_hook(lambda *_: _set_dtype(None))
    return optimizer


def _on_cpu(optimizer: torch.optim.Optimizer) -> bool:
    return optimizer.param_groups[0]["params"][0].device.type == "cpu"


def _set_dtype(dtype: torch.dtype | None) -> None:
    """By timm's module, as its optimiser has no option for it."""
    changed = functools.partial(_newton_schulz, dtype=dtype) if dtype else _newton_schulz
    timm.optim.muon.zeropower_via_newtonschulz = changed  # type: ignore[assignment]
