"""Photographs with their classes in a table, `train.csv` and `val.csv` with the columns file and label. A plugin:

sgformer --plugin examples/csv_images.py train classify --data photos
"""

import csv
from pathlib import Path

import sgformer
from sgformer.data.imagefolder import ImageFolder


def detects(root):
    """Whether there is a train.csv."""
    return (Path(root) / "train.csv").is_file()


def open_csv(root, split, classes=None):
    """The images of a split, files relative to `root`."""
    table = Path(root) / f"{split}.csv"
    try:
        with table.open(newline="", encoding="utf-8") as file:
            rows = sorted((row["label"], row["file"]) for row in csv.DictReader(file))
    except FileNotFoundError:
        raise sgformer.UserError(f"{table}: no such file") from None
    except KeyError as column:
        raise sgformer.UserError(f"{table}: no column {column}") from None
    names = list(classes or dict.fromkeys(label for label, _ in rows))
    if unknown := {label for label, _ in rows} - set(names):
        raise sgformer.UserError(f"{table}: classes that training does not know: {', '.join(sorted(unknown))}")
    rows.sort(key=lambda row: (names.index(row[0]), row[1]))
    targets = tuple(names.index(label) for label, _ in rows)
    return ImageFolder(Path(root), split, tuple(names), tuple(file for _, file in rows), targets, folder=Path(root))


sgformer.register_format("csv", "classes", detects, open_csv)
