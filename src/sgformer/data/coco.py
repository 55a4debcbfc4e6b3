"""The COCO layout: one JSON file of boxes and masks per split, and a folder of images.

    listing = read_coco(*find_coco("photos", "train"))
    dataset = CocoDataset(listing, transform, seed=0)      # dataset[i] or dataset[epoch, i] gives a Sample

Supports category ids with gaps, crowd regions, polygons and both kinds of RLE, images without annotations, and what
tools write instead (`data.coco_dialects`). Unusable entries are left out and counted in `listing.notes`; invalid
entries are errors that name the file and the entry.

By hand: pycocotools does not validate, and its C code crashes on malformed masks, so everything is checked before.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision import tv_tensors

from sgformer.core.errors import StalledError, UserError, require
from sgformer.core.names import quoted, some
from sgformer.core.parse import read_json
from sgformer.data import keypoints as points
from sgformer.data.coco_dialects import Content, plain
from sgformer.data.image import MAX_PIXELS, probe_image, read_image, short_and_longest
from sgformer.data.imagefolder import Sample, bad_image, seeded

#: Names of a split's files and folders, in order of preference.
SPLIT_NAMES = {"train": ("train2017", "train"), "val": ("val2017", "val", "valid", "validation")}
#: How file names begin that are addresses, or paths of Windows.
URL = r"[A-Za-z][A-Za-z0-9+.-]+://"
ADDRESS = rf"[A-Za-z]:|{URL}"
#: Boxes may exceed the image by this many pixels without being counted: annotation tools round.
ROUNDING = 0.01

CROWD = "crowd regions, not used in training"
NO_AREA = "boxes without area, dropped"
OUTSIDE = "boxes wholly outside the image, dropped"
CLIPPED = "boxes partly outside the image, clipped"
NO_MASK = "objects whose mask has no area, dropped"
MASKLESS = "objects without a mask"
ORPHANS = "annotations of images that are not listed, left out"
EMPTY = "images without objects, left out"
BOXES_AS_MASKS = "objects without a mask, whose box is taken as one"
UNUSED = "classes without an object"
FOREIGN = "classes without an object that training does not know, left out"
ELSEWHERE = "images whose file_name is an address or a path elsewhere, found by its last parts"
UNSIZED = "images without a size whose files cannot be read, left out"


class Category(NamedTuple):
    """A class: its id in the JSON and its name."""

    id: int | str
    name: str


class CocoImage(NamedTuple):
    """An image: its id in the JSON, its path below the image folder, its size in pixels."""

    id: int | str
    file_name: str
    width: int
    height: int


@dataclass(frozen=True)
class CocoListing:
    """A checked split.

    Attributes:
        json: the annotation file; of other formats, what messages name.
        folder: the image folder.
        categories: the classes in index order.
        own_ids: the id of each class in this file; None for a class that the file lacks.
        images: the images.
        objects: the objects of each image, packed (see `objects_of`).
        has_masks: whether masks are used; an object without one has its box as mask.
        notes: counts of dropped and corrected entries, by kind.
        content: the annotations in COCO's form, where they come from another format.
        skeleton: the keypoints of every object, if they are read.
    """

    json: Path
    folder: Path
    categories: tuple[Category, ...]
    own_ids: tuple[int | str | None, ...]
    images: tuple[CocoImage, ...]
    objects: tuple[bytes, ...]
    has_masks: bool
    notes: Counter[str]
    content: bytes | None = None
    skeleton: points.Skeleton | None = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in index order."""
        return tuple(category.name for category in self.categories)

    def path(self, index: int) -> Path:
        """The path of image `index`."""
        return self.folder / self.images[index].file_name

    def entries(self) -> list[tuple[str, str]]:
        """(name, digest of its objects) of each image; see `data.identity`."""
        digests = (hashlib.blake2b(objects, digest_size=8).hexdigest() for objects in self.objects)
        return [(image.file_name, digest) for image, digest in zip(self.images, digests, strict=True)]

    def objects_of(self, index: int) -> list[tuple[int, list[float], Any]]:
        """Objects of image `index`: (class index, [x1, y1, x2, y2] in pixels, COCO segmentation or None)."""
        # Packed as bytes: reference counts of millions of small objects would copy their memory into every worker.
        return [(label, box, segmentation) for label, box, segmentation, *_ in json.loads(self.objects[index])]

    def keypoints_of(self, index: int) -> np.ndarray:
        """The keypoints of the objects of image `index`, if they are read: (N, K, 3) x, y and visibility as in COCO's
        files, zeros where not labelled or outside."""
        assert self.skeleton is not None
        found = np.array([thing[3] for thing in json.loads(self.objects[index])], dtype=float)
        return found.reshape(-1, len(self.skeleton.names), 3)

    def describe(self) -> str:
        """One line: file, number of images and objects, and the notes."""
        count = sum(len(self.objects_of(i)) for i in range(len(self)))
        masks = "with" if self.has_masks else "without"
        if self.skeleton:
            masks = f"of {len(self.skeleton.names)} keypoints, {masks}"
        notes = [f"{number} {what}" for what, number in self.notes.items()]
        return "; ".join([f"{self.json.name}: {len(self)} images, {count} objects {masks} masks", *notes])


# -- finding and reading ----------------------------------------------------------------------------------------------


#: Where annotations are in a folder.
OF_KEYPOINTS = "annotations/person_keypoints_{}.json"
PATTERNS = (
    "annotations/instances_{}.json",
    "annotations/{}.json",
    "{}/_annotations.coco.json",
    "{}.json",
    OF_KEYPOINTS,
)
#: Where they are if there is one split: as CVAT, Roboflow, Label Studio, labelme's converters and FiftyOne name them.
SINGLE = (
    *("annotations/instances_default.json", "annotations/default.json", "_annotations.coco.json", "result.json"),
    *("annotations.json", "labels.json", "coco.json"),
)


def is_coco(data: str | os.PathLike) -> bool:
    """Whether `data` is a file, or a folder with annotations in COCO's places."""
    names = [name for names in SPLIT_NAMES.values() for name in names]
    data = Path(data)
    if data.is_file():
        return True
    files = [*(pattern.format(name) for name in names for pattern in PATTERNS), *SINGLE]
    return any((data / file).is_file() for file in files)


def _patterns(keypoints: bool | None) -> Sequence[str]:
    """`PATTERNS`, those of keypoints first if they are wanted: COCO has both files in a folder."""
    return sorted(PATTERNS, key=lambda pattern: pattern != OF_KEYPOINTS) if keypoints else PATTERNS


def single_coco(data: str | os.PathLike, keypoints: bool | None = False) -> Path | None:
    """The annotation file of a data set that is not split: the file itself, or a folder's only one; `keypoints` as of
    `find_coco`."""
    data = Path(data)
    if data.is_file():
        return data
    has = {
        split: any((data / p.format(n)).is_file() for n in names for p in PATTERNS)
        for split, names in SPLIT_NAMES.items()
    }
    if has["val"]:
        return None
    files = SINGLE if not has["train"] else [p.format(n) for n in SPLIT_NAMES["train"] for p in _patterns(keypoints)]
    return next((data / file for file in files if (data / file).is_file()), None)


def find_coco(
    data: str | os.PathLike, split: str, images: str | os.PathLike | None = None, keypoints: bool | None = False
) -> tuple[Path, list[Path]]:
    """Find the annotation file of a split, and the candidate folders of its images.

    Args:
        data: a folder with `annotations/instances_train2017.json` and `train2017/` (or without `2017`; also
            `train/_annotations.coco.json` with the images beside it), or the JSON file itself.
        split: "train" or "val"; ignored if `data` is a file.
        images: the image folder, if it is not in a standard place.
        keypoints: whether to prefer `annotations/person_keypoints_train2017.json`, which COCO has beside the other.

    Raises:
        UserError: there is no annotation file or no image folder.
    """
    data = Path(data)
    names = SPLIT_NAMES.get(split, (split,))
    if data.is_dir():
        files = [data / pattern.format(name) for name in names for pattern in _patterns(keypoints)]
        file = next((file for file in files if file.is_file()), None)
        if file is None and (single := single_coco(data)) is not None:
            raise UserError(
                f"{data}: no annotations for {split!r}, only {single.relative_to(data)}; "
                "--val-split .2 keeps a fifth of its images for validation"
            )
        if file is None:
            raise UserError(
                f"{data}: no annotations for {split!r}; expected {files[0]} and the images in {data / names[0]}, "
                "or pass the JSON file itself"
            )
    elif data.is_file():
        file = data
        names = (split_name(file), *names)
    else:
        raise UserError(f"{data}: no such file or folder")
    return file, image_folders(data, file, names, images)


def split_name(file: Path) -> str:
    """The name of the split that an annotation file's name ends in."""
    return file.stem.removeprefix("instances_").removeprefix("person_keypoints_")


def image_folders(
    data: Path, file: Path, names: Sequence[str] = (), images: str | os.PathLike | None = None
) -> list[Path]:
    """The folders that the images of an annotation file may be in, the likeliest first.

    Args:
        data: the data set's folder, or the file itself.
        file: the annotation file.
        names: names of the split.
        images: the image folder that the user named, if any.

    Raises:
        UserError: `images` is not there.
    """
    if images is not None:
        if not Path(images).is_dir():
            raise UserError(f"{images}: no such folder of images")
        return [Path(images)]
    roots = [data] if data.is_dir() else [file.parent, file.parent.parent]
    places = [root / prefix / name for root in roots for name in names for prefix in ("", "images")]
    places += [root / name for root in roots for name in ("images", "data", "JPEGImages", "")]
    # Predictions name their images as seen from where they were made.
    return [place for place in dict.fromkeys([*places, file.parent, Path(".")]) if place.is_dir()]


def read_coco(
    file: str | os.PathLike,
    folders: str | os.PathLike | Sequence[Path],
    *,
    categories: Sequence[Category] | None = None,
    masks: bool | None = None,
    drop_empty: bool = False,
    check_files: bool = True,
    keypoints: bool | None = False,
) -> CocoListing:
    """Read and check one annotation file.

    Args:
        file: the JSON file.
        folders, categories, masks, drop_empty, check_files, keypoints: see `make_listing`.

    Raises:
        UserError: the file is missing, malformed or inconsistent, or an image path leaves the folder.
    """
    file = Path(file)
    return _listing_of(_load(file), file, folders, categories, masks, drop_empty, check_files, keypoints)


def make_listing(
    content: dict[str, Any],
    source: str | os.PathLike,
    folders: str | os.PathLike | Sequence[Path],
    *,
    categories: Sequence[Category] | None = None,
    masks: bool | None = None,
    drop_empty: bool = False,
    check_files: bool = True,
    keypoints: bool | None = False,
) -> CocoListing:
    """A listing of annotations in another format, converted to COCO's form; checked as a file would be.

    Args:
        content: what a COCO file holds: `images`, `categories`, `annotations`.
        source: what messages name.
        folders: image folders; the first one that holds one of the images is used.
        categories: the classes in the order of their indices, e.g. those of the training split or of a trained model;
            by default those of the file, by ascending id. The file's own are matched to them by name.
        masks: whether to use masks; by default if more than half of the objects have one. The others' is their box.
        drop_empty: leave out images without objects, as the published recipes do in training.
        check_files: check that every image file exists.
        keypoints: True: read keypoints, and only the classes that have them; None: read them if there are any.

    Raises:
        UserError: the content is inconsistent, or an image path leaves the folder.
    """
    listing = _listing_of(content, Path(source), folders, categories, masks, drop_empty, check_files, keypoints)
    return dataclasses.replace(listing, content=json.dumps(content).encode())


def _listing_of(
    content: dict[str, Any],
    file: Path,
    folders: str | os.PathLike | Sequence[Path],
    categories: Sequence[Category] | None,
    masks: bool | None,
    drop_empty: bool,
    check_files: bool,
    keypoints: bool | None,
) -> CocoListing:
    folders = [Path(folders)] if isinstance(folders, (str, os.PathLike)) else list(folders)
    entries, skeleton = _plain(content, file), None
    pointed: set[int | str] = set()
    if keypoints is not False:
        entries, skeleton, pointed = _with_keypoints(entries, file, only=keypoints is True)
    notes = entries.notes
    folder, names = _find_files(folders, entries, file, notes)
    own = _categories(entries, file)
    used = {entry.get("category_id") for _, entry in entries.annotations if _is_keyed(entry)}
    own, index_of = _match(own, categories, used, file, notes)
    images = _images(entries, names, file, folder, notes, skip=not check_files)
    by_image: dict[Any, list[list[Any]]] = {image.id: [] for image in images}  # class, box, mask, maybe keypoints
    sizes = {image.id: image for image in images}
    corners = _Corners(file)
    maskless = ""
    for place, entry in entries.annotations:
        where = _where(file, place, entry)
        if not isinstance(entry, dict) or "image_id" not in entry or "category_id" not in entry:
            raise UserError(f"{where}: needs image_id, category_id and bbox")
        image = sizes.get(_key(entry["image_id"], where, "image_id"))
        if image is None:
            notes[ORPHANS] += 1
            continue
        category = _key(entry["category_id"], where, "category_id")
        if category not in index_of:
            raise UserError(f"{where}: category_id {_short(category)} is not among the categories")
        measured, segmentation = _shape(entry, image, where)
        placed = points.read_keypoints(entry if category in pointed else {}, skeleton, where) if skeleton else []
        if entry.get("iscrowd") or entry.get("ignore"):
            notes[CROWD] += 1
            continue
        corners.add(measured, image)
        box = _clip(measured, image, notes)
        if box is None:
            continue
        if segmentation is None:
            maskless = maskless or where
            notes[MASKLESS] += 1
        by_image[image.id].append([index_of[category], box, segmentation])
        if skeleton:
            mine = points.usable(placed, entry, image.width, image.height, notes) if category in pointed else placed
            by_image[image.id][-1].append(mine)
    corners.check()

    total = sum(len(objects) for objects in by_image.values())
    without = notes.pop(MASKLESS, 0)
    if masks and total and without == total:
        raise UserError(f"{maskless}: has no mask, nor has any other; pass --masks false for boxes only")
    # A few rectangles among polygons are objects whose outline is their box; a few polygons among boxes are not worth
    # a mask of every box.
    has_masks = bool(total and 2 * without < total) if masks is None else masks
    if without and (has_masks or without < total):
        notes[BOXES_AS_MASKS if has_masks else MASKLESS] += without
    if has_masks:
        for image_id, objects in by_image.items():
            masked = [[c, box, mask_of_box(box) if mask is None else mask, *rest] for c, box, mask, *rest in objects]
            by_image[image_id] = [thing for thing in masked if thing[2] != []]
            notes[NO_MASK] += len(objects) - len(by_image[image_id])
    if drop_empty:
        kept = [image for image in images if by_image[image.id]]
        notes[EMPTY] += len(images) - len(kept)
        images = kept
    if not images:
        raise UserError(f"{file}: holds no usable images")
    if categories is None:
        seen = {thing[0] for objects in by_image.values() for thing in objects}
        empty = [category.name for i, category in enumerate(own) if i not in seen]
        notes[f"{UNUSED} ({some(empty)})"] += len(empty)
    listing = CocoListing(
        file,
        folder,
        (known := tuple(categories or own)),
        tuple({category.name: category.id for category in own}.get(category.name) for category in known),
        tuple(images),
        tuple(
            json.dumps([[c, b, s if has_masks else None, *rest] for c, b, s, *rest in by_image[i.id]]).encode()
            for i in images
        ),
        has_masks,
        +notes,
        skeleton=skeleton,
    )
    if check_files:
        missing = [_short(image.file_name) for i, image in enumerate(images) if not listing.path(i).is_file()]
        if missing:
            raise UserError(
                f"{file}: {len(missing)} of {len(images)} images are not in {folder}: {some(missing)}; "
                "pass their folder with --images, or --bad-images skip"
            )
    return listing


def _plain(content: dict[str, Any], file: Path) -> Content:
    return plain(*(_list_of(content, key, file) for key in ("images", "categories", "annotations")))


def _with_keypoints(entries: Content, file: Path, only: bool) -> tuple[Content, points.Skeleton | None, set[int | str]]:
    """The entries, their skeleton, and the ids of the classes that have it; with `only` no others."""
    skeleton, having = points.read_skeleton(entries.categories, file)
    ids = {entry["id"] for entry in having if isinstance(entry.get("id"), (int, str))}
    if not only:
        return entries, skeleton, ids
    if skeleton is None:
        raise UserError(
            f"{file}: none of its categories has keypoints (a list of their names); "
            "sgformer train detect finds objects without"
        )
    known = {entry["id"] for entry in entries.categories if isinstance(entry, dict) and _is_keyed(entry, "id")}
    kept = [pair for pair in entries.annotations if not _is_keyed(pair[1]) or pair[1]["category_id"] not in known - ids]
    entries.notes[points.WITHOUT] += len(entries.annotations) - len(kept)
    return Content(entries.images, having, kept, entries.notes), skeleton, ids


def _shape(entry: dict[str, Any], image: CocoImage, where: str) -> tuple[list[float], Any]:
    """The box [x, y, width, height] of an annotation, that of its mask if it has none; and its checked mask."""
    segmentation = _segmentation(entry.get("segmentation"), image, where)
    if segmentation and entry.get("bbox") in (None, []):
        return _around(segmentation, image), segmentation
    return _box(entry.get("bbox"), where), segmentation


def _around(segmentation: Any, image: CocoImage) -> list[float]:
    """The box around a checked mask."""
    if isinstance(segmentation, list):
        left, top, right, bottom = bounds(segmentation)
        return [left, top, right - left, bottom - top]
    tools = require("pycocotools.mask", "detect")
    return tools.toBbox(_rle(segmentation, image.height, image.width)).tolist()


def bounds(polygons: Sequence[Sequence[float]]) -> tuple[float, float, float, float]:
    """[x1, y1, x2, y2, ...] of each polygon -> their left, top, right and bottom ends."""
    xs, ys = ([v for polygon in polygons for v in polygon[axis::2]] for axis in (0, 1))
    return min(xs), min(ys), max(xs), max(ys)


def mask_of_box(box: Sequence[float]) -> list[list[float]]:
    """[x1, y1, x2, y2] as a COCO segmentation."""
    x1, y1, x2, y2 = box
    return [[x1, y1, x2, y1, x2, y2, x1, y2]]


class _Corners:
    """Finds boxes that are written as [x1, y1, x2, y2], or as fractions of the image, instead of in COCO's way."""

    def __init__(self, file: Path):
        self.file, self.count, self.beyond, self.example = file, 0, 0, ""
        self.as_corners = self.as_fractions = True

    def add(self, box: list[float], image: CocoImage) -> None:
        x, y, w, h = box
        self.count += 1
        self.as_corners &= x < w <= image.width + 1 and y < h <= image.height + 1
        self.as_fractions &= all(0 <= v <= 1 for v in box) and min(image.width, image.height) > 4
        if x + w > 1.02 * image.width + 2 or y + h > 1.02 * image.height + 2:
            self.beyond += 1
            self.example = self.example or f"{_short(box)} in an image of {image.width} x {image.height}"

    def check(self) -> None:
        """Raise UserError if all boxes say so, and at least three."""
        if self.count >= 3 and self.as_corners and 4 * self.beyond >= self.count:
            raise UserError(
                f"{self.file}: all {self.count} boxes look like [x1, y1, x2, y2] (e.g. {self.example}); "
                "COCO's are [x, y, width, height]: write them so"
            )
        if self.count >= 3 and self.as_fractions:
            raise UserError(
                f"{self.file}: all {self.count} boxes lie in 0..1 and look like fractions of the image; "
                "COCO's are [x, y, width, height] in pixels: multiply them by the image's width and height"
            )


def ground_truth(listing: CocoListing) -> dict[str, Any]:
    """The annotations in the form that pycocotools needs for evaluation, crowd regions included.

    Required fields are filled in (`iscrowd`, `area`, `info`), objects are numbered from 1 (its matching treats id 0 as
    no match), and polygons of fewer than three points are removed. Nothing else changes. With keypoints, only the
    classes that have them are in it, and `keypoints` and `num_keypoints` are filled in.

    Raises:
        UserError: ids are numbers and text.
    """
    entries = _plain(_load(listing.json) if listing.content is None else json.loads(listing.content), listing.json)
    if listing.skeleton:
        entries = _with_keypoints(entries, listing.json, only=True)[0]
    sizes = {image.id: image for image in listing.images}
    annotations = []
    for number, (place, entry) in enumerate(entries.annotations, 1):
        image = sizes.get(entry["image_id"])
        if image is None:
            continue
        measured, mask = _shape(entry, image, _where(listing.json, place, entry))
        box = [float(v) for v in measured]
        done = {**entry, "id": number, "iscrowd": int(bool(entry.get("iscrowd"))), "bbox": box}
        if listing.has_masks:
            if mask is None and (clipped := _clip(box, image, Counter())):
                mask = mask_of_box(clipped)
            done["segmentation"] = mask or {"size": [image.height, image.width], "counts": [image.height * image.width]}
        else:
            done.pop("segmentation", None)
        if listing.skeleton:
            done["keypoints"] = [v for point in points.read_keypoints(entry, listing.skeleton, "") for v in point]
            if not _is_number(entry.get("num_keypoints")):
                done["num_keypoints"] = sum(visibility > 0 for visibility in done["keypoints"][2::3])
        if not _is_number(entry.get("area")):
            done["area"] = mask_area(mask, image.height, image.width) if mask and listing.has_masks else box[2] * box[3]
        annotations.append(done)
    for what, ids in (("images", sizes), ("categories", {entry["id"]: entry for entry in entries.categories})):
        kinds = {isinstance(key, str): key for key in ids}
        if len(kinds) > 1:  # pycocotools sorts them
            raise UserError(
                f"{listing.json}: ids of {what} are numbers and text ({_short(kinds[False])}, {_short(kinds[True])}); "
                "make them all the same"
            )
    images = [{"id": i.id, "file_name": i.file_name, "width": i.width, "height": i.height} for i in sizes.values()]
    return {"info": {}, "images": images, "categories": entries.categories, "annotations": annotations}


# -- masks ------------------------------------------------------------------------------------------------------------


def decode_mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """A checked COCO segmentation (polygons or RLE) as (height, width) uint8 of 0 and 1."""
    return require("pycocotools.mask", "detect").decode(_rle(segmentation, height, width))


#: Bytes that the masks of an image may take; beyond, image and masks are reduced before any transform.
MASKS = 2**28


def bounded_size(count: int, height: int, width: int) -> tuple[int, int]:
    """The (height, width) at which `count` masks of an image take at most `MASKS` bytes."""
    ratio = min(1.0, math.sqrt(MASKS / max(1, count * height * width)))
    return max(1, int(height * ratio)), max(1, int(width * ratio))


def decode_masks(
    segmentations: Sequence[Any], height: int, width: int, size: tuple[int, int] | None = None
) -> np.ndarray:
    """Checked COCO segmentations as (N, height, width) uint8 of 0 and 1, or at another (height, width), one by one."""
    high, wide = size or (height, width)
    rows, columns = ((np.arange(n) + 0.5) * side / n for n, side in ((high, height), (wide, width)))
    place = np.ix_(rows.astype(np.int64), columns.astype(np.int64))
    masks = np.empty((len(segmentations), high, wide), np.uint8)
    for mask, segmentation in zip(masks, segmentations, strict=True):
        whole = decode_mask(segmentation, height, width)
        mask[:] = whole if (high, wide) == (height, width) else whole[place]
    return masks


def mask_area(segmentation: Any, height: int, width: int) -> float:
    """The area of a checked COCO segmentation in pixels."""
    return float(require("pycocotools.mask", "detect").area(_rle(segmentation, height, width)))


def _rle(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    tools = require("pycocotools.mask", "detect")
    if isinstance(segmentation, list):
        return tools.merge(tools.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return tools.frPyObjects(segmentation, height, width)
    return segmentation


def _segmentation(value: Any, image: CocoImage, where: str) -> Any:
    """Check a segmentation, so that it is safe to decode: polygons or RLE; [] if it has no area, None if missing.

    Raises:
        UserError: it is neither, or does not fit the image's size.
    """
    if value is None or value == [] or value == {}:
        return None
    if isinstance(value, list):
        reach = 10.0 * max(image.width, image.height)
        for polygon in value:
            if not isinstance(polygon, list) or len(polygon) % 2:
                raise UserError(f"{where}: a polygon must be a list [x1, y1, x2, y2, ...], got {_short(polygon)}")
            if not all(_is_number(v) and abs(v) <= reach for v in polygon):
                raise UserError(
                    f"{where}: a polygon has points far outside the image, or non-numbers: {_short(polygon)}"
                )
        return [polygon for polygon in value if len(polygon) >= 6]
    if not isinstance(value, dict) or not isinstance(value.get("counts"), (list, str)):
        raise UserError(f"{where}: segmentation must be polygons or RLE (size, counts), got {_short(value)}")
    if value.get("size") != [image.height, image.width]:
        raise UserError(
            f"{where}: the RLE has size {_short(value.get('size'))}, its image [{image.height}, {image.width}]"
        )
    counts = value["counts"] if isinstance(value["counts"], list) else _runs(value["counts"])
    if not all(isinstance(n, int) and n >= 0 for n in counts) or sum(counts) != image.height * image.width:
        raise UserError(f"{where}: the RLE's counts do not add up to the image's {image.height * image.width} pixels")
    return {"size": value["size"], "counts": value["counts"]} if sum(counts[1::2]) else []


def _runs(text: str) -> list[int]:
    """Decode the run lengths of a compressed RLE, stored as differences to the second-last one; [-1] if invalid."""
    runs: list[int] = []
    value = shift = 0
    for code in text.encode("utf-8", "replace"):
        part = code - 48
        if not 0 <= part < 64 or shift > 30:
            return [-1]
        value |= (part & 31) << shift
        shift += 5
        if part & 32:
            continue
        if part & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return [-1] if shift else runs


# -- checking ---------------------------------------------------------------------------------------------------------


def _load(file: Path) -> dict[str, Any]:
    content = read_json(file, None)
    if not isinstance(content, dict):
        raise UserError(f"{file}: not COCO annotations: expected an object with images, annotations and categories")
    return content


def _list_of(content: dict[str, Any], key: str, file: Path) -> list[Any]:
    value = content.get(key)
    if not isinstance(value, list):
        keys = ", ".join(map(str, content)) or "none"
        raise UserError(f"{file}: not COCO annotations: no list {key!r} (keys: {keys[:80]})")
    return value


def _categories(entries: Content, file: Path) -> list[Category]:
    result = []
    for place, entry in enumerate(entries.categories):
        where = f"{file}: category {place}"
        if not isinstance(entry, dict) or "id" not in entry or not isinstance(entry.get("name"), str):
            raise UserError(f"{where} needs id and name, got {_short(entry)}")
        result.append(Category(_key(entry["id"], where, "id"), entry["name"]))
    for field in Category._fields:
        repeated = [_short(k) for k, n in Counter(getattr(category, field) for category in result).items() if n > 1]
        if repeated:
            raise UserError(f"{file}: categories with the same {field}: {some(repeated)}")
    if not result:
        raise UserError(f"{file}: holds no categories")
    return sorted(result, key=lambda category: (isinstance(category.id, str), category.id))


def _is_keyed(entry: Any, name: str = "category_id") -> bool:
    return isinstance(entry, dict) and isinstance(entry.get(name), (int, str))


def _match(
    own: Sequence[Category], known: Sequence[Category] | None, used: set[Any], file: Path, notes: Counter[str]
) -> tuple[list[Category], dict[int | str, int]]:
    """The file's classes that training knows, and category id -> class index. Others are errors if they are used."""
    index = {category.name: i for i, category in enumerate(known or own)}
    unknown = [_short(category.name) for category in own if category.name not in index and category.id in used]
    if unknown:
        raise UserError(f"{file}: {len(unknown)} classes are unknown to the training data: {some(unknown)}")
    kept = [category for category in own if category.name in index]
    notes[FOREIGN] += len(own) - len(kept)
    return kept, {category.id: index[category.name] for category in kept}


def _images(
    entries: Content, names: dict[str, str], file: Path, folder: Path, notes: Counter[str], skip: bool
) -> list[CocoImage]:
    result: dict[int | str, CocoImage] = {}
    for place, entry in enumerate(entries.images):
        where = f"{file}: image {place}"
        if not isinstance(entry, dict) or "id" not in entry or not isinstance(entry.get("file_name"), str):
            raise UserError(f"{where} needs id and file_name, got {_short(entry)}")
        key, name = _key(entry["id"], where, "id"), names[entry["file_name"]]
        if key in result:
            raise UserError(
                f"{file}: two images have the id {_short(key)}: {_short(result[key].file_name)} and {_short(name)}"
            )
        if "width" in entry and "height" in entry:
            width, height = entry["width"], entry["height"]
        else:
            try:
                width, height = probe_image(folder / name)[:2]
            except UserError as error:
                if skip:
                    notes[UNSIZED] += 1
                    continue
                raise UserError(f"{where} has no width and height, and they cannot be read: {error}") from None
        if not all(isinstance(v, int) and v > 0 for v in (width, height)) or width * height > MAX_PIXELS:
            raise UserError(
                f"{where} ({_short(name)}): width and height must be integers, got {_short(width)} x {_short(height)}"
            )
        result[key] = CocoImage(key, name, width, height)
    return list(result.values())


# -- file names -------------------------------------------------------------------------------------------------------


def _find_files(folders: list[Path], entries: Content, file: Path, notes: Counter[str]) -> tuple[Path, dict[str, str]]:
    """The folder of the images, and `file_name` -> path below it.

    A name that is an address or leads out of the folder stands for the file below it that its last parts name; the
    longest such part wins. Nothing outside the folder is ever read.
    """
    written = [e["file_name"] for e in entries.images if isinstance(e, dict) and isinstance(e.get("file_name"), str)]
    written = list(dict.fromkeys(written))
    as_written = next((f for name in written for f in folders if _is_below(f, name)), None)  # the first may be missing
    folder = as_written or _closest(folders, written[:100])
    paths: dict[str, str] = {}
    taken: dict[str, str] = {}
    for name in written:
        inner = _inside(name)
        if (inner is None or as_written is None) and (tail := _tail(folder, name) or _last_part(name)):
            inner = tail
            notes[ELSEWHERE] += 1
        paths[name] = path = _safe(name if inner is None else inner, file)
        if (other := taken.setdefault(path, name)) != name:
            raise UserError(f"{file}: {_short(name)} and {_short(other)} both stand for {folder / path}")
    return folder, paths


def _closest(folders: list[Path], names: list[str]) -> Path:
    """The folder that has the longest end of the first name that is in any."""
    for name in names:
        lengths = [len(tail.split("/")) if (tail := _tail(folder, name)) else 0 for folder in folders]
        if any(lengths):
            return folders[lengths.index(max(lengths))]
    return folders[0]


def _is_below(folder: Path, name: str) -> bool:
    inner = _inside(name)
    return inner is not None and _is_file(folder / inner)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, a null byte, half of a surrogate pair
        return False


def _inside(name: str) -> str | None:
    """A file name that stays below its folder, with forward slashes; None if it leads out or is an address."""
    clean = name.replace("\\", "/")
    path = PurePosixPath(clean)
    if not path.parts or path.is_absolute() or ".." in path.parts or re.match(ADDRESS, clean) or not _possible(clean):
        return None
    return str(path)


def _possible(name: str) -> bool:
    """Whether a file can have this name: no null, no half of a surrogate pair (but those that stand for raw bytes)."""
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False


def _parts(name: str) -> list[str]:
    """The parts of a path or address, after any "..", but for the host."""
    if re.match(URL, name) or "?d=" in name:
        try:
            parsed = urlsplit(name)
            name = unquote(dict(parse_qsl(parsed.query)).get("d") or parsed.path)  # d=: Label Studio's local files
        except ValueError:
            return []
    parts = [part for part in re.split(r"[/\\]", name) if part not in ("", ".")]
    return parts[len(parts) - parts[::-1].index("..") :] if ".." in parts else parts


def _tail(folder: Path, name: str) -> str | None:
    """The longest end of a path or address that is a file below `folder`."""
    parts = _parts(name)
    tails = ("/".join(parts[start:]) for start in range(len(parts)))
    return next((tail for tail in tails if _inside(tail) and _is_file(folder / tail)), None)


def _last_part(name: str) -> str | None:
    """The file name of an address; None of anything else."""
    parts = _parts(name) if re.match(URL, name) else []
    return parts[-1] if parts and _inside(parts[-1]) else None


def _safe(name: str, file: Path) -> str:
    """Check that a path stays below the image folder: an annotation file must not make us read other files."""
    if not _possible(name):
        raise UserError(f"{file}: file_name {_short(name)} holds characters that no file's name has: rejected")
    inner = _inside(name)
    if inner is None:
        raise UserError(
            f"{file}: file_name {_short(name)} leaves the image folder: rejected; name the folder of the images "
            "with --images"
        )
    if max(len(part.encode("utf-8", "replace")) for part in inner.split("/")) > 255:  # the limit of common file systems
        raise UserError(f"{file}: file_name {_short(name)} is too long")
    return inner


def _box(value: Any, where: str) -> list[float]:
    if not isinstance(value, list) or len(value) != 4 or not all(map(_is_number, value)):
        raise UserError(f"{where}: bbox must be [x, y, width, height] in pixels, got {_short(value)}")
    return value


def _clip(box: list[float], image: CocoImage, notes: Counter[str]) -> list[float] | None:
    """[x, y, w, h] -> [x1, y1, x2, y2] clipped to the image, or None if empty; counts clipped and dropped boxes."""
    x, y, w, h = box
    if w <= 0 or h <= 0:
        notes[NO_AREA] += 1
        return None
    x1, y1, x2, y2 = max(x, 0), max(y, 0), min(x + w, image.width), min(y + h, image.height)
    if x2 <= x1 or y2 <= y1:
        notes[OUTSIDE] += 1
        return None
    if max(x1 - x, y1 - y, x + w - x2, y + h - y2) > ROUNDING:
        notes[CLIPPED] += 1
    return [x1, y1, x2, y2]


def _key(value: Any, where: str, name: str) -> int | str:
    if not isinstance(value, (int, str)) or isinstance(value, bool):
        raise UserError(f"{where}: {name} must be a whole number or a string, got {_short(value)}")
    return value


def _where(file: Path, place: int, entry: Any) -> str:
    name = entry.get("id", f"number {place}") if isinstance(entry, dict) else f"number {place}"
    return f"{file}: annotation {_short(name)}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9 and math.isfinite(value)


def _short(value: Any) -> str:
    text = " ".join(value.split()) if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# -- samples ----------------------------------------------------------------------------------------------------------


class DetectionBatch(NamedTuple):
    """Images of different sizes with their targets.

    Attributes:
        image: float tensors (3, H_i, W_i).
        target: a dict per image: `boxes` (N, 4) float32 [x1, y1, x2, y2], `labels` (N,) int64 from 1 (0 is the
            background), `masks` (N, H_i, W_i) uint8 if the data has masks, `keypoints` (N, K, 3) float32 if they are
            read, and `size`, (height, width) of the original.
        index: (B,) int64 indices in the listing.
        skipped: one line per skipped image with the file and the reason.
    """

    image: list[torch.Tensor]
    target: list[dict[str, Any]]
    index: torch.Tensor  # type: ignore[assignment]
    skipped: tuple[str, ...]


class CocoDataset(Dataset):
    """The images of a listing with their objects, transformed together.

    Args:
        listing: from `read_coco`.
        transform: (image, target) -> (image, target), e.g. from torchvision's v2; the image is PIL RGB, the target has
            `boxes`, `labels` and, if the data has masks, `masks` as tv_tensors; and if keypoints are read, what
            `data.detection_transforms.join_keypoints` takes. Seeded by (seed, epoch, index).
        seed: for the transform's random numbers.
        bad_images: "stop" or "skip", as in `ImageFolderDataset`.
        objects: whether targets include objects; otherwise only the image's `size`.
    """

    def __init__(
        self,
        listing: CocoListing,
        transform: Callable | None = None,
        *,
        seed: int = 0,
        bad_images: str = "stop",
        objects: bool = True,
    ):
        if bad_images not in ("stop", "skip"):
            raise UserError(f"bad_images must be 'stop' or 'skip', got {bad_images!r}")
        self.listing, self.transform, self.seed = listing, transform, seed
        self.bad_images, self.objects = bad_images, objects

    def __len__(self) -> int:
        return len(self.listing)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        try:
            image = self._read(index)
        except UserError as error:
            if self.bad_images == "skip" and not isinstance(error, StalledError):
                return Sample(None, {}, index, str(error))
            raise bad_image(error) from error
        target = self.target(index)
        if "boxes" in target:
            height, width = target["boxes"].canvas_size
            image = image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BOX)
        if self.transform is not None:
            with seeded(self.seed, epoch, index):
                image, target = self.transform(image, target)
        return Sample(image, target, index)

    def _read(self, index: int) -> Any:
        path, about = self.listing.path(index), self.listing.images[index]
        image = read_image(path)
        if image.size != (about.width, about.height):
            raise UserError(
                f"{path}: {image.width} x {image.height} pixels as displayed, "
                f"but {about.width} x {about.height} in {self.listing.json.name}"
            )
        return image

    def target(self, index: int) -> dict[str, Any]:
        """The objects of image `index`, before any transform; if their masks would be larger than `MASKS`, reduced."""
        about = self.listing.images[index]
        size = (about.height, about.width)
        if not self.objects:
            return {"size": size}
        objects = self.listing.objects_of(index)
        boxes = torch.tensor([box for _, box, _ in objects], dtype=torch.float32).reshape(-1, 4)
        canvas = bounded_size(len(objects), *size) if self.listing.has_masks else size
        if canvas != size:
            boxes *= torch.tensor([canvas[1] / size[1], canvas[0] / size[0]] * 2)
        target: dict[str, Any] = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=canvas),  # type: ignore[call-overload]
            "labels": torch.tensor([label + 1 for label, _, _ in objects], dtype=torch.int64),
            "size": size,
        }
        if self.listing.has_masks:
            masks = decode_masks([segmentation for _, _, segmentation in objects], *size, canvas)
            target["masks"] = tv_tensors.Mask(torch.from_numpy(masks))
        if self.listing.skeleton:
            # As boxes without area: torchvision's own keypoints come with 0.23, and mirror whole pixels.
            placed = torch.tensor(self.listing.keypoints_of(index), dtype=torch.float32)
            at = (placed[..., :2] + points.HALF).reshape(-1, 2).repeat(1, 2)
            target["points"] = tv_tensors.BoundingBoxes(at, format="XYXY", canvas_size=canvas)  # type: ignore[call-overload]
            target["visible"] = placed[..., 2]
        return target


def vanishing(listing: CocoListing, image_size: int | tuple[int, int] | None = None) -> list[str]:
    """A line that counts, by class, the objects that are not trained on because a side of their box is below a pixel
    after resizing to (short side, longest), if there are any; other scales of `--multi-scale` may lose more. Without
    a size: as large as the images are.

    Raises:
        UserError: all objects are.
    """
    short, longest = short_and_longest(image_size) if image_size else (math.inf, math.inf)
    gone: Counter[int] = Counter()
    kept: Counter[int] = Counter()
    for i, about in enumerate(listing.images):
        ratio = min(short / min(about.height, about.width), longest / max(about.height, about.width))
        ratio = ratio if image_size else 1.0
        factors = int(about.width * ratio) / about.width, int(about.height * ratio) / about.height
        for label, (x1, y1, x2, y2), _ in listing.objects_of(i):
            (kept if (x2 - x1) * factors[0] >= 1 and (y2 - y1) * factors[1] >= 1 else gone)[label] += 1
    if not gone:
        return []
    names = quoted([f"{listing.classes[label]} {count}" for label, count in gone.most_common()])
    number = "1 object is" if gone.total() == 1 else f"{gone.total()} objects are"
    where = f"at {short}x{longest}" if image_size else "of its image" if gone.total() == 1 else "of their images"
    what = f"{number} smaller than a pixel {where} and not trained on: {names}"
    if not kept:
        raise UserError(
            f"{listing.json}: all {what}; are the boxes in pixels?{' Or raise --image-size' if image_size else ''}"
        )
    if lost := [listing.classes[label] for label in gone if label not in kept]:
        what += f"; nothing is left of {quoted(lost)}"
    return [f"{listing.json.name}: {what}"]


def collate(samples: Sequence[Sample]) -> DetectionBatch:
    """Collate the readable samples; the others are listed in `batch.skipped`."""
    readable = [sample for sample in samples if sample.skipped is None]
    return DetectionBatch(
        [sample.image for sample in readable],
        [sample.target for sample in readable],
        torch.tensor([sample.index for sample in readable], dtype=torch.int64),
        tuple(sample.skipped for sample in samples if sample.skipped is not None),
    )
