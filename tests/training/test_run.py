"""What a run leaves behind, and that its numbers are right."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
import torch
from photos import CLASSES, QUICK, make_photos

import sgformer
from sgformer.backends.optimize import optimize
from sgformer.core.errors import UserError
from sgformer.models.checkpoint import read_safetensors
from sgformer.models.load import read_metadata
from sgformer.results import Prediction
from sgformer.tasks.api import evaluate, predict, train
from sgformer.tasks.classify.config import ClassifyConfig
from sgformer.tasks.classify.metrics import Evaluation
from sgformer.training.run_folder import RunFolder

pytest.importorskip("lightning")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    return train("classify", data=str(photos), run=str(tmp_path_factory.mktemp("runs") / "run"), **QUICK).path


def test_a_run_folder_holds_everything(run):
    left = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert left == {
        *("config.yaml", "data.json.gz", "environment.json", "log.txt", "metrics.csv", "report.md"),
        *("curves.png", "train_batch.png"),
        *("best.safetensors", "last.safetensors", "checkpoints/last.ckpt", "checkpoints/previous.ckpt"),
        *(f"validation/{name}" for name in ("metrics.json", "classes.csv", "confusion.csv", "confusion.png")),
    }
    environment = json.loads((run / "environment.json").read_text())
    assert environment["seed"] == 0 and environment["device"] == "cpu" and environment["packages"]["torch"]
    assert "x 4 / 1024" in (run / "log.txt").read_text()  # the scaled learning rate is told


def test_one_row_per_update_and_epoch(run):
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    epochs = [row for row in rows if row["top1"]]
    assert [float(row["epoch"]) for row in epochs] == [1, 2]
    assert sorted({int(row["step"]) for row in rows}) == list(range(1, 9))


def test_saved_weights_are_the_averaged_ones(run):
    state = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    averaged, raw = state["callbacks"]["WeightAverage"]["model"], state["state_dict"]
    last = read_safetensors(run / "last.safetensors")[0]
    assert all(torch.equal(value, averaged[name]) for name, value in last.items())
    assert any(not torch.equal(value, raw[f"model.{name}"]) for name, value in last.items())


def test_best_weights_score_what_the_run_says(run, photos):
    with (run / "metrics.csv").open() as file:
        best = max((row for row in csv.DictReader(file) if row["top1"]), key=lambda row: float(row["top1"]))
    metadata = read_metadata(run)
    assert metadata["metrics"]["top1"] == pytest.approx(float(best["top1"]), abs=1e-5)
    result = evaluate(run, photos, workers=0)
    assert result.top1 == pytest.approx(metadata["metrics"]["top1"])
    assert result.loss == pytest.approx(metadata["metrics"]["val_loss"], rel=1e-5)
    again = Evaluation.read(run / "validation")
    assert np.array_equal(again.confusion, result.confusion)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_evaluation_counts_every_image_once(run, photos, batch_size):
    result = evaluate(run, photos, batch_size=batch_size, workers=0)
    answers = predict(run, photos / "val")
    truth = [answer.image.split("/")[-2] for answer in answers]
    guesses = [answer.labels[0][0] for answer in answers]
    assert result.images == len(answers) == 9
    assert result.top1 == pytest.approx(np.mean([t == g for t, g in zip(truth, guesses, strict=True)]))
    counts = np.zeros((3, 3), dtype=int)
    np.add.at(counts, ([CLASSES.index(t) for t in truth], [CLASSES.index(g) for g in guesses]), 1)
    assert np.array_equal(result.confusion, counts)
    assert [row["correct"] for row in result.per_class()] == counts.diagonal().tolist()


def test_many_images_are_predicted_by_a_prepared_network(run, photos, monkeypatch):
    few = predict(run, photos / "val", device="cpu")
    prepared = []
    monkeypatch.setattr(
        "sgformer.backends.optimize.optimize", lambda model: prepared.append(optimize(model)) or prepared[-1]
    )
    monkeypatch.setattr("sgformer.tasks.classify.predict.WORTH_PREPARING", 9)
    many = predict(run, photos / "val", device="cpu")
    assert len(prepared) == 1 and len(few) == len(many) == 9
    for a, b in zip(few, many, strict=True):
        assert a.image == b.image and dict(b.labels) == pytest.approx(dict(a.labels), abs=1e-4)


def test_prediction_is_softmax_of_the_network(run, photos):
    from sgformer.data.image import read_image
    from sgformer.data.preparing import eval_transform, preprocessing

    image = photos / "val" / "bee" / "0.png"
    [answer] = predict(run, image, top=2)
    model = sgformer.load_model(run)
    with torch.inference_mode():
        shares = model(eval_transform(**preprocessing(model.metadata))(read_image(image))[None]).softmax(-1)[0]
    expected = sorted(zip(CLASSES, shares.tolist(), strict=True), key=lambda pair: -pair[1])[:2]
    assert isinstance(answer, Prediction) and [name for name, _ in answer.labels] == [name for name, _ in expected]
    assert [p for _, p in answer.labels] == pytest.approx([p for _, p in expected], rel=1e-5)


@pytest.mark.slow
def test_the_seed_decides_a_run(run, photos, tmp_path):
    again = train("classify", data=str(photos), run=str(tmp_path / "run"), **QUICK).path
    assert all(
        torch.equal(value, read_safetensors(again / "best.safetensors")[0][name])
        for name, value in read_safetensors(run / "best.safetensors")[0].items()
    )


def test_fine_tune_at_another_size_and_class_count(run, tmp_path):
    others = make_photos(tmp_path / "photos", classes=("a", "b", "c", "d"))
    settings = {**QUICK, "image_size": 64, "max_steps": 1, "lr": 1e-9, "warmup_lr": 0.0, "min_lr": 0.0, "ema": 0.0}
    settings["weights"] = str(run)
    tuned = train("classify", data=str(others), run=str(tmp_path / "run"), **settings).path
    before, after = read_safetensors(run / "best.safetensors")[0], read_safetensors(tuned / "last.safetensors")[0]
    assert after["head.fc.weight"].shape[0] == 4 and read_metadata(tuned)["classes"] == ["a", "b", "c", "d"]
    same = [name for name in before if before[name].shape == after[name].shape]
    assert len(same) == len(before) - 3  # all but the classifier and the position table, which is resized
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in same)


def test_weights_of_another_model_are_refused(run, photos, tmp_path):
    with pytest.raises(UserError, match="holds sgformer_n, not --model sgformer_t"):
        train(
            "classify",
            data=str(photos),
            run=str(tmp_path / "x"),
            **{**QUICK, "weights": str(run), "model": "sgformer_t"},
        )
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_any_model_of_timm(photos, tmp_path):
    settings = {**QUICK, "model": "resnet10t", "epochs": 1, "warmup_epochs": 0, "layer_decay": 0.8, "accumulate": 2}
    run = train("classify", data=str(photos), run=str(tmp_path / "run"), **settings).path
    assert evaluate(run, photos, workers=0).top1 == pytest.approx(read_metadata(run)["metrics"]["top1"])
    tuned = train(
        "classify", data=str(photos), run=str(tmp_path / "tuned"), max_steps=1, **{**settings, "weights": str(run)}
    )
    assert read_metadata(tuned.path)["timm_model"] == "resnet10t"


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16"])
def test_mixed_precision(photos, tmp_path, precision):
    run = train("classify", data=str(photos), run=str(tmp_path / "run"), precision=precision, max_steps=2, **QUICK).path
    weights = read_safetensors(run / "last.safetensors")[0]
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in weights.values())


def test_accumulation_equals_the_whole_batch(photos, tmp_path):
    plain = {"mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0, "opt": "sgd", "max_steps": 2, "ema": 0.0, "lr": 10.0}
    runs = [
        train("classify", data=str(photos), run=str(tmp_path / str(n)), **{**QUICK, **plain, "accumulate": n}).path
        for n in (1, 2)
    ]
    whole, parts = (read_safetensors(run / "last.safetensors")[0] for run in runs)
    assert all(torch.allclose(whole[name], parts[name], atol=1e-5) for name in whole)
    losses = [next(csv.DictReader((run / "metrics.csv").open()))["train_loss"] for run in runs]
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-4)


def test_a_batch_norm_of_one_image_is_a_line(photos, tmp_path):
    options = {**QUICK, "model": "resnet10t", "drop_path": 0.0, "batch_size": 1, "max_steps": 1}
    with pytest.raises(UserError, match=r"a batch norm of this network needs more than one value.* raise --batch-size"):
        sgformer.train("classify", data=str(photos), run=str(tmp_path / "run"), **options)


def test_scores_of_outputs_that_are_no_numbers_are_said_to_mean_nothing(run, photos, tmp_path, caplog):
    model = sgformer.load_model(run)
    with torch.no_grad():
        model.stages[3].norm.weight.fill_(3e38)
    sgformer.save_model(model, tmp_path / "w.safetensors", model.metadata)
    assert np.isnan(evaluate(tmp_path / "w.safetensors", photos, workers=0).loss)
    assert "the loss is not a number: the network's outputs are not, and the scores mean nothing" in caplog.text
    caplog.clear()
    assert evaluate(run, photos, workers=0).loss > 0 and "not a number" not in caplog.text


def test_drop_path_zero_is_zero(photos, tmp_path):
    settings = {**QUICK, "drop_path": 0.0}
    run = train("classify", data=str(photos), run=str(tmp_path / "run"), max_steps=1, **settings).path
    assert sgformer.load_model(run / "last.safetensors").config.drop_path_rate == 0


def test_a_run_folder_in_use_is_refused(run, photos):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with pytest.raises(UserError, match="not empty"):
        train("classify", data=str(photos), run=str(run), **QUICK)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.fixture
def damaged(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    for file in ("train/ant/2.png", "val/bee/1.png"):
        (tmp_path / "photos" / file).write_bytes(b"not a picture")
    return tmp_path / "photos"


@pytest.mark.parametrize(("batch_size", "accumulate"), [(1, 1), (2, 2)])
def test_a_batch_of_nothing_but_unreadable_images_is_no_update(damaged, tmp_path, batch_size, accumulate):
    """Small batches or accumulated parts may hold no readable image at all: the run goes on."""
    settings = {
        **QUICK,
        "epochs": 1,
        "warmup_epochs": 0,
        "batch_size": batch_size,
        "accumulate": accumulate,
        "bad_images": "skip",
    }
    run = train("classify", data=str(damaged), run=str(tmp_path / "run"), **settings).path
    with (run / "metrics.csv").open() as file:
        losses = [row["train_loss"] for row in csv.DictReader(file) if not row["top1"]]
    known = [float(loss) for loss in losses if loss]
    assert known and all(0 < loss < 10 for loss in known)  # what was not read counts neither as 0 nor as NaN
    assert len(losses) - len(known) == (batch_size == 1)
    assert "skipped" in (run / "log.txt").read_text() and "train/ant/2.png" in (run / "log.txt").read_text()


@pytest.mark.parametrize(("split", "words"), [("train", "the training data"), ("val", "the validation data")])
def test_a_split_of_unreadable_images_stops_the_run_before_it_starts(photos, tmp_path, split, words):
    shutil.copytree(photos, tmp_path / "photos")
    for file in (tmp_path / "photos" / split).rglob("*.png"):
        file.write_bytes(b"not a picture")
    with pytest.raises(
        UserError, match=rf"none of the \d+ images of {words} can be read; the first: .*ant/0\.png: not an"
    ):
        train("classify", data=str(tmp_path / "photos"), run=str(tmp_path / "run"), **QUICK, bad_images="skip")
    assert not (tmp_path / "run").exists()


def test_runs_started_in_the_same_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda *_: "20260101-120000")
    config = ClassifyConfig(data="photos", model="sgformer_n")
    names = [RunFolder.create(config, "classify").path.name for _ in range(3)]
    first = "classify-sgformer_n-20260101-120000"
    assert names == [first, f"{first}-2", f"{first}-3"]
    assert all((tmp_path / "runs" / name / "config.yaml").is_file() for name in names)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_stops_the_run_by_name(damaged, tmp_path, workers):
    settings = {**QUICK, "workers": workers}
    with pytest.raises(UserError, match=r"train/ant/2\.png") as error:
        train("classify", data=str(damaged), run=str(tmp_path / "run"), **settings)
    assert "\n" not in str(error.value)
    assert "train/ant/2.png" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.slow
def test_unreadable_images_are_skipped_and_counted(damaged, tmp_path):
    run = train("classify", data=str(damaged), run=str(tmp_path / "run"), bad_images="skip", **QUICK).path
    assert "| Skipped images | 2 |" in (run / "report.md").read_text()
    result = evaluate(run, damaged, workers=0, bad_images="skip")
    assert result.images == 8 and len(result.skipped) == 1 and "val/bee/1.png" in result.skipped[0]
    with pytest.raises(UserError, match=r"val/bee/1\.png"):
        evaluate(run, damaged, workers=0)


@pytest.mark.slow
def test_a_loss_that_is_no_number_stops_the_run(photos, tmp_path, monkeypatch):
    from sgformer.tasks.classify.module import ClassificationModule

    step = ClassificationModule.training_step

    def broken(task, batch, batch_idx):
        loss = step(task, batch, batch_idx)
        return loss * float("nan") if task.global_step == 2 else loss

    monkeypatch.setattr(ClassificationModule, "training_step", broken)
    with pytest.raises(UserError, match="the loss is nan at step 3"):
        train("classify", data=str(photos), run=str(tmp_path / "run"), checkpoint_every=2, **QUICK)
    weights = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert weights["global_step"] == 2  # the state before it stands


def test_unknown_classes_are_named(run, photos, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos/val/bee").rename(tmp_path / "photos/val/dog")
    with pytest.raises(UserError, match="dog"):
        evaluate(run, tmp_path / "photos", workers=0)


def test_the_weights_open_as_a_plain_model(run):
    model = sgformer.load_model(run / "best.safetensors")
    assert model.metadata["classes"] == list(CLASSES)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


@pytest.mark.slow
def test_deterministic_asks_torch_for_it(photos, tmp_path, monkeypatch):
    from sgformer.tasks.classify.module import ClassificationModule

    seen, step = [], ClassificationModule.training_step

    def look(task, batch, batch_idx):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return step(task, batch, batch_idx)

    monkeypatch.setattr(ClassificationModule, "training_step", look)
    try:
        for asked in (False, True):
            settings = {**QUICK, "max_steps": 1, "deterministic": asked}
            train("classify", data=str(photos), run=str(tmp_path / str(asked)), **settings)
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [False, True]


@pytest.mark.slow
def test_native_kernels_are_used_where_they_are_to_be_had(photos, tmp_path, caplog, monkeypatch):
    from sgformer.backends import native

    try:
        native.library()
    except native.UnavailableError as reason:
        pytest.skip(f"no native kernels here: {reason}")
    settings = {**QUICK, "max_steps": 3, "drop_path": 0.0, "significance": "random"}
    weights = []
    for asked, kernels in (("auto", "native"), ("on", "native"), ("off", "torch")):
        caplog.clear()
        run = train("classify", data=str(photos), run=str(tmp_path / asked), native=asked, **settings).path
        assert ("M parameters, native kernels, in" in caplog.text) == (kernels == "native")
        assert json.loads((run / "environment.json").read_text())["kernels"] == kernels
        weights.append(sgformer.load_model(run / "last.safetensors").state_dict())
    for name, value in weights[0].items():
        assert torch.equal(weights[1][name], value)
        torch.testing.assert_close(weights[2][name], value, rtol=1e-3, atol=1e-4)

    # A run goes on with what it was begun with: its bits are promised.
    shutil.copytree(tmp_path / "off", tmp_path / "old")
    config = (tmp_path / "old" / "config.yaml").read_text()
    (tmp_path / "old" / "config.yaml").write_text(re.sub("native: .*\n", "", config))
    (tmp_path / "old" / "environment.json").write_text("{}")  # of a version that knew no kernels
    for name, said in (
        ("auto", "native kernels, in"),
        ("old", "native kernels are off: the run was started without"),
    ):
        caplog.clear()
        train("classify", resume=str(tmp_path / name), max_steps=4)
        assert said in caplog.text

    def none():
        raise native.UnavailableError("there is no C++ compiler")

    monkeypatch.setattr(native, "library", none)
    caplog.clear()
    assert train("classify", data=str(photos), run=str(tmp_path / "without"), **settings).path.exists()
    assert "native kernels are off: there is no C++ compiler" in caplog.text
    train("classify", resume=str(tmp_path / "auto"), max_steps=5)
    assert "results will differ in the last bits" in caplog.text
    with pytest.raises(UserError, match="--native on: there is no C\\+\\+ compiler"):
        train("classify", data=str(photos), run=str(tmp_path / "refused"), native="on", **settings)
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    "other", [{"model": "resnet10t"}, {"precision": "bf16"}, {"compile": True}, {"device": "cuda"}, {"native": "yes"}]
)
def test_native_kernels_are_not_for_everything(photos, tmp_path, other):
    with pytest.raises(UserError, match="--native"):
        train("classify", data=str(photos), run=str(tmp_path / "run"), **{**QUICK, "native": "on", **other})
