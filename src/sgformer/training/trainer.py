"""Build a Lightning `Trainer` from a config, and silence its notices."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, OptimStateKeyType

from sgformer.core.device import find_device
from sgformer.core.errors import UserError
from sgformer.training.config import RunConfig
from sgformer.training.ranks import Ranks
from sgformer.training.state_file import StateIO

PRECISION = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}

# Warnings of Lightning, torch and torchmetrics that users of this package cannot act on.
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
    r".*You're resuming from a checkpoint that ended before the epoch ended.*",  # our sampler resumes mid-epoch
    r".*Our suggested max number of worker.*",  # the user sets --workers
    r".*Grad strides do not match bucket view strides.*",
    r".*`training_step` returned `None`.*",  # a batch of unreadable images
    r".*module\(s\) in eval mode at the start of training.*",  # frozen stages
)


class ReplicatedStrategy(Ranks, DDPStrategy):
    """DDP: every process has the whole network and a part of the batch."""

    def setup_distributed(self) -> None:
        self.meet()
        super().setup_distributed()


class ShardedStrategy(Ranks, ModelParallelStrategy):
    """FSDP2: parameters, gradients and optimizer state are sharded over all processes; see `TaskModule`.

    Training states are unsharded, in one file, so that a run can resume with another number of processes.
    """

    def __init__(self) -> None:
        super().__init__(save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def _setup_distributed(self) -> None:
        self.meet()
        super()._setup_distributed()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """As Lightning's, but every process takes its shards from the file, where Lightning sends pickles."""
        checkpoint = torch.load(checkpoint_path, mmap=True, map_location="cpu", weights_only=weights_only)
        options = StateDictOptions(full_state_dict=True)
        model: Any = self.model
        set_model_state_dict(model, checkpoint.pop("state_dict"), options=options)
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            named = FullyShardedDataParallel.rekey_optim_state_dict(state, OptimStateKeyType.PARAM_NAME, model)
            set_optimizer_state_dict(model, optimizer, optim_state_dict=named, options=options)
        return checkpoint


def build_trainer(
    *,
    device: str = "auto",
    devices: int | str = "auto",
    precision: str = "fp32",
    strategy: str = "ddp",
    callbacks: Sequence[Callback] = (),
    **options: Any,
) -> L.Trainer:
    """Build a `Trainer` without its own logger, progress bar and checkpoints, which our callbacks provide.

    Args:
        device: auto, cpu, cuda, cuda:N, mps.
        devices: processes on this machine; "auto": those started by torchrun or SLURM, otherwise one per GPU.
        precision: fp32, bf16 or fp16.
        strategy: ddp or fsdp; see `ShardedStrategy`.
        callbacks, options: passed to `lightning.Trainer`.

    Raises:
        UserError: the device is not available, or cannot compute in this precision.
    """
    resolved = find_device(device)
    if precision not in PRECISION:
        raise UserError(f"--precision {precision} is for classifiers on a CPU; take {', '.join(PRECISION)}")
    if resolved.type == "cpu" and precision == "fp16":  # Lightning would take bf16 instead
        raise UserError("--precision fp16 runs on GPUs only; on a CPU, use bf16 or fp32")
    if resolved.type == "cpu" and devices == "auto":
        devices = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if resolved.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as in published recipes
    # The number of machines, from torchrun or SLURM, otherwise 1.
    machines = int(os.environ.get("GROUP_WORLD_SIZE") or os.environ.get("SLURM_NNODES") or 1)
    alone = machines == 1 and _processes(resolved, devices) == 1
    interactive = hasattr(sys, "ps1") or bool(sys.flags.interactive)  # no script that could be started again
    replicated = "auto" if alone else ReplicatedStrategy(start_method="fork" if interactive else "popen")
    return L.Trainer(
        accelerator=resolved.type,
        devices=devices if resolved.index is None else [resolved.index],  # type: ignore[arg-type]
        num_nodes=machines,
        precision=PRECISION[precision],  # type: ignore[arg-type]
        strategy=ShardedStrategy() if strategy == "fsdp" else replicated,
        callbacks=list(callbacks),
        plugins=[StateIO()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,  # our samplers distribute the images themselves, each exactly once
        **options,
    )


def _processes(device: torch.device, devices: int | str) -> int:
    """Processes on this machine, as Lightning counts them."""
    if device.index is not None:
        return 1
    if devices == "auto":
        return torch.cuda.device_count() if device.type == "cuda" else 1
    return int(devices)


def machine_options(config: RunConfig) -> dict[str, Any]:
    """The arguments of `build_trainer` in a config that say where it runs."""
    return {name: getattr(config, name) for name in ("device", "devices", "precision", "strategy")}


def trainer_options(config: RunConfig) -> dict[str, Any]:
    """The arguments of `build_trainer` in a config."""
    return {
        **machine_options(config),
        "accumulate_grad_batches": config.accumulate,
        "gradient_clip_val": config.clip_grad,
        "deterministic": config.deterministic or None,
    }


def per_process_batch(config: RunConfig, world: int) -> int:
    """Images per forward pass on one process.

    Raises:
        UserError: the batch size is not divisible by processes x accumulation.
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
    """Silence Lightning's notices and the warnings in `NOISE` within the block."""
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
