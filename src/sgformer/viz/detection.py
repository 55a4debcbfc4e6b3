"""Boxes and masks drawn over images, sheets of such images, and precision-recall curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from sgformer.core.errors import require
from sgformer.core.files import replacing
from sgformer.results import POINT_SHOWN, Detections
from sgformer.viz.segmentation import palette
from sgformer.viz.style import COLOURS, INK, figure, label_font

#: Images are enlarged by an integer factor to a short side of about this many pixels, so that labels are legible,
#: unless that makes the long side more than 4 times as long: 20,000 x 1 pixels would become 3 gigapixels.
LEGIBLE = 400
#: Up to this many classes get a coloured and labelled curve each.
MAX_CURVES = 5


@dataclass(frozen=True)
class Instances:
    """The annotated or detected objects of an image, for drawing.

    Attributes:
        boxes: (N, 4) [x1, y1, x2, y2] in pixels.
        labels: (N,) class indices.
        scores: (N,) in [0, 1], or None for annotations.
        masks: (N, H, W) bool, or None.
        keypoints: (N, K, 2) x, y in pixels, NaN where not drawn (`sure_points`), or None.
        edges: pairs of keypoints to connect, counted from 1.
    """

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray | None = None
    masks: np.ndarray | None = None
    keypoints: np.ndarray | None = None
    edges: Sequence[Sequence[int]] = ()

    def above(self, score: float) -> Instances:
        """The instances with at least this score; all annotations."""
        if self.scores is None:
            return self
        keep = np.asarray(self.scores) >= score
        masks, points = (None if values is None else values[keep] for values in (self.masks, self.keypoints))
        return Instances(self.boxes[keep], self.labels[keep], self.scores[keep], masks, points, self.edges)


def sure_points(keypoints: np.ndarray, least: float, offset: float = 0.0) -> np.ndarray:
    """Keypoints to draw: (..., 3) x, y and score or visibility -> (..., 2), NaN where the third is below `least`.

    Args:
        keypoints: of any shape that ends in 3.
        least: the least score or visibility.
        offset: added to x and y: a half for those of COCO's files, which count pixels from the middle of the first one.
    """
    return np.where(keypoints[..., 2:] >= least, keypoints[..., :2] + offset, np.nan)


def overlay(image: np.ndarray, objects: Instances, names: Sequence[str]) -> np.ndarray:
    """Draw masks, boxes, keypoints, class names and scores over an image, the best object on top.

    The name of an only class is left out, and so are labels that would hide objects: see `label_places`.

    Args:
        image: (H, W, 3) uint8.
        objects: best first.
        names: class names.

    Returns:
        (h, w, 3) uint8; small images are enlarged.
    """
    short, long = sorted(image.shape[:2])
    zoom = max(1, min(round(LEGIBLE / short), 4 * LEGIBLE // long))
    canvas = Image.fromarray(np.ascontiguousarray(image))
    canvas = canvas.resize((canvas.width * zoom, canvas.height * zoom), Image.Resampling.BICUBIC)
    colours = palette(names)[np.asarray(objects.labels, dtype=np.int64)]
    line = max(2, round(min(canvas.size) / 240))
    if objects.masks is not None and len(objects.masks):
        pixels = np.asarray(canvas, dtype=np.float32)
        for mask, colour in reversed(list(zip(objects.masks, colours, strict=True))):
            mask = np.repeat(np.repeat(mask, zoom, 0), zoom, 1)
            pixels = np.where(mask[..., None], 0.5 * pixels + 0.5 * colour, pixels)
        canvas = Image.fromarray(pixels.astype(np.uint8))
    draw = ImageDraw.Draw(canvas)
    height = max(11, round(min(canvas.size) / 32))
    order = list(range(len(objects.boxes)))[::-1]
    boxes = np.asarray(objects.boxes, dtype=np.float64).reshape(-1, 4) * zoom
    for i in order:
        draw.rectangle(_upright(boxes[i]), outline=tuple(colours[i].tolist()), width=line)
        if objects.keypoints is not None:
            _draw_skeleton(draw, objects.keypoints[i] * zoom, objects.edges, tuple(colours[i].tolist()), line)
    texts = [names[int(label)] if len(names) > 1 else "" for label in objects.labels]
    if objects.scores is not None:
        texts = [f"{text} {100 * score:.0f}".strip() for text, score in zip(texts, objects.scores, strict=True)]
    if any(texts):
        _draw_labels(draw, texts, height, boxes, colours, canvas.size)
    return np.asarray(canvas)


def _draw_labels(
    draw: ImageDraw.ImageDraw,
    texts: Sequence[str],
    height: int,
    boxes: np.ndarray,
    colours: np.ndarray,
    canvas: tuple[int, int],
) -> None:
    """The labels of objects, best first, above all boxes; the best on top."""
    written = [label_font(text, height) for text in texts]
    extents = [font.getbbox(text) for font, text in written]
    sizes = np.array([(right - left + 8, bottom - top + 6) for left, top, right, bottom in extents])
    places = label_places(boxes, sizes, canvas)
    for i in reversed(np.flatnonzero(~np.isnan(places[:, 0]))):
        font, text = written[i]
        draw.rectangle((*places[i].tolist(), *(places[i] + sizes[i]).tolist()), fill=tuple(colours[i].tolist()))
        ink = "black" if colours[i] @ (0.299, 0.587, 0.114) > 140 else "white"
        x, y = (places[i] + (4, 3) - extents[i][:2]).tolist()
        draw.text((x, y), text, fill=ink, font=font)


def label_places(boxes: np.ndarray, sizes: np.ndarray, canvas: tuple[int, int]) -> np.ndarray:
    """Where to write the labels of objects so that they are in nobody's way.

    The first of these that is not: above the box, within it at the top or at the bottom, below it. A label is in the
    way if it hides more than a quarter of an object or of a better object's label. If every place is in the way, it is
    left out, so that a hundred small objects stay visible.

    Args:
        boxes: (N, 4) [x1, y1, x2, y2], best first.
        sizes: (N, 2) width and height of the labels.
        canvas: width and height of the image.

    Returns:
        (N, 2) left and top of each label, NaN where it is left out.
    """
    places, taken = np.full((len(boxes), 2), np.nan), boxes
    for i, ((x1, y1, _, y2), size) in enumerate(zip(boxes, sizes, strict=True)):
        left, high = min(max(0.0, x1), max(0.0, canvas[0] - size[0])), size[1]
        for top in (y1 - high, y1, y2 - high, y2):
            label = np.array([left, top, left + size[0], top + high])
            if top >= 0 and top + high <= canvas[1] and _hidden(taken, label).max() <= 1 / 4:
                places[i], taken = (left, top), np.vstack([taken, label])
                break
    return places


def _hidden(boxes: np.ndarray, cover: np.ndarray) -> np.ndarray:
    """The part of each box that lies under another, (N,)."""
    both = np.minimum(boxes[:, 2:], cover[2:]) - np.maximum(boxes[:, :2], cover[:2])
    return both.clip(min=0).prod(1) / np.maximum((boxes[:, 2:] - boxes[:, :2]).prod(1), 1e-9)


def _draw_skeleton(
    draw: ImageDraw.ImageDraw, points: np.ndarray, edges: Sequence[Sequence[int]], colour: tuple[int, ...], line: int
) -> None:
    """Lines and dots in a colour, edged in black to stand out from objects of the same."""
    there = ~np.isnan(points).any(-1)
    ends = [(a - 1, b - 1) for a, b in edges if there[a - 1] and there[b - 1]]
    for fill, extra in ((INK, 2), (colour, 0)):
        for a, b in ends:
            draw.line((*points[a].tolist(), *points[b].tolist()), fill=fill, width=line + extra)
    radius = 1.5 * line
    for x, y in points[there].tolist():
        where = (x - radius, y - radius, x + radius, y + radius)
        draw.ellipse(where, fill="white", outline=colour, width=max(1, line // 2))


def instances_of(detections: Detections, names: Sequence[str], edges: Sequence[Sequence[int]] = ()) -> Instances:
    """Convert a network's detections on one image for drawing.

    Args:
        detections: the `class` of every result must be in `names`.
        names: class names in index order.
        edges: pairs of keypoints to connect, counted from 1.
    """
    corners = np.array([r["bbox"] for r in detections.results], dtype=float).reshape(-1, 4)
    corners[:, 2:] += corners[:, :2]
    rles = [r["segmentation"] for r in detections.results if "segmentation" in r]
    masks = [require("pycocotools.mask", extra="detect").decode(rle) for rle in rles]
    labels = np.array([list(names).index(r["class"]) for r in detections.results], dtype=np.int64)
    points = [np.reshape(r["keypoints"], (-1, 3)) for r in detections.results if "keypoints" in r]
    placed = sure_points(np.stack(points), POINT_SHOWN, 0.5) if points else None
    scores = np.array([r["score"] for r in detections.results])
    return Instances(corners, labels, scores, stack_masks(masks), placed, edges)


def stack_masks(masks: Sequence[np.ndarray]) -> np.ndarray | None:
    """Stack N masks to (N, H, W) bool; None if N is 0."""
    return np.stack(masks).astype(bool) if masks else None


def _upright(box: np.ndarray) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = box.tolist()
    return x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)


def draw_detections(image: np.ndarray, objects: Instances, names: Sequence[str], out: str | Path) -> None:
    """Write `overlay` as a PNG."""
    with replacing(out) as unfinished:
        Image.fromarray(overlay(image, objects, names)).save(unfinished, format="PNG")


def draw_training_images(
    images: Sequence[np.ndarray], objects: Sequence[Instances], names: Sequence[str], out: str | Path, limit: int = 12
) -> None:
    """Draw a sheet of augmented training images with their objects.

    Args:
        images: (H_i, W_i, 3) uint8.
        objects: per image.
        names: class names.
        out: the PNG to write.
        limit: maximum number of images.
    """
    images, objects = list(images[:limit]), list(objects[:limit])
    columns = min(4, len(images))
    rows = -(-len(images) // columns)
    with figure(out, 2.6 * columns, 2.2 * rows) as fig:
        grid = fig.subplots(rows, columns, squeeze=False)
        for axes in grid.flat:
            axes.axis("off")
        for axes, image, instances in zip(grid.flat, images, objects, strict=False):
            axes.imshow(overlay(image, instances, names))


@dataclass(frozen=True)
class Example:
    """An image with its annotations and detections; the title gives their agreement."""

    image: np.ndarray
    truth: Instances
    detected: Instances
    title: str


def draw_examples(best: Sequence[Example], worst: Sequence[Example], names: Sequence[str], out: str | Path) -> None:
    """Draw a sheet of the best and worst images, each as a pair: annotated (left) and detected (right)."""
    groups = [("best", list(best)), ("worst", list(worst))]
    pairs = 3
    rows = [(name, group[i : i + pairs]) for name, group in groups for i in range(0, len(group), pairs)]
    if not rows:
        return
    with figure(out, 4.0 * pairs, 2.25 * len(rows)) as fig:
        grid = fig.subplots(len(rows), 2 * pairs, squeeze=False)
        for axes in grid.flat:
            axes.axis("off")
        for line, (name, group) in zip(grid, rows, strict=True):
            for i, example in enumerate(group):
                left, right = line[2 * i : 2 * i + 2]
                left.imshow(overlay(example.image, example.truth, names))
                right.imshow(overlay(example.image, example.detected, names))
                left.set_title(f"{name}: annotated", fontsize=8, color=INK)
                right.set_title(example.title, fontsize=8, color=INK)


def draw_precision_recall(precision: Mapping[str, np.ndarray], names: Sequence[str], out: str | Path) -> None:
    """Plot precision over recall at IoU .5, or OKS .5, a panel for each kind: the mean in bold, and each class.

    Args:
        precision: by kind, (classes, points) at equally spaced recalls from 0 to 1; NaN rows are skipped.
        names: class names.
        out: the PNG to write.
    """
    with figure(out, 4.6 * len(precision) + 0.4, 3.8) as fig:
        for axes, (kind, curves) in zip(
            fig.subplots(1, len(precision), squeeze=False)[0], precision.items(), strict=True
        ):
            recall = np.linspace(0, 1, curves.shape[1])
            present = [k for k in range(len(curves)) if not np.isnan(curves[k]).all()]
            named = len(present) <= MAX_CURVES
            for place, k in enumerate(present):
                label = f"{names[k]} {100 * curves[k].mean():.1f}" if named else None
                colour = COLOURS[place] if named else "#b4bcc6"
                axes.plot(recall, curves[k], color=colour, linewidth=1.2, label=label, drawstyle="steps-post")
            if present:
                mean = curves[present].mean(0)
                label = f"mean of {len(present)} classes {100 * mean.mean():.1f}"
                axes.plot(recall, mean, color=INK, linewidth=2.2, label=label, drawstyle="steps-post")
                axes.legend(title=f"AP at {'OKS' if kind == 'keypoints' else 'IoU'} .5, %", alignment="left")
            axes.set_title({"box": "boxes", "mask": "masks"}.get(kind, kind))
            axes.set_xlabel("recall")
            axes.set_ylabel("precision")
            axes.set_xlim(0, 1.01)
            axes.set_ylim(0, 1.03)
