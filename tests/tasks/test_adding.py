"""What it costs to add something: a plugin of one file for each kind, used from end to end, and a folder for a task."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from coco_scene import content, thing, write_coco
from photos import QUICK, make_photos
from PIL import Image

import sgformer
from sgformer.core.errors import UserError
from sgformer.core.registry import Registry

pytest.importorskip("lightning")

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = ["--image-size", "32", "--batch-size", "2", "--max-steps", "1", "--workers", "0", "--device", "cpu"]


def run(plugin, *arguments, fails=False, code=0):
    """What a command printed, in a process of its own; with `fails`, its one line of error."""
    environment = {k: v for k, v in os.environ.items() if k != "SGFORMER_PLUGINS"}
    command = [sys.executable, "-m", "sgformer", *(["--plugin", str(plugin)] if plugin else []), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == (2 if fails else code), done.stdout + done.stderr
    if fails:
        assert done.stderr.startswith("sgformer: error: ") and done.stderr.count("\n") == 1
    return done.stderr if fails else done.stdout


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Photographs in one folder, and their classes in tables."""
    root = tmp_path_factory.mktemp("table")
    photos = make_photos(root / "all", 2, 1)
    for split in ("train", "val"):
        with (root / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["file", "label"])
            writer.writerows([p.relative_to(root), p.parent.name] for p in sorted((photos / split).glob("*/*.png")))
    return root


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    root = tmp_path_factory.mktemp("voc")
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "Annotations").mkdir()
    (root / "JPEGImages").mkdir()
    for number, split in enumerate(("train", "val", "train")):
        Image.new("RGB", (64, 48), (200, 90 * number, 30)).save(root / "JPEGImages" / f"{number}.jpg")
        with (root / "ImageSets" / "Main" / f"{split}.txt").open("a") as file:
            file.write(f"{number}\n")
        boxes = [("dog", 5, 3, 40, 30, 0), ("cat", 20, 10, 64, 48, number % 2)]
        objects = "".join(
            f"<object><name>{n}</name><difficult>{d}</difficult><bndbox><xmin>{a}</xmin><ymin>{b}</ymin>"
            f"<xmax>{c}</xmax><ymax>{e}</ymax></bndbox></object>"
            for n, a, b, c, e, d in boxes
        )
        (root / "Annotations" / f"{number}.xml").write_text(
            f"<annotation><filename>{number}.jpg</filename><size><width>64</width><height>48</height></size>"
            f"{objects}</annotation>"
        )
    return root


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    root = tmp_path_factory.mktemp("coco")
    for split in ("train", "val"):
        write_coco(root, content([thing(10, 3, [4, 4, 24, 24]), thing(20, 7, [10, 8, 30, 30])]), split)
    return root


# -- formats of data --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_format_of_images_with_classes_is_a_file(table, tmp_path):
    plugin = EXAMPLES / "csv_images.py"
    run(plugin, "train", "classify", "--data", table, "--model", "sgformer_n", "--run", tmp_path / "r", *TINY)
    assert "3 images of 3 classes" in run(plugin, "eval", tmp_path / "r", "--data", table, "--workers", "0")
    assert json.loads(run(plugin, "data", "check", table, "--json"))["splits"]["train"]["per_class"] == {
        "ant": 2,
        "bee": 2,
        "cat": 2,
    }
    out = run(None, "data", "check", table, code=1)
    assert "does not read a CSV list of files and labels; this converts it: sgformer data from" in out


@pytest.mark.slow
def test_a_format_of_objects_is_a_file(voc, tmp_path):
    pytest.importorskip("pycocotools")
    plugin, small = EXAMPLES / "voc.py", ["--head-width", "16", "--rois", "16", *TINY]
    run(plugin, "train", "detect", "--data", voc, "--model", "sgformer_n", "--run", tmp_path / "r", *small)
    out = run(plugin, "eval", tmp_path / "r", "--data", voc, "--workers", "0")
    assert "1 images, 1 objects of 2 classes" in out  # the difficult cat does not count
    error = run(None, "train", "detect", "--data", voc, fails=True)
    assert "no annotations for 'train'" in error and "PASCAL VOC XML" in error and "converts it" in error


def test_what_the_examples_read(table, voc, monkeypatch):
    from sgformer.data import formats

    monkeypatch.setattr(formats, "FORMATS", dict(formats.FORMATS))
    csv_images, voc_format = load("csv_images"), load("voc")
    assert formats.find_format("classes", table).name == "csv" and formats.find_format("objects", voc).name == "voc"
    train, val = formats.open_both(table)
    assert val.classes == train.classes == ("ant", "bee", "cat") and train.counts() == [2, 2, 2]
    assert train.path(0) == table / "all" / "train" / "ant" / "0.png" and train.path(0).is_file()
    with pytest.raises(UserError, match="training does not know: bee, cat"):
        csv_images.open_csv(table, "val", ["ant"])
    listing = voc_format.open_voc(voc, "train")
    assert listing.classes == ("cat", "dog")
    dog, cat = listing.objects_of(0)
    assert (dog[0], dog[1]) == (1, [4, 2, 40, 30]) and (cat[0], cat[1]) == (0, [19, 9, 64, 48])
    (voc / "ImageSets" / "Main" / "test.txt").write_text("nowhere")
    with pytest.raises(UserError, match="test cannot be read as PASCAL VOC"):
        voc_format.open_voc(voc, "test")


def test_names_of_formats_are_taken_once(monkeypatch):
    from sgformer.data import formats

    monkeypatch.setattr(formats, "FORMATS", dict(formats.FORMATS))
    with pytest.raises(ValueError, match="a format of the name 'coco'"):
        sgformer.register_format("coco", "objects", lambda root: True, print)
    with pytest.raises(ValueError, match="kind is one of classes, objects, got 'pixels'"):
        sgformer.register_format("mine", "pixels", lambda root: True, print)
    sgformer.register_format("mine", "classes", lambda root: root == "there", lambda *_: "listing")
    assert formats.open_data("classes", "there", "train") == "listing"
    with pytest.raises(UserError, match=r"nowhere: no such folder.*known formats: image-folder, shards, mine"):
        formats.open_both("nowhere")


def load(name):
    """An example, run as a plugin is."""
    import importlib.util

    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- heads ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_segmentation_head_is_a_file(tmp_path):
    data, plugin = tmp_path / "data", EXAMPLES / "linear_head.py"
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (data / kind / split).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (40, 40), (90 * i, 10, 10)).save(data / f"images/{split}/{i}.png")
            Image.new("L", (40, 40), i).save(data / f"annotations/{split}/{i}.png")
    base = ["train", "segment", "--data", data, "--model", "sgformer_n", "--run", tmp_path / "r"]
    run(plugin, *base, "--head", "linear", "--head-width", "16", *TINY)
    picture = data / "images" / "validation" / "0.png"
    assert len(json.loads(run(plugin, "predict", tmp_path / "r", picture, "--json", "-"))) == 1
    assert "no segmentation head named 'linear'" in run(None, "predict", tmp_path / "r", picture, fails=True)
    error = run(plugin, *base[:2], "--data", "nowhere", "--head", "linera", fails=True)
    assert "--head is one of semantic-fpn, upernet, linear, got linera, did you mean linear?" in error
    assert "semantic-fpn, upernet, linear" in run(plugin, "train", "segment", "--help")


@pytest.mark.slow
def test_a_detector_is_a_file(coco, tmp_path):
    pytest.importorskip("pycocotools")
    plugin, small = EXAMPLES / "fcos.py", ["--head", "fcos", "--head-width", "64", *TINY]
    base = ["train", "detect", "--data", coco, "--model", "sgformer_n"]
    run(plugin, *base, "--run", tmp_path / "r", *small)
    rows = list(csv.DictReader((tmp_path / "r" / "metrics.csv").open()))
    assert {"classification", "bbox_regression", "bbox_ctrness", "box_ap"} <= set(rows[-1])
    assert "mask_ap" not in rows[-1]
    assert "AP50" in run(plugin, "eval", tmp_path / "r", "--data", coco, "--workers", "0")
    told = json.loads(run(plugin, "predict", tmp_path / "r", coco / "val", "--json", "-", "--score", "0"))
    assert len(told["images"]) == 2
    assert "no detector named 'fcos'" in run(None, "predict", tmp_path / "r", coco / "val", fails=True)


def test_fcos_trains_detects_and_comes_back(tmp_path, monkeypatch):
    pytest.importorskip("pycocotools")
    from sgformer.heads.registry import DETECTORS
    from sgformer.models.load import read_weights
    from sgformer.models.pyramid import pyramid_backbone
    from sgformer.tasks.detect.config import DetectConfig
    from sgformer.tasks.detect.data import read_splits
    from sgformer.tasks.detect.network import Detector, named_head

    monkeypatch.setattr(DETECTORS, "added", dict(DETECTORS.added))
    load("fcos")
    model = Detector(pyramid_backbone("sgformer_n"), 3, width=64, head="fcos")
    target = {"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": torch.tensor([3])}
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    images = [torch.rand(3, 64, 80), torch.rand(3, 48, 64)]
    losses = model(images, [target, nothing])
    assert sum(losses.values()).isfinite() and not model.masks
    sum(losses.values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    with torch.no_grad():
        model.heads.fcos.head.classification_head.cls_logits.bias.fill_(2.0)
    model.save(tmp_path / "w.safetensors", {"classes": ["a", "b", "c"]})
    again = sgformer.load_model(tmp_path / "w.safetensors")
    with torch.no_grad():
        for mine, theirs in zip(model.eval()(images), again(images), strict=True):
            assert len(mine["boxes"]) and {0, 1, 2} >= set(mine["labels"].tolist())
            assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    held = read_weights(tmp_path / "w.safetensors")
    assert (
        named_head(DetectConfig(), held) == "fcos" and named_head(DetectConfig(head="mask-rcnn"), held) == "mask-rcnn"
    )
    with pytest.raises(UserError, match="--masks true: --head fcos finds no masks"):
        read_splits(DetectConfig(data="nowhere", masks=True), "fcos")
    with pytest.raises(UserError, match="multiples of 64, got 32"):
        Detector(pyramid_backbone("sgformer_n"), 3, width=32, head="fcos")


def test_names_of_heads_need_no_torch():
    code = "import sys; from sgformer.heads.registry import DETECTORS, HEADS; from sgformer.exporting.formats import "
    code += "FORMATS; print(HEADS.names(), DETECTORS.names(), FORMATS.names(), 'torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == (
        "['semantic-fpn', 'upernet'] ['faster-rcnn', 'mask-rcnn'] ['hub', 'onnx', 'openvino', 'torch-export'] False\n"
    )


def test_a_registry_keeps_one_thing_for_a_name():
    registry = Registry("head", "sgformer.heads", "register_head")

    class Mine:
        pass

    assert registry.register("mine")(Mine) is Mine and registry.get("mine") is Mine
    registry.register("mine")(Mine)
    with pytest.raises(ValueError, match="there is a head of the name 'mine' already"):
        registry.register("mine")(Path)
    with pytest.raises(ValueError, match="there is a head of the name 'upernet' already"):
        registry.register("upernet")(Mine)
    with pytest.raises(UserError, match=r"w: no head named 'mein', did you mean mine\?; there are semantic-fpn, uper"):
        registry.get("mein", "w")


# -- export formats, sizes --------------------------------------------------------------------------------------------


EXPORT = """
import io

import torch

import sgformer
from sgformer.exporting.formats.torch_export import TorchFormat


@sgformer.register_export("archive")
class Archive(TorchFormat):
    suffix = ".archive"

    def write(self, graph, example, size, about, path):
        (file,) = super().write(graph, example, size, about, path.with_suffix(".pt2"))
        return [file.rename(path)]

    def open(self, path):
        program = torch.export.load(io.BytesIO(path.read_bytes())).module(check_guards=False)
        return lambda image: (list(program(image)), None)  # this network sorts nothing
"""


@pytest.mark.slow
def test_an_export_format_is_a_file(tmp_path):
    model = sgformer.create_model("sgformer_n", num_classes=2, pairs="single")
    sgformer.save_model(model, tmp_path / "w.safetensors")
    plugin, out = tmp_path / "archive.py", tmp_path / "w.archive"
    plugin.write_text(EXPORT)
    export = ["export", tmp_path / "w.safetensors", "--format", "archive", "--image-size", "64", "--out"]
    assert "wrote" in run(plugin, *export, out) and out.is_file()
    assert "ends in .archive" in run(plugin, *export, tmp_path / "w.onnx", fails=True)
    assert "--format is one of hub, onnx, openvino, torch-export, got archive" in run(None, *export, out, fails=True)
    assert "torch-export, archive" in run(plugin, "export", "--help")


SIZE = """
import sgformer
from sgformer.models.config import pyramid

sgformer.register_size("sgformer_tiny", pyramid((16, 32, 64, 128), (2, 2, 4, 8), (2, 2, 2, 1)))
"""


@pytest.mark.slow
def test_a_size_is_a_file(table, tmp_path):
    data, plugin = table / "all", tmp_path / "tiny.py"
    plugin.write_text(SIZE)
    run(plugin, "train", "classify", "--data", data, "--model", "sgformer_tiny", "--run", tmp_path / "r", *TINY)
    assert "ant" in run(plugin, "predict", tmp_path / "r", data / "val" / "ant", "--top", "3")
    with pytest.raises(ValueError, match="there is a size of the name 'sgformer_n' already"):
        sgformer.register_size("sgformer_n", sgformer.VARIANTS["sgformer_s"])
    with pytest.raises(ValueError, match="called sgformer_SOMETHING, got 'tiny'"):
        sgformer.register_size("tiny", sgformer.VARIANTS["sgformer_n"])


def test_a_size_is_a_line_of_the_table():
    """As in `models/config.py`, before timm is imported."""
    code = "from sgformer.models.config import VARIANTS, pyramid\n"
    code += "VARIANTS['sgformer_x'] = pyramid((16, 32, 64, 128), (2, 2, 4, 8), (2, 2, 2, 1))\n"
    code += "import timm, torch, sgformer\n"
    code += "model = timm.create_model('sgformer_x', num_classes=3)\n"
    code += "print(tuple(model(torch.zeros(1, 3, 64, 64)).shape), timm.get_pretrained_cfg('sgformer_x').crop_pct)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == (
        "(1, 3) 0.9\n"
    )


# -- tasks ------------------------------------------------------------------------------------------------------------


def test_a_task_is_a_folder_and_a_line(tmp_path, monkeypatch):
    from sgformer.tasks.registry import TASKS

    monkeypatch.setitem(TASKS, "toy", "toy:Toy")
    data = make_photos(tmp_path / "data", 2, 1, classes=("0", "1", "2.5"))
    options = {key: value for key, value in QUICK.items() if key != "warmup_epochs"}
    trained = sgformer.train("toy", data=str(data), run=str(tmp_path / "r"), device="cpu", **options)
    report = (trained.path / "report.md").read_text()
    assert report.startswith("# sgformer_n: error ") and "![Curves](curves.png)" in report and "3 images" in report
    result = sgformer.evaluate(trained.path, data, workers=0, device="cpu")
    assert result.images == 3
    predictions = sgformer.predict(trained.path, data / "val", device="cpu")
    errors = [abs(number - float(Path(name).parent.name)) for name, number in predictions]
    assert sum(errors) / 3 == pytest.approx(result.error, rel=1e-4)
    assert sgformer.load_model(trained.path).metadata["task"] == "toy"
    with pytest.raises(UserError, match="did you mean scale"):
        sgformer.train("toy", data=str(data), scael=2)
