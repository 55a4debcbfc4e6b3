"""Tensors that are shared out over processes (FSDP2): who holds what, and how to get at it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def shard(model: nn.Module, mesh: Any) -> nn.Module:
    """Share a network's parameters out over the processes of a mesh: one group for each block, one for the rest."""
    from torch.distributed.fsdp import fully_shard

    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] == "blocks":
            for block in module.children():
                fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def full(value: Tensor) -> Tensor:
    """All of a tensor that may be shared out; then all processes have to call this."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value  # type: ignore[operator]


def own(value: Tensor) -> Tensor:
    """This process's part of a tensor that may be shared out."""
    return value.to_local() if hasattr(value, "to_local") else value  # type: ignore[operator]
