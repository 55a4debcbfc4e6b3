"""Shared parts of the tasks' evaluations and reports: confusion matrices, tables, Markdown."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sgformer.core.files import make_folder, write_json, write_text
from sgformer.core.names import markdown
from sgformer.core.parse import read_json, read_rows
from sgformer.viz.confusion import draw_confusion


def facts_table(facts: Mapping[str, Any]) -> list[str]:
    """A Markdown table without a heading, one fact per row."""
    return ["| | |", "|---|---|", *(f"| {name} | {markdown(value)} |" for name, value in facts.items()), ""]


def taken_for(confusion: np.ndarray, names: Sequence[str], i: int) -> str:
    """The class that class `i` is most often confused with; "" if there is none."""
    others = np.where(np.arange(len(confusion)) == i, 0, confusion[i])
    return names[int(others.argmax())] if others.any() else ""


def write_confusion(result: Any, folder: Path, unit: str | None) -> None:
    """Write the files of a result that has `summary()`, `per_class()`, `confusion` and `class_names`; also a picture
    if `unit`, the unit of the counts, is given."""
    make_folder(folder)
    write_json(folder / "metrics.json", result.summary())
    rows = result.per_class()
    write_text(folder / "classes.csv", csv_text(list(rows[0]), [list(row.values()) for row in rows]))
    counts = [[name, *line] for name, line in zip(result.class_names, result.confusion.tolist(), strict=True)]
    write_text(folder / "confusion.csv", csv_text(["true \\ predicted", *result.class_names], counts))
    if unit:
        draw_confusion(result.confusion, result.class_names, folder / "confusion.png", unit)


def read_confusion(folder: Path) -> tuple[dict[str, Any], np.ndarray, tuple[str, ...]]:
    """Read the summary, the counts and the class names written by `write_confusion`.

    Raises:
        ValueError, LookupError, TypeError, AttributeError: they are not.
    """
    stored = read_json(folder / "metrics.json")
    numbers = {name: math.nan if value is None else value for name, value in stored.items()}
    header, *lines = read_rows(folder / "confusion.csv")
    counts, names = np.array([line[1:] for line in lines], dtype=np.int64), tuple(header[1:])
    if not names or counts.shape != (len(names), len(names)) or counts.min() < 0:
        raise ValueError(f"confusion.csv holds no counts of {len(names)} x {len(names)} classes")
    return numbers, counts, names


def class_tables(header: Sequence[str], ranked: Sequence[Sequence[Any]]) -> list[str]:
    """Markdown tables of classes from the hardest to the easiest; ten from each end if there are more than twenty."""
    tables = [("Classes, hardest first", ranked)]
    if len(ranked) > 20:
        tables = [("Hardest classes", ranked[:10]), ("Easiest classes", ranked[:-11:-1])]
    lines = []
    for title, rows in tables:
        lines += [f"## {title}", "", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
        lines += [f"| {' | '.join(map(markdown, row))} |" for row in rows]
        lines.append("")
    return lines


def show(pictures: Sequence[tuple[str, str]]) -> list[str]:
    """Markdown for pictures given as (title, file)."""
    return [line for title, file in pictures for line in (f"## {title}", "", f"![{title}]({file})", "")]


def csv_text(header: list[str], rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()
