"""Put a Lightning `Trainer` together from a config, and keep it quiet."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy

from sgformer.core.device import find_device
from sgformer.core.errors import UserError
from sgformer.training.config import RunConfig
from sgformer.training.state_file import StateIO

PRECISION = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}

# What Lightning, torch and torchmetrics say that a user of this package can do nothing about.
NOISE = (
    r".*does not have many workers which may be a bottleneck.*",
    r".*is smaller than the logging interval.*",
    r".*It is recommended to use .*sync_dist=True.*",
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
    r".*Using `DistributedSampler` with the dataloaders.*",
    r".*Trying to infer the `batch_size` from an ambiguous collection.*",
    r".*The `srun` command is available on your system but is not used.*",
    r".*Checkpoint directory .* exists and is not empty.*",
    r".*Detected call of `lr_scheduler.step\(\)` before `optimizer.step\(\)`.*",
    r".*You're resuming from a checkpoint that ended before the epoch ended.*",  # our sampler goes on where it was
    r".*Our suggested max number of worker.*",  # the number is the user's to choose
    r".*Grad strides do not match bucket view strides.*",
    r".*module\(s\) in eval mode at the start of training.*",  # frozen stages
)


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2: parameters, gradients and moments are shared out over all processes; see `tasks.common.NetworkTask`.

    Training states are the whole run's, in one file, so that a run can go on with another number of processes.
    """

    def __init__(self) -> None:
        super().__init__(save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()


def build_trainer(
    *,
    device: str = "auto",
    devices: int | str = "auto",
    precision: str = "fp32",
    strategy: str = "ddp",
    callbacks: Sequence[Callback] = (),
    **options: Any,
) -> L.Trainer:
    """A `Trainer` without logger, progress bar and checkpoints of its own; those are our callbacks.

    Args:
        device: auto, cpu, cuda, cuda:N, mps.
        devices: processes on this machine (those that torchrun or SLURM started, else one per GPU, if "auto").
        precision: fp32, bf16 or fp16.
        strategy: ddp, or fsdp; see `ShardedStrategy`.
        callbacks, options: as of `lightning.Trainer`.

    Raises:
        UserError: no such device here.
    """
    where = find_device(device)
    if where.type == "cpu" and devices == "auto":
        devices = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if where.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as in every published recipe of this kind
    return L.Trainer(
        accelerator=where.type,
        devices=devices if where.index is None else [where.index],  # type: ignore[arg-type]
        # The number of machines: torchrun's, SLURM's, or this one.
        num_nodes=int(os.environ.get("GROUP_WORLD_SIZE") or os.environ.get("SLURM_NNODES") or 1),
        precision=PRECISION[precision],  # type: ignore[arg-type]
        strategy=ShardedStrategy() if strategy == "fsdp" else "auto",
        callbacks=list(callbacks),
        plugins=[StateIO()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,  # ours share out every image exactly once
        **options,
    )


def trainer_options(config: RunConfig) -> dict[str, Any]:
    """The part of a config that `build_trainer` takes."""
    return {
        "device": config.device,
        "devices": config.devices,
        "precision": config.precision,
        "strategy": config.strategy,
        "accumulate_grad_batches": config.accumulate,
        "gradient_clip_val": config.clip_grad,
        "deterministic": config.deterministic or None,
    }


def per_process_batch(config: RunConfig, world: int) -> int:
    """Images per forward pass on one process.

    Raises:
        UserError: the batch does not divide.
    """
    parts = world * config.accumulate
    if config.batch_size % parts:
        raise UserError(
            f"--batch-size {config.batch_size} does not divide into {parts} equal parts "
            f"({world} processes x --accumulate {config.accumulate})"
        )
    return config.batch_size // parts


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning's notices, and the known warnings in `NOISE`, off the terminal; everything else gets through."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for message in NOISE:
            warnings.filterwarnings("ignore", message=message)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
