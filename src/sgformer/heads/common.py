"""Shared parts of the segmentation heads: their convolution, resizing, and the classifier."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class ConvNormAct(nn.Sequential):
    """Convolution without bias, batch norm, ReLU; keeps H and W. NCHW.

    `torch.nn.SyncBatchNorm.convert_sync_batchnorm` makes the norm use the statistics of all processes.
    """

    def __init__(self, dim_in: int, dim: int, kernel: int = 3):
        super().__init__()
        self.conv = nn.Conv2d(dim_in, dim, kernel, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(dim)
        self.act = nn.ReLU()
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")


class PixelClassifier(nn.Sequential):
    """Dropout of whole channels, then a 1 x 1 convolution to class logits."""

    def __init__(self, dim: int, num_classes: int, dropout: float):
        super().__init__()
        self.dropout = nn.Dropout2d(dropout)
        self.conv = nn.Conv2d(dim, num_classes, 1)
        nn.init.normal_(self.conv.weight, std=0.01)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]


def resize(x: Tensor, like: Tensor) -> Tensor:
    """Bilinear resize (corners not aligned) of (B, C, h, w) to the H and W of `like`."""
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)
