"""Attention without a softmax, so that queries and keys never meet in a matrix.

Legend: B batch, h heads, N queries, M keys, d channels of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attend_linearly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """f(q) (f(k)^T v) / (f(q) sum of f(k)), f = elu + 1 (Katharopoulos et al., "Transformers are RNNs", ICML 2020).

    Weights are positive and sum to 1, as a softmax's do; the cost grows with N d^2 and M d^2 instead of N M d.
    Sums are float32 whatever the autocast dtype.

    Args:
        q: (B, h, N, d).
        k, v: (B, h, M, d).

    Returns:
        (B, h, N, d) in v's dtype.
    """
    dtype = torch.promote_types(v.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        q, k, wide = (F.elu(q.to(dtype)) + 1, F.elu(k.to(dtype)) + 1, v.to(dtype))
        q = q / (q @ k.sum(2)[..., None])  # (B, h, N, 1) below: the weights' sum, never 0 as f > 0
        return (q @ (k.transpose(2, 3) @ wide)).to(v.dtype)
