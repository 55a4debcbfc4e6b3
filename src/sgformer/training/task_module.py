"""What the tasks share: which network validation runs, and a network that is shared out over processes (FSDP2)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import nn

from sgformer.training.sharded import full, shard


class NetworkTask(L.LightningModule):
    """Trains `model`; validation runs `eval_model`.

    Under a strategy with a device mesh, the parameters of `model` are shared out over the processes before training
    (`fully_shard`), block by block. Validation, files of weights and pictures then use `unsharded`, a plain network on
    every process, which `gather` fills: no process has to wait for another inside a forward pass, so that each may have
    as many images, and of such sizes, as its share has.

    Attributes:
        unsharded: the plain network, or None where `model` is one itself.
    """

    model: Any
    unsharded: nn.Module | None = None

    def __init__(self) -> None:
        super().__init__()
        self._eval_model: list[nn.Module] = []  # in a list: a submodule would enter the state_dict

    @property
    def eval_model(self) -> nn.Module:
        """What validation runs and what is saved: the averaged weights if there are any."""
        if self.unsharded is not None:
            return self.unsharded
        return self._eval_model[0] if self._eval_model else self.model

    def evaluate_with(self, model: nn.Module) -> None:
        """Let validation run `model`, or its weights, in place of the network being trained."""
        self._eval_model = [model]

    def configure_model(self) -> None:
        mesh = self.device_mesh
        if mesh is None or self.unsharded is not None:
            return
        network = self.model
        # A copy with plain batch norms: those that are tied together would wait for the other processes.
        object.__setattr__(self, "unsharded", copy.deepcopy(network).requires_grad_(False))  # no submodule, see above
        if mesh.device_type == "cuda" and mesh.size() > 1:  # as DDP does, which this strategy leaves to us
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        self.model = shard(network, mesh["data_parallel"])

    def gather(self, averaged: bool = True) -> None:
        """Fill `unsharded` from all processes, which all have to call this.

        Args:
            averaged: take the weights that `evaluate_with` named, if any, else those being trained.
        """
        if self.unsharded is None:
            return
        source = self._eval_model[0] if averaged and self._eval_model else self.model
        parameters, buffers = dict(source.named_parameters()), dict(source.named_buffers())
        for name, weight in self.unsharded.named_parameters():
            weight.copy_(full(parameters[name].detach()))
        for name, statistic in self.unsharded.named_buffers():
            value = full(buffers[name].detach())
            torch.distributed.broadcast(value, 0)  # every process has statistics of its own: the first's count
            statistic.copy_(value)
        self.unsharded.eval()

    @contextmanager
    def run_unsharded(self) -> Iterator[None]:
        """Let `model` be `unsharded` for a while, so that one process can run it alone."""
        network, module = self.model, self.unsharded
        if module is None:
            yield
            return
        self.model = module.train()
        try:
            yield
        finally:
            self.model = network
