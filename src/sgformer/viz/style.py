"""The shared style of all figures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sgformer.core.errors import require
from sgformer.core.files import replacing

INK = "#22262b"
FAINT = "#d9dde2"
COLOURS = ("#1f6feb", "#d1622b", "#2a9d63", "#8250df", "#b3872c")
SEQUENTIAL = "Blues"

SETTINGS = {
    "figure.facecolor": "white",
    "font.size": 9,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
}


@contextmanager
def figure(path: str | Path, width: float, height: float) -> Iterator[Any]:
    """Yield a matplotlib figure, written to `path` as a PNG when the block ends; leaves global state untouched.

    Args:
        path: the PNG to write.
        width, height: in inches.
    """
    matplotlib = require("matplotlib", extra="train")
    figures = require("matplotlib.figure", extra="train")
    with matplotlib.rc_context(SETTINGS):
        fig = figures.Figure(figsize=(width, height), layout="constrained")  # uses the Agg canvas: no display needed
        yield fig
        with replacing(path) as unfinished:
            fig.savefig(unfinished, dpi=130, format="png")
