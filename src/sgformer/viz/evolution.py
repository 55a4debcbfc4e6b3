"""The evolution of significance during training: strips, animations, curves; and its localization on objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sgformer.core.errors import require
from sgformer.core.files import replacing
from sgformer.viz.style import COLOURS, FAINT, INK, SETTINGS, figure

MAP = "viridis"
MAX_IN_STRIP = 9


def draw_strip(
    image: np.ndarray, records: Sequence[tuple[str, Mapping[str, np.ndarray]]], out: str | Path, mask: Any = None
) -> None:
    """Draw one image's maps: a row per stage, a column per record (up to nine, evenly spaced), each scaled separately.

    Args:
        image: (H, W, 3) uint8.
        records: caption and significance (h, w) by stage, in chronological order.
        out: the PNG to write.
        mask: (H, W) bool, the objects, outlined in the image; None if unknown.
    """
    if len(records) > MAX_IN_STRIP:
        records = [records[round(i * (len(records) - 1) / (MAX_IN_STRIP - 1))] for i in range(MAX_IN_STRIP)]
    stages = list(records[0][1])
    aspect = float(np.clip(image.shape[0] / image.shape[1], 0.3, 2.5))
    with figure(out, 1.15 * (len(records) + 1) + 0.4, len(stages) * (1.15 * aspect + 0.05) + 0.3) as fig:
        grid = fig.subplots(len(stages), len(records) + 1, squeeze=False)
        for axes in grid.flat:
            _bare(axes)
        _photo(grid[0, 0], image, mask)
        for row, stage in enumerate(stages):
            grid[row, 1].set_ylabel(f"stage {stage}", fontsize=9)
            for column, (name, maps) in enumerate(records, start=1):
                grid[row, column].imshow(maps[stage], cmap=MAP, interpolation="nearest")
                if row == 0:
                    grid[row, column].set_title(name, fontsize=9, pad=4, loc="center")
        for row in range(1, len(stages)):
            grid[row, 0].axis("off")


def draw_animation(
    image: np.ndarray,
    records: Sequence[tuple[str, Mapping[str, np.ndarray]]],
    out: str | Path,
    mask: Any = None,
    milliseconds: int = 500,
) -> None:
    """Write the maps as an animated GIF: a frame per record, the image beside each stage's map; the last frame stays
    `4 * milliseconds`, the others `milliseconds`."""
    matplotlib = require("matplotlib", extra="train")
    figures = require("matplotlib.figure", extra="train")
    aspect = float(np.clip(image.shape[0] / image.shape[1], 0.3, 2.5))
    frames = []
    for name, maps in records:
        with matplotlib.rc_context(SETTINGS):
            fig = figures.Figure(figsize=(1.7 * (1 + len(maps)), 1.7 * aspect + 0.3), layout="constrained")
            first, *others = fig.subplots(1, 1 + len(maps), squeeze=False)[0]
            _photo(first, image, mask)
            first.set_title(name, fontsize=10, loc="left")
            for axes, (stage, values) in zip(others, maps.items(), strict=True):
                axes.imshow(values, cmap=MAP, interpolation="nearest")
                _bare(axes)
                axes.set_title(f"stage {stage}", fontsize=9, loc="center")
            buffer = BytesIO()
            fig.savefig(buffer, dpi=100, format="png")
        frames.append(Image.open(buffer, formats=("PNG",)).convert("RGB"))
    # One palette for all frames, otherwise colours flicker.
    joined = Image.fromarray(np.concatenate([np.asarray(f) for f in (frames[0], frames[-1])]))
    palette = joined.quantize(256)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    durations = [milliseconds] * (len(frames) - 1) + [4 * milliseconds]
    with replacing(out) as unfinished:
        frames[0].save(unfinished, format="GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)


def draw_growth(rows: Sequence[Mapping[str, Any]], out: str | Path, unit: str = "epoch") -> None:
    """Plot `evolution.csv`: rank correlation with the previous record, and the salient tokens inside objects."""
    known = any(row.get("salient_energy") not in (None, "") for row in rows)
    with figure(out, 4.2 * (1 + known) + 1.2, 2.9) as fig:
        panels = fig.subplots(1, 1 + known, squeeze=False)[0]
        x = [float(row[unit]) for row in rows]
        columns = [name for name in rows[0] if name.startswith("rank_correlation_stage")]
        _lines(panels[0], x, rows, "rank_correlation", columns)
        panels[0].set_title("Rank correlation with the previous record")
        panels[0].set_ylim(min(0, panels[0].get_ylim()[0]), 1.03)
        if known:
            columns = [name for name in rows[0] if name.startswith("salient_energy_stage")]
            _lines(panels[1], x, rows, "salient_energy", columns, scale=100)
            area = 100 * float(rows[-1]["object_area"])
            panels[1].axhline(area, color=INK, linewidth=1, linestyle=":", label="objects' area")
            panels[1].set_title("Salient tokens inside objects, %")
            panels[1].set_ylim(bottom=0)
        for axes in panels:
            axes.set_xlabel(unit)
            axes.xaxis.get_major_locator().set_params(integer=True)
        fig.legend(*panels[-1].get_legend_handles_labels(), loc="outside right upper", fontsize=8)


def _lines(
    axes: Any, x: list[float], rows: Sequence[Mapping[str, Any]], mean: str, columns: list[str], scale: float = 1
) -> None:
    def values(name: str) -> list[float]:
        return [scale * float(row[name]) if row[name] not in (None, "") else float("nan") for row in rows]

    for column, colour in zip(columns, COLOURS[1:], strict=False):
        axes.plot(x, values(column), color=colour, linewidth=1, marker="o", markersize=2.5, label=column.split("_")[-1]
                  .replace("stage", "stage "))  # fmt: skip
    axes.plot(x, values(mean), color=COLOURS[0], linewidth=2.2, marker="o", markersize=3.5, label="all blocks")


def draw_localization(rows: Sequence[Mapping[str, Any]], out: str | Path) -> None:
    """Plot energy inside by block, beside the objects' area and the shuffled baseline."""
    with figure(out, 6.4, 0.36 * len(rows) + 1.25) as fig:
        axes = fig.subplots()
        for place, row in enumerate(rows):
            marks = [100 * row[name] for name in ("area", "shuffled", "energy_inside")]
            axes.plot(
                [min(marks), max(marks)], [place, place], color=FAINT, linewidth=3, zorder=1, solid_capstyle="round"
            )
            for value, colour, marker, size in zip(
                marks, (INK, COLOURS[1], COLOURS[0]), "|Do", (11, 5, 7), strict=True
            ):
                axes.plot(
                    value, place, marker, color=colour, markersize=size, markeredgewidth=1.8 if marker == "|" else 0
                )
            axes.annotate(
                f"p = {row['p']:.1g}", (max(marks), place), (9, 0), textcoords="offset points", va="center", fontsize=8
            )
        axes.set_yticks(range(len(rows)), [_block_name(row["block"]) for row in rows])
        axes.invert_yaxis()
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        axes.margins(x=0.16, y=0.12)
        axes.set_xlabel("% of salient tokens' area")
        for label, colour, marker in (
            ("inside the image's own objects", COLOURS[0], "o"),
            ("inside other images' objects", COLOURS[1], "D"),
            ("objects' share of the image", INK, "|"),
        ):
            axes.plot([], [], marker, color=colour, label=label, markersize=6, markeredgewidth=1.6)
        fig.legend(loc="outside upper left", ncols=3, fontsize=8, handletextpad=0.2, columnspacing=1.2)


def _block_name(block: str) -> str:
    if "." not in block:
        return "all blocks"
    stage, number = block.split(".")
    return f"stage {stage}, block {int(number) + 1}"


def _photo(axes: Any, image: np.ndarray, mask: Any) -> None:
    axes.imshow(image)
    _bare(axes)
    if mask is not None and mask.any() and not mask.all():
        axes.contour(mask, levels=[0.5], colors=["white"], linewidths=1.2)


def _bare(axes: Any) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.grid(visible=False)
