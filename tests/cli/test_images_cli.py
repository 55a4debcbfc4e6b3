"""Many images on one command line: the unreadable ones are named, the others answered, and the exit status tells."""

import io
import json
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sgformer
from sgformer.cli import main
from sgformer.cli.predict import own_stem
from sgformer.core.files import fitting

METADATA = {"task": "classify", "model": "sgformer_n", "classes": ["a", "b", "c"], "image_size": 32, "crop_pct": 0.9}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "w.safetensors"
    sgformer.save_model(sgformer.create_model("sgformer_n", num_classes=3), file, METADATA)
    return file


@pytest.fixture(scope="module")
def exported(weights, tmp_path_factory):
    pytest.importorskip("onnxruntime")
    file = tmp_path_factory.mktemp("exported") / "w.onnx"
    sgformer.export(weights, file, image_size=32)
    return file


@pytest.fixture
def folder(tmp_path):
    """Two good images and, between them, a broken one."""
    for name in ("a.png", "c.png"):
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)).save(tmp_path / name)
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    return tmp_path


def predicted(file: Path) -> list[str]:
    return [Path(entry["image"]).name for entry in json.loads(file.read_text())]


@pytest.mark.parametrize("kind", ["weights", "exported"])
def test_predict_names_what_is_broken_and_answers_the_rest(kind, request, folder, tmp_path, capsys):
    network, answers = str(request.getfixturevalue(kind)), tmp_path / "new" / "answers.json"
    assert main(["predict", network, str(folder), str(folder / "gone.png"), "--json", str(answers)]) == 1
    said = capsys.readouterr()
    assert predicted(answers) == ["a.png", "c.png"]
    assert [line.split()[0].rsplit("/")[-1] for line in said.out.splitlines()] == ["a.png", "c.png"]
    assert said.err.splitlines() == [
        f"left out: {folder}/gone.png: no such image or folder",
        f"left out: {folder}/b.png: the file is truncated (unexpected end)",
        "2 of 4 images read, 2 left out",
    ]
    assert main(["predict", network, str(folder), "--json", str(answers), "--bad-images", "stop"]) == 2
    assert capsys.readouterr().err == (
        f"sgformer: error: {folder}/b.png: the file is truncated (unexpected end)\n"
    )  # fmt: skip
    assert main(["predict", network, str(folder / "a.png"), str(folder / "c.png")]) == 0
    assert not capsys.readouterr().err


@pytest.mark.parametrize("command", ["predict", "explain"])
def test_nothing_done(command, weights, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    broken = str(folder / "b.png")
    assert main([command, str(weights), broken]) == 2
    assert capsys.readouterr().err == f"sgformer: error: {broken}: the file is truncated (unexpected end)\n"
    assert main([command, str(weights), broken, broken]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "sgformer: error: none of the 2 images could be read"
    assert main([command, str(weights), "gone.png"]) == 2
    assert capsys.readouterr().err == "sgformer: error: gone.png: no such image or folder\n"
    assert main([command, str(weights), "gone.png", "also.png"]) == 2
    expected = "sgformer: error: gone.png: no such image or folder (and 1 more like it)\n"
    assert capsys.readouterr().err == expected


def test_explain_leaves_out_what_is_broken(weights, folder, tmp_path, capsys):
    assert main(["explain", str(weights), str(folder), "--out", str(tmp_path / "seen")]) == 1
    assert sorted(os.listdir(tmp_path / "seen")) == ["0000.png", "0001.png", "index.html"]
    page = (tmp_path / "seen" / "index.html").read_text()
    assert "a.png" in page and "c.png" in page and "b.png" not in page
    assert "2 of 3 images read, 1 left out" in capsys.readouterr().err


def test_predict_and_explain_from_python(weights, folder):
    with pytest.raises(sgformer.UserError, match=r"b\.png"):
        sgformer.predict(weights, folder)
    with pytest.warns(UserWarning, match=r"left out: .*b\.png"):
        found = sgformer.predict(weights, folder, bad_images="skip")
    assert [Path(one.image).name for one in found] == ["a.png", "c.png"]
    with pytest.warns(UserWarning, match=r"left out: .*b\.png"):
        assert len(list(sgformer.explain(weights, folder, bad_images="skip"))) == 2
    with pytest.raises(sgformer.UserError, match="must be stop or skip"):
        sgformer.predict(weights, folder, bad_images="maybe")


@pytest.mark.parametrize("kind", ["weights", "exported"])
def test_an_image_in_memory_gets_the_prediction_of_its_file(kind, request, tmp_path):
    """EXIF is turned and transparency put on white, whatever form the image comes in."""
    values = np.random.default_rng(0).integers(0, 256, (48, 40, 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(values).save(tmp_path / "turned.png", exif=exif)
    network = request.getfixturevalue(kind)
    ((expected,),) = [[one.labels for one in sgformer.predict(network, tmp_path / "turned.png")]]
    upright = np.rot90(values, -1).copy()
    forms = [Image.open(tmp_path / "turned.png"), (tmp_path / "turned.png").read_bytes(), upright]
    forms += [torch.from_numpy(upright.transpose(2, 0, 1).copy()), torch.from_numpy(upright.transpose(2, 0, 1) / 255)]
    for form in forms:
        ((found,),) = [[one.labels for one in sgformer.predict(network, form)]]
        assert found == expected


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        (["predict", "WEIGHTS", "IMAGE", "--json", "file/answers.json"], "file/answers.json"),
        (["predict", "WEIGHTS", "IMAGE", "--json", "."], "."),
        (["predict", "WEIGHTS", "IMAGE", "--out", "file/seen"], "file/seen"),
        (["predict", "WEIGHTS", "IMAGE", "--json", "n" * 254], "n" * 254),
        (["explain", "WEIGHTS", "IMAGE", "--out", "file"], "file"),
        (["eval", "WEIGHTS", "--data", "nowhere", "--out", "file/eval"], "file/eval"),
        (["export", "WEIGHTS", "--out", "file/w.onnx"], "file/w.onnx"),
        (["export", "WEIGHTS", "--out", "/proc/w.onnx"], "/proc/w.onnx"),
        (["localization", "WEIGHTS", "--data", "nowhere", "--out", "file"], "file"),
        (["train", "classify", "--data", "nowhere", "--run", "file/run"], "file/run"),
        (["train", "segment", "--data", "nowhere", "--minutes", "1", "--run", "n" * 256], "n" * 256),
        (["data", "from", "nowhere", "file/out", "--layout", "coco"], "file/out"),
        (["data", "shards", "nowhere", "n" * 256], "n" * 256),
        (["data", "scenes", "/proc/out"], "/proc/out"),
    ],
)
def test_output_places_are_tried_before_the_work(arguments, place, weights, folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    Path("file").write_text("of somebody")
    known = {"WEIGHTS": str(weights), "IMAGE": "a.png"}
    assert main([known.get(argument, argument) for argument in arguments]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"sgformer: error: {place}: cannot be written (") and said.err.count("\n") == 1
    assert not said.out and Path("file").read_text() == "of somebody"


def test_long_names_are_cut_and_stay_apart(weights, tmp_path, capsys):
    """A name of 255 bytes, the most that most file systems take, leaves no room for a number or an ending."""
    image, images = Image.new("RGB", (40, 40)), tmp_path / "images"
    images.mkdir()
    for name in ("x" * 251, "x" * 250 + "y", "ü" * 125):
        image.save(images / f"{name}.png")
    for command in ("predict", "explain"):
        assert main([command, str(weights), str(images), "--out", str(tmp_path / command)]) == 0
        assert len(list((tmp_path / command).glob("*.png"))) == 3
    stems = Counter[str]()
    given = [f"{'x' * 251}.png", f"{'x' * 250}y.png", "a.png", "b/a.png", "a-2.png", "c/a.png"]
    names = [own_stem(name, stems, str(tmp_path)) for name in given]
    assert len(set(names)) == 6 and names[2:] == ["a", "a-2", "a-2-2", "a-3"]
    assert fitting("ü" * 125, tmp_path) == "ü" * 111


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_any_name_on_any_terminal(encoding, tmp_path, capsys, monkeypatch):
    names = ["猫", "a|b", "US$5_$10", "two\nlines"]
    torch.manual_seed(0)
    model = sgformer.create_model("sgformer_n", num_classes=4)
    sgformer.save_model(model, tmp_path / "w.safetensors", {**METADATA, "classes": names})
    images = tmp_path / "images"
    images.mkdir()
    files = [
        os.fsencode(images / "menu $5_$10.png"),
        os.fsencode(images) + b"/raw\xff.png",
        os.fsencode(images / "猫\n.png"),
    ]
    for file in files:
        with open(file, "wb") as out:
            Image.new("RGB", (40, 40)).save(out, "PNG")
    with open(images / "bad\x1b.png", "wb"):
        pass
    for command, *options in (["predict", "--json", str(tmp_path / "p.json")], ["explain"]):
        written = io.BytesIO()
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, io.TextIOWrapper(written, encoding, write_through=True))
        assert (
            main([command, str(tmp_path / "w.safetensors"), str(images), "--out", str(tmp_path / command), *options])
            == 1
        )
        text = written.getvalue().decode(encoding)
        assert ("\\n.png" in text) is (command == "predict")  # a title has lines of its own
        assert "raw\\xff.png" in text and "\\u732b" in text and "\x1b" not in text and "bad\\x1b.png" in text
        assert len(list((tmp_path / command).glob("*.png"))) == 3
    answers = json.loads((tmp_path / "p.json").read_text())
    assert {os.fsencode(one["image"]) for one in answers} == set(files)
    assert {label["class"] for label in answers[0]["labels"]} == set(names)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("[x] DefaultCPUAllocator: can't allocate memory: ...")])
def test_no_memory_is_a_line(weights, folder, capsys, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("sgformer.tasks.classify.predict.predict", fail)
    assert main(["predict", str(weights), str(folder / "a.png")]) == 2
    assert capsys.readouterr().err.startswith("sgformer: error: out of memory: ")
    if not isinstance(error, MemoryError):
        error.args = ("another",)
        with pytest.raises(RuntimeError):
            main(["predict", str(weights), str(folder / "a.png")])
