"""Pure functions on tensors: windows, attention, regrouping. Each has a slow, obvious twin in ``reference``."""

from sgformer.ops.attention import attend, attention_and_received
from sgformer.ops.layout import attend_windows, join_heads, split_heads
from sgformer.ops.linear_attention import attend_linearly
from sgformer.ops.merging import MergedTokens, merge_similar
from sgformer.ops.regroup import (
    TokenGroups,
    aggregate,
    cumulative,
    gather_groups,
    group_at,
    group_sequences,
    group_tokens,
    lengths_at,
    region_lengths,
    resample_weights,
    share_of,
    sort_tokens,
    weighted_sum,
)
from sgformer.ops.windows import enlarge, merge, partition, valid_tokens

__all__ = [
    "MergedTokens",
    "TokenGroups",
    "aggregate",
    "attend",
    "attend_linearly",
    "attend_windows",
    "attention_and_received",
    "cumulative",
    "enlarge",
    "gather_groups",
    "group_at",
    "group_sequences",
    "group_tokens",
    "join_heads",
    "lengths_at",
    "merge",
    "merge_similar",
    "partition",
    "region_lengths",
    "resample_weights",
    "share_of",
    "sort_tokens",
    "split_heads",
    "valid_tokens",
    "weighted_sum",
]
