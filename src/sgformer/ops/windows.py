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
    x, rows, cols = _cut(x, window)
    return x.transpose(2, 3).reshape(B * rows * cols, h * w, C)


def _cut(x: Tensor, window: tuple[int, int]) -> tuple[Tensor, int, int]:
    """(B, H, W, C) -> (B, rows, h, cols, w, C), with zeros to the right and below up to whole windows; rows, cols."""
    (B, H, W, C), (h, w) = x.shape, window
    height, width = ceil_to(H, h), ceil_to(W, w)
    if not (known(height == H) and known(width == W)):
        x = F.pad(x, (0, 0, 0, width - W, 0, height - H))
    rows, cols = height // h, width // w
    if isinstance(rows, torch.SymInt) or isinstance(cols, torch.SymInt):
        # A reshape would make an exporter ask whether rows divides rows * h, which it cannot tell.
        return x.unfold(1, h, h).unfold(2, w, w).permute(0, 1, 4, 2, 5, 3), rows, cols
    return x.reshape(B, rows, h, cols, w, C), rows, cols


def _cropped(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, rows * h, cols * w, C) -> (B, H, W, C), without the padding."""
    (H, W), (height, width) = grid, x.shape[1:3]
    if known(height == H) and known(width == W):
        return x
    if torch.compiler.is_compiling():  # whether a part is contiguous depends on sizes; a selection always is
        return x.index_select(1, torch.arange(H, device=x.device)).index_select(2, torch.arange(W, device=x.device))
    return x[:, :H, :W]


def enlarge(x: Tensor, scale: int, grid: tuple[int, int]) -> Tensor:
    """Nearest-neighbour enlargement by a whole factor, cropped: (B, ceil(H / scale), ceil(W / scale)) -> (B, H, W)."""
    rows, cols = (torch.arange(side, device=x.device) // scale for side in grid)
    return x.index_select(1, rows).index_select(2, cols)


def merge(x: Tensor, window: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The inverse of :func:`partition`: (B * n, h * w, C) -> (B, H, W, C), without the padding."""
    H, W = grid
    h, w = window
    C = x.shape[-1]
    if known(h == H) and known(w == W):
        return x.reshape(x.shape[0], H, W, C)
    rows, cols = ceil_to(H, h) // h, ceil_to(W, w) // w
    B = x.shape[0] // (rows * cols)
    x = x.reshape(B, rows, cols, h, w, C).transpose(2, 3)  # (B, rows, h, cols, w, C)
    return _cropped(x.reshape(B, rows * h, cols * w, C), grid)


def partition_heads(x: Tensor, window: tuple[int, int], heads: int) -> Tensor:
    """:func:`partition` with heads split: (B, H, W, C) -> (B * n, heads, h * w, C / heads), in one copy."""
    B, H, W, C = x.shape
    h, w = window
    if known(h == H) and known(w == W):
        return x.reshape(B, H * W, heads, C // heads).transpose(1, 2)
    x, rows, cols = _cut(x, window)
    x = x.unflatten(-1, (heads, C // heads))  # (B, rows, h, cols, w, heads, d)
    return x.permute(0, 1, 3, 5, 2, 4, 6).reshape(B * rows * cols, heads, h * w, C // heads)


def merge_heads(x: Tensor, window: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The inverse of :func:`partition_heads`: (B * n, heads, h * w, d) -> (B, H, W, heads * d), in one copy."""
    (H, W), (h, w) = grid, window
    heads, d = x.shape[1], x.shape[3]
    if known(h == H) and known(w == W):
        return x.transpose(1, 2).reshape(x.shape[0], H, W, heads * d)
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
    rows, cols = (_places(size, step, device) < size for size, step in ((H, h), (W, w)))
    return (rows[:, None, :, None] & cols[:, None]).reshape(rows.shape[0] * cols.shape[0], h * w)


def _places(size: int, step: int, device: torch.device) -> Tensor:
    """0, 1, 2 ... in rows of `step` that cover a size: (ceil(size / step), step)."""
    starts = step * torch.arange(ceil_to(size, step) // step, device=device)
    return starts[:, None] + torch.arange(step, device=device)
