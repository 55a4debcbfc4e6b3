"""SG-Former for sequences: text, sound, time series, ordered sets.

As in the backbone, blocks come in pairs: a hybrid-scale block yields the attention that every token receives, and in
the self-guided block after it all tokens attend to a few pooled tokens, which are dense where that is high. Windows,
reductions and convolutions have one dimension. :class:`SelfGuidedAttention1d` also stands alone, in a network of your
own, with significance from the tokens themselves, from a head trained with the task, or from the caller.

A batch holds sequences of unequal lengths, padded at the end. Given ``lengths``, nothing of a sequence's result depends
on the padding or on its neighbours: convolutions see zeros there, keys are masked, and every sequence is sorted,
divided into regions and pooled by its own length.

Legend: B batch, N tokens of the longest sequence, C channels, M pooled tokens, r reduction, w window.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgformer import ops
from sgformer.models.backbone import SelfGuidedAttention
from sgformer.models.config import CHOICES, SIGNIFICANCE, Region
from sgformer.models.layers import init_module
from sgformer.models.significance import (
    SOURCES,
    MergeAggregation,
    WeightedAggregation,
    gate,
    make_source,
    standardise,
)
from sgformer.ops import MergedTokens, TokenGroups

#: Sources that need the attention of a hybrid-scale block, which the attention alone lacks.
NEED_HYBRID = ("hybrid", "coarse", "fine", "inverted")

#: Sources that look at one token at a time, and so may see all sequences and their padding at once.
PER_TOKEN = ("hybrid", "coarse", "fine", "inverted", "uniform", "feature-norm", "learned")

#: What a self-guided block made of its tokens: all sequences' together, or each one's if they had lengths.
Tokens = TokenGroups | MergedTokens | list[TokenGroups]


class LocalConv1d(nn.Conv1d):
    """Depthwise convolution with kernel size 3, (B, C, N) to the same."""

    def __init__(self, dim: int):
        super().__init__(dim, dim, 3, padding=1, groups=dim)


def convolve_sequence(conv: nn.Module, x: Tensor) -> Tensor:
    """A convolution of tokens, (B, N, C) -> (B, N', C')."""
    return conv(x.transpose(1, 2)).transpose(1, 2)


def valid_tokens(x: Tensor, lengths: Tensor | None) -> Tensor | None:
    """(B, N) bool: which tokens of x (B, N, C) are not padding; None without lengths.

    Raises:
        ValueError: ``lengths`` is not (B,) whole numbers from 1 to N.
    """
    if lengths is None:
        return None
    B, N = x.shape[:2]
    if lengths.shape != (B,) or lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise ValueError(
            f"lengths must be {B} whole numbers, one a sequence (got {lengths.dtype} of shape {tuple(lengths.shape)})"
        )
    least, most = lengths.aminmax()
    if not (least >= 1 and most <= N):
        raise ValueError(f"lengths must be from 1 to {N}, the longest sequence (got {int(least)} to {int(most)})")
    return torch.arange(N, device=x.device) < lengths[:, None]


def without_padding(x: Tensor, valid: Tensor | None) -> Tensor:
    """(B, N, C) with zeros for padding, whatever stood there."""
    return x if valid is None else x.where(valid[..., None], 0)


def rank(source: Callable[..., Tensor], lengths: Tensor | None, *inputs: Tensor) -> Tensor:
    """What a source of significance says of (B, N, ...) inputs, (B, N): of each sequence without its padding, unless
    it is of ``PER_TOKEN``."""
    known = [SOURCES[name] for name in PER_TOKEN]
    if lengths is None or source in known or type(source) in known:
        return source(*inputs)
    each = [source(*(t[i : i + 1, :n] for t in inputs))[0] for i, n in enumerate(lengths.tolist())]
    padded = nn.utils.rnn.pad_sequence(each, batch_first=True)
    return F.pad(padded, (0, inputs[0].shape[1] - padded.shape[1]))


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
        tokens: the grouping of the last call, with ``region_map()`` and ``token_map()``; with ``lengths`` a list of one
            grouping per sequence.

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
        self._grouped: Callable[[], Tokens] | None = None
        self.apply(init_module)
        init_convolutions(self)

    @property
    def tokens(self) -> Tokens | None:
        """See the class. Described when asked for, as only few passes are looked at."""
        with torch.no_grad():
            return self._grouped() if self._grouped else None

    def forward(self, x: Tensor, significance: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            x: (B, N, C).
            significance: (B, N), required if the module has no source.
            lengths: (B,) int64, the tokens of each sequence; what follows them is padding. None: all have N.

        Returns:
            (B, N, C), zero at padding.

        Raises:
            ValueError: significance is missing or has another shape, lengths are not from 1 to N, or the aggregation
                is "merge", which takes no lengths.
        """
        valid = valid_tokens(x, lengths)
        x = without_padding(x, valid)
        gated = significance is None and isinstance(self.source, nn.Module)
        if significance is None:
            if self.source is None:
                raise ValueError("this module has no source of significance: pass significance, (B, N)")
            zeros = x.new_zeros(x.shape[:2], dtype=torch.float32)
            significance = rank(self.source, lengths, *((x, zeros, zeros) if self.named else (x,)))
        if significance.shape != x.shape[:2]:
            raise ValueError(
                f"significance must be one number per token, {tuple(x.shape[:2])} (got {tuple(significance.shape)})"
            )
        x = gate(x, significance) if gated else x
        if lengths is None or valid is None:
            out, grouped = self.attn(x, significance)
            self._grouped = functools.partial(self.attn.describe, grouped, (x.shape[1],))
            return out
        return self._attend_unequal(x, significance, lengths, valid)

    def _attend_unequal(self, x: Tensor, significance: Tensor, lengths: Tensor, valid: Tensor) -> Tensor:
        """As ``self.attn``, by each sequence's own length."""
        attn = self.attn
        aggregate: Any = attn.aggregate
        if isinstance(aggregate, MergeAggregation):
            raise ValueError("aggregation 'merge' takes no lengths: pass sequences of one length, or use another one")
        C = x.shape[-1]
        order = ops.sort_tokens(significance.where(valid, math.inf))  # padding comes last
        groups, real = ops.group_sequences(order, lengths, aggregate.ends, aggregate.rates)
        weights = [standardise(significance, valid)] if isinstance(aggregate, WeightedAggregation) else []
        pooled = aggregate.pool(x, groups, *weights)
        q, local = attn.proj_in(x).split((C, C), dim=-1)
        k, v = attn.kv(pooled).chunk(2, dim=-1)
        q, k, v = (ops.split_heads(t, attn.heads) for t in (q, k, v))
        out = ops.join_heads(attn.attend(q, k, v, torch.cat(real, dim=1)))
        self._grouped = functools.partial(self._of_each, groups, real, lengths)
        return without_padding(attn.proj(out + convolve_sequence(attn.local, without_padding(local, valid))), valid)

    def _of_each(self, groups: list[Tensor], real: list[Tensor], lengths: Tensor) -> list[TokenGroups]:
        each = []
        for i, length in enumerate(lengths.tolist()):
            own = [g[i : i + 1, : int(r[i].sum())] for g, r in zip(groups, real, strict=True)]
            described = self.attn.describe(own, (length,))
            assert isinstance(described, TokenGroups)
            each.append(described)
        return each


class HybridScaleAttention1d(nn.Module):
    """Half of the heads attend to a sequence reduced r times, half within windows of w tokens (section 3.2).

    Args:
        dim: channels C; a multiple of ``heads``.
        heads: attention heads, an even number.
        reduction: r.
        window: w.

    Raises:
        ValueError: the heads are odd or do not divide ``dim``, or a size is below 1.
    """

    def __init__(self, dim: int, heads: int, reduction: int, window: int):
        super().__init__()
        if heads % 2 or dim % heads:
            raise ValueError(f"heads must be even and divide dim (got {heads} and {dim})")
        if min(reduction, window) < 1:
            raise ValueError(f"reduction and window must be at least 1 (got {reduction} and {window})")
        self.heads, self.reduction, self.window = heads // 2, reduction, window
        self.reduce = nn.Conv1d(dim, dim, reduction, reduction)
        self.reduce_norm = nn.LayerNorm(dim, eps=1e-5)
        self.kv_coarse = nn.Linear(dim, dim)
        self.proj_in = nn.Linear(dim, 3 * dim)  # coarse queries; fine queries, keys, values; local term
        self.local = LocalConv1d(dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, C) -> the output, of the same shape, and the coarse and fine terms of significance, (B, N).

        A token's terms are the mean attention that its key receives from the queries that see it, from all tokens of
        the sequence and from those of a window.
        """
        valid = valid_tokens(x, lengths)
        x = without_padding(x, valid)
        N, C = x.shape[1:]
        q_coarse, q_fine, kv_fine, local = self.proj_in(x).split((C // 2, C // 2, C, C), dim=-1)
        coarse_out, coarse = self._attend_coarsely(q_coarse, x, lengths, valid)
        fine_out, fine = self._attend_in_windows(q_fine, kv_fine, valid)
        out = torch.cat([coarse_out, fine_out], dim=-1)
        out = self.proj(out + convolve_sequence(self.local, without_padding(local, valid)))
        return without_padding(out, valid), coarse.repeat_interleave(self.reduction, dim=1)[:, :N], fine

    def _attend_coarsely(
        self, q: Tensor, x: Tensor, lengths: Tensor | None, valid: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(B, N, C / 2), and the attention received by each reduced token, (B, ceil(N / r))."""
        r, N = self.reduction, x.shape[1]
        reduced = convolve_sequence(self.reduce, F.pad(x, (0, 0, 0, -N % r)))
        kv = self.kv_coarse(F.gelu(self.reduce_norm(reduced)))  # (B, ceil(N / r), C)
        keys = valid_tokens(kv, None if lengths is None else (lengths + r - 1) // r)
        q, k, v = (ops.split_heads(t, self.heads) for t in (q, *kv.chunk(2, dim=-1)))
        out, received = ops.attention_and_received(q, k, v, keys, valid)
        return ops.join_heads(out), received / (N if lengths is None else lengths[:, None])

    def _attend_in_windows(self, q: Tensor, kv: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, N, C / 2), and the attention received by each token, (B, N)."""
        w, (B, N, D) = self.window, q.shape
        if valid is None:
            valid = torch.ones(B, N, dtype=torch.bool, device=q.device)
        q, kv = (F.pad(t, (0, 0, 0, -N % w)).reshape(-1, w, t.shape[-1]) for t in (q, kv))  # (B * windows, w, .)
        real = F.pad(valid, (0, -N % w)).reshape(-1, w)
        keys = real | ~real.any(1, keepdim=True)  # a window of padding attends to itself: no softmax of nothing
        q, k, v = (ops.split_heads(t, self.heads) for t in (q, *kv.chunk(2, dim=-1)))
        out, received = ops.attention_and_received(q, k, v, keys, real)
        share = received / real.sum(1, keepdim=True).clamp(min=1)
        return ops.join_heads(out).reshape(B, -1, D)[:, :N], share.reshape(B, -1)[:, :N]


class Mlp1d(nn.Module):
    """fc1, GELU of (h + depthwise convolution of h), fc2: the backbone's, with a kernel of 3 tokens."""

    def __init__(self, dim: int, ratio: float):
        super().__init__()
        self.fc1 = nn.Linear(dim, int(dim * ratio))
        self.conv = LocalConv1d(int(dim * ratio))
        self.fc2 = nn.Linear(int(dim * ratio), dim)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        h = without_padding(self.fc1(x), valid)
        return self.fc2(F.gelu(h + convolve_sequence(self.conv, h)))


class Pair(nn.Module):
    """A hybrid-scale block and the self-guided block that it guides, both pre-norm with an MLP."""

    def __init__(self, hybrid: nn.Module, guided: SelfGuidedAttention1d, source: Any, dim: int, ratio: float, p: float):
        super().__init__()
        self.hybrid, self.guided, self.source = hybrid, guided, source
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=1e-6) for _ in range(4))
        self.mlps = nn.ModuleList(Mlp1d(dim, ratio) for _ in range(2))
        self.drop = nn.Dropout(p)

    def forward(self, x: Tensor, lengths: Tensor | None, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B, N, C) -> the same, and significance with its coarse and fine terms, (B, N)."""
        out, coarse, fine = self.hybrid(self.norms[0](x), lengths)
        x = x + self.drop(out)
        x = x + self.drop(self.mlps[0](self.norms[1](x), valid))
        significance = rank(self.source, lengths, x, coarse, fine)
        tokens = self.norms[2](x)
        if isinstance(self.source, nn.Module):
            tokens = gate(tokens, significance)
        x = x + self.drop(self.guided(tokens, significance, lengths))
        return x + self.drop(self.mlps[1](self.norms[3](x), valid)), significance, coarse, fine


@dataclass
class SequenceInspection:
    """The intermediate results of one forward pass; one entry per pair of blocks.

    Attributes:
        logits: (B, num_classes).
        significance: (B, N) float32, detached: what the tokens were sorted by. At padding it means nothing.
        coarse, fine: (B, N): the attention received from coarse and fine heads.
        tokens: what became key/value tokens; one grouping per sequence if they had lengths.
    """

    logits: Tensor
    significance: list[Tensor] = field(default_factory=list)
    coarse: list[Tensor] = field(default_factory=list)
    fine: list[Tensor] = field(default_factory=list)
    tokens: list[Tokens] = field(default_factory=list)


class SGFormer1d(nn.Module):
    """Pairs of hybrid-scale and self-guided blocks on a sequence, the mean over its tokens, a linear classifier.

    What makes tokens of words or samples is yours: an embedding, strided convolutions (:class:`Stem1d`). Positions need
    no encoding, as the local terms' convolutions tell them.

    Args:
        dim: channels C of the tokens; a multiple of ``heads``.
        heads: attention heads, an even number.
        pairs: pairs of blocks.
        num_classes: of the classifier; 0 for the mean of the tokens instead.
        regions: (share, rate) of the self-guided blocks, least significant first.
        reduction, window: of the hybrid-scale blocks, in tokens.
        significance: a name of ``models.config.SIGNIFICANCE``; "hybrid" is the paper's.
        aggregation: "linear", "mean" or "weighted"; "merge" for sequences of one length.
        attention: "softmax" or "linear".
        mlp_ratio: hidden width of the MLPs over ``dim``.
        dropout: probability, on every residual branch and before the classifier.

    Raises:
        ValueError: the value of an option is invalid; the message has the value.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        pairs: int = 2,
        num_classes: int = 10,
        regions: Sequence[tuple[float, int]] = ((0.5, 8), (0.5, 2)),
        reduction: int = 8,
        window: int = 16,
        significance: str = "hybrid",
        aggregation: str = "linear",
        attention: str = "softmax",
        mlp_ratio: float = 3.0,
        dropout: float = 0.0,
    ):
        super().__init__()
        if significance not in SIGNIFICANCE:
            raise ValueError(f"significance must be one of {', '.join(SIGNIFICANCE)} (got {significance})")
        self.num_classes = num_classes
        self.pairs = nn.ModuleList(
            Pair(
                HybridScaleAttention1d(dim, heads, reduction, window),
                SelfGuidedAttention1d(dim, heads, regions, None, aggregation, attention),
                make_source(significance, dim),
                dim,
                mlp_ratio,
                dropout,
            )
            for _ in range(pairs)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        self.apply(init_module)
        init_convolutions(self)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Classify.

        Args:
            x: (B, N, C) tokens.
            lengths: (B,) int64, the tokens of each sequence; what follows them is padding. None: all have N.

        Returns:
            (B, num_classes).

        Raises:
            ValueError: lengths are not from 1 to N.
        """
        return self._classify(self.forward_features(x, lengths), lengths)

    def forward_features(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(B, N, C) -> the last block's tokens, normalised, (B, N, C), zero at padding."""
        return self._features(x, lengths)

    def _features(self, x: Tensor, lengths: Tensor | None, inspection: SequenceInspection | None = None) -> Tensor:
        valid = valid_tokens(x, lengths)
        x = without_padding(x, valid)
        for pair in self.pairs:
            assert isinstance(pair, Pair)
            x, significance, coarse, fine = pair(x, lengths, valid)
            if inspection is not None:
                assert pair.guided.tokens is not None
                inspection.significance.append(significance.detach())
                inspection.coarse.append(coarse)
                inspection.fine.append(fine)
                inspection.tokens.append(pair.guided.tokens)
        return without_padding(self.norm(x), valid)

    def inspect(self, x: Tensor, lengths: Tensor | None = None) -> SequenceInspection:
        """As ``forward``, with what the blocks looked at."""
        inspection = SequenceInspection(x)
        inspection.logits = self._classify(self._features(x, lengths, inspection), lengths)
        return inspection

    def _classify(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """The mean over each sequence's tokens, and the classifier."""
        total = x.sum(1)
        return self.head(self.drop(total / (x.shape[1] if lengths is None else lengths[:, None].to(total.dtype))))


class Stem1d(nn.Module):
    """Strided convolutions from samples to tokens: (B, N) or (B, N, C_in) -> (B, ceil(N / s), C), s the stride.

    Args:
        dim_in: channels of the samples.
        dim: channels of the tokens.
        strides: of the convolutions, whose kernels have 2 s + 1 samples.
    """

    def __init__(self, dim_in: int, dim: int, strides: Sequence[int] = (4, 4)):
        super().__init__()
        self.strides = tuple(strides)
        dims = [dim_in] + [dim] * len(self.strides)
        self.convs = nn.ModuleList(nn.Conv1d(dims[i], dim, 2 * s + 1, s, padding=s) for i, s in enumerate(self.strides))
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=1e-5) for _ in self.strides)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The tokens, and the length of each sequence in tokens, None without lengths.

        Raises:
            ValueError: lengths are not from 1 to N.
        """
        x = x[..., None] if x.ndim == 2 else x
        for i, (conv, norm, stride) in enumerate(zip(self.convs, self.norms, self.strides, strict=True)):
            x = norm(convolve_sequence(conv, without_padding(x, valid_tokens(x, lengths))))
            x = F.gelu(x) if i + 1 < len(self.strides) else x
            lengths = None if lengths is None else (lengths + stride - 1) // stride
        return x, lengths


def init_convolutions(module: nn.Module) -> None:
    """Normal, std sqrt(2 / fan out), as the backbone's; biases 0."""
    for conv in module.modules():
        if isinstance(conv, nn.Conv1d):
            fan_out = conv.kernel_size[0] * conv.out_channels // conv.groups
            nn.init.normal_(conv.get_parameter("weight"), std=math.sqrt(2 / fan_out))
            nn.init.zeros_(conv.get_parameter("bias"))
