"""Sheets of images: an augmented training batch, and an image with its predicted classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sgformer.viz.style import COLOURS, FAINT, figure


def draw_batch(
    images: np.ndarray,
    targets: np.ndarray,
    names: Sequence[str],
    out: str | Path,
    smoothing: float = 0.0,
    limit: int = 24,
) -> None:
    """Draw a sheet of training images with their labels; mixed images show both labels with their shares.

    Args:
        images: (B, H, W, 3) floats in [0, 1].
        targets: (B, classes) floats that sum to 1.
        names: one per class.
        out: the PNG to write.
        smoothing: label smoothing in the targets, removed for the captions.
        limit: maximum number of images.
    """
    images = images[:limit]
    shares = (targets[:limit] - smoothing / len(names)) / max(1 - smoothing, 1e-9)
    columns = min(8, len(images))
    rows = -(-len(images) // columns)
    height, width = images.shape[1:3]
    with figure(out, 1.5 * columns, rows * (1.5 * height / width + 0.25)) as fig:
        grid = fig.subplots(rows, columns, squeeze=False)
        for axes in grid.flat:
            axes.axis("off")
        for axes, image, share in zip(grid.flat, images, shares, strict=False):
            axes.imshow(image, interpolation="nearest")
            axes.set_title(_label(share, names), fontsize=7, pad=2, loc="center")


def _label(share: np.ndarray, names: Sequence[str]) -> str:
    """`cat`, or `cat 70 + dog 30`."""
    top = [i for i in np.argsort(-share)[:2] if share[i] > 0.005]
    short = [names[i] if len(names[i]) <= 12 else names[i][:11] + "…" for i in top]
    if len(top) < 2:
        return "".join(short)
    return " + ".join(f"{name} {100 * share[i]:.0f}" for i, name in zip(top, short, strict=True))


def draw_prediction(image: np.ndarray, labels: Sequence[tuple[str, float]], out: str | Path, title: str = "") -> None:
    """Draw an image beside bars of its most probable classes.

    Args:
        image: (H, W, 3), uint8 or floats in [0, 1].
        labels: (name, probability), most probable first.
        out: the PNG to write.
        title: e.g. the file's name.
    """
    ratio = float(np.clip(image.shape[1] / image.shape[0], 0.5, 2))
    with figure(out, 3.2 * ratio + 3.4, 3.2) as fig:
        left, right = fig.subplots(1, 2, width_ratios=[3.2 * ratio, 3.0])
        left.imshow(image)
        left.axis("off")
        left.set_title(title if len(title) <= 40 else "…" + title[-39:])
        names = [name if len(name) <= 22 else name[:21] + "…" for name, _ in labels]
        shares = [100 * share for _, share in labels]
        colours = [COLOURS[0]] + [FAINT] * (len(labels) - 1)
        right.barh(range(len(labels)), shares, height=0.62, color=colours)
        right.set_yticks(range(len(labels)), names)
        right.invert_yaxis()
        right.set_xlim(0, 118)
        right.set_xticks([])
        right.grid(False)
        right.spines[:].set_visible(False)
        for place, share in enumerate(shares):
            right.text(share + 2, place, f"{share:.1f} %", va="center")
