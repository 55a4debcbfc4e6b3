"""`--patience`, `--freeze` and `--balance` in whole runs."""

import csv

import pytest
import torch
import yaml
from photos import QUICK, make_photos

from sgformer.core.errors import UserError
from sgformer.models.checkpoint import read_safetensors
from sgformer.tasks.api import train

pytest.importorskip("lightning")

# A rate of next to nothing: the score does not improve after the first validation.
STILL = {**QUICK, "epochs": 5, "lr": 1e-9, "warmup_lr": 0.0, "min_lr": 0.0, "ema": 0.0, "log_every": 1000}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos"))


def validations(run):
    with (run / "metrics.csv").open() as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row["top1"]]


def test_a_run_that_does_not_improve_stops_and_says_why(photos, tmp_path, caplog):
    caplog.set_level("INFO", "sgformer")
    run = train("classify", data=str(photos), run=str(tmp_path / "run"), patience=2, **STILL).path
    assert validations(run) == [4, 8, 12]  # of five epochs of four updates
    why = "12 of 20: top1 had not improved for 2 validations (--patience 2)"
    assert f"| Updates | {why} |" in (run / "report.md").read_text()
    assert f"stopped after {why.replace(':', ' updates:')}" in caplog.text

    train("classify", resume=run)  # it stays stopped ...
    assert validations(run) == [4, 8, 12] and why in (run / "report.md").read_text()
    train("classify", resume=run, patience=3)  # ... and the count goes on
    assert validations(run) == [4, 8, 12, 16]
    assert yaml.safe_load((run / "config.yaml").read_text())["patience"] == 3


def test_patience_counts_over_interruptions(photos, tmp_path):
    run = tmp_path / "run"
    train("classify", data=str(photos), run=str(run), patience=2, max_steps=10, **STILL)
    train("classify", resume=run, max_steps=20)
    straight = train("classify", data=str(photos), run=str(tmp_path / "straight"), patience=2, **STILL).path
    states = [torch.load(r / "checkpoints/last.ckpt", weights_only=True) for r in (run, straight)]
    assert [state["global_step"] for state in states] == [12, 12]


def test_only_the_head_learns(photos, tmp_path, caplog):
    caplog.set_level("INFO", "sgformer")
    with pytest.raises(UserError, match="--freeze trains a head on the backbone of some weights"):
        train("classify", data=str(photos), run=str(tmp_path / "none"), freeze=True, **QUICK)
    assert not (tmp_path / "none").exists()
    start = train("classify", data=str(photos), run=str(tmp_path / "start"), max_steps=1, **QUICK).path
    run = train(
        "classify",
        data=str(photos),
        run=str(tmp_path / "run"),
        freeze=True,
        max_steps=3,
        **{**QUICK, "weights": str(start)},
    ).path
    before, after = (read_safetensors(r / "best.safetensors")[0] for r in (start, run))
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"head.fc.weight", "head.fc.bias"}
    assert "frozen: " in caplog.text and "all but those of head.fc" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("balance", ["weights", "sampling"])
def test_a_balanced_run_resumes_to_the_bit(photos, tmp_path, balance):
    for file in [*(photos / "train/ant").iterdir()][1:]:
        file.unlink(missing_ok=True)
    options = {**QUICK, "balance": balance, "data": str(photos)}
    straight = train("classify", run=str(tmp_path / "straight"), max_steps=5, **options).path
    train("classify", run=str(tmp_path / "run"), max_steps=2, **options)
    run = train("classify", resume=tmp_path / "run", max_steps=5).path
    first, second = (read_safetensors(r / "last.safetensors")[0] for r in (straight, run))
    assert all(value.equal(second[name]) for name, value in first.items())
