"""How the processes of a run meet, and what goes between them: tensors and JSON, never pickles.

torch's object collectives, which Lightning uses too, unpickle what arrives: whoever reaches a process could run code.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
from typing import Any

import torch
from torch import distributed
from torch.distributed import TCPStore

LOOPBACK = "127.0.0.1"


def gather(value: Any) -> list[Any]:
    """A value of every process, in their order; all of them must call this.

    Args:
        value: made of what JSON has; tuples become lists.
    """
    if not distributed.is_initialized():
        return json.loads(json.dumps([value]))
    data = _encoded(value)
    sizes = [torch.zeros(1, dtype=torch.int64, device=data.device) for _ in range(distributed.get_world_size())]
    distributed.all_gather(sizes, torch.tensor([len(data)], device=data.device))
    longest = max(map(int, sizes))
    parts = [torch.empty(longest, dtype=torch.uint8, device=data.device) for _ in sizes]
    distributed.all_gather(parts, torch.nn.functional.pad(data, (0, longest - len(data))))
    return [_decoded(part[: int(size)]) for part, size in zip(parts, sizes, strict=True)]


def broadcast(value: Any, source: int = 0) -> Any:
    """A value of one process, on all of them, which must all call this.

    Args:
        value: as for `gather`; a path becomes its text. Other processes' values do not count.
        source: the process.
    """
    if not distributed.is_initialized():
        return value
    data = _encoded(value)
    size = torch.tensor([len(data)], device=data.device)
    distributed.broadcast(size, source)
    if distributed.get_rank() != source:
        data = torch.empty(int(size), dtype=torch.uint8, device=data.device)
    distributed.broadcast(data, source)
    return _decoded(data)


def _encoded(value: Any) -> torch.Tensor:
    on_gpu = distributed.get_backend() == "nccl"
    data = torch.frombuffer(bytearray(json.dumps(value, default=os.fspath), "ascii"), dtype=torch.uint8)
    return data.to(torch.device("cuda", torch.cuda.current_device()) if on_gpu else "cpu")


def _decoded(data: torch.Tensor) -> Any:
    return json.loads(data.cpu().numpy().tobytes())


class Ranks:
    """Mixed into a strategy of Lightning: its processes exchange JSON and, on one machine, listen on loopback only."""

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return broadcast(obj, src)

    def meet(self) -> None:
        """Connect the processes, if this is one machine and they are not yet; Lightning then leaves them as they are.

        torch's store would listen on every interface, and gloo on that of the host's name. Under torchrun the store
        is torchrun's own.
        """
        strategy: Any = self
        if distributed.is_initialized() or strategy.num_nodes > 1:
            return
        use_loopback()
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return
        strategy.set_world_ranks()
        rank, world, port = strategy.global_rank, strategy.world_size, strategy.cluster_environment.main_port
        backend, device = strategy._get_process_group_backend(), strategy.root_device
        distributed.init_process_group(
            backend,
            store=loopback_store(port, rank, world),
            rank=rank,
            world_size=world,
            timeout=strategy._timeout,
            device_id=None if device.type == "cpu" else device,
        )
        if backend == "nccl":  # as Lightning does: torch warns about a group that is left open
            atexit.register(distributed.destroy_process_group)


def use_loopback() -> None:
    """Make gloo and NCCL listen on loopback, unless the environment names another interface."""
    names = {name for _, name in socket.if_nameindex()} if hasattr(socket, "if_nameindex") else set()
    for name in ("lo", "lo0"):
        if name in names:
            for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                os.environ.setdefault(variable, name)


def loopback_store(port: int, rank: int, world: int) -> TCPStore:
    """The store through which the processes of one machine find each other; the first one serves it, on loopback.

    Args:
        port: the same in all of them, and free.
        rank, world: this process's number, and how many there are.
    """
    listener = None
    if rank == 0:
        with socket.socket() as opened:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            opened.bind((LOOPBACK, port))
            opened.listen(128)
            listener = opened.detach()  # the store closes it
    return TCPStore(LOOPBACK, port, world, rank == 0, master_listen_fd=listener)
