"""Semantic segmentation from Python: training, evaluation, prediction; the command line calls the same functions."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from sgformer.core.device import find_device
from sgformer.core.errors import UserError, require
from sgformer.data.dense_transforms import eval_transform, train_transform
from sgformer.data.transforms import denormalize
from sgformer.results import Segments, find_images, open_image
from sgformer.tasks.classify.api import train

if TYPE_CHECKING:
    from sgformer.data.ade20k import LabelledFolderDataset
    from sgformer.tasks.segment.config import SegmentConfig
    from sgformer.tasks.segment.metrics import SegmentationEvaluation
    from sgformer.tasks.segment.module import Inference
    from sgformer.training.fit import Job
    from sgformer.training.run_folder import RunFolder


def train_segmenter(
    config: SegmentConfig | None = None, *, resume: str | os.PathLike[str] | None = None, **options: Any
) -> RunFolder:
    """Train on `data/images/training`, validate on `data/images/validation`, and leave a run folder.

    Args:
        config: all settings; or give them as keywords, named as on the command line with underscores.
        resume: folder of a run to go on with, at the very step it had reached; its settings hold.
        options: fields of `SegmentConfig`.

    Returns:
        The run's folder; `.path` holds config.yaml, metrics.csv, report.md, best.safetensors and so on.

    Raises:
        UserError: a setting, the data or the machine does not do; the message says which.
        Interrupted: SIGINT or SIGTERM came; the checkpoint is written.
    """
    from sgformer.tasks.segment.config import SegmentConfig

    return train(SegmentConfig, "segment", prepare_segmenter, config, resume, options)


def prepare_segmenter(config: SegmentConfig, batch: int, rank: int, world: int) -> Job:
    """What semantic segmentation brings to a run; see `training.fit.run_training`."""
    from sgformer.data.ade20k import LabelledFolderDataset, StepSampler, collate, collate_sizes, scan
    from sgformer.data.imagefolder import EpochSampler
    from sgformer.data.objects import object_pixels
    from sgformer.tasks.segment.metrics import SegmentationEvaluation, report
    from sgformer.tasks.segment.module import SegmentationTask, Segmenter, new_segmenter
    from sgformer.training.fit import Job
    from sgformer.viz.segmentation import draw_training_batch

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
    )
    task = SegmentationTask(new_segmenter(config, len(train.classes)), config, total, train.classes, train.ignore)
    val_set = LabelledFolderDataset(val, eval_transform(), bad_images=config.bad_images)
    rounds = min(config.val_every, total) * config.accumulate
    best: dict[int, float] = {}  # pixel accuracy by image, of the best weights

    def draw(images: list[torch.Tensor], targets: list[torch.Tensor], out: Path) -> None:
        pixels = denormalize(torch.stack(images)).permute(0, 2, 3, 1).numpy()
        draw_training_batch(pixels, torch.stack(targets).numpy(), train.classes, out)

    def evaluation(skipped: Sequence[str]) -> SegmentationEvaluation:
        assert task.result is not None
        best.clear()
        best.update(task.by_image)
        return dataclasses.replace(task.result, skipped=tuple(skipped))

    def finish(folder: Path) -> None:
        if best:
            model, _ = Segmenter.load(folder.parent)
            draw_examples(model, val_set, best, task.inference, folder / "examples.png")

    return Job(
        task=task,
        train=LabelledFolderDataset(train, augmentation, seed=config.seed, bad_images=config.bad_images),
        val=val_set,
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
        },
        about=f"{config.data}: {len(train)} training and {len(val)} validation images, {len(train.classes)} classes",
        size="x".join(map(str, config.image_hw)),
        draw=draw,
        evaluation=evaluation,
        read=SegmentationEvaluation.read,
        report=report,
        scores=("miou", "macc", "pixel_accuracy"),
        pictures=[
            ("Worst and best images", "validation/examples.png"),
            ("Confusion", "validation/confusion.png"),
        ],
        finish=finish,
        unit="step",
        objects=lambda index: object_pixels(val_set[index].target.numpy(), val.classes, val.ignore),  # type: ignore[union-attr]
    )


def inference(
    metadata: Mapping[str, Any],
    *,
    image_size: int | tuple[int, int] | None = None,
    multi_scale: bool = False,
    flip: bool = False,
    sliding: bool = False,
) -> Inference:
    """How weights look at images: as they were validated, unless told otherwise.

    Args:
        metadata: of the weights.
        image_size: short side of whole images; with `sliding`, the window's (height, width) instead.
        multi_scale: average over six scales, .5 to 1.75.
        flip: average over the mirror image.
        sliding: move a window of the training crop's size over the image.

    Raises:
        UserError: `image_size` does not do.
    """
    from sgformer.tasks.segment.module import MULTI_SCALE, Inference

    short, window = int(metadata["short_side"]), metadata["image_size"]
    if image_size is not None and sliding:
        window = image_size
    elif isinstance(image_size, int):
        short = image_size
    elif image_size is not None:
        raise UserError(f"--image-size is one number, the short side, for whole images; got {image_size}")
    size = (window, window) if isinstance(window, int) else (window[0], window[1])
    if min(short, *size) < 32:
        raise UserError(f"--image-size must be 32 pixels or more, got {image_size}")
    return Inference(short, size if sliding else None, MULTI_SCALE if multi_scale else (1.0,), flip)


def evaluate_segmentation(
    weights: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    split: str = "validation",
    image_size: int | tuple[int, int] | None = None,
    multi_scale: bool = False,
    flip: bool = False,
    sliding: bool = False,
    batch_size: int = 8,
    workers: int = 4,
    device: str = "auto",
    devices: int | str = "auto",
    precision: str = "fp32",
    bad_images: str = "stop",
    examples: str | os.PathLike[str] | None = None,
) -> SegmentationEvaluation:
    """mIoU, mean class accuracy and pixel accuracy on `data/images/split`, every labelled pixel counted once.

    Args:
        weights: a run folder or weights file.
        data: the data set's folder; its labels mean what they meant in training.
        image_size, multi_scale, flip, sliding: see `inference`.
        batch_size: images read at a time on each process; those of one size go through the network together.
        bad_images: "stop" at an unreadable file, or "skip" and list them.
        examples: a PNG to write with the images that went worst and best.

    Raises:
        UserError: weights or data do not do, or do not go together.
    """
    for package in ("lightning", "torchmetrics"):
        require(package, extra="train")
    from sgformer.data.ade20k import LabelledFolderDataset, collate_sizes, scan
    from sgformer.data.imagefolder import EpochSampler
    from sgformer.tasks.segment.module import SegmentationTask, Segmenter
    from sgformer.training.callbacks import SkippedImages
    from sgformer.training.fit import build_loader
    from sgformer.training.trainer import build_trainer, quiet
    from sgformer.training.worker_errors import worker_errors

    if batch_size < 1 or workers < 0:
        raise UserError(f"--batch-size must be above 0 and --workers 0 or more, got {batch_size} and {workers}")
    model, metadata = Segmenter.load(weights)
    how = inference(metadata, image_size=image_size, multi_scale=multi_scale, flip=flip, sliding=sliding)
    listing = scan(data, split, metadata["classes"], metadata["reduce_zero_label"])
    skipped = SkippedImages()
    with quiet():
        trainer = build_trainer(device=device, devices=devices, precision=precision, callbacks=[skipped])
        rank, world = trainer.global_rank, trainer.world_size
        dataset = LabelledFolderDataset(listing, eval_transform(), bad_images=bad_images)
        sampler = EpochSampler(len(dataset), batch_size, train=False, rank=rank, world=world)
        loader = build_loader(dataset, sampler, workers, collate_sizes)
        task = SegmentationTask(model, class_names=listing.classes, ignore=listing.ignore, inference=how)
        with worker_errors():
            trainer.validate(task, loader, verbose=False)
    assert task.result is not None
    if examples is not None and rank == 0:
        draw_examples(model.to(find_device(device)), dataset, task.by_image, how, examples)
    return dataclasses.replace(task.result, skipped=tuple(sorted(skipped.lines)))


def draw_examples(
    model: torch.nn.Module,
    dataset: LabelledFolderDataset,
    by_image: Mapping[int, float],
    how: Inference,
    out: str | os.PathLike[str],
    each: int = 4,
) -> None:
    """A sheet of the images with the lowest and the highest pixel accuracy: image, labels, prediction."""
    from sgformer.tasks.segment.module import class_probabilities
    from sgformer.viz.segmentation import draw_comparison

    order = sorted(by_image, key=lambda i: by_image[i])
    chosen = order if len(order) <= 2 * each else order[:each] + order[-each:]
    samples = [dataset[i] for i in chosen]
    images = [s.image for s in samples if s.image is not None]
    where = next(model.parameters()).device
    draw_comparison(
        [denormalize(image).permute(1, 2, 0).numpy() for image in images],
        [s.target.numpy() for s in samples if s.target is not None],
        [class_probabilities(model, image[None].to(where), how)[0].argmax(0).cpu().numpy() for image in images],
        dataset.listing.classes,
        Path(out),
        [f"{100 * by_image[i]:.0f} % right" for i in chosen],
    )


def predict_segmentation(
    weights: str | os.PathLike[str],
    images: str | os.PathLike[str] | Image.Image | Sequence[str | os.PathLike[str] | Image.Image],
    *,
    image_size: int | tuple[int, int] | None = None,
    multi_scale: bool = False,
    flip: bool = False,
    sliding: bool = False,
    device: str = "auto",
) -> Iterator[Segments]:
    """The class of every pixel of images, one image at a time.

    Args:
        weights: a run folder or weights file.
        images: one or several files, folders (searched for images, also nested) or PIL images.
        image_size, multi_scale, flip, sliding: see `inference`.

    Raises:
        UserError: weights or an image cannot be read.
    """
    from sgformer.tasks.segment.module import Segmenter, class_probabilities

    if isinstance(images, (str, os.PathLike, Image.Image)):
        images = [images]
    sources = list(find_images(images))
    where = find_device(device)
    model, metadata = Segmenter.load(weights)
    how = inference(metadata, image_size=image_size, multi_scale=multi_scale, flip=flip, sliding=sliding)
    model.to(where)
    transform = eval_transform()
    for i, source in enumerate(sources):
        image = open_image(source)
        pixels, _ = transform(image, np.zeros((image.height, image.width), np.int64))
        labels = class_probabilities(model, pixels[None].to(where), how)[0].argmax(0).cpu().numpy()
        name = str(i) if isinstance(source, Image.Image) else str(source)
        yield Segments(name, labels, tuple(metadata["classes"]), int(metadata["reduce_zero_label"]))
