"""What `sgformer eval` does with the weights of a semantic segmentation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sgformer.tasks.segment import api as api_segment


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
