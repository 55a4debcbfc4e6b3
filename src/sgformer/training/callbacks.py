"""What happens around the training steps: seeds, averaged weights, the log, checkpoints.

Every callback works with any task that has `model`, `eval_model`, `evaluate_with` and `monitor`. Training can stop
after any update and go on later as if nothing had happened, as all randomness depends on (seed, process, step).
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
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import Callback
from timm.utils import ModelEmaV3
from torch import nn

from sgformer.core.errors import Interrupted, UserError
from sgformer.core.files import write_text
from sgformer.models.load import read_metadata, save_weights
from sgformer.training.run_folder import RunFolder
from sgformer.training.sharded import full, own
from sgformer.training.state_file import publish

log = logging.getLogger("sgformer")

#: Signals that ask a run to save its state and stop: ctrl-C, a scheduler's, and SLURM's warning.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


class StepSeeds(Callback):
    """Seeds every generator before every batch from (seed, process, number of the batch).

    Mixup, drop path and dropout are then the same in an uninterrupted and in a resumed run.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def on_train_batch_start(self, trainer: L.Trainer, task: L.LightningModule, batch: Any, batch_idx: int) -> None:
        part = batch_idx % trainer.accumulate_grad_batches
        entropy = (self.seed, trainer.global_rank, trainer.global_step, part)
        words = np.random.SeedSequence(entropy).generate_state(3).tolist()
        random.seed(words[0])
        np.random.seed(words[1])  # noqa: NPY002 - timm's mixup draws from it
        torch.manual_seed(words[2])


class WeightAverage(Callback):
    """An exponential moving average of the weights, which validation runs and which is saved: never swapped in and out.

    The decay warms up as t / (t + 10) after t updates, so that the average always reaches back over about the last
    tenth of the run until `decay` is met: short runs get a sensible average, long ones forget their start.
    """

    def __init__(self, decay: float):
        self.decay = decay
        self.average: ModelEmaV3 | None = None
        self._loaded: dict[str, Any] | None = None
        self._step = -1

    def on_fit_start(self, trainer: L.Trainer, task: Any) -> None:
        # Here the network is on its device and has its restored weights; `setup` would be too early for both.
        network = task.model if task.unsharded is None else task.unsharded
        self.average = ModelEmaV3(network, self.decay, use_warmup=True, warmup_gamma=10, warmup_power=1)
        if task.unsharded is not None:
            share_tensors(self.average.module, task.model)
        self.average.module.requires_grad_(False)
        self._take_loaded()
        task.evaluate_with(self.average.module)

    def on_train_start(self, trainer: L.Trainer, task: Any) -> None:
        self._take_loaded()  # shared out weights, and with them all states, are restored later
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
        for name, place in self.average.module.state_dict().items():
            value = self._loaded[name]
            if place is not own(place):
                from torch.distributed.tensor import distribute_tensor

                value = distribute_tensor(value.to(place.device), place.device_mesh, place.placements)
            place.copy_(value)
        self._loaded = None


def share_tensors(module: nn.Module, like: nn.Module) -> None:
    """Give a network copies of the parameters and buffers of another one that is shared out, each process its part."""
    for name, value in like.named_parameters():
        place, _, last = name.rpartition(".")
        setattr(module.get_submodule(place), last, nn.Parameter(value.detach().clone(), requires_grad=False))
    for mine, theirs in zip(module.buffers(), like.buffers(), strict=True):
        mine.data = theirs.detach().clone()


class UnshardedCopy(Callback):
    """Fills the network that validation runs where weights are shared out; on its device only while it is needed."""

    def on_validation_start(self, trainer: L.Trainer, task: Any) -> None:
        task.unsharded.to(trainer.strategy.root_device)
        task.gather()

    def on_train_epoch_end(self, trainer: L.Trainer, task: Any) -> None:
        task.unsharded.to("cpu")


class SameStart(Callback):
    """Stops a run whose processes do not go on from the same state, as where one machine sees an older run folder.

    Args:
        folder: of the run.
        step: of the state that this process found.
    """

    def __init__(self, folder: RunFolder, step: int):
        self.folder, self.step = folder, step

    def setup(self, trainer: L.Trainer, task: Any, stage: str) -> None:
        # The processes are connected here, and no state has been read yet.
        if trainer.world_size == 1 or stage != "fit":
            return
        ends = torch.tensor([self.step, -self.step], device=trainer.strategy.root_device)
        torch.distributed.all_reduce(ends, op=torch.distributed.ReduceOp.MAX)
        last, first = int(ends[0]), -int(ends[1])
        if first != last:
            raise UserError(
                f"{self.folder.path}: processes see different checkpoints in it (of steps {first} to {last}): do all "
                "machines share this folder? wait for its file system, or put it on one that they share"
            )


class SkippedImages(Callback):
    """Collects one line for every unreadable image that batches left out, over all processes."""

    def __init__(self) -> None:
        self.lines: set[str] = set()

    def _note(self, batch: Any) -> None:
        for line in getattr(batch, "skipped", ()):
            if line not in self.lines:
                self.lines.add(line)
                log.info(f"skipped {line}")

    def gather(self, trainer: L.Trainer) -> None:
        """Make every process know the lines of all."""
        if trainer.world_size > 1:
            everyone: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(everyone, self.lines)
            self.lines = set().union(*everyone)

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


class RunLog(Callback):
    """Rows of `metrics.csv` and one line per validation in the log.

    Args:
        folder: where `metrics.csv` goes.
        images_per_step: over all processes.
        total_steps: of this run, for the time left.
        every: updates between rows.
        steps_per_pass: updates that make an epoch.
        schedule: updates of the whole schedule, also where the run ends earlier.
        unit: what a line counts in, "epoch" or "step".
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
        self.seconds = 0.0  # of training and validation, over all sessions
        self._losses: dict[str, list[torch.Tensor]] = {}  # one per batch, not yet summed
        self._since: dict[str, dict[str, tuple[float, int]]] = {"row": {}, "validation": {}}  # sum and number
        self._row_losses: dict[str, float] = {}  # of the last row
        self._step = -1

    def state_dict(self) -> dict[str, Any]:
        self._settle()
        return {"losses": copy.deepcopy(self._since), "seconds": self._elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._since = copy.deepcopy(state_dict["losses"])
        self.seconds = state_dict["seconds"]

    def on_train_start(self, trainer: L.Trainer, task: Any) -> None:
        self._step = self._first_step = trainer.global_step
        self._start = time.monotonic()
        self._pace = (self._start, self._step)  # when the current stretch of training began, and at which step
        if self.writes and self.table.exists():  # rows after the checkpoint will be made again
            # Without its end of line, the last row is one that a killed process was writing.
            whole = self.table.read_text(encoding="utf-8").rpartition("\n")[0]
            rows = [row for row in csv.DictReader(io.StringIO(whole, newline="")) if int(row["step"]) <= self._step]
            self._write(rows)

    def on_train_epoch_start(self, trainer: L.Trainer, task: Any) -> None:
        self._losses, self._since["validation"] = {}, {}
        self._pace = (time.monotonic(), trainer.global_step)

    def on_train_end(self, trainer: L.Trainer, task: Any) -> None:
        self.seconds, self._start = self._elapsed(), time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, task: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
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
        done, left = self._step - self._first_step, self.total_steps - self._step
        eta = (time.monotonic() - self._start) / done * left if done else 0
        shown = [f"{name} {100 * value:.2f}" for name, value in metrics.items() if "loss" not in name]
        shown = [f"val {metrics['val_loss']:.3f}", *shown] if "val_loss" in metrics else shown
        log.info(
            f"{self._progress()}  loss {losses['train_loss']:.3f}  {'  '.join(shown)}  "
            f"lr {_rate(trainer):.2e}  {self.images_per_second:.0f} img/s  {clock(eta)} left"
        )

    def _progress(self) -> str:
        if self.unit == "step":
            return f"step {self._step:>{len(str(self.schedule))}}/{self.schedule}"
        epochs = round(self.schedule / self.steps_per_pass)
        return f"epoch {self._epoch():>{len(str(epochs))}g}/{epochs}"

    def _epoch(self) -> float:
        return round(self._step / self.steps_per_pass, 4)

    def _elapsed(self) -> float:
        return self.seconds + time.monotonic() - self._start

    def _settle(self) -> None:
        """Move the losses from the device into plain sums."""
        for name, losses in self._losses.items():
            for sums in self._since.values():
                total, count = sums.get(name, (0.0, 0))
                sums[name] = (total + torch.stack(losses).double().sum().item(), count + len(losses))
        self._losses = {}

    def _mean_losses(self, trainer: L.Trainer, since: str) -> dict[str, float]:
        """Of all processes, since the last row (this one begins the next) or validation; {} if there are none."""
        self._settle()
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
                    with self.table.open("a", newline="", encoding="utf-8") as out:
                        csv.DictWriter(out, reader.fieldnames or ()).writerow(_short(row))
                    return
                rows = list(reader)
        self._write([*rows, _short(row)])  # the first row, or the first with a new column

    def _write(self, rows: list[Any]) -> None:
        columns = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns)
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.table, text.getvalue(), newline="")


class Checkpoints(Callback):
    """Writes the training state for `--resume` and the weights, and stops the run where it should.

    `checkpoints/last.ckpt`: every `every` updates, at each epoch's end, and at SIGINT, SIGTERM or SIGUSR1 (which SLURM
    can send before a job's time is up), after which `Interrupted` is raised; the one before it stays as
    `previous.ckpt`. `last.safetensors` and, when `task.monitor` rose, `best.safetensors`: at each epoch's end.

    Whoever goes on from a state does everything after it again, validation included. So a state is put in its place
    only when all that belongs to it, weights and numbers of its validation, is on the disk.

    Args:
        folder: of the run.
        metadata: saved in the weights, beside metrics, epoch and step.
        max_steps: stop after this update, validating once more.
        on_best: called with the task when its weights are the best so far.
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
            if about["step"] <= self._step:  # else a later state, now lost, was the best one: it will come again
                self.best = about["metrics"][task.monitor]
        try:
            self._handlers = {name: signal.signal(name, self._remember) for name in SIGNALS}
        except ValueError:  # not in the main thread: whoever started it handles signals
            self._handlers = {}

    def _remember(self, signum: int, frame: Any) -> None:
        if self._signal:
            raise Interrupted(
                signum, self._step, self.folder.path
            )  # asked twice: do not wait; the last checkpoint stands
        self._signal = signum
        log.info("stopping after this update (again: at once)")

    def _asked_to_stop(self, trainer: L.Trainer) -> bool:
        if trainer.world_size == 1:
            return bool(self._signal)
        # All processes have to stop after the same update; asking each other costs time, so not at every one.
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
            return  # the end of the epoch follows, and saves
        if last:
            self._write(trainer)  # the validation that follows still belongs to it
            return
        stop = self._asked_to_stop(trainer)
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
        else:  # the run ends inside the epoch, and its state was written there
            self._publish()
        if self._asked_to_stop(trainer):
            raise Interrupted(self._signal, self._step, self.folder.path)

    def save(self, trainer: L.Trainer) -> None:
        """Write `last.ckpt` whole or not at all."""
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


class FirstBatches(StepSeeds):
    """Hands the first batches' images, mixed as the network will see them, to `draw(images, targets)`, as lists.

    Has to come before `StepSeeds`, which puts the generators back to where the mixing began.
    """

    def __init__(self, seed: int, draw: Callable[[list[Any], list[Any]], None], batches: int = 3, each: int = 8):
        super().__init__(seed)
        self.draw, self.batches, self.each = draw, batches, each
        self._seen = 0
        self._images: list[Any] = []
        self._targets: list[Any] = []

    def on_train_batch_start(self, trainer: L.Trainer, task: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch or batch_idx != self._seen or batch_idx >= self.batches or not len(batch[1]):
            return
        super().on_train_batch_start(trainer, task, batch, batch_idx)
        self._seen += 1
        for kept, given in zip((self._images, self._targets), task.mix(batch[0], batch[1]), strict=True):
            kept.extend(move_data_to_device(list(given[: self.each]), torch.device("cpu")))
        if self._seen == self.batches:
            self._draw(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, task: Any) -> None:
        self._draw(trainer)

    def _draw(self, trainer: L.Trainer) -> None:
        if self._images and trainer.is_global_zero:
            self.draw(self._images, self._targets)
        self._images, self._targets, self.batches = [], [], 0


class ProgressBar(Callback):
    """One line on a terminal: epoch, bar, batches, images per second, time left in this epoch."""

    def __init__(self, images_per_batch: int):
        self.images_per_batch = images_per_batch
        self._bar: Any = None

    def _start(self, trainer: L.Trainer, what: str, total: float, done: int = 0) -> None:
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
        self._task = self._bar.add_task(what, total=total, completed=done, rate=0.0)

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


def _rate(trainer: L.Trainer) -> float:
    """The learning rate of the network's top (layer decay lowers those below)."""
    return max(group["lr"] for group in trainer.optimizers[0].param_groups)


def _short(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}
