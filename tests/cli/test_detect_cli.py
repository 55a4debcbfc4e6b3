"""`train detect`, `eval` and `predict` of a detector, on pictures that take seconds."""

import contextlib
import csv
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import yaml
from coco_scene import content, thing, write_coco
from PIL import Image
from safetensors.numpy import load_file

from sgformer.cli import main

pytest.importorskip("lightning")
pytest.importorskip("pycocotools")

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("detect_*.yaml"))
TINY = ["--image-size", "64", "--head-width", "16", "--rois", "16", "--workers", "0", "--device", "cpu"]
QUICK = ["--model", "sgformer_n", "--batch-size", "2", "--log-every", "1", *TINY]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("coco")
    for split, count in (("train", 6), ("val", 3)):
        boxes = [thing(10 * i, 3 if i % 2 else 7, [4 + i, 4, 20 + 3 * i, 24]) for i in range(1, count)]
        write_coco(root, content([*boxes, thing(10, 7, [40, 20, 20, 20], iscrowd=1)], images=count), split)
    return root


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", "detect", "--data", str(data), "--run", str(folder), "--epochs", "2", *QUICK]) == 0
    return folder


def test_a_run_leaves_what_it_should(run):
    names = ["config.yaml", "environment.json", "log.txt", "curves.png", "train_batch.png", "report.md"]
    names += ["best.safetensors", "last.safetensors", "checkpoints/last.ckpt"]
    names += [f"validation/{n}" for n in ("metrics.json", "classes.csv", "results_box.json", "results_mask.json")]
    names += [f"validation/{n}" for n in ("precision_recall.png", "examples.png")]
    assert [name for name in names if not (run / name).exists()] == []
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    losses = ("loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg")
    for row in rows:
        assert float(row["train_loss"]) == pytest.approx(sum(float(row[name]) for name in losses), rel=1e-3)
    rate = yaml.safe_load((run / "config.yaml").read_text())["lr"] * 2 / 16
    assert "mask_ap" in rows[-1] and float(rows[-1]["lr"]) == pytest.approx(rate / 10, rel=1e-4)  # after one drop
    report = (run / "report.md").read_text()
    assert "| box |" in report and "crowd regions" in report
    assert "nan" not in (run / "log.txt").read_text()


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(data, run, tmp_path):
    args = ["train", "detect", "--data", str(data), "--run", str(tmp_path / "r"), "--epochs", "2", *QUICK]
    assert main([*args, "--max-steps", "2"]) == 0  # in the middle of the first epoch's three
    assert main(["train", "detect", "--resume", str(tmp_path / "r"), "--max-steps", "6"]) == 0
    for name in ("last.safetensors", "best.safetensors"):
        straight, parts = load_file(run / name), load_file(tmp_path / "r" / name)
        assert all(np.array_equal(value, parts[key]) for key, value in straight.items()), name


def test_eval_tells_the_numbers_of_pycocotools(data, run, tmp_path, capsys):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    assert main(["eval", str(run), "--data", str(data), "--out", str(tmp_path), "--workers", "0"]) == 0
    out = capsys.readouterr().out
    assert "AP50" in out and "3 images, 2 objects of 2 classes" in out
    numbers = json.loads((tmp_path / "metrics.json").read_text())
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(data / "annotations" / "instances_val.json"))
        for kind, name in (("box", "bbox"), ("mask", "segm")):
            plain = COCOeval(truth, truth.loadRes(str(tmp_path / f"results_{kind}.json")), name)
            plain.evaluate()
            plain.accumulate()
            plain.summarize()
            mine = [-1 if v is None else v for v in numbers[kind].values()]
            assert len(mine) == 12 and mine == plain.stats.tolist()
    assert {"classes.csv", "precision_recall.png", "examples.png"} <= {path.name for path in tmp_path.iterdir()}


def test_eval_takes_a_json_and_an_image_folder(data, run, tmp_path):
    elsewhere = tmp_path / "elsewhere" / "x.json"
    elsewhere.parent.mkdir()
    elsewhere.write_bytes((data / "annotations" / "instances_val.json").read_bytes())
    args = ["eval", str(run), "--data", str(elsewhere), "--workers", "0", "--out"]
    assert main([*args, str(tmp_path / "a"), "--images", str(data / "val")]) == 0
    assert main([*args, str(tmp_path / "b")]) == 2


def test_predict_draws_and_writes_coco(data, run, tmp_path, capsys):
    from sgformer.data.coco import read_coco

    args = ["predict", str(run), str(data / "val"), "--score", "0.05"]
    assert main([*args, "--out", str(tmp_path / "p"), "--json", str(tmp_path / "p.json")]) == 0
    assert capsys.readouterr().out.count("\n") == 3
    assert len(list((tmp_path / "p").glob("*.png"))) == 3
    told = json.loads((tmp_path / "p.json").read_text())
    assert [image["width"] for image in told["images"]] == [64] * 3
    assert told["categories"] == [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
    assert told["annotations"] and all(a["score"] >= 0.05 and "segmentation" in a for a in told["annotations"])
    for image in told["images"]:
        image["file_name"] = Path(image["file_name"]).name
    (tmp_path / "again.json").write_text(json.dumps(told))
    again = read_coco(tmp_path / "again.json", data / "val")
    assert sum(len(again.objects_of(i)) for i in range(3)) > 0
    assert main([*args, "--json", "-"]) == 0
    assert len(json.loads(capsys.readouterr().out)["images"]) == 3


@pytest.mark.slow
def test_boxes_only_from_json_files(data, tmp_path):
    args = ["--data", str(data / "annotations" / "instances_train.json"), "--masks", "false", "--epochs", "1"]
    assert main(["train", "detect", *args, "--run", str(tmp_path / "r"), "--max-steps", "1", *QUICK]) == 0
    numbers = json.loads((tmp_path / "r" / "validation" / "metrics.json").read_text())
    assert "box" in numbers and "mask" not in numbers
    assert main(["eval", str(tmp_path / "r"), "--data", str(data), "--workers", "0"]) == 0


@pytest.mark.slow
def test_a_damaged_image_stops_the_run_or_is_counted(data, tmp_path, capsys):
    root = tmp_path / "data"
    for split in ("train", "val"):
        (root / split).mkdir(parents=True)
        for path in (data / split).iterdir():
            (root / split / path.name).write_bytes(path.read_bytes())
    (root / "annotations").mkdir()
    for path in (data / "annotations").iterdir():
        (root / "annotations" / path.name).write_bytes(path.read_bytes())
    bad = root / "val" / "20.png"
    bad.write_bytes(bad.read_bytes()[:200])
    args = ["train", "detect", "--data", str(root), "--epochs", "1", "--max-steps", "1", *QUICK]
    assert main([*args, "--run", str(tmp_path / "a")]) == 2
    assert "20.png" in capsys.readouterr().err
    assert main([*args, "--run", str(tmp_path / "b"), "--bad-images", "skip"]) == 0
    numbers = json.loads((tmp_path / "b" / "validation" / "metrics.json").read_text())
    assert numbers["images"] == 2 and len(numbers["skipped"]) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "detect"], "--data is missing"),
        (["train", "detect", "--data", "nowhere"], "no such file or folder"),
        (
            ["train", "detect", "--data", "DATA", "--lr-dropz", "3"],
            "unknown option --lr-dropz, did you mean --lr-drops",
        ),
        (["train", "detect", "--data", "DATA", "--model", "vit_tiny_patch16_224", *TINY], "strides 4, 8, 16 and 32"),
        (["eval", "RUN", "--data", "DATA", "--flip"], "--flip is for weights of segment"),
        (["predict", "RUN", "DATA", "--score", "2"], "--score must be in"),
    ],
)
def test_what_does_not_do_is_one_line(data, run, capsys, arguments, words):
    given = [{"DATA": str(data), "RUN": str(run)}.get(a, a) for a in arguments]
    assert main(given) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and error.startswith("sgformer: error: ")


@pytest.mark.slow
def test_classification_weights_and_a_frozen_stage_start_a_detector(data, tmp_path):
    import sgformer

    model = sgformer.create_model("sgformer_n", num_classes=7)
    sgformer.save_model(model, tmp_path / "w.safetensors", {"task": "classify", "model": "sgformer_n"})
    args = [
        "--data",
        str(data),
        "--weights",
        str(tmp_path / "w.safetensors"),
        "--freeze-stages",
        "2",
        "--max-steps",
        "2",
    ]
    assert main(["train", "detect", *args, "--run", str(tmp_path / "r"), *QUICK]) == 0
    held = {f"backbone.network.{name}": value.numpy() for name, value in model.state_dict().items()}
    trained = load_file(tmp_path / "r" / "last.safetensors")
    frozen = ("backbone.network.stem.", "backbone.network.stages.0.", "backbone.network.stages.1.")
    for name, value in held.items():
        if name in trained:
            assert np.array_equal(trained[name], value) or not name.startswith(frozen)
    moved = [n for n, v in held.items() if n in trained and not np.array_equal(trained[n], v)]
    assert moved and all(n.startswith(("backbone.network.stages.2.", "backbone.network.stages.3.")) for n in moved)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_start(recipe, data, tmp_path):
    args = [
        "--config",
        str(recipe),
        "--data",
        str(data),
        "--batch-size",
        "2",
        "--max-steps",
        "2",
        "--warmup-steps",
        "1",
        "--precision",
        "fp32",
    ]
    assert main(["train", "detect", *args, "--run", str(tmp_path / "r"), *TINY]) == 0
    assert not math.isnan(float((tmp_path / "r" / "metrics.csv").read_text().splitlines()[-1].split(",")[3]))


def test_pictures_have_the_images_size(data, run, tmp_path):
    assert main(["predict", str(run), str(data / "val" / "10.png"), "--out", str(tmp_path)]) == 0
    width, height = Image.open(tmp_path / "10.png").size
    assert width / height == pytest.approx(64 / 48)
