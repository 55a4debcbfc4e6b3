"""The base of the tasks' modules: the network for validation, and sharding over processes (FSDP2)."""

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
    """Trains `model` and validates `eval_model`.

    A task's module computes a loss from a batch (images, targets, indices, skipped) and accumulates validation metrics:
    `loss` returns the loss, or {"loss": ..., "parts": {name: scalar}} to log the parts in `metrics.csv`, too; after a
    validation, `evaluation` returns the result.

    Under a strategy with a device mesh, `fully_shard` shards the parameters of `model` over the processes before
    training, block by block. Validation, weight files and pictures then use `unsharded`, a full copy on every process
    that `gather` fills. Its forward passes need no communication, so processes may differ in the number and the sizes
    of their images.

    Attributes:
        monitor: the logged metric that selects the best weights; higher is better.
        unsharded: the full copy, or None if `model` is not sharded.
    """

    model: Any
    monitor: str
    unsharded: nn.Module | None = None

    def __init__(self) -> None:
        super().__init__()
        self._eval_model: list[nn.Module] = []  # in a list: a submodule would enter the state_dict

    @property
    def eval_model(self) -> nn.Module:
        """The network that is validated and saved: the averaged weights if there are any."""
        if self.unsharded is not None:
            return self.unsharded
        return self._eval_model[0] if self._eval_model else self.model

    def evaluate_with(self, model: nn.Module) -> None:
        """Validate `model` instead of the network being trained."""
        self._eval_model = [model]

    def mix(self, images: Any, targets: Any) -> tuple[Any, Any]:
        """Mix a batch for training; by default unchanged."""
        return images, targets

    def loss(self, images: Any, targets: Any) -> Any:
        """The training loss of a batch of at least one image; see the class."""
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """The loss, or None for a batch of unreadable images: it adds no gradient, and alone makes no update.

        Raises:
            UserError: all images of a batch are unreadable, and other processes wait for its gradients.
        """
        images, targets = batch[:2]
        if len(targets):
            return self.loss(images, targets)
        if self._trainer is not None and self.trainer.world_size > 1:
            raise UserError(
                f"no image of one process's batch could be read: repair them, or raise --batch-size; {batch[3][0]}"
            )
        return None

    def evaluation(self, skipped: Sequence[str]) -> Any:
        """The last validation's `Evaluation`; `skipped` has a line for each unreadable image."""
        raise NotImplementedError

    def configure_model(self) -> None:
        mesh = self.device_mesh
        if mesh is None or self.unsharded is not None:
            return
        network = self.model
        # Copied before the conversion: synchronised batch norms would wait for the other processes.
        object.__setattr__(self, "unsharded", copy.deepcopy(network).requires_grad_(False))  # not as a submodule
        if mesh.device_type == "cuda" and mesh.size() > 1:  # this strategy, unlike DDP, does not convert by itself
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        self.model = shard(network, mesh["data_parallel"])

    def gather(self, averaged: bool = True) -> None:
        """Fill `unsharded` from all processes; all of them must call this.

        Args:
            averaged: use the weights set by `evaluate_with`, if any; otherwise those being trained.
        """
        if self.unsharded is None:
            return
        source = self._eval_model[0] if averaged and self._eval_model else self.model
        parameters, buffers = dict(source.named_parameters()), dict(source.named_buffers())
        for name, weight in self.unsharded.named_parameters():
            weight.copy_(full(parameters[name].detach()))
        for name, statistic in self.unsharded.named_buffers():
            value = full(buffers[name].detach())
            torch.distributed.broadcast(value, 0)  # statistics differ by process: use the main process's
            statistic.copy_(value)
        self.unsharded.eval()

    @contextmanager
    def run_unsharded(self) -> Iterator[None]:
        """Replace `model` by `unsharded` within the block, so that one process can run it alone."""
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
    """A module whose learning rate is a function of the step and the settings, which may change on resuming; the
    schedule's state is therefore not stored."""

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step_update(self.global_step)

    def on_train_start(self) -> None:
        self.lr_schedulers().step_update(self.global_step)  # type: ignore[union-attr]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["lr_schedulers"] = []


def check_optimizer(name: str) -> None:
    """Raise UserError unless timm has an optimiser with this name."""
    known = [str(one) for one in list_optimizers()]
    if name.lower() not in known:
        raise UserError(f"unknown --opt {name}{nearest(name, known)}")


def decay_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimiser parameter groups: no weight decay on norms and on `network.no_weight_decay()`."""
    no_decay = set(network.no_weight_decay())  # type: ignore[operator]
    for name, module in network.named_modules():
        if "Norm" in type(module).__name__:
            no_decay |= {f"{name}.{leaf}" for leaf, _ in module.named_parameters(recurse=False)}
    named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in named if name not in no_decay], "weight_decay": weight_decay},
        {"params": [p for name, p in named if name in no_decay], "weight_decay": 0.0},
    ]
