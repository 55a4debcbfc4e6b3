"""Detecting objects with trained weights, and evaluating them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sgformer.core.device import find_device
from sgformer.core.errors import UserError
from sgformer.core.parse import read_json
from sgformer.data import splitting
from sgformer.data.coco import Category, CocoDataset, CocoListing, collate, decode_masks
from sgformer.data.detection_transforms import eval_transform
from sgformer.data.formats import open_data
from sgformer.data.image import Images
from sgformer.data.keypoints import HALF
from sgformer.models.load import Weights
from sgformer.results import POINT_SHOWN, SHOWN, Detections, named
from sgformer.tasks.detect.data import coco_metric, reading, require_truth, without_objects
from sgformer.tasks.detect.metrics import CocoMetric
from sgformer.tasks.detect.network import Detector, coco_results
from sgformer.tasks.registry import task_of
from sgformer.training.task import Splits

#: The longest side of an image in `examples.png`, in pixels.
SIDE = 768

network = Detector.from_weights


def predict(
    weights: Weights,
    images: Images,
    *,
    score: float = SHOWN,
    image_size: int | tuple[int, int] | None = None,
    device: str = "auto",
) -> Iterator[tuple[Detections, Image.Image]]:
    """See `Task.predict`: boxes, classes, scores and, if the weights have them, masks or keypoints.

    Args:
        weights: of a detector.
        images: the images.
        score: minimum confidence, of .05 or more.
        image_size: short side, or (short, longest); by default as trained.
        device: "auto", "cpu", "cuda" ...

    Raises:
        UserError: an image cannot be read, or a value is invalid.
    """
    if not 0 <= score <= 1:
        raise UserError(f"--score must be in [0, 1], got {score}")
    where = find_device(device)
    model = task_of(weights.task, weights.path).network(weights).to(where)
    names = weights.metadata["classes"]
    transform = eval_transform(reading(weights.metadata, image_size))
    for name, image in images:
        size = (image.height, image.width)
        with torch.inference_mode():
            (found,) = model([transform(image).to(where)], sizes=[size])
        keep = found["scores"] >= score
        found = {name: value[keep] for name, value in found.items()}
        results = coco_results(found, name, range(len(names)), size)
        yield Detections(name, named(results, weights.metadata["category_ids"], names), size), image


def evaluate(
    weights: Weights, data: str | os.PathLike[str], *, out: str | os.PathLike[str] | None = None, **options: Any
) -> Any:
    """The twelve COCO metrics for boxes and, if weights and data have masks, for masks; see `measure`."""
    model = Detector.from_weights(weights)
    return measure(model, weights, data, coco_metric, {"masks": None if model.masks else False}, out=out, **options)


def measure(
    model: Detector,
    weights: Weights,
    data: str | os.PathLike[str],
    metric_of: Callable[[CocoListing], CocoMetric],
    reading_options: Mapping[str, Any],
    *,
    split: str = "val",
    images: str | os.PathLike[str] | None = None,
    image_size: int | tuple[int, int] | None = None,
    batch_size: int = 8,
    bad_images: str = "stop",
    out: str | os.PathLike[str] | None = None,
    **machine: Any,
) -> Any:
    """The COCO metrics of a network on a split.

    Args:
        model: the network.
        weights: that it was made from.
        data: a COCO folder or JSON file.
        metric_of: a listing -> its metric.
        reading_options: of `data.coco.read_coco`: `masks`, `keypoints`.
        split: split of the folder.
        images: the image folder, if not beside the JSON.
        image_size: short side, or (short, longest); by default as trained.
        batch_size: images per forward pass on each process.
        bad_images: "stop" at an unreadable image, or "skip" and list them; those skipped do not count.
        out: a folder to write tables, results and pictures to, by the first process.
        machine: `workers`, `device`, `devices`, `precision`, see `training.validate.validate`.

    Raises:
        UserError: weights or data are invalid, or do not match.
    """
    from sgformer.tasks.detect.module import DetectionModule
    from sgformer.training.validate import validate

    metadata = weights.metadata
    categories = [Category(i, name) for i, name in zip(metadata["category_ids"], metadata["classes"], strict=True)]
    options: dict[str, Any] = {
        "images": images,
        "drop_empty": False,
        "check_files": bad_images == "stop",
        **reading_options,
    }
    if (kept := splitting.kept_by(weights.path, metadata, data, split, "coco")) is not None:
        listing = splitting.side(splitting.open_objects(data, kept, categories=categories, **options), split)
    else:
        split = splitting.named_split(data, split, "coco")
        listing = open_data("objects", data, split, categories, **options)
    require_truth(listing)
    dataset = CocoDataset(listing, eval_transform(reading(metadata, image_size)), bad_images=bad_images, objects=False)
    module = DetectionModule(
        model,
        metric=metric_of(listing),
        image_ids=[image.id for image in listing.images],
        category_ids=listing.own_ids,
    )
    notes = without_objects(listing)
    result, first = validate(module, dataset, collate, batch_size=batch_size, notes=notes, **machine)
    if out is not None and first:
        result.write(out)
        draw_examples(Path(out), listing)
    return result


def draw_examples(folder: Path, listing: CocoListing, each: int = 6) -> None:
    """`examples.png`: best and worst images by F1 at .5, from the results of an evaluation in `folder`."""
    from sgformer.tasks.detect.metrics import read_image_scores
    from sgformer.viz.detection import Example, Instances, draw_examples, sure_points

    scores = read_image_scores(folder)
    place = {str(image.id): i for i, image in enumerate(listing.images)}
    ranked = [(score, key) for key, score in scores.items() if not math.isnan(score) and key in place]
    order = [key for _, key in sorted(ranked, key=lambda entry: (-entry[0], place[entry[1]]))]
    best, worst = order[: min(each, (len(order) + 1) // 2)], order[::-1][: min(each, len(order) // 2)]
    boxes = read_json(folder / "results_box.json", None)
    masks: list[dict[str, Any]] = [{}] * len(boxes)
    points, edges = masks, listing.skeleton.edges if listing.skeleton else ()
    if listing.has_masks and (folder / "results_mask.json").is_file():
        masks = read_json(folder / "results_mask.json", None)
    if listing.skeleton:
        points = read_json(folder / "results_keypoints.json", None)
    index = {key: i for i, key in enumerate(listing.own_ids)}
    dataset = CocoDataset(listing, objects=False)

    def example(key: Any) -> Example:  # kept small: photographs with hundreds of masks would fill the memory
        i = place[key]
        about = listing.images[i]
        ratio = min(1.0, SIDE / max(about.width, about.height))
        wide, high = max(1, round(about.width * ratio)), max(1, round(about.height * ratio))
        scale = np.array([wide / about.width, high / about.height] * 2)

        def placed(keypoints: Any, least: float) -> np.ndarray | None:
            if listing.skeleton is None:
                return None
            values = np.array(keypoints, dtype=float).reshape(-1, len(listing.skeleton.names), 3)
            return sure_points(values, least, HALF) * scale[:2]

        image = dataset[i].image.resize((wide, high), Image.Resampling.BOX)

        def instances(
            corners: Any, labels: Any, scores: Any, segmentations: Sequence[Any] | None, keypoints: np.ndarray | None
        ) -> Instances:
            drawn = None
            if segmentations:
                drawn = decode_masks(segmentations, about.height, about.width, (high, wide)).astype(bool)
            corners = np.array(corners, dtype=float).reshape(-1, 4) * scale
            return Instances(corners, np.array(labels, dtype=np.int64), scores, drawn, keypoints, edges)

        own = [i for i, box in enumerate(boxes) if str(box["image_id"]) == key and box["score"] >= SHOWN]
        own.sort(key=lambda i: -boxes[i]["score"])
        found = instances(
            [[x, y, x + w, y + h] for x, y, w, h in (boxes[i]["bbox"] for i in own)],
            [index[boxes[i]["category_id"]] for i in own],
            np.array([boxes[i]["score"] for i in own]),
            [masks[i]["segmentation"] for i in own if masks[i]],
            placed([points[i]["keypoints"] for i in own if points[i]], POINT_SHOWN),
        )
        objects = listing.objects_of(i)
        outlines = [segmentation for _, _, segmentation in objects] if listing.has_masks else None
        annotated = placed(listing.keypoints_of(i), 1) if listing.skeleton else None
        truth = instances([box for _, box, _ in objects], [label for label, _, _ in objects], None, outlines, annotated)
        return Example(np.asarray(image), truth, found, f"detected: F1 {100 * scores[key]:.0f} %")

    draw_examples([example(k) for k in best], [example(k) for k in worst], listing.classes, folder / "examples.png")


def finish(folder: Path, splits: Splits, module: Any) -> None:
    """See `Task.finish`: `examples.png` of the best validation."""
    draw_examples(folder, splits.val.listing)
