"""The metrics of semantic segmentation, all from one confusion matrix, and their files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sgformer.training.report import class_tables, facts_table, read_confusion, show, taken_for, write_confusion


@dataclass(frozen=True)
class SegmentationEvaluation:
    """The metrics of a segmentation network. Pixels without a class do not count.

    Attributes:
        confusion: (classes, classes) pixel counts, true classes in rows, predicted in columns.
        loss: mean cross-entropy.
        images: number of images counted.
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
        """Intersection over union of each class; NaN for a class neither present nor predicted."""
        hits = np.diag(self.confusion)
        return _divide(hits, self.confusion.sum(0) + self.confusion.sum(1) - hits)

    @property
    def accuracy(self) -> np.ndarray:
        """The fraction of each class's pixels that are labelled correctly; NaN for an absent class."""
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
        """The fraction of all pixels that are labelled correctly."""
        return float(_divide(np.diag(self.confusion).sum(), self.confusion.sum()))

    def summary(self) -> dict[str, Any]:
        """The metrics, as stored in JSON."""
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
        """The result in one line."""
        return (
            f"mIoU {100 * self.miou:.2f} %   mean accuracy {100 * self.macc:.2f} %   "
            f"pixel accuracy {100 * self.pixel_accuracy:.2f} %   loss {self.loss:.4f}"
        )

    def table(self) -> str:
        """All metrics, for a terminal."""
        return self.headline()

    def counted(self) -> str:
        """The size of the split."""
        return f"{self.images} images of {len(self.class_names)} classes"

    def per_class(self) -> list[dict[str, Any]]:
        """One row per class: pixels, IoU, accuracy, and the commonest wrong class."""
        rows = []
        for i, name in enumerate(self.class_names):
            rows.append(
                {
                    "class": name,
                    "pixels": int(self.confusion[i].sum()),
                    "iou": None if np.isnan(self.iou[i]) else float(self.iou[i]),
                    "accuracy": None if np.isnan(self.accuracy[i]) else float(self.accuracy[i]),
                    "taken_for": taken_for(self.confusion, self.class_names, i),
                }
            )
        return rows

    def write(self, folder: str | os.PathLike[str], picture: bool = True) -> None:
        """`metrics.json`, `classes.csv`, `confusion.csv` and, on request, `confusion.png` in `folder`."""
        write_confusion(self, Path(folder), "pixels" if picture else None)

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> SegmentationEvaluation:
        """Read what `write` wrote to `folder`."""
        numbers, counts, names = read_confusion(Path(folder))
        return cls(counts, numbers["loss"], numbers["images"], names, tuple(numbers["skipped"]))


def report(
    model: str, result: SegmentationEvaluation, facts: Mapping[str, Any], pictures: Sequence[tuple[str, str]]
) -> str:
    """Markdown: the result, facts about the run, classes from worst to best, pictures as (title, file)."""
    lines = [
        f"# {model}: {100 * result.miou:.2f} % mIoU",
        "",
        f"{result.images} validation images, {len(result.class_names)} classes.",
        "",
        *facts_table(
            {
                "mIoU": f"{100 * result.miou:.2f} %",
                "Mean class accuracy": f"{100 * result.macc:.2f} %",
                "Pixel accuracy": f"{100 * result.pixel_accuracy:.2f} %",
                "Loss": f"{result.loss:.4f}",
                **facts,
            }
        ),
    ]
    ranked = sorted((row for row in result.per_class() if row["iou"] is not None), key=lambda row: row["iou"])
    lines += class_tables(
        ["Class", "Pixels", "IoU", "Accuracy", "Mostly taken for"],
        [[r["class"], r["pixels"], _percent(r["iou"]), _percent(r["accuracy"]), r["taken_for"]] for r in ranked],
    )
    return "\n".join([*lines, *show(pictures)])


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _divide(a: Any, b: Any) -> np.ndarray:
    return np.divide(a, b, out=np.full(np.shape(a), np.nan), where=np.asarray(b) > 0)


def _mean(values: np.ndarray) -> float:
    """Mean without NaN; NaN if nothing is left."""
    there = values[~np.isnan(values)]
    return float(there.mean()) if len(there) else float("nan")


read = SegmentationEvaluation.read
