"""A grid of runs: read, resumed, put in a table."""

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from photos import QUICK, make_photos

from sgformer.cli import main
from sgformer.core.errors import UserError
from sgformer.tasks import sweep as ab
from sgformer.training.config import to_yaml

RECIPES = sorted((Path(__file__).parents[2] / "recipes" / "ablations").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipes_hold(path):
    read = ab.read_ablation(path)
    assert len(read.seeds) >= 3 and len(read.variants) >= 3 and read.question
    assert f"recipes/ablations/{path.name}" in path.read_text()  # says how to start it
    configs = [read.config(name, 1) for name in read.variants]
    assert len({json.dumps(c.to_dict()) for c in configs}) == len(configs) and all(c.seed == 1 for c in configs)


def test_the_questions_asked_are_answered():
    names = {p.stem: set(ab.read_ablation(p).variants) for p in RECIPES}
    assert {"paper", "coarse", "fine", "uniform", "random", "inverted"} <= names["significance"]
    assert {"rates", "tokens", "segment_significance", "segment_rates", "segment_tokens"} <= set(names)


def test_dense_runs_start_from_the_classifier_with_the_same_change():
    """Its folder is where the classification recipes put it, and holds a network with the same settings."""
    read = {p.stem: ab.read_ablation(p) for p in RECIPES}
    for question in ("significance", "rates", "tokens"):
        classify, dense = read[question], read[f"segment_{question}"]
        for variant in dense.variants:
            config = dense.config(variant, 2)
            assert Path(config.weights) == ab.run_folder(Path("ablations/fashion"), variant, 2)
            assert classify.variants[variant] == dense.variants[variant]


def write(folder, **changes):
    held = {"data": "photos", "options": {"model": "sgformer_n"}, "seeds": [0, 1], "variants": {"a": {}, "b": {}}}
    path = folder / "ablation.yaml"
    path.write_text(yaml.safe_dump({**held, **changes}, sort_keys=False))
    return path


def test_a_grid_is_all_combinations_named_by_their_values(tmp_path):
    read = ab.read_ablation(
        write(tmp_path, variants=None, grid={"significance": ["hybrid", "fine"], "aggregation": ["linear", "mean"]})
    )
    assert list(read.variants) == ["hybrid-linear", "hybrid-mean", "fine-linear", "fine-mean"]
    assert read.config("fine-mean", 1).significance == "fine"
    assert read.runs()[:5] == [*((name, 0) for name in read.variants), ("hybrid-linear", 1)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"taks": "classify"}, "did you mean task"),
        ({"task": "count"}, "got 'count'"),
        ({"variants": {"a": {"significance": "fin"}}}, "variant a: --significance must be one of"),
        ({"variants": {"a": {"epoch": 3}}}, "did you mean epochs"),
        ({"seeds": ["x"]}, "seeds as a list"),
        ({"variants": {}}, "expected variants"),
        ({"variants": {"a b": {}, "a_b": {}}}, "share a folder"),
        ({"data": None}, "data is missing"),
        ({"config": "nowhere.yaml"}, "nowhere.yaml: no such file"),
    ],
)
def test_what_does_not_do_is_named_before_anything_runs(tmp_path, changes, words, capsys):
    assert main(["ablate", "--config", str(write(tmp_path, **changes)), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.fixture
def pretended(monkeypatch):
    """Runs that are finished at once, with a score made of variant and seed."""
    made = []

    def train(ablation, variant, seed, place):
        made.append((variant, seed))
        place.mkdir()
        (place / "config.yaml").write_text(to_yaml(ablation.config(variant, seed).resolved().to_dict()))
        score = {"a": 0.5, "b": 0.6}[variant] + 0.1 * seed
        (place / "metrics.csv").write_text(f"epoch,top1\n1,0.9\n2,{score}\n3,\n")
        (place / "cost.json").write_text('{"seconds": 9, "processor_seconds": 60}')
        (place / "report.md").write_text("")

    monkeypatch.setattr(ab, "_train", train)
    monkeypatch.setattr(ab, "network_cost", lambda run, task, size: (2_000_000, 30_000_000))
    return made


def test_the_table_says_what_the_runs_came_to(tmp_path, pretended):
    read = ab.read_ablation(write(tmp_path, question="Which?"))
    rows = ab.summary(ab.run_ablation(read, tmp_path / "out"))
    assert pretended == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert rows[0]["mean"] == pytest.approx(55) and rows[0]["sd"] == pytest.approx(50**0.5)
    assert rows[1]["difference"] == pytest.approx(10) and rows[1]["difference_sd"] == pytest.approx(0, abs=1e-9)
    with (tmp_path / "out" / "ablation.csv").open() as file:
        assert [row["variant"] for row in csv.DictReader(file)] == ["a", "b"]
    page = (tmp_path / "out" / "ablation.md").read_text()
    assert (
        page.startswith("Which?")
        and "| b | 65.0 ± 7.1 | 60.0 to 70.0 | +10.0 ± 0.0 | 2 | 2.00 M | 30 M | 1.0 min |" in page
    )
    assert (tmp_path / "out" / "ablation.png").exists()


def test_runs_that_are_made_are_not_made_again(tmp_path, pretended):
    read = ab.read_ablation(write(tmp_path, seeds=[0]))
    ab.run_ablation(read, tmp_path / "out")
    more = ab.read_ablation(write(tmp_path, seeds=[0, 1]))
    ab.run_ablation(more, tmp_path / "out")
    assert pretended == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    other = ab.read_ablation(write(tmp_path, options={"model": "sgformer_n", "epochs": 7}))
    with pytest.raises(UserError, match="trained with epochs 100, not 7"):
        ab.run_ablation(other, tmp_path / "out")


def test_ablations_share_the_runs_of_a_common_variant(tmp_path, pretended):
    out = tmp_path / "out"
    ab.run_ablation(ab.read_ablation(write(tmp_path, variants={"a": {}})), out)
    other = write(tmp_path).rename(tmp_path / "other.yaml")
    ab.run_ablation(ab.read_ablation(other), out)
    assert pretended == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    assert len((out / "ablation.csv").read_text().splitlines()) == 2
    assert len((out / "other.csv").read_text().splitlines()) == 3


def test_after_some_minutes_no_run_is_started(tmp_path, pretended):
    assert ab.run_ablation(ab.read_ablation(write(tmp_path)), tmp_path / "out", minutes=1e-9) == []


@pytest.mark.slow
def test_real_runs_go_on_where_they_were_stopped(tmp_path, capsys):
    photos = make_photos(tmp_path / "photos", train=2, val=1)
    options = {**QUICK, "epochs": 1, "warmup_epochs": 0}
    path = write(tmp_path, data=str(photos), options=options, seeds=[0], variants={"a": {}, "b": {"pairs": "single"}})
    arguments = ["ablate", "--config", str(path), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    first = (tmp_path / "out" / "ablation.csv").read_text()
    (tmp_path / "out" / "runs" / "b-0" / "report.md").unlink()  # as if it had been stopped
    assert main(arguments) == 0
    again = (tmp_path / "out" / "ablation.csv").read_text()
    rows = [list(csv.DictReader(text.splitlines())) for text in (first, again)]
    for a, b in zip(*rows, strict=True):
        assert {k: v for k, v in a.items() if k != "processor_seconds"} == {
            k: v for k, v in b.items() if k != "processor_seconds"
        }
    assert int(rows[0][0]["parameters"]) > int(rows[0][1]["parameters"]) and float(rows[0][0]["macs"]) > 0


@pytest.mark.slow
def test_a_failed_run_is_told_in_a_line(tmp_path, capsys):
    path = write(tmp_path, data=str(tmp_path / "nowhere"), variants={"a": {}}, seeds=[0])
    assert main(["ablate", "--config", str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "nowhere: no such folder" in error and "a-0.log" in error and error.count("\n") == 1


@pytest.mark.parametrize("early", [False, True])
def test_a_signal_is_passed_on_so_that_a_run_can_save(tmp_path, monkeypatch, early):
    """At any time: a run in a session of its own would go on alone, if the ablation ended without it."""
    code = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: (print('saved'), sys.exit(143)));"
        "print('ready', flush=True); time.sleep(30)"
    )
    before = signal.getsignal(signal.SIGTERM)
    start, log = subprocess.Popen, tmp_path / "log"

    def stop():
        while "ready" not in log.read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    def started(*args, **options):
        process = start(*args, **options)
        stop()  # before whoever started it knows
        return process

    with log.open("w") as file:
        if early:
            monkeypatch.setattr(subprocess, "Popen", started)
        else:
            threading.Thread(target=stop).start()
        assert ab._run([sys.executable, "-c", code], file) == 143
    assert "saved" in log.read_text() and signal.getsignal(signal.SIGTERM) is before
