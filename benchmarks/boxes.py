"""Boxes without box labels: does the significance of a classifier's tokens outline the object?

    python benchmarks/boxes.py sgformer_n --data TINY --boxes ANNOTATIONS --aside ASIDE

Weakly supervised localization as usual (Zhou et al., CVPR 2016): a map is enlarged to the image, its values above a
level are kept, and the box around the largest connected part counts as right if it overlaps the annotated one by an IoU
of .5. The level of every map is chosen on photographs kept aside (ASIDE/val) and measured on TINY's 10,000. *Pointing*
needs no level: is the largest value inside the annotated box? Beside the significance maps: Grad-CAM of three stages
(Selvaraju et al., ICCV 2017), a bump in the middle of every image, smooth noise, and the whole image as the box.
ANNOTATIONS holds val_annotations.txt and train/CLASS/CLASS_boxes.txt of Tiny ImageNet.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from reliance import photographs, preparation
from scipy import ndimage
from torch import Tensor

import sgformer
from sgformer.models.load import find_weights

LEVELS = np.arange(0.05, 1, 0.05)
SIDE = 64  # maps are compared at the photographs' own size


def annotated(folder: Path) -> dict[str, tuple[float, float, float, float]]:
    """File name -> (left, top, right, bottom) in pixels of 64."""
    lines = [line.split("\t") for line in (folder / "val_annotations.txt").read_text().splitlines()]
    boxes = {row[0]: tuple(map(float, row[2:6])) for row in lines}
    for file in folder.glob("train/*/*_boxes.txt"):
        rows = (line.split("\t") for line in file.read_text().splitlines())
        boxes.update({row[0]: tuple(map(float, row[1:5])) for row in rows})
    return {name: (left, top, right + 1, bottom + 1) for name, (left, top, right, bottom) in boxes.items()}


def maps_of(model: Any, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """All maps of a batch by name, (B, 64, 64) between 0 and 1, and the logits."""
    with torch.enable_grad():
        seen = model.inspect(x.requires_grad_())
        grads = torch.autograd.grad(seen.logits.amax(1).sum(), seen.features[1:])
    found: dict[str, Tensor] = {}
    for block, whole in seen.significance.items():
        found[f"significance {block}"] = enlarged(whole)
        found[f"coarse {block}"], found[f"fine {block}"] = enlarged(seen.coarse[block]), enlarged(seen.fine[block])
    for kind in ("significance", "coarse", "fine"):
        found[f"{kind}, mean of blocks"] = enlarged(
            torch.stack([m for name, m in found.items() if name.startswith(f"{kind} ")]).mean(0)
        )
    for stage, (features, grad) in enumerate(zip(seen.features[1:], grads, strict=True), start=2):
        cam = (features * grad.mean((2, 3), keepdim=True)).sum(1).relu()
        found[f"Grad-CAM, stage {stage}"] = enlarged(cam)
    line = torch.linspace(-1, 1, SIDE)
    found["bump in the middle"] = (1 - (line[:, None] ** 2 + line**2) / 2).expand(len(x), -1, -1)
    noise = torch.rand(len(x), 6, 6, generator=torch.Generator().manual_seed(int(x.detach().abs().sum() * 1000)))
    found["smooth noise"] = enlarged(noise)
    return found, seen.logits.detach()


def enlarged(maps: Tensor) -> Tensor:
    """(B, h, w) -> (B, 64, 64) between 0 and 1, bilinear."""
    maps = F.interpolate(maps.detach().float()[:, None], (SIDE, SIDE), mode="bilinear", align_corners=False)[:, 0]
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low).clamp(min=1e-9)


def box_around(values: np.ndarray, level: float) -> tuple[float, float, float, float]:
    """The box around the largest connected part at or above a level, (left, top, right, bottom)."""
    parts, count = ndimage.label(values >= level)
    if not count:
        return 0, 0, values.shape[1], values.shape[0]
    largest = np.bincount(parts.ravel())[1:].argmax()
    rows, columns = ndimage.find_objects(parts)[largest]
    return columns.start, rows.start, columns.stop, rows.stop


def overlap(a: Any, b: Any) -> float:
    """Intersection over union of two boxes."""
    wide, high = (max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    area = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return wide * high / (sum(area) - wide * high)


def batches(model: Any, data: str, limit: int | None, size: int | None) -> Iterator[tuple[list[str], Tensor, Tensor]]:
    """File names, images and classes, batch by batch, in random order."""
    listing, order, classes = photographs(model, data, "val", limit)
    prepare = preparation(model, size)
    for start in range(0, len(order), 50):
        part = order[start : start + 50]
        images = torch.stack([prepare(image) for image in listing.read_many(part)])
        yield [Path(listing.paths[i]).name for i in part], images, classes[start : start + 50]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", help="of a classifier: a name, a run folder or .safetensors")
    parser.add_argument("--data", required=True, help="Tiny ImageNet: a folder with val/CLASS/*")
    parser.add_argument("--boxes", type=Path, required=True, help="its annotations")
    parser.add_argument("--aside", required=True, help="a folder whose val/CLASS/* chooses the levels")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--limit", type=int, help="so many photographs of each, drawn at random")
    given = parser.parse_args()
    model = sgformer.load_model(str(find_weights(given.weights))).eval()
    truth = annotated(given.boxes)
    hits: dict[str, np.ndarray] = {}
    count = 0
    for names, images, _ in batches(model, given.aside, min(given.limit or 2000, 2000), given.image_size):
        for kind, maps in maps_of(model, images)[0].items():
            for values, name in zip(maps.numpy(), names, strict=True):
                right = [overlap(box_around(values, level), truth[name]) >= 0.5 for level in LEVELS]
                hits[kind] = hits.get(kind, np.zeros(len(LEVELS))) + right
        count += len(names)
    levels = {kind: float(LEVELS[right.argmax()]) for kind, right in hits.items()}
    aside = {kind: 100 * right.max() / count for kind, right in hits.items()}
    rows = {kind: [0, 0, 0] for kind in [*levels, "the whole image"]}
    count = 0
    for names, images, classes in batches(model, given.data, given.limit, given.image_size):
        maps, logits = maps_of(model, images)
        known = (logits.argmax(1) == classes).tolist()
        for i, name in enumerate(names):
            box = truth[name]
            for kind, row in rows.items():
                values = maps[kind][i].numpy() if kind in maps else None
                found = (0, 0, SIDE, SIDE) if values is None else box_around(values, levels[kind])
                right = overlap(found, box) >= 0.5
                row[0] += right
                row[1] += right and known[i]
                if values is not None:
                    y, x = divmod(int(values.argmax()), SIDE)
                    row[2] += box[0] <= x < box[2] and box[1] <= y < box[3]
        count += len(names)
    print(f"{count} photographs\n\n| Map | Level | Box right, % | Box and class, % | Pointing, % | Box right, aside |")
    print("|---|---|---|---|---|---|")
    for kind, row in sorted(rows.items(), key=lambda item: -item[1][0]):
        box, both, point = (100 * n / count for n in row)
        chosen, before = (f"{levels[kind]:.2f}", f"{aside[kind]:.1f}") if kind in levels else ("", "")
        print(f"| {kind} | {chosen} | {box:.1f} | {both:.1f} | {f'{point:.1f}' if kind in levels else ''} | {before} |")


if __name__ == "__main__":
    main()
