"""Confusion matrices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sgformer.viz.style import INK, SEQUENTIAL, figure

MAX_NAMES = 40  # beyond this many classes, names would overlap


def draw_confusion(counts: np.ndarray, names: Sequence[str], out: str | Path, unit: str = "images") -> None:
    """Draw a confusion matrix normalised by row: true classes in rows, predicted classes in columns.

    Args:
        counts: (classes, classes) integers, true classes in rows.
        names: one per class.
        out: the PNG to write.
        unit: the unit of the counts.
    """
    counts = np.asarray(counts)
    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
    n = len(counts)
    side = float(np.clip(0.42 * n + 1.6, 3.6, 10))
    with figure(out, side + 0.9, side) as fig:
        axes = fig.subplots()
        image = axes.imshow(shares, cmap=SEQUENTIAL, vmin=0, vmax=1, interpolation="nearest")
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        axes.set_title(f"share of each true class, %  ({int(counts.sum())} {unit})")
        if n <= MAX_NAMES:
            short = [name if len(name) <= 18 else name[:17] + "…" for name in names]
            axes.set_xticks(range(n), short, rotation=90 if max(map(len, short)) > 2 else 0)
            axes.set_yticks(range(n), short)
        if n <= 20:
            for row, column in zip(*np.nonzero(shares >= 0.005), strict=True):
                share = shares[row, column]
                colour = "white" if share > 0.55 else INK
                axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", color=colour, fontsize=8)
        bar = fig.colorbar(image, ax=axes, fraction=0.04, pad=0.02, ticks=[0, 0.5, 1])
        bar.ax.set_yticklabels(["0", "50", "100"])
        bar.outline.set_visible(False)
