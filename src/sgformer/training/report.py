"""The numbers of an evaluation, and the files that tell them."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sgformer.viz.confusion import draw_confusion


@dataclass(frozen=True)
class Evaluation:
    """How a classifier did on a set of images.

    Attributes:
        top1, top5: fractions of images whose class is the first, among the first five.
        loss: mean cross-entropy.
        confusion: (classes, classes) image counts, true classes in rows, predicted in columns.
        class_names: one per class.
        skipped: one line for each unreadable image that was left out.
    """

    top1: float
    top5: float
    loss: float
    confusion: np.ndarray
    class_names: tuple[str, ...]
    skipped: tuple[str, ...] = ()

    @property
    def images(self) -> int:
        """How many images were counted."""
        return int(self.confusion.sum())

    def headline(self) -> str:
        """The result in a line."""
        return f"top-1 {100 * self.top1:.2f} %, top-5 {100 * self.top5:.2f} %"

    def summary(self) -> dict[str, Any]:
        """The numbers, as JSON takes them."""
        return {
            "top1": self.top1,
            "top5": self.top5,
            "loss": self.loss,
            "images": self.images,
            "skipped": list(self.skipped),
        }

    def per_class(self) -> list[dict[str, Any]]:
        """One row per class: images, how many were recognised, the share, and what it was mostly taken for instead."""
        rows = []
        for i, name in enumerate(self.class_names):
            counts = self.confusion[i]
            others = np.where(np.arange(len(counts)) == i, 0, counts)
            rows.append(
                {
                    "class": name,
                    "images": int(counts.sum()),
                    "correct": int(counts[i]),
                    "accuracy": float(counts[i] / counts.sum()) if counts.sum() else None,
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
            draw_confusion(self.confusion, self.class_names, folder / "confusion.png")

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Evaluation:
        """What `write` left in `folder`."""
        folder = Path(folder)
        numbers = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        with (folder / "confusion.csv").open(newline="", encoding="utf-8") as file:
            header, *lines = csv.reader(file)
        return cls(
            top1=numbers["top1"],
            top5=numbers["top5"],
            loss=numbers["loss"],
            confusion=np.array([line[1:] for line in lines], dtype=np.int64),
            class_names=tuple(header[1:]),
            skipped=tuple(numbers["skipped"]),
        )


def report(model: str, evaluation: Evaluation, facts: Mapping[str, Any], pictures: Sequence[tuple[str, str]]) -> str:
    """Markdown: the result, facts about the run, best and worst classes, pictures as (title, file)."""
    lines = [
        f"# {model}: {100 * evaluation.top1:.2f} % top-1",
        "",
        f"{evaluation.images} validation images, {len(evaluation.class_names)} classes; weights of the best epoch.",
        "",
        "| | |",
        "|---|---|",
        f"| Top-1 | {100 * evaluation.top1:.2f} % |",
        f"| Top-5 | {100 * evaluation.top5:.2f} % |",
        f"| Loss | {evaluation.loss:.4f} |",
        *(f"| {name} | {value} |" for name, value in facts.items()),
        "",
    ]
    ranked = sorted((row for row in evaluation.per_class() if row["images"]), key=lambda row: row["accuracy"])
    tables = [("Classes, hardest first", ranked)]
    if len(ranked) > 20:
        tables = [("Hardest classes", ranked[:10]), ("Easiest classes", ranked[:-11:-1])]
    for title, rows in tables:
        lines += [f"## {title}", "", "| Class | Images | Correct | Mostly taken for |", "|---|---|---|---|"]
        lines += [f"| {r['class']} | {r['images']} | {100 * r['accuracy']:.1f} % | {r['taken_for']} |" for r in rows]
        lines.append("")
    for title, file in pictures:
        lines += [f"## {title}", "", f"![{title}]({file})", ""]
    return "\n".join(lines)


def _table(header: list[str], rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def _write(path: Path, text: str) -> None:
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
