"""The exported graph of a classifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sgformer.exporting.graphs import Graph


class ClassifierGraph(Graph):
    """logits (B, classes)."""

    task = "classify"

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        if not (self.features or self.significance):
            return (self.model(image),)
        inspection = self.model.inspect(image)
        return (inspection.logits, *self._extra(inspection))

    def _network(self) -> Any:
        return self.model

    def _reading(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        return {"crop_pct": metadata.get("crop_pct", 0.9), "interpolation": metadata.get("interpolation", "bicubic")}


def graph(model: Any, metadata: Mapping[str, Any], whole: bool, features: bool, significance: bool) -> Graph:
    """See `Task.graph`."""
    return ClassifierGraph(model, metadata, features, significance).eval()
