"""What may guide a self-guided block: every source and aggregation, by name, trains and is what it says."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_backbone import lively, small

import sgformer
from sgformer import ops
from sgformer.models.config import AGGREGATION, SIGNIFICANCE, VARIANTS, parse_regions, parse_scales, with_stages
from sgformer.models.significance import SOURCES, make_source

BUILT_IN = tuple(SIGNIFICANCE)


def finite_gradients(model, size=(64, 64)):
    model(torch.randn(2, 3, *size)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("aggregation", AGGREGATION)
@pytest.mark.parametrize("significance", BUILT_IN)
def test_every_source_trains_with_every_aggregation(significance, aggregation):
    model = small(significance=significance, aggregation=aggregation).train()
    finite_gradients(model)
    if significance == "learned":
        scores = [p.grad.abs().sum() for n, p in model.named_parameters() if "source.score" in n]
        assert len(scores) == 4 and all(s > 0 for s in scores)


@pytest.mark.parametrize("options", [{"attention": "linear"}, {"pairs": "hybrid"}, {"pairs": "single"}])
def test_every_variant_of_the_blocks_trains(options):
    finite_gradients(small(**options).train())


def test_the_published_model_is_the_default():
    config = VARIANTS["sgformer_n"]
    assert (config.significance, config.aggregation, config.attention, config.pairs) == (
        *("hybrid", "linear", "softmax", "guided"),
    )


def test_pairs_say_what_follows_a_hybrid_block():
    names = {
        p: [type(b).__name__ for s in small(pairs=p).stages for b in s.blocks] for p in ("guided", "hybrid", "single")
    }
    assert names["guided"] == ["HybridBlock", "GuidedBlock"] * 4 + ["PlainBlock"]
    assert names["hybrid"] == ["HybridBlock"] * 8 + ["PlainBlock"]
    assert names["single"] == ["HybridBlock"] * 4 + ["PlainBlock"]


def test_an_option_without_effect_is_refused():
    with pytest.raises(ValueError, match="pairs=hybrid has none"):
        small(pairs="hybrid", significance="fine")
    with pytest.raises(ValueError, match="one of hybrid, coarse"):
        small(significance="colour")


def test_what_the_sources_sort_by():
    maps = {}
    model = lively(small())
    x = torch.randn(2, 3, 75, 64)
    for name in BUILT_IN:
        twin = small(significance=name)
        twin.load_state_dict(model.state_dict(), strict=name != "learned")
        with torch.no_grad():
            seen = twin.inspect(x)
        maps[name] = seen.significance["1.0"]
        assert maps[name].dtype == torch.float32 and not maps[name].requires_grad
        groups = seen.tokens["1.1"]  # grouped by that very map: least significant region first
        ranked = [maps[name].flatten(1).gather(1, i.flatten(1)).mean() for i in groups.indices]
        assert all(a <= b + 1e-6 for a, b in itertools.pairwise(ranked))
        if name == "hybrid":
            first = seen
    assert torch.equal(maps["coarse"], first.coarse["1.0"]) and torch.equal(maps["fine"], first.fine["1.0"])
    assert torch.equal(maps["hybrid"], maps["coarse"] + maps["fine"])
    assert torch.equal(maps["inverted"], -maps["hybrid"])
    assert torch.equal(maps["random"][0], maps["random"][1]) and maps["random"][0].unique().numel() == 19 * 16
    assert (maps["uniform"] == 0).all() and maps["feature-norm"].min() > 0


def test_uniform_keeps_raster_order():
    with torch.no_grad():
        groups = small(significance="uniform").inspect(torch.randn(1, 3, 64, 64)).tokens["3.1"]
    assert torch.equal(torch.cat([i.flatten(1) for i in groups.indices], 1)[0], torch.arange(16))


def test_learned_moves_what_the_task_needs_to_the_salient_end():
    """A task that only one token can answer: its score rises above the others'."""
    from sgformer.models.significance import gate

    source = make_source("learned", 8)
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(source.parameters(), 0.05)
    marked = torch.zeros(8)
    marked[0] = 3.0
    for _ in range(60):
        x = torch.randn(16, 4, 4, 8)
        x[:, 1, 2] += marked
        wanted, kept = x[:, 1, 2], gate(x, source(x, None, None)).mean((1, 2))
        loss = -(kept * wanted).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        scores = source(x, None, None).flatten(1)
    assert (scores.argmax(1) == 6).float().mean() > 0.8


def test_a_user_adds_a_source_in_ten_lines():
    @sgformer.register_significance("centre")
    def centre(x, coarse, fine):
        """The nearness to the middle of the image."""
        rows, columns = (torch.linspace(-1, 1, n, device=x.device) for n in x.shape[1:3])
        return -(rows[:, None] ** 2 + columns**2).expand(len(x), -1, -1)

    try:
        with torch.no_grad():
            region = small(significance="centre").inspect(torch.randn(1, 3, 64, 64)).tokens["1.1"].region_map()[0]
        assert region[8, 8] == 2 and region[0, 0] == region[15, 15] == 0
        with pytest.raises(ValueError, match="centre"):
            sgformer.register_significance("centre")(lambda x, coarse, fine: coarse)
    finally:
        del SOURCES["centre"], SIGNIFICANCE["centre"]


def test_options_are_saved_in_the_weights(tmp_path):
    model = lively(small(significance="learned", aggregation="merge", attention="linear"))
    sgformer.save_model(model, tmp_path / "w.safetensors")
    again = sgformer.load_model(tmp_path / "w.safetensors")
    assert again.config == model.config
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x))


@settings(max_examples=20, deadline=None)
@given(st.integers(3, 60), st.integers(1, 9), st.integers(1, 3))
def test_merging_keeps_every_token_once(tokens, rate, B):
    x = torch.randn(B, tokens, 6, dtype=torch.float64)
    order = ops.sort_tokens(torch.rand(B, tokens))
    few, token, region = ops.merge_similar(x, order, ops.cumulative((0.25, 0.75)), (rate, 2))
    lengths = ops.region_lengths(tokens, (0.25, 0.75))
    assert few.shape[1] == sum(-(-n // r) for n, r in zip(lengths, (rate, 2), strict=True))
    for b in range(B):
        for g in range(few.shape[1]):
            members = x[b][token[b] == g]
            assert len(members)
            torch.testing.assert_close(few[b, g], members.mean(0))
        assert torch.bincount(region[b]).tolist() == lengths
        for g in range(few.shape[1]):  # a group stays inside its region
            assert region[b][token[b] == g].unique().numel() == 1


def test_like_tokens_merge():
    kinds = torch.eye(4).repeat(8, 1)  # 32 tokens of four kinds
    x = kinds[torch.randperm(32)][None] * torch.rand(1, 32, 1).add(0.5)
    token = ops.merge_similar(x, torch.arange(32)[None], [(1, 1)], (2,))[1][0]
    seeds = (2 * torch.arange(16) + 1) * 32 // 32
    if len(x[0, seeds].argmax(-1).unique()) == 4:  # every kind has a seed
        for g in token.unique():
            assert x[0][token == g].argmax(-1).unique().numel() == 1


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 7), st.integers(1, 7), st.integers(1, 4))
def test_linear_attention_against_its_matrix(B, h, N, M, d):
    q, k, v = (torch.randn(B, h, n, d, dtype=torch.float64) for n in (N, M, M))
    f = lambda t: torch.where(t > 0, t + 1, t.exp())  # noqa: E731
    weights = f(q) @ f(k).transpose(-2, -1)
    weights = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(ops.attend_linearly(q, k, v), weights @ v)
    torch.testing.assert_close(ops.attend_linearly(q, k, torch.ones_like(v)), torch.ones_like(q))


def test_weighted_aggregation_prefers_the_significant():
    from sgformer.models.config import Region
    from sgformer.models.significance import AGGREGATIONS

    x = torch.tensor([[[0.0], [0.0], [1.0], [1.0]]])
    for significance, least in ((torch.tensor([[1.0, 2.0, 3.0, 4.0]]), 0.6), (torch.ones(1, 4), None)):
        few, _ = AGGREGATIONS["weighted"]([Region(1.0, 4)])(x, significance)
        assert few.item() > least if least else few.item() == pytest.approx(0.5)


# -- head groups by scale ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coarse", ["global", "window"])
def test_two_groups_are_the_published_attention(coarse):
    from sgformer.models.backbone import HybridScaleAttention, MultiScaleAttention

    r, C = 4, 16
    published = lively(HybridScaleAttention(C, 4, r, 7, coarse)).double()
    general = MultiScaleAttention(C, 4, (r, 1), 7, coarse).double()
    rows = dict(zip(("q", "q_fine", "kv_fine", "local"), [C // 2, C // 2, C, C], strict=True))
    with torch.no_grad():
        for leaf in ("weight", "bias"):
            q, q_fine, kv_fine, local = getattr(published.proj_in, leaf).split(list(rows.values()))
            getattr(general.proj_in, leaf).copy_(torch.cat([q, q_fine, local]))
            getattr(general.kv[1], leaf).copy_(kv_fine)
            getattr(general.kv[0], leaf).copy_(getattr(published.kv_coarse, leaf))
            for name in ("reduce", "reduce_norm"):
                getattr(getattr(general, name)[0], leaf).copy_(getattr(getattr(published, name), leaf))
            for name in ("local", "proj"):
                getattr(getattr(general, name), leaf).copy_(getattr(getattr(published, name), leaf))
        x = torch.randn(2, 30, 19, C, dtype=torch.float64)
        for a, b in zip(general(x), published(x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_any_number_of_scales():
    config = with_stages(small().config, scales=((8, 1), (2,), (4, 2, 2, 1)))
    model = sgformer.create_model(config).train()
    finite_gradients(model)
    with torch.no_grad():
        seen = model.eval().inspect(torch.randn(1, 3, 64, 64))
    assert (seen.fine["2.0"] == 0).all() and seen.coarse["2.0"].min() > 0
    torch.testing.assert_close(seen.fine["3.0"].mean(), torch.tensor(1 / 49))


def test_regions_and_scales_as_text():
    regions = parse_regions(".25:9,.75:4/1:2/.5:2,.5:1")
    config = with_stages(VARIANTS["sgformer_n"], regions=regions, scales=parse_scales("8,1/4,1/2,1"))
    assert [s.regions for s in config.stages[:3]] == [((0.25, 9), (0.75, 4)), ((1, 2),), ((0.5, 2), (0.5, 1))]
    assert [s.scales for s in config.stages] == [(8, 1), (4, 1), (2, 1), ()]
    for bad in ("a:b", ".5", ".5:2,"):
        with pytest.raises(ValueError, match="SHARE:RATE"):
            parse_regions(bad)
    with pytest.raises(ValueError, match="3 guided stages"):
        with_stages(VARIANTS["sgformer_n"], regions=parse_regions("1:2"))
    with pytest.raises(ValueError, match="sum to 1"):
        with_stages(VARIANTS["sgformer_n"], regions=parse_regions(".5:2/1:1/1:1"))


@pytest.mark.parametrize("options", [{"attention": "linear"}, {"aggregation": "weighted"}, {"significance": "learned"}])
def test_bf16_autocast(options):
    with torch.autocast("cpu", torch.bfloat16):
        seen = small(**options).train().inspect(torch.randn(2, 3, 75, 64))
    assert seen.logits.isfinite().all() and all(s.dtype == torch.float32 for s in seen.significance.values())
    seen.logits.float().square().sum().backward()
