"""Training callbacks: seeds, averaged weights, the log, checkpoints.

Every callback works with any task that has `model`, `eval_model`, `evaluate_with` and `monitor`. Training can stop
after any update and resume bit for bit, because all randomness depends on (seed, process, step).
"""

from __future__ import annotations

import copy
import csv
import io
import logging
import math
import random
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import Callback, EarlyStopping
from timm.utils import ModelEmaV3
from torch import nn

from sgformer.core.errors import Interrupted, UserError, first_line
from sgformer.core.files import appending, write_text
from sgformer.core.parse import as_table, read_bytes
from sgformer.models.load import read_metadata, save_weights
from sgformer.models.significance import set_token_budget
from sgformer.training.ranks import gather
from sgformer.training.run_folder import RunFolder
from sgformer.training.sharded import full, local_shard
from sgformer.training.state_file import publish

log = logging.getLogger("sgformer")

#: Signals on which a run saves its state and stops: ctrl-C, a scheduler's, and SLURM's warning.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


class StepSeeds(Callback):
    """Seeds all generators before every batch from (seed, process, batch number).

    This makes mixup, drop path and dropout the same in an uninterrupted and in a resumed run.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def on_train_batch_start(self, trainer: L.Trainer, task: L.LightningModule, batch: Any, batch_idx: int) -> None:
        micro_batch = batch_idx % trainer.accumulate_grad_batches
        entropy = (self.seed, trainer.global_rank, trainer.global_step, micro_batch)
        words = np.random.SeedSequence(entropy).generate_state(3).tolist()
        random.seed(words[0])
        np.random.seed(words[1])  # noqa: NPY002 - used by timm's mixup
        torch.manual_seed(words[2])


class TokenBudgets(Callback):
    """Draws the token budget of every update from some values, the same on every process; validation has a budget of 1.

    A function of seed and step, so that a resumed run draws what an uninterrupted one would.
    """

    def __init__(self, budgets: Sequence[float], seed: int):
        self.budgets, self.seed = budgets, seed

    def on_train_batch_start(self, trainer: L.Trainer, task: Any, batch: Any, batch_idx: int) -> None:
        drawn = np.random.default_rng((self.seed, trainer.global_step)).choice(self.budgets)
        set_token_budget(task.model, float(drawn))

    def on_train_batch_end(self, trainer: L.Trainer, task: Any, *_: Any) -> None:
        set_token_budget(task.model, 1.0)


# By hand: Lightning's EMAWeightAveraging does not support sharded models, has no decay warm-up, and swaps the average
# into the model for validation.
class WeightAverage(Callback):
    """An exponential moving average of the weights, used for validation and saved; never swapped into the model.

    The decay warms up as t / (t + 10) after t updates until it reaches `decay`, so the average always spans about the
    last tenth of the run: short runs get a useful average, and long runs forget their beginning.
    """

    def __init__(self, decay: float):
        self.decay = decay
        self.average: ModelEmaV3 | None = None
        self._loaded: dict[str, Any] | None = None
        self._step = -1

    def on_fit_start(self, trainer: L.Trainer, task: Any) -> None:
        # By now the network is on its device with restored weights; `setup` would be too early for both.
        network = task.model if task.unsharded is None else task.unsharded
        self.average = ModelEmaV3(network, self.decay, use_warmup=True, warmup_gamma=10, warmup_power=1)
        if task.unsharded is not None:
            copy_shards(self.average.module, task.model)
        self.average.module.requires_grad_(False)
        self._take_loaded()
        task.evaluate_with(self.average.module)

    def on_train_start(self, trainer: L.Trainer, task: Any) -> None:
        self._take_loaded()  # sharded weights, and all states with them, are restored after `on_fit_start`
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, task: Any, *_: Any) -> None:
        if trainer.global_step != self._step and self.average is not None:
            self._step = trainer.global_step
            self.average.update(task.model, step=self._step)

    def state_dict(self) -> dict[str, Any]:
        if self.average is None:
            return {}
        return {"model": {name: full(value) for name, value in self.average.module.state_dict().items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict["model"]

    def _take_loaded(self) -> None:
        if self._loaded is None or self.average is None:
            return
        for name, target in self.average.module.state_dict().items():
            value = self._loaded[name]
            if target is not local_shard(target):
                from torch.distributed.tensor import distribute_tensor

                value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
            target.copy_(value)
        self._loaded = None


def copy_shards(module: nn.Module, like: nn.Module) -> None:
    """Replace a network's parameters and buffers by copies of a sharded network's; each process copies its shard."""
    for name, value in like.named_parameters():
        parent, _, last = name.rpartition(".")
        setattr(module.get_submodule(parent), last, nn.Parameter(value.detach().clone(), requires_grad=False))
    for target, source in zip(module.buffers(), like.buffers(), strict=True):
        target.data = source.detach().clone()


class UnshardedCopy(Callback):
    """Gathers sharded weights into the unsharded copy for validation; it is on the device only during validation."""

    def on_validation_start(self, trainer: L.Trainer, task: Any) -> None:
        task.unsharded.to(trainer.strategy.root_device)
        task.gather()

    def on_train_epoch_end(self, trainer: L.Trainer, task: Any) -> None:
        task.unsharded.to("cpu")


class SameStart(Callback):
    """Stops a run whose processes resume from different steps, e.g. because a machine has a stale run folder.

    Args:
        folder: the run folder.
        step: the step of the checkpoint that this process read.
    """

    def __init__(self, folder: RunFolder, step: int):
        self.folder, self.step = folder, step

    def setup(self, trainer: L.Trainer, task: Any, stage: str) -> None:
        # The processes are connected here, and no checkpoint has been loaded yet.
        if trainer.world_size == 1 or stage != "fit":
            return
        ends = torch.tensor([self.step, -self.step], device=trainer.strategy.root_device)
        torch.distributed.all_reduce(ends, op=torch.distributed.ReduceOp.MAX)
        last, first = int(ends[0]), -int(ends[1])
        if first != last:
            raise UserError(
                f"{self.folder.path}: processes find different checkpoints in it (steps {first} to {last}): do all "
                "machines share this folder? wait for its file system to sync, or use a shared one"
            )


class SkippedImages(Callback):
    """Collects one line for every unreadable image left out of a batch, over all processes."""

    def __init__(self) -> None:
        self.lines: set[str] = set()

    def _note(self, batch: Any) -> None:
        for line in getattr(batch, "skipped", ()):
            if line not in self.lines:
                self.lines.add(line)
                log.info(f"skipped {line}")

    def gather(self, trainer: L.Trainer) -> None:
        """Merge the lines of all processes, on every process."""
        if trainer.world_size > 1:
            self.lines = set().union(*gather(sorted(self.lines)))

    def on_train_batch_end(self, trainer: L.Trainer, task: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._note(batch)

    def on_validation_batch_end(
        self, trainer: L.Trainer, task: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._note(batch)

    def on_validation_epoch_end(self, trainer: L.Trainer, task: Any) -> None:
        self.gather(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"lines": sorted(self.lines)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.lines = set(state_dict["lines"])


# By hand: Lightning's CSVLogger deletes the rows of an interrupted run when it resumes, and rewrites the file in place.
class RunLog(Callback):
    """Writes rows of `metrics.csv`, and one log line per validation.

    Args:
        folder: the run folder.
        images_per_step: images per update, over all processes.
        total_steps: updates of this run, for the remaining time.
        every: updates between rows.
        steps_per_pass: updates per epoch.
        schedule: updates of the full schedule, even if the run ends earlier.
        unit: the unit of progress in the log, "epoch" or "step".
    """

    def __init__(
        self,
        folder: RunFolder,
        images_per_step: int,
        total_steps: int,
        every: int,
        steps_per_pass: float,
        schedule: int,
        unit: str = "epoch",
    ):
        self.table = folder.path / "metrics.csv"
        self.writes = folder.writes
        self.images_per_step, self.total_steps, self.every = images_per_step, total_steps, every
        self.steps_per_pass, self.schedule, self.unit = steps_per_pass, schedule, unit
        self.images_per_second = 0.0
        self.seconds = 0.0  # training and validation time, over all sessions
        self._losses: dict[str, list[torch.Tensor]] = {}  # per batch, not yet summed
        self._since: dict[str, dict[str, tuple[float, int]]] = {"row": {}, "validation": {}}  # (sum, count) by name
        self._row_losses: dict[str, float] = {}  # mean losses in the last row
        self._step = -1

    def state_dict(self) -> dict[str, Any]:
        self._sum_losses()
        return {"losses": copy.deepcopy(self._since), "seconds": self._elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._since = copy.deepcopy(state_dict["losses"])
        self.seconds = state_dict["seconds"]

    def on_train_start(self, trainer: L.Trainer, task: Any) -> None:
        self._step = self._first_step = trainer.global_step
        self._start = time.monotonic()
        self._pace = (self._start, self._step)  # time and step at which the current stretch of training began
        if self.writes and self.table.exists():  # rows after the checkpoint will be repeated
            # A last line without a newline was cut off when the process was killed.
            complete = read_bytes(self.table).decode("utf-8", "replace").rpartition("\n")[0]
            try:
                rows = [row for row in as_table(complete, self.table) if int(row["step"]) <= self._step]
            except (KeyError, ValueError):
                raise UserError(f"{self.table}: damaged; remove it to resume without the rows so far") from None
            self._write(rows)

    def on_train_epoch_start(self, trainer: L.Trainer, task: Any) -> None:
        self._losses, self._since["validation"] = {}, {}
        self._pace = (time.monotonic(), trainer.global_step)

    def on_train_end(self, trainer: L.Trainer, task: Any) -> None:
        self.seconds, self._start = self._elapsed(), time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, task: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if outputs:  # empty: no image of the batch could be read
            # Lightning's loss is already divided by the number of accumulated batches.
            loss = outputs["loss"].detach() * trainer.accumulate_grad_batches
            for name, value in {"train_loss": loss, **outputs.get("parts", {})}.items():
                self._losses.setdefault(name, []).append(value)
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if self._step % self.every == 0:
            since, step = self._pace
            self.images_per_second = self.images_per_step * (self._step - step) / (time.monotonic() - since)
            self._row_losses = self._mean_losses(trainer, "row")
            self._row(trainer, **self._row_losses, images_per_second=self.images_per_second)

    def on_validation_start(self, trainer: L.Trainer, task: Any) -> None:
        if trainer.state.fn == "fit":
            since, step = self._pace
            self.images_per_second = self.images_per_step * (trainer.global_step - step) / (time.monotonic() - since)

    def on_train_epoch_end(self, trainer: L.Trainer, task: Any) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        # A validation right after a row repeats that row's losses.
        losses = self._mean_losses(trainer, "row") or self._row_losses or self._mean_losses(trainer, "validation")
        self._row(trainer, **losses, images_per_second=self.images_per_second, **metrics)
        losses = self._mean_losses(trainer, "validation")
        if not self.writes:
            return
        done, remaining = self._step - self._first_step, self.total_steps - self._step
        eta = (time.monotonic() - self._start) / done * remaining if done else 0
        shown = [f"{name} {100 * value:.2f}" for name, value in metrics.items() if "loss" not in name]
        shown = [f"val {metrics['val_loss']:.3f}", *shown] if "val_loss" in metrics else shown
        log.info(
            f"{self._progress()}  loss {losses.get('train_loss', math.nan):.3f}  {'  '.join(shown)}  "
            f"lr {_rate(trainer):.2e}  {self.images_per_second:.0f} img/s  {clock(eta)} left"
        )

    def _progress(self) -> str:
        if self.unit == "step":
            return f"step {self._step:>{len(str(self.schedule))}}/{self.schedule}"
        epochs = f"{round(self.schedule / self.steps_per_pass, 2):g}"
        return f"epoch {round(self._epoch(), 2):>{len(epochs)}g}/{epochs}"

    def _epoch(self) -> float:
        return round(self._step / self.steps_per_pass, 4)

    def _elapsed(self) -> float:
        return self.seconds + time.monotonic() - self._start

    def _sum_losses(self) -> None:
        """Add the losses on the device to the running sums."""
        for name, losses in self._losses.items():
            for sums in self._since.values():
                total, count = sums.get(name, (0.0, 0))
                sums[name] = (total + torch.stack(losses).double().sum().item(), count + len(losses))
        self._losses = {}

    def _mean_losses(self, trainer: L.Trainer, since: str) -> dict[str, float]:
        """Mean over all processes since the last "row", which is then reset, or "validation"; {} if there are none."""
        self._sum_losses()
        sums, device = self._since[since], trainer.strategy.root_device
        if not sums:
            return {}
        if since == "row":
            self._since["row"] = {}
        means = torch.tensor([total / count for total, count in sums.values()], device=device)
        values = trainer.strategy.reduce(means, reduce_op="mean").tolist()  # type: ignore[union-attr]
        return dict(zip(sums, values, strict=True))

    def _row(self, trainer: L.Trainer, **values: float) -> None:
        if not self.writes:
            return
        row = {"epoch": self._epoch(), "step": self._step, "lr": _rate(trainer), **values}
        rows: list[Mapping[str, Any]] = []
        if self.table.exists():
            with self.table.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                if set(row) <= set(reader.fieldnames or ()):
                    with appending(self.table, newline="") as out:
                        csv.DictWriter(out, reader.fieldnames or ()).writerow(_short(row))
                    return
                rows = list(reader)
        self._write([*rows, _short(row)])  # the first row, or one with a new column

    def _write(self, rows: list[Any]) -> None:
        columns = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns)
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.table, text.getvalue(), newline="")


class Checkpoints(Callback):
    """Writes training state and weights, and stops the run at a signal or at `max_steps`.

    `checkpoints/last.ckpt`, for `--resume`: every `every` updates, at the end of each epoch, and at SIGINT, SIGTERM or
    SIGUSR1 (which SLURM can send before a job's time limit), after which `Interrupted` is raised; the preceding one is
    kept as `previous.ckpt`. `last.safetensors` and, if `task.monitor` improved, `best.safetensors`: at the end of each
    epoch.

    A resumed run repeats everything after its checkpoint, validation included. A checkpoint is therefore published only
    when the weights and the metrics that belong to it are on the disk.

    Args:
        folder: the run folder.
        metadata: stored with the weights, beside metrics, epoch and step.
        every: updates between checkpoints.
        max_steps: stop after this update, with a final validation.
        on_best: called with the task whenever its weights are the best so far.
    """

    def __init__(
        self,
        folder: RunFolder,
        metadata: Mapping[str, Any],
        every: int,
        max_steps: int | None = None,
        on_best: Callable[[Any], None] = lambda task: None,
    ):
        self.folder, self.metadata, self.every, self.max_steps, self.on_best = (
            folder,
            metadata,
            every,
            max_steps,
            on_best,
        )
        self.best = -math.inf
        self._unfinished = folder.checkpoint.with_name(f"{folder.checkpoint.name}.tmp")
        self._signal = 0
        self._handlers: dict[int, Any] = {}
        self._step = -1

    def on_train_start(self, trainer: L.Trainer, task: Any) -> None:
        self._step = trainer.global_step
        best = self.folder.path / "best.safetensors"
        if best.exists():
            about = read_metadata(best)
            if about["step"] <= self._step:  # otherwise they are from after the checkpoint, and will be repeated
                best_score = about["metrics"][task.monitor]
                self.best = -math.inf if best_score is None else best_score
        try:
            self._handlers = {name: signal.signal(name, self._on_signal) for name in SIGNALS}
        except ValueError:  # not in the main thread, whose program handles signals
            self._handlers = {}

    def _on_signal(self, signum: int, frame: Any) -> None:
        if self._signal:
            raise Interrupted(
                signum, self._step, self.folder.path
            )  # second signal: stop at once; the last checkpoint is kept
        self._signal = signum
        log.info("stopping after this update (signal again to stop immediately)")

    def _stop_requested(self, trainer: L.Trainer) -> bool:
        if trainer.world_size == 1:
            return bool(self._signal)
        # All processes must stop after the same update; the all-reduce costs time, so it runs at every tenth.
        if trainer.global_step % 10:
            return False
        flag = torch.tensor(self._signal, device=trainer.strategy.root_device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        self._signal = int(flag)
        return bool(self._signal)

    def on_train_batch_end(self, trainer: L.Trainer, task: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step == self._step:
            return
        self._step = step
        last = self.max_steps is not None and step >= self.max_steps
        trainer.should_stop = trainer.should_stop or last
        if batch_idx + 1 == trainer.num_training_batches:
            return  # the epoch ends here and saves
        if last:
            self._write(trainer)  # published after the validation that follows
            return
        stop = self._stop_requested(trainer)
        if stop or step % self.every == 0:
            self.save(trainer)
        if stop:
            raise Interrupted(self._signal, step, self.folder.path)

    def on_train_epoch_end(self, trainer: L.Trainer, task: Any) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        better = metrics.get(task.monitor, 0.0) > self.best
        if self.folder.writes:
            about = {**self.metadata, "metrics": metrics, "epoch": trainer.current_epoch + 1, "step": self._step}
            save_weights(task.eval_model, self.folder.path / "last.safetensors", about)
            if better:
                save_weights(task.eval_model, self.folder.path / "best.safetensors", about)
                self.on_best(task)
        if better:
            self.best = metrics.get(task.monitor, 0.0)
        if trainer.fit_loop.epoch_loop.batch_progress.current.ready == trainer.num_training_batches:
            self.save(trainer)
        else:  # the run ended within the epoch and has written its checkpoint
            self._publish()
        if self._stop_requested(trainer):
            raise Interrupted(self._signal, self._step, self.folder.path)

    def save(self, trainer: L.Trainer) -> None:
        """Write `last.ckpt` atomically."""
        self._write(trainer)
        self._publish()

    def _write(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self._unfinished)

    def _publish(self) -> None:
        if self.folder.writes:
            publish(self._unfinished, self.folder.checkpoint, self.folder.previous)

    def on_train_end(self, trainer: L.Trainer, task: Any) -> None:
        self._release()

    def on_exception(self, trainer: L.Trainer, task: Any, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        for name, handler in self._handlers.items():
            signal.signal(name, handler)
        self._handlers = {}


class Patience(EarlyStopping):
    """Stops a run whose score has not improved for some validations in a row; counts on when the run resumes.

    Args:
        monitor: the logged score; higher is better.
        patience: number of validations.
    """

    def __init__(self, monitor: str, patience: int):
        # Checked at the end of the validation: the checkpoint that follows it must hold the count.
        super().__init__(monitor, patience=patience, mode="max", check_finite=False, check_on_train_epoch_end=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "patience": self.patience})  # which may change on resuming

    def on_train_start(self, trainer: L.Trainer, task: Any) -> None:
        trainer.should_stop = trainer.should_stop or self.wait_count >= self.patience

    def reason(self) -> str | None:
        """Why it has stopped the run; None if it has not."""
        if self.wait_count < self.patience:
            return None
        return f"{self.monitor} had not improved for {self.wait_count} validations (--patience {self.patience})"


class FirstBatches(StepSeeds):
    """Passes the images and targets of the first batches, after mixing, to `draw(images, targets)` as lists.

    Must precede `StepSeeds`, which resets the generators to their state before mixing.
    """

    def __init__(self, seed: int, draw: Callable[[list[Any], list[Any]], None], batches: int = 3, each: int = 8):
        super().__init__(seed)
        self.draw, self.batches, self.each = draw, batches, each
        self._count = 0
        self._images: list[Any] = []
        self._targets: list[Any] = []

    def on_train_batch_start(self, trainer: L.Trainer, task: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch or batch_idx != self._count or batch_idx >= self.batches or not len(batch[1]):
            return
        super().on_train_batch_start(trainer, task, batch, batch_idx)
        self._count += 1
        for collected, mixed in zip((self._images, self._targets), task.mix(batch[0], batch[1]), strict=True):
            collected.extend(move_data_to_device(list(mixed[: self.each]), torch.device("cpu")))
        if self._count == self.batches:
            self._draw(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, task: Any) -> None:
        self._draw(trainer)

    def _draw(self, trainer: L.Trainer) -> None:
        if self._images and trainer.is_global_zero:
            self.draw(self._images, self._targets)
        self._images, self._targets, self.batches = [], [], 0


# By hand: RichProgressBar shows no images per second, and costs 1 ms more per batch (docs/notes/libraries.md).
class ProgressBar(Callback):
    """One line on a terminal: epoch, bar, batches, images per second, time left in the epoch."""

    def __init__(self, images_per_batch: int):
        self.images_per_batch = images_per_batch
        self._bar: Any = None

    def _start(self, trainer: L.Trainer, label: str, total: float, done: int = 0) -> None:
        from rich import progress

        self._stop()
        self._began = (time.monotonic(), done)
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(None),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[rate]:>6.0f} img/s"),
            progress.TimeRemainingColumn(elapsed_when_finished=True),
            transient=True,
            expand=True,
        )
        self._bar.start()
        self._task = self._bar.add_task(label, total=total, completed=done, rate=0.0)

    def _move(self, done: int) -> None:
        if self._bar is not None:
            since, first = self._began
            rate = self.images_per_batch * (done - first) / max(1e-9, time.monotonic() - since)
            self._bar.update(self._task, completed=done, rate=rate)

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_train_batch_start(self, trainer: L.Trainer, task: Any, batch: Any, batch_idx: int) -> None:
        if self._bar is None:
            epoch = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
            self._start(trainer, epoch, trainer.num_training_batches, batch_idx)

    def on_train_batch_end(self, trainer: L.Trainer, task: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._move(batch_idx + 1)

    def on_validation_start(self, trainer: L.Trainer, task: Any) -> None:
        self._start(trainer, "validation", sum(trainer.num_val_batches))

    def on_validation_batch_end(
        self, trainer: L.Trainer, task: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._move(batch_idx + 1)

    def on_validation_end(self, trainer: L.Trainer, task: Any) -> None:
        self._stop()

    def on_train_epoch_end(self, trainer: L.Trainer, task: Any) -> None:
        self._stop()

    def on_exception(self, trainer: L.Trainer, task: Any, exception: BaseException) -> None:
        self._stop()


def clock(seconds: float) -> str:
    """`75` -> `1:15`, `3675` -> `1:01:15`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _rows(table: Path, data: bytes) -> list[dict[str, str]]:
    """The rows of a `metrics.csv` with this content.

    Raises:
        UserError: it is damaged; names `table`.
    """
    try:
        rows = as_table(data.decode(), "table")
        for row in rows:
            for name, value in row.items():
                int(value) if name == "step" else float(value or 0)
        return rows
    except ValueError as error:
        raise UserError(f"{table}: damaged ({first_line(error)}); repair or remove it") from None


def _rate(trainer: L.Trainer) -> float:
    """The learning rate of the topmost layer (layer decay lowers the others)."""
    return max(group["lr"] for group in trainer.optimizers[0].param_groups)


def _short(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}
