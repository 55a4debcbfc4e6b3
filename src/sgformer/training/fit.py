"""A training run of any task, from the settings to the report in the run folder."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import DataLoader, Dataset

from sgformer.core.errors import Interrupted, UserError
from sgformer.core.names import is_address
from sgformer.core.processes import end_with_parent
from sgformer.data.identity import Contents
from sgformer.models.load import Weights, read_weights
from sgformer.models.pretrained import pretrained_file
from sgformer.training import callbacks as cb
from sgformer.training.config import RunConfig, to_yaml
from sgformer.training.nan_guard import NanGuard
from sgformer.training.planning import Cost, Stopwatch, chosen, data_facts, plan
from sgformer.training.run_folder import RunFolder
from sgformer.training.task import Splits, Task
from sgformer.training.trainer import build_trainer, machine_options, per_process_batch, trainer_options
from sgformer.training.worker_errors import refuse_reentry, worker_errors
from sgformer.viz.curves import draw_curves

log = logging.getLogger("sgformer")


def run_training(config: RunConfig, task: Task, resume: str | os.PathLike[str] | None = None) -> RunFolder:
    """Train, validate, and write a run folder.

    Args:
        config: all settings.
        task: builds the data, the network and so on; all generators are seeded before.
        resume: the folder of a run to resume, whose settings are in `config`.

    Raises:
        UserError: a setting, the data or the machine is unsuitable; raised before the folder is created if possible.
        Interrupted: a signal stopped the run; the checkpoint is written.
    """
    refuse_reentry()
    began = time.monotonic()
    is_main = rank_zero_only.rank == 0  # type: ignore[attr-defined]
    if is_main and not resume:
        RunFolder.try_place(config.run)
    trainer = build_trainer(**machine_options(config))
    world, device = trainer.world_size, trainer.strategy.root_device
    config = config.with_weights()
    weights = starting_weights(config, resume)
    if config.freeze and weights is None:
        raise UserError("--freeze trains a head on the backbone of some weights: add --weights, or leave it out")
    with resumed_data(config, resume):
        listings = task.listings(config, weights)
    data = None
    if listings and not resume and any(map(config.is_auto, config.automatic())):
        data = data_facts(listings[0], weights, task.name, device.type, world * config.accumulate)
    given = config
    planned: dict[str, Any] | None = None
    if config.minutes is not None and not resume:
        if is_main:
            log.info(f"measuring how much of the training {config.minutes:g} minutes allow")
        config, planned = plan(config, data, partial(measure, task, weights, listings, began))
    config = config.resolved(data)
    with resumed_data(config, resume):
        splits = open_splits(config, task, weights, listings, trainer)
    contents = {"train": Contents.of(splits.train.listing), "val": Contents.of(splits.val.listing)}
    earlier = resume and not RunFolder.open(resume).contents.is_file()
    if resume:
        RunFolder.open(resume).check_data(config.data, task.name, contents)
    with held_log(is_main) as before_the_folder:
        module = new_module(config, task, splits, weights)
    batch, model = per_process_batch(config, world), module.model
    previous = RunFolder.open(resume).environment() if resume else {}
    planned = planned or previous.get("planned")
    previous_kernels = previous.get("kernels", "torch") if resume else None
    kernels, why = use_native_kernels(config, model, device, previous_kernels)

    steps = len(splits.train_sampler) // config.accumulate  # from one validation to the next
    if not resume:
        config.check_schedule(splits.total_steps, splits.steps_per_pass)
    total_steps = min(splits.total_steps, config.max_steps or splits.total_steps)

    folder = RunFolder(resume, is_main) if resume else RunFolder.create(config, task.name, is_main)
    folder.keep_split(splits.split)
    state, start = folder.usable_checkpoint() if resume else (None, 0)
    if resume:
        folder.clear_unfinished()
    folder.write_contents(contents)
    del contents  # names of millions of images, which loader processes would inherit
    splits.train_sampler.resume_at(start // steps, start % steps * config.accumulate)
    train_loader = build_loader(splits.train, splits.train_sampler, config.workers, splits.collate)
    val_loader = build_loader(splits.val, splits.val_sampler, config.workers, splits.val_collate)
    handler = folder.start_log()
    for record in before_the_folder:
        handler.handle(record)
    try:
        skipped, drawn = cb.SkippedImages(), folder.path / "train_batch.png"
        run_log = cb.RunLog(
            folder,
            config.batch_size,
            total_steps,
            config.log_every,
            splits.steps_per_pass,
            splits.total_steps,
            task.unit,
        )
        averaging = [cb.WeightAverage(config.ema)] if config.ema else []
        unsharded = [cb.UnshardedCopy()] if config.strategy == "fsdp" else []
        budgets = [cb.TokenBudgets(config.token_budgets, config.seed)] if config.token_budget_range else []
        seeds = cb.StepSeeds(config.seed)
        guard = NanGuard(folder, splits.metadata, seeds.on_train_batch_start, splits.train.listing.path)
        recorder = []
        if config.record_significance:
            from sgformer.training.recorder import SignificanceRecorder

            recorder = [SignificanceRecorder(folder, config.record_significance, task, splits)]
        patience = [cb.Patience(module.monitor, config.patience)] if config.patience else []
        bar = [cb.ProgressBar(batch * world)] if is_main and sys.stdout.isatty() else []
        trainer = build_trainer(
            **trainer_options(config),
            max_epochs=math.ceil(splits.total_steps / steps),
            limit_train_batches=steps * config.accumulate,
            sync_batchnorm=world > 1 and trainer.strategy.root_device.type == "cuda",
            callbacks=[
                cb.SameStart(folder, start),
                skipped,
                cb.FirstBatches(
                    config.seed, lambda images, targets: task.draw_batch(config, splits, images, targets, drawn)
                ),
                *budgets,
                seeds,
                guard,
                *averaging,
                *bar,
                run_log,
                *recorder,
                cb.Checkpoints(
                    folder,
                    splits.metadata,
                    config.checkpoint_every,
                    total_steps,
                    on_best=lambda _: module.evaluation(sorted(skipped.lines)).write(
                        folder.path / "validation", picture=False
                    ),
                ),
                *unsharded,
                *patience,
            ],
        )
        parameters = sum(p.numel() for p in model.parameters())
        if is_main:
            folder.write_environment(
                seed=config.seed,
                device=str(trainer.strategy.root_device),
                kernels=kernels,
                processes=world,
                resumed_at_step=start,
                **({"planned": planned} if planned else {}),
            )
            if resume:
                folder.write("config.yaml", to_yaml(config.to_dict()))
            for line in (
                f"{'resuming' if resume else 'training'} {config.model}, {parameters / 1e6:.1f} M parameters, "
                f"{'native kernels, ' if kernels == 'native' else ''}in {folder.path}",
                *([f"starts from {started_from(config)}"] if not resume else []),
                *([f"native kernels are off: {why}"] if why else []),
                f"data {splits.about}",
                *(f"note: {note}" for note in splits.notes),
                *(
                    ["note: of an earlier version: from here the rate falls from the end of the warm-up"]
                    if earlier
                    else []
                ),
                *module.notes,
                *([f"chosen for {data}:", *chosen(given, config)] if data else []),
                *([f"frozen: {module.frozen_share()}"] if config.freeze else []),
                *([f"planned for {planned['minutes']:g} minutes: {planned['updates']} updates"] if planned else []),
                f"{total_steps - start} updates to go, {steps} per validation, {config.batch_size} images each "
                f"({world} processes x {batch} images x {config.accumulate} accumulated) at {splits.size}",
                f"learning rate {config.scaled(config.lr):.3g} = {config.lr:g} x {config.batch_size} "
                f"/ {config.base_batch}{warmup_words(module.warmup_updates, total_steps)}",
            ):
                log.info(line)
        if config.compile:
            model.compile()
        if start < total_steps:
            with worker_errors():
                trainer.fit(module, train_loader, val_loader, ckpt_path=state, weights_only=bool(state) or None)
        else:
            log.info("nothing left to train; increase --epochs or --max-steps to continue")
        stopped = patience[0].reason() if patience else None
        if stopped:
            log.info(f"stopped after {trainer.global_step} of {total_steps} updates: {stopped}")
        if is_main:
            result = task.read_evaluation(folder.path / "validation")
            result.write(folder.path / "validation")
            task.finish(folder.path / "validation", splits, module)
            draw_curves(folder.path / "metrics.csv", folder.path / "curves.png", task.scores(module))
            facts = {
                "Parameters": f"{parameters / 1e6:.2f} M",
                "Data": splits.about,
                "Updates": f"{trainer.global_step} of {total_steps}: {stopped}" if stopped else total_steps,
                **({"Planned for": f"{planned['minutes']:g} minutes"} if planned else {}),
                "Time": cb.clock(run_log.seconds),
                "Throughput": f"{run_log.images_per_second:.0f} training images/s",
                **module.facts(),
                "Skipped images": len(skipped.lines),
                "Best weights": "best.safetensors",
            }
            pictures = [
                ("Curves", "curves.png"),
                *task.pictures,
                ("Evolution of significance", "significance/evolution.png"),
                ("Significance of a validation image", "significance/00.png"),
                ("An augmented training batch", "train_batch.png"),
            ]
            pictures = [(title, file) for title, file in pictures if (folder.path / file).exists()]
            folder.write("report.md", task.report(config.model, result, facts, pictures))
            log.info(f"best {result.headline()}; see {folder.path}/report.md")
        return folder
    except Interrupted as stop:
        folder.note(f"stopped: {stop}")
        raise
    except (UserError, OSError) as error:
        problem = error if isinstance(error, UserError) else _disk_error(error, folder)
        folder.note(f"stopped: {problem}")
        if is_main:
            log.info(folder.resume_hint(task.name, config))
        raise problem from error
    finally:
        log.removeHandler(handler)
        handler.close()


def starting_weights(config: RunConfig, resume: str | os.PathLike[str] | None) -> Weights | None:
    """The weights to build the network from: those of `config`, or a resumed run's own, once it has written any.

    A run's own weights know its exact network, which a later version of this package may call otherwise, and the file
    that the run started from may have gone.
    """
    if resume and (own := Path(resume) / "last.safetensors").is_file():
        weights = read_weights(own)  # copied: the file is replaced while this run goes on
        return dataclasses.replace(weights, tensors={name: tensor.clone() for name, tensor in weights.tensors.items()})
    return read_weights(config.weights, config.model).in_full() if config.weights else None


def started_from(config: RunConfig) -> str:
    """What a run's weights are at its start, in words."""
    if config.weights and pretrained_file(config.weights) and not Path(config.weights).exists():
        return f"the weights of {config.weights} that come with the package"
    return config.weights or "random weights"


def warmup_words(warmup: int, total: int) -> str:
    """What follows the learning rate in the log, for so many updates of warm-up in a run of so many updates."""
    if warmup >= total:
        return f"; not reached: the run ends within {warmup} updates of warm-up" if warmup else ""
    return f", reached after {warmup} updates" if warmup else ""


class _Holder(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@contextmanager
def held_log(shown: bool) -> Iterator[list[logging.LogRecord]]:
    """Collect what is logged within the block, for a file that does not exist yet; show it only if `shown`."""
    holder = _Holder()
    log.addHandler(holder)
    log.disabled = not shown
    try:
        yield holder.records
    finally:
        log.disabled = False
        log.removeHandler(holder)


@contextmanager
def resumed_data(config: RunConfig, resume: Any) -> Iterator[None]:
    """Add to errors that the data of a resumed run may have moved."""
    try:
        yield
    except UserError as error:
        if resume and config.data and not is_address(config.data) and not Path(config.data).exists():
            raise UserError(f"{error}; pass --data if the data of this run moved") from None
        raise


def open_splits(config: RunConfig, task: Task, weights: Any, listings: Any, trainer: L.Trainer) -> Splits:
    """The data of a run, the same whenever the settings are.

    Raises:
        UserError: the data is unsuitable.
    """
    batch = per_process_batch(config, trainer.world_size)
    L.seed_everything(config.seed, verbose=False)
    splits = task.splits(config, weights, batch, trainer.global_rank, trainer.world_size, listings)
    if len(splits.train_sampler) < config.accumulate:
        images = len(splits.train)  # type: ignore[arg-type]
        raise UserError(f"--accumulate {config.accumulate} is too large for {images} training images")
    for dataset, split in ((splits.train, "the training data"), (splits.val, "the validation data")):
        require_readable(dataset, split)
    return splits


def new_module(config: RunConfig, task: Task, splits: Splits, weights: Any) -> Any:
    """The module of a run, with what `--freeze` freezes.

    Raises:
        UserError: a setting or the weights are unsuitable.
    """
    module = task.module(config, splits, weights)
    if config.freeze:
        module.freeze_backbone()
    return module


def measure(
    task: Task, weights: Any, listings: Any, began: float, config: RunConfig, seconds: float
) -> tuple[Cost, float, float]:
    """Train with some settings for a few seconds, validate on a few batches, and throw the result away.

    Args:
        task, weights, listings: of the run.
        began: the time, on `time.monotonic`, at which the run began.
        config: the settings.
        seconds: the time that the training may take.

    Returns:
        The costs, the updates per pass over the images, and the seconds since the run began.
    """
    trainer = build_trainer(**machine_options(config))
    with held_log(False):  # the run itself says it
        return _measured(task, weights, listings, began, config, seconds, trainer)


def _measured(
    task: Task, weights: Any, listings: Any, began: float, config: RunConfig, seconds: float, trainer: L.Trainer
) -> tuple[Cost, float, float]:
    splits = open_splits(config, task, weights, listings, trainer)
    module = new_module(config, task, splits, weights)
    use_native_kernels(config, module.model, trainer.strategy.root_device)
    if config.compile:
        module.model.compile()
    train_loader, val_loader = (
        build_loader(data, sampler, config.workers, collate)
        for data, sampler, collate in (
            (splits.train, splits.train_sampler, splits.collate),
            (splits.val, splits.val_sampler, splits.val_collate),
        )
    )
    watch = Stopwatch(seconds, 3, len(splits.val_sampler), began)
    averaging = [cb.WeightAverage(config.ema)] if config.ema else []
    unsharded = [cb.UnshardedCopy()] if config.strategy == "fsdp" else []
    trainer = build_trainer(
        **trainer_options(config),
        max_epochs=10**6,  # the stopwatch ends it
        limit_val_batches=4,
        sync_batchnorm=trainer.world_size > 1 and trainer.strategy.root_device.type == "cuda",
        callbacks=[cb.StepSeeds(config.seed), *averaging, *unsharded, watch],
    )
    with worker_errors():
        trainer.fit(module, train_loader, val_loader)
    return (watch.result[0], splits.steps_per_pass, watch.result[1])


def use_native_kernels(
    config: RunConfig, model: torch.nn.Module, device: torch.device, previous: str | None = None
) -> tuple[str, str]:
    """Switch the network to native kernels if ``--native`` is on, or if it is auto and they are available.

    Args:
        previous: the kernels of the run being resumed; auto keeps torch's, so that the run stays reproducible.

    Returns:
        "native" or "torch", and for the log the reason if native kernels were expected but are not used.

    Raises:
        UserError: ``--native on`` is not possible.
    """
    if config.native == "on" and device.type != "cpu":
        raise UserError(f"--native on requires --device cpu (this run uses {device.type})")
    eligible = config.model.startswith("sgformer_") and config.precision == "fp32" and not config.compile
    if config.native == "off" or not eligible or device.type != "cpu":
        return "torch", ""
    if config.native == "auto" and previous == "torch":
        return "torch", "the run was started without them"
    from sgformer.backends.native import UnavailableError
    from sgformer.backends.native_autograd import accelerate

    try:
        accelerate(model)
    except UnavailableError as reason:
        if config.native == "on":
            raise UserError(f"--native on: {reason}") from reason
        return "torch", f"{reason}{'; results will differ in the last bits' if previous else ''}"
    return "native", ""


def require_readable(dataset: Any, split: str) -> None:
    """Raise UserError if no image of a data set that skips bad images can be read; looks no further than the first."""
    problem = ""
    for index in range(len(dataset)) if dataset.bad_images == "skip" else ():
        sample = dataset[index]
        if sample.skipped is None:
            return
        problem = problem or sample.skipped
    if problem:
        raise UserError(f"none of the {len(dataset)} images of {split} can be read; the first: {problem}")


def build_loader(dataset: Dataset, sampler: Any, workers: int, collate: Callable[..., Any]) -> DataLoader:
    """A DataLoader with a batch sampler that yields lists of (epoch, index)."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=end_with_parent,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


def _disk_error(error: OSError, folder: RunFolder) -> UserError:
    """A one-line error for a failed write."""
    return UserError(f"{error.filename or folder.path}: cannot be written ({error.strerror or error})")
