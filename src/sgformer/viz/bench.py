"""Plots of speed and memory: throughput against MACs, and cost against image size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sgformer.core.errors import require
from sgformer.viz.style import COLOURS, figure

MARKERS = "osD^v"


def draw_throughput(points: Sequence[Mapping[str, Any]], title: str, out: str | Path) -> None:
    """Scatter plot with one point per network: GMACs per image on x, images per second on y.

    Args:
        points: with "label", "gmacs" and "images_per_s".
        out: the PNG to write.
    """
    with figure(out, 6.4, 4.2) as fig:
        axes = fig.subplots()
        for p in points:
            axes.plot(p["gmacs"], p["images_per_s"], "o", color=_colour(p["label"]), markersize=6)
        axes.set_ylim(0, 1.12 * max(p["images_per_s"] for p in points))
        axes.set_xlim(0, 1.3 * max(p["gmacs"] for p in points))
        axes.set_title(title)
        axes.set_xlabel("GMACs per image")
        axes.set_ylabel("images/s")
        _name(axes, [(p["label"], p["gmacs"], p["images_per_s"]) for p in points])


def _name(axes: Any, points: Sequence[tuple[str, float, float]]) -> None:
    """Label each point where the label overlaps points and other labels least and stays inside the axes."""
    axes.figure.draw_without_rendering()  # computes the layout
    dots = [axes.transData.transform((x, y)) for _, x, y in points]
    occupied: list[Sequence[float]] = [(x - 6, y - 6, x + 6, y + 6) for x, y in dots]
    for label, x, y in sorted(points, key=lambda point: point[1:]):
        choices: list[tuple[float, int, Any, Sequence[float]]] = []
        for dx, dy in ((8, 0), (-8, 0), (8, 9), (8, -9), (-8, 9), (-8, -9), (8, 18), (8, -18), (-8, 18), (-8, -18)):
            note = axes.annotate(
                label, (x, y), (dx, dy), textcoords="offset points", va="center", ha="left" if dx > 0 else "right",
                fontsize=8, color=_colour(label),
            )  # fmt: skip
            note.set_in_layout(False)
            box = note.get_window_extent().extents
            outside = (box[2] - box[0]) * (box[3] - box[1]) - _overlap(box, axes.bbox.extents)
            choices.append((outside + sum(_overlap(box, other) for other in occupied), len(choices), note, tuple(box)))
            note.set_visible(False)
        _, _, note, box = min(choices, key=lambda choice: choice[:2])
        note.set_visible(True)
        occupied.append(box)


def _colour(label: str) -> str:
    return COLOURS[0] if label.startswith("sgformer") else COLOURS[1]


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection area of two boxes (left, bottom, right, top)."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def draw_growth(points: Sequence[Mapping[str, Any]], title: str, out: str | Path) -> None:
    """Plot time and peak memory against image size on logarithmic axes, with each network's fitted exponent.

    Args:
        points: with "label", "size" (side in pixels), "seconds", and "memory" in bytes or None.
        out: the PNG to write.
    """
    ticker = require("matplotlib.ticker", extra="bench")
    panels = {"seconds": ("milliseconds per step", 1e3), "memory": ("peak memory, MiB", 2**-20)}
    with figure(out, 10, 4.2 + 0.18 * len({p["label"] for p in points})) as fig:
        for axes, (name, (label, scale)) in zip(fig.subplots(1, 2), panels.items(), strict=True):
            for i, network in enumerate(dict.fromkeys(p["label"] for p in points)):
                here = sorted((p["size"], p[name]) for p in points if p["label"] == network and p[name])
                if not here:
                    continue
                x, y = [size for size, _ in here], [value * scale for _, value in here]
                slope = exponent([side * side for side in x], y)
                legend = network if slope is None else f"{network}: pixels^{round(slope, 2) + 0:.2f}"
                line = {"color": COLOURS[i % 5], "linestyle": ("-", "--", ":")[i // 5 % 3]}
                axes.plot(x, y, marker=MARKERS[i % 5], markersize=4, label=legend, **line)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(ticker.NullLocator())
            sizes = sorted({p["size"] for p in points})
            axes.set_xticks(sizes, [str(size) for size in sizes])
            axes.set_xticks([], minor=True)
            axes.set_title(f"{title}: {label}")
            axes.set_xlabel("image side, pixels")
            if axes.lines:  # below: lines that rise to the right leave room for few names
                axes.legend(fontsize=7.5, loc="upper center", bbox_to_anchor=(0.5, -0.16))


def draw_sizes(panels: Mapping[str, Sequence[Mapping[str, Any]]], out: str | Path) -> None:
    """Plot the time of an image against its size on logarithmic axes: a panel for each setting.

    A network has a colour, a way of running it a line and a marker.

    Args:
        panels: title -> points, with "network", "way", "size" (side in pixels) and "ms".
        out: the PNG to write.
    """
    ticker = require("matplotlib.ticker", extra="bench")
    everything = [p for points in panels.values() for p in points]
    networks, ways = (list(dict.fromkeys(p[key] for p in everything)) for key in ("network", "way"))
    sizes = sorted({p["size"] for p in everything})
    rows = math.ceil(len(panels) / 2)
    with figure(out, 10, 3.8 * rows) as fig:
        grid = fig.subplots(rows, min(2, len(panels)), squeeze=False, sharey=True).flatten()
        for axes in grid[len(panels) :]:
            axes.remove()
        for axes, (title, points) in zip(grid, panels.items(), strict=False):
            for i, network in enumerate(networks):
                for j, way in enumerate(ways):
                    here = sorted((p["size"], p["ms"]) for p in points if (p["network"], p["way"]) == (network, way))
                    if here:
                        style = {
                            "color": COLOURS[i % 5],
                            "marker": MARKERS[j % 5],
                            "linestyle": ("-", "--", ":")[j % 3],
                        }
                        axes.plot(*zip(*here, strict=True), markersize=5, label=f"{network}, {way}", **style)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(ticker.NullLocator())
            axes.yaxis.set_tick_params(labelleft=True)
            axes.set_xticks(sizes, [str(size) for size in sizes])
            axes.set_xticks([], minor=True)
            axes.set_title(f"{title}: milliseconds per image")
            axes.set_xlabel("image side, pixels")
            axes.legend(fontsize=7.5)


def exponent(x: Sequence[float], y: Sequence[float]) -> float | None:
    """The least-squares slope in log-log space; None for fewer than two distinct x."""
    if len(set(x)) < 2:
        return None
    a, b = [math.log(v) for v in x], [math.log(v) for v in y]
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    return sum((p - mean_a) * (q - mean_b) for p, q in zip(a, b, strict=True)) / sum((p - mean_a) ** 2 for p in a)
