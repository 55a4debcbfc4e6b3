"""Explaining what a classifier, or a bare backbone, attended to."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from sgformer.data.preparing import eval_transform, preprocessing
from sgformer.explaining.base import Explainer, explain_batch
from sgformer.exporting.onnx_predict import softmax
from sgformer.results import Explanation

MOST = 5  # classes shown on the page


class ClassifyExplainer(Explainer):
    """Explains images by a classifier or a bare backbone."""

    @property
    def network(self) -> Any:
        return self.model

    def read(self, image: Image.Image) -> Tensor:
        """An RGB image as in validation, or unresized if the weights state no size."""
        if "image_size" not in self.metadata:
            return eval_transform((image.height, image.width), 1.0, normalization=self.normalization)(image)
        return eval_transform(**preprocessing(self.metadata))(image)

    def _explain(self, x: Tensor) -> Explanation:
        (one,) = explain_batch(self.model, x[None], self.normalization)
        return dataclasses.replace(one, title=self._title(one.logits))

    def _title(self, logits: np.ndarray | None) -> str:
        """`cat 97 %`, or empty for a network without class names."""
        if logits is None or logits.ndim != 1 or len(self.names) != len(logits):
            return ""
        best = int(logits.argmax())
        return f"{self.names[best]}  {100 * softmax(logits, 0)[best]:.0f} %"


def summary(explanation: Explanation, names: Sequence[str]) -> list[dict[str, Any]]:
    """The most probable classes; see `Task.summary`."""
    if explanation.logits is None:
        return []
    shares = softmax(explanation.logits, 0)
    best = np.argsort(-shares, kind="stable")[:MOST]
    return [{"class": names[i] if names else str(i), "share": float(shares[i])} for i in best]


explainer = ClassifyExplainer
