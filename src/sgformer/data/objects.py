"""The objects' pixels of an image in any data layout, for measuring localization."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from sgformer.core.errors import UserError
from sgformer.core.names import GROUND
from sgformer.data.ade20k import LabelledFolder, read_label_map
from sgformer.data.coco import CocoDataset
from sgformer.data.formats import find_format, open_data
from sgformer.data.image import read_image
from sgformer.data.splitting import own_name


class KnownObjects:
    """Images with known objects.

    Args:
        length: number of images.
        read: index -> RGB image and its objects' pixels, (H, W) bool.
        what: the kind of annotation, for reports.
    """

    def __init__(self, length: int, read: Callable[[int], tuple[Image.Image, np.ndarray]], what: str):
        self.length, self.read, self.what = length, read, what

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Image.Image, np.ndarray]:
        return self.read(index)


def find_objects(data: str | os.PathLike[str], split: str = "val") -> KnownObjects:
    """Open a split's images with their objects.

    Layouts: COCO and other registered formats of objects (masks, otherwise boxes), ADE20K (pixels of classes other than
    the background), and the imagenet layout of `sgformer data scenes` (each scene is composed again).

    Raises:
        UserError: the layout is another one, or files cannot be read.
    """
    root = Path(data)
    if (root / "images").is_dir() and (root / "annotations").is_dir() and not list(root.glob("annotations/*.json")):
        from sgformer.data.ade20k import scan
        from sgformer.data.label_values import check_values

        listing, _ = check_values(scan(root, own_name(root, split, "ade20k")))
        return KnownObjects(len(listing), lambda i: _labelled(listing, i), "label maps")
    scenes = (root / "scenes.json").is_file()
    if root.is_file() or (root / "annotations").is_dir() or (find_format("objects", root) and not scenes):
        coco = CocoDataset(open_data("objects", root, split))
        return KnownObjects(len(coco), lambda i: _annotated(coco, i), "masks" if coco.listing.has_masks else "boxes")
    if scenes:
        from sgformer.data.imagefolder import scan as scan_images
        from sgformer.data.scenes import scene_objects

        images = scan_images(root, split)
        return KnownObjects(
            len(images), lambda i: (read_image(images.path(i)), scene_objects(images.path(i))), "composed again"
        )
    raise UserError(
        f"{root}: objects are known only in the COCO and ADE20K layouts and in `sgformer data scenes`; "
        "this is another layout"
    )


def object_pixels(labels: np.ndarray, classes: tuple[str, ...], ignore: int) -> np.ndarray:
    """Class indices (H, W) -> bool: pixels of classes other than the background."""
    ground = [i for i, name in enumerate(classes) if name.lower() in GROUND]
    return (labels != ignore) & ~np.isin(labels, ground)


def _labelled(listing: LabelledFolder, index: int) -> tuple[Image.Image, np.ndarray]:
    labels = listing.class_indices(index, read_label_map(listing.labels[index]))
    return read_image(listing.images[index]), object_pixels(labels, listing.classes, listing.ignore)


def _annotated(dataset: CocoDataset, index: int) -> tuple[Image.Image, np.ndarray]:
    sample = dataset[index]
    image = Image.fromarray(np.asarray(sample.image))
    return image, annotated_pixels(sample.target, (image.height, image.width))


def annotated_pixels(target: dict, size: tuple[int, int]) -> np.ndarray:
    """The union of a COCO sample's masks or, without masks, boxes: (H, W) bool."""
    if "masks" in target:
        return np.asarray(target["masks"]).astype(bool).any(0).reshape(size)
    covered = np.zeros(size, bool)
    for x1, y1, x2, y2 in np.asarray(target["boxes"]).reshape(-1, 4).round().astype(int).tolist():
        covered[max(0, y1) : y2, max(0, x1) : x2] = True
    return covered
