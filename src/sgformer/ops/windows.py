"""Partitioning a token grid into windows and merging it again.

Legend: B batch, H x W grid, C channels, h x w one window, n = number of windows in an image.
Sizes are never negated: in a traced network they are tensors, and ONNX divides negative ones towards zero.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def partition(x: Tensor, window: tuple[int, int]) -> Tensor:
    """Cut a grid into non-overlapping windows, zero-padding right and bottom to whole windows.

    Args:
        x: (B, H, W, C).
        window: (h, w) in tokens.

    Returns:
        (B * n, h * w, C); images outermost, then window rows, then window columns.
    """
    B, H, W, C = x.shape
    h, w = window
    if (h, w) == (H, W):
        return x.reshape(B, H * W, C)
    if H % h or W % w:
        x = F.pad(x, (0, 0, 0, (w - W % w) % w, 0, (h - H % h) % h))
    x = x.reshape(B, x.shape[1] // h, h, x.shape[2] // w, w, C)  # (B, rows, h, cols, w, C)
    return x.transpose(2, 3).reshape(-1, h * w, C)


def merge(x: Tensor, window: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The inverse of :func:`partition`: (B * n, h * w, C) -> (B, H, W, C), without the padding."""
    H, W = grid
    h, w = window
    rows, cols = (H + h - 1) // h, (W + w - 1) // w
    x = x.reshape(-1, rows, cols, h, w, x.shape[-1]).transpose(2, 3)  # (B, rows, h, cols, w, C)
    x = x.reshape(-1, rows * h, cols * w, x.shape[-1])
    return x if (rows * h, cols * w) == (H, W) else x[:, :H, :W]


def partition_heads(x: Tensor, window: tuple[int, int], heads: int) -> Tensor:
    """:func:`partition` with heads split: (B, H, W, C) -> (B * n, heads, h * w, C / heads), in one copy."""
    B, H, W, C = x.shape
    h, w = window
    if (h, w) == (H, W):
        return x.reshape(B, H * W, heads, C // heads).transpose(1, 2)
    if H % h or W % w:
        x = F.pad(x, (0, 0, 0, (w - W % w) % w, 0, (h - H % h) % h))
    x = x.reshape(B, x.shape[1] // h, h, x.shape[2] // w, w, heads, C // heads)  # (B, rows, h, cols, w, heads, d)
    return x.permute(0, 1, 3, 5, 2, 4, 6).reshape(-1, heads, h * w, C // heads)


def merge_heads(x: Tensor, window: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The inverse of :func:`partition_heads`: (B * n, heads, h * w, d) -> (B, H, W, heads * d), in one copy."""
    (H, W), (h, w) = grid, window
    heads, d = x.shape[1], x.shape[3]
    rows, cols = (H + h - 1) // h, (W + w - 1) // w
    x = x.reshape(-1, rows, cols, heads, h, w, d).permute(0, 1, 4, 2, 5, 3, 6)  # (B, rows, h, cols, w, heads, d)
    x = x.reshape(-1, rows * h, cols * w, heads * d)
    return x if (rows * h, cols * w) == (H, W) else x[:, :H, :W]


def valid_tokens(grid: tuple[int, int], window: tuple[int, int], device: torch.device) -> Tensor | None:
    """Which positions of each window are tokens and which are padding.

    Returns:
        (n, h * w) bool, or None if the windows tile the grid and all are tokens.
    """
    H, W = grid
    h, w = window
    if H % h == 0 and W % w == 0:
        return None
    return partition(torch.ones(1, H, W, 1, dtype=torch.bool, device=device), window)[..., 0]
