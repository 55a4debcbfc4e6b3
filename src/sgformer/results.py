"""What `predict` and `explain` return for one image, and its JSON, COCO and array forms. No torch here: files of
`sgformer export` are used where it is not installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sgformer.core.errors import require

#: Detections of less confidence are not shown.
SHOWN = 0.5


@dataclass(frozen=True)
class Prediction:
    """What a classifier says of one image.

    Attributes:
        image: path or, for images given as objects, their position as text.
        labels: (class name, probability), most probable first.
    """

    image: str
    labels: tuple[tuple[str, float], ...]

    def to_dict(self) -> dict[str, Any]:
        return {"image": self.image, "labels": [{"class": n, "probability": p} for n, p in self.labels]}


@dataclass(frozen=True)
class Segments:
    """What a network says of one image's pixels.

    Attributes:
        image: path or, for images given as objects, their position as text.
        labels: (H, W) class indices, at the size of the image as it is shown.
        class_names: one per class.
        first: the label of class 0 in files: 1 where the data set's 0 means "no class".
    """

    image: str
    labels: np.ndarray
    class_names: tuple[str, ...]
    first: int = 0

    def shares(self) -> list[tuple[str, float]]:
        """(class name, share of the pixels) of the classes that are there, the largest first."""
        counts = np.bincount(self.labels.ravel(), minlength=len(self.class_names))
        order = [i for i in np.argsort(-counts, kind="stable") if counts[i]]
        return [(self.class_names[i], float(counts[i] / self.labels.size)) for i in order]

    def to_dict(self) -> dict[str, Any]:
        """The shares, as JSON takes them."""
        return {"image": self.image, "classes": [{"class": n, "share": s} for n, s in self.shares()]}


@dataclass(frozen=True)
class Detections:
    """What a detector found on one image.

    Attributes:
        image: path or, for images given as objects, their position as text.
        results: in COCO's results format, best first; `category_id` as in the training data, `class` is its name.
        size: (height, width) of the image.
    """

    image: str
    results: list[dict[str, Any]]
    size: tuple[int, int]


def coco_result(
    image_id: Any, category_id: Any, box: Sequence[float], score: float, mask: np.ndarray | None
) -> dict[str, Any]:
    """One object in COCO's results format, its mask as RLE.

    Args:
        image_id: in the result.
        category_id: in the result.
        box: [x1, y1, x2, y2] in pixels.
        score: 0 to 1.
        mask: (H, W) of 0 and 1 of the whole image, or None.
    """
    x1, y1, x2, y2 = box
    result = {"image_id": image_id, "category_id": category_id, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}
    if mask is not None:
        rle = require("pycocotools.mask", extra="detect").encode(mask.astype(np.uint8, order="F"))
        result["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}
    return result


def named(results: Sequence[dict[str, Any]], category_ids: Sequence[Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """Results whose `category_id` is a class index, with the data's own id instead, and the name as `class`."""
    return [{**r, "category_id": category_ids[r["category_id"]], "class": names[r["category_id"]]} for r in results]


def as_coco(detections: Sequence[Detections], category_ids: Sequence[Any], names: Sequence[str]) -> dict[str, Any]:
    """Detections as COCO annotations with a `score` each: what labelling tools read, and `--data` again.

    Images are numbered from 1, `file_name` is what they were called.
    """
    pairs = [(i, result) for i, found in enumerate(detections, 1) for result in found.results]
    kept = ("category_id", "bbox", "score", "segmentation")
    return {
        "images": [
            {"id": i, "file_name": found.image, "width": found.size[1], "height": found.size[0]}
            for i, found in enumerate(detections, 1)
        ],
        "categories": [{"id": key, "name": name} for key, name in zip(category_ids, names, strict=True)],
        "annotations": [
            {
                "id": number,
                "image_id": i,
                **{name: result[name] for name in kept if name in result},
                "area": result["bbox"][2] * result["bbox"][3],
                "iscrowd": 0,
            }
            for number, (i, result) in enumerate(pairs, 1)
        ],
    }


@dataclass(frozen=True)
class Explanation:
    """What one forward pass saw of one image, as arrays. Keys are "stage.block", stages from 1, blocks from 0.

    Attributes:
        image: (H, W, 3) uint8, as the network got it.
        title: a line or two about it, e.g. its name and what the network said.
        significance: per hybrid-scale block, (h, w) float32, what the self-guided block after it sorted by.
        coarse, fine: per hybrid-scale block, (h, w) float32, the attention received from coarse and from fine heads;
            their sum is significance, unless the network is guided by something else.
        regions: per self-guided block, (h, w) int: the region of each token, 0 the least significant.
        tokens: per self-guided block, (h, w) int: the key/value token each token went into.
        rates: per self-guided block, how many tokens of each region make one key/value token.
        logits: (classes,) float32, of a classifier.
        overlay: (h, w, 3) uint8, what a dense network predicts, drawn over the image: boxes, masks, classes of pixels.
        prediction: of a dense network: `labels` (H, W); or `boxes` (N, 4), `labels`, `scores` (N,), `masks` (N, H, W).
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
        """(h, w) float: key/value tokens spent per token of the grid in a self-guided block."""
        sizes = np.bincount(self.tokens[block].ravel())
        return 1 / sizes[self.tokens[block]]

    def save_arrays(self, path: str | Path) -> None:
        """Everything as one .npz: ``image``, ``logits``, ``significance/1.0``, ``tokens/1.1``, ``density/1.1`` ..."""
        kinds = ("significance", "coarse", "fine", "regions", "tokens", "prediction")
        arrays = {f"{kind}/{key}": value for kind in kinds for key, value in getattr(self, kind).items()}
        arrays |= {f"density/{key}": self.density(key) for key in self.tokens}
        arrays |= {name: getattr(self, name) for name in ("logits", "overlay") if getattr(self, name) is not None}
        np.savez_compressed(path, image=self.image, **arrays)
