"""Self-guided attention for sequences: text, time series, ordered sets.

As in the backbone, all tokens attend to a few pooled tokens, which are dense where significance is high. The local
term's convolution is one-dimensional, and no hybrid-scale block precedes: significance comes from the tokens
themselves, from a head trained with the task, or from the caller.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sgformer.models.backbone import SelfGuidedAttention
from sgformer.models.config import CHOICES, SIGNIFICANCE, Region
from sgformer.models.layers import init_module
from sgformer.models.significance import gate, make_source
from sgformer.ops import MergedTokens, TokenGroups

#: Sources that need the attention of a hybrid-scale block, which sequences lack.
NEED_HYBRID = ("hybrid", "coarse", "fine", "inverted")


class LocalConv1d(nn.Conv1d):
    """Depthwise convolution with kernel size 3, (B, C, N) to the same."""

    def __init__(self, dim: int):
        super().__init__(dim, dim, 3, padding=1, groups=dim)


def convolve_sequence(conv: nn.Module, x: Tensor) -> Tensor:
    """A convolution of tokens, (B, N, C) to the same."""
    return conv(x.transpose(1, 2)).transpose(1, 2)


class SelfGuidedAttention1d(nn.Module):
    """Self-guided attention of (B, N, C) tokens: a drop-in for self-attention at O(N M) for M pooled tokens, not O(N²).

    Args:
        dim: channels C; a multiple of ``heads``.
        heads: attention heads.
        regions: (share, rate) of the sorted tokens, least significant first; shares sum to 1. A region of L tokens
            becomes ceil(L / rate) key/value tokens.
        significance: a name of ``models.config.SIGNIFICANCE`` that needs no hybrid-scale block, or a function of the
            tokens (B, N, C) -> (B, N). None: passed with every call.
        aggregation: "linear", "mean", "weighted" or "merge".
        attention: "softmax" or "linear".

    Attributes:
        tokens: the grouping of the last call, with ``region_map()`` and ``token_map()``.

    Raises:
        ValueError: the value of an option is invalid; the message has the value.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        regions: Sequence[tuple[float, int]] = ((0.5, 16), (0.5, 4)),
        significance: str | Callable[[Tensor], Tensor] | None = "learned",
        aggregation: str = "linear",
        attention: str = "softmax",
    ):
        super().__init__()
        cut = [Region(*r) for r in regions]
        for name, value in (("aggregation", aggregation), ("attention", attention)):
            if value not in CHOICES[name]:
                raise ValueError(f"{name} must be one of {', '.join(CHOICES[name])} (got {value})")
        if not cut or abs(sum(r.share for r in cut) - 1) > 1e-6 or min(r.rate for r in cut) < 1:
            raise ValueError(f"regions must be (share, rate) with shares summing to 1 and rates >= 1 (got {cut})")
        if dim % heads:
            raise ValueError(f"dim must be a multiple of heads (got {dim} and {heads})")
        if isinstance(significance, str) and (significance not in SIGNIFICANCE or significance in NEED_HYBRID):
            known = ", ".join(name for name in SIGNIFICANCE if name not in NEED_HYBRID)
            raise ValueError(
                f"significance of a sequence must be one of {known}, a function, or None (got {significance})"
            )
        self.source: Any = make_source(significance, dim) if isinstance(significance, str) else significance
        self.named = isinstance(significance, str)
        self.attn = SelfGuidedAttention(dim, heads, cut, aggregation, attention, LocalConv1d, convolve_sequence)
        self.tokens: TokenGroups | MergedTokens | None = None
        self.apply(init_module)
        nn.init.normal_(self.attn.local.get_parameter("weight"), std=math.sqrt(2 / 3))  # sqrt(2 / fan out), as images'

    def forward(self, x: Tensor, significance: Tensor | None = None) -> Tensor:
        """(B, N, C) and optionally significance (B, N), required if the module has no source -> (B, N, C)."""
        gated = significance is None and isinstance(self.source, nn.Module)
        if significance is None:
            if self.source is None:
                raise ValueError("this module has no source of significance: pass significance, (B, N)")
            zeros = x.new_zeros(x.shape[:2], dtype=torch.float32)
            significance = self.source(x, zeros, zeros) if self.named else self.source(x)
        if significance.shape != x.shape[:2]:
            raise ValueError(
                f"significance must be one number per token, {tuple(x.shape[:2])} (got {tuple(significance.shape)})"
            )
        out, grouped = self.attn(gate(x, significance) if gated else x, significance)
        with torch.no_grad():
            self.tokens = self.attn.describe(grouped, (x.shape[1],))
        return out
