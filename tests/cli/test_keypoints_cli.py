"""`train keypoints` and what is done with its run, on pictures that take seconds."""

import contextlib
import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from coco_scene import pointed, pointed_content, thing, write_coco

from sgformer.cli import main

pytest.importorskip("lightning")
pytest.importorskip("pycocotools")

TINY = ["--image-size", "64", "--head-width", "16", "--rois", "16", "--workers", "0", "--device", "cpu"]
QUICK = ["--model", "sgformer_n", "--batch-size", "2", "--log-every", "1", *TINY]
RECIPE = Path(__file__).parents[2] / "recipes" / "keypoints_n_scenes.yaml"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("coco")
    for split, count in (("train", 6), ("val", 3)):
        things = [pointed(10 * i, 3 if i % 2 else 7, [4 + i, 4, 20 + 3 * i, 24]) for i in range(1, count)]
        write_coco(root, pointed_content([*things, thing(10, 7, [40, 20, 20, 20], iscrowd=1)], images=count), split)
    return root


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", "keypoints", "--data", str(data), "--run", str(folder), "--epochs", "1", *QUICK]) == 0
    return folder


def test_a_run_leaves_what_it_should(run):
    names = ["config.yaml", "log.txt", "curves.png", "train_batch.png", "report.md", "best.safetensors"]
    names += [f"validation/{n}" for n in ("metrics.json", "classes.csv", "results_box.json", "results_keypoints.json")]
    names += [f"validation/{n}" for n in ("precision_keypoints.csv", "precision_recall.png", "examples.png")]
    assert [name for name in names if not (run / name).exists()] == []
    with (run / "metrics.csv").open() as file:
        row = list(csv.DictReader(file))[-1]
    losses = ("loss_classifier", "loss_box_reg", "loss_keypoint", "loss_objectness", "loss_rpn_box_reg")
    assert float(row["train_loss"]) == pytest.approx(sum(float(row[name]) for name in losses), rel=1e-3)
    assert {"box_ap", "keypoints_ap", "keypoints_ap50"} <= set(row)
    assert "| keypoints |" in (run / "report.md").read_text()
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert settings["hflip"] is None and "masks" not in settings and "head" not in settings


def test_eval_tells_the_numbers_of_pycocotools(data, run, tmp_path, capsys):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    assert main(["eval", str(run), "--data", str(data), "--out", str(tmp_path), "--workers", "0"]) == 0
    out = capsys.readouterr().out
    assert "keypoints" in out and "3 images, 2 objects of 2 classes" in out
    numbers = json.loads((tmp_path / "metrics.json").read_text())["keypoints"]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(data / "annotations" / "instances_val.json"))
        for entry in truth.dataset["annotations"]:  # which pycocotools cannot do without
            entry.setdefault("keypoints", [0] * 12)
            entry["num_keypoints"] = sum(v > 0 for v in entry["keypoints"][2::3])
        plain = COCOeval(truth, truth.loadRes(str(tmp_path / "results_keypoints.json")), "keypoints")
        plain.params.kpt_oks_sigmas = np.full(4, 0.05)
        plain.evaluate()
        plain.accumulate()
        plain.summarize()
    mine = [-1 if v is None else v for v in numbers.values()]
    assert len(mine) == 10 and mine == plain.stats.tolist()
    assert {"classes.csv", "precision_recall.png", "examples.png"} <= {path.name for path in tmp_path.iterdir()}


def test_predictions_are_annotations(data, run, tmp_path, capsys):
    args = ["predict", str(run), str(data / "val"), "--score", "0.05"]
    assert main([*args, "--out", str(tmp_path / "p"), "--json", str(tmp_path / "p.json")]) == 0
    assert capsys.readouterr().out.count("\n") == 3 and len(list((tmp_path / "p").glob("*.png"))) == 3
    told = json.loads((tmp_path / "p.json").read_text())
    assert told["annotations"] and told["categories"][0]["keypoints"] == ["nose", "left_eye", "right_eye", "tail"]
    for entry in told["annotations"]:
        assert len(entry["keypoints"]) == 12 and all(0 <= score <= 1 for score in entry["keypoint_scores"])
    assert main(["data", "check", str(tmp_path / "p.json")]) == 0
    assert "objects of 4 keypoints" in capsys.readouterr().out
    assert main(["eval", str(run), "--data", str(tmp_path / "p.json"), "--workers", "0"]) == 0


def test_it_is_explained_and_exported(data, run, tmp_path, capsys):
    picture = str(data / "val" / "10.png")
    assert main(["explain", str(run), picture, "--out", str(tmp_path / "e")]) == 0
    assert list((tmp_path / "e").glob("*.png"))
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    assert main(["export", str(run), "--out", str(tmp_path / "k.onnx"), "--image-size", "64"]) == 0
    assert "keypoints" in capsys.readouterr().out
    found = []
    for source in (run, tmp_path / "k.onnx"):
        assert main(["predict", str(source), picture, "--score", "0.05", "--json", str(tmp_path / "p.json")]) == 0
        found.append(json.loads((tmp_path / "p.json").read_text()))
    ours, theirs = found
    assert ours["categories"] == theirs["categories"] and theirs["annotations"]
    assert all(len(entry["keypoints"]) == 12 for entry in theirs["annotations"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "keypoints"], "--data is missing"),
        (["train", "keypoints", "--data", "PLAIN"], "none of its categories has keypoints"),
        (["train", "keypoints", "--data", "DATA", "--masks", "false"], "unknown option --masks"),
        (["train", "keypoints", "--data", "DATA", "--flip-pairs", "[nose:ear]"], "no keypoint ear; there are nose"),
        (["train", "keypoints", "--data", "DATA", "--sigmas", "[.1,.2]"], "2 of them for 4 keypoints"),
        (["eval", "RUN", "--data", "PLAIN"], "none of its categories has keypoints"),
        (["eval", "RUN", "--data", "DATA", "--flip"], "--flip is for weights of segment"),
        (["predict", "RUN", "DATA", "--top", "2"], "--top is for weights of classify"),
    ],
)
def test_what_does_not_do_is_one_line(data, run, tmp_path, capsys, arguments, words):
    for split in ("train", "val"):
        write_coco(tmp_path / "plain", pointed_content([thing(10, 3, [4, 4, 24, 24])]), split)
        file = tmp_path / "plain" / "annotations" / f"instances_{split}.json"
        content = json.loads(file.read_text())
        file.write_text(json.dumps({**content, "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]}))
    places = {"DATA": str(data), "RUN": str(run), "PLAIN": str(tmp_path / "plain")}
    more = TINY if arguments[0] == "train" and len(arguments) > 2 else []
    assert main([*(places.get(a, a) for a in arguments), *more]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and error.startswith("sgformer: error: ")


@pytest.mark.slow
def test_the_recipe_starts(data, tmp_path):
    args = ["--config", str(RECIPE), "--data", str(data), "--run", str(tmp_path / "r"), "--batch-size", "2"]
    assert main(["train", "keypoints", *args, "--max-steps", "2", "--warmup-steps", "1", *TINY]) == 0
