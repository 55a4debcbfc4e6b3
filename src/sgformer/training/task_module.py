"""What the tasks' modules share: which network validation runs, and a network sharded over processes (FSDP2)."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from timm.optim import list_optimizers
from torch import nn

from sgformer.core.errors import UserError
from sgformer.core.names import nearest
from sgformer.training.sharded import full, shard


class TaskModule(L.LightningModule):
    """Trains `model`; validation runs `eval_model`.

    A task's module computes a loss from a batch, (images, targets, indices, skipped), and measures what validation
    finds: `training_step` returns the loss, or {"loss": ..., "parts": {name: scalar}} to have the parts in
    `metrics.csv`, too; after a validation `evaluation` gives the result.

    Under a strategy with a device mesh, the parameters of `model` are sharded over the processes before training
    (`fully_shard`), block by block. Validation, files of weights and pictures then use `unsharded`, a plain network on
    every process, which `gather` fills: no process has to wait for another inside a forward pass, so that each may have
    as many images, and of such sizes, as its share has.

    Attributes:
        monitor: the logged value that makes weights the best ones.
        unsharded: the plain network, or None where `model` is one itself.
    """

    model: Any
    monitor: str
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

    def mix(self, images: Any, targets: Any) -> tuple[Any, Any]:
        """What the network sees of a batch; by default the batch itself."""
        return images, targets

    def evaluation(self, skipped: Sequence[str]) -> Any:
        """The last validation's `Evaluation`; `skipped` has a line for each image that could not be read."""
        raise NotImplementedError

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


class ScheduledModule(TaskModule):
    """A module whose learning rate is a function of the step and of the run's settings: also when it is resumed with
    more of them, so no state of a schedule is kept."""

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step_update(self.global_step)

    def on_train_start(self) -> None:
        self.lr_schedulers().step_update(self.global_step)  # type: ignore[union-attr]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["lr_schedulers"] = []


def check_optimizer(name: str) -> None:
    """Raise UserError unless timm has an optimiser of this name."""
    known = [str(one) for one in list_optimizers()]
    if name.lower() not in known:
        raise UserError(f"unknown --opt {name}{nearest(name, known)}")


def readable(batch: Any) -> tuple[Any, Any]:
    """Images and targets of a batch that has any."""
    images, targets = batch[:2]
    if not len(targets):
        raise UserError(f"not one image of this batch could be read; the first: {batch[3][0]}")
    return images, targets


def decay_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The network's trainable parameters for an optimiser: no decay on norms and on `network.no_weight_decay()`."""
    keep = set(network.no_weight_decay())  # type: ignore[operator]
    for name, module in network.named_modules():
        if "Norm" in type(module).__name__:
            keep |= {f"{name}.{leaf}" for leaf, _ in module.named_parameters(recurse=False)}
    named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in named if name not in keep], "weight_decay": weight_decay},
        {"params": [p for name, p in named if name in keep], "weight_decay": 0.0},
    ]
