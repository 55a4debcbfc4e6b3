"""Stops a run at the first loss or gradient that is NaN or infinite, before the update that would apply it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from sgformer.core.errors import UserError
from sgformer.core.names import some
from sgformer.models.load import save_weights
from sgformer.training.run_folder import RunFolder
from sgformer.training.sharded import local_shard

log = logging.getLogger("sgformer")


# By hand: torch's anomaly detection slows every step and names an operator; Lightning's EarlyStopping(check_finite)
# checks logged metrics after the update. Neither names layer and images, or saves the last finite weights.
class NanGuard(Callback):
    """Checks the loss and the gradients once per update, before the optimiser step.

    If either is NaN or infinite, the weights from before the update are saved as `last.safetensors`, and the run ends
    with an error that names the step, the layer and the images. The check costs one device synchronisation per update.
    With fp16 only the loss is checked: overflowing gradients are normal there, and the scaler skips such updates.

    Args:
        folder: the run folder.
        metadata: stored with the weights.
        reseed: (trainer, task, batch, batch_idx) resets the generators to their state before the batch's forward pass.
        name_of: index in the training data -> the image's name.
    """

    def __init__(
        self,
        folder: RunFolder,
        metadata: Mapping[str, Any],
        reseed: Callable[[L.Trainer, Any, Any, int], None],
        name_of: Callable[[int], Any],
    ):
        self.folder, self.metadata, self.reseed, self.name_of = folder, metadata, reseed, name_of
        self._batches: list[tuple[Any, int]] = []  # those accumulated for this update
        self._losses: list[Tensor] = []

    def on_train_batch_start(self, trainer: L.Trainer, task: Any, batch: Any, batch_idx: int) -> None:
        self._batches.append((batch, batch_idx))

    def on_before_backward(self, trainer: L.Trainer, task: Any, loss: Tensor) -> None:
        self._losses.append(loss.detach())

    def on_before_optimizer_step(self, trainer: L.Trainer, task: Any, optimizer: torch.optim.Optimizer) -> None:
        if not self._losses:  # no image of this update could be read
            self._batches = []
            return
        losses = torch.stack(self._losses).float()
        largest = losses.abs().max()
        if trainer.precision != "16-mixed":
            parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            shards = [shard for shard in (local_shard(p.grad) for p in parameters) if shard.numel()]  # may be empty
            largest = torch.maximum(largest, get_total_norm(shards, norm_type=math.inf))
        diverged = not largest.isfinite()
        if task.unsharded is not None and trainer.world_size > 1:  # all processes must stop, to gather the weights
            flag = torch.tensor(float(diverged), device=largest.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            diverged = bool(flag)
        if diverged:
            self._stop(trainer, task, losses.tolist())
        self._batches, self._losses = [], []

    def _stop(self, trainer: L.Trainer, task: Any, losses: Sequence[float]) -> None:
        """Save the last finite weights and raise the error."""
        bad_losses = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
        batch, batch_idx = self._batches[bad_losses[0] if bad_losses else -1]
        if task.unsharded is not None:
            task.unsharded.to(trainer.strategy.root_device)
            task.gather(averaged=False)
        if bad_losses:
            self.reseed(trainer, task, batch, batch_idx)
            with trainer.precision_plugin.train_step_context(), task.run_unsharded():
                layer = first_not_finite(task, batch, batch_idx)
            what = f"the loss is {losses[bad_losses[0]]}"
            where = f", first in {layer}" if layer else ""
        else:
            gradients = {n: local_shard(p.grad) for n, p in task.model.named_parameters() if p.grad is not None}
            names = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
            what, where = "a gradient is NaN or infinite", f", first in {names[-1]}" if names else ""
        step = trainer.global_step + 1
        images = some([str(self.name_of(index)) for index in batch.index.tolist()]) if hasattr(batch, "index") else ""
        saved = self._save_weights(task, step - 1)
        raise UserError(
            f"{what} at step {step}{where}{', from the images ' if images else ''}{images}: "
            f"lower --lr, lengthen the warm-up or set --clip-grad 1 in a new run{saved}"
        )

    def _save_weights(self, task: Any, step: int) -> str:
        """Save the weights from before the update; returns a hint that names the file, "" if they are not finite."""
        task.gather()
        if not all(value.isfinite().all() for value in task.eval_model.state_dict().values()):
            return ""  # a batch norm's running statistics have absorbed the bad values
        path: Path = self.folder.path / "last.safetensors"
        if self.folder.writes:
            save_weights(task.eval_model, path, {**self.metadata, "metrics": {}, "step": step})
        return f", optionally from --weights {path} (step {step})"


def first_not_finite(task: Any, batch: Any, batch_idx: int) -> str:
    """Name the first parameter, or else the first layer in execution order, with NaN or infinite values.

    Repeats the training step without gradients. Returns "the loss function" if all layers are finite.
    """
    for name, parameter in task.model.named_parameters():
        if not parameter.isfinite().all():
            return f"the weights {name}"
    if not all(tensor.isfinite().all() for tensor in _tensors(batch[0])):
        return "the images themselves"
    layers: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            if not layers and not all(tensor.isfinite().all() for tensor in _tensors(output)):
                layers.append(f"{name} ({type(module).__name__})" if name else "the network's output")

        return hook

    networks = {"": task.model, **task.frozen}
    named = [pair for prefix, network in networks.items() for pair in network.named_modules(prefix=prefix)]
    hooks = [module.register_forward_hook(watch(name)) for name, module in named]
    try:
        with torch.no_grad():
            task.training_step(batch, batch_idx)
    finally:
        for hook in hooks:
            hook.remove()
    return layers[0] if layers else "the loss function"


def _tensors(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in a module's nested output."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors(inner)
