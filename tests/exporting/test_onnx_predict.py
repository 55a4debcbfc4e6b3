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
from small_export import small

import sgformer
from sgformer.cli import main
from sgformer.core.errors import UserError
from sgformer.data.image import Images, centre
from sgformer.data.preparing import eval_transform
from sgformer.exporting import export as exporting
from sgformer.exporting import onnx_predict as exported
from sgformer.exporting.formats import FORMATS
from sgformer.heads.mask_rcnn import paste_masks
from sgformer.models.load import read_weights
from sgformer.models.pyramid import pyramid_backbone
from sgformer.tasks.detect.network import Detector
from sgformer.tasks.detect.predict_onnx import paste_mask
from sgformer.tasks.keypoints.network import KeypointDetector
from sgformer.tasks.registry import get_task
from sgformer.tasks.segment.network import Segmenter
from sgformer.viz.detection import instances_of

pytestmark = pytest.mark.slow  # networks of every task are exported

mask_tools = pytest.importorskip("pycocotools.mask")

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
    torch.manual_seed(0)
    sgformer.save_model(small().float(), root / "c.safetensors", about)
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


@pytest.fixture(scope="module")
def detector(place):
    """A detector as weights and as a file for 64 x 96 pixels; pictures as large, twice as large, and of another shape.

    It finds different things with different confidence, so that rounding does not decide what stays. Nor does it decide
    which token comes first, which noise of 1e-6 does in one of these pictures: tokens are ranked by where they are."""
    torch.manual_seed(3)
    backbone = small(significance="uniform").float()
    model = Detector(pyramid_backbone(backbone), 2, width=16)
    with torch.no_grad():
        model.heads.rpn.head.cls_logits.weight.mul_(300)
        model.heads.roi_heads.box_predictor.cls_score.weight.mul_(15)
        model.heads.roi_heads.box_predictor.bbox_pred.weight.mul_(20)
        model.heads.roi_heads.mask_predictor.mask_fcn_logits.weight.mul_(50)
    about = {"classes": ["ant", "bee"], "category_ids": [3, 7], "image_size": [64, 96]}
    model.save(place / "d.safetensors", about)
    Detector(pyramid_backbone(backbone), 2, masks=False, width=16).save(place / "boxes.safetensors", about)
    points = KeypointDetector(pyramid_backbone(backbone), 2, 3, width=16)
    held = points.state_dict()
    shared = {n: v for n, v in model.state_dict().items() if n in held and held[n].shape == v.shape}
    points.load_state_dict({**held, **shared})
    with torch.no_grad():
        points.heads.roi_heads.keypoint_predictor.kps_score_lowres.weight.mul_(50)
    places = {"keypoints": ["a", "b", "c"], "skeleton": [[1, 3]], "sigmas": [0.1] * 3}
    points.save(place / "points.safetensors", {**about, **places})
    for name in ("d", "boxes", "points"):
        stored = read_weights(place / f"{name}.safetensors")
        graph = get_task(stored.task).graph(stored, True, False, False)
        about = {**graph.about, "precision": "fp32", "input_size": (64, 96), "multiple": 1}
        FORMATS.get("onnx")().write(graph, torch.randn(1, 3, 64, 96), (64, 96), about, place / f"{name}.onnx")
    (place / "scenes").mkdir()
    coarse = Image.fromarray(np.random.default_rng(1).integers(0, 255, (8, 12, 3), dtype=np.uint8))
    for name, size in (("a", (96, 64)), ("b", (192, 128)), ("c", (40, 50))):
        coarse.resize(size, Image.Resampling.BICUBIC).save(place / f"scenes/{name}.png")
    return place


def test_the_same_answers_without_torch(place, detector, tmp_path):
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
    assert main(["predict", r"{place}/d.onnx", r"{place}/pictures", "--json", "d.json", "--out", "drawn"]) == 0
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


def apart(x, y):
    """How far apart the edges of two objects are, in pixels; of two classes: infinitely."""
    far = np.abs(np.subtract(x["bbox"], y["bbox"])).max()
    return far if x["category_id"] == y["category_id"] else np.inf


def test_detection_finds_the_same_objects(detector, tmp_path, capsys):
    """Through the command line, as JSON and as pictures: objects in the picture's own pixels, however it was scaled."""
    told = {}
    for kind in ("safetensors", "onnx"):
        out = ["--json", str(tmp_path / f"{kind}.json"), "--out", str(tmp_path / kind), "--score", "0.3"]
        assert main(["predict", str(detector / f"d.{kind}"), str(detector / "scenes"), *out]) == 0
        told[kind] = json.loads((tmp_path / f"{kind}.json").read_text())
        assert sorted(p.name for p in (tmp_path / kind).iterdir()) == ["a.png", "b.png", "c.png"]
    theirs, mine = told["safetensors"], told["onnx"]
    assert mine["images"] == theirs["images"] and mine["categories"] == theirs["categories"]
    assert {a["category_id"] for a in mine["annotations"]} == {3, 7}
    for image in (1, 2):  # these fill the file exactly
        a, b = ([x for x in one["annotations"] if x["image_id"] == image] for one in (mine, theirs))
        assert len(a) == len(b) > 5
        pairs = [(x, min(b, key=lambda y: apart(x, y))) for x in a]
        pairs = [(x, y) for x, y in pairs if apart(x, y) < 0.1 and abs(x["score"] - y["score"]) < 1e-3]
        assert len(pairs) > 0.9 * len(a)
        masks, expected = (np.stack([mask_tools.decode(p[k]["segmentation"]) for p in pairs]) > 0 for k in (0, 1))
        assert masks.shape[1:] == ((64, 96) if image == 1 else (128, 192)) and masks.any((1, 2)).mean() > 0.5
        # Untrained masks are noise from pixel to pixel, and rounding may move one by a pixel: most must agree.
        assert ((masks ^ expected).sum((1, 2)) <= 0.02 * expected.sum((1, 2)) + 2).mean() > 0.8
        drawn = [np.asarray(Image.open(tmp_path / k / f"{' ab'[image]}.png")).astype(int) for k in told]
        assert (np.abs(drawn[0] - drawn[1]) > 8).mean() < 0.02
    inside = [x["bbox"] for x in mine["annotations"] if x["image_id"] == 3]
    assert inside and all(x >= 0 and y >= 0 and x + w <= 40.01 and y + h <= 50.01 for x, y, w, h in inside)


def test_a_detector_without_masks(detector):
    (found,) = sgformer.predict(detector / "boxes.onnx", detector / "scenes/a.png", score=0.05)
    assert found.size == (64, 96) and found.results and "segmentation" not in found.results[0]
    assert instances_of(found, ["ant", "bee"]).masks is None


def test_keypoints_are_found_in_the_same_places(detector):
    for picture in ("a", "b"):  # these fill the file exactly
        mine, theirs = (
            sgformer.predict(detector / f"points.{kind}", detector / f"scenes/{picture}.png", score=0.05)[0].results
            for kind in ("onnx", "safetensors")
        )
        assert len(mine) == len(theirs) > 5
        pairs = [(x, min(theirs, key=lambda y, x=x: apart(x, y))) for x in mine]
        a, b = (np.array([pair[k]["keypoints"] for pair in pairs if apart(*pair) < 0.1]).reshape(-1, 3) for k in (0, 1))
        assert len(a) > 0.9 * 3 * len(mine) and np.ptp(b[:, 0]) > 20 and 0.05 < np.median(b[:, 2]) <= 1
        same = (np.abs(a[:, :2] - b[:, :2]).max(1) < 0.1) & (np.abs(a[:, 2] - b[:, 2]) < 1e-3)
        assert same.mean() > 0.9  # two peaks of a random map may be equally high
    with pytest.raises(UserError, match="are not those of a detector"):
        network = exported.ExportedNetwork(detector / "points.onnx")
        network.metadata["keypoints"] = ["a", "b"]
        next(get_task("keypoints").predict_exported(network, Images([detector / "scenes/a.png"])))


@pytest.mark.parametrize("size", [(64, 96), (300, 41)])
def test_masks_are_laid_out_as_torchvision_does(size):
    rng = np.random.default_rng(0)
    corners = np.sort(rng.uniform(-0.1, 1.1, (20, 2, 2)), axis=1) * np.array(size[::-1])
    boxes = corners.reshape(20, 4).astype(np.float32)
    boxes[0] = [5.2, 5.2, 5.3, 5.3]  # less than a pixel
    masks = rng.uniform(0, 1, (20, 28, 28)).astype(np.float32)
    theirs = paste_masks(torch.from_numpy(masks)[:, None], torch.from_numpy(boxes), size)
    for mask, box, expected in zip(masks, boxes, theirs, strict=True):
        mine = paste_mask(mask, box, size)
        assert mine.shape == size and (mine ^ expected.numpy()).mean() < 1e-3


def test_a_pyramid_alone_predicts_nothing(detector, monkeypatch):
    network = exported.ExportedNetwork(detector / "d.onnx")
    network.metadata["part"] = "backbone and feature pyramid"
    with pytest.raises(UserError, match=r"d\.onnx: holds backbone and feature pyramid, not a whole detector"):
        next(get_task("detect").predict_exported(network, [detector / "scenes/a.png"]))


@pytest.mark.parametrize("file", ["s.onnx", "s64.onnx"])
def test_segmentation_labels_the_same_pixels(place, file):
    sliding = {"sliding": True, "image_size": 64} if "64" in file else {}
    mine = list(sgformer.predict(place / file, place / "pictures"))
    theirs = list(sgformer.predict(place / "s.safetensors", place / "pictures", device="cpu", **sliding))
    for a, b in zip(mine, theirs, strict=True):
        assert a.labels.shape == b.labels.shape and a.image == b.image and a.first == b.first == 1
        assert (a.labels == b.labels).mean() > 0.995
    assert len({int(label) for one in theirs for label in np.unique(one.labels)}) > 1


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (224, 224)])
@pytest.mark.parametrize("crop_pct", [0.9, 1.0])
def test_images_are_prepared_as_for_the_weights(place, size, crop_pct):
    network = exported.ExportedNetwork(place / "c.onnx")
    for path in sorted((place / "pictures").iterdir()):
        image = Image.open(path)
        mine = network.normalised(centre(image, size, crop_pct))
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
        ("d.onnx", ["--top", "3"], "--top is for weights of classify"),
        ("d.onnx", ["--score", "3"], "--score must be in [0, 1]"),
        ("d.onnx", ["--image-size", "96"], "takes 64 x 96 pixels only, without --image-size"),
        ("none.onnx", [], "no such file"),
        ("broken.onnx", [], "not an ONNX file"),
    ],
)
def test_bad_input_is_one_line(file, options, message, place, detector, capsys):
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
    assert "MB instead of" in said and "ms per image instead of" in said and "differ by up to" in said
    assert ("the same prediction in 100.0 %" in said) == (precision != "int8") or "the same prediction in" in said
    assert [p.name for p in tmp_path.iterdir()] == ["q.onnx"]
    network = exported.ExportedNetwork(tmp_path / "q.onnx")
    assert network.metadata["precision"] == precision.split()[0]
    picture = np.asarray(Image.open(place / "pictures/2.png"), np.float32).transpose(2, 0, 1)[None] / 127.5 - 1
    before = exported.ExportedNetwork(place / "c.onnx")(picture)["logits"]
    after = network(picture)["logits"]
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
