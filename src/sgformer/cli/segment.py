"""What `sgformer eval` and `sgformer predict` do with the weights of a semantic segmentation."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from sgformer import api_segment
from sgformer.api import open_image
from sgformer.cli.output import own_stem, write_json


def evaluate(weights: str, data: str, folder: Path, **options: Any) -> int:
    """Measure, print, and write tables and pictures to `folder`; options as of `api_segment.evaluate_segmentation`."""
    from lightning.pytorch.utilities import rank_zero_only

    folder.mkdir(parents=True, exist_ok=True)
    result = api_segment.evaluate_segmentation(weights, data, examples=folder / "examples.png", **options)
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        result.write(folder)
        print(result.headline())
        print(f"{result.images} images of {len(result.class_names)} classes", end="")
        print(f", {len(result.skipped)} unreadable ones left out" if result.skipped else "")
        print(f"per class, confusion and examples: {folder}")
    return 0


def predict(weights: str, images: list[str], json_out: str | None, out: str | None, **options: Any) -> int:
    """Print the classes of images, and write JSON, label maps and overlays on request.

    Args:
        json_out: a file, or - for standard output and nothing else there.
        out: a folder.
        options: as of `api_segment.predict_segmentation`.
    """
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
    told, stems = [], Counter[str]()
    for segments in api_segment.predict_segmentation(weights, images, **options):
        told.append(segments.to_dict())
        if json_out != "-":
            shares = "   ".join(f"{name} {100 * share:.1f} %" for name, share in segments.shares()[:5])
            print(f"{segments.image}  {shares}", flush=True)
        if out:
            own = own_stem(segments.image, stems)
            segments.write(out, np.asarray(open_image(Path(segments.image))), own)
    if json_out:
        write_json(told, json_out)
    return 0
