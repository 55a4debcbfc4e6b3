"""What networks say of images, and how images are found and read for them. No torch here: files of `sgformer export`
are asked where it is not installed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from sgformer.core.errors import UserError, require
from sgformer.data.image import IMAGE_EXTENSIONS, read_image

if TYPE_CHECKING:
    from sgformer.viz.detection import Objects

#: Detections of less confidence are not shown.
SHOWN = 0.5

# -- images -----------------------------------------------------------------------------------------------------------


def find_images(sources: Iterable[str | os.PathLike[str] | Image.Image]) -> Iterator[Path | Image.Image]:
    """Files as they are, folders replaced by the images in them in sorted order.

    Raises:
        UserError: no such file, or no image in a folder.
    """
    for source in sources:
        if isinstance(source, Image.Image):
            yield source
            continue
        path = Path(source)
        if not path.is_dir():
            if not path.exists():
                raise UserError(f"{path}: no such image or folder")
            yield path
            continue
        files = sorted(
            p for p in path.rglob("*") if p.suffix.lower() in IMAGE_EXTENSIONS and not p.name.startswith(".")
        )
        if not files:
            raise UserError(f"{path}: no images in this folder")
        yield from files


def open_image(source: Path | Image.Image) -> Image.Image:
    """An RGB image, read as a viewer shows it."""
    return source.convert("RGB") if isinstance(source, Image.Image) else read_image(source)


# -- answers -----------------------------------------------------------------------------------------------------------


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


def annotate(prediction: Prediction, out: str | os.PathLike[str]) -> None:
    """Write a picture of the image and its most probable classes."""
    from sgformer.viz.sheets import draw_prediction

    pixels = np.asarray(read_image(prediction.image))
    draw_prediction(pixels, prediction.labels, Path(out), Path(prediction.image).name)


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

    def write(self, out: str | os.PathLike[str], pixels: np.ndarray, stem: str | None = None) -> list[Path]:
        """Write `STEM_labels.png` (a label map with a palette) and `STEM_overlay.png` into a folder.

        Args:
            out: the folder.
            pixels: the image, (H, W, 3) uint8.
            stem: by default the image's name without its ending.

        Returns:
            The two files.
        """
        from sgformer.viz.segmentation import draw_overlay, write_label_png

        stem = stem or Path(self.image).stem
        labels, overlay = Path(out) / f"{stem}_labels.png", Path(out) / f"{stem}_overlay.png"
        write_label_png(self.labels, labels, self.class_names, self.first)
        draw_overlay(pixels, self.labels, self.class_names, overlay, Path(self.image).name)
        return [labels, overlay]


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

    def objects(self, names: Sequence[str]) -> Objects:
        """For drawing."""
        from sgformer.viz.detection import Objects

        corners = np.array([r["bbox"] for r in self.results], dtype=float).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        outlined = [r["segmentation"] for r in self.results if "segmentation" in r]
        masks = [require("pycocotools.mask", extra="detect").decode(outline) for outline in outlined]
        labels = np.array([list(names).index(r["class"]) for r in self.results], dtype=np.int64)
        return Objects(corners, labels, np.array([r["score"] for r in self.results]), stack_masks(masks))


def stack_masks(masks: Sequence[np.ndarray]) -> np.ndarray | None:
    """(N, H, W) bool of N masks, None of none."""
    return np.stack(masks).astype(bool) if masks else None


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
