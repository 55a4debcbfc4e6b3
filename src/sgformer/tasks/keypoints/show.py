"""Objects with keypoints on the terminal, as COCO annotations and as pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sgformer.results import Detections, as_coco
from sgformer.tasks.detect.show import line

__all__ = ["draw", "line", "to_json"]


def to_json(results: Iterable[Detections], metadata: Mapping[str, Any]) -> dict[str, Any]:
    about = {name: metadata[name] for name in ("keypoints", "skeleton")}
    return as_coco(list(results), metadata["category_ids"], metadata["classes"], about)


def draw(
    result: Detections, image: Image.Image, out: Path, number: int, stem: str, metadata: Mapping[str, Any]
) -> None:
    """`STEM.png`: the image with boxes, names and skeletons."""
    from sgformer.viz.detection import draw_detections, instances_of

    names = metadata["classes"]
    found = instances_of(result, names, metadata["skeleton"])
    draw_detections(np.asarray(image), found, names, out / f"{stem}.png")
