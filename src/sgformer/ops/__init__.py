"""Pure functions on tensors: windows, attention, regrouping. Each has a slow, obvious twin in ``reference``."""

from sgformer.ops.attention import attend, attention_and_received
from sgformer.ops.regroup import TokenGroups, aggregate, group_tokens, region_lengths, sort_tokens
from sgformer.ops.windows import merge, partition, valid_tokens

__all__ = [
    "TokenGroups",
    "aggregate",
    "attend",
    "attention_and_received",
    "group_tokens",
    "merge",
    "partition",
    "region_lengths",
    "sort_tokens",
    "valid_tokens",
]
