"""The exported graphs of all tasks: modules from images to named tensors, with the metadata their readers need.

Legend: B batch, H x W image, C_s channels of stage s.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sgformer._version import __version__
from sgformer.backends.traceable import why_fixed_size, why_unsupported
from sgformer.core.errors import UserError
from sgformer.data.preparing import MEAN, STD
from sgformer.models.backbone import SGFormer
from sgformer.models.pyramid import STRIDES

FEATURES = tuple(f"stride{stride}" for stride in STRIDES)


class Graph(nn.Module):
    """``forward``: normalised images (B, 3, H, W) -> a tuple of tensors, called ``names``.

    Attributes:
        task: "classify", "segment" or "detect".
        network: the SG-Former inside; None for other networks of timm.
        names: of the outputs.
        about: the metadata stored in the file.
    """

    task: str
    whole_image = False  # whether the input is a single image of a fixed size

    def __init__(self, model: Any, metadata: Mapping[str, Any], features: bool = False, significance: bool = False):
        super().__init__()
        self.model, self.features, self.significance = model, features, significance
        network = self._network()
        if (features or significance) and not isinstance(network, SGFormer):
            name = metadata.get("model") or type(network).__name__
            raise UserError(f"--features and --significance are for SG-Former, got {name}")
        self._significance = self._maps(network)
        size = metadata.get("image_size", 224)
        self.names = [*self._own(), *(FEATURES if features else ()), *self._significance]
        self.about = {
            "sgformer": __version__,
            "task": self.task,
            "model": metadata.get("model") or type(network).__name__,
            "config": network.config.to_dict() if isinstance(network, SGFormer) else None,
            "classes": [str(name) for name in metadata.get("classes") or range(model.num_classes)],
            "mean": list(metadata.get("mean", MEAN)),
            "std": list(metadata.get("std", STD)),
            "outputs": self.names,
            "image_size": size if isinstance(size, int) else list(size),
            **self._reading(metadata),
        }

    def why_unsupported(self) -> str | None:
        """Why no tracing format can hold it; None if they can."""
        network = self._network()
        return why_unsupported(network.config) if isinstance(network, SGFormer) else None

    def why_fixed_size(self) -> str | None:
        """Why it can be exported for one image size only; None if sizes may stay open."""
        network = self._network()
        return why_fixed_size(network.config) if isinstance(network, SGFormer) else "the network is not SG-Former"

    def axes(self, open_size: bool) -> dict[str, dict[int, str]]:
        """The dynamic axes of each output, with their names."""
        maps = dict.fromkeys(FEATURES, (2, 3)) | dict.fromkeys(self._significance, (1, 2)) | self._own_maps()
        result: dict[str, dict[int, str]] = {name: {0: "batch"} for name in self.names}
        for name, (height, width) in maps.items() if open_size else ():
            if name in result:
                result[name] |= {height: f"{name}_height", width: f"{name}_width"}
        return result

    def _own(self) -> list[str]:
        return ["logits"]

    def _own_maps(self) -> dict[str, tuple[int, int]]:
        """The height and width axes of its own outputs that are maps."""
        return {}

    def _maps(self, network: Any) -> list[str]:
        """Names of the significance maps: "significance_STAGE_BLOCK", stages from 1 and blocks from 0."""
        if not self.significance:
            return []
        with torch.no_grad():
            inspection = network.inspect(torch.zeros(1, network.in_chans, 32, 32))
        return [f"significance_{key.replace('.', '_')}" for key in inspection.significance]

    def _network(self) -> Any:
        raise NotImplementedError

    def _reading(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    def _extra(self, inspection: Any) -> list[Tensor]:
        maps = inspection.significance.values() if self.significance else ()
        return [*(inspection.features if self.features else ()), *maps]


class DenseGraph(Graph):
    """The backbone of a network with heads."""

    def _network(self) -> Any:
        return self.model.backbone.network
