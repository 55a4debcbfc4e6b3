"""What `sgformer eval` does with the weights of a detector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sgformer.tasks.detect import api as api_detect


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
