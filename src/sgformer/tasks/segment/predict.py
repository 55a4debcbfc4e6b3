"""Labelling every pixel with trained weights, and evaluating them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from sgformer.core.device import find_device
from sgformer.core.errors import UserError
from sgformer.core.files import make_folder
from sgformer.data.image import Images, height_and_width
from sgformer.data.preparing import IMAGENET, Normalization
from sgformer.models.load import Weights, read_weights
from sgformer.results import Segments
from sgformer.tasks.segment.network import MULTI_SCALE, InferenceSettings, Segmenter, predicted_labels
from sgformer.training.task import Splits

network = Segmenter.from_weights

#: The longest side of an image in `examples.png`, in pixels.
SIDE = 768


def predict(
    weights: Weights,
    images: Images,
    *,
    image_size: int | tuple[int, int] | None = None,
    multi_scale: bool = False,
    flip: bool = False,
    sliding: bool = False,
    device: str = "auto",
) -> Iterator[tuple[Segments, Image.Image]]:
    """See `Task.predict`: the class of every pixel.

    Args:
        weights: of a segmentation.
        images: the images.
        image_size, multi_scale, flip, sliding: see `inference_settings`.
        device: "auto", "cpu", "cuda" ...

    Raises:
        UserError: an image cannot be read, or a value is invalid.
    """
    metadata = weights.metadata
    how = inference_settings(metadata, image_size=image_size, multi_scale=multi_scale, flip=flip, sliding=sliding)
    where = find_device(device)
    model = Segmenter.from_weights(weights).to(where)
    normalize = Normalization.of(metadata)
    for name, image in images:
        labels = predicted_labels(model, normalize(image)[None].to(where), how)[0].cpu().numpy()
        first = int(metadata["reduce_zero_label"])
        yield Segments(name, labels, tuple(metadata["classes"]), first), image


def evaluate(
    weights: Weights,
    data: str | os.PathLike[str],
    *,
    split: str = "validation",
    image_size: int | tuple[int, int] | None = None,
    multi_scale: bool = False,
    flip: bool = False,
    sliding: bool = False,
    batch_size: int = 8,
    bad_images: str = "stop",
    out: str | os.PathLike[str] | None = None,
    device: str = "auto",
    **machine: Any,
) -> Any:
    """mIoU, mean class accuracy and pixel accuracy on `data/images/split`, every labelled pixel counted once.

    Args:
        weights: of a segmentation.
        data: the data set's folder; with the labels of the training.
        split: e.g. "validation".
        image_size, multi_scale, flip, sliding: see `inference_settings`.
        batch_size: images per batch in each process; those of one size run through the network together.
        bad_images: "stop" at an unreadable file, or "skip" and list them.
        out: a folder for `examples.png`, the worst and best images.
        device: "auto", "cpu", "cuda" ...
        machine: `workers`, `devices`, `precision`, see `training.validate.validate`.

    Raises:
        UserError: weights or data are invalid, or do not match.
    """
    from sgformer.data import splitting
    from sgformer.data.ade20k import LabelledFolderDataset, collate_sizes, scan
    from sgformer.data.dense_transforms import as_tensors
    from sgformer.data.imagefolder import left_out
    from sgformer.data.label_values import check_values
    from sgformer.tasks.segment.module import SegmentationModule
    from sgformer.training.validate import validate

    metadata = weights.metadata
    how = inference_settings(metadata, image_size=image_size, multi_scale=multi_scale, flip=flip, sliding=sliding)
    settings = metadata["classes"], metadata["reduce_zero_label"]
    if (kept := splitting.kept_by(weights.path, metadata, data, split, "ade20k")) is not None:
        listing = splitting.side(splitting.open_label_maps(data, kept, *settings), split)
    else:
        split = splitting.named_split(data, split, "ade20k")
        listing = scan(data, split, *settings)
    listing, notes = check_values(listing, bool(metadata.get("binary")))
    notes = [*left_out(listing), *notes]
    normalization = Normalization.of(metadata)
    dataset = LabelledFolderDataset(listing, as_tensors, bad_images=bad_images)
    model = Segmenter.from_weights(weights)
    module = SegmentationModule(
        model, class_names=listing.classes, ignore=listing.ignore, inference=how, normalization=normalization
    )
    result, first = validate(
        module,
        dataset,
        collate_sizes,
        batch_size=batch_size,
        device=device,
        notes=notes,
        **machine,
    )
    if out is not None and first:
        examples = make_folder(out) / "examples.png"
        draw_examples(model.to(find_device(device)), dataset, module.by_image, how, examples, normalization)
    return result


def inference_settings(
    metadata: Mapping[str, Any],
    *,
    image_size: int | tuple[int, int] | None = None,
    multi_scale: bool = False,
    flip: bool = False,
    sliding: bool = False,
) -> InferenceSettings:
    """The inference settings of weights: as in validation, unless given.

    Args:
        metadata: of the weights.
        image_size: short side of whole images; with `sliding`, the window's (height, width) instead.
        multi_scale: average over six scales, .5 to 1.75.
        flip: average with the mirrored image.
        sliding: slide a window of the training crop's size over the image.

    Raises:
        UserError: `image_size` is invalid.
    """
    short, window = int(metadata["short_side"]), metadata["image_size"]
    if image_size is not None and sliding:
        window = image_size
    elif isinstance(image_size, int):
        short = image_size
    elif image_size is not None:
        raise UserError(f"--image-size is one number, the short side, for whole images; got {image_size}")
    size = height_and_width(window)
    if min(short, *size) < 32:
        raise UserError(f"--image-size must be 32 pixels or more, got {image_size}")
    return InferenceSettings(short, size if sliding else None, MULTI_SCALE if multi_scale else (1.0,), flip)


def draw_examples(
    model: torch.nn.Module,
    dataset: Any,
    by_image: Mapping[int, float],
    how: InferenceSettings,
    out: str | os.PathLike[str],
    normalization: Normalization = IMAGENET,
    each: int = 4,
) -> None:
    """A sheet of the images with the lowest and the highest pixel accuracy: image, labels, prediction."""
    from sgformer.data.dense_transforms import normalized
    from sgformer.viz.segmentation import draw_comparison

    order = sorted(by_image, key=lambda i: by_image[i])
    chosen = order if len(order) <= 2 * each else order[:each] + order[-each:]
    where = next(model.parameters()).device
    drawn: list[tuple[Any, ...]] = []
    for i in chosen:  # one at a time, and kept small: eight photographs would fill the memory
        image, truth = dataset[i][:2]
        if image is None:
            continue
        predicted = predicted_labels(model, normalized(image[None].to(where), normalization), how)[0].cpu()
        sides = image.shape[-2:]
        size = [max(1, round(side * min(1.0, SIDE / max(sides)))) for side in sides]
        small = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
        rows, columns = (torch.arange(n) * side // n for n, side in zip(size, sides, strict=True))
        maps = [labels[rows[:, None], columns].numpy() for labels in (truth, predicted)]
        drawn.append((small.permute(1, 2, 0).numpy(), *maps, f"{100 * by_image[i]:.0f} % right"))
    images, truths, predictions, captions = zip(*drawn, strict=True)
    draw_comparison(images, truths, predictions, dataset.listing.classes, Path(out), captions)


def finish(folder: Path, splits: Splits, module: Any) -> None:
    """See `Task.finish`: `examples.png` of the best validation."""
    if module.best_by_image:
        model, normalization = network(read_weights(folder.parent)), Normalization.of(splits.metadata)
        examples = folder / "examples.png"
        draw_examples(model, splits.val, module.best_by_image, module.inference, examples, normalization)
