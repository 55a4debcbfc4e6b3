"""Sharding over processes with FSDP2, and access to full tensors and local shards."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def shard(model: nn.Module, mesh: Any) -> nn.Module:
    """Shard a network's parameters over the processes of a mesh: one group per block, and one for the rest."""
    from torch.distributed.fsdp import fully_shard

    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] == "blocks":
            for block in module.children():
                fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def full(value: Tensor) -> Tensor:
    """The full tensor of a possibly sharded one; for a sharded tensor all processes must call this."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value  # type: ignore[operator]


def local_shard(value: Tensor) -> Tensor:
    """This process's shard of a possibly sharded tensor."""
    return value.to_local() if hasattr(value, "to_local") else value  # type: ignore[operator]
