"""The images of a detection run: COCO annotations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from sgformer.core.errors import UserError
from sgformer.core.names import quoted
from sgformer.data import splitting
from sgformer.data.coco import CocoDataset, CocoListing, collate, ground_truth, vanishing
from sgformer.data.detection_transforms import eval_transform, train_transform
from sgformer.data.formats import open_data as open_format
from sgformer.data.image import short_and_longest
from sgformer.data.imagefolder import EpochSampler
from sgformer.data.layouts import hint
from sgformer.data.objects import annotated_pixels
from sgformer.data.preparing import Normalization
from sgformer.heads.registry import DETECTORS
from sgformer.models.load import Weights
from sgformer.tasks.detect.config import DetectConfig, ObjectsConfig
from sgformer.tasks.detect.metrics import CocoMetric
from sgformer.tasks.detect.network import named_head
from sgformer.training.task import Splits
from sgformer.viz.detection import Instances, draw_training_images, sure_points


def read_listings(config: DetectConfig, weights: Weights | None) -> tuple[CocoListing, CocoListing]:
    """See `Task.listings`."""
    train, val = read_splits(config, named_head(config, weights))
    require_truth(val)
    return train, val


def open_data(
    config: DetectConfig,
    weights: Weights | None,
    batch: int,
    rank: int,
    world: int,
    listings: tuple[CocoListing, CocoListing] | None = None,
) -> Splits:
    """See `Task.splits`."""
    listings = listings or read_listings(config, weights)
    augment = train_transform(config.image_size, config.multi_scale, config.hflip)
    return make_splits("detect", config, weights, listings, augment, batch, rank, world)


def make_splits(
    task: str,
    config: ObjectsConfig,
    weights: Weights | None,
    listings: tuple[CocoListing, CocoListing],
    augment: Any,
    batch: int,
    rank: int,
    world: int,
    **metadata: Any,
) -> Splits:
    """The data of a run on COCO annotations.

    Args:
        task: its name.
        config, weights, batch, rank, world: see `Task.splits`.
        listings: of training and validation.
        augment: the transform of training.
        metadata: stored with the weights, besides what is common to all networks that find objects.
    """
    normalization = Normalization.of(weights.metadata if weights else {})
    train, val = listings
    sampler = EpochSampler(len(train), batch, train=True, seed=config.seed, rank=rank, world=world)
    steps = len(sampler) // config.accumulate
    train_data, val_data = (
        CocoDataset(listing, transform, seed=config.seed, bad_images=config.bad_images, objects=listing is train)
        for listing, transform in zip(listings, (augment, eval_transform(config.image_size)), strict=True)
    )
    short, longest = short_and_longest(config.image_size)
    return Splits(
        train=train_data,
        val=val_data,
        train_sampler=sampler,
        val_sampler=EpochSampler(len(val), max(1, config.batch_size // world), train=False, rank=rank, world=world),
        total_steps=max(1, round(steps * config.epochs)),
        steps_per_pass=steps,
        collate=collate,
        val_collate=collate,
        metadata={
            "task": task,
            "model": config.model,
            "classes": list(train.classes),
            "category_ids": list(train.own_ids),
            "image_size": config.to_dict()["image_size"],
            **normalization.to_metadata(),
            **metadata,
            **({"val_split": config.val_split} if config.val_split else {}),
        },
        about=f"{config.data}: {len(train.classes)} classes; " + "; ".join(listing.describe() for listing in listings),
        size=f"{short}x{longest}",
        notes=[*vanishing(train, config.image_size), *without_objects(val), *late_drops(config)],
        split=splitting.to_json(config.val_split, config.split_seed, val) if config.val_split else None,
    )


def read_splits(config: DetectConfig, head: str | None = None) -> tuple[CocoListing, CocoListing]:
    """The training and validation listings of a config, with masks if the head predicts them.

    Raises:
        UserError: they are missing or invalid.
    """
    masks = config.masks
    if head is not None:
        finds = bool(DETECTORS.get(head).masks)
        if masks not in (None, finds):
            raise UserError(f"--masks {str(masks).lower()}: --head {head} finds {'' if finds else 'no '}masks")
        masks = finds
    return read_objects(config, masks=masks)


def read_objects(config: ObjectsConfig, **reading: Any) -> tuple[CocoListing, CocoListing]:
    """The training and validation listings of a config.

    Args:
        config: the settings.
        reading: of `data.coco.read_coco`: `masks`, `keypoints`.

    Raises:
        UserError: they are missing or invalid.
    """
    if config.data is None:
        raise UserError("--data is missing: a COCO folder (annotations/*.json and images), or its train JSON")
    val_data = config.val_data or config.data
    if config.val_split and config.val_data:
        raise UserError("--val-split is for data without validation images: leave it or --val-data out")
    if not config.val_split and config.val_data is None and Path(config.data).is_file():
        stem = Path(config.data).name
        twin = Path(config.data).with_name(stem.replace("train", "val"))
        if (twin.name == stem or not twin.is_file()) and (says := hint(config.data, "coco")):
            raise UserError(f"{config.data}: {says}")
        if twin.name == stem or not twin.is_file():
            raise UserError(
                f"--val-data is missing: the JSON to validate on beside --data {config.data}, or --val-split .2"
            )
        val_data = str(twin)
    options: dict[str, Any] = {"images": config.images, "check_files": config.bad_images == "stop", **reading}
    if config.val_split:
        dividing = splitting.ValSplit(config.val_split, config.split_seed)
        listings = splitting.open_objects(config.data, dividing, drop_empty=config.drop_empty, **options)
        return _with_objects(listings[0]), listings[1]
    train = open_format("objects", config.data, "train", drop_empty=config.drop_empty, **options)
    _with_objects(train)
    options["masks"] = train.has_masks
    return train, open_format("objects", val_data, "val", train.categories, drop_empty=False, **options)


def late_drops(config: ObjectsConfig) -> list[str]:
    """A line that names the drops of the rate that the run does not reach, if there are any."""
    late = " and ".join(str(epoch) for epoch in config.lr_drops if epoch >= config.epochs)
    return [f"the run ends with epoch {config.epochs}, before the rate falls after {late} (--lr-drops)"] if late else []


def require_truth(listing: CocoListing) -> None:
    """Raise UserError if there is nothing to measure detections against."""
    if not any(listing.objects_of(i) for i in range(len(listing))):
        raise UserError(f"{listing.json}: no objects to validate on, so there is no AP; annotate some, or use predict")


def without_objects(listing: CocoListing) -> list[str]:
    """A line that names the classes without objects, if there are any."""
    present = {label for i in range(len(listing)) for label, _, _ in listing.objects_of(i)}
    names = [name for label, name in enumerate(listing.classes) if label not in present]
    what = f"{len(names)} of {len(listing.classes)} classes {'have' if len(names) > 1 else 'has'} no object"
    return [f"{listing.json.name}: {what}: {quoted(names)}"] if names else []


def _with_objects(train: CocoListing) -> CocoListing:
    if not any(train.objects_of(i) for i in range(len(train))):
        raise UserError(f"{train.json}: no objects to train on")
    return train


def coco_metric(listing: CocoListing) -> CocoMetric:
    """The metric for detections of a listing, against its own file."""
    return CocoMetric(ground_truth(listing), listing.classes, listing.own_ids, listing.has_masks)


def reading(metadata: Any, image_size: int | tuple[int, int] | None) -> int | tuple[int, int]:
    """The image size of `eval_transform`: as in training, unless given.

    Raises:
        UserError: the size is invalid.
    """
    size = metadata["image_size"] if image_size is None else image_size
    size = size if isinstance(size, int) else (int(size[0]), int(size[1]))
    if min(short_and_longest(size)) < 32:
        raise UserError(f"--image-size must be 32 pixels or more, got {image_size}")
    return size


def draw_batch(
    config: ObjectsConfig, splits: Splits, images: list[torch.Tensor], targets: list[dict[str, Any]], out: Path
) -> None:
    """See `Task.draw_batch`."""
    pixels = [(255 * image.permute(1, 2, 0)).round().byte().numpy() for image in images]
    edges = splits.metadata.get("skeleton", ())
    instances = [
        Instances(
            t["boxes"].numpy(),
            t["labels"].numpy() - 1,
            None,
            t["masks"].bool().numpy() if "masks" in t else None,
            sure_points(t["keypoints"].numpy(), 1) if "keypoints" in t else None,
            edges,
        )
        for t in targets
    ]
    draw_training_images(pixels, instances, splits.metadata["classes"], out)


def objects(splits: Splits, index: int) -> np.ndarray:
    """See `Task.objects`."""
    sample = CocoDataset(splits.val.listing, splits.val.transform)[index]  # with its objects
    return annotated_pixels(sample.target, tuple(sample.image.shape[-2:]))
