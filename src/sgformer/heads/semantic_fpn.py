"""Semantic FPN: a feature pyramid, every level brought to stride 4 and summed (Kirillov et al., CVPR 2019)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from sgformer.heads.common import ConvNormAct, PixelClassifier, resize
from sgformer.heads.registry import register_head


@register_head("semantic-fpn")
class SemanticFPN(nn.Module):
    """Four maps to class logits at the first one's resolution.

    Args:
        channels: of the maps, finest first.
        strides: of the maps in pixels, each twice the one before.
        num_classes: of the logits.
        dim: width of the head; the pyramid is twice as wide.
        dropout: probability that a channel is dropped before the classifier.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        dim: int = 128,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.fpn = FeaturePyramidNetwork(list(channels), 2 * dim)
        # A level of stride 2^n * finest passes n convolutions, each followed by a doubling; the finest passes one.
        doublings = [round(math.log2(stride / strides[0])) for stride in strides]
        self.levels = nn.ModuleList(
            nn.ModuleList(ConvNormAct(dim if i else 2 * dim, dim) for i in range(max(1, n))) for n in doublings
        )
        self.classifier = PixelClassifier(dim, num_classes, dropout)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """(B, C_i, H_i, W_i), finest first -> (B, num_classes, H_0, W_0)."""
        pyramid = list(self.fpn({str(i): x for i, x in enumerate(features)}).values())
        total = self.levels[0][0](pyramid[0])  # type: ignore[index]
        for level, x in zip(list(self.levels)[1:], pyramid[1:], strict=True):
            for conv in level:  # type: ignore[attr-defined]
                x = F.interpolate(conv(x), scale_factor=2, mode="bilinear", align_corners=False)
            total = total + resize(x, total)  # odd sizes: ceil(H / 32) * 8 may be beyond ceil(H / 4)
        return self.classifier(total)
