"""Attention modules whose operations run in Triton's kernels, and in torch where those do not serve.

They are their eager classes, with the same parameters and layers, all of which are called as before: hooked, replaced
and adapted layers need no exception.
"""

from __future__ import annotations

from typing import Any

import torch.nn as nn
from torch import Tensor

from sgformer import ops
from sgformer.backends.eligibility import intact
from sgformer.backends.triton import functions
from sgformer.models.backbone import HybridScaleAttention, MultiScaleAttention, SelfGuidedAttention
from sgformer.models.layers import WeightedSum
from sgformer.models.significance import LinearAggregation
from sgformer.ops.kernels import using


class _WithKernels(nn.Module):
    def forward(self, *args: Any) -> Any:
        with using(functions):
            return super().forward(*args)


class TritonHybrid(_WithKernels, HybridScaleAttention):
    pass


class TritonMultiScale(_WithKernels, MultiScaleAttention):
    pass


class TritonGuided(_WithKernels, SelfGuidedAttention):
    pass


class TritonAggregation(LinearAggregation):
    def pool(self, x: Tensor, groups: list[Tensor]) -> Tensor:
        if not all(intact(region, WeightedSum) for region in self):
            return super().pool(x, groups)
        return ops.aggregate(x, groups, self.weights(), [region.bias for region in self])


#: Module with kernels -> the module that it replaces.
EAGER: dict[type[nn.Module], type[nn.Module]] = {
    TritonHybrid: HybridScaleAttention,
    TritonMultiScale: MultiScaleAttention,
    TritonGuided: SelfGuidedAttention,
    TritonAggregation: LinearAggregation,
}
