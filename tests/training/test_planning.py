"""`--minutes`: how long a run may be, and that it is then a run like any other."""

import json
from functools import partial

import pytest
import yaml
from photos import QUICK, make_photos

from sgformer.core.errors import UserError
from sgformer.tasks.classify.config import ClassifyConfig
from sgformer.tasks.detect.config import DetectConfig
from sgformer.tasks.segment.config import SegmentConfig
from sgformer.training.config import DataFacts

pytest.importorskip("lightning")

from sgformer.training.planning import Cost, plan

FACTS = DataFacts(1000, 144, 10, pretrained=True)


@pytest.mark.parametrize("cost", [Cost(3, 0.5, 10), Cost(0, 0.01, 60), Cost(20, 5, 0.1)])
@pytest.mark.parametrize("seconds", [100, 600, 5000])
@pytest.mark.parametrize("per", [1, 7, 400])
def test_as_many_updates_as_fit(cost, seconds, per):
    updates = cost.updates(seconds, lambda n: per)
    assert updates == 0 or cost.total(updates, per) <= seconds
    assert cost.total(updates + 1, per) > seconds


@pytest.mark.parametrize("kind", [ClassifyConfig, DetectConfig, SegmentConfig])
def test_the_schedule_ends_with_the_time(kind):
    cost, batch = Cost(5, 0.25, 12), kind().resolved(FACTS).batch_size
    per_pass = 1000 / batch if kind is SegmentConfig else 1000 // batch
    planned, record = plan(kind(minutes=10), FACTS, lambda config, seconds: (cost, per_pass, 30.0))
    config = planned.resolved(FACTS)
    total = config.steps if kind is SegmentConfig else round(config.epochs * per_pass)
    assert total == record["updates"] and config.minutes is None
    used = 30 + cost.total(total, config.per_validation(total, per_pass))
    assert 0.85 * 600 < used < 600
    config.check_schedule(total, per_pass)
    if kind is DetectConfig:
        assert max(config.lr_drops) < config.epochs


def test_a_run_long_enough_for_other_augmentation_is_measured_with_it():
    measured = []

    def measure(config, seconds):
        measured.append(config)
        return Cost(0, 0.01 if config.mixup == 0 else 0.02, 1), 31, 0.0

    planned, _ = plan(ClassifyConfig(minutes=10), FACTS, measure)
    assert [config.mixup > 0 for config in measured] == [False, True]
    assert planned.resolved(FACTS).mixup > 0 and round(planned.epochs * 31) < 600 / 0.02


def test_too_little_time_is_a_line():
    with pytest.raises(UserError, match=r"--minutes 0.5 is too short here.*allow \d+\.\d minutes or more"):
        plan(ClassifyConfig(minutes=0.5), FACTS, lambda config, seconds: (Cost(5, 1, 60), 31, 10.0))


@pytest.mark.parametrize(
    ("kind", "options"),
    [(ClassifyConfig, {"epochs": 3}), (DetectConfig, {"epochs": 3}), (SegmentConfig, {"steps": 3})],
)
def test_minutes_and_a_length_exclude_each_other(kind, options):
    with pytest.raises(UserError, match="--minutes"):
        kind(minutes=5, **options)


def test_on_the_command_line_minutes_take_the_place_of_a_recipe_s_epochs(tmp_path):
    from sgformer.cli.parser import Parser, config_options
    from sgformer.cli.train import FILES, read_options

    read = partial(read_options, Parser("train classify", "", [*config_options(ClassifyConfig), *FILES]))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("epochs: 7\nlr: 1e-3\n")
    config, _ = read(["--config", str(recipe), "--minutes", "5"], ClassifyConfig)
    assert config.minutes == 5 and config.is_auto("epochs") and config.lr == 1e-3
    recipe.write_text("minutes: 7\n")
    config, _ = read(["--config", str(recipe), "--epochs", "5"], ClassifyConfig)
    assert config.minutes is None and config.epochs == 5


@pytest.mark.slow
def test_a_planned_run_is_the_run_of_so_many_epochs(tmp_path, monkeypatch):
    from sgformer import train
    from sgformer.models.checkpoint import read_safetensors

    # Whatever this machine's speed.
    monkeypatch.setattr("sgformer.training.planning.LEAST", 0.1)
    monkeypatch.setattr("sgformer.training.planning.MEASURE", 0.0)
    monkeypatch.setattr(Cost, "updates", lambda cost, seconds, per_validation: 6)
    photos, options = make_photos(tmp_path / "photos"), {name: v for name, v in QUICK.items() if name != "epochs"}
    options |= {"warmup_epochs": "auto", "image_size": 32, "log_every": 1000}
    run = train("classify", data=str(photos), run=str(tmp_path / "a"), minutes=60, **options).path
    settings = yaml.safe_load((run / "config.yaml").read_text())
    record = json.loads((run / "environment.json").read_text())["planned"]
    assert settings["minutes"] is None and record["minutes"] == 60
    assert record["updates"] == 6 and settings["epochs"] == 1.5 and settings["warmup_epochs"] == 0.15
    assert "| Planned for | 60 minutes |" in (run / "report.md").read_text()
    last = (run / "metrics.csv").read_text().splitlines()[-1].split(",")
    assert int(last[1]) == record["updates"] and float(last[2]) < 0.02 * 4 / 1024 / 20  # the rate reached its end
    same = train("classify", data=str(photos), run=str(tmp_path / "b"), epochs=settings["epochs"], **options).path
    first, second = (read_safetensors(one / "last.safetensors")[0] for one in (run, same))
    assert all(value.equal(second[name]) for name, value in first.items())
