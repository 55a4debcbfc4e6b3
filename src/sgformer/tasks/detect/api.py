"""Detection from Python: training, evaluation, prediction; the command line calls the same functions."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from sgformer.core.device import find_device
from sgformer.core.errors import UserError, require
from sgformer.data.detection_transforms import eval_transform, train_transform
from sgformer.data.image import short_and_longest
from sgformer.results import SHOWN, Detections, find_images, named, open_image, stack_masks
from sgformer.tasks.classify.api import train
from sgformer.tasks.detect.config import DetectConfig
from sgformer.training.run_folder import RunFolder, shown_log

if TYPE_CHECKING:
    from sgformer.data.coco import CocoListing
    from sgformer.tasks.detect.metrics import DetectionEvaluation
    from sgformer.training.fit import Job

# -- training ---------------------------------------------------------------------------------------------------------


def train_detector(
    config: DetectConfig | None = None, *, resume: str | os.PathLike[str] | None = None, **options: Any
) -> RunFolder:
    """Train Mask R-CNN, or Faster R-CNN where the data has no masks, on COCO annotations, and leave a run folder.

    Args:
        config: all settings; or give them as keywords, named as on the command line with underscores.
        resume: folder of a run to go on with; see `sgformer.train_classifier`.
        options: fields of `DetectConfig`.

    Raises:
        UserError: a setting, the data or the machine does not do; the message says which.
        Interrupted: SIGINT or SIGTERM came; the checkpoint is written.
    """
    return train(DetectConfig, "detect", prepare_detector, config, resume, options)


def prepare_detector(config: DetectConfig, batch: int, rank: int, world: int) -> Job:
    """What detection brings to a run; see `training.fit.run_training`."""
    require("pycocotools", extra="detect")
    from sgformer.data.coco import CocoDataset, collate
    from sgformer.data.imagefolder import EpochSampler
    from sgformer.data.objects import annotated_pixels
    from sgformer.tasks.detect.metrics import DetectionEvaluation, report
    from sgformer.tasks.detect.module import DetectionTask, new_detector
    from sgformer.training.fit import Job
    from sgformer.viz.detection import Objects, draw_training_images

    listings = read_splits(config)
    learn, val = listings
    sampler = EpochSampler(len(learn), batch, train=True, seed=config.seed, rank=rank, world=world)
    steps = len(sampler) // config.accumulate
    model = new_detector(config, len(learn.classes), learn.has_masks)
    if config.grad_checkpointing:
        model.backbone.network.set_grad_checkpointing(True)  # type: ignore[operator]
    task = DetectionTask(
        model,
        config,
        steps_per_epoch=steps,
        total_steps=steps * config.epochs,
        metric=coco_metric(val),
        image_ids=[image.id for image in val.images],
        category_ids=val.own_ids,
    )
    transforms = train_transform(config.image_size, config.multi_scale, config.hflip), eval_transform(config.image_size)
    train_data, val_data = (
        CocoDataset(listing, transform, seed=config.seed, bad_images=config.bad_images, objects=listing is learn)
        for listing, transform in zip(listings, transforms, strict=True)
    )

    def draw(images: list[torch.Tensor], targets: list[dict[str, Any]], out: Path) -> None:
        pixels = [(255 * image.permute(1, 2, 0)).round().byte().numpy() for image in images]
        things = [
            Objects(
                t["boxes"].numpy(), t["labels"].numpy() - 1, None, t["masks"].bool().numpy() if "masks" in t else None
            )
            for t in targets
        ]
        draw_training_images(pixels, things, learn.classes, out)

    def evaluation(skipped: Sequence[str]) -> DetectionEvaluation:
        assert task.result is not None
        return task.result.but(skipped)

    def objects(index: int) -> np.ndarray:
        sample = CocoDataset(val, transforms[1])[index]
        return annotated_pixels(sample.target, tuple(sample.image.shape[-2:]))

    short, longest = short_and_longest(config.image_size)
    return Job(
        task=task,
        train=train_data,
        val=val_data,
        train_sampler=sampler,
        val_sampler=EpochSampler(len(val), max(1, config.batch_size // world), train=False, rank=rank, world=world),
        total_steps=steps * config.epochs,
        steps_per_pass=steps,
        collate=collate,
        metadata={
            "task": "detect",
            "model": config.model,
            "classes": list(learn.classes),
            "category_ids": list(learn.own_ids),
            "image_size": config.to_dict()["image_size"],
        },
        about=f"{config.data}: {len(learn.classes)} classes; " + "; ".join(listing.describe() for listing in listings),
        size=f"{short}x{longest}",
        draw=draw,
        evaluation=evaluation,
        read=DetectionEvaluation.read,
        report=report,
        scores=("mask_ap", "box_ap") if model.masks else ("box_ap", "box_ap50"),
        pictures=[
            ("Precision and recall", "validation/precision_recall.png"),
            ("Best and worst images", "validation/examples.png"),
        ],
        finish=lambda folder: draw_examples(folder, val),
        objects=objects,
    )


def read_splits(config: DetectConfig) -> tuple[CocoListing, CocoListing]:
    """The training and the validation images that a config names.

    Raises:
        UserError: they are not there, or not as they should be.
    """
    from sgformer.data.coco import find_coco, read_coco

    if config.data is None:
        raise UserError("--data is missing: a COCO folder (annotations/*.json and images), or its train JSON")
    val_data = config.val_data or config.data
    if config.val_data is None and Path(config.data).is_file():
        stem = Path(config.data).name
        twin = Path(config.data).with_name(stem.replace("train", "val"))
        if twin.name == stem or not twin.is_file():
            raise UserError(f"--val-data is missing: the JSON to validate on beside --data {config.data}")
        val_data = str(twin)
    check = config.bad_images == "stop"
    learn = read_coco(
        *find_coco(config.data, "train", config.images),
        masks=config.masks,
        drop_empty=config.drop_empty,
        check_files=check,
    )
    if not any(learn.objects_of(i) for i in range(len(learn))):
        raise UserError(f"{learn.json}: no object to learn from in it")
    val = read_coco(
        *find_coco(val_data, "val", config.images),
        categories=learn.categories,
        masks=learn.has_masks,
        check_files=check,
    )
    return learn, val


def coco_metric(listing: CocoListing) -> Any:
    """What evaluates detections against a listing's own file."""
    from sgformer.data.coco import ground_truth
    from sgformer.tasks.detect.metrics import CocoMetric

    return CocoMetric(ground_truth(listing), listing.classes, listing.own_ids, listing.has_masks)


# -- evaluation -------------------------------------------------------------------------------------------------------


def evaluate_detector(
    weights: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    split: str = "val",
    images: str | os.PathLike[str] | None = None,
    image_size: int | tuple[int, int] | None = None,
    batch_size: int = 8,
    workers: int = 4,
    device: str = "auto",
    devices: int | str = "auto",
    precision: str = "fp32",
    bad_images: str = "stop",
    out: str | os.PathLike[str] | None = None,
) -> DetectionEvaluation:
    """The twelve COCO numbers for boxes and, if weights and data have masks, for masks.

    Args:
        weights: a run folder or weights file.
        data: a COCO folder or JSON file.
        split: part of the folder.
        images: the image folder, where it is not beside the JSON.
        image_size: short side, or (short, longest); by default as trained.
        batch_size: images per forward pass on each process.
        bad_images: "stop" at an unreadable image, or "skip" and list them; those skipped do not count.
        out: a folder to write tables, results and pictures to (the first process does).

    Raises:
        UserError: weights or data do not do, or do not go together.
    """
    for package, extra in (("lightning", "train"), ("pycocotools", "detect")):
        require(package, extra=extra)
    from sgformer.data.coco import Category, CocoDataset, collate, find_coco, read_coco
    from sgformer.data.imagefolder import EpochSampler
    from sgformer.tasks.detect.module import DetectionTask, Detector
    from sgformer.training.callbacks import SkippedImages
    from sgformer.training.fit import build_loader
    from sgformer.training.trainer import build_trainer, quiet
    from sgformer.training.worker_errors import worker_errors

    if batch_size < 1 or workers < 0:
        raise UserError(f"--batch-size must be above 0 and --workers 0 or more, got {batch_size} and {workers}")
    model, metadata = Detector.load(weights)
    categories = [Category(i, name) for i, name in zip(metadata["category_ids"], metadata["classes"], strict=True)]
    found = find_coco(data, split, images)
    listing = read_coco(
        *found, categories=categories, masks=None if model.masks else False, check_files=bad_images == "stop"
    )
    skipped = SkippedImages()
    with quiet(), shown_log():
        trainer = build_trainer(device=device, devices=devices, precision=precision, callbacks=[skipped])
        dataset = CocoDataset(
            listing, eval_transform(_size(metadata, image_size)), bad_images=bad_images, objects=False
        )
        sampler = EpochSampler(
            len(dataset), batch_size, train=False, rank=trainer.global_rank, world=trainer.world_size
        )
        task = DetectionTask(
            model,
            metric=coco_metric(listing),
            image_ids=[image.id for image in listing.images],
            category_ids=listing.own_ids,
        )
        with worker_errors():
            trainer.validate(task, build_loader(dataset, sampler, workers, collate), verbose=False)
    assert task.result is not None
    result = task.result.but(sorted(skipped.lines))
    if out is not None and trainer.is_global_zero:
        result.write(out)
        draw_examples(Path(out), listing)
    return result


def _size(metadata: dict[str, Any], image_size: int | tuple[int, int] | None) -> int | tuple[int, int]:
    size = metadata["image_size"] if image_size is None else image_size
    size = size if isinstance(size, int) else (int(size[0]), int(size[1]))
    if min(short_and_longest(size)) < 32:
        raise UserError(f"--image-size must be 32 pixels or more, got {image_size}")
    return size


def draw_examples(folder: Path, listing: CocoListing, each: int = 6) -> None:
    """`examples.png`: best and worst images by F1 at IoU .5, from the results that an evaluation left in a folder."""
    import json

    from sgformer.data.coco import CocoDataset, decode_mask
    from sgformer.tasks.detect.metrics import read_image_scores
    from sgformer.viz.detection import Example, Objects, draw_examples

    scores = read_image_scores(folder)
    place = {str(image.id): i for i, image in enumerate(listing.images)}
    told = [(score, key) for key, score in scores.items() if not math.isnan(score) and key in place]
    order = [key for _, key in sorted(told, key=lambda entry: (-entry[0], place[entry[1]]))]
    best, worst = order[: min(each, (len(order) + 1) // 2)], order[::-1][: min(each, len(order) // 2)]
    kind = "mask" if listing.has_masks and (folder / "results_mask.json").is_file() else "box"
    boxes = json.loads((folder / "results_box.json").read_text(encoding="utf-8"))
    masks = (
        json.loads((folder / "results_mask.json").read_text(encoding="utf-8"))
        if kind == "mask"
        else [None] * len(boxes)
    )
    index = {key: i for i, key in enumerate(listing.own_ids)}
    dataset = CocoDataset(listing)

    def example(key: Any) -> Example:
        i = place[key]
        sample, about = dataset[i], listing.images[i]
        mine = [(b, m) for b, m in zip(boxes, masks, strict=True) if str(b["image_id"]) == key and b["score"] >= SHOWN]
        mine.sort(key=lambda pair: -pair[0]["score"])
        corners = np.array([b["bbox"] for b, _ in mine], dtype=float).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        found = Objects(
            corners,
            np.array([index[b["category_id"]] for b, _ in mine], dtype=np.int64),
            np.array([b["score"] for b, _ in mine]),
            stack_masks([decode_mask(m["segmentation"], about.height, about.width) for _, m in mine])
            if kind == "mask"
            else None,
        )
        target = sample.target
        known = target["masks"].numpy().astype(bool) if "masks" in target else None
        truth = Objects(target["boxes"].numpy(), target["labels"].numpy() - 1, None, known)
        return Example(np.asarray(sample.image), truth, found, f"detected: F1 {100 * scores[key]:.0f} %")

    draw_examples([example(k) for k in best], [example(k) for k in worst], listing.classes, folder / "examples.png")


# -- prediction -------------------------------------------------------------------------------------------------------


def predict_detections(
    weights: str | os.PathLike[str],
    images: str | os.PathLike[str] | Image.Image | Sequence[str | os.PathLike[str] | Image.Image],
    *,
    score: float = SHOWN,
    image_size: int | tuple[int, int] | None = None,
    device: str = "auto",
) -> Iterator[Detections]:
    """Boxes, classes, scores and, if the weights have them, masks of images, one image at a time.

    Args:
        weights: a run folder or weights file.
        images: one or several files, folders (searched for images, also nested) or PIL images.
        score: detections of less confidence are left out; from .05 up.
        image_size: short side, or (short, longest); by default as trained.

    Raises:
        UserError: weights or an image cannot be read.
    """
    require("pycocotools", extra="detect")
    from sgformer.tasks.detect.module import Detector, coco_results

    if not 0 <= score <= 1:
        raise UserError(f"--score must be in [0, 1], got {score}")
    if isinstance(images, (str, os.PathLike, Image.Image)):
        images = [images]
    sources = list(find_images(images))
    where = find_device(device)
    model, metadata = Detector.load(weights)
    model.to(where)
    names = metadata["classes"]
    transform = eval_transform(_size(metadata, image_size))
    for number, source in enumerate(sources):
        image = open_image(source)
        size = (image.height, image.width)
        with torch.inference_mode():
            (found,) = model([transform(image).to(where)], sizes=[size])
        keep = found["scores"] >= score
        found = {name: value[keep] for name, value in found.items()}
        name = str(number) if isinstance(source, Image.Image) else str(source)
        results = coco_results(found, name, range(len(names)), size)
        yield Detections(name, named(results, metadata["category_ids"], names), size)
