"""Where the network looked: significance maps, regions, and which pixels share a key/value token.

Everything drawn comes from arrays that a forward pass returned; nothing is computed again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from sgformer.viz.style import figure

MAP = "viridis"  # perceptually uniform, also in print and for the colour-blind
REGION_COLOURS = ("#440154", "#21918c", "#fde725")  # dull, middle, salient: the ends and middle of the same map


@dataclass(frozen=True)
class Explanation:
    """What one forward pass saw of one image, as arrays. Keys are "stage.block", stages from 1, blocks from 0.

    Attributes:
        image: (H, W, 3) uint8, as the network got it.
        title: a line or two about it, e.g. its name and what the network said.
        logits: (classes,) float32, the network's answer.
        significance, coarse, fine: per hybrid-scale block, (h, w) float32; ``significance = coarse + fine``.
        regions: per self-guided block, (h, w) int: the region of each token, 0 the least significant.
        tokens: per self-guided block, (h, w) int: the key/value token each token went into.
        rates: per self-guided block, how many tokens of each region make one key/value token.
    """

    image: np.ndarray
    title: str
    logits: np.ndarray
    significance: Mapping[str, np.ndarray]
    coarse: Mapping[str, np.ndarray]
    fine: Mapping[str, np.ndarray]
    regions: Mapping[str, np.ndarray]
    tokens: Mapping[str, np.ndarray]
    rates: Mapping[str, Sequence[int]]

    def density(self, block: str) -> np.ndarray:
        """(h, w) float: key/value tokens spent per token of the grid in a self-guided block."""
        sizes = np.bincount(self.tokens[block].ravel())
        return 1 / sizes[self.tokens[block]]

    def save_arrays(self, path: str | Path) -> None:
        """Everything as one .npz: ``image``, ``logits``, ``significance/1.0``, ``tokens/1.1`` ..."""
        kinds = ("significance", "coarse", "fine", "regions", "tokens")
        arrays = {f"{kind}/{key}": value for kind in kinds for key, value in getattr(self, kind).items()}
        np.savez_compressed(path, image=self.image, logits=self.logits, **arrays)


def draw_explanation(seen: Explanation, out: str | Path) -> None:
    """One sheet: a row per stage with its last pair of blocks, and below them significance through the depth.

    Columns: coarse term, fine term and their sum as multiples of the mean, the regions, key/value tokens spent per
    area, and for each region one key/value token with the pixels that share it.
    """
    last = {guided.split(".")[0]: guided for guided in seen.tokens}
    strip = list(seen.significance)
    columns, per_line = 6, 8
    lines = -(-len(strip) // per_line)
    aspect = seen.image.shape[0] / seen.image.shape[1]
    cell = 1.75 * aspect
    height = (cell + 0.28) * len(last) + (1.32 * aspect + 0.3) * lines + 0.75
    with figure(out, 1.75 * columns + 2.3, height) as fig:
        parts = fig.subfigures(2, 1, height_ratios=[len(last) * (cell + 0.28), lines * (1.32 * aspect + 0.3) + 0.3])
        left, right = parts[0].subfigures(1, 2, width_ratios=[2.0, 1.75 * columns])
        photo = left.subplots()
        photo.imshow(seen.image)
        photo.set_anchor("N")
        _clear(photo)
        photo.set_title(seen.title, fontsize=9, loc="left")
        grid = right.subplots(len(last), columns, squeeze=False)
        for i, (stage, guided) in enumerate(last.items()):
            _row(right, grid[i], seen, stage, hybrid_of(guided), guided, first=i == 0)
        below = parts[1].subplots(lines, per_line, squeeze=False)
        for axes in below.flat:
            axes.axis("off")
        for axes, key in zip(below.flat, strip, strict=False):
            stage, block = key.split(".")
            axes.imshow(seen.significance[key], cmap=MAP, interpolation="nearest")
            _clear(axes, f"stage {stage}, block {int(block) + 1}")
        parts[1].suptitle("Significance through the depth, each map on its own scale", fontsize=8, x=0.005, ha="left")


def _row(fig: Any, row: Any, seen: Explanation, stage: str, hybrid: str, guided: str, first: bool) -> None:
    far, near, both, regions, density, shared = row
    shown = [_relative(terms[hybrid]) for terms in (seen.coarse, seen.fine, seen.significance)]
    span = min(values.min() for values in shown), max(values.max() for values in shown)
    for axes, values, name in zip(row, shown, ("coarse heads", "fine heads", "significance"), strict=False):
        drawn = axes.imshow(values, cmap=MAP, vmin=span[0], vmax=span[1], interpolation="nearest")
        _clear(axes, name if first else "")
    bar = fig.colorbar(drawn, ax=[far, near, both], shrink=0.85, pad=0.01, aspect=18)
    bar.set_label("x mean", fontsize=7, labelpad=1)
    bar.ax.tick_params(labelsize=6)
    bar.outline.set_visible(False)

    rates = seen.rates[guided]
    colours = region_colours(len(rates))
    colour_map = _listed(colours)
    regions.imshow(seen.regions[guided], cmap=colour_map, vmin=-0.5, vmax=len(rates) - 0.5, interpolation="nearest")
    _clear(regions, "regions" if first else "")
    regions.set_xlabel("  ".join(f"{n}:1" for n in rates), fontsize=7, labelpad=2)

    drawn = density.imshow(seen.density(guided), cmap="magma", norm=_log_norm(rates), interpolation="nearest")
    _clear(density, "tokens spent" if first else "")
    bar = fig.colorbar(drawn, ax=density, shrink=0.85, pad=0.02, aspect=18)
    bar.set_label("per grid token", fontsize=7, labelpad=1)
    bar.ax.tick_params(labelsize=6, which="both", length=0)
    bar.outline.set_visible(False)

    shared.imshow(provenance(seen, guided), interpolation="nearest")
    _clear(shared, "pixels of one token" if first else "")
    shared.set_xlabel("one per region", fontsize=7, labelpad=2)
    h, w = seen.significance[hybrid].shape
    far.set_ylabel(f"stage {stage}, {h} x {w}", fontsize=8)


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
    """One colour a region, dull to salient."""
    if count == 1:
        return [REGION_COLOURS[1]]
    if count == 2:
        return [REGION_COLOURS[0], REGION_COLOURS[2]]
    if count == 3:
        return list(REGION_COLOURS)
    from matplotlib import colormaps, colors

    return [colors.to_hex(colormaps[MAP](i / (count - 1))) for i in range(count)]


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
