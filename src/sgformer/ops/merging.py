"""Groups by similarity: within a region of sorted tokens, every token joins the most similar of a few seeds.

One step of ToMe's bipartite matching (Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023) with few
destinations and many sources. Group sizes differ; every token is in exactly one group.

Legend: B batch, N tokens, C channels; region i holds L_i sorted tokens and makes G_i groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sgformer.ops.kernels import serving
from sgformer.ops.regroup import lengths_at


@dataclass(frozen=True)
class MergedTokens:
    """The origin of every key/value token, for groups of any size; cf. :class:`~sgformer.ops.TokenGroups`.

    Attributes:
        grid: (H, W) of the token grid, or (N,) of a sequence.
        token: (B, N) int64, the key/value token that each token was merged into.
        region: (B, N) int64, its region, 0 the least significant.
        count: number of key/value tokens of an image.
    """

    grid: tuple[int, ...]
    token: Tensor
    region: Tensor
    count: int

    def __len__(self) -> int:
        return self.count

    def region_map(self) -> Tensor:
        """(B, H, W) int64: the region of each token, 0 the least significant."""
        return self.region.view(-1, *self.grid)

    def token_map(self) -> Tensor:
        """(B, H, W) int64: the key/value token that each token was merged into."""
        return self.token.view(-1, *self.grid)


def most_similar(x: Tensor, seeds: Tensor) -> Tensor:
    """The seed with the highest product with each token: (B, L, C) and (B, G, C) -> (B, L) int64."""
    if kernels := serving(x, seeds):
        return kernels.most_similar(x, seeds)
    return (x @ seeds.transpose(1, 2)).argmax(-1)


def merge_similar(
    x: Tensor, order: Tensor, ends: Sequence[tuple[int, int]], rates: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean of each group of similar tokens.

    In region i, ceil(L_i / r_i) seeds are taken evenly from the sorted tokens; every other token joins the seed with
    the highest cosine similarity. No gradient flows through the choice.

    Args:
        x: (B, N, C).
        order: (B, N) int64 from ``sort_tokens``.
        ends: of the regions, least significant first, from :func:`~sgformer.ops.regroup.cumulative`.
        rates: r_i of each region.

    Returns:
        The key/value tokens (B, sum of G_i, C), and for every token of the grid its key/value token and its region,
        each (B, N) int64.
    """
    B, N, C = x.shape
    lengths = lengths_at(N, ends)
    direction = F.normalize(x.detach(), dim=-1)
    joined, regions, start = [], [], 0
    for i, (members, rate) in enumerate(zip(order.split(lengths, dim=1), rates, strict=True)):
        length, groups = members.shape[1], -(-members.shape[1] // rate)
        here = direction.gather(1, members[..., None].expand(-1, -1, C))  # (B, L, C)
        seeds = torch.div((2 * torch.arange(groups, device=x.device) + 1) * length, 2 * groups, rounding_mode="floor")
        choice = most_similar(here, here[:, seeds])
        choice[:, seeds] = torch.arange(groups, device=x.device)  # a seed joins itself, whatever the rounding
        joined.append(choice + start)
        regions.append(torch.full_like(members, i))
        start += groups
    token, region = torch.empty_like(order), torch.empty_like(order)
    token.scatter_(1, order, torch.cat(joined, 1))
    region.scatter_(1, order, torch.cat(regions, 1))
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # half precision cannot sum hundreds
    sums = wide.new_zeros(B, start, C).scatter_add(1, token[..., None].expand(-1, -1, C), wide)
    sizes = wide.new_zeros(B, start).scatter_add(1, token, wide.new_ones(B, N))
    return (sums / sizes[..., None]).to(x.dtype), token, region
