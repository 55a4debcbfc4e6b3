"""A detector's results on the terminal, as COCO annotations and as pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sgformer.results import Detections, as_coco

MOST = 8  # objects printed per image


def line(result: Detections) -> str:
    objects = "   ".join(f"{r['class']} {100 * r['score']:.0f} %" for r in result.results[:MOST]) or "nothing"
    more = f"   and {len(result.results) - MOST} more" if len(result.results) > MOST else ""
    return f"{objects}{more}"


def to_json(results: Iterable[Detections], metadata: Mapping[str, Any]) -> dict[str, Any]:
    return as_coco(list(results), metadata["category_ids"], metadata["classes"])


def draw(
    result: Detections, image: Image.Image, out: Path, number: int, stem: str, metadata: Mapping[str, Any]
) -> None:
    """`STEM.png`: the image with boxes, masks and names."""
    from sgformer.viz.detection import draw_detections, instances_of

    names = metadata["classes"]
    draw_detections(np.asarray(image), instances_of(result, names), names, out / f"{stem}.png")
