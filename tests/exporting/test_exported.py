"""An exported file predicts as its weights do, without torch."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_portable import small

import sgformer
from sgformer import exported, exporting
from sgformer.api_segment import predict_segmentation
from sgformer.cli import main
from sgformer.data.transforms import eval_transform
from sgformer.errors import UserError
from sgformer.tasks.pyramid import pyramid_backbone
from sgformer.tasks.segment import Segmenter

CLASSES = ["ant", "bee", "cat", "dog", "eel"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Pictures; a classifier, and a segmenter for any size and for one, as weights and exported."""
    root, rng = tmp_path_factory.mktemp("exported"), np.random.default_rng(0)
    (root / "pictures").mkdir()
    for i, (height, width) in enumerate([(50, 90), (120, 64), (64, 64)]):
        coarse = Image.fromarray(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(root / f"pictures/{i}.png")
    about = {"task": "classify", "classes": CLASSES, "image_size": 64, "crop_pct": 0.9}
    sgformer.save_model(small().float(), root / "c.safetensors", about)
    torch.manual_seed(0)
    segmenter = Segmenter(pyramid_backbone(small().float()), "semantic-fpn", 3, 8)
    with torch.no_grad():  # every class is to be found somewhere
        logits = segmenter.eval()(torch.randn(1, 3, 64, 64))["out"]
        segmenter.head.classifier.conv.bias.sub_(logits.mean((0, 2, 3)))
    about = {"classes": ["a", "b", "c"], "short_side": 64, "image_size": 64, "reduce_zero_label": True}
    segmenter.save(root / "s.safetensors", about)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "CHECKED", ((1, 64, 96),))
        sgformer.export(root / "c.safetensors", root / "c.onnx")
        sgformer.export(root / "s.safetensors", root / "s.onnx")
        sgformer.export(root / "s.safetensors", root / "s64.onnx", image_size=64)
    return root


def test_the_same_answers_without_torch(place, tmp_path):
    """In a process that cannot import torch, timm or torchvision, through the command line."""
    code = f"""
    import sys
    class Block:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in ("torch", "torchvision", "timm", "safetensors", "lightning", "onnx"):
                raise ModuleNotFoundError(f"No module named {{name!r}}", name=name.split(".")[0])
    sys.meta_path.insert(0, Block())
    from sgformer.cli import main
    assert main(["predict", r"{place}/c.onnx", r"{place}/pictures", "--json", "c.json", "--top", "3"]) == 0
    assert main(["predict", r"{place}/s.onnx", r"{place}/pictures", "--json", "s.json"]) == 0
    assert main(["predict", r"{place}/c.safetensors", r"{place}/pictures"]) == 2
    assert main(["train", "classify"]) == 2
    assert "torch" not in sys.modules
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    env = {**os.environ, "PYTHONPATH": str(Path(sgformer.__file__).parents[1])}
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    errors = run.stderr.splitlines()
    assert len(errors) == 2 and all("needs" in line and "not installed" in line for line in errors)
    expected = [p.to_dict() for p in sgformer.predict(place / "c.safetensors", place / "pictures", top=3)]
    found = json.loads((tmp_path / "c.json").read_text())
    for mine, theirs in zip(found, expected, strict=True):
        assert mine["image"] == theirs["image"]
        assert [x["class"] for x in mine["labels"]] == [x["class"] for x in theirs["labels"]]
        shares = [[x["probability"] for x in one["labels"]] for one in (mine, theirs)]
        np.testing.assert_allclose(*shares, atol=1e-4)
    first = run.stdout.splitlines()[0]
    assert first.startswith(expected[0]["image"]) and expected[0]["labels"][0]["class"] in first
    assert {c["class"] for one in json.loads((tmp_path / "s.json").read_text()) for c in one["classes"]} <= {
        "a",
        "b",
        "c",
    }


@pytest.mark.parametrize("file", ["s.onnx", "s64.onnx"])
def test_segmentation_labels_the_same_pixels(place, file):
    sliding = {"sliding": True, "image_size": 64} if "64" in file else {}
    mine = list(exported.predict_segmentation(place / file, place / "pictures"))
    theirs = list(predict_segmentation(place / "s.safetensors", place / "pictures", device="cpu", **sliding))
    for a, b in zip(mine, theirs, strict=True):
        assert a.labels.shape == b.labels.shape and a.image == b.image and a.first == b.first == 1
        assert (a.labels == b.labels).mean() > 0.995
    assert len({int(label) for one in theirs for label in np.unique(one.labels)}) > 1


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (224, 224)])
@pytest.mark.parametrize("crop_pct", [0.9, 1.0])
def test_images_are_prepared_as_in_training(place, size, crop_pct):
    network = exported.ExportedNetwork(place / "c.onnx")
    for path in sorted((place / "pictures").iterdir()):
        image = Image.open(path)
        mine = network.normalised(exported.centre(image, size, crop_pct))
        np.testing.assert_allclose(mine, eval_transform(size, crop_pct)(image).numpy(), atol=1e-6)


@pytest.mark.parametrize("size", [(20, 33), (64, 40), (90, 130)])
def test_resizing_is_torchs(size):
    x = torch.randn(1, 3, 64, 40)
    smooth = F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=True)[0]
    np.testing.assert_allclose(exported.resize_smooth(x[0].numpy(), size), smooth.numpy(), atol=5e-5)
    plain = F.interpolate(x, size, mode="bilinear", align_corners=False)[0]
    np.testing.assert_allclose(exported.resize(x[0].numpy(), size), plain.numpy(), atol=5e-5)


@pytest.mark.parametrize(
    ("file", "options", "message"),
    [
        ("c.onnx", ["--flip"], "--flip is for weights of segment"),
        ("s.onnx", ["--flip"], "--flip is for weights; "),
        ("c.onnx", ["--image-size", "20"], "from 32 pixels up, got 20 x 20"),
        ("c.onnx", ["--device", "cuda"], "run on the CPU"),
        ("none.onnx", [], "no such file"),
        ("broken.onnx", [], "not an ONNX file"),
    ],
)
def test_bad_input_is_one_line(file, options, message, place, capsys):
    (place / "broken.onnx").write_bytes(b"not a network")
    assert main(["predict", str(place / file), str(place / "pictures"), *options]) == 2
    line = capsys.readouterr().err
    assert message in line and line.count("\n") == 1


@pytest.mark.parametrize("precision", ["fp16", "int8", "int8 static"])
def test_less_precision_is_measured_and_still_predicts(precision, place, tmp_path, capsys):
    arguments = ["--precision", precision.split()[0], "--out", str(tmp_path / "q.onnx")]
    arguments += ["--calibration", str(place / "pictures")] if precision != "int8" else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "CHECKED", ((1, 64, 96),))
        assert main(["export", str(place / "c.safetensors"), *arguments]) == 0
    said = capsys.readouterr().out
    assert "MB, not" in said and "ms an image, not" in said and "differ by up to" in said
    assert ("the same answer in 100.0 %" in said) == (precision != "int8") or "the same answer in" in said
    assert [p.name for p in tmp_path.iterdir()] == ["q.onnx"]
    network = exported.ExportedNetwork(tmp_path / "q.onnx")
    assert network.metadata["precision"] == precision.split()[0]
    before = exported.ExportedNetwork(place / "c.onnx")(np.zeros((2, 3, 64, 64), np.float32))["logits"]
    after = network(np.zeros((2, 3, 64, 64), np.float32))["logits"]
    assert after.dtype == np.float32 and np.abs(after - before).max() < 0.3 * np.abs(before).max()


def test_files_of_others_are_refused(tmp_path):
    import onnx

    value = onnx.helper.make_tensor_value_info("x", 1, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", [value],
                                   [onnx.helper.make_tensor_value_info("y", 1, [1])])  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(UserError, match="not written by sgformer export"):
        exported.ExportedNetwork(tmp_path / "other.onnx")
