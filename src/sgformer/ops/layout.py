"""Attention heads: splitting, joining, and attention window by window.

Legend: B batch, H x W grid, h heads, D channels of all heads together, d = D / h.
"""

from __future__ import annotations

from torch import Tensor

from sgformer.ops.attention import attention_and_received
from sgformer.ops.sizes import known
from sgformer.ops.windows import merge, merge_heads, partition_heads, valid_tokens


def split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, N, C) -> (B, h, N, d)


def join_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)  # (B, h, N, d) -> (B, N, C)


def attend_windows(
    q: Tensor, kv: Tensor, heads: int, q_window: tuple[int, int], kv_window: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Attention of queries (B, H, W, D) to keys and values (B, H', W', 2 D) by windows, with all padding masked.

    Returns the output (B, H, W, D) and the attention each key received, summed over queries: (B, H', W').
    """
    B, grid, kv_grid = q.shape[0], (q.shape[1], q.shape[2]), (kv.shape[1], kv.shape[2])
    # A window larger than the grid shrinks to it: the same sums without the padding.
    q_window = _within(q_window[0], grid[0]), _within(q_window[1], grid[1])
    kv_window = _within(kv_window[0], kv_grid[0]), _within(kv_window[1], kv_grid[1])
    real_q = valid_tokens(grid, q_window, q.device)
    real_k = valid_tokens(kv_grid, kv_window, q.device)
    q = partition_heads(q, q_window, heads)
    k, v = (partition_heads(t, kv_window, heads) for t in kv.chunk(2, dim=-1))
    real_q, real_k = (None if m is None else m.repeat(B, 1) for m in (real_q, real_k))
    out, received = attention_and_received(q, k, v, real_k, real_q)
    out = merge_heads(out, q_window, grid)
    return out, merge(received[..., None], kv_window, kv_grid)[..., 0]


def _within(side: int, grid: int) -> int:
    return grid if known(grid < side) else side
