"""Where the network looked: significance maps, regions, and which pixels share a key/value token.

Everything drawn comes from arrays that a forward pass returned; nothing is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from sgformer.core.errors import require
from sgformer.results import Explanation
from sgformer.viz.style import figure

MAP = "viridis"  # perceptually uniform, also in print and for the colour-blind
REGION_COLOURS = ("#440154", "#21918c", "#fde725")  # low, middle, high: the ends and middle of the same map


#: What the columns of a sheet show; the `None`s are colour bars.
COLUMNS = ("coarse heads", "fine heads", "significance", None, "regions", "tokens spent", None, "pixels of one token")


def draw_explanation(seen: Explanation, out: str | Path) -> None:
    """One sheet: a row per stage with its last pair of blocks, and below them significance through the depth.

    Columns: the attention received from coarse and from fine heads and what tokens were ranked by, all as multiples of
    their mean; the regions; key/value tokens spent per place; and of each region one key/value token with all pixels
    that share it. Made for the width of a page: letters are as large as those of a caption there.
    """
    last = {guided.split(".")[0]: guided for guided in seen.tokens} or {k.split(".")[0]: "" for k in seen.significance}
    strip = list(seen.significance)
    per_line = 9
    lines = -(-len(strip) // per_line) if len(strip) > len(last) else 0
    aspect = float(np.clip(seen.image.shape[0] / seen.image.shape[1], 0.3, 2.5))
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
        _photos(parts[0], grid, seen)
        for i, (stage, guided) in enumerate(last.items()):
            hybrid = hybrid_of(guided) if guided else next(k for k in reversed(strip) if k.startswith(f"{stage}."))
            axes = [parts[0].add_subplot(grid[i, column]) for column in range(2, len(widths))]
            _row(parts[0], axes, seen, hybrid, guided)
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
                axes.imshow(seen.significance[key], cmap=MAP, interpolation="nearest")
                axes.set_title(f"stage {stage}, block {int(block) + 1}", fontsize=8, pad=3, loc="center")
            parts[1].suptitle(
                "Significance through the depth, each map on a scale of its own", fontsize=9, x=0.01, ha="left"
            )


def _photos(fig: Any, grid: Any, seen: Explanation) -> None:
    """The image, and below it the answer as a picture or what the colours of regions mean."""
    rows = grid.nrows
    first = fig.add_subplot(grid[: max(1, rows // 2) if seen.overlay is not None else rows, 0])
    first.imshow(seen.image)
    first.set_anchor("N")
    _clear(first)
    first.set_title("\n".join(_short(line) for line in seen.title.split("\n")), fontsize=9, loc="left", pad=4)
    legend = first
    if seen.overlay is not None and rows > 1:
        legend = fig.add_subplot(grid[max(1, rows // 2) :, 0])
        legend.imshow(seen.overlay)
        legend.set_anchor("N")
        _clear(legend)
    if seen.rates:
        from matplotlib.patches import Patch

        count = max(len(rates) for rates in seen.rates.values())
        names = region_names(count)
        legend.legend(
            handles=[Patch(facecolor=c, label=n) for c, n in zip(region_colours(count), names, strict=True)],
            title="regions", loc="upper left", bbox_to_anchor=(0, -0.02), fontsize=8, title_fontsize=8, borderaxespad=0,
            handlelength=1, handleheight=1, alignment="left", labelspacing=0.3,
        )  # fmt: skip


def _row(fig: Any, axes: Sequence[Any], seen: Explanation, hybrid: str, guided: str) -> None:
    far, near, ranked, bar, regions, density, bar2, shared = axes
    h, w = seen.significance[hybrid].shape
    far.set_ylabel(f"stage {hybrid.split('.')[0]}\n{h} x {w}", fontsize=9)
    added = np.allclose(seen.significance[hybrid], seen.coarse[hybrid] + seen.fine[hybrid], rtol=1e-3, atol=0)
    shown = [_relative(terms[hybrid]) for terms in (seen.coarse, seen.fine)]
    shown += [_relative(seen.significance[hybrid]) if added else _ranks(seen.significance[hybrid])]
    common = shown if added else shown[:2]
    span = min(values.min() for values in common), max(values.max() for values in common)
    for one, values in zip((far, near, ranked), shown, strict=True):
        low, high = span if one is not ranked or added else (0, 1)
        drawn = one.imshow(values, cmap=MAP, vmin=low, vmax=high, interpolation="nearest")
        _clear(one)
    if not added:  # what ranks the tokens is no attention: only its order means anything
        ranked.set_xlabel("rank", fontsize=8, labelpad=2)
    _bar(fig, far.images[0], bar, "x mean")
    if not guided:
        for one in (regions, density, bar2, shared):
            one.axis("off")
        return

    rates = list(seen.rates[guided])
    colours = region_colours(len(rates))
    regions.imshow(
        seen.regions[guided], cmap=_listed(colours), vmin=-0.5, vmax=len(rates) - 0.5, interpolation="nearest"
    )
    _clear(regions)
    regions.set_xlabel(", ".join(map(str, rates)) + " : 1", fontsize=8, labelpad=2)

    drawn = density.imshow(seen.density(guided), cmap="magma", norm=_log_norm(rates), interpolation="nearest")
    _clear(density)
    density.set_xlabel(f"{len(np.unique(seen.tokens[guided]))} for {h * w}", fontsize=8, labelpad=2)
    bar_ = _bar(fig, drawn, bar2, "per place")
    ticks = sorted({1, *rates})
    bar_.set_ticks([1 / n for n in ticks], labels=["1" if n == 1 else f"1/{n}" for n in ticks])
    bar_.ax.minorticks_off()

    shared.imshow(provenance(seen, guided), interpolation="nearest")
    _clear(shared)
    shared.set_xlabel("one per region", fontsize=8, labelpad=2)


def _bar(fig: Any, drawn: Any, axes: Any, label: str) -> Any:
    """A colour bar at the left of its column."""
    axes.axis("off")
    bar = fig.colorbar(drawn, cax=axes.inset_axes((0.0, 0.04, 0.26, 0.92)))
    bar.ax.tick_params(labelsize=8, length=0, which="both", pad=2)
    bar.ax.grid(False)
    bar.outline.set_visible(False)
    bar.ax.set_xlabel(label, fontsize=8, labelpad=2, loc="left")
    return bar


def _short(line: str, most: int = 28) -> str:
    return line if len(line) <= most else line[: most - 1] + "…"


def _ranks(values: np.ndarray) -> np.ndarray:
    """From 0 for the least to 1 for the most significant token."""
    order = np.argsort(values, axis=None, kind="stable")
    ranks = np.empty(values.size)
    ranks[order] = np.linspace(0, 1, values.size)
    return ranks.reshape(values.shape)


def provenance(seen: Explanation, block: str) -> np.ndarray:
    """(H, W, 3) uint8: the image in faint grey, and of each region one key/value token with all pixels that share it.

    The token is the middle one of its region in sorted order.
    """
    tokens, regions = seen.tokens[block], seen.regions[block]
    H, W = seen.image.shape[:2]
    up = _pixels(tokens.shape, (H, W))
    grey = seen.image.mean(2, keepdims=True).repeat(3, 2) * 0.35 + 150
    out = grey.astype(np.uint8)
    for region, colour in enumerate(region_colours(len(seen.rates[block]))):
        members = np.unique(tokens[regions == region])
        if len(members) == 0:
            continue
        chosen = (tokens == members[len(members) // 2])[up]
        rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
        out[chosen] = rgb
    return out


def hybrid_of(guided: str) -> str:
    """The hybrid-scale block whose significance a self-guided block sorts by: "3.5" -> "3.4"."""
    stage, block = guided.split(".")
    return f"{stage}.{int(block) - 1}"


def region_colours(count: int) -> list[str]:
    """One colour a region, least to most significant."""
    if count == 1:
        return [REGION_COLOURS[1]]
    if count == 2:
        return [REGION_COLOURS[0], REGION_COLOURS[2]]
    if count == 3:
        return list(REGION_COLOURS)
    from matplotlib import colormaps, colors

    return [colors.to_hex(colormaps[MAP](i / (count - 1))) for i in range(count)]


def region_names(count: int) -> list[str]:
    """One name a region, least to most significant; only the first and the last have one where there are many."""
    known = {1: ["all"], 2: ["low", "high"], 3: ["low", "middle", "high"]}
    return known.get(count, ["low", *[""] * (count - 2), "high"])


def colour_map(values: np.ndarray, name: str = MAP) -> np.ndarray:
    """(h, w) numbers as (h, w, 3) uint8 colours; the least and the greatest hundredth do not stretch the scale."""
    colormaps = require("matplotlib", extra="train").colormaps
    low, high = np.percentile(values, (1, 99))
    scaled = (values - low) / (high - low) if high > low else np.full(values.shape, 0.5)
    return (colormaps[name](scaled.clip(0, 1))[..., :3] * 255).round().astype(np.uint8)


def write_index(folder: str | Path, entries: Sequence[tuple[str, str]], title: str) -> Path:
    """An HTML page that opens from disk. ``entries``: (caption, picture's file name in the folder)."""
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
<p>Each sheet: the image; for the last pair of blocks of every stage the attention that coarse and fine heads paid to
each place, their sum (significance), the regions it makes, the key/value tokens spent per place, and the pixels that
share one token; below, significance through the depth.</p>
{figures}
</html>
"""
    path = Path(folder) / "index.html"
    path.write_text(page, encoding="utf-8")
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
    """Index arrays that blow a token grid up to pixels, each pixel its own token."""
    rows = (np.arange(size[0]) * grid[0] // size[0])[:, None]
    cols = (np.arange(size[1]) * grid[1] // size[1])[None]
    return rows, cols
