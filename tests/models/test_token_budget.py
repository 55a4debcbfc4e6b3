"""The dial for tokens: a budget of 1 is the network as it was, others make the tokens they say, on every path."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from test_backbone import lively, small

import sgformer
from sgformer.backends import native
from sgformer.cli import main
from sgformer.core.errors import UserError
from sgformer.models.config import AGGREGATION
from sgformer.models.pyramid import pyramid_backbone
from sgformer.tasks.segment.network import Segmenter

try:
    native.library()
    NATIVE = True
except native.UnavailableError:
    NATIVE = False
needs_compiler = pytest.mark.skipif(not NATIVE, reason="no native kernels here")
BUDGETS = (0.25, 0.5, 0.7, 1.0, 1.5, 2.0, 4.0)


def tokens(model, image):
    return {block: len(made) for block, made in model.inspect(image).tokens.items()}


@pytest.mark.parametrize("aggregation", AGGREGATION)
def test_a_budget_of_one_is_the_network_to_the_bit(aggregation):
    torch.manual_seed(0)
    model, image = lively(small(aggregation=aggregation)), torch.randn(2, 3, 70, 96)
    before = model(image)
    model.set_token_budget(0.5)
    assert model.token_budget == 0.5 and not torch.equal(model(image), before)
    model.set_token_budget(1)
    assert torch.equal(model(image), before)


@torch.no_grad()
def test_a_budget_makes_the_tokens_it_says():
    model, image = sgformer.create_model("sgformer_s", num_classes=0), torch.randn(1, 3, 224, 224)
    trained, made = tokens(model, image), []
    for budget in BUDGETS:
        model.set_token_budget(budget)
        made.append(tokens(model, image))
    for block, count in trained.items():
        counts = [found[block] for found in made]
        assert counts == sorted(counts) and counts[BUDGETS.index(1)] == count
        if block < "3":  # whose rates are 7 and more, so that rounding them changes little
            assert [made / count for made in counts] == pytest.approx(BUDGETS, rel=0.15)
        assert counts[-1] <= {"1": 56, "2": 28, "3": 14}[block[0]] ** 2


@torch.no_grad()
def test_half_the_tokens_are_made_of_means_of_neighbours_in_the_ranking():
    torch.manual_seed(0)
    pool = small().stages[0].blocks[1].attn.aggregate
    x, significance = torch.randn(1, 1568, 8), torch.rand(1, 1568)
    pool.set_token_budget(0.5)
    pooled, _ = pool(x, significance)
    pairs = x[0, significance[0].argsort()].view(784, 2, 8).mean(1)[None]
    pool.set_token_budget(1)
    expected, _ = pool(pairs, torch.arange(784.0)[None])
    torch.testing.assert_close(pooled, expected)


def test_weights_learn_at_any_budget():
    torch.manual_seed(0)
    model, image = lively(small()).train(), torch.randn(2, 3, 64, 64)
    for budget in (0.25, 1.5):
        model.set_token_budget(budget)
        model.zero_grad()
        model(image).square().sum().backward()
        pools = [p.grad for name, p in model.named_parameters() if ".aggregate." in name]
        assert pools and all(grad.isfinite().all() and grad.abs().sum() > 0 for grad in pools)


@needs_compiler
@pytest.mark.parametrize("budget", [0.3, 2.0])
def test_native_kernels_agree(budget):
    torch.manual_seed(0)
    # In float32 two tokens may swap ranks, but not those of a uniform significance.
    model, image = lively(small(significance="uniform")), torch.randn(2, 3, 75, 90)
    fast = sgformer.optimize(model, native=True)
    with torch.no_grad():
        usual = fast(image)
    sgformer.set_token_budget(model, budget)
    sgformer.set_token_budget(fast, budget)
    with torch.no_grad():
        found, expected = fast.inspect(image), model.inspect(image)
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
        assert {k: len(v) for k, v in found.tokens.items()} == {k: len(v) for k, v in expected.tokens.items()}
        assert not torch.allclose(found.logits, usual, rtol=1e-3)
        fast.set_token_budget(1)
        assert torch.equal(fast(image), usual)
    trained = sgformer.accelerate(lively(small(significance="uniform")).train())
    plain = small(significance="uniform").train()
    plain.load_state_dict(trained.state_dict())
    gradients = []
    for network in (trained, plain):
        network.set_token_budget(budget)
        network(image).square().sum().backward()
        gradients.append({name: p.grad for name, p in network.named_parameters() if ".aggregate." in name})
    for name, gradient in gradients[1].items():
        assert (gradients[0][name] - gradient).abs().max() < 1e-3 * gradient.abs().max(), name


@torch.no_grad()
def test_networks_that_contain_one_are_set_too():
    torch.manual_seed(0)
    model, image = Segmenter(pyramid_backbone(small()), "semantic-fpn", 3, 16).eval(), torch.randn(1, 3, 64, 64)
    before = model.backbone(image)[2]
    sgformer.set_token_budget(model, 0.25)
    assert not torch.equal(model.backbone(image)[2], before)
    maps = sgformer.create_model("sgformer_n", features_only=True).eval()
    before = maps(image)[2]
    sgformer.set_token_budget(maps, 4)
    assert not torch.equal(maps(image)[2], before)


@pytest.mark.parametrize("budget", [0, 0.2, 5, math.nan, -1])
def test_a_budget_out_of_range_is_refused(budget):
    with pytest.raises(ValueError, match=r"between 0.25 and 4 \(got"):
        small().set_token_budget(budget)
    with pytest.raises(ValueError, match="not an SG-Former"):
        sgformer.set_token_budget(torch.nn.Linear(1, 1), 0.5)
    with pytest.raises(ValueError, match="not an SG-Former"):
        small(pairs="hybrid").set_token_budget(0.5)


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "five.safetensors"
    about = {"task": "classify", "classes": list("abcde"), "image_size": 64, "crop_pct": 1.0, "model": "mine"}
    sgformer.save_model(lively(small()), path, about)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    return path


@torch.no_grad()
def test_the_commands_take_it(weights, tmp_path, capsys):
    image = tmp_path / "a.png"
    usual, half = (sgformer.predict(weights, image, tokens=t)[0].labels for t in (None, 0.5))
    assert usual != half
    (whole,), (explained,) = sgformer.explain(weights, image), sgformer.explain(weights, image, tokens=0.5)
    assert {block: made.max() + 1 for block, made in explained.tokens.items()} != {
        block: made.max() + 1 for block, made in whole.tokens.items()
    }
    assert explained.rates["1.1"] == [2 * rate for rate in whole.rates["1.1"]]
    assert (sgformer.embed(weights, image, tokens=0.5).features != sgformer.embed(weights, image).features).any()

    assert main(["predict", str(weights), str(image), "--tokens", ".5"]) == 0
    assert f"{half[0][0]} {100 * half[0][1]:.1f} %" in capsys.readouterr().out
    assert main(["predict", str(weights), str(image), "--tokens", "9"]) == 2
    assert "--tokens: a token budget must be between 0.25 and 4 (got 9.0)" in capsys.readouterr().err
    assert main(["predict", "resnet.onnx", str(image), "--tokens", ".5"]) == 2


def test_an_export_keeps_it(weights, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    from sgformer.exporting import export as exporting

    monkeypatch.setattr(exporting, "CHECKED", ((1, 64, 96),))
    monkeypatch.setattr(exporting, "TRACED", (2, 96, 64))
    sgformer.export(weights, tmp_path / "half.onnx", tokens=0.5)
    (found,) = sgformer.predict(tmp_path / "half.onnx", tmp_path / "a.png")
    (expected,) = sgformer.predict(weights, tmp_path / "a.png", tokens=0.5)
    assert found.labels[0][1] == pytest.approx(expected.labels[0][1], abs=1e-4)
    with pytest.raises(UserError, match="keeps those it was exported with"):
        sgformer.predict(tmp_path / "half.onnx", tmp_path / "a.png", tokens=0.5)
