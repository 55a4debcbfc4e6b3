"""Only the decoders of formats that are named run, and whoever imports this package keeps the Pillow that they had."""

import ast
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from coco_scene import content, thing, write_coco
from photos import QUICK, make_photos
from PIL import EpsImagePlugin, Image

import sgformer
from sgformer.cli import main
from sgformer.core.errors import UserError
from sgformer.data import sharding, shards
from sgformer.data.image import FORMATS, MAX_PIXELS, open_image, probe_image, read_image

SOURCE = Path(sgformer.__file__).parent
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\n(x) run\n%%EOF\n"


@pytest.fixture
def ghostscript(tmp_path, monkeypatch):
    """A stub of Ghostscript on the PATH; what the fixture gives is a file that is there once it was run."""
    ran, folder = tmp_path / "ran", tmp_path / "bin"
    folder.mkdir()
    for name in ("gs", "gswin32c", "gswin64c"):
        (folder / name).write_text(f"#!/bin/sh\necho run >> {ran}\nexit 1\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # Pillow looks once
    return ran


def test_the_stub_is_what_pillow_would_run(ghostscript):
    with pytest.raises((OSError, subprocess.SubprocessError)):
        Image.open(io.BytesIO(POSTSCRIPT)).load()
    assert ghostscript.exists()


def test_postscript_is_no_image_however_it_is_called(ghostscript, tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(POSTSCRIPT)
    for read in (read_image, probe_image, open_image):
        with pytest.raises(UserError, match=r"holiday\.jpg: not an image, or not of a format accepted here: JPEG, PNG"):
            read(tmp_path / "holiday.jpg")
    with pytest.raises(UserError, match="image 3: EPS is not read here"):
        open_image(Image.open(io.BytesIO(POSTSCRIPT)), 3)
    assert not ghostscript.exists()


def test_an_image_of_another_format_may_be_given_decoded():
    file = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(file, "TGA")
    with pytest.raises(UserError, match=r"TGA is not read here .* pass image.convert"):
        open_image(Image.open(file))
    whole = Image.open(file)
    whole.load()
    assert open_image(whole).getpixel((0, 0)) == open_image(whole.convert("RGB")).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("format", sorted({*FORMATS, "MPO"}))
def test_the_named_formats_are_read(format):
    file = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(file, format)
    assert read_image(file.getvalue()).size == (40, 30)
    assert open_image(Image.open(file)).size == (40, 30)


def test_nothing_else_opens_images():
    """Or it names the formats, too."""
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and re.fullmatch(
                r"(\w+\.)*(\w*Image\.open|imread|decode_(image|jpeg|png|gif|webp|avif)|ImageFile\.\w*Parser)|cv2\.\w+",
                ast.unparse(node.func),
            ):
                assert any(given.arg == "formats" for given in node.keywords), f"{path}:{node.lineno}"


@pytest.fixture
def photos(tmp_path):
    """Of every split and class, one file is PostScript."""
    root = make_photos(tmp_path / "photos", train=3, val=2)
    for folder in root.glob("*/*"):
        (folder / "9.jpg").write_bytes(POSTSCRIPT)
    return root


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    about = {"task": "classify", "model": "sgformer_n", "classes": ["ant", "bee", "cat"], "image_size": 32}
    model = sgformer.create_model("sgformer_n", num_classes=3, img_size=32)
    return str(sgformer.save_model(model, tmp_path / "w.safetensors", about))


@pytest.mark.parametrize("command", ["predict", "features", "eval", "explain", "data check"])
def test_no_command_runs_a_program_for_an_image(command, photos, weights, ghostscript, tmp_path, capsys):
    skip = ["--bad-images", "skip"]
    arguments = {
        "predict": ["predict", weights, str(photos / "val"), *skip],
        "features": ["predict", weights, str(photos / "val"), "--features", str(tmp_path / "e.npz"), *skip],
        "eval": ["eval", weights, "--data", str(photos), "--workers", "0", *skip],
        "explain": ["explain", weights, str(photos / "val/ant"), "--out", str(tmp_path / "out"), *skip],
        "data check": ["data", "check", str(photos)],
    }[command]
    status = main(arguments)
    said = capsys.readouterr()
    if command != "eval":
        assert "not an image" in said.out + said.err, said
    assert status in (0, 1, 2)
    assert not ghostscript.exists()


def test_training_runs_no_program_for_an_image(photos, ghostscript, tmp_path):
    run = sgformer.train(
        "classify", data=str(photos), run=str(tmp_path / "run"), max_steps=1, bad_images="skip", **QUICK
    )
    assert "not an image" in (run.path / "log.txt").read_text()
    out = sharding.make_shards(photos, tmp_path / "shards")
    listing = shards.open_split(out, "val")
    assert [sum(isinstance(got, UserError) for got in _read_all(listing))] == [3]
    assert not ghostscript.exists()


def _read_all(listing):
    for data in listing.read_bytes(range(len(listing))):
        try:
            yield read_image(data, "one")
        except UserError as error:
            yield error


def test_no_data_set_of_others_runs_a_program(ghostscript, tmp_path):
    pytest.importorskip("pycocotools")
    from sgformer.data.ade20k import read_label_map
    from sgformer.data.coco import CocoDataset, read_coco

    file = write_coco(tmp_path / "coco", content([thing(10, 3, [4, 5, 20, 10]), thing(20, 7, [4, 5, 20, 10])]))
    (tmp_path / "coco/train/10.png").write_bytes(POSTSCRIPT)
    listing = read_coco(file, tmp_path / "coco/train")
    assert "not an image" in str(CocoDataset(listing, bad_images="skip")[0].skipped)
    (tmp_path / "map.png").write_bytes(POSTSCRIPT)
    with pytest.raises(UserError, match=r"map\.png: not an image"):
        read_label_map(tmp_path / "map.png")
    sources = {
        "csv": {"train.csv": b"file,label\na.png,cat\n"},
        "yolo": {"data.yaml": b"train: .\nnames: [cat]\n", "a.txt": b"0 .5 .5 .2 .2\n"},
        "labelme": {"b.json": json.dumps({"shapes": [], "imagePath": "a.png", "imageData": "JSFQUw=="}).encode()},
        "colours": {"class_dict.csv": b"name,r,g,b\nx,0,0,0\n", "images/a.png": POSTSCRIPT, "masks/a.png": POSTSCRIPT},
    }
    for kind, files in sources.items():
        for name, data in {"a.png": POSTSCRIPT, **files}.items():
            path = tmp_path / kind / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        assert main(["data", "from", kind, str(tmp_path / kind), str(tmp_path / "out")]) in (1, 2), kind
    assert not ghostscript.exists()


def test_the_page_runs_no_program_for_its_examples(photos, weights, ghostscript):
    pytest.importorskip("nicegui")
    from sgformer.app.networks import read_upload
    from sgformer.app.session import Session

    with pytest.raises(UserError, match="not an image"):
        Session.load([weights], str(photos / "val"))
    with pytest.raises(UserError, match="not an image"):
        read_upload(POSTSCRIPT)
    assert not ghostscript.exists()


# -- the host's Pillow ------------------------------------------------------------------------------------------------

LEAVES = """
import copy, io, pkgutil, sys, types, warnings
import numpy as np, torch, timm
from PIL import Image, ImageFile, ImageOps, GifImagePlugin, JpegImagePlugin, PngImagePlugin, TiffImagePlugin
from timm.data import auto_augment, transforms, transforms_factory
import matplotlib
Image.init()
Image.MAX_IMAGE_PIXELS = 12345678
ImageFile.LOAD_TRUNCATED_IMAGES = True
warnings.filterwarnings("error", module=r"PIL\\.")

def known():
    found = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "PIL" or name.startswith("timm.data"):
            for key, value in vars(module).items():
                if isinstance(value, (bool, int, float, str, tuple, list, dict, set, type(None))) and key[:2] != "__":
                    found[name, key] = copy.copy(value)
                elif isinstance(value, (type, types.FunctionType)):
                    found[name, key] = id(value)
    found["matplotlib"] = dict(matplotlib.rcParams)
    found["torch"] = torch.get_default_dtype(), torch.get_num_threads(), torch.backends.mha.get_fastpath_enabled()
    return found

before = known()
import sgformer
for module in pkgutil.walk_packages(sgformer.__path__, "sgformer."):
    if module.name != "sgformer.__main__":
        try:
            __import__(module.name)
        except ImportError as error:
            assert not error.name.startswith("sgformer"), error

from sgformer.data.image import read_image
from sgformer.data.transforms import train_transform
noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8))
file = io.BytesIO()
noise.save(file, "PNG")
assert read_image(file.getvalue()).size == (40, 40)
for policy in ("rand-m9-mstd0.5-inc1", "original", "augmix-m5"):
    train_transform((32, 32), auto_augment=policy)(noise)
model = sgformer.create_model("sgformer_n", num_classes=3, img_size=32)
path = sgformer.save_model(model, sys.argv[1] + "/w.safetensors", {"classes": ["a", "b", "c"], "image_size": 32})
sgformer.predict(path, [noise, file.getvalue()])
after = known()
changed = {key for key in before if key not in after or not before[key] == after[key]}
assert not changed, changed
for kind, module in ((Image.DecompressionBombWarning, "PIL.Image"), (UserWarning, "PIL.TiffImagePlugin")):
    try:
        warnings.warn_explicit("odd", kind, "file.py", 1, module)
    except kind:
        continue
    raise AssertionError(f"{kind} is filtered")
"""


@pytest.mark.slow
def test_importing_and_calling_change_nothing_of_pillow_timm_and_warnings(tmp_path):
    done = subprocess.run([sys.executable, "-c", LEAVES, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_command_line_reads_large_images_without_pillows_warning_and_leaves_the_filters(tmp_path, recwarn):
    import warnings

    before = list(warnings.filters)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        Image.new("L", (40, 40)).save(tmp_path / "a.png")
        assert main(["data", "check", str(tmp_path)]) == 2
        assert main(["predict", "sgformer_n", str(tmp_path / "a.png")]) == 0
    assert not [one for one in recwarn if issubclass(one.category, Image.DecompressionBombWarning)]
    assert warnings.filters == before


def test_the_hosts_own_limit_holds_in_its_process(monkeypatch):
    file = io.BytesIO()
    Image.fromarray(np.zeros((40, 40), np.uint8)).save(file, "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match="too large"):
        read_image(file.getvalue())
    assert MAX_PIXELS > 100
