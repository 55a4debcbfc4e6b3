"""Training, evaluation and prediction from Python; the command line calls the same functions.

run = sgformer.train_classifier(data="photos", model="sgformer_t", epochs=50)
result = sgformer.evaluate(run.path, data="photos")
predictions = sgformer.predict(run.path, ["cat.jpg"])
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from sgformer.backends.optimize import optimize
from sgformer.core.device import find_device
from sgformer.core.errors import UserError, require
from sgformer.data.transforms import denormalize, eval_transform, preprocessing, train_transform
from sgformer.models.backbone import SGFormer
from sgformer.models.config import VARIANTS
from sgformer.models.load import build_model, load_weights
from sgformer.results import Prediction, find_images, open_image
from sgformer.training.config import ClassifyConfig, Config, dashed, make_config, read_yaml
from sgformer.training.run_folder import RunFolder, shown_log

if TYPE_CHECKING:
    from sgformer.tasks.classify.metrics import Evaluation
    from sgformer.training.fit import Job

# Settings of a run that may change when it is resumed.
RESUME_MAY_CHANGE = ("epochs", "max_steps", "workers", "device", "devices", "native", "run")


# -- training ---------------------------------------------------------------------------------------------------------


def train_classifier(
    config: ClassifyConfig | None = None, *, resume: str | os.PathLike[str] | None = None, **options: Any
) -> RunFolder:
    """Train a classifier on `data/train/CLASS/*`, validate on `data/val/CLASS/*`, and leave a run folder.

    `data` may also be a folder or address of tar shards, see `sgformer.data.shards`.

    Args:
        config: all settings; or give them as keywords, named as on the command line with underscores.
        resume: folder of a run to go on with, at the very step it had reached; its settings hold, and `options` may
            only change `epochs`, `max_steps`, `workers`, `device` and `devices`.
        options: fields of `ClassifyConfig`.

    Returns:
        The run's folder; `.path` holds config.yaml, metrics.csv, report.md, best.safetensors and so on.

    Raises:
        UserError: a setting, the data or the machine does not do; the message says which.
        Interrupted: SIGINT or SIGTERM came; the checkpoint is written.
    """
    return train(ClassifyConfig, "classify", prepare_classifier, config, resume, options)


def train(
    config_class: type[Config],
    name: str,
    prepare: Callable[..., Any],
    config: Config | None,
    resume: str | os.PathLike[str] | None,
    options: dict[str, Any],
) -> RunFolder:
    """A run of any task; `prepare` is what `training.fit.run_training` wants, the rest as of `train_classifier`."""
    for package in ("lightning", "torchmetrics", "matplotlib"):
        require(package, extra="train")
    from sgformer.training.fit import run_training
    from sgformer.training.trainer import quiet

    if resume is not None:
        config = resumed_config(config_class, resume, dataclasses.asdict(config) if config else options)
    elif config is None:
        config = make_config(config_class, options)
    elif options:
        config = dataclasses.replace(config, **options)
    with quiet(), shown_log():
        return run_training(config, name, prepare, resume)


def resumed_config(config_class: type[Config], run: str | os.PathLike[str], options: dict[str, Any]) -> Config:
    """A run's own settings with the options that may change.

    Raises:
        UserError: another option differs from the run's.
    """
    folder = RunFolder.open(run)
    stored = make_config(config_class, read_yaml(folder.path / "config.yaml", config_class))
    config = dataclasses.replace(make_config(config_class, {**stored.to_dict(), **options}), run=str(folder.path))
    for name in (field.name for field in dataclasses.fields(config)):
        if name not in RESUME_MAY_CHANGE and getattr(config, name) != getattr(stored, name):
            may = ", ".join(f"--{dashed(n)}" for n in RESUME_MAY_CHANGE if n != "run")
            was = f"--{dashed(name)} is {getattr(stored, name)} in {folder.path}"
            raise UserError(f"{was} and cannot change on resuming (only {may} can)")
    return config


def prepare_classifier(config: ClassifyConfig, batch: int, rank: int, world: int) -> Job:
    """What image classification brings to a run; see `training.fit.run_training`."""
    from sgformer.data.imagefolder import EpochSampler, ImageFolderDataset, collate
    from sgformer.data.shards import open_splits
    from sgformer.tasks.classify.metrics import Evaluation, report
    from sgformer.tasks.classify.module import ClassificationTask
    from sgformer.training.fit import Job
    from sgformer.viz.sheets import draw_batch

    if config.data is None:
        raise UserError("--data is missing: the folder with train/CLASS/* and val/CLASS/*, or one of shards")
    train, val = open_splits(config.data)
    sampler = EpochSampler(len(train), batch, train=True, seed=config.seed, rank=rank, world=world)
    steps = len(sampler) // config.accumulate
    task = ClassificationTask(_new_model(config, len(train.classes)), config, steps, train.classes)
    augmentation = {
        name: getattr(config, name)
        for name in ("auto_augment", "color_jitter", "interpolation", "crop_scale", "hflip", "reprob")
    }
    transforms = train_transform(config.image_hw, **augmentation), eval_transform(config.image_hw, config.crop_pct)
    datasets = [
        ImageFolderDataset(listing, transform, seed=config.seed, bad_images=config.bad_images)
        for listing, transform in zip((train, val), transforms, strict=True)
    ]

    def draw(images: list[torch.Tensor], targets: list[torch.Tensor], out: Path) -> None:
        pixels = denormalize(torch.stack(images)).permute(0, 2, 3, 1).numpy()
        draw_batch(pixels, torch.stack(targets).numpy(), train.classes, out, config.smoothing)

    def evaluation(skipped: Sequence[str]) -> Evaluation:
        top1, top5, loss = (float(task.trainer.callback_metrics[name]) for name in ("top1", "top5", "val_loss"))
        assert task.confusion is not None
        return Evaluation(top1, top5, loss, task.confusion, train.classes, tuple(skipped))

    return Job(
        task=task,
        train=datasets[0],
        val=datasets[1],
        train_sampler=sampler,
        val_sampler=EpochSampler(len(val), max(1, config.batch_size // world), train=False, rank=rank, world=world),
        total_steps=steps * (config.epochs + config.cooldown_epochs),
        steps_per_pass=steps,
        collate=collate,
        metadata={
            "task": "classify",
            "model": config.model,
            "classes": list(train.classes),
            "image_size": config.to_dict()["image_size"],
            "crop_pct": config.crop_pct,
        },
        about=f"{config.data}: {len(train)} training and {len(val)} validation images, {len(train.classes)} classes",
        size="x".join(map(str, config.image_hw)),
        draw=draw,
        evaluation=evaluation,
        read=Evaluation.read,
        report=report,
        scores=("top1", "top5"),
        pictures=[("Confusion", "validation/confusion.png")],
        objects=lambda index: _scene_objects(val, index, transforms[1]),
    )


def _scene_objects(listing: Any, index: int, transform: Any) -> np.ndarray | None:
    """Objects' pixels on a validation sample, where the data are composed scenes; else None."""
    if not hasattr(listing, "root") or not (listing.root / "scenes.json").is_file():
        return None
    from sgformer.data.scenes import scene_objects

    mask = scene_objects(listing.path(index))
    return (denormalize(transform(Image.fromarray(mask).convert("RGB")))[0] > 0.5).numpy()


def _new_model(config: ClassifyConfig, classes: int) -> nn.Module:
    """The network to train: fresh, or from `config.weights` with its head kept if the number of classes fits."""
    options: dict[str, Any] = {"drop_path_rate": config.drop_path}
    if config.model in VARIANTS:
        options |= {"coarse": config.coarse, "img_size": config.image_hw, **config.guidance}
    elif not config.drop_path:
        options = {}  # not every network of timm knows the word
    if config.weights is None:
        model = build_model(config.model, classes, **options)
    else:
        model, metadata = load_weights(config.weights, num_classes=classes, **options)
        architecture = (getattr(model, "pretrained_cfg", None) or {}).get("architecture", config.model)
        if metadata.get("model", architecture) != config.model:
            raise UserError(f"{config.weights} holds {metadata.get('model', architecture)}, not --model {config.model}")
    if config.grad_checkpointing:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    return model.train()


# -- evaluation -------------------------------------------------------------------------------------------------------


def evaluate(
    weights: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    split: str = "val",
    batch_size: int = 64,
    image_size: int | tuple[int, int] | None = None,
    crop_pct: float | None = None,
    workers: int = 4,
    device: str = "auto",
    devices: int | str = "auto",
    precision: str = "fp32",
    bad_images: str = "stop",
) -> Evaluation:
    """Top-1, top-5 and confusion of a trained classifier on `data/split/CLASS/*`; every image counts exactly once.

    Args:
        weights: a run folder, a weights file, or a released `.pth` (whose classes are taken to be the sorted folders).
        data: the data set's folder, or folder or address of its shards.
        batch_size: images per forward pass on each process.
        image_size, crop_pct: by default those of the training.
        bad_images: "stop" at an unreadable image, or "skip" and list them.

    Raises:
        UserError: weights or data do not do, or do not go together.
    """
    for package in ("lightning", "torchmetrics"):
        require(package, extra="train")
    from sgformer.data.imagefolder import EpochSampler, ImageFolderDataset, collate
    from sgformer.data.shards import open_split
    from sgformer.tasks.classify.metrics import Evaluation
    from sgformer.tasks.classify.module import ClassificationTask
    from sgformer.training.callbacks import SkippedImages
    from sgformer.training.fit import build_loader
    from sgformer.training.trainer import build_trainer, quiet
    from sgformer.training.worker_errors import worker_errors

    if batch_size < 1 or workers < 0:
        raise UserError(f"--batch-size must be above 0 and --workers 0 or more, got {batch_size} and {workers}")
    model, metadata = load_weights(weights)
    listing = open_split(data, split, metadata.get("classes"))
    if len(listing.classes) != model.num_classes:
        raise UserError(f"{weights} knows {model.num_classes} classes, {data}/{split} has {len(listing.classes)}")
    skipped = SkippedImages()
    with quiet(), shown_log():
        trainer = build_trainer(device=device, devices=devices, precision=precision, callbacks=[skipped])
        rank, world = trainer.global_rank, trainer.world_size
        dataset = ImageFolderDataset(
            listing, eval_transform(**_size(metadata, image_size, crop_pct)), bad_images=bad_images
        )
        sampler = EpochSampler(len(dataset), batch_size, train=False, rank=rank, world=world)
        loader = build_loader(dataset, sampler, workers, collate)
        task = ClassificationTask(model)
        with worker_errors():
            trainer.validate(task, loader, verbose=False)
    values = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert task.confusion is not None
    return Evaluation(
        values["top1"],
        values["top5"],
        values["val_loss"],
        task.confusion,
        listing.classes,
        tuple(sorted(skipped.lines)),
    )


def _size(metadata: dict[str, Any], image_size: Any, crop_pct: float | None) -> dict[str, Any]:
    given = {"image_size": image_size, "crop_pct": crop_pct}
    result = preprocessing({**metadata, **{name: value for name, value in given.items() if value is not None}})
    if min(result["image_size"]) < 32 or not 0 < result["crop_pct"] <= 1:
        raise UserError(f"--image-size must be 32 or more and --crop-pct in (0, 1], got {image_size} and {crop_pct}")
    return result


# -- prediction -------------------------------------------------------------------------------------------------------

#: From so many images on, preparing a network for the CPU takes less time than it saves.
WORTH_PREPARING = 64


def predict(
    weights: str | os.PathLike[str],
    images: str | os.PathLike[str] | Image.Image | Sequence[str | os.PathLike[str] | Image.Image],
    *,
    top: int = 5,
    batch_size: int = 32,
    image_size: int | tuple[int, int] | None = None,
    device: str = "auto",
) -> list[Prediction]:
    """The most probable classes of images. On a CPU many images are worth :func:`sgformer.optimize`, which is done.

    Args:
        weights: a run folder, a weights file, or a released `.pth`.
        images: one or several files, folders (searched for images, also nested) or PIL images.
        top: number of classes per image.

    Raises:
        UserError: weights or an image cannot be read.
    """
    if isinstance(images, (str, os.PathLike, Image.Image)):
        images = [images]
    sources = list(find_images(images))
    model, metadata = load_weights(weights)
    where = find_device(device)
    model.eval().to(where)
    if where.type == "cpu" and isinstance(model, SGFormer) and len(sources) >= WORTH_PREPARING:
        model = optimize(model)
    names = metadata.get("classes") or [str(i) for i in range(model.num_classes)]  # type: ignore[arg-type]
    transform = eval_transform(**_size(metadata, image_size, None))
    result = []
    for start in range(0, len(sources), batch_size):
        part = sources[start : start + batch_size]
        pixels = torch.stack([transform(open_image(source)) for source in part])
        with torch.inference_mode():
            shares = model(pixels.to(where)).float().softmax(-1).cpu()
        values, indices = shares.topk(min(top, shares.shape[1]))
        for i, source in enumerate(part):
            labels = tuple((names[k], v) for k, v in zip(indices[i].tolist(), values[i].tolist(), strict=True))
            result.append(Prediction(str(start + i) if isinstance(source, Image.Image) else str(source), labels))
    return result
