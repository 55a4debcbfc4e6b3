"""What the tasks' evaluations and reports share: confusion matrices and tables in files, Markdown."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sgformer.core.files import write_json, write_text
from sgformer.viz.confusion import draw_confusion


def facts_table(facts: Mapping[str, Any]) -> list[str]:
    """Markdown of a table without a heading, a fact a row."""
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items()), ""]


def taken_for(confusion: np.ndarray, names: Sequence[str], i: int) -> str:
    """What class `i` was mostly taken for instead; "" if it never was."""
    others = np.where(np.arange(len(confusion)) == i, 0, confusion[i])
    return names[int(others.argmax())] if others.any() else ""


def write_confusion(result: Any, folder: Path, unit: str | None) -> None:
    """The files of a result that has `summary()`, `per_class()`, `confusion` and `class_names`; a picture if `unit`
    says what was counted."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "metrics.json", result.summary())
    rows = result.per_class()
    write_text(folder / "classes.csv", csv_text(list(rows[0]), [list(row.values()) for row in rows]))
    counts = [[name, *line] for name, line in zip(result.class_names, result.confusion.tolist(), strict=True)]
    write_text(folder / "confusion.csv", csv_text(["true \\ predicted", *result.class_names], counts))
    if unit:
        draw_confusion(result.confusion, result.class_names, folder / "confusion.png", unit)


def read_confusion(folder: Path) -> tuple[dict[str, Any], np.ndarray, tuple[str, ...]]:
    """The summary, the counts and the class names that `write_confusion` left in `folder`."""
    stored = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    numbers = {name: math.nan if value is None else value for name, value in stored.items()}
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
