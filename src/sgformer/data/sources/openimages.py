"""Open Images: CSV files of boxes in fractions, or of classes, by ImageID; names of classes in a file of their own."""

from __future__ import annotations

import re
from pathlib import Path

from sgformer.core.errors import UserError
from sgformer.data.image import walk
from sgformer.data.sources.base import Found, Picture, Reading, Thing, first_files, head, number, read_csv

NOT_HERE = "annotations of images that are not here, left out"
ABSENT = "labels that say that a class is absent, left out"
GROUPS = "boxes around groups, kept as crowd regions"
SEVERAL = "images of several classes, left out"
BOX = ("XMin", "XMax", "YMin", "YMax")


def detects(root: Path) -> bool:
    """Whether a CSV file has the columns ImageID and LabelName."""
    return any({"ImageID", "LabelName"} <= set(_header(path)) for path in _tables(root))


def _tables(root: Path) -> list[Path]:
    return first_files(root, ".csv", count=50)


def _header(path: Path) -> list[str]:
    return [cell.strip() for cell in head(path).split("\n", 1)[0].split(",")]


def read(reading: Reading) -> Found:
    """See the package."""
    tables = {path: _header(path) for path in reading.files(".csv")}
    boxes = [path for path, names in tables.items() if {"ImageID", "LabelName", *BOX} <= set(names)]
    whole = [path for path, names in tables.items() if {"ImageID", "LabelName"} <= set(names) and path not in boxes]
    chosen = whole if reading.layout == "imagenet" else boxes
    if not chosen:
        what = (
            "classes (ImageID, LabelName, Confidence)" if reading.layout == "imagenet" else f"boxes ({', '.join(BOX)})"
        )
        raise UserError(f"{reading.root}: no CSV file of {what} for --layout {reading.layout}")
    names = _class_names(reading)
    pictures: dict[Path, Picture] = {}
    several: set[Path] = set()
    labels: set[str] = set()
    here: dict[str, Path | None] = {}
    for path in chosen:
        split = next((s for word in re.split(r"[-_.]", path.stem.lower()) if (s := _split(word))), "")
        rows = read_csv(path)
        for row, cells in enumerate(rows[1:], 2):
            line = dict(zip(tables[path], cells, strict=False))
            where = f"{path}, line {row}"
            key = line.get("ImageID") or ""
            if key not in here:
                here[key] = reading.image(key, path.parent) if key else None
                if (image := here[key]) is not None and image not in pictures:
                    size = reading.size(image)
                    here[key] = image if size else None
                    if size:
                        pictures[image] = Picture(image, split or reading.split(image), size)
            image = here[key]
            if image is None:
                reading.notes[NOT_HERE] += 1
                continue
            label = names.get(line.get("LabelName") or "", line.get("LabelName") or "")
            if not label:
                raise UserError(f"{where}: no LabelName")
            if reading.layout == "imagenet":
                if number(line.get("Confidence") or 1, where, "Confidence") < 0.5:
                    reading.notes[ABSENT] += 1
                    continue
                known = pictures[image].label
                if known not in (None, label):
                    several.add(image)
                pictures[image].label = label
            else:
                x1, x2, y1, y2 = (number(line.get(side), where, side) for side in BOX)
                if not all(-0.01 <= v <= 1.01 for v in (x1, x2, y1, y2)):
                    raise UserError(
                        f"{where}: {', '.join(BOX)} are fractions, 0 to 1; got {x1:g}, {x2:g}, {y1:g}, {y2:g}"
                    )
                group = line.get("IsGroupOf") == "1"
                reading.notes[GROUPS] += group
                width, height = pictures[image].size or (1, 1)
                box = (x1 * width, y1 * height, x2 * width, y2 * height)
                pictures[image].things.append(Thing(label, box, crowd=group))
            labels.add(label)
    reading.notes[SEVERAL] += len(several)
    kept = [p for p in pictures.values() if p.path not in several and (reading.layout != "imagenet" or p.label)]
    if reading.layout == "imagenet":
        labels = {p.label for p in kept if p.label}
    return Found(kept, tuple(sorted(labels)))


def _split(word: str) -> str:
    return {"train": "train", "validation": "val", "val": "val", "test": "test"}.get(word, "")


def _class_names(reading: Reading) -> dict[str, str]:
    """/m/0abc -> name, of class-descriptions*.csv beside the tables."""
    files = [reading.table] if reading.table else list(walk(reading.folder, (".csv",)))
    files = [path for path in files if reading.table or "class-descriptions" in path.name.lower()]
    rows = [row for path in files for row in read_csv(path) if len(row) == 2]
    return {key.strip(): name.strip() for key, name in rows if key.startswith("/")}
