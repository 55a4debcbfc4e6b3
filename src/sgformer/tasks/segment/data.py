"""The images of a segmentation run: label maps in the ADE20K layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from sgformer.core.errors import UserError
from sgformer.data import splitting
from sgformer.data.ade20k import LabelledFolder, LabelledFolderDataset, StepSampler, collate, collate_sizes, scan
from sgformer.data.dense_transforms import as_tensors, train_transform
from sgformer.data.imagefolder import EpochSampler, left_out
from sgformer.data.label_values import check_values
from sgformer.data.objects import object_pixels
from sgformer.data.preparing import Normalization, denormalize
from sgformer.models.load import Weights
from sgformer.tasks.segment.config import SegmentConfig
from sgformer.training.task import Splits
from sgformer.viz.segmentation import draw_training_batch


def read_listings(config: SegmentConfig, weights: Weights | None) -> tuple[LabelledFolder, LabelledFolder]:
    """See `Task.listings`."""
    if config.data is None:
        raise UserError("--data is missing: the folder with images/training and annotations/training")
    if config.val_split:
        dividing = splitting.ValSplit(config.val_split, config.split_seed)
        return splitting.open_label_maps(config.data, dividing, config.classes, config.reduce_zero_label)
    train = scan(config.data, "training", config.classes, config.reduce_zero_label)
    return train, scan(config.data, "validation", train.classes, config.reduce_zero_label)


def open_data(
    config: SegmentConfig,
    weights: Weights | None,
    batch: int,
    rank: int,
    world: int,
    listings: tuple[LabelledFolder, LabelledFolder] | None = None,
) -> Splits:
    """See `Task.splits`."""
    normalization = Normalization.of(weights.metadata if weights else {})
    if config.head == "upernet" and batch == 1:
        raise UserError("upernet's batch norm needs two images at a time: raise --batch-size, or --accumulate less")
    train, val = listings or read_listings(config, weights)
    train, notes = check_values(train)
    val, more = check_values(val, train.binary)
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
            "binary": train.binary,
            **normalization.to_metadata(),
            **({"val_split": config.val_split} if config.val_split else {}),
        },
        about=f"{config.data}: {len(train)} training and {len(val)} validation images, {len(train.classes)} classes",
        size="x".join(map(str, config.image_hw)),
        notes=[*left_out(train), *left_out(val), *notes, *more],
        split=splitting.to_json(config.val_split, config.split_seed, val) if config.val_split else None,
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
