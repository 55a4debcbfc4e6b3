"""Stops a run at the first loss or gradient that is no number, before the update that would spread it."""

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
from sgformer.data.imagefolder import some
from sgformer.models.load import save_weights
from sgformer.training.run_folder import RunFolder
from sgformer.training.sharded import own

log = logging.getLogger("sgformer")


class NanGuard(Callback):
    """Looks at the loss and at the gradients once an update, before the optimiser moves.

    On a loss or gradient that is nan or infinite, `last.safetensors` gets the weights as they were after the update
    before, and the run ends with an error that says at which step, in which layer and from which images it began. The
    look costs one wait for the device per update. With fp16 only the loss counts: gradients too large for it are its
    daily business, and its scaler leaves such updates out.

    Args:
        folder: of the run.
        metadata: saved with the weights.
        reseed: (trainer, task, batch, batch_idx) puts the generators to where this batch's forward pass began.
        name_of: a sample's place in the training data -> what to call it.
    """

    def __init__(
        self,
        folder: RunFolder,
        metadata: Mapping[str, Any],
        reseed: Callable[[L.Trainer, Any, Any, int], None],
        name_of: Callable[[int], Any],
    ):
        self.folder, self.metadata, self.reseed, self.name_of = folder, metadata, reseed, name_of
        self._batches: list[tuple[Any, int]] = []  # of this update
        self._losses: list[Tensor] = []

    def on_train_batch_start(self, trainer: L.Trainer, task: Any, batch: Any, batch_idx: int) -> None:
        self._batches.append((batch, batch_idx))

    def on_before_backward(self, trainer: L.Trainer, task: Any, loss: Tensor) -> None:
        self._losses.append(loss.detach())

    def on_before_optimizer_step(self, trainer: L.Trainer, task: Any, optimizer: torch.optim.Optimizer) -> None:
        losses = torch.stack(self._losses).float()
        seen = losses.abs().max()
        if trainer.precision != "16-mixed":
            gradients = [own(p.grad) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            there = [gradient for gradient in gradients if gradient.numel()]  # a share may have nothing of a short one
            seen = torch.maximum(seen, get_total_norm(there, norm_type=math.inf))
        wrong = not seen.isfinite()
        if task.unsharded is not None and trainer.world_size > 1:  # all have to stop together: they gather the weights
            flag = torch.tensor(float(wrong), device=seen.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            wrong = bool(flag)
        if wrong:
            self._stop(trainer, task, losses.tolist())
        self._batches, self._losses = [], []

    def _stop(self, trainer: L.Trainer, task: Any, losses: Sequence[float]) -> None:
        """Save what is good and raise the error."""
        wrong = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
        batch, batch_idx = self._batches[wrong[0] if wrong else -1]
        if task.unsharded is not None:
            task.unsharded.to(trainer.strategy.root_device)
            task.gather(averaged=False)
        if wrong:
            self.reseed(trainer, task, batch, batch_idx)
            with trainer.precision_plugin.train_step_context(), task.run_unsharded():
                layer = first_not_finite(task, batch, batch_idx)
            what = f"the loss is {losses[wrong[0]]}"
            where = f", first in {layer}" if layer else ""
        else:
            gradients = {n: own(p.grad) for n, p in task.model.named_parameters() if p.grad is not None}
            names = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
            what, where = "a gradient is nan or infinite", f", first in {names[-1]}" if names else ""
        step = trainer.global_step + 1
        images = some([str(self.name_of(index)) for index in batch.index.tolist()]) if hasattr(batch, "index") else ""
        kept = self._keep(task, step - 1)
        raise UserError(
            f"{what} at step {step}{where}{', from the images ' if images else ''}{images}: "
            f"lower --lr, lengthen the warm-up or set --clip-grad 1 in a new run{kept}"
        )

    def _keep(self, task: Any, step: int) -> str:
        """Save the weights of the last good update; says where."""
        task.gather()
        if not all(value.isfinite().all() for value in task.eval_model.state_dict().values()):
            return ""  # running statistics of a batch norm took the bad values in
        path: Path = self.folder.path / "last.safetensors"
        if self.folder.writes:
            save_weights(task.eval_model, path, {**self.metadata, "metrics": {}, "step": step})
        return f", from --weights {path} (step {step}) if you like"


def first_not_finite(task: Any, batch: Any, batch_idx: int) -> str:
    """The parameter, or else the layer in the order of computing, that is the first to have nan or infinite values.

    Runs the training step once more, without gradients. "" if nothing shows.
    """
    for name, parameter in task.model.named_parameters():
        if not parameter.isfinite().all():
            return f"the weights {name}"
    if not all(tensor.isfinite().all() for tensor in _tensors(batch[0])):
        return "the images themselves"
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            if not found and not all(tensor.isfinite().all() for tensor in _tensors(output)):
                found.append(f"{name} ({type(module).__name__})" if name else "the network's output")

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in task.model.named_modules()]
    try:
        with torch.no_grad():
            task.training_step(batch, batch_idx)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else "the loss function"


def _tensors(value: Any) -> Iterator[Tensor]:
    """Floating-point tensors in a module's output, however nested."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors(inner)
