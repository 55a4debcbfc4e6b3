"""How far attention over pooled keys and values is from attention over all of them, and why (docs/theory.md).

Legend: h heads, Q queries, N tokens, M groups, d channels of a head; one image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AggregationError:
    """The error of pooled attention, its two causes, and their bound.

    Attributes:
        full: (h, Q, d), attention over all tokens.
        pooled: (h, Q, d), attention over the groups' means.
        within: (h, Q, d), the part of ``full - pooled`` that comes from weighting the members of a group alike.
        between: (h, Q, d), the part that comes from underrating groups of unlike keys; the error is their sum.
        bound: (h, Q), an upper bound on the norm of the error.
        received: (h, Q, M), the attention that the groups' tokens receive in ``full``.
    """

    full: Tensor
    pooled: Tensor
    within: Tensor
    between: Tensor
    bound: Tensor
    received: Tensor

    @property
    def relative(self) -> Tensor:
        """(h, Q): the norm of the error over that of ``full``."""
        return (self.full - self.pooled).norm(dim=-1) / self.full.norm(dim=-1)


def aggregation_error(q: Tensor, k: Tensor, v: Tensor, token: Tensor, proportional: bool = True) -> AggregationError:
    """Compare attention over the means of groups with attention over all tokens.

    Args:
        q: (h, Q, d) queries.
        k, v: (h, N, d) keys and values of all tokens.
        token: (N,) int64, each token's group, 0 to M - 1; no group is empty.
        proportional: whether a group counts as many times as it has tokens. Without it every group counts once, as in
            the paper, and the tokens of a group share that one vote in ``full``, too.

    Returns:
        All terms of the theorem of docs/theory.md.
    """
    groups = int(token.max()) + 1
    member = torch.nn.functional.one_hot(token, groups).to(q.dtype)  # (N, M)
    size = member.sum(0)
    mean_k, mean_v = ((member.T @ x) / size[:, None] for x in (k, v))  # (h, M, d)
    scale = q.shape[-1] ** -0.5
    score = q @ mean_k.transpose(1, 2) * scale  # (h, Q, M), the mean of its members' scores
    off = q @ k.transpose(1, 2) * scale - score[..., token]  # (h, Q, N), with mean 0 over each group
    tilt = off.exp()
    gain = tilt @ member / size  # at least 1, as the exponential is convex
    votes = (size if proportional else torch.ones_like(size)).log()
    received = (score + votes + gain.log()).softmax(-1)
    pooled = (score + votes).softmax(-1) @ mean_v

    tilted = torch.einsum("hqn,nm,hnd->hqmd", tilt, member, v) / (size * gain)[..., None]  # (h, Q, M, d)
    away = mean_v[:, None] - pooled[:, :, None]
    full = (received[..., None] * tilted).sum(2)
    within = (received[..., None] * (tilted - mean_v[:, None])).sum(2)
    between = ((received * (1 - 1 / gain))[..., None] * away).sum(2)

    reach = torch.where(member.T.bool(), off[:, :, None].abs(), 0).amax(-1).exp()  # (h, Q, M)
    spread = (off.square() @ member / size).sqrt()
    spread_v = (((v - mean_v[:, token]) ** 2).sum(-1) @ member / size).sqrt()  # (h, M)
    each = reach * spread * spread_v[:, None] + reach * spread.square() / 2 * away.norm(dim=-1)
    return AggregationError(full, pooled, within, between, (received * each).sum(-1), received)
