"""Kernels that stand in for operations of this room, while a network that asked for them runs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor


class Kernels(Protocol):
    """Operations of the same names and meanings; :meth:`serve` tells for which tensors.

    Attributes:
        WIDEST_HEAD: up to how many channels of a head attention is served.
    """

    WIDEST_HEAD: int

    def serve(self, *tensors: Tensor) -> bool: ...

    def attention_and_received(
        self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, valid_queries: Tensor | None
    ) -> tuple[Tensor, Tensor]: ...

    def aggregate(
        self, x: Tensor, groups: Sequence[Tensor], weights: Sequence[Tensor], bias: Sequence[Tensor]
    ) -> Tensor: ...

    def most_similar(self, x: Tensor, seeds: Tensor) -> Tensor: ...


class _InUse(threading.local):
    kernels: Kernels | None = None


_in_use = _InUse()


@contextlib.contextmanager
def using(kernels: Kernels) -> Iterator[None]:
    """Within the block, and in this thread alone, operations run in these kernels where those serve."""
    before, _in_use.kernels = _in_use.kernels, kernels
    try:
        yield
    finally:
        _in_use.kernels = before


def serving(*tensors: Tensor) -> Kernels | None:
    """The kernels in use that serve these tensors; None: torch does."""
    if torch.compiler.is_compiling():  # it need not see how kernels are chosen: compiled networks have none
        return None
    kernels = _in_use.kernels
    return kernels if kernels is not None and kernels.serve(*tensors) else None
