"""Invariants of the network over the whole registry, at any size."""

import dataclasses
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sgformer
from sgformer.models.config import VARIANTS, Region, SGFormerConfig, StageConfig

PUBLISHED = {"sgformer_s": 22_545_981, "sgformer_m": 38_689_316, "sgformer_b": 77_950_293}
BUDGET = {"sgformer_t": ((8e6, 10e6), (1.2e9, 1.6e9)), "sgformer_n": ((1.5e6, 2.0e6), (0, 0.6e9))}


def small(**options):
    """A network with every kind of block that takes milliseconds."""
    stages = (
        StageConfig(8, 2, 2, 8, (Region(0.25, 196), Region(0.5, 56), Region(0.25, 28))),
        StageConfig(16, 2, 2, 4, (Region(0.25, 49), Region(0.5, 14), Region(0.25, 7))),
        StageConfig(16, 4, 4, 2, (Region(0.5, 2), Region(0.5, 1))),
        StageConfig(24, 2, 1),
    )
    config = SGFormerConfig(stages, **{"num_classes": 5, "img_size": (64, 64), **options})
    return sgformer.create_model(config).eval()


def lively(model):
    """Weights large enough that every path matters to the output."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_equal_the_published_ones(name):
    model = sgformer.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


@pytest.mark.parametrize("name", BUDGET)
def test_small_sizes_stay_within_their_budget(name):
    from torch.utils.flop_counter import FlopCounterMode

    model = sgformer.create_model(name).eval()
    (low, high), (least, most) = BUDGET[name]
    assert low <= sum(p.numel() for p in model.parameters()) <= high
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 224, 224))
    assert least <= counter.get_total_flops() / 2 <= most


side = st.one_of(st.integers(32, 130), st.sampled_from([37, 61, 97, 127, 131]))


@settings(max_examples=25, deadline=None)
@given(side, side, st.sampled_from([1, 3, 4, 13]), st.sampled_from(["global", "window"]), st.integers(1, 2))
def test_any_size_gives_maps_of_the_promised_shape(H, W, channels, coarse, B):
    model = small(in_chans=channels, coarse=coarse)
    with torch.no_grad():
        seen = model.inspect(torch.randn(B, channels, H, W))
    assert seen.logits.shape == (B, 5) and seen.logits.isfinite().all()
    grid = (H, W)
    for s, (features, stage) in enumerate(zip(seen.features, model.config.stages, strict=True)):
        grid = tuple(-(-n // 2) for n in grid) if s else tuple(-(-n // 4) for n in grid)
        assert features.shape == (B, stage.dim, *grid) and features.isfinite().all()
    assert list(seen.significance) == ["1.0", "2.0", "3.0", "3.2"]
    assert list(seen.tokens) == ["1.1", "2.1", "3.1", "3.3"]
    for key, significance in seen.significance.items():
        assert significance.shape[1:] == seen.features[int(key[0]) - 1].shape[2:]
        assert torch.equal(significance, seen.coarse[key] + seen.fine[key])
        torch.testing.assert_close(seen.fine[key].mean((1, 2)), torch.full((B,), 1 / 49))
    for tokens in seen.tokens.values():
        assert (tokens.region_map() >= 0).all() and (tokens.token_map() >= 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("size", [(32, 128), (128, 32), (33, 47), (800, 1333), (224, 224)])
@pytest.mark.parametrize("coarse", ["global", "window"])
def test_every_parameter_has_a_finite_gradient(size, coarse):
    model = small(coarse=coarse).train()
    model(torch.randn(1, 3, *size)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_coarse_significance_has_mean_one_over_the_number_of_reduced_tokens():
    with torch.no_grad():
        seen = small().inspect(torch.randn(1, 3, 224, 448))
        windowed = small(coarse="window").inspect(torch.randn(1, 3, 224, 448))
    for key in seen.coarse:
        torch.testing.assert_close(seen.coarse[key].mean(), torch.tensor(1 / 98))
        torch.testing.assert_close(windowed.coarse[key].mean(), torch.tensor(1 / 49))


def test_coarse_window_against_global():
    a, b = lively(small()), small(coarse="window")
    b.load_state_dict(a.state_dict())
    with torch.no_grad():
        x = torch.randn(2, 3, 224, 224)
        torch.testing.assert_close(a(x), b(x), rtol=1e-4, atol=1e-5)
        # Below, one window still holds all reduced tokens, but its sum is over the 49 r^2 queries of a full one.
        x = torch.randn(2, 3, 160, 96)
        full, ours = a.inspect(x).coarse["1.0"], b.inspect(x).coarse["1.0"]
        torch.testing.assert_close(ours, full * (40 * 24) / (49 * 64))
        x = torch.randn(1, 3, 256, 256)
        assert not torch.allclose(a(x), b(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (75, 50)])
def test_an_image_does_not_see_its_batch_mates(size):
    model = lively(small()).double()
    x = torch.randn(5, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        together, alone = model(x), torch.cat([model(image[None]) for image in x])
        order = torch.randperm(5)
        torch.testing.assert_close(model(x[order]), together[order], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)


def test_gradient_of_a_batch_is_the_mean_of_its_halves():
    model = lively(small()).double()
    x, y = torch.randn(4, 3, 64, 64, dtype=torch.float64), torch.tensor([0, 1, 2, 3])

    def gradient(x, y):
        return torch.autograd.grad(torch.nn.functional.cross_entropy(model(x), y), model.parameters())

    for whole, a, b in zip(gradient(x, y), gradient(x[:2], y[:2]), gradient(x[2:], y[2:]), strict=True):
        torch.testing.assert_close(whole, (a + b) / 2, rtol=1e-8, atol=1e-9)


def test_a_constant_image_is_defined_and_repeatable():
    model = lively(small())
    x = torch.full((2, 3, 100, 70), 0.5)
    with torch.no_grad():
        first, second = model(x), model(x)
    assert first.isfinite().all() and torch.equal(first, second)


@pytest.mark.parametrize("training", [False, True])
def test_bf16_autocast(training):
    model = small().train(training)
    with torch.autocast("cpu", torch.bfloat16):
        seen = model.inspect(torch.randn(2, 3, 75, 64))
    assert seen.logits.isfinite().all()
    assert all(s.dtype == torch.float32 for s in seen.significance.values())
    if training:
        seen.logits.float().square().sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())


def test_gradient_checkpointing_changes_nothing_but_memory():
    model = lively(small(drop_path_rate=0.3)).train()
    x = torch.randn(2, 3, 64, 64)

    def run(enable):
        model.set_grad_checkpointing(enable)
        torch.manual_seed(1)
        return torch.autograd.grad(model(x).square().sum(), model.parameters())

    for a, b in zip(run(False), run(True), strict=True):
        assert torch.equal(a, b)


def test_significance_moves_tokens_without_a_gradient():
    model = small().train()
    seen = model.inspect(torch.randn(1, 3, 64, 64))
    assert not any(s.requires_grad for s in seen.significance.values())


def test_inspect_reports_what_forward_computed():
    model = lively(small())
    x = torch.randn(2, 3, 90, 64)
    with torch.no_grad():
        seen = model.inspect(x)
        assert torch.equal(seen.logits, model(x))
        for a, b in zip(seen.features, model.forward_intermediates(x, intermediates_only=True), strict=True):
            assert torch.equal(a, b)
    for key, tokens in seen.tokens.items():
        stage, block = key.split(".")
        significance = seen.significance[f"{stage}.{int(block) - 1}"].flatten(1)
        mean = [significance.gather(1, index.flatten(1)).mean().item() for index in tokens.indices]
        assert mean == sorted(mean)  # regions come least significant first


def test_a_config_goes_through_plain_data_and_back():
    for config in VARIANTS.values():
        assert SGFormerConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    "change,says",
    [
        ({"coarse": "slide"}, "slide"),
        ({"drop_path_rate": 1.5}, "1.5"),
        ({"img_size": 8}, "8"),
        ({"color": 3}, "color"),
        ({"num_classes": -1}, "-1"),
    ],
)
def test_a_bad_config_names_the_value(change, says):
    with pytest.raises(ValueError, match=says):
        VARIANTS["sgformer_n"].replace(**change)


def test_a_bad_stage_names_the_trouble():
    good = VARIANTS["sgformer_n"].stages[0]
    for change in ({"heads": 3}, {"depth": 3}, {"regions": ()}, {"regions": ((0.5, 2),)}, {"dim": 25}):
        with pytest.raises(ValueError, match="got"):
            dataclasses.replace(good, **change)


def test_unknown_size_suggests_the_nearest():
    with pytest.raises(sgformer.UserError, match="sgformer_s"):
        sgformer.create_model("sgformer-s")


def test_the_gradient_of_a_batch_is_the_mean_of_its_halves():
    """No sample sees another one: neither through a norm nor through the reallocation of tokens."""
    torch.manual_seed(0)
    model = sgformer.create_model("sgformer_n", num_classes=5, dtype=torch.float64).eval()  # without drop path
    images, labels = torch.randn(4, 3, 64, 96, dtype=torch.float64), torch.tensor([0, 3, 1, 4])

    def gradients(part):
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(images[part]), labels[part]).backward()
        return [p.grad.clone() for p in model.parameters()]

    whole, first, second = (gradients(part) for part in (slice(0, 4), slice(0, 2), slice(2, 4)))
    for a, b, c in zip(whole, first, second, strict=True):
        torch.testing.assert_close(a, (b + c) / 2, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_parts_that_are_timms_elsewhere_draw_the_same_numbers(dtype):
    """Stochastic depth, initialisation and pooling are written here because timm takes seconds to import."""
    from timm.layers import ClassifierHead as TimmHead
    from timm.layers import DropPath as TimmDropPath
    from timm.layers import trunc_normal_

    from sgformer.models.layers import ClassifierHead, DropPath, truncated_normal_

    def drawn(make):
        torch.manual_seed(0)
        return make()

    x = torch.randn(8, 5, 6, 4).to(dtype)
    assert torch.equal(drawn(lambda: DropPath(0.3)(x)), drawn(lambda: TimmDropPath(0.3)(x)))
    assert DropPath(0.3).eval()(x) is x
    weight = torch.empty(40, 50)
    assert torch.equal(
        drawn(lambda: truncated_normal_(weight.clone(), 0.02)), drawn(lambda: trunc_normal_(weight.clone(), std=0.02))
    )
    maps = torch.randn(2, 12, 3, 4)
    for pool in ("avg", "max", "avgmax", "catavgmax"):
        mine, theirs = (drawn(partial(kind, 12, 5, pool)) for kind in (ClassifierHead, TimmHead))
        assert torch.equal(mine(maps), theirs(maps)) and mine.num_features == theirs.num_features
        assert torch.equal(mine(maps, pre_logits=True), theirs(maps, pre_logits=True))
        mine.reset(0)
        assert torch.equal(mine(maps), theirs(maps, pre_logits=True))
    assert ClassifierHead(12, 0, "")(maps) is maps
    with pytest.raises(ValueError, match="needs pooled features"):
        ClassifierHead(12, 3, "")
