"""The per-image results of `predict`, `embed` and `explain`, and their JSON, COCO and array forms. No torch here:
exported networks run without it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sgformer.core.errors import require
from sgformer.core.files import replacing

#: Detections with a lower score are not drawn.
SHOWN = 0.5
#: Keypoints with a lower score are not drawn: how probable the most probable of 56 x 56 places is.
POINT_SHOWN = 0.01


@dataclass(frozen=True)
class Prediction:
    """A classifier's prediction for one image.

    Attributes:
        image: path or, for images given as objects, their position as text.
        labels: (class name, probability), most probable first.
    """

    image: str
    labels: tuple[tuple[str, float], ...]

    def to_dict(self) -> dict[str, Any]:
        return {"image": self.image, "labels": [{"class": n, "probability": p} for n, p in self.labels]}


@dataclass(frozen=True)
class Embeddings:
    """The embeddings of images.

    Attributes:
        images: path of each or, for images given as objects, their position as text.
        features: (N, C) float32, a row for each image.
    """

    images: tuple[str, ...]
    features: np.ndarray

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write an `.npz` file for `numpy.load`, atomically: `names` (N,) text and `features` (N, C) float32.

        Raises:
            OSError: the file cannot be written.
        """
        with replacing(path) as unfinished, open(unfinished, "wb") as file:
            np.savez(file, names=np.array(self.images, dtype=np.str_), features=self.features)


@dataclass(frozen=True)
class Segments:
    """The semantic segmentation of one image.

    Attributes:
        image: path or, for images given as objects, their position as text.
        labels: (H, W) int class indices, at the size of the displayed image.
        class_names: one per class.
        first: the label of class 0 in files: 1 where the data set's 0 means "no class".
    """

    image: str
    labels: np.ndarray
    class_names: tuple[str, ...]
    first: int = 0

    def shares(self) -> list[tuple[str, float]]:
        """(class name, fraction of the pixels) of the classes present, largest first."""
        counts = np.bincount(self.labels.ravel(), minlength=len(self.class_names))
        order = [i for i in np.argsort(-counts, kind="stable") if counts[i]]
        return [(self.class_names[i], float(counts[i] / self.labels.size)) for i in order]

    def to_dict(self) -> dict[str, Any]:
        """The class shares, JSON-serialisable."""
        return {"image": self.image, "classes": [{"class": n, "share": s} for n, s in self.shares()]}


@dataclass(frozen=True)
class Detections:
    """A detector's objects in one image.

    Attributes:
        image: path or, for images given as objects, their position as text.
        results: in COCO's results format, best first; `category_id` as in the training data, `class` its name.
        size: (height, width) of the image in pixels.
    """

    image: str
    results: list[dict[str, Any]]
    size: tuple[int, int]


def coco_result(
    image_id: Any,
    category_id: Any,
    box: Sequence[float],
    score: float,
    mask: np.ndarray | None = None,
    keypoints: Sequence[Sequence[float]] | None = None,
) -> dict[str, Any]:
    """One object in COCO's results format, with its mask as RLE.

    Args:
        image_id: copied into the result.
        category_id: copied into the result.
        box: [x1, y1, x2, y2] in pixels.
        score: in [0, 1].
        mask: (H, W) of 0 and 1, covering the full image, or None.
        keypoints: [x, y, score] of each, from the corner of the first pixel; the result's, as COCO's, from its middle.
    """
    x1, y1, x2, y2 = box
    result = {"image_id": image_id, "category_id": category_id, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}
    if mask is not None:
        rle = require("pycocotools.mask", extra="detect").encode(mask.astype(np.uint8, order="F"))
        result["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}
    if keypoints is not None:
        result["keypoints"] = [v for x, y, sure in keypoints for v in (x - 0.5, y - 0.5, sure)]
    return result


def named(results: Sequence[dict[str, Any]], category_ids: Sequence[Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """Replace each result's class index by the data set's own category id, and add the class name as `class`."""
    return [{**r, "category_id": category_ids[r["category_id"]], "class": names[r["category_id"]]} for r in results]


def as_coco(
    detections: Sequence[Detections],
    category_ids: Sequence[Any],
    names: Sequence[str],
    category: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Detections as COCO annotations with scores, which labelling tools and `--data` read.

    Images are numbered from 1; `file_name` is `Detections.image`. Every keypoint is said to be visible, which is what
    annotations have in the place of a score; the scores are apart, in `keypoint_scores`.

    Args:
        detections: of each image.
        category_ids, names: of the classes.
        category: further entries of every category.
    """
    pairs = [(i, result) for i, detection in enumerate(detections, 1) for result in detection.results]
    copied = ("category_id", "bbox", "score", "segmentation")
    return {
        "images": [
            {"id": i, "file_name": detection.image, "width": detection.size[1], "height": detection.size[0]}
            for i, detection in enumerate(detections, 1)
        ],
        "categories": [
            {"id": key, "name": name, **(category or {})} for key, name in zip(category_ids, names, strict=True)
        ],
        "annotations": [
            {
                "id": number,
                "image_id": i,
                **{name: result[name] for name in copied if name in result},
                **_annotated_points(result),
                "area": result["bbox"][2] * result["bbox"][3],
                "iscrowd": 0,
            }
            for number, (i, result) in enumerate(pairs, 1)
        ],
    }


def _annotated_points(result: Mapping[str, Any]) -> dict[str, Any]:
    values = result.get("keypoints")
    if values is None:
        return {}
    count = len(values) // 3
    placed = [v for i in range(count) for v in (values[3 * i], values[3 * i + 1], 2)]
    return {"keypoints": placed, "num_keypoints": count, "keypoint_scores": values[2::3]}


@dataclass(frozen=True)
class Explanation:
    """The maps of one forward pass over one image, as arrays. Keys are "stage.block", stages from 1, blocks from 0.

    Attributes:
        image: (H, W, 3) uint8, the network's input.
        title: one or two lines, e.g. the file name and the prediction.
        significance: per hybrid-scale block, (h, w) float32, the values by which the next self-guided block sorts.
        coarse, fine: per hybrid-scale block, (h, w) float32, the attention received from coarse and from fine heads;
            their sum is the significance, unless the network uses another source.
        regions: per self-guided block, (h, w) int: the region of each token, 0 the least significant.
        tokens: per self-guided block, (h, w) int: the key/value token that each token was merged into.
        rates: per self-guided block, the number of tokens of each region that form one key/value token.
        logits: (classes,) float32; classifiers only.
        overlay: (h, w, 3) uint8, a dense network's prediction drawn over the image: boxes, masks, pixel classes.
        prediction: dense networks only: `labels` (H, W); or `boxes` (N, 4), `labels`, `scores` (N,), `masks` (N, H, W),
            `keypoints` (N, K, 3).
    """

    image: np.ndarray
    title: str
    significance: Mapping[str, np.ndarray]
    coarse: Mapping[str, np.ndarray]
    fine: Mapping[str, np.ndarray]
    regions: Mapping[str, np.ndarray]
    tokens: Mapping[str, np.ndarray]
    rates: Mapping[str, Sequence[int]]
    logits: np.ndarray | None = None
    overlay: np.ndarray | None = None
    prediction: Mapping[str, np.ndarray] = field(default_factory=dict)

    def density(self, block: str) -> np.ndarray:
        """(h, w) float: key/value tokens per grid token in a self-guided block."""
        sizes = np.bincount(self.tokens[block].ravel())
        return 1 / sizes[self.tokens[block]]

    def save_arrays(self, path: str | Path) -> None:
        """Save everything as one .npz: ``image``, ``logits``, ``significance/1.0``, ``tokens/1.1``, ``density/1.1``."""
        kinds = ("significance", "coarse", "fine", "regions", "tokens", "prediction")
        arrays = {f"{kind}/{key}": value for kind in kinds for key, value in getattr(self, kind).items()}
        arrays |= {f"density/{key}": self.density(key) for key in self.tokens}
        arrays |= {name: getattr(self, name) for name in ("logits", "overlay") if getattr(self, name) is not None}
        with replacing(path) as unfinished, open(unfinished, "wb") as file:
            np.savez_compressed(file, image=self.image, **arrays)
