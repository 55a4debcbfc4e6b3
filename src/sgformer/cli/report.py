"""How `sgformer predict` shows answers, whatever network gave them: on the terminal, as JSON, as pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sgformer.cli.output import own_stem, write_json
from sgformer.results import Detections, Prediction, Segments, annotate, as_coco, open_image

MOST = 8  # objects of an image that are told on the terminal


def report_classes(predictions: Sequence[Prediction], json_out: str | None, out: str | None) -> None:
    """Print the classes of images; write JSON and annotated pictures on request.

    Args:
        json_out: a file, or - for standard output and nothing else there.
        out: a folder.
    """
    if json_out:
        write_json([p.to_dict() for p in predictions], json_out)
    if json_out != "-":
        wide = min(60, max(len(p.image) for p in predictions))
        for p in predictions:
            labels = "   ".join(f"{name} {100 * share:.1f} %" for name, share in p.labels)
            print(f"{p.image:<{wide}}  {labels}")
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
        for number, p in enumerate(predictions):
            annotate(p, Path(out) / f"{number:04d}-{Path(p.image).stem}.png")


def report_segments(answers: Iterable[Segments], json_out: str | None, out: str | None) -> None:
    """Print the classes of images' pixels as they come; write JSON, label maps and overlays on request."""
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
    told, stems = [], Counter[str]()
    for segments in answers:
        told.append(segments.to_dict())
        if json_out != "-":
            shares = "   ".join(f"{name} {100 * share:.1f} %" for name, share in segments.shares()[:5])
            print(f"{segments.image}  {shares}", flush=True)
        if out:
            own = own_stem(segments.image, stems)
            segments.write(out, np.asarray(open_image(Path(segments.image))), own)
    if json_out:
        write_json(told, json_out)


def report_objects(
    answers: Iterable[Detections], metadata: Mapping[str, Any], json_out: str | None, out: str | None
) -> None:
    """Print what was found on images as it comes; write COCO annotations and pictures on request.

    Args:
        metadata: of the weights: `classes` and `category_ids`.
        json_out, out: as of `report_classes`.
    """
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
    names, stems, told = metadata["classes"], Counter[str](), []
    for found in answers:
        told.append(found)
        if json_out != "-":
            objects = "   ".join(f"{r['class']} {100 * r['score']:.0f} %" for r in found.results[:MOST]) or "nothing"
            more = f"   and {len(found.results) - MOST} more" if len(found.results) > MOST else ""
            print(f"{found.image}  {objects}{more}", flush=True)
        if out:
            from sgformer.viz.detection import draw_detections

            own = own_stem(found.image, stems)
            pixels = np.asarray(open_image(Path(found.image)))
            draw_detections(pixels, found.objects(names), names, Path(out) / f"{own}.png")
    if json_out:
        write_json(as_coco(told, metadata["category_ids"], names), json_out, indent=1)
