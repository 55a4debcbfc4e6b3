"""Attention without a softmax, and so without a matrix of queries and keys.

Legend: B batch, h heads, N queries, M keys, d channels of a head.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attend_linearly(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None) -> Tensor:
    """f(q) (f(k)^T v) / (f(q) sum of f(k)), f = elu + 1 (Katharopoulos et al., "Transformers are RNNs", ICML 2020).

    Weights are positive and sum to 1, as a softmax's do; the cost grows with N d^2 and M d^2 instead of N M d.

    Args:
        q: (B, h, N, d).
        k, v: (B, h, M, d).
        valid: (B, M) bool, False for keys that are padding; every row must have one True. None: all are real.

    Returns:
        (B, h, N, d) in v's dtype.
    """
    q, k = F.elu(q) + 1, F.elu(k) + 1
    if valid is not None:
        k = k * valid[:, None, :, None]
    weight = (q * k.sum(2, keepdim=True)).sum(-1, keepdim=True)  # (B, h, N, 1), never 0 as f > 0
    return (q @ (k.transpose(2, 3) @ v) / weight).to(v.dtype)
