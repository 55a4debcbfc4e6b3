"""Many images on one command line: the unreadable ones are named, the others answered, and the exit status tells."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sgformer
from sgformer.cli import main

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
