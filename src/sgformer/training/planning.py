"""What a run decides before it starts: its `auto` settings, and with `--minutes` the length of its schedule.

The schedule is planned from the cost of an update and of a validation, which the first steps of a run that is then
thrown away tell. What is trained afterwards is the run that the planned number of epochs would be: the same bits, and
resumable as any other.
"""

from __future__ import annotations

import dataclasses
import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from sgformer.core.errors import UserError
from sgformer.core.names import dashed
from sgformer.data.typical import typical_side
from sgformer.training.config import Config, DataFacts, RunConfig
from sgformer.training.ranks import broadcast

log = logging.getLogger("sgformer")

#: Seconds at the end of a run for its report and pictures, and the part of the time that is kept in reserve.
FINISH, RESERVE = 4.0, 0.05

#: Options that say how long a run is and how its rate moves.
SCHEDULE = ("epochs", "steps", "val_every", "warmup_epochs", "warmup_steps", "lr_drops")

#: Of the time: what the measurement may take; and its limits in seconds.
MEASURE, LEAST, MOST = 0.04, 2.0, 20.0


def data_facts(listing: Any, weights: Any, task: str, device: str, parts: int) -> DataFacts:
    """What the automatic settings of a run follow from.

    Args:
        listing: of the training images.
        weights: the initial `models.load.Weights`, or None.
        task: the task's name.
        device: the kind of device.
        parts: processes x accumulation.
    """
    about: dict[str, Any] = {}
    if weights is not None:
        about = {
            "pretrained": True,
            "weights_coarse": weights.config.coarse if weights.config is not None else None,
        }
        if weights.task == task:
            size = weights.metadata.get("image_size")
            about |= {
                "weights_size": min(size) if isinstance(size, list | tuple) else size,
                "architecture": weights.architecture,
            }
    return DataFacts(len(listing), typical_side(listing), len(listing.classes), device, parts, **about)


def chosen(before: RunConfig, after: RunConfig) -> list[str]:
    """Lines that say what became of each `auto`, in the order of the help, a line for each group of options."""
    lines: dict[str, list[str]] = {}
    for field in dataclasses.fields(before):
        if before.is_auto(field.name):
            value = getattr(after, field.name)
            text = " ".join(map(str, value)) if isinstance(value, tuple) else "none" if value is None else str(value)
            lines.setdefault(field.metadata["group"], []).append(f"{dashed(field.name)} {text}")
    return [f"  {group.lower()}: {', '.join(values)}" for group, values in lines.items()]


@dataclass(frozen=True)
class Cost:
    """The time that parts of a run take, in seconds.

    Attributes:
        start: once, until the data loaders are at work and the first batches are through.
        update: an update.
        validation: a validation, checkpoint and weights included.
    """

    start: float
    update: float
    validation: float

    def total(self, updates: int, per_validation: int) -> float:
        """The time of a run that validates after every `per_validation` updates and at its end."""
        return self.start + updates * self.update + -(-updates // per_validation) * self.validation

    def updates(self, seconds: float, per_validation: Callable[[int], int]) -> int:
        """The most updates that fit into some time, at least 0.

        Args:
            seconds: the time.
            per_validation: the updates from one validation to the next of a run of so many updates.
        """
        least, most = 0, int(max(0.0, seconds) / max(self.update, 1e-6)) + 1
        while least < most - 1:
            tried = (least + most) // 2
            fits = self.total(tried, per_validation(tried)) <= seconds
            least, most = (tried, most) if fits else (least, tried)
        return least


def same_work(a: RunConfig, b: RunConfig) -> bool:
    """Whether an update of one run is the work of an update of the other: they differ in their schedules only."""
    return {**a.to_dict(), **dict.fromkeys(SCHEDULE)} == {**b.to_dict(), **dict.fromkeys(SCHEDULE)}


def plan(
    config: Config,
    data: DataFacts | None,
    measure: Callable[[Config, float], tuple[Cost, float, float]],
) -> tuple[Config, dict[str, Any]]:
    """Plan the schedule of a run with `--minutes`.

    Args:
        config: the settings, `auto` ones included.
        data: what those follow from; None for standard values.
        measure: (settings, seconds that it may take) -> costs, updates per pass over the images, and the seconds that
            have passed of the time; the same on all processes.

    Returns:
        The settings with a planned schedule, still with their other `auto`; and a record of the plan.

    Raises:
        UserError: the time is too short.
    """
    assert config.minutes is not None
    minutes, config = config.minutes, dataclasses.replace(config, minutes=None)
    seconds, tried = 60 * minutes, config.resolved(data)
    for attempt in range(2):
        cost, per_pass, passed = measure(tried, min(max(MEASURE * seconds, LEAST), MOST))
        left = (1 - RESERVE) * (seconds - passed) - FINISH
        updates = cost.updates(left, partial(config.per_validation, steps_per_pass=per_pass))
        if updates < 1:
            need = cost.total(1, 1) + FINISH + passed
            raise UserError(
                f"--minutes {minutes:g} is too short here: an update takes {cost.update:.2f} s and a validation "
                f"{cost.validation:.0f} s; allow {1.1 * need / 60:.1f} minutes or more, or lower --image-size"
            )
        planned = config.for_updates(updates, per_pass)
        resolved = planned.resolved(data)
        if attempt or same_work(resolved, tried):
            break
        tried = resolved  # a run of that length augments its images differently: measure that
    record = {
        "minutes": minutes,
        "updates": updates,
        "seconds_per_update": round(cost.update, 4),
        "seconds_per_validation": round(cost.validation, 2),
    }
    return planned, record


class Stopwatch(Callback):
    """Measures a run and ends its training after some seconds; the first updates do not count.

    Args:
        seconds: end the training after this long, but not before two updates counted.
        warm: updates that only warm up.
        val_batches: those of a full validation, of which this run may make fewer.
        began: the time, on `time.monotonic`, from which `passed` counts.

    Attributes:
        result: the costs and the seconds passed at the end, as the main process measured them.
    """

    result: tuple[Cost, float]

    def __init__(self, seconds: float, warm: int, val_batches: int, began: float):
        self.seconds, self.warm, self.val_batches, self.began = seconds, warm, val_batches, began
        self.updates: list[float] = []  # when each ended, not counting validations
        self.validations: list[list[float]] = []  # when each began, when its batches ended, when it ended
        self.paused = 0.0  # seconds in validations

    def setup(self, trainer: L.Trainer, task: Any, stage: str) -> None:
        self.start = time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, task: Any, *_: Any) -> None:
        if trainer.global_step == len(self.updates):
            return  # a part of an accumulated update
        self.updates.append(time.monotonic() - self.paused)
        enough = len(self.updates) >= self.warm + 2 and self.updates[-1] - self.start >= self.seconds
        trainer.should_stop = trainer.strategy.reduce_boolean_decision(enough, all=False)

    def on_validation_start(self, trainer: L.Trainer, task: Any) -> None:
        self.validations.append([time.monotonic()])

    def on_validation_batch_end(self, trainer: L.Trainer, task: Any, *_: Any) -> None:
        self.validations[-1].append(time.monotonic())

    def on_validation_end(self, trainer: L.Trainer, task: Any) -> None:
        self.validations[-1].append(time.monotonic())
        self.paused += self.validations[-1][-1] - self.validations[-1][0]

    def on_train_end(self, trainer: L.Trainer, task: Any) -> None:
        update = (self.updates[-1] - self.updates[self.warm - 1]) / (len(self.updates) - self.warm)
        start = max(0.0, self.updates[self.warm - 1] - self.start - self.warm * update)
        first, last = self.validations[0], self.validations[-1]
        each = (last[-2] - last[1]) / (len(last) - 3) if len(last) > 3 else last[1] - last[0]
        start += max(0.0, first[1] - first[0] - each)  # of the first batch: the loader starts
        validation = each * self.val_batches + last[-1] - last[-2] + self.overhead(trainer, task)
        *costs, passed = broadcast([start, update, validation, time.monotonic() - self.began])
        self.result = (Cost(*costs), passed)

    def overhead(self, trainer: L.Trainer, task: Any) -> float:
        """Seconds that a checkpoint and weights take to write."""
        before = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            trainer.save_checkpoint(f"{folder}/state.ckpt")
        return 2 * (time.monotonic() - before)
