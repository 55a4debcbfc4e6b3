"""Write data sets of other tools in the layouts that training reads.

Images are copied byte for byte; the output appears when it is complete.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sgformer.core.errors import UserError
from sgformer.core.files import replacing, write_json
from sgformer.core.names import some
from sgformer.core.progress import track
from sgformer.data import sources
from sgformer.data.coco import bounds, decode_mask, make_listing, mask_of_box
from sgformer.data.layouts import OWN, own_layout
from sgformer.data.sources.base import Found, Picture
from sgformer.data.store import appearing, new_folder

#: Folder names of the splits.
FOLDERS = {
    "coco": {"train": "train", "val": "val", "test": "test"},
    "ade20k": {"train": "training", "val": "validation", "test": "test"},
    "imagenet": {"train": "train", "val": "val", "test": "test"},
}


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    layout: str,
    form: str | None = None,
    images: str | os.PathLike[str] | None = None,
    table: str | os.PathLike[str] | None = None,
    bad_images: str = "stop",
) -> tuple[dict[str, int], Found]:
    """Write a data set of another tool in a layout that training reads.

    Args:
        source: file or folder.
        out: folder to create.
        layout: "coco", "ade20k" or "imagenet".
        form, images, table, bad_images: see `data.sources.read`.

    Returns:
        Images per split, and the data set; its notes count what was left out or taken otherwise.

    Raises:
        UserError: the source is in no known format or damaged, lacks what the layout needs, or `out` is not empty.
    """
    if layout not in FOLDERS:
        raise UserError(f"--layout is one of {', '.join(FOLDERS)}, got {layout}")
    out = new_folder(out)
    if form is None and sources.recognize(source) is None and (own := own_layout(Path(source))) is not None:
        raise UserError(f"{source}: this is {OWN[own]} as it is; it does not become another layout")
    found = sources.read(source, layout, form, images, table, bad_images)
    if not found.classes:
        raise UserError(f"{source}: holds no {sources.LAYOUTS[layout]}, which --layout {layout} needs")
    writer = {"coco": write_coco, "ade20k": write_ade20k, "imagenet": write_imagenet}[layout]
    splits = {split: [p for p in found.pictures if (p.split or "train") == split] for split in FOLDERS[layout]}
    splits = {split: pictures for split, pictures in splits.items() if pictures}
    with appearing(out) as part:
        writer(found, splits, part, source)
        splits = {split: pictures for split, pictures in splits.items() if pictures}
        if not splits:
            raise UserError(f"{source}: no image of it can be read")
    return {split: len(pictures) for split, pictures in splits.items()}, found


def write_coco(found: Found, splits: dict[str, list[Picture]], out: Path, source: Any) -> None:
    """`annotations/instances_SPLIT.json` and the images in `SPLIT/`."""
    if any(p.labels_of or p.label for p in found.pictures):
        raise UserError(f"{source}: has no objects with boxes or outlines, which --layout coco needs")
    ids = {name: i for i, name in enumerate(found.classes, 1)}
    for split, pictures in splits.items():
        content: dict[str, list[Any]] = {"images": [], "annotations": [], "categories": []}
        content["categories"] = [{"id": i, "name": name} for name, i in ids.items()]
        for number, (picture, name) in enumerate(_named(pictures, split), 1):
            _copy(picture, out / FOLDERS["coco"][split] / name)
            width, height = picture.size or (0, 0)
            content["images"].append({"id": number, "file_name": name, "width": width, "height": height})
            for thing in picture.things:
                entry: dict[str, Any] = {
                    "id": len(content["annotations"]) + 1,
                    "image_id": number,
                    "category_id": ids[thing.label],
                    "iscrowd": int(thing.crowd),
                }
                box = thing.box
                if thing.polygons:
                    entry["segmentation"] = thing.polygons
                    if box is None and isinstance(thing.polygons, list):
                        box = bounds(thing.polygons)
                if box is not None:
                    entry["bbox"] = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
                    entry["area"] = entry["bbox"][2] * entry["bbox"][3]
                if isinstance(thing.polygons, list) and thing.polygons:
                    entry["area"] = sum(_area(polygon) for polygon in thing.polygons)
                content["annotations"].append(entry)
        make_listing(content, source, out / FOLDERS["coco"][split])  # what training would refuse is not written
        (out / "annotations").mkdir(exist_ok=True)
        write_json(out / "annotations" / f"instances_{split}.json", content, indent=None)


def _area(polygon: Sequence[float]) -> float:
    """Of a polygon [x1, y1, x2, y2, ...] in square pixels."""
    x, y = np.asarray(polygon[::2], np.float64), np.asarray(polygon[1::2], np.float64)
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


def write_ade20k(found: Found, splits: dict[str, list[Picture]], out: Path, source: Any) -> None:
    """`images/SPLIT/*`, `annotations/SPLIT/*.png` and `classes.txt`; objects are drawn in their order."""
    with_masks = any(p.labels_of for p in found.pictures)
    boxes = sum(t.polygons is None for p in found.pictures for t in p.things)
    if any(p.label for p in found.pictures) or boxes or not (with_masks or any(p.things for p in found.pictures)):
        what = f"{boxes} objects with a box only" if boxes else "no outlines or masks"
        raise UserError(f"{source}: has {what}; --layout ade20k needs the outline of every object")
    classes = list(found.classes)
    if not with_masks:
        ground = next((name for name in classes if name.lower() in ("background", "_background_")), None)
        classes = [ground or "background", *(name for name in classes if name != ground)]
    if len(classes) > 255:
        raise UserError(f"{source}: {len(classes)} classes; label maps of 8 bits hold 255")
    index_of = {
        name: 255 if name == "__ignore__" else i for i, name in enumerate(n for n in classes if n != "__ignore__")
    }
    for split, pictures in splits.items():
        folder = FOLDERS["ade20k"][split]
        for picture, name in track(_named(pictures, split, by_stem=True), len(pictures), f"writing {folder}"):
            values = picture.labels_of() if picture.labels_of else _drawn(picture, index_of)
            if values is None:
                pictures.remove(picture)
                continue
            if picture.size and values.shape != (picture.size[1], picture.size[0]):
                height, width = values.shape
                raise UserError(
                    f"{picture.path}: {picture.size[0]} x {picture.size[1]} pixels, its mask {width} x {height}"
                )
            _copy(picture, out / "images" / folder / name)
            label_map = out / "annotations" / folder / f"{os.path.splitext(name)[0]}.png"
            label_map.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(values.astype(np.uint8)).save(label_map)
    with replacing(out / "classes.txt") as unfinished:
        unfinished.write_text("".join(f"{name}\n" for name in classes if name != "__ignore__"), encoding="utf-8")


def _drawn(picture: Picture, index_of: dict[str, int]) -> np.ndarray:
    width, height = picture.size or (0, 0)
    values = np.zeros((height, width), np.uint8)
    for thing in picture.things:
        polygons = thing.polygons if thing.polygons else mask_of_box(thing.box or (0, 0, 0, 0))
        if isinstance(polygons, list):
            polygons = [polygon for polygon in polygons if len(polygon) >= 6]
        if polygons and not thing.crowd:
            values[decode_mask(polygons, height, width) > 0] = index_of[thing.label]
    return values


def write_imagenet(found: Found, splits: dict[str, list[Picture]], out: Path, source: Any) -> None:
    """`SPLIT/CLASS/*`."""
    if any(p.label is None for p in found.pictures):
        raise UserError(f"{source}: has no class per image, which --layout imagenet needs")
    folders = {
        name: name.replace("/", "_").replace("\\", "_").replace("\0", "_").lstrip(".") or "_" for name in found.classes
    }
    if len({*folders.values()}) < len(folders):
        twins = [name for name, n in Counter(folders.values()).items() if n > 1]
        raise UserError(f"{source}: different classes would have the same folder: {some(twins)}")
    if long := [name for name in folders.values() if len(name.encode("utf-8", "replace")) > 255]:
        raise UserError(f"{source}: a class name is too long for a folder: {long[0][:40]} ...")
    changed = [name for name, folder in folders.items() if name != folder]
    if changed:
        found.notes[f"classes whose folder is named otherwise ({some(changed)})"] += len(changed)
    for split, pictures in splits.items():
        for picture, name in track(_named(pictures, split), len(pictures), f"copying {split}"):
            _copy(picture, out / FOLDERS["imagenet"][split] / folders[picture.label or ""] / name)


def _named(pictures: Sequence[Picture], split: str, by_stem: bool = False) -> list[tuple[Picture, str]]:
    """Each picture with a name of its own: the file's, with the names of its folders if others are called the same."""
    key = (lambda name: os.path.splitext(name)[0].lower()) if by_stem else str.lower
    counts = Counter(key(picture.path.name) for picture in pictures)
    result, taken = [], set()
    for picture in pictures:
        name = picture.path.name
        if counts[key(name)] > 1:
            name = "_".join(part for part in picture.path.parts[-3:] if part not in ("/", "..", "."))
        stem, suffix = os.path.splitext(name)
        number = 1
        while key(name) in taken:
            number += 1
            name = f"{stem}-{number}{suffix}"
        taken.add(key(name))
        result.append((picture, name))
    return result


def _copy(picture: Picture, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if picture.data is not None:
        path.write_bytes(picture.data)
    else:
        shutil.copyfile(picture.path, path)
