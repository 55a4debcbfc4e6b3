"""The theorem of docs/theory.md: the error of pooled attention is the sum of two terms and below its bound."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sgformer.explaining.aggregation_error import aggregation_error


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 6), st.integers(1, 40), st.integers(1, 12), st.floats(0.01, 3), st.booleans(),
    st.integers(0, 10**6),
)  # fmt: skip
def test_the_error_has_two_terms_and_a_bound(heads, queries, tokens, groups, spread, proportional, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        spread * torch.randn(heads, n, 4, generator=generator, dtype=torch.float64) for n in (queries, tokens, tokens)
    )
    groups = min(groups, tokens)
    token = torch.cat([torch.arange(groups), torch.randint(groups, (tokens - groups,), generator=generator)])
    token = token[torch.randperm(tokens, generator=generator)]
    found = aggregation_error(q, k, v, token, proportional)

    size = token.bincount()
    votes = torch.zeros(tokens) if proportional else -size[token].double().log()
    attention = (q @ k.transpose(1, 2) / 2 + votes).softmax(-1)
    torch.testing.assert_close(found.full, attention @ v)
    means = [torch.stack([x[:, token == g].mean(1) for g in range(groups)], 1) for x in (k, v)]
    scores = q @ means[0].transpose(1, 2) / 2 + (size.double().log() if proportional else 0)
    torch.testing.assert_close(found.pooled, scores.softmax(-1) @ means[1])
    torch.testing.assert_close(found.within + found.between, found.full - found.pooled)
    assert (found.bound >= (found.full - found.pooled).norm(dim=-1) - 1e-12).all()
    for g in range(groups):
        torch.testing.assert_close(found.received[..., g], attention[..., token == g].sum(-1))


def test_groups_of_equal_tokens_lose_nothing():
    torch.manual_seed(0)
    distinct = [torch.randn(2, 5, 4, dtype=torch.float64) for _ in range(2)]
    token = torch.tensor([0, 1, 2, 3, 4, 4, 3, 1, 1])
    found = aggregation_error(torch.randn(2, 7, 4, dtype=torch.float64), *(x[:, token] for x in distinct), token)
    assert found.relative.max() < 1e-12 and found.bound.max() < 1e-12
