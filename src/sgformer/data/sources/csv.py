"""CSV lists: a file and its label a line, or a file, a label and a box, as spreadsheets and TensorFlow have it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sgformer.core.errors import UserError
from sgformer.core.parse import parse_csv
from sgformer.data.image import IMAGE_EXTENSIONS
from sgformer.data.sources.base import (
    Found,
    Picture,
    Reading,
    Thing,
    first_files,
    head,
    number,
    read_csv,
    split_named,
)

FILE = (
    "file",
    "filename",
    "file_name",
    "image",
    "image_path",
    "image_name",
    "img",
    "path",
    "filepath",
    "image_id",
    "id",
)
LABEL = ("label", "class", "class_name", "labels", "category", "target", "label_name", "name", "breed", "species")
SPLIT = ("split", "set", "subset", "data set", "dataset", "fold")
CORNERS = (("xmin", "ymin", "xmax", "ymax"), ("x1", "y1", "x2", "y2"), ("left", "top", "right", "bottom"))
REPEATED = "lines listed twice, read once"
WITHOUT = "lines without a label, left out"


def detects(root: Path) -> bool:
    """Whether a CSV file has columns of files and of labels."""
    return any(_is_table(path) for path in first_files(root, ".csv", ".tsv"))


def _is_table(path: Path) -> bool:
    rows = _rows(head(path).rpartition("\n")[0] or head(path))[:1]
    return (_columns(rows) or _two_columns(rows)) is not None


def read(reading: Reading) -> Found:
    """See the package."""
    tables = [path for path in reading.files(".csv", ".tsv") if reading.root.is_file() or _is_table(path)]
    by_image: dict[tuple[Path, str], Picture] = {}
    labels: dict[str, None] = {}
    missing: list[str] = []
    for path in tables:
        rows = read_csv(path, _delimiter(head(path)))
        columns = _columns(rows[:1])
        first = 1 if columns is None else 2
        columns = columns or _two_columns(rows)
        if columns is None:
            raise UserError(
                f"{path}: expected a line of column names, with one of {', '.join(FILE[:5])} ... and one of "
                f"{', '.join(LABEL[:4])} ...; or two columns, a file and its label"
            )
        of_file = split_named(path.stem.lower(), *reversed(path.relative_to(reading.folder).parts[:-1]))
        for row, cells in enumerate(rows[first - 1 :], first):
            where = f"{path}, line {row}"
            if not any(cells):
                continue
            if len(cells) <= max(columns.values()):
                raise UserError(f"{where}: {len(cells)} columns, expected {max(columns.values()) + 1}")
            name, label = cells[columns["file"]].strip(), cells[columns["label"]].strip()
            image = reading.image(name, path.parent)
            if image is None:
                missing.append(name)
                continue
            split = split_named(cells[columns["split"]].strip()) if "split" in columns else ""
            split = split or of_file
            picture = by_image.get((image, split))
            if picture is None:
                if (size := reading.size(image)) is None:
                    continue
                picture = by_image[image, split] = Picture(image, split, size)
            if not label:
                if "box0" not in columns:
                    reading.notes[WITHOUT] += 1
                    if picture.label is None:
                        del by_image[image, split]
                continue
            labels[label] = None
            if "box0" in columns:
                x1, y1, x2, y2 = (number(cells[columns[f"box{i}"]], where, "a corner") for i in range(4))
                picture.things.append(Thing(label, (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))))
            elif picture.label is None:
                picture.label = label
            elif picture.label == label:
                reading.notes[REPEATED] += 1
            else:
                raise UserError(f"{where}: {name} is of class {label!r}, and of {picture.label!r} before")
    reading.missing(missing, reading.root)
    return Found(list(by_image.values()), tuple(sorted(labels)))


def _delimiter(text: str) -> str:
    return max(",;\t", key=text.split("\n", 1)[0].count)


def _rows(text: str) -> list[list[str]]:
    """Of the beginning of a table; empty if it is none."""
    try:
        return parse_csv(text, "", _delimiter(text))
    except UserError:
        return []


def _columns(rows: Sequence[Sequence[str]]) -> dict[str, int] | None:
    """What the columns hold, by a line of their names; None if it names no file or no label."""
    if not rows:
        return None
    names = [cell.strip().lower() for cell in rows[0]]
    found = {}
    for what, words in (("file", FILE), ("label", LABEL), ("split", SPLIT)):
        if (word := next((word for word in words if word in names), None)) is not None:
            found[what] = names.index(word)
    for corners in CORNERS:
        if all(corner in names for corner in corners):
            found |= {f"box{i}": names.index(corner) for i, corner in enumerate(corners)}
            break
    return found if {"file", "label"} <= found.keys() else None


def _two_columns(rows: Sequence[Sequence[str]]) -> dict[str, int] | None:
    """Of a table without names of columns: the one with names of images, and the other one."""
    if rows and len(rows[0]) == 2:
        for file in (0, 1):
            if Path(rows[0][file].strip()).suffix.lower() in IMAGE_EXTENSIONS:
                return {"file": file, "label": 1 - file}
    return None
