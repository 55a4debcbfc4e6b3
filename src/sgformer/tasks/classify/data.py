"""The images of a classification run: `train/CLASS/*` and `val/CLASS/*`, or tar shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sgformer.core.errors import UserError
from sgformer.core.names import quoted
from sgformer.data import splitting
from sgformer.data.formats import open_both
from sgformer.data.imagefolder import (
    EpochSampler,
    ImageFolderDataset,
    Listing,
    absent,
    collate,
    folders_between,
    left_out,
)
from sgformer.data.preparing import Normalization, denormalize, eval_transform
from sgformer.data.transforms import Transform, train_transform
from sgformer.models.load import Weights
from sgformer.tasks.classify.config import ClassifyConfig
from sgformer.training.task import Splits
from sgformer.viz.sheets import draw_batch as draw_sheet

AUGMENTATION = ("auto_augment", "color_jitter", "interpolation", "crop_scale", "hflip", "reprob")


def read_listings(config: ClassifyConfig, weights: Weights | None) -> tuple[Listing, Listing]:
    """See `Task.listings`."""
    if config.data is None:
        raise UserError("--data is missing: the folder with train/CLASS/* and val/CLASS/*, or one of shards")
    dividing = splitting.ValSplit(config.val_split, config.split_seed) if config.val_split else None
    train, val = splitting.open_classes(config.data, dividing) if dividing else open_both(config.data)
    if len(train.classes) < 2:
        only = quoted(train.classes)
        raise UserError(f"{config.data}: one class only, {only}: a classifier tells two or more apart; add a folder")
    return train, val


def open_data(
    config: ClassifyConfig,
    weights: Weights | None,
    batch: int,
    rank: int,
    world: int,
    listings: tuple[Listing, Listing] | None = None,
) -> Splits:
    """See `Task.splits`."""
    normalization = Normalization.of(weights.metadata if weights else {})
    train, val = listings or read_listings(config, weights)
    sampler = EpochSampler(
        len(train),
        batch,
        train=True,
        seed=config.seed,
        rank=rank,
        world=world,
        balance=train.targets if config.balance == "sampling" else None,
    )
    steps = len(sampler) // config.accumulate
    augmentation = {name: getattr(config, name) for name in AUGMENTATION}
    transforms: tuple[Transform, Transform] = (
        train_transform(config.image_hw, **augmentation, normalization=normalization),
        eval_transform(config.image_hw, config.crop_pct, normalization=normalization),
    )
    datasets = [
        ImageFolderDataset(listing, transform, seed=config.seed, bad_images=config.bad_images)
        for listing, transform in zip((train, val), transforms, strict=True)
    ]
    return Splits(
        train=datasets[0],
        val=datasets[1],
        train_sampler=sampler,
        val_sampler=EpochSampler(len(val), max(1, config.batch_size // world), train=False, rank=rank, world=world),
        total_steps=config.total_steps(steps),
        steps_per_pass=steps,
        collate=collate,
        val_collate=collate,
        metadata={
            "task": "classify",
            "model": config.model,
            "classes": list(train.classes),
            "image_size": config.to_dict()["image_size"],
            "crop_pct": config.crop_pct,
            **normalization.to_metadata(),
            **({"val_split": config.val_split} if config.val_split else {}),
        },
        about=f"{config.data}: {len(train)} training and {len(val)} validation images, {len(train.classes)} classes",
        size="x".join(map(str, config.image_hw)),
        notes=[*folders_between(train), *left_out(train), *left_out(val), *absent(val)],
        split=splitting.to_json(config.val_split, config.split_seed, val) if config.val_split else None,
    )


def objects(splits: Splits, index: int) -> np.ndarray | None:
    """The object pixels of a validation sample of composed scenes; None for other data."""
    listing, transform = splits.val.listing, splits.val.transform
    if not hasattr(listing, "root") or not (listing.root / "scenes.json").is_file():
        return None
    from sgformer.data.scenes import scene_objects

    mask = scene_objects(listing.path(index))
    return (denormalize(transform(Image.fromarray(mask).convert("RGB")))[0] > 0.5).numpy()


def draw_batch(
    config: ClassifyConfig, splits: Splits, images: list[torch.Tensor], targets: list[torch.Tensor], out: Path
) -> None:
    """See `Task.draw_batch`."""
    pixels = denormalize(torch.stack(images), Normalization.of(splits.metadata)).permute(0, 2, 3, 1).numpy()
    draw_sheet(pixels, torch.stack(targets).numpy(), splits.metadata["classes"], out, config.smoothing)
