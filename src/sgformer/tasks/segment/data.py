"""The images of a segmentation run: label maps in the ADE20K layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from sgformer.core.errors import UserError
from sgformer.data.ade20k import LabelledFolderDataset, StepSampler, collate, collate_sizes, scan
from sgformer.data.dense_transforms import as_tensors, train_transform
from sgformer.data.imagefolder import EpochSampler
from sgformer.data.objects import object_pixels
from sgformer.data.preparing import Normalization, denormalize
from sgformer.models.load import Weights
from sgformer.tasks.segment.config import SegmentConfig
from sgformer.training.task import Splits
from sgformer.viz.segmentation import draw_training_batch


def open_data(config: SegmentConfig, weights: Weights | None, batch: int, rank: int, world: int) -> Splits:
    """See `Task.splits`."""
    normalization = Normalization.of(weights.metadata if weights else {})
    if config.data is None:
        raise UserError("--data is missing: the folder with images/training and annotations/training")
    if config.head == "upernet" and batch == 1:
        raise UserError("upernet's batch norm needs two images at a time: raise --batch-size, or --accumulate less")
    train = scan(config.data, "training", config.classes, config.reduce_zero_label)
    val = scan(config.data, "validation", train.classes, config.reduce_zero_label)
    steps_per_pass = len(train) / config.batch_size
    total = config.total_steps(steps_per_pass)
    augmentation = train_transform(
        config.image_hw,
        short_side=config.short,
        scale=(config.scale_min, config.scale_max),
        hflip=config.hflip,
        cat_max_ratio=config.cat_max_ratio,
        distortion=config.distortion,
        ignore=train.ignore,
        normalization=normalization,
    )
    rounds = min(config.val_every, total) * config.accumulate
    return Splits(
        train=LabelledFolderDataset(train, augmentation, seed=config.seed, bad_images=config.bad_images),
        val=LabelledFolderDataset(val, as_tensors, bad_images=config.bad_images),
        train_sampler=StepSampler(len(train), batch, rounds, seed=config.seed, rank=rank, world=world),
        val_sampler=EpochSampler(len(val), batch, train=False, rank=rank, world=world),
        total_steps=total,
        steps_per_pass=steps_per_pass,
        collate=collate,
        val_collate=collate_sizes,
        metadata={
            "task": "segment",
            "model": config.model,
            "classes": list(train.classes),
            "image_size": config.to_dict()["image_size"],
            "short_side": config.short,
            "reduce_zero_label": config.reduce_zero_label,
            **normalization.to_metadata(),
        },
        about=f"{config.data}: {len(train)} training and {len(val)} validation images, {len(train.classes)} classes",
        size="x".join(map(str, config.image_hw)),
    )


def draw_batch(
    config: SegmentConfig, splits: Splits, images: list[torch.Tensor], targets: list[torch.Tensor], out: Path
) -> None:
    """See `Task.draw_batch`."""
    pixels = denormalize(torch.stack(images), Normalization.of(splits.metadata)).permute(0, 2, 3, 1).numpy()
    draw_training_batch(pixels, torch.stack(targets).numpy(), splits.metadata["classes"], out)


def objects(splits: Splits, index: int) -> np.ndarray:
    """See `Task.objects`."""
    listing = splits.val.listing
    return object_pixels(splits.val[index].target.numpy(), listing.classes, listing.ignore)
