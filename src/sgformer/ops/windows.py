"""Partitioning a token grid into windows and merging it again.

Legend: B batch, H x W grid, C channels, h x w one window, n = rows * cols = number of windows in an image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sgformer.ops.sizes import ceil_to, known


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
    if known(h == H) and known(w == W):
        return x.reshape(B, H * W, C)
    x, rows, cols = _padded(x, window)
    x = x.reshape(B, rows, h, cols, w, C)
    return x.transpose(2, 3).reshape(B * rows * cols, h * w, C)


def _padded(x: Tensor, window: tuple[int, int]) -> tuple[Tensor, int, int]:
    """(B, H, W, C) with zeros to the right and below up to whole windows, and the rows and columns of those."""
    H, W = x.shape[1:3]
    height, width = ceil_to(H, window[0]), ceil_to(W, window[1])
    if not (known(height == H) and known(width == W)):
        x = F.pad(x, (0, 0, 0, width - W, 0, height - H))
    return x, height // window[0], width // window[1]


def _cropped(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, rows * h, cols * w, C) -> (B, H, W, C), without the padding."""
    (H, W), (height, width) = grid, x.shape[1:3]
    if known(height == H) and known(width == W):
        return x
    x = x[:, :H, :W]
    # With symbols for sizes a copy, as what follows depends on whether the part is contiguous, and that on sizes.
    return x.clone(memory_format=torch.contiguous_format) if torch.compiler.is_compiling() else x


def merge(x: Tensor, window: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The inverse of :func:`partition`: (B * n, h * w, C) -> (B, H, W, C), without the padding."""
    H, W = grid
    h, w = window
    rows, cols, C = ceil_to(H, h) // h, ceil_to(W, w) // w, x.shape[-1]
    B = x.shape[0] // (rows * cols)
    x = x.reshape(B, rows, cols, h, w, C).transpose(2, 3)  # (B, rows, h, cols, w, C)
    return _cropped(x.reshape(B, rows * h, cols * w, C), grid)


def partition_heads(x: Tensor, window: tuple[int, int], heads: int) -> Tensor:
    """:func:`partition` with heads split: (B, H, W, C) -> (B * n, heads, h * w, C / heads), in one copy."""
    B, H, W, C = x.shape
    h, w = window
    if known(h == H) and known(w == W):
        return x.reshape(B, H * W, heads, C // heads).transpose(1, 2)
    x, rows, cols = _padded(x, window)
    x = x.reshape(B, rows, h, cols, w, heads, C // heads)
    return x.permute(0, 1, 3, 5, 2, 4, 6).reshape(B * rows * cols, heads, h * w, C // heads)


def merge_heads(x: Tensor, window: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The inverse of :func:`partition_heads`: (B * n, heads, h * w, d) -> (B, H, W, heads * d), in one copy."""
    (H, W), (h, w) = grid, window
    heads, d = x.shape[1], x.shape[3]
    rows, cols = ceil_to(H, h) // h, ceil_to(W, w) // w
    B = x.shape[0] // (rows * cols)
    x = x.reshape(B, rows, cols, heads, h, w, d).permute(0, 1, 4, 2, 5, 3, 6)  # (B, rows, h, cols, w, heads, d)
    return _cropped(x.reshape(B, rows * h, cols * w, heads * d), grid)


def valid_tokens(grid: tuple[int, int], window: tuple[int, int], device: torch.device) -> Tensor | None:
    """Which positions of each window are tokens and which are padding.

    Returns:
        (n, h * w) bool, or None if the windows tile the grid and all are tokens.
    """
    H, W = grid
    h, w = window
    if known(H % h == 0) and known(W % w == 0):
        return None
    rows = torch.arange(ceil_to(H, h), device=device).view(ceil_to(H, h) // h, 1, h, 1) < H
    cols = torch.arange(ceil_to(W, w), device=device).view(1, ceil_to(W, w) // w, 1, w) < W
    return (rows & cols).reshape(rows.shape[0] * cols.shape[1], h * w)
