"""Drawings of significance maps, regions, and the pixels that share a key/value token.

Everything is drawn from the arrays of a forward pass; nothing is recomputed.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from sgformer.core.errors import require
from sgformer.core.files import write_text
from sgformer.core.names import printable
from sgformer.results import Explanation
from sgformer.viz.style import figure

MAP = "viridis"  # perceptually uniform, also in print and for the colour-blind
REGION_COLOURS = ("#440154", "#21918c", "#fde725")  # low, middle, high: the ends and middle of the same map


#: Column titles of a sheet; `None` marks colour bars.
COLUMNS = ("coarse heads", "fine heads", "significance", None, "regions", "tokens spent", None, "pixels of one token")


def draw_explanation(explanation: Explanation, out: str | Path) -> None:
    """Draw one sheet: a row per stage for its last pair of blocks, and below them the significance of all blocks.

    Columns: the attention received from coarse heads, that from fine heads, and the significance, all as multiples of
    their mean; the regions; key/value tokens per place; and for each region one key/value token with all pixels that
    share it. Font sizes match a caption when the sheet fills the width of a page.
    """
    last = {guided.split(".")[0]: guided for guided in explanation.tokens} or {
        k.split(".")[0]: "" for k in explanation.significance
    }
    strip = list(explanation.significance)
    per_line = 9
    lines = -(-len(strip) // per_line) if len(strip) > len(last) else 0
    aspect = float(np.clip(explanation.image.shape[0] / explanation.image.shape[1], 0.3, 2.5))
    cell, photo = 1.32, 1.75
    widths = [photo, 0.28, *(cell if name else 0.34 for name in COLUMNS)]
    small = (sum(widths) - 0.4) / per_line
    tall = max(cell * aspect, 0.5)
    upper = len(last) * (tall + 0.32) + 0.15
    lower = lines * (min(small, cell) * aspect + 0.32) + (0.25 if lines else 0)
    with figure(out, sum(widths) + 0.6, upper + lower) as fig:
        fig.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0.01, hspace=0.01)
        parts = fig.subfigures(2, 1, height_ratios=[upper, lower]) if lines else [fig.subfigures(1, 1)]
        grid = parts[0].add_gridspec(len(last), len(widths), width_ratios=widths)
        _photos(parts[0], grid, explanation)
        for i, (stage, guided) in enumerate(last.items()):
            hybrid = hybrid_of(guided) if guided else next(k for k in reversed(strip) if k.startswith(f"{stage}."))
            axes = [parts[0].add_subplot(grid[i, column]) for column in range(2, len(widths))]
            _row(parts[0], axes, explanation, hybrid, guided)
            if i == 0:
                for one, name in zip(axes, COLUMNS, strict=True):
                    if name and (guided or name in COLUMNS[:3]):
                        one.set_title(name, fontsize=9, pad=4, loc="center")
        if lines:
            below = parts[1].subplots(lines, per_line, squeeze=False)
            for axes in below.flat:
                axes.axis("off")
            for axes, key in zip(below.flat, strip, strict=False):
                stage, block = key.split(".")
                axes.imshow(explanation.significance[key], cmap=MAP, interpolation="nearest")
                axes.set_title(f"stage {stage}, block {int(block) + 1}", fontsize=8, pad=3, loc="center")
            parts[1].suptitle("Significance of all blocks, each map scaled separately", fontsize=9, x=0.01, ha="left")


def _photos(fig: Any, grid: Any, explanation: Explanation) -> None:
    """Draw the image, and below it the prediction's overlay or the legend of the regions."""
    rows = grid.nrows
    first = fig.add_subplot(grid[: max(1, rows // 2) if explanation.overlay is not None else rows, 0])
    first.imshow(explanation.image)
    first.set_anchor("N")
    _clear(first)
    first.set_title("\n".join(_short(line) for line in explanation.title.split("\n")), fontsize=9, loc="left", pad=4)
    legend = first
    if explanation.overlay is not None and rows > 1:
        legend = fig.add_subplot(grid[max(1, rows // 2) :, 0])
        legend.imshow(explanation.overlay)
        legend.set_anchor("N")
        _clear(legend)
    if explanation.rates:
        from matplotlib.patches import Patch

        count = max(len(rates) for rates in explanation.rates.values())
        names = region_names(count)
        legend.legend(
            handles=[Patch(facecolor=c, label=n) for c, n in zip(region_colours(count), names, strict=True)],
            title="regions", loc="upper left", bbox_to_anchor=(0, -0.02), fontsize=8, title_fontsize=8, borderaxespad=0,
            handlelength=1, handleheight=1, alignment="left", labelspacing=0.3,
        )  # fmt: skip


def _row(fig: Any, axes: Sequence[Any], explanation: Explanation, hybrid: str, guided: str) -> None:
    coarse, fine, ranked, bar, regions, density, density_bar, shared = axes
    h, w = explanation.significance[hybrid].shape
    coarse.set_ylabel(f"stage {hybrid.split('.')[0]}\n{h} x {w}", fontsize=9)
    is_sum = np.allclose(
        explanation.significance[hybrid], explanation.coarse[hybrid] + explanation.fine[hybrid], rtol=1e-3, atol=0
    )
    shown = [_relative(terms[hybrid]) for terms in (explanation.coarse, explanation.fine)]
    shown += [_relative(explanation.significance[hybrid]) if is_sum else _ranks(explanation.significance[hybrid])]
    common = shown if is_sum else shown[:2]
    span = min(values.min() for values in common), max(values.max() for values in common)
    for one, values in zip((coarse, fine, ranked), shown, strict=True):
        low, high = span if one is not ranked or is_sum else (0, 1)
        drawn = one.imshow(values, cmap=MAP, vmin=low, vmax=high, interpolation="nearest")
        _clear(one)
    if not is_sum:  # the ranking source is not attention: only its order is meaningful
        ranked.set_xlabel("rank", fontsize=8, labelpad=2)
    _bar(fig, coarse.images[0], bar, "x mean")
    if not guided:
        for one in (regions, density, density_bar, shared):
            one.axis("off")
        return

    rates = list(explanation.rates[guided])
    colours = region_colours(len(rates))
    regions.imshow(
        explanation.regions[guided], cmap=_listed(colours), vmin=-0.5, vmax=len(rates) - 0.5, interpolation="nearest"
    )
    _clear(regions)
    regions.set_xlabel(", ".join(map(str, rates)) + " : 1", fontsize=8, labelpad=2)

    drawn = density.imshow(explanation.density(guided), cmap="magma", norm=_log_norm(rates), interpolation="nearest")
    _clear(density)
    density.set_xlabel(f"{len(np.unique(explanation.tokens[guided]))} for {h * w}", fontsize=8, labelpad=2)
    colour_bar = _bar(fig, drawn, density_bar, "per place")
    ticks = sorted({1, *rates})
    colour_bar.set_ticks([1 / n for n in ticks], labels=["1" if n == 1 else f"1/{n}" for n in ticks])
    colour_bar.ax.minorticks_off()

    shared.imshow(provenance(explanation, guided), interpolation="nearest")
    _clear(shared)
    shared.set_xlabel("one per region", fontsize=8, labelpad=2)


def _bar(fig: Any, drawn: Any, axes: Any, label: str) -> Any:
    """Add a colour bar at the left edge of its column."""
    axes.axis("off")
    bar = fig.colorbar(drawn, cax=axes.inset_axes((0.0, 0.04, 0.26, 0.92)))
    bar.ax.tick_params(labelsize=8, length=0, which="both", pad=2)
    bar.ax.grid(False)
    bar.outline.set_visible(False)
    bar.ax.set_xlabel(label, fontsize=8, labelpad=2, loc="left")
    return bar


def _short(line: str, limit: int = 28) -> str:
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks scaled to [0, 1]: 0 for the least and 1 for the most significant token."""
    order = np.argsort(values, axis=None, kind="stable")
    ranks = np.empty(values.size)
    ranks[order] = np.linspace(0, 1, values.size)
    return ranks.reshape(values.shape)


def provenance(explanation: Explanation, block: str) -> np.ndarray:
    """The image in faint grey with, for each region, one key/value token's pixels in colour: (H, W, 3) uint8.

    The token is the region's median in sorted order.
    """
    tokens, regions = explanation.tokens[block], explanation.regions[block]
    H, W = explanation.image.shape[:2]
    up = _pixels(tokens.shape, (H, W))
    grey = explanation.image.mean(2, keepdims=True).repeat(3, 2) * 0.35 + 150
    out = grey.astype(np.uint8)
    for region, colour in enumerate(region_colours(len(explanation.rates[block]))):
        members = np.unique(tokens[regions == region])
        if len(members) == 0:
            continue
        chosen = (tokens == members[len(members) // 2])[up]
        rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
        out[chosen] = rgb
    return out


def hybrid_of(guided: str) -> str:
    """The hybrid-scale block whose significance guides a self-guided block: "3.5" -> "3.4"."""
    stage, block = guided.split(".")
    return f"{stage}.{int(block) - 1}"


def region_colours(count: int) -> list[str]:
    """One colour per region, least to most significant."""
    if count == 1:
        return [REGION_COLOURS[1]]
    if count == 2:
        return [REGION_COLOURS[0], REGION_COLOURS[2]]
    if count == 3:
        return list(REGION_COLOURS)
    from matplotlib import colormaps, colors

    return [colors.to_hex(colormaps[MAP](i / (count - 1))) for i in range(count)]


def region_names(count: int) -> list[str]:
    """One name per region, least to most significant; beyond three regions only the first and the last are named."""
    known = {1: ["all"], 2: ["low", "high"], 3: ["low", "middle", "high"]}
    return known.get(count, ["low", *[""] * (count - 2), "high"])


def colour_map(values: np.ndarray, name: str = MAP) -> np.ndarray:
    """Colour a map (h, w) as (h, w, 3) uint8, scaled from its 1st to its 99th percentile."""
    colormaps = require("matplotlib", extra="train").colormaps
    low, high = np.percentile(values, (1, 99))
    scaled = (values - low) / (high - low) if high > low else np.full(values.shape, 0.5)
    return (colormaps[name](scaled.clip(0, 1))[..., :3] * 255).round().astype(np.uint8)


def write_index(folder: str | Path, entries: Sequence[tuple[str, str]], title: str) -> Path:
    """Write `index.html`, which opens without a server. ``entries``: (caption, picture's file name in the folder)."""
    title, entries = printable(title), [(printable(caption), name) for caption, name in entries]
    figures = "\n".join(
        f'<figure><a href="{escape(name)}"><img src="{escape(name)}" alt="{escape(caption)}" loading="lazy"></a>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
        for caption, name in entries
    )
    page = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(title)}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #22262b; max-width: 1200px; margin: 2rem auto; padding: 0 1rem }}
figure {{ margin: 0 0 2.5rem }} img {{ width: 100%; border: 1px solid #d9dde2 }} figcaption {{ color: #57606a }}
</style>
<h1>{escape(title)}</h1>
<p>Each sheet shows the image; for the last pair of blocks of every stage the attention received from coarse and fine
heads, their sum (significance), the resulting regions, the key/value tokens spent per place, and the pixels that share
one token; below, the significance of all blocks.</p>
{figures}
</html>
"""
    path = Path(folder) / "index.html"
    write_text(path, page)
    return path


def _relative(values: np.ndarray) -> np.ndarray:
    return values / max(float(values.mean()), 1e-12)


def _clear(axes: Any, title: str = "") -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.grid(False)
    if title:
        axes.set_title(title, fontsize=8)


def _listed(colours: Sequence[str]) -> Any:
    from matplotlib.colors import ListedColormap

    return ListedColormap(list(colours))


def _log_norm(rates: Sequence[int]) -> Any:
    from matplotlib.colors import LogNorm

    return LogNorm(1 / (2 * max(rates)), 1)


def _pixels(grid: tuple[int, int], size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Index arrays that upsample a token grid to pixels by nearest neighbour."""
    rows = (np.arange(size[0]) * grid[0] // size[0])[:, None]
    cols = (np.arange(size[1]) * grid[1] // size[1])[None]
    return rows, cols
