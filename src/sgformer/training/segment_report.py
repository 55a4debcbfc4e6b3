"""The numbers of a semantic segmentation, all from one confusion matrix, and the files that tell them."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sgformer.training.report import _table, _write
from sgformer.viz.confusion import draw_confusion


@dataclass(frozen=True)
class SegmentationEvaluation:
    """How well pixels were labelled. Pixels without a class are in no number.

    Attributes:
        confusion: (classes, classes) pixel counts, true classes in rows, predicted in columns.
        loss: mean cross-entropy.
        images: how many were counted.
        class_names: one per class.
        skipped: one line for each unreadable image that was left out.
    """

    confusion: np.ndarray
    loss: float
    images: int
    class_names: tuple[str, ...]
    skipped: tuple[str, ...] = ()

    @property
    def iou(self) -> np.ndarray:
        """Intersection over union of each class; NaN for a class neither there nor predicted."""
        hits = np.diag(self.confusion)
        return _divide(hits, self.confusion.sum(0) + self.confusion.sum(1) - hits)

    @property
    def accuracy(self) -> np.ndarray:
        """The share of each class's pixels that were recognised; NaN for a class not there."""
        return _divide(np.diag(self.confusion), self.confusion.sum(1))

    @property
    def miou(self) -> float:
        """Mean of `iou` over the classes that have one."""
        return _mean(self.iou)

    @property
    def macc(self) -> float:
        """Mean of `accuracy` over the classes that have one."""
        return _mean(self.accuracy)

    @property
    def pixel_accuracy(self) -> float:
        """The share of all pixels that were recognised."""
        return float(_divide(np.diag(self.confusion).sum(), self.confusion.sum()))

    def summary(self) -> dict[str, Any]:
        """The numbers, as JSON takes them."""
        return {
            "miou": self.miou,
            "macc": self.macc,
            "pixel_accuracy": self.pixel_accuracy,
            "loss": self.loss,
            "images": self.images,
            "pixels": int(self.confusion.sum()),
            "skipped": list(self.skipped),
        }

    def headline(self) -> str:
        """The result in a line."""
        return (
            f"mIoU {100 * self.miou:.2f} %   mean accuracy {100 * self.macc:.2f} %   "
            f"pixel accuracy {100 * self.pixel_accuracy:.2f} %   loss {self.loss:.4f}"
        )

    def per_class(self) -> list[dict[str, Any]]:
        """One row per class: pixels, IoU, accuracy, and what its pixels were mostly taken for instead."""
        rows = []
        for i, name in enumerate(self.class_names):
            others = np.where(np.arange(len(self.confusion)) == i, 0, self.confusion[i])
            rows.append(
                {
                    "class": name,
                    "pixels": int(self.confusion[i].sum()),
                    "iou": None if np.isnan(self.iou[i]) else float(self.iou[i]),
                    "accuracy": None if np.isnan(self.accuracy[i]) else float(self.accuracy[i]),
                    "taken_for": self.class_names[int(others.argmax())] if others.any() else "",
                }
            )
        return rows

    def write(self, folder: str | os.PathLike[str], picture: bool = True) -> None:
        """`metrics.json`, `classes.csv`, `confusion.csv` and, on request, `confusion.png` in `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "metrics.json", json.dumps(self.summary(), indent=2) + "\n")
        rows = self.per_class()
        _write(folder / "classes.csv", _table(list(rows[0]), [list(row.values()) for row in rows]))
        counts = [[name, *line] for name, line in zip(self.class_names, self.confusion.tolist(), strict=True)]
        _write(folder / "confusion.csv", _table(["true \\ predicted", *self.class_names], counts))
        if picture:
            draw_confusion(self.confusion, self.class_names, folder / "confusion.png", "pixels")

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> SegmentationEvaluation:
        """What `write` left in `folder`."""
        folder = Path(folder)
        numbers = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        with (folder / "confusion.csv").open(newline="", encoding="utf-8") as file:
            header, *lines = csv.reader(file)
        counts = np.array([line[1:] for line in lines], dtype=np.int64)
        return cls(counts, numbers["loss"], numbers["images"], tuple(header[1:]), tuple(numbers["skipped"]))


def report(
    model: str, result: SegmentationEvaluation, facts: Mapping[str, Any], pictures: Sequence[tuple[str, str]]
) -> str:
    """Markdown: the result, facts about the run, classes from worst to best, pictures as (title, file)."""
    lines = [
        f"# {model}: {100 * result.miou:.2f} % mIoU",
        "",
        f"{result.images} validation images, {len(result.class_names)} classes.",
        "",
        "| | |",
        "|---|---|",
        f"| mIoU | {100 * result.miou:.2f} % |",
        f"| Mean class accuracy | {100 * result.macc:.2f} % |",
        f"| Pixel accuracy | {100 * result.pixel_accuracy:.2f} % |",
        f"| Loss | {result.loss:.4f} |",
        *(f"| {name} | {value} |" for name, value in facts.items()),
        "",
    ]
    ranked = sorted((row for row in result.per_class() if row["iou"] is not None), key=lambda row: row["iou"])
    tables = [("Classes, hardest first", ranked)]
    if len(ranked) > 20:
        tables = [("Hardest classes", ranked[:10]), ("Easiest classes", ranked[:-11:-1])]
    for title, rows in tables:
        lines += [f"## {title}", "", "| Class | Pixels | IoU | Accuracy | Mostly taken for |", "|---|---|---|---|---|"]
        for r in rows:
            accuracy = "" if r["accuracy"] is None else f"{100 * r['accuracy']:.1f} %"
            lines.append(f"| {r['class']} | {r['pixels']} | {100 * r['iou']:.1f} % | {accuracy} | {r['taken_for']} |")
        lines.append("")
    for title, file in pictures:
        lines += [f"## {title}", "", f"![{title}]({file})", ""]
    return "\n".join(lines)


def _divide(a: Any, b: Any) -> np.ndarray:
    return np.divide(a, b, out=np.full(np.shape(a), np.nan), where=np.asarray(b) > 0)


def _mean(values: np.ndarray) -> float:
    """Mean without NaN; NaN if nothing is left."""
    there = values[~np.isnan(values)]
    return float(there.mean()) if len(there) else float("nan")
