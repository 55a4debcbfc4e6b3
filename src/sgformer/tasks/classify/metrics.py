"""The metrics of a classifier, and their files."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sgformer.training.report import (
    class_tables,
    facts_table,
    read_confusion,
    show,
    taken_for,
    write_confusion,
)


@dataclass(frozen=True)
class Evaluation:
    """The metrics of a classifier on a set of images.

    Attributes:
        top1, top5: fractions of images whose class ranks first, among the first five.
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
        """Number of images counted."""
        return int(self.confusion.sum())

    @property
    def balanced_accuracy(self) -> float:
        """Mean over classes of the fraction of their images that is classified correctly, a fraction."""
        return balanced_accuracy(self.confusion)

    def headline(self) -> str:
        """The result in one line."""
        return f"top-1 {100 * self.top1:.2f} %, top-5 {100 * self.top5:.2f} %"

    def table(self) -> str:
        """All metrics, for a terminal."""
        shares = {"top-1": self.top1, "top-5": self.top5, "balanced accuracy": self.balanced_accuracy}
        return "   ".join([*(f"{name} {100 * v:.2f} %" for name, v in shares.items()), f"loss {self.loss:.4f}"])

    def counted(self) -> str:
        """The size of the split."""
        return f"{self.images} images of {len(self.class_names)} classes"

    def summary(self) -> dict[str, Any]:
        """The metrics, as stored in JSON."""
        return {
            "top1": self.top1,
            "top5": self.top5,
            "balanced_accuracy": self.balanced_accuracy,
            "loss": self.loss,
            "images": self.images,
            "skipped": list(self.skipped),
        }

    def per_class(self) -> list[dict[str, Any]]:
        """One row per class: images, number and fraction classified correctly, and the commonest wrong class."""
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
        """Read what `write` wrote to `folder`."""
        numbers, counts, names = read_confusion(Path(folder))
        return cls(numbers["top1"], numbers["top5"], numbers["loss"], counts, names, tuple(numbers["skipped"]))


def balanced_accuracy(confusion: np.ndarray) -> float:
    """The mean recall of the classes that have images; NaN if none has.

    Args:
        confusion: (classes, classes) counts, true classes in rows.
    """
    images = confusion.sum(1)
    present = images > 0
    return float(np.mean(confusion.diagonal()[present] / images[present])) if present.any() else math.nan


def report(model: str, evaluation: Evaluation, facts: Mapping[str, Any], pictures: Sequence[tuple[str, str]]) -> str:
    """Markdown: the result, facts about the run, best and worst classes, pictures as (title, file)."""
    lines = [
        f"# {model}: {100 * evaluation.top1:.2f} % top-1",
        "",
        f"{evaluation.images} validation images, {len(evaluation.class_names)} classes; weights of the best epoch.",
        "",
        *facts_table(
            {
                "Top-1": f"{100 * evaluation.top1:.2f} %",
                "Top-5": f"{100 * evaluation.top5:.2f} %",
                "Balanced accuracy (mean over classes)": f"{100 * evaluation.balanced_accuracy:.2f} %",
                "Loss": f"{evaluation.loss:.4f}",
                **facts,
            }
        ),
    ]
    ranked = sorted((row for row in evaluation.per_class() if row["images"]), key=lambda row: row["accuracy"])
    lines += class_tables(
        ["Class", "Images", "Correct", "Mostly taken for"],
        [[r["class"], r["images"], f"{100 * r['accuracy']:.1f} %", r["taken_for"]] for r in ranked],
    )
    return "\n".join([*lines, *show(pictures)])


read = Evaluation.read
