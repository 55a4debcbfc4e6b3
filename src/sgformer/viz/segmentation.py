"""Label maps as palette PNGs, overlays with a legend, and sheets."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sgformer.core.errors import require
from sgformer.core.files import replacing
from sgformer.core.names import GROUND
from sgformer.results import Segments
from sgformer.viz.style import INK, figure

MAX_IN_LEGEND = 18
BLACK, GREY = (0, 0, 0), (176, 180, 186)


def palette(names: Sequence[str]) -> np.ndarray:
    """A colour per class, (classes, 3) uint8: well-separated hues, grey for background classes."""
    golden = (5**0.5 - 1) / 2  # golden-ratio steps keep any number of hues apart
    rows = []
    for i, name in enumerate(names):
        saturation, value = ((0.78, 0.95), (0.95, 0.62), (0.45, 0.98))[(i // 8) % 3]
        colour = np.rint(255 * np.array(colorsys.hsv_to_rgb((0.58 + i * golden) % 1, saturation, value)))
        rows.append(GREY if name.lower() in GROUND else colour)
    return np.array(rows, dtype=np.uint8).reshape(-1, 3)


def write_label_png(labels: np.ndarray, out: str | Path, names: Sequence[str], first: int = 0) -> None:
    """Write a label map as a PNG of class values: 8-bit with a palette, or 16-bit grey for more than 256 values.

    Args:
        labels: (H, W) class indices.
        out: the PNG to write.
        names: one per class.
        first: the value of class 0 in the file; 1 if the data set's label 0 means "no class".
    """
    values = np.asarray(labels) + first
    if len(names) + first > 256:
        image = Image.fromarray(values.astype(np.uint16))
    else:
        image = Image.fromarray(values.astype(np.uint8))
        image.putpalette(np.concatenate([np.zeros((first, 3), np.uint8), palette(names)]).tobytes())
    with replacing(out) as unfinished:
        image.save(unfinished, format="PNG")


def blend(image: np.ndarray, labels: np.ndarray, names: Sequence[str], opacity: float = 0.55) -> np.ndarray:
    """Blend class colours into an image, with a light line where classes meet.

    Args:
        image: (H, W, 3) uint8.
        labels: (H, W) class indices; out-of-range values (no class) and background classes are not coloured.
        names: one per class.

    Returns:
        (h, w, 3) floats in [0, 1]; small images are enlarged, so that lines are thin.
    """
    zoom = max(1, 480 // max(labels.shape))
    pixels, labels = (np.repeat(np.repeat(x, zoom, 0), zoom, 1) for x in (image / 255, labels))
    drawn = np.array([name.lower() not in GROUND for name in names] + [False])
    labels = np.where((labels >= 0) & (labels < len(names)), labels, len(names))
    colours = np.concatenate([palette(names), [BLACK]]) / 255
    mixed = np.where(drawn[labels][..., None], (1 - opacity) * pixels + opacity * colours[labels], pixels)
    border = np.zeros(labels.shape, dtype=bool)
    border[1:] |= labels[1:] != labels[:-1]
    border[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    return np.where(border[..., None], 0.2 * mixed + 0.8, mixed)


def draw_overlay(image: np.ndarray, labels: np.ndarray, names: Sequence[str], out: str | Path, title: str = "") -> None:
    """Draw an image's classes over the image, with a legend of the classes present, largest first.

    Args:
        image: (H, W, 3) uint8.
        labels: (H, W) class indices.
        names: one per class.
        out: the PNG to write.
        title: e.g. the file's name.
    """
    height, width = labels.shape
    ratio = float(np.clip(width / height, 0.4, 2.5))
    tall = 4.2 if ratio < 1.6 else 3.4
    with figure(out, tall * ratio + 1.9, tall + 0.3) as fig:
        axes = fig.subplots()
        axes.imshow(blend(image, labels, names))
        axes.axis("off")
        axes.set_title(title if len(title) <= 60 else "…" + title[-59:])
        _legend(fig, [labels], names, shares=True)


def write_segments(segments: Segments, out: str | Path, pixels: np.ndarray, stem: str | None = None) -> list[Path]:
    """Write `STEM_labels.png` (a label map with a palette) and `STEM_overlay.png` into a folder.

    Args:
        segments: the result for one image.
        out: the folder.
        pixels: the image, (H, W, 3) uint8.
        stem: by default the image's file name without its extension.

    Returns:
        The two files.
    """
    stem = stem or Path(segments.image).stem
    labels, overlay = Path(out) / f"{stem}_labels.png", Path(out) / f"{stem}_overlay.png"
    write_label_png(segments.labels, labels, segments.class_names, segments.first)
    draw_overlay(pixels, segments.labels, segments.class_names, overlay, Path(segments.image).name)
    return [labels, overlay]


def draw_training_batch(
    images: np.ndarray, labels: np.ndarray, names: Sequence[str], out: str | Path, limit: int = 12
) -> None:
    """Draw augmented training images, each above its label map; black: no class.

    Args:
        images: (B, H, W, 3) floats in [0, 1].
        labels: (B, H, W) class indices.
        names: one per class.
        out: the PNG to write.
        limit: maximum number of images.
    """
    columns = [[image, _solid(label, names)] for image, label in zip(images[:limit], labels[:limit], strict=True)]
    _sheet(columns, ("image", "classes"), labels[:limit], names, out, per_row=6)


def draw_comparison(
    images: Sequence[np.ndarray],
    truths: Sequence[np.ndarray],
    predictions: Sequence[np.ndarray],
    names: Sequence[str],
    out: str | Path,
    captions: Sequence[str] = (),
) -> None:
    """Draw images, their labels and their predictions, one image per column; black: no class.

    Args:
        images: each (H, W, 3) floats in [0, 1], of any sizes.
        truths, predictions: each (H, W) class indices.
        names: one per class.
        out: the PNG to write.
        captions: one per image, or none.
    """
    n = len(names)
    columns = [
        [image, _solid(truth, names), _solid(np.where(truth < n, prediction, n), names)]
        for image, truth, prediction in zip(images, truths, predictions, strict=True)
    ]
    _sheet(columns, ("image", "labels", "predicted"), truths, names, out, len(columns), captions)


def _solid(labels: np.ndarray, names: Sequence[str]) -> np.ndarray:
    known = (labels >= 0) & (labels < len(names))
    return np.concatenate([palette(names), [BLACK]]).astype(np.uint8)[np.where(known, labels, len(names))]


def _sheet(
    columns: Sequence[Sequence[np.ndarray]],
    titles: Sequence[str],
    labels: Sequence[np.ndarray] | np.ndarray,
    names: Sequence[str],
    out: str | Path,
    per_row: int,
    captions: Sequence[str] = (),
) -> None:
    """Draw columns of pictures, `per_row` side by side, and one legend of the classes in `labels`."""
    bands, high = -(-len(columns) // per_row), len(titles)
    wide = min(per_row, len(columns))
    with figure(out, 1.7 * wide + 1.4, 1.75 * high * bands) as fig:
        grid = fig.subplots(high * bands, wide, squeeze=False)
        for axes in grid.flat:
            axes.axis("off")
        for i, column in enumerate(columns):
            for j, (picture, title) in enumerate(zip(column, titles, strict=True)):
                axes = grid[i // per_row * high + j, i % per_row]
                axes.imshow(picture, interpolation="nearest" if picture.shape[1] < 200 else None)
                if j == 0 and captions:
                    axes.set_title(captions[i], fontsize=8, pad=3, loc="center")
                elif i % per_row == 0 and not captions:
                    axes.set_title(title, fontsize=8, pad=3)
                if i % per_row == 0 and captions:
                    axes.text(-0.04, 0.5, title, transform=axes.transAxes, rotation=90, ha="right", va="center")
        _legend(fig, labels, names)


def _legend(fig: Any, labels: Sequence[np.ndarray] | np.ndarray, names: Sequence[str], shares: bool = False) -> None:
    """Add a legend of the label maps' classes right of the figure, largest first, optionally with their shares."""
    patches = require("matplotlib.patches", extra="train")
    n = len(names)
    counts = np.sum([np.bincount(one[(one >= 0) & (one < n)].ravel(), minlength=n) for one in labels], axis=0)
    order = [i for i in np.argsort(-counts, kind="stable") if counts[i]]
    colours = palette(names) / 255
    entries = []
    for i in order[:MAX_IN_LEGEND]:
        name = names[i] if len(names[i]) <= 18 else names[i][:17] + "…"
        share = f"  {100 * counts[i] / counts.sum():.0f} %" if shares else ""
        entries.append(patches.Patch(facecolor=colours[i], label=name + share))
    if len(order) > MAX_IN_LEGEND:
        entries.append(patches.Patch(facecolor="none", label=f"and {len(order) - MAX_IN_LEGEND} more"))
    if entries:
        fig.legend(
            handles=entries, loc="outside right upper", fontsize=8, labelcolor=INK, handlelength=1.0, handleheight=1.0
        )
