"""A segmentation run stopped in the middle and resumed equals one that never stopped, whatever the workers."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

pytest.importorskip("lightning")

from sgformer import evaluate, load_model, train
from sgformer.core.errors import UserError

QUICK = {
    "model": "sgformer_n",
    "weights": "none",
    "head": "upernet",
    "head_width": 8,
    "image_size": 32,
    "batch_size": 4,
    "steps": 6,
    "val_every": 4,
    "warmup_steps": 1,
    "lr": 1e-3,
    "ema": 0.9,
    "drop_path": 0.2,
    "workers": 0,
    "device": "cpu",
    "log_every": 1,
}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Bright and dark squares on noise: five images to train on, fewer than two batches of four."""
    root, rng = tmp_path_factory.mktemp("shapes"), np.random.default_rng(0)
    for split, count in (("training", 5), ("validation", 3)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            labels = np.zeros((40, 44), np.uint8)
            labels[5:20, 4:20], labels[22:38, 20:40] = 1, 2
            pixels = np.choose(labels, [120, 230, 20])[..., None] + rng.normal(0, 15, (40, 44, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / f"images/{split}/{i}.png")
            Image.fromarray(labels).save(root / f"annotations/{split}/{i}.png")
    return root


def weights(run, name="last"):
    return load_file(run / f"{name}.safetensors")


@pytest.fixture(scope="module")
def whole(shapes, tmp_path_factory):
    return train("segment", data=str(shapes), run=str(tmp_path_factory.mktemp("runs") / "whole"), **QUICK).path


def test_a_run_leaves_everything(whole, shapes):
    assert {p.name for p in whole.iterdir()} >= {
        *("config.yaml", "environment.json", "log.txt", "metrics.csv", "curves.png", "train_batch.png", "report.md"),
        *("best.safetensors", "last.safetensors", "checkpoints", "validation"),
    }
    assert {p.name for p in (whole / "validation").iterdir()} >= {"examples.png", "confusion.png", "classes.csv"}
    lines = (whole / "log.txt").read_text()
    assert "step 4/6" in lines and "step 6/6" in lines  # a last round that is shorter
    metadata = load_model(whole).metadata
    result = evaluate(whole, shapes, workers=0, device="cpu")
    assert metadata["metrics"]["miou"] == pytest.approx(result.miou)
    assert json.loads((whole / "validation/metrics.json").read_text())["miou"] == pytest.approx(result.miou)


@pytest.mark.slow
@pytest.mark.parametrize(("stop", "workers"), [(2, 0), (4, 0), (5, 2)])
def test_stopping_and_resuming_changes_nothing(whole, shapes, tmp_path, stop, workers):
    run = tmp_path / "run"
    options = {**QUICK, "workers": workers}
    train("segment", data=str(shapes), run=str(run), max_steps=stop, **options)
    train("segment", resume=run, max_steps=6)
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(run)[name], tensor), name


@pytest.mark.slow
def test_it_learns_squares_it_has_not_seen(shapes, tmp_path):
    schedule = {"steps": 100, "val_every": 100, "opt": "muon", "lr": 1.6e-2, "power": 1.0, "ema": 0}
    plain = {"drop_path": 0.0, "distortion": False, "scale_min": 1.0, "scale_max": 1.0, "hflip": 0.0}
    options = {**QUICK, "head": "semantic-fpn", "head_width": 16, **schedule, **plain}
    run = train("segment", data=str(shapes), run=str(tmp_path / "run"), **options).path
    result = json.loads((run / "validation/metrics.json").read_text())
    assert result["miou"] > 0.6  # calling everything ground gives 0.2


@pytest.mark.slow
def test_accumulated_parts_and_passes(shapes, tmp_path):
    options = {**QUICK, "head": "semantic-fpn", "accumulate": 2, "epochs": 4, "val_every": 2}
    run = train("segment", data=str(shapes), run=str(tmp_path / "run"), **options).path
    assert "step 5/5" in (run / "log.txt").read_text()  # 4 passes over 5 images, 4 at a time


def test_other_backbones_by_name(shapes, tmp_path):
    options = {**QUICK, "model": "pvt_v2_b0", "steps": 2}
    run = train("segment", data=str(shapes), run=str(tmp_path / "run"), **options).path
    assert evaluate(run, shapes, workers=0, device="cpu").images == 3


def test_a_label_beyond_the_classes_stops_before_it_trains_on_it(shapes, tmp_path):
    with pytest.raises(UserError, match=r"annotations/training/\d\.png: label 2 at row 22, column 20"):
        train("segment", data=str(shapes), classes=2, run=str(tmp_path / "run"), **QUICK)


def test_classes_and_images_stay_what_they_were(whole, shapes, tmp_path):
    for source, copy in ((whole, "run"), (shapes, "shapes")):
        shutil.copytree(source, tmp_path / copy)
    data = tmp_path / "shapes"
    shutil.copy(data / "images/training/4.png", data / "images/training/5.png")
    shutil.copy(data / "annotations/training/4.png", data / "annotations/training/5.png")
    with pytest.raises(UserError, match=r"train: 1 image added \(training/5.png\).*--weights \S+run --data"):
        train("segment", resume=tmp_path / "run", data=str(data))
    (data / "images/training/5.png").unlink()
    (data / "annotations/training/5.png").unlink()
    (data / "classes.txt").write_text("grey\nbright\ndark\n")  # names for labels that had none: not another data set
    evaluate(tmp_path / "run", data, workers=0)
    (data / "classes.txt").write_text("grey\nbright\ndark\nblue\n")
    with pytest.raises(UserError, match=r"classes.txt: not the classes of the training; .*blue"):
        evaluate(tmp_path / "run", data, workers=0)
