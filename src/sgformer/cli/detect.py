"""What `sgformer eval` and `sgformer predict` do with the weights of a detector."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from sgformer import api_detect
from sgformer.answers import open_image
from sgformer.cli.output import own_stem, write_json

MOST = 8  # objects of an image that are told on the terminal


def evaluate(weights: str, data: str, folder: Path, **options: Any) -> int:
    """Measure, print, and write tables, results and pictures; options as of `api_detect.evaluate_detector`."""
    from lightning.pytorch.utilities import rank_zero_only

    result = api_detect.evaluate_detector(weights, data, out=folder, **options)
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        print(result.table())
        print(f"{result.images} images, {result.objects} objects of {len(result.classes)} classes", end="")
        print(f", {len(result.skipped)} unreadable images left out" if result.skipped else "")
        print(f"per class, results, curves and examples: {folder}")
    return 0


def predict(weights: str, images: list[str], json_out: str | None, out: str | None, **options: Any) -> int:
    """Print what was found on images; write COCO annotations and pictures on request.

    Args:
        json_out: a file, or - for standard output and nothing else there.
        out: a folder.
        options: as of `api_detect.predict_detections`.
    """
    from sgformer.training.weights import read_metadata
    from sgformer.viz.detection import draw_detections

    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
    metadata = read_metadata(weights)
    names, stems, told = metadata["classes"], Counter[str](), []
    for found in api_detect.predict_detections(weights, images, **options):
        told.append(found)
        if json_out != "-":
            objects = "   ".join(f"{r['class']} {100 * r['score']:.0f} %" for r in found.results[:MOST]) or "nothing"
            more = f"   and {len(found.results) - MOST} more" if len(found.results) > MOST else ""
            print(f"{found.image}  {objects}{more}", flush=True)
        if out:
            own = own_stem(found.image, stems)
            pixels = np.asarray(open_image(Path(found.image)))
            draw_detections(pixels, found.objects(names), names, Path(out) / f"{own}.png")
    if json_out:
        write_json(api_detect.as_coco(told, metadata["category_ids"], names), json_out, indent=1)
    return 0
