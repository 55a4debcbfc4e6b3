"""A run that stopped and went on is, to the bit, the run that did not stop."""

import dataclasses
import os
import signal

import pytest
import torch
from photos import QUICK, make_photos

from sgformer.core.errors import UserError
from sgformer.models.checkpoint import read_safetensors
from sgformer.tasks.api import train
from sgformer.training.callbacks import Interrupted

pytestmark = pytest.mark.slow  # whole runs, again and again

pytest.importorskip("lightning")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos"))  # 18 images: 4 updates of 4 per epoch


@pytest.fixture(scope="module")
def straight(photos, tmp_path_factory):
    """Six updates at once: an epoch and a half."""
    run = tmp_path_factory.mktemp("straight") / "run"
    return train("classify", data=str(photos), run=str(run), max_steps=6, **QUICK).path


def assert_same_run(a, b):
    states = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (a, b)]
    assert states[0]["global_step"] == states[1]["global_step"]
    for name, value in states[0]["state_dict"].items():
        assert torch.equal(value, states[1]["state_dict"][name]), name
    averaged = [state["callbacks"]["WeightAverage"]["model"] for state in states]
    for name, value in averaged[0].items():
        assert torch.equal(value, averaged[1][name]), name
    moments = [state["optimizer_states"][0]["state"] for state in states]
    for number, moment in moments[0].items():
        assert torch.equal(moment["exp_avg_sq"], moments[1][number]["exp_avg_sq"])
    files = [read_safetensors(run / "last.safetensors")[0] for run in (a, b)]
    for name, value in files[0].items():
        assert torch.equal(value, files[1][name]), name
    tables = [(run / "metrics.csv").read_text().splitlines() for run in (a, b)]
    timeless = [{tuple(v for i, v in enumerate(line.split(",")) if i != 4) for line in table} for table in tables]
    assert timeless[0] <= timeless[1]  # a run that stopped has one more validation


@pytest.mark.parametrize("stop", [3, 4, 5], ids=["inside the first epoch", "at its end", "inside the second"])
def test_resumed_equals_uninterrupted(photos, straight, tmp_path, stop):
    run = tmp_path / "run"
    train("classify", data=str(photos), run=str(run), max_steps=stop, **QUICK)
    train("classify", resume=run, max_steps=6)
    assert_same_run(straight, run)


def test_stopped_by_a_signal(photos, straight, tmp_path, monkeypatch):
    from sgformer.tasks.classify.module import ClassificationModule

    step = ClassificationModule.training_step

    def stop_in_the_second_update(task, batch, batch_idx):
        if task.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(task, batch, batch_idx)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch, pytest.raises(Interrupted) as stopped:
        patch.setattr(ClassificationModule, "training_step", stop_in_the_second_update)
        train("classify", data=str(photos), run=str(tmp_path / "run"), max_steps=6, **QUICK)
    assert stopped.value.signum == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 2
    train("classify", resume=tmp_path / "run")
    assert_same_run(straight, tmp_path / "run")


@pytest.mark.parametrize(
    "workers", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow)]
)
def test_workers_and_checkpoints_do_not_change_the_run(photos, straight, tmp_path, workers):
    settings = {**QUICK, "workers": workers, "checkpoint_every": 1}
    run = train("classify", data=str(photos), run=str(tmp_path / "run"), max_steps=6, **settings).path
    assert_same_run(straight, run)


def test_resume_with_accumulation_and_workers(photos, tmp_path):
    settings = {**QUICK, "accumulate": 2, "workers": 2}
    whole = train("classify", data=str(photos), run=str(tmp_path / "whole"), max_steps=6, **settings).path
    train("classify", data=str(photos), run=str(tmp_path / "parts"), max_steps=3, **settings)
    train("classify", resume=tmp_path / "parts", max_steps=6)
    assert_same_run(whole, tmp_path / "parts")


def test_another_seed_is_another_run(photos, straight, tmp_path):
    run = train("classify", data=str(photos), run=str(tmp_path / "run"), max_steps=6, **{**QUICK, "seed": 1}).path
    weights = [read_safetensors(folder / "last.safetensors")[0]["head.fc.weight"] for folder in (straight, run)]
    assert not torch.equal(*weights)


def test_what_may_change_on_resuming(photos, straight):
    with pytest.raises(UserError, match=r"--lr is 0.02 .* cannot change on resuming .*--epochs"):
        train("classify", resume=straight, lr=0.5)


def test_more_epochs_follow_the_longer_schedule(photos, tmp_path):
    settings = {**QUICK, "epochs": 1, "warmup_epochs": 0}
    train("classify", data=str(photos), run=str(tmp_path / "run"), **settings)
    train("classify", resume=tmp_path / "run", epochs=2)
    whole = train("classify", data=str(photos), run=str(tmp_path / "whole"), **{**settings, "epochs": 2}).path
    rates = [(run / "metrics.csv").read_text().splitlines()[-1].split(",")[2] for run in (tmp_path / "run", whole)]
    assert rates[0] == rates[1]


def test_a_finished_run_has_nothing_left(photos, straight, caplog):
    before = (straight / "last.safetensors").read_bytes()
    train("classify", resume=straight)
    assert (straight / "last.safetensors").read_bytes() == before


def test_a_broken_checkpoint_is_named(photos, tmp_path):
    run = train("classify", data=str(photos), run=str(tmp_path / "run"), max_steps=1, **QUICK)
    run.checkpoint.write_bytes(run.checkpoint.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"last\.ckpt: not a complete checkpoint"):
        train("classify", resume=run.path, max_steps=2)


def test_a_run_that_never_came_to_a_checkpoint_starts_again(photos, straight, tmp_path):
    run = train("classify", data=str(photos), run=str(tmp_path / "run"), max_steps=2, **QUICK)
    for name in ("checkpoints/last.ckpt", "best.safetensors", "last.safetensors"):
        (run.path / name).unlink()
    train("classify", resume=run.path, max_steps=6)
    assert_same_run(run.path, straight)


def test_a_run_keeps_its_network_when_the_size_of_that_name_changes(photos, straight, tmp_path, monkeypatch):
    from sgformer.models.config import VARIANTS
    from sgformer.models.load import read_weights

    run = tmp_path / "run"
    train("classify", data=str(photos), run=str(run), max_steps=4, **QUICK)
    name = QUICK["model"]
    stages = VARIANTS[name].stages
    wider = (*stages[:3], dataclasses.replace(stages[3], dim=2 * stages[3].dim))
    monkeypatch.setitem(VARIANTS, name, VARIANTS[name].replace(stages=wider))
    assert read_weights(run).model is None  # its network is no longer the size of that name
    train("classify", resume=run, max_steps=6)
    assert_same_run(straight, run)
