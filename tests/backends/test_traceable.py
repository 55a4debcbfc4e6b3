"""The copy for exporters computes what the network does, at every size."""

import pytest
import torch
from small_export import SMALL, small

from sgformer import ops
from sgformer.backends.traceable import Aggregation, Windows, traceable, why_fixed_size
from sgformer.heads.upernet import UPerNet, averages
from sgformer.models.config import Region, with_stages
from sgformer.models.significance import LinearAggregation


@pytest.mark.parametrize("size", [(224, 224), (32, 64), (75, 130)])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"coarse": "window"},
        {"aggregation": "mean"},
        {"pairs": "hybrid"},
        {"significance": "learned"},
        {"stages": with_stages(SMALL, scales=((8, 1), (4, 1), (2, 1))).stages},
    ],
    ids=["published", "windows", "mean", "hybrid pairs", "learned", "scales"],
)
@torch.no_grad()
def test_same_numbers(changes, size):
    model = small(**changes)
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = model.inspect(image)
    for fixed in (False, True):
        seen = traceable(model, fixed=fixed).inspect(image)
        torch.testing.assert_close(seen.logits, expected.logits, rtol=1e-10, atol=1e-12)
        for key, value in expected.significance.items():
            torch.testing.assert_close(seen.significance[key], value, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("size", [224, 96])
@pytest.mark.parametrize(
    "name",
    [
        "stem.conv1.conv",
        "stages.0.blocks.0.attn.proj_in",
        "stages.1.downsample.mix",
        "stages.1.blocks.0.mlp",
        "stages.1.blocks.1.attn.kv",
        "stages.2.blocks.1.attn",
        "stages.3.blocks.0.attn",
    ],
)
@torch.no_grad()
def test_modified_parts_are_called_at_one_size_too(name, size):
    model, image = small(), torch.randn(1, 3, size, size, dtype=torch.float64)
    before = model(image)
    model.get_submodule(name).register_forward_hook(
        lambda module, given, out: (out[0] * 2, out[1]) if isinstance(out, tuple) else out * 2
    )
    expected = model(image)
    assert not torch.allclose(expected, before, rtol=1e-6)
    torch.testing.assert_close(traceable(model, fixed=True)(image), expected, rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_a_token_budget_holds_at_one_size():
    model, image = small(), torch.randn(1, 3, 224, 224, dtype=torch.float64)
    model.set_token_budget(0.5)
    torch.testing.assert_close(traceable(model, fixed=True)(image), model(image), rtol=1e-10, atol=1e-12)


def test_the_network_itself_is_left_alone():
    model = small().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    copy = traceable(model)
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not copy.training and not any(p.requires_grad for p in copy.parameters())


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize(("grid", "side"), [((7, 14), 7), ((5, 9), 4), ((3, 2), 7)])
def test_windows_hold_every_token_once(grid, side, fixed):
    count = tuple(-(-g // side) for g in grid)
    windows = Windows.cut(grid, side, count, torch.device("cpu"), fixed)
    tokens = torch.arange(grid[0] * grid[1])
    assert torch.equal(windows.token[windows.place], tokens)
    expected = ops.valid_tokens(grid, (side, side), torch.device("cpu"))
    assert (windows.real is None) == (fixed and expected is None)  # where sizes are open nobody asks whether they tile
    if expected is None:
        assert windows.real is None or windows.real.all()
    else:
        assert torch.equal(windows.real, expected)
        assert torch.equal(windows.token[windows.real.flatten()].sort().values, tokens)


@pytest.mark.parametrize("tokens", [4, 16, 49, 64, 1000, 3136])
@pytest.mark.parametrize(
    "regions", [SMALL.stages[0].regions, SMALL.stages[2].regions, [Region(0.3, 5), Region(0.7, 3)]]
)
def test_regions_are_cut_as_by_the_network(tokens, regions):
    order = torch.randperm(tokens).repeat(2, 1)
    mine = Aggregation(LinearAggregation(regions), "stable", False).groups(order)
    theirs = ops.group_tokens(order, [r.share for r in regions], [r.rate for r in regions])
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize(("cells", "size"), [(1, 7), (3, 7), (6, 4), (6, 16)])
def test_averages_are_torchs_adaptive_ones(cells, size):
    x = torch.randn(1, 2, size, size)
    matrix = averages(cells, size, x)
    expected = torch.nn.functional.adaptive_avg_pool2d(x, cells)
    torch.testing.assert_close(matrix @ x @ matrix.T, expected)


@torch.no_grad()
def test_upernet_pools_the_same():
    head = UPerNet([4, 4, 4, 4], [4, 8, 16, 32], 3, dim=8).eval()
    maps = [torch.randn(1, 4, n, n + 2) for n in (40, 20, 10, 5)]
    torch.testing.assert_close(traceable(head)(maps), head(maps))


def test_regions_too_small_for_small_images_need_one_size():
    assert why_fixed_size(SMALL) is None
    regions = ((Region(0.5, 2), Region(0.5, 2)), (Region(0.5, 2), Region(0.5, 2)), (Region(0.9, 2), Region(0.1, 2)))
    assert "0.1" in why_fixed_size(with_stages(SMALL, regions=regions))
