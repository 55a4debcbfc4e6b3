"""The model against the published code's numbers, in float64 to 1e-9 relative."""

import golden_numbers
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import sgformer
from sgformer.models.released import released_map

TOLERANCE = 1e-9


def relative(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return np.abs(a - b).max() / np.abs(b).max()


@pytest.fixture(scope="module")
def model():
    return sgformer.load_released(golden_numbers.released_state("s"))


@pytest.mark.parametrize("stem,size", [("sgformer_s_224x224", (224, 224)), ("sgformer_s_224x448", (224, 448))])
def test_logits_features_and_significance(model, stem, size):
    golden = golden_numbers.numbers(stem)
    with torch.no_grad():
        seen = model.inspect(golden_numbers.image(stem, size))
    assert relative(seen.logits, golden["logits"]) < TOLERANCE
    for s, features in enumerate(seen.features, start=1):
        tokens = features.flatten(2).transpose(1, 2)
        assert tuple(tokens.shape[1:]) == tuple(golden[f"stage{s}_shape"][-2:])
        ours = tokens.flatten()[torch.from_numpy(golden[f"stage{s}_index"])]
        assert relative(ours, golden[f"stage{s}_value"]) < TOLERANCE
    maps = [name for name in golden if name.startswith("significance")]
    assert len(maps) >= 3
    for name in maps:
        assert relative(seen.significance[name.removeprefix("significance")], golden[name]) < TOLERANCE


@pytest.mark.slow
def test_window_coarse_heads_agree_with_global_ones_at_224(model):
    golden = golden_numbers.numbers("sgformer_s_224x224")
    windowed = sgformer.create_model(model.config.replace(coarse="window"), dtype=torch.float64).eval()
    windowed.load_state_dict(model.state_dict())
    with torch.no_grad():
        logits = windowed(golden_numbers.image("sgformer_s_224x224", (224, 224)))
    assert relative(logits, golden["logits"]) < TOLERANCE


@pytest.mark.slow
def test_gradients():
    golden = golden_numbers.numbers("sgformer_s_gradients")
    released = golden_numbers.released_state("s")
    model = sgformer.load_released(released, drop_path_rate=0.0).train()
    logits = model(golden_numbers.image("sgformer_s_224x224", (224, 224)))
    loss = F.cross_entropy(logits, torch.tensor([3, 7]))
    loss.backward()
    assert relative(loss.detach(), golden["loss"]) < TOLERANCE
    norm = dict(zip(golden["names"].tolist(), golden["norm"], strict=True))
    dot = dict(zip(golden["names"].tolist(), golden["dot"], strict=True))
    scale = max(norm.values())
    checked = set()
    sources = {
        f"{ours}.{leaf}": (theirs, leaf)
        for ours, theirs in released_map(model.config).items()
        for leaf in ("weight", "bias")
    }
    for name, parameter in model.named_parameters():
        theirs, leaf = sources.get(name, ([], ""))
        names = {f"{t.removesuffix('[0]').removesuffix('[1]')}.{leaf}" for t in theirs} or {"pos_embed"}
        checked |= names
        expected_norm = np.sqrt(sum(norm[n] ** 2 for n in names))
        expected_dot = sum(dot[n] for n in names)
        # A gradient that is zero in exact arithmetic (a key's bias) is rounding noise in both: hence the small floor.
        assert abs(parameter.grad.norm().item() - expected_norm) < TOLERANCE * max(expected_norm, 1e-3 * scale), name
        ours = (parameter.grad * parameter).sum().item()
        bound = max(abs(expected_dot), expected_norm * parameter.norm().item(), 1e-3 * scale)
        assert abs(ours - expected_dot) < TOLERANCE * bound, name
    assert checked == set(golden["names"].tolist())
