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
            rows.append(
                {
                    "class": name,
                    "images": int(counts.sum()),
                    "correct": int(counts[i]),
                    "accuracy": float(counts[i] / counts.sum()) if counts.sum() else None,
                    "taken_for": taken_for(self.confusion, self.class_names, i),
                }
            )
        return rows

    def write(self, folder: str | os.PathLike[str], picture: bool = True) -> None:
        """`metrics.json`, `classes.csv`, `confusion.csv` and, on request, `confusion.png` in `folder`."""
        write_confusion(self, Path(folder), "images" if picture else None)

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Evaluation:
        """What `write` left in `folder`."""
        numbers, counts, names = read_confusion(Path(folder))
        return cls(numbers["top1"], numbers["top5"], numbers["loss"], counts, names, tuple(numbers["skipped"]))


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
    lines += class_tables(
        ["Class", "Images", "Correct", "Mostly taken for"],
        [[r["class"], r["images"], f"{100 * r['accuracy']:.1f} %", r["taken_for"]] for r in ranked],
    )
    return "\n".join([*lines, *show(pictures)])


def taken_for(confusion: np.ndarray, names: Sequence[str], i: int) -> str:
    """What class `i` was mostly taken for instead; "" if it never was."""
    others = np.where(np.arange(len(confusion)) == i, 0, confusion[i])
    return names[int(others.argmax())] if others.any() else ""


def write_confusion(result: Any, folder: Path, unit: str | None) -> None:
    """The files of a result that has `summary()`, `per_class()`, `confusion` and `class_names`; a picture if `unit`
    says what was counted."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "metrics.json", json.dumps(result.summary(), indent=2) + "\n")
    rows = result.per_class()
    write_text(folder / "classes.csv", csv_text(list(rows[0]), [list(row.values()) for row in rows]))
    counts = [[name, *line] for name, line in zip(result.class_names, result.confusion.tolist(), strict=True)]
    write_text(folder / "confusion.csv", csv_text(["true \\ predicted", *result.class_names], counts))
    if unit:
        draw_confusion(result.confusion, result.class_names, folder / "confusion.png", unit)


def read_confusion(folder: Path) -> tuple[dict[str, Any], np.ndarray, tuple[str, ...]]:
    """The summary, the counts and the class names that `write_confusion` left in `folder`."""
    numbers = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    with (folder / "confusion.csv").open(newline="", encoding="utf-8") as file:
        header, *lines = csv.reader(file)
    return numbers, np.array([line[1:] for line in lines], dtype=np.int64), tuple(header[1:])


def class_tables(header: Sequence[str], ranked: Sequence[Sequence[Any]]) -> list[str]:
    """Markdown of classes from the hardest to the easiest; the ten at both ends if there are more than twenty."""
    tables = [("Classes, hardest first", ranked)]
    if len(ranked) > 20:
        tables = [("Hardest classes", ranked[:10]), ("Easiest classes", ranked[:-11:-1])]
    lines = []
    for title, rows in tables:
        lines += [f"## {title}", "", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
        lines += [f"| {' | '.join(map(str, row))} |" for row in rows]
        lines.append("")
    return lines


def show(pictures: Sequence[tuple[str, str]]) -> list[str]:
    """Markdown of pictures, (title, file) each."""
    return [line for title, file in pictures for line in (f"## {title}", "", f"![{title}]({file})", "")]


def csv_text(header: list[str], rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def write_text(path: Path, text: str) -> None:
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
