"""Explaining what a segmentation network attended to."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sgformer.core.errors import UserError
from sgformer.data.dense_transforms import normalized
from sgformer.data.image import fit_size
from sgformer.data.preparing import eval_transform
from sgformer.explaining.base import Explainer, explanations, pixels
from sgformer.heads.common import resize
from sgformer.results import Explanation
from sgformer.viz.segmentation import blend, palette


class SegmentExplainer(Explainer):
    """Explains images by a `Segmenter`."""

    def read(self, image: Image.Image) -> Tensor:
        return eval_transform((image.height, image.width), 1.0, normalization=self.normalization)(image)

    def _size(self, height: int, width: int) -> tuple[int, int]:
        return fit_size(height, width, int(self.metadata.get("short_side", min(height, width))))

    def _sized(self, image_size: int | tuple[int, int]) -> dict[str, Any]:
        if not isinstance(image_size, int):
            raise UserError(f"--image-size is one number, the short side, for segmentation; got {image_size}")
        return {"short_side": image_size}

    def _explain(self, x: Tensor) -> Explanation:
        size = self._size(x.shape[-2], x.shape[-1])
        x = x[None] if x.is_floating_point() else normalized(x[None], self.normalization)
        if size != tuple(x.shape[-2:]):  # as in validation
            x = F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=True)
        inspection = self.network.inspect(x)
        labels = resize(self.model.head(inspection.features).float(), x)[0].argmax(0).cpu().numpy()
        (one,) = explanations(self.network, inspection, pixels(x, self.normalization))
        names = self.names or [str(i) for i in range(self.model.num_classes)]
        title = ", ".join(f"{names[i]} {100 * share:.0f} %" for i, share in _areas(labels, len(names))[:3])
        overlay = (blend(one.image, labels, names) * 255).round().astype(np.uint8)
        return dataclasses.replace(one, title=title, overlay=overlay, prediction={"labels": labels})

    def mask(self, mask: Tensor) -> np.ndarray:
        size = self._size(*mask.shape)
        return F.interpolate(mask[None, None].float(), size, mode="nearest-exact")[0, 0].bool().cpu().numpy()


def _areas(labels: np.ndarray, count: int) -> list[tuple[int, float]]:
    """(class, share of the pixels) of the classes present, largest first."""
    areas = np.bincount(labels.ravel(), minlength=count) / labels.size
    return [(int(i), float(areas[i])) for i in np.argsort(-areas, kind="stable") if areas[i]]


def summary(explanation: Explanation, names: Sequence[str]) -> list[dict[str, Any]]:
    """The classes by their area; see `Task.summary`."""
    labels = explanation.prediction["labels"]
    names = names or [str(i) for i in range(int(labels.max()) + 1)]
    colours = ["#{:02x}{:02x}{:02x}".format(*rgb) for rgb in palette(names).tolist()]
    return [{"class": names[i], "share": share, "colour": colours[i]} for i, share in _areas(labels, len(names))]


explainer = SegmentExplainer
