"""A run resumes on the data that it began with, wherever they are, and on no others."""

import json
import shutil

import pytest
from coco_scene import content, thing, write_coco
from photos import QUICK, make_photos

from sgformer import evaluate, train
from sgformer.core.errors import UserError
from sgformer.data.sharding import make_shards
from sgformer.models.load import read_metadata

pytestmark = pytest.mark.slow  # whole runs, again and again

pytest.importorskip("lightning")

SHORT = {**QUICK, "max_steps": 1, "ema": 0}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A folder of photographs and a run on it that stopped after one update."""
    root = tmp_path_factory.mktemp("begun")
    photos = make_photos(root / "photos")
    train("classify", data=str(photos), run=str(root / "run"), **SHORT)
    return root


@pytest.fixture
def copy(begun, tmp_path):
    """The same for a test of its own; the run's settings name the folder by its first place."""
    shutil.copytree(begun, tmp_path / "copy")
    return tmp_path / "copy"


def resume(root, data="photos", task="classify"):
    return train(task, resume=root / "run", data=str(root / data), max_steps=2)


def test_data_that_moved_are_the_same(copy, monkeypatch):
    assert resume(copy).path == copy / "run"
    monkeypatch.chdir(copy)
    train("classify", resume="run", data="photos/", max_steps=3)
    make_shards(copy / "photos", copy / "shards")
    train("classify", resume=copy / "run", data=str(copy / "shards"), max_steps=4)
    assert read_metadata(copy / "run" / "last.safetensors")["step"] == 4


def rename(root):
    for split in ("train", "val"):
        (root / split / "bee").rename(root / split / "wasp")


def swap(root):
    for split in ("train", "val"):
        (root / split / "ant").rename(root / split / "x")
        (root / split / "cat").rename(root / split / "ant")
        (root / split / "x").rename(root / split / "cat")
        (root / split / "cat" / "0.png").rename(root / split / "cat" / "z.png")


def add_class(root):
    shutil.copytree(root / "train/ant", root / "train/aardvark")


def remove_class(root):
    for split in ("train", "val"):
        shutil.rmtree(root / split / "bee")


def add_images(root):
    for name in ("7", "8"):
        shutil.copy(root / "train/ant/1.png", root / f"train/ant/{name}.png")


def remove_image(root):
    (root / "val/cat/2.png").unlink()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (rename, r"train and val: class bee is gone, class wasp is new\."),
        (swap, r"train and val: 1 image added \(cat/z.png\), 1 image removed \(cat/0.png\)"),
        (add_class, r"train and val: class aardvark is new"),
        (remove_class, r"train and val: class bee is gone"),
        (add_images, r"train: 2 images added \(ant/7.png, ant/8.png\)"),
        (remove_image, r"val: 1 image removed \(cat/2.png\)"),
    ],
)
def test_other_classes_or_images_are_refused_and_named(copy, change, said):
    change(copy / "photos")
    before = {p: p.read_bytes() for p in (copy / "run").rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=rf"not the data that .*run began with; {said}.*--weights \S+run --data"):
        resume(copy)
    assert {p: p.read_bytes() for p in (copy / "run").rglob("*") if p.is_file()} == before


def test_a_new_run_from_the_old_one_takes_other_classes(copy):
    rename(copy / "photos")
    run = train("classify", data=str(copy / "photos"), run=str(copy / "new"), **{**SHORT, "weights": str(copy / "run")})
    assert read_metadata(run.path)["classes"] == ["ant", "cat", "wasp"]


def test_shards_with_other_classes_are_refused(copy):
    make_shards(copy / "photos", copy / "shards")
    index = json.loads((copy / "shards/shards.json").read_text())
    index["classes"][1] = "wasp"
    (copy / "shards/shards.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="class bee is gone, class wasp is new"):
        resume(copy, "shards")
    with pytest.raises(UserError, match=r"classes unknown to training .*wasp"):
        evaluate(copy / "run", copy / "shards", workers=0)


def test_a_run_without_a_record_still_compares_its_classes(copy):
    (copy / "run/data.json.gz").unlink()
    add_class(copy / "photos")
    with pytest.raises(UserError, match="class aardvark is new"):
        resume(copy)
    shutil.rmtree(copy / "photos/train/aardvark")
    resume(copy)
    assert (copy / "run/data.json.gz").exists()


def test_data_that_are_gone_and_a_damaged_record(copy):
    with pytest.raises(UserError, match=r"no such folder.*pass --data if the data of this run moved"):
        resume(copy, "nowhere")
    (copy / "run/data.json.gz").write_bytes(b"\x1f\x8b nothing")
    with pytest.raises(UserError, match=r"data.json.gz: damaged"):
        resume(copy)


def test_evaluation_names_renamed_and_absent_classes(copy, caplog):
    shutil.rmtree(copy / "photos/val/bee")
    with caplog.at_level("INFO", "sgformer"):
        assert evaluate(copy / "run", copy / "photos", workers=0).images == 6
    assert "note: val: 1 of 3 classes has no image: bee" in caplog.messages
    (copy / "photos/val/cat").rename(copy / "photos/val/kitten")
    with pytest.raises(UserError, match=r"classes unknown to training \(1\): kitten"):
        evaluate(copy / "run", copy / "photos", workers=0)


# -- the other layouts ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    root = tmp_path_factory.mktemp("coco")
    data = content([thing(10, 3, [5, 5, 24, 20]), thing(20, 7, [8, 8, 30, 20])])
    for split in ("train", "val"):
        write_coco(root / "photos", data, split)
    options = {"model": "sgformer_n", "image_size": 64, "head_width": 16, "rois": 16, "batch_size": 2, "workers": 0}
    train("detect", data=str(root / "photos"), run=str(root / "run"), max_steps=1, epochs=2, **options)
    return root


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["categories"][1].update(name="lynx"), "class cat is gone, class lynx is new"),
        (lambda c: c["annotations"][0].update(bbox=[5, 5, 23, 20]), r"annotations of 1 image changed \(10.png\)"),
        (lambda c: (c["images"].pop(), c["annotations"].pop()), r"1 image removed \(20.png\)"),
        (lambda c: c["images"].reverse(), "the images are in another order"),
    ],
)
def test_other_annotations_are_refused(coco, tmp_path, change, said):
    root = tmp_path / "copy"
    shutil.copytree(coco, root)
    file = root / "photos/annotations/instances_train.json"
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))
    twin = root / "photos/annotations/instances_val.json"
    twin.write_text(file.read_text())
    with pytest.raises(UserError, match=f"not the data .*train and val: {said}"):
        resume(root, task="detect")


def test_annotations_that_moved_are_the_same(coco, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(coco, root)
    parts = {"data": "instances_train.json", "val_data": "instances_val.json"}
    places = {name: str(root / "photos/annotations" / file) for name, file in parts.items()}
    train("detect", resume=root / "run", max_steps=2, **places)
