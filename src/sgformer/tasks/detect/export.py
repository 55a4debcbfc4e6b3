"""The exported graphs of a detector: all of it for one image size, or its backbone and feature pyramid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sgformer.exporting.graphs import DenseGraph
from sgformer.models.pyramid import STRIDES


class PyramidGraph(DenseGraph):
    """A detector's backbone and feature pyramid: "level0" ... "level4", (B, width, H / s, W / s), strides s 4 to 64."""

    @property
    def task(self) -> str:  # type: ignore[override]
        return self.model.task

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        if not (self.features or self.significance):
            return self._levels(self.model.backbone(image))
        inspection = self._network().inspect(image)
        return (*self._levels(inspection.features), *self._extra(inspection))

    def _levels(self, maps: list[Tensor]) -> tuple[Tensor, ...]:
        return tuple(self.model.heads.fpn({str(i): m for i, m in enumerate(maps)}).values())

    def _own(self) -> list[str]:
        return [f"level{i}" for i in range(len(STRIDES) + 1)]

    def _own_maps(self) -> dict[str, tuple[int, int]]:
        return dict.fromkeys(self._own(), (2, 3))

    def _reading(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        kept = {name: metadata[name] for name in ("category_ids", "keypoints", "skeleton") if name in metadata}
        return {**kept, "part": "backbone and feature pyramid"}


class DetectorGraph(PyramidGraph):
    """The whole detector for one image of a fixed size: boxes (N, 4) [x1, y1, x2, y2] in its pixels, labels (N,) class
    indices, scores (N,) and, if it has them, masks (N, 1, 28, 28) or keypoints (N, K, 3), for N detections."""

    whole_image = True

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        maps, extra = self.model.backbone(image), []
        if self.features or self.significance:
            inspection = self._network().inspect(image)
            maps, extra = inspection.features, self._extra(inspection)
        size = (int(image.shape[-2]), int(image.shape[-1]))
        (found,), _ = self.model.heads(maps, image, [size])
        return (found["boxes"], found["labels"] - 1, *(found[name] for name in self._own()[2:]), *extra)

    def axes(self, open_size: bool) -> dict[str, dict[int, str]]:
        return {name: {0: "objects"} for name in self._own()}

    def _own(self) -> list[str]:
        more = {"mask": "masks", "keypoints": "keypoints"}
        return ["boxes", "labels", "scores", *(more[kind] for kind in self.model.kinds[1:])]

    def _reading(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        return {**super()._reading(metadata), "part": "whole"}


def graph(model: Any, metadata: Mapping[str, Any], whole: bool, features: bool, significance: bool) -> DenseGraph:
    """See `Task.graph`: the whole detector, or its pyramid alone."""
    return (DetectorGraph if whole else PyramidGraph)(model, metadata, features, significance).eval()
