"""Classifying images with trained weights, and evaluating them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from PIL import Image

from sgformer.core.device import find_device
from sgformer.core.errors import UserError
from sgformer.data.identity import names_in
from sgformer.data.image import Images, height_and_width
from sgformer.data.preparing import eval_transform, preprocessing
from sgformer.models.backbone import SGFormer
from sgformer.models.load import Weights, build_network, check_classes
from sgformer.results import Prediction

#: Number of images from which preparing a network for the CPU saves time.
WORTH_PREPARING = 64


def network(weights: Weights) -> Any:
    """See `Task.network`."""
    model: Any = build_network(weights)
    check_classes(weights, model.num_classes)
    return model


def predict(
    weights: Weights,
    images: Images,
    *,
    top: int = 5,
    batch_size: int = 32,
    image_size: int | tuple[int, int] | None = None,
    precision: str = "fp32",
    device: str = "auto",
) -> Iterator[tuple[Prediction, Image.Image]]:
    """See `Task.predict`. On a CPU, many images run through :func:`sgformer.optimize`.

    Args:
        weights: of a classifier.
        images: the images.
        top: number of classes per image.
        batch_size: images per batch.
        image_size: pixels, or (height, width); by default as trained.
        precision: "fp32", or "bf16" or "int8" on a CPU, see :func:`sgformer.optimize`.
        device: "auto", "cpu", "cuda" ...

    Raises:
        UserError: an image cannot be read, or a value is invalid.
    """
    model = network(weights)
    where = find_device(device)
    model.to(where)
    refuse_size(weights, model, image_size)
    if precision != "fp32":
        model = narrowed(weights, model, precision)
    elif where.type == "cpu" and isinstance(model, SGFormer) and len(images) >= WORTH_PREPARING:
        from sgformer.backends import optimize

        model = optimize.optimize(model)
    if not model.num_classes:
        raise UserError(f"{weights.path}: holds no classifier, only a backbone")
    names = weights.metadata.get("classes") or [str(i) for i in range(model.num_classes)]
    transform = eval_transform(**reading(weights.metadata, image_size))
    for batch in images.batches(batch_size):
        with torch.inference_mode():
            pixels = torch.stack([transform(image) for _, image in batch])
            shares = model(pixels.to(where)).float().softmax(-1).cpu()
        values, indices = shares.topk(min(top, shares.shape[1]))
        for (name, image), best, share in zip(batch, indices.tolist(), values.tolist(), strict=True):
            labels = tuple((names[k], v) for k, v in zip(best, share, strict=True))
            yield Prediction(name, labels), image


def narrowed(weights: Weights, model: Any, precision: str) -> Any:
    """A network on its device, prepared for another precision than float32.

    Raises:
        UserError: the network, its device or the processor does not support it.
    """
    from sgformer.backends.optimize import optimize

    if not isinstance(model, SGFormer):
        raise UserError(f"--precision {precision} is for SG-Former; {weights.path} is of {weights.model}")
    if (device := next(model.parameters()).device.type) != "cpu":
        raise UserError(f"--precision {precision} is for the CPU (got --device {device})")
    return optimize(model, precision=precision)


def evaluate(
    weights: Weights,
    data: str | os.PathLike[str],
    *,
    split: str = "val",
    batch_size: int = 64,
    image_size: int | tuple[int, int] | None = None,
    crop_pct: float | None = None,
    bad_images: str = "stop",
    out: Any = None,
    precision: str = "fp32",
    **machine: Any,
) -> Any:
    """Top-1, top-5 and confusion on `data/split/CLASS/*`; every image counts exactly once.

    Args:
        weights: of a classifier; those of released ones are assumed to be the sorted folders.
        data: the data set's folder, or folder or URL of its shards.
        split: e.g. "val".
        batch_size: images per forward pass on each process.
        image_size, crop_pct: by default those of the training.
        bad_images: "stop" at an unreadable image, or "skip" and list them.
        out: unused; a classifier draws no example images.
        precision: "fp32"; mixed "bf16" or "fp16"; or "int8" on a CPU, see :func:`sgformer.optimize`.
        machine: `workers`, `device`, `devices`, see `training.validate.validate`.

    Raises:
        UserError: weights or data are invalid, or do not match.
    """
    from sgformer.data import splitting
    from sgformer.data.imagefolder import ImageFolderDataset, absent, collate, left_out
    from sgformer.tasks.classify.module import ClassificationModule
    from sgformer.training.validate import validate

    model = network(weights)
    names = weights.metadata.get("classes")
    if (kept := splitting.kept_by(weights.path, weights.metadata, data, split, "imagenet")) is not None:
        listing: Any = splitting.side(splitting.open_classes(data, kept, names), split)
    else:
        split = splitting.named_split(data, split, "imagenet")
        listing = open_named(data, split, weights.metadata)
    if len(listing.classes) != model.num_classes:
        raise UserError(f"{weights.path} has {model.num_classes} classes, {data}/{split} has {len(listing.classes)}")
    refuse_size(weights, model, image_size)
    transform = eval_transform(**reading(weights.metadata, image_size, crop_pct))
    dataset = ImageFolderDataset(listing, transform, bad_images=bad_images)
    if precision == "int8":
        model = narrowed(weights, model.to(find_device(machine.get("device", "auto"))), precision)
        precision = "fp32"
    module = ClassificationModule(model, class_names=listing.classes)
    notes = [*left_out(listing), *absent(listing)]
    if "classes" not in weights.metadata:
        notes.append(f"{weights.path} names no classes: class i is the i-th folder in sorted order")
    return validate(module, dataset, collate, batch_size=batch_size, precision=precision, notes=notes, **machine)[0]


def open_named(data: Any, split: str, metadata: Mapping[str, Any]) -> Any:
    """A split whose folders have the names of the classes or, as ImageNet's, their WordNet IDs if those are known."""
    from sgformer.data.formats import open_data

    known: list[Any] = list(zip(*names_in(metadata), strict=True))
    names, *others = known or [None]
    try:
        return open_data("classes", data, split, names)
    except UserError:
        for ids in others:
            with suppress(UserError):
                return open_data("classes", data, split, ids)
        raise


def refuse_size(weights: Weights, model: Any, image_size: Any) -> None:
    """Raise UserError if another image size is given to a network of timm's that takes one only."""
    own = height_and_width(weights.metadata.get("image_size", 224))
    fixed = not isinstance(model, SGFormer) and (getattr(model, "pretrained_cfg", None) or {}).get("fixed_input_size")
    if fixed and image_size is not None and height_and_width(image_size) != own:
        raise UserError(f"{weights.path}: {weights.model} takes {own[0]} x {own[1]} pixels only, without --image-size")


def reading(metadata: Mapping[str, Any], image_size: Any = None, crop_pct: float | None = None) -> dict[str, Any]:
    """Arguments of `eval_transform`: as in training, unless given.

    Raises:
        UserError: the size or the crop is invalid.
    """
    given = {"image_size": image_size, "crop_pct": crop_pct}
    result = preprocessing({**metadata, **{name: value for name, value in given.items() if value is not None}})
    if min(result["image_size"]) < 32 or not 0 < result["crop_pct"] <= 1:
        raise UserError(f"--image-size must be 32 or more and --crop-pct in (0, 1], got {image_size} and {crop_pct}")
    return result
