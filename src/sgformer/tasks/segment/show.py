"""A segmentation's results on the terminal, as JSON and as pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sgformer.results import Segments


def line(result: Segments) -> str:
    return "   ".join(f"{name} {100 * share:.1f} %" for name, share in result.shares()[:5])


def to_json(results: Iterable[Segments], metadata: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [result.to_dict() for result in results]


def draw(result: Segments, image: Image.Image, out: Path, number: int, stem: str, metadata: Mapping[str, Any]) -> None:
    """`STEM_labels.png` and `STEM_overlay.png`."""
    from sgformer.viz.segmentation import write_segments

    write_segments(result, out, np.asarray(image), stem)
