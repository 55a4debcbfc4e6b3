"""Evaluate trained weights outside a run: one pass over a split, on one or several processes."""

from __future__ import annotations

import logging
import math
import signal
import threading
from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch.callbacks import Callback

from sgformer.core.errors import UserError
from sgformer.data.imagefolder import EpochSampler
from sgformer.training.callbacks import SkippedImages
from sgformer.training.fit import build_loader, require_readable
from sgformer.training.run_folder import shown_log
from sgformer.training.trainer import build_trainer, quiet
from sgformer.training.worker_errors import refuse_reentry, worker_errors

log = logging.getLogger("sgformer")


class Stoppable(Callback):
    """Lets SIGTERM end an evaluation: Lightning keeps it for the end of a training update."""

    def on_validation_start(self, trainer: Any, task: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def validate(
    module: Any,
    dataset: Any,
    collate: Callable[..., Any],
    *,
    batch_size: int,
    workers: int = 4,
    device: str = "auto",
    devices: int | str = "auto",
    precision: str = "fp32",
    notes: Sequence[str] = (),
) -> tuple[Any, bool]:
    """Run a module's validation over a data set.

    Args:
        module: a `TaskModule`.
        dataset: every sample is used exactly once.
        collate: the collate function.
        batch_size: images per forward pass on each process.
        workers: data loading processes; 0: load in the main process.
        device, devices, precision: see `build_trainer`.
        notes: what the user has to know of the data, one line each, for the log.

    Returns:
        The module's `Evaluation`, and whether this is the main process, which writes files.

    Raises:
        UserError: a value is invalid, or a file cannot be read.
    """
    if batch_size < 1 or workers < 0:
        raise UserError(f"--batch-size must be above 0 and --workers 0 or more, got {batch_size} and {workers}")
    refuse_reentry()
    require_readable(dataset, "this split")
    skipped = SkippedImages()
    with quiet(), shown_log():
        trainer = build_trainer(device=device, devices=devices, precision=precision, callbacks=[skipped, Stoppable()])
        sampler = EpochSampler(
            len(dataset), batch_size, train=False, rank=trainer.global_rank, world=trainer.world_size
        )
        for note in notes if trainer.is_global_zero else ():
            log.warning(f"note: {note}")
        with worker_errors():
            trainer.validate(module, build_loader(dataset, sampler, workers, collate), verbose=False)
        evaluation = module.evaluation(sorted(skipped.lines))
        if trainer.is_global_zero and math.isnan(getattr(evaluation, "loss", 0.0)):
            log.warning("note: the loss is not a number: the network's outputs are not, and the scores mean nothing")
    return evaluation, trainer.is_global_zero
