"""The base of the tasks' modules: the network for validation, and sharding over processes (FSDP2)."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import nn

from sgformer.core.errors import UserError
from sgformer.models.pyramid import keep_frozen
from sgformer.training.sharded import full, shard

if TYPE_CHECKING:
    from typing_extensions import Self


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
        frozen: networks by name that take part in the loss as they are: on the device, but not in the state_dict, not
            switched to training mode, not sharded.
        notes: lines for the beginning of the log.
    """

    model: Any
    monitor: str
    unsharded: nn.Module | None = None

    def __init__(self) -> None:
        super().__init__()
        self._eval_model: list[nn.Module] = []  # in a list: a submodule would enter the state_dict
        self.frozen: dict[str, Any] = {}  # for the same reason a dict
        self.notes: list[str] = []

    @property
    def warmup_updates(self) -> int:
        """Updates until the full learning rate is reached; 0: from the first on."""
        return 0

    @property
    def eval_model(self) -> nn.Module:
        """The network that is validated and saved: the averaged weights if there are any."""
        if self.unsharded is not None:
            return self.unsharded
        return self._eval_model[0] if self._eval_model else self.model

    def evaluate_with(self, model: nn.Module) -> None:
        """Validate `model` instead of the network being trained."""
        self._eval_model = [model]

    def heads(self) -> list[nn.Module]:
        """What `--freeze` trains: by default the classifier of a network with timm's interface."""
        head = self.model.get_classifier()
        return list(head) if isinstance(head, tuple) else [head]  # networks of distillation have two

    def freeze_backbone(self) -> None:
        """Freeze everything but the heads: weights, batch statistics and drop path."""
        trained = {id(p) for head in self.heads() for p in head.parameters()}
        if not trained:
            raise UserError("--freeze trains the head alone, and this network has none of its own")
        for parameter in self.model.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        self.train(self.training)

    def frozen_share(self) -> str:
        """What is frozen, in words."""
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.model.parameters())
        names = [name for name, module in self.model.named_modules() if any(module is head for head in self.heads())]
        return f"{(total - trained) / 1e6:.2f} of {total / 1e6:.2f} M parameters, all but those of {', '.join(names)}"

    def train(self, mode: bool = True) -> Self:
        """Set training mode, except for frozen modules: their batch statistics stay and drop path is off."""
        super().train(mode)
        keep_frozen(self.model)
        return self

    def on_fit_start(self) -> None:
        for network in self.frozen.values():
            network.to(self.device)

    def facts(self) -> dict[str, str]:
        """Rows for the report, by name."""
        return {}

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
