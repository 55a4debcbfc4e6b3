"""Every fast operation against its slow twin, forward and backward; partition and merge inverse to the bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sgformer import ops
from sgformer.ops import attention as attention_module
from sgformer.ops import reference, regroup

sizes = st.integers(1, 17)


def gradients(out, inputs):
    probe = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    return torch.autograd.grad((out * probe).sum(), inputs)


@settings(max_examples=40, deadline=None)
@given(sizes, sizes, st.integers(1, 8), st.integers(1, 8), st.integers(1, 3))
def test_windows(H, W, h, w, B):
    x = torch.randn(B, H, W, 3)
    windows = ops.partition(x, (h, w))
    assert torch.equal(windows, reference.partition(x, (h, w)))
    assert torch.equal(ops.merge(windows, (h, w), (H, W)), x)
    assert torch.equal(reference.merge(windows, (h, w), (H, W)), x)
    valid = ops.valid_tokens((H, W), (h, w), x.device)
    ones = reference.partition(torch.ones(1, H, W, 1), (h, w))[..., 0]
    assert ones.all() if valid is None else torch.equal(valid, ones.bool())


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.booleans(), st.booleans(),
    st.sampled_from([1, 7, 1 << 24]), st.sampled_from([0, 4, 64]),
)  # fmt: skip
def test_attention_and_received(B, h, N, M, pad, grad, slice_entries, kept_keys):
    q, k, v = (torch.randn(B, h, n, 4, dtype=torch.float64, requires_grad=grad) for n in (N, M, M))
    valid, real = (torch.rand(B, M) > 0.4, torch.rand(B, N) > 0.4) if pad else (None, None)
    if pad:
        valid[:, 0] = real[:, 0] = True
    with pytest.MonkeyPatch.context() as patch:  # also the ways taken for matrices too large for memory
        patch.setattr(attention_module, "SLICE_ENTRIES", slice_entries)
        patch.setattr(attention_module, "KEPT_KEYS", kept_keys)
        out, received = ops.attention_and_received(q, k, v, valid, real)
    slow_out, slow_received = reference.attention_and_received(q, k, v, valid, real)
    torch.testing.assert_close(out, slow_out)
    torch.testing.assert_close(received, slow_received)
    torch.testing.assert_close(ops.attend(q, k, v, valid), slow_out)
    assert not received.requires_grad
    if grad:
        for fast, slow in zip(gradients(out, (q, k, v)), gradients(slow_out, (q, k, v)), strict=True):
            torch.testing.assert_close(fast, slow)


def test_received_attention_is_float32_under_autocast():
    q, k, v = (torch.randn(1, 2, 6, 4) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        _, received = ops.attention_and_received(q, k, v)
    assert received.dtype == torch.float32
    torch.testing.assert_close(received.sum(), torch.tensor(6.0))


shares_and_rates = st.sampled_from(
    [((0.25, 0.5, 0.25), (196, 56, 28)), ((0.25, 0.5, 0.25), (7, 3, 2)), ((0.5, 0.5), (2, 1)), ((1.0,), (5,))]
)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), shares_and_rates, st.booleans())
def test_aggregate(N, regions, ties):
    shares, rates = regions
    x = torch.randn(2, N, 3, dtype=torch.float64, requires_grad=True)
    significance = torch.randint(0, 3, (2, N)).double() if ties else torch.rand(2, N, dtype=torch.float64)
    weights = [torch.randn(1, r, dtype=torch.float64, requires_grad=True) for r in rates]
    bias = [torch.randn(1, dtype=torch.float64, requires_grad=True) for _ in rates]
    groups = ops.group_tokens(ops.sort_tokens(significance), shares, rates)
    fast = ops.aggregate(x, groups, weights, bias)
    slow = reference.aggregate(x, significance, shares, rates, weights, bias)
    torch.testing.assert_close(fast, slow)
    if len(shares) <= N:
        for a, b in zip(gradients(fast, [x, *weights]), gradients(slow, [x, *weights]), strict=True):
            torch.testing.assert_close(a, b)


@settings(max_examples=40, deadline=None)
@given(sizes, st.integers(1, 40))
def test_resample_weights(members, wanted):
    weight = torch.randn(1, members, dtype=torch.float64, requires_grad=True)
    fast, slow = ops.resample_weights(weight, wanted), reference.resample_weights(weight, wanted)
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(fast.sum(), weight.sum())
    torch.testing.assert_close(gradients(fast, [weight]), gradients(slow, [weight]))
    assert wanted != members or torch.equal(fast, weight)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5000), shares_and_rates)
def test_groups_cover_every_token(N, regions):
    shares, rates = regions
    lengths = regroup.region_lengths(N, shares)
    assert sum(lengths) == N and min(lengths) >= (1 if len(shares) <= N else 0)
    order = torch.randperm(N)[None]
    groups = ops.group_tokens(order, shares, rates)
    assert torch.cat([g.flatten() for g in groups]).unique().numel() == N
    for group, length, rate in zip(groups, lengths, rates, strict=True):
        assert group.shape[1] == -(-length // rate)
        if length % rate == 0:
            assert group.unique().numel() == group.numel()


def test_equal_significance_keeps_raster_order():
    assert torch.equal(ops.sort_tokens(torch.ones(2, 50)), torch.arange(50).expand(2, 50))


def test_token_groups_describe_the_grid():
    order = torch.randperm(24)[None]
    groups = ops.group_tokens(order, (0.25, 0.5, 0.25), (6, 4, 2))
    tokens = ops.TokenGroups((4, 6), groups, [torch.ones(r) for r in (6, 4, 2)], [torch.zeros(()) for _ in range(3)])
    assert len(tokens) == 1 + 3 + 3
    regions, members = tokens.region_map(), tokens.token_map()
    assert regions.shape == members.shape == (1, 4, 6)
    assert [(regions == i).sum().item() for i in range(3)] == [6, 12, 6]
    assert torch.equal(regions.flatten()[order[0]], torch.tensor([0] * 6 + [1] * 12 + [2] * 6))
    assert sorted((members == i).sum().item() for i in range(7)) == [2, 2, 2, 4, 4, 4, 6]
    assert members.min() == 0


@pytest.mark.parametrize(
    "length,rate,expected", [(4, 2, [[0, 1], [2, 3]]), (3, 2, [[0, 1], [1, 2]]), (1, 3, [[0, 0, 0]])]
)
def test_group_positions_by_hand(length, rate, expected):
    assert regroup.group_positions(length, rate, torch.device("cpu")).tolist() == expected
