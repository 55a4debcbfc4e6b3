"""A classifier's results on the terminal, as JSON and as pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sgformer.core.files import fitting
from sgformer.results import Prediction


def line(result: Prediction) -> str:
    return "   ".join(f"{name} {100 * share:.1f} %" for name, share in result.labels)


def to_json(results: Iterable[Prediction], metadata: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [result.to_dict() for result in results]


def draw(
    result: Prediction, image: Image.Image, out: Path, number: int, stem: str, metadata: Mapping[str, Any]
) -> None:
    """`NUMBER-NAME.png`: the image and its most probable classes."""
    from sgformer.viz.sheets import draw_prediction

    path = Path(result.image)
    file = out / f"{number:04d}-{fitting(path.stem, out)}.png"
    draw_prediction(np.asarray(image), result.labels, file, path.name)
