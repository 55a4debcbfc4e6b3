"""The images of a run."""

from sgformer.data.formats import open_both
from sgformer.data.imagefolder import EpochSampler, ImageFolderDataset, collate
from sgformer.data.preparing import eval_transform
from sgformer.training.task import Splits


def open_data(config, weights, batch, rank, world):
    """See `Task.splits`."""
    train, val = open_both(config.data)
    sampler = EpochSampler(len(train), batch, train=True, seed=config.seed, rank=rank, world=world)
    steps, transform = len(sampler) // config.accumulate, eval_transform(config.image_hw, 1.0)
    return Splits(
        train=ImageFolderDataset(train, transform, seed=config.seed),
        val=ImageFolderDataset(val, transform),
        train_sampler=sampler,
        val_sampler=EpochSampler(len(val), batch, train=False, rank=rank, world=world),
        total_steps=round(steps * config.epochs),
        steps_per_pass=steps,
        collate=collate,
        val_collate=collate,
        metadata={
            "task": "toy",
            "model": config.model,
            "classes": list(train.classes),
            "image_size": list(config.image_hw),
        },
        about=f"{config.data}: {len(train)} training and {len(val)} validation images",
        size="x".join(map(str, config.image_hw)),
    )
