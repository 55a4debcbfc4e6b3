"""Curves of loss, scores and learning rate of a run, from its `metrics.csv`."""

from __future__ import annotations

from pathlib import Path

from sgformer.core.errors import UserError
from sgformer.core.parse import read_table
from sgformer.viz.style import COLOURS, figure


def read_metrics(table: str | Path) -> dict[str, list[tuple[float, float]]]:
    """Every column of a `metrics.csv` as (epoch, value) points; empty cells are skipped.

    Raises:
        UserError: the file is damaged.
        OSError: it cannot be read.
    """
    series: dict[str, list[tuple[float, float]]] = {}
    for number, row in enumerate(read_table(table), 2):
        for name, value in row.items():
            if value and name not in ("epoch", "step"):
                try:
                    series.setdefault(name, []).append((float(row["epoch"]), float(value)))
                except (KeyError, ValueError):
                    raise UserError(f"{table}: row {number} must hold numbers, one of them the epoch") from None
    return series


def draw_curves(table: str | Path, out: str | Path, scores: tuple[str, ...] = ("top1", "top5")) -> None:
    """Draw three panels: training and validation loss, scores in percent, learning rate.

    Args:
        table: a run's `metrics.csv`.
        out: the PNG to write.
        scores: columns of the middle panel, fractions in [0, 1]; the best value of the first one is marked.
    """
    series = read_metrics(table)
    panels = {
        "loss": [("train_loss", "training", 1), ("val_loss", "validation", 1)],
        "score, %": [(name, name, 100) for name in scores],
        "learning rate": [("lr", "", 1)],
    }
    with figure(out, 11, 3.2) as fig:
        for axes, (title, lines) in zip(fig.subplots(1, len(panels)), panels.items(), strict=True):
            lines = [line for line in lines if line[0] in series]
            for colour, (name, label, factor) in zip(COLOURS, lines, strict=False):
                points = series[name]
                x, y = [p[0] for p in points], [p[1] * factor for p in points]
                axes.plot(x, y, color=colour, label=label, marker="o" if len(points) < 2 else None, markersize=4)
            axes.set_title(title)
            axes.set_xlabel("epoch")
            axes.locator_params(axis="x", integer=True)
            if len(lines) > 1:
                axes.legend(loc="best")
            if title == "learning rate":
                axes.yaxis.set_major_formatter("{x:g}")
                axes.set_ylim(bottom=0)
            best = max(series.get(scores[0], []), key=lambda point: point[1], default=None)
            if title.startswith("score") and best:
                axes.plot(best[0], best[1] * 100, "o", color=COLOURS[0], markersize=5)
                axes.annotate(
                    f"{best[1] * 100:.1f}", (best[0], best[1] * 100), (0, -12), textcoords="offset points", ha="center"
                )
