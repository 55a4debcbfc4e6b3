"""Pictures of an ablation: a dot per run, and the score of each run over its epochs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from sgformer.viz.style import COLOURS, FAINT, INK, figure


def draw_ablation(rows: Sequence[tuple[str, Sequence[float]]], out: str | Path, score: str) -> None:
    """Draw a dot for each run, a bar at each mean, and a dotted line at the first variant's mean.

    Args:
        rows: name and scores of each variant, scores in percent.
        out: the PNG to write.
        score: the name of the score, for the axis label.
    """
    with figure(out, 6.4, 0.34 * len(rows) + 0.85) as fig:
        axes = fig.subplots()
        axes.axvline(statistics.mean(rows[0][1]), color=INK, linewidth=1, linestyle=":", zorder=0)
        for place, (_, scores) in enumerate(rows):
            axes.plot(
                [min(scores), max(scores)], [place, place], color=FAINT, linewidth=4, solid_capstyle="round", zorder=1
            )
            axes.plot(scores, [place] * len(scores), "o", color=COLOURS[0], markersize=5, alpha=0.8, markeredgewidth=0)
            axes.plot(statistics.mean(scores), place, "|", color=INK, markersize=14, markeredgewidth=2)
        axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        axes.invert_yaxis()
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        axes.margins(y=0.12)
        axes.set_xlabel(f"{score}, % (dots: runs; bars: means)")


def draw_runs(runs: Sequence[tuple[str, Sequence[tuple[float, float]]]], out: str | Path, score: str) -> None:
    """Draw the validation score of each run over its epochs; runs of one variant share a colour.

    Args:
        runs: the variant, and (epoch, score in percent) points.
        out: the PNG to write.
        score: its name, for the axis label.
    """
    variants = list(dict.fromkeys(variant for variant, _ in runs))
    with figure(out, 6.4, 3.2) as fig:
        axes = fig.subplots()
        for number, variant in enumerate(variants):
            colour = COLOURS[number % len(COLOURS)]
            for run, points in enumerate(points for name, points in runs if name == variant):
                label = variant if run == 0 else None
                axes.plot(*zip(*points, strict=True), color=colour, label=label, marker="o", markersize=3)
        axes.set_xlabel("epoch")
        axes.set_ylabel(f"{score}, %")
        axes.locator_params(axis="x", integer=True)
        axes.legend(loc="best")
