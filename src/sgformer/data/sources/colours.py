"""Masks whose colours (or grey values) are classes, beside a table of them, as CVAT, CamVid and Roboflow have it.

A mask is a PNG, BMP or TIFF that has the stem of its image, maybe with an ending such as `_mask`, in a folder of masks
or beside it. Tables: `labelmap.txt` (name:r,g,b::), CSV with columns name, r, g, b (`class_dict.csv`) or with a pixel
value and a class (`_classes.csv`), JSON {name: [r, g, b]}, or lines `name r g b`, `name value`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sgformer.core.errors import UserError
from sgformer.data.ade20k import read_label_map
from sgformer.data.image import looked_at
from sgformer.data.sources.base import Found, Picture, Reading, read_csv, read_json, read_text, split_named

TABLES = ("labelmap.txt", "class_dict.csv", "class_dict_seg.csv", "_classes.csv", "colors.txt", "colours.txt",
          "colors.json", "colours.json", "colors.csv", "colours.csv", "label_colors.txt")  # fmt: skip
MASK_FOLDERS = re.compile(r"mask|label|annot|segmentationclass|(^|_)gt($|_)|ground.?truth", re.IGNORECASE)
MASK_ENDING = re.compile(r"[_-](mask|masks|label|labels|l|gt|seg|segmentation|color|colour|labelids)$", re.IGNORECASE)
MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff")
#: VOC's folder of masks whose colours are objects, not classes, in lower case.
OF_OBJECTS = "segmentationobject"
#: Classes that stand for "no class".
NONE = frozenset({"void", "ignore", "ignored", "__ignore__", "unlabeled", "unlabelled"})
NO_IMAGE, NO_MASK = "masks without an image, left out", "images without a mask, left out"
VOID = 255

Colour = tuple[int, ...]  # of one or three values


def detects(root: Path) -> bool:
    """Whether there is a table of colours."""
    return root.is_dir() and _table(root) is not None


def _table(root: Path) -> Path | None:
    for folder in (root, *(root / name for name in ("train", "annotations", "masks", "labels"))):
        for name in TABLES:
            if (folder / name).is_file():
                return folder / name
    return None


def read(reading: Reading) -> Found:
    """See the package."""
    source = reading.table or _table(reading.folder)
    if source is None:
        raise UserError(f"{reading.root}: no table of colours ({', '.join(TABLES[:4])} ...); name it with --table")
    table = read_table(source)
    names = list(dict.fromkeys(table.values()))
    classes = [name for name in names if name.lower() not in NONE]
    if void := [name for name in names if name.lower() in NONE]:
        reading.notes[f"classes that mean 'no class' ({', '.join(void)}): value 255"] += len(void)
    indices = {colour: classes.index(name) if name in classes else VOID for colour, name in table.items()}
    images: dict[tuple[str, str], Path] = {}
    masks: dict[tuple[str, str], Path] = {}
    for path in reading.images():
        base = next(p for p in reading.places if path.is_relative_to(p))
        folders = path.relative_to(base).parts[:-1]
        split = next((s for part in reversed(folders) if (s := _split(part))), "")
        stem = MASK_ENDING.sub("", path.stem)
        if any(part.lower() == OF_OBJECTS for part in folders):
            continue
        is_mask = any(MASK_FOLDERS.search(part) for part in folders) or stem != path.stem
        is_mask = is_mask and path.suffix.lower() in MASK_SUFFIXES
        files, key = (masks, (split, stem)) if is_mask else (images, (split, path.stem))
        if (other := files.setdefault(key, path)) != path:
            raise UserError(
                f"{other} and {path}: two {'masks' if is_mask else 'images'} of the same name, and images are paired "
                "with masks by their names: rename one, or convert each folder by itself"
            )
    reading.notes[NO_MASK] += len(images.keys() - masks.keys())
    reading.notes[NO_IMAGE] += len(masks.keys() - images.keys())
    pictures = []
    for key in sorted(images.keys() & masks.keys()):
        if (size := reading.size(images[key])) is None:
            continue
        labels_of = functools.partial(_labels, reading, masks[key], indices, source)
        pictures.append(Picture(images[key], key[0], size, labels_of=labels_of))
    return Found(pictures, tuple(classes))


def _split(folder: str) -> str:
    """`train`, and CamVid's `train_labels`."""
    return split_named(folder, folder.rpartition("_")[0], folder.partition("_")[0])


def read_table(path: Path) -> dict[Colour, str]:
    """Colour, or grey value, -> class name.

    Raises:
        UserError: the file is in none of the forms, or names a colour twice.
    """
    if path.suffix.lower() == ".json":
        content = read_json(path)
        if not isinstance(content, Mapping):
            raise UserError(f'{path}: expected {{"name": [r, g, b], ...}}')
        entries = [(str(name), value if isinstance(value, list) else [value]) for name, value in content.items()]
    elif path.suffix.lower() == ".csv":
        entries = _of_csv(path)
    else:
        lines = [line for line in read_text(path).splitlines() if line.strip() and not line.lstrip().startswith("#")]
        entries = [_of_line(line) for line in lines]
    table: dict[Colour, str] = {}
    for name, values in entries:
        colour = tuple(v for value in values if (v := _value(value)) is not None)
        if len(colour) not in (1, 3) or len(colour) != len(values) or not name:
            raise UserError(
                f"{path}: expected a class name and r, g, b (or one value), 0 to 255; got {name[:40]!r} {values}"
            )
        if table.setdefault(colour, name) != name:
            raise UserError(f"{path}: {table[colour]} and {name} have the same colour {', '.join(map(str, colour))}")
    if not table or len({len(colour) for colour in table}) > 1:
        raise UserError(f"{path}: expected a class name and r, g, b (or one value) a line")
    return table


def _value(value: Any) -> int | None:
    try:
        result = int(str(value).strip())
    except ValueError:
        return None
    return result if 0 <= result <= 255 else None


def _of_line(line: str) -> tuple[str, list[str]]:
    """`name:r,g,b::` of CVAT, `name r g b`, `r g b name`."""
    if ":" in line:
        name, _, rest = line.partition(":")
        return name.strip(), rest.partition(":")[0].split(",")
    words = line.replace(",", " ").replace(";", " ").split()
    digits = [word.isdigit() for word in words]
    for count in (3, 1):
        if len(words) > count and all(digits[-count:]):
            return " ".join(words[:-count]), words[-count:]
        if len(words) > count and all(digits[:count]):
            return " ".join(words[count:]), words[:count]
    return line.strip(), []


def _of_csv(path: Path) -> list[tuple[str, list[str]]]:
    rows = [row for row in read_csv(path) if any(cell.strip() for cell in row)]
    names = [cell.strip().lower() for cell in rows[0]] if rows else []
    if "pixel value" in names and "class" in names:
        value, name = names.index("pixel value"), names.index("class")
        return [(row[name].strip(), [row[value]]) for row in rows[1:] if len(row) > max(value, name)]
    rgb = next((c for c in (("r", "g", "b"), ("red", "green", "blue")) if set(c) <= set(names)), None)
    if rgb:
        name = next((i for i, n in enumerate(names) if n not in rgb), 0)
        columns = [names.index(channel) for channel in rgb]
        return [(row[name].strip(), [row[i] for i in columns]) for row in rows[1:] if len(row) > max(name, *columns)]
    return [_of_line(" ".join(row)) for row in rows]


def _labels(reading: Reading, path: Path, indices: Mapping[Colour, int], table: Path) -> np.ndarray | None:
    """As of `Picture.labels_of`."""
    pixels = reading.readable(lambda: _pixels(path, len(next(iter(indices)))))
    return None if pixels is None else class_indices(pixels, path, indices, table)


def _pixels(path: Path, channels: int) -> np.ndarray:
    """A mask as integers: its values, or its colours as r * 65536 + g * 256 + b."""
    if channels == 1:
        return read_label_map(path).astype(np.int64)
    # Not `read_image`, which puts transparent pixels on white: they keep their colour here.
    pixels = looked_at(lambda image: np.asarray(image.convert("RGB")).astype(np.int64), path, None)
    return pixels[..., 0] * 65536 + pixels[..., 1] * 256 + pixels[..., 2]


def class_indices(flat: np.ndarray, path: Path, indices: Mapping[Colour, int], table: Path) -> np.ndarray:
    """The class of every pixel of a mask: (H, W) uint8, 255 for none.

    Raises:
        UserError: the mask has a colour that the table lacks; names a pixel of it.
    """
    words = "value" if len(next(iter(indices))) == 1 else "colour"
    keys = {functools.reduce(lambda key, value: key * 256 + value, colour): i for colour, i in indices.items()}
    present, inverse = np.unique(flat, return_inverse=True)
    unknown = [int(value) for value in present if int(value) not in keys]
    if unknown:
        row, column = np.argwhere(flat == unknown[0])[0].tolist()
        shown = unknown[0] if words == "value" else f"{unknown[0] >> 16}, {unknown[0] >> 8 & 255}, {unknown[0] & 255}"
        share = np.isin(flat, unknown).mean()
        raise UserError(
            f"{path}: {len(unknown)} {words}s are not in {table}: {share:.1%} of the pixels, the first {shown} at "
            f"row {row}, column {column}; add them, or save the mask without smoothing and loss"
        )
    lookup = np.array([keys[int(value)] for value in present], np.uint8)
    return lookup[inverse.reshape(flat.shape)]
