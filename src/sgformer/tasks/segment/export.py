"""The exported graph of a segmentation network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sgformer.exporting.graphs import DenseGraph
from sgformer.heads.common import resize


class SegmenterGraph(DenseGraph):
    """logits (B, classes, H, W)."""

    task = "segment"

    def _own_maps(self) -> dict[str, tuple[int, int]]:
        return {"logits": (2, 3)}

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        if not (self.features or self.significance):
            return (self.model(image)["out"],)
        inspection = self._network().inspect(image)
        return (resize(self.model.head(inspection.features), image), *self._extra(inspection))

    def _reading(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        return {"short_side": metadata["short_side"], "reduce_zero_label": bool(metadata["reduce_zero_label"])}


def graph(model: Any, metadata: Mapping[str, Any], whole: bool, features: bool, significance: bool) -> DenseGraph:
    """See `Task.graph`."""
    return SegmenterGraph(model, metadata, features, significance).eval()
