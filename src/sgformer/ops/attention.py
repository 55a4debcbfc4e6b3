"""Softmax attention, optionally with the attention that every key receives.

Legend: B batch (of images or of windows), h heads, N queries, M keys, d channels of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sgformer.ops.kernels import serving
from sgformer.ops.sizes import known

#: Attention matrices up to this many entries are held in memory at once; larger ones are computed in slices of queries.
SLICE_ENTRIES = 1 << 24

#: Up to this many keys the attention matrix is always kept: it is about as large as queries and keys, and saves the
#: second pass, half of the forward time. With more keys memory would grow with tokens x keys.
KEPT_KEYS = 64


def attend(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v.

    Args:
        q: (B, h, N, d).
        k, v: (B, h, M, d).
        valid: (B, M) bool, False for keys that are padding; every row must have one True. None: all are real.

    Returns:
        (B, h, N, d).
    """
    mask = None if valid is None else valid[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def attention_and_received(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None, valid_queries: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention, and the attention each key received: the column sums of the softmax, averaged over heads.

    No gradient flows through the received attention, so it need not come from the matrix that autograd would keep:
    with many keys, if gradients are needed or the matrix is large, the output uses the fused kernel and the column sums
    a second pass over queries and keys in bounded slices.

    Args:
        q: (B, h, N, d).
        k, v: (B, h, M, d).
        valid: (B, M) bool, keys that are tokens. None: all.
        valid_queries: (B, N) bool, queries that are tokens and enter the sums. None: all.

    Returns:
        out (B, h, N, d) in q's dtype; received (B, M), float32 (float64 for float64 input) in any autocast dtype.
    """
    if (kernels := serving(q, k, v)) and q.shape[-1] <= kernels.WIDEST_HEAD:
        return kernels.attention_and_received(q, k, v, valid, valid_queries)
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    B, h, N, M = *q.shape[:3], k.shape[2]
    if not known(M <= KEPT_KEYS) and (needs_grad or known(B * h * N * M > SLICE_ENTRIES)):
        return attend(q, k, v, valid), _received(q, k, valid, valid_queries)
    weights = _softmax(q, k, valid)
    return weights.to(v.dtype) @ v, _column_mean(weights.detach(), valid_queries)


@torch.no_grad()
def _received(q: Tensor, k: Tensor, valid: Tensor | None, valid_queries: Tensor | None) -> Tensor:
    B, h, N, _ = q.shape
    if not known(B * h * N * k.shape[2] > SLICE_ENTRIES):
        return _column_mean(_softmax(q, k, valid), valid_queries)
    rows = max(1, SLICE_ENTRIES // (B * h * k.shape[2]))
    total = q.new_zeros(B, k.shape[2], dtype=torch.promote_types(q.dtype, torch.float32))
    for start in range(0, N, rows):
        part = slice(start, start + rows)
        real = None if valid_queries is None else valid_queries[:, part]
        total += _column_mean(_softmax(q[:, :, part], k, valid), real)
    return total


def _softmax(q: Tensor, k: Tensor, valid: Tensor | None) -> Tensor:
    scores = q @ (k * k.shape[-1] ** -0.5).transpose(-2, -1)  # (B, h, N, M); keys are never more than queries
    if valid is not None:
        scores = scores.masked_fill(~valid[:, None, None, :], float("-inf"))
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))


def _column_mean(weights: Tensor, valid_queries: Tensor | None) -> Tensor:
    if valid_queries is None:
        return weights.sum(2).mean(1)  # (B, M)
    return (valid_queries[:, None, None].to(weights.dtype) @ weights).squeeze(2).mean(1)
