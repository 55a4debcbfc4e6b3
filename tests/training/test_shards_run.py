"""A run on shards is the run on the folder, to the bit."""

import dataclasses

import pytest
import torch
from photos import QUICK, make_photos, tensors

from sgformer.data.sharding import make_shards
from sgformer.tasks.api import evaluate, train

pytestmark = pytest.mark.slow  # whole runs, again and again

pytest.importorskip("lightning")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def shards(photos, tmp_path_factory):
    return make_shards(photos, tmp_path_factory.mktemp("packed") / "shards")


@pytest.fixture(scope="module")
def on_the_folder(photos, tmp_path_factory):
    return train("classify", data=str(photos), run=str(tmp_path_factory.mktemp("run") / "run"), max_steps=6, **QUICK)


@pytest.mark.parametrize("workers", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_stopped_and_resumed_on_shards_is_straight_on_the_folder(shards, on_the_folder, tmp_path, workers):
    run = tmp_path / "run"
    settings = {**QUICK, "workers": workers}
    train("classify", data=str(shards), run=str(run), max_steps=3, **settings)  # inside the first epoch
    train("classify", resume=run, max_steps=6)
    states = [torch.load(r / "checkpoints/last.ckpt", weights_only=True) for r in (on_the_folder.path, run)]
    for name in ("state_dict", "optimizer_states"):
        one, two = (tensors(state[name]) for state in states)
        assert len(one) == len(two) > 100
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True)), name
    assert states[0]["global_step"] == states[1]["global_step"] == 6


def test_evaluation_is_the_same(photos, shards, on_the_folder):
    options = {"workers": 0, "device": "cpu", "batch_size": 4}
    one, two = (evaluate(on_the_folder.path, str(data), **options) for data in (photos, shards))
    assert one.images == two.images == 9
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(two, field.name)
        assert (a == b).all() if hasattr(a, "all") else a == b
