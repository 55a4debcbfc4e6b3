"""--val-split: seeded, stratified, with equal files on one side, and the same for training, resume and evaluation."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
from coco_scene import content, thing, write_coco
from PIL import Image

import sgformer
from sgformer.core.errors import UserError
from sgformer.data import splitting
from sgformer.data.formats import open_both
from sgformer.data.imagefolder import left_out
from sgformer.data.sharding import make_shards
from sgformer.data.splitting import (
    ValSplit,
    divide,
    named_split,
    names_of,
    open_classes,
    open_label_maps,
    open_objects,
)


def image(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def root(tmp_path):
    for c, (name, count) in enumerate((("ant", 20), ("bee", 10), ("cow", 5))):
        for i in range(count):
            image(tmp_path / f"d/{name}/{i}.png", 100 * c + i)
    return tmp_path / "d"


def test_each_class_gives_its_share_and_none_is_lost(root):
    train, val = open_classes(root, ValSplit(0.2))
    assert val.counts() == [4, 2, 1] and train.counts() == [16, 8, 4]
    assert train.classes == val.classes == ("ant", "bee", "cow")
    files = {str(listing.path(i)) for listing in (train, val) for i in range(len(listing))}
    assert files == {str(path) for path in root.rglob("*.png")}
    assert (train.split, val.split) == ("train", "val")


def test_the_split_depends_on_seed_and_names_alone(root, tmp_path):
    first = names_of(open_classes(root, ValSplit(0.2))[1])
    shutil.copytree(root, tmp_path / "elsewhere/train")
    for moved in (tmp_path / "elsewhere", f"{root}/"):
        assert names_of(open_classes(moved, ValSplit(0.2))[1]) == first
    assert names_of(open_classes(root, ValSplit(0.2, seed=1))[1]) != first


def test_equal_files_are_on_one_side(root):
    for name in ("ant", "bee"):  # also across classes
        for i in range(6):
            shutil.copy(root / f"ant/{i}.png", root / f"{name}/copy{i}.png")
    for seed in range(5):
        sides = [
            {listing.path(i).read_bytes() for i in range(len(listing))}
            for listing in open_classes(root, ValSplit(0.3, seed))
        ]
        assert not sides[0] & sides[1]


def test_shards_are_divided_as_their_folder(root, tmp_path):
    shutil.copy(root / "ant/0.png", root / "bee/again.png")
    sides = open_classes(root, ValSplit(0.2))
    make_shards(root, tmp_path / "shards")
    for of_folder, of_shards in zip(sides, open_classes(tmp_path / "shards", ValSplit(0.2)), strict=True):
        assert (of_shards.paths, of_shards.targets) == (of_folder.paths, of_folder.targets)
        indices = range(len(of_folder))
        assert of_shards.read_bytes(indices) == of_folder.read_bytes(indices)
    with pytest.raises(UserError, match=r"no split 'val' \(splits: train\); .*--val-split \.2"):
        open_both(tmp_path / "shards")
    (tmp_path / "both").mkdir()
    for split in ("train", "val"):
        shutil.copytree(root, tmp_path / "both" / split)
    make_shards(tmp_path / "both", tmp_path / "split")
    with pytest.raises(UserError, match=r"these are in .*split/val: leave the option out"):
        open_classes(tmp_path / "split", ValSplit(0.2))


def test_folders_that_seem_to_hold_validation_images_are_not_passed_over(root, tmp_path):
    for split in ("train", "Validation"):
        shutil.copytree(root, tmp_path / "v" / split)
    with pytest.raises(UserError, match=r"v/Validation: are these validation images\? Rename it to 'val'"):
        open_classes(tmp_path / "v", ValSplit(0.2))
    with pytest.raises(UserError, match="Rename it to 'val'"):
        make_shards(tmp_path / "v", tmp_path / "out")
    (root / "ant").rename(root / "dev")  # without train, a class
    assert open_classes(root, ValSplit(0.2))[0].classes == ("bee", "cow", "dev")


def test_evaluation_says_how_to_take_all_images(root, tmp_path, monkeypatch):
    pytest.importorskip("lightning")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no validation images; --split all evaluates on all of its images"):
        named_split(root, "val", "imagenet")
    assert named_split(root, "all", "imagenet") == "." and named_split(root, "val", "coco") == "val"
    make_shards(root, tmp_path / "shards")
    with pytest.raises(UserError, match="--split train evaluates on all"):
        named_split(tmp_path / "shards", "val", "imagenet")
    image(tmp_path / "m/images/0.png", 0)
    with pytest.raises(UserError, match="--split all evaluates"):
        named_split(tmp_path / "m", "validation", "ade20k")
    model = sgformer.create_model("sgformer_n", num_classes=3, img_size=32)
    about = {"task": "classify", "classes": ["ant", "bee", "cow"], "image_size": 32}
    weights = sgformer.save_model(model, tmp_path / "w.safetensors", about)
    result = sgformer.evaluate(weights, root, split="all", workers=0, device="cpu")
    assert result.counted().startswith("35 images")
    with pytest.raises(UserError, match="--val-split is for --knn"):
        sgformer.evaluate(weights, root, val_split=0.2)
    with pytest.raises(UserError, match="there are no validation images: --val-split"):
        sgformer.evaluate(weights, root, knn=True)
    found = sgformer.evaluate(weights, root, knn=True, val_split=0.2, workers=0, device="cpu")
    assert (found.images, found.train_images) == (7, 28)


def test_splits_go_by_the_names_of_any_layout(tmp_path):
    for folder in ("images/training", "images/validation", "annotations/training", "annotations/validation"):
        (tmp_path / "ade" / folder).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "ade" / folder / "a.png")
    for folder in ("train/a", "val/a"):
        (tmp_path / "photos" / folder).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "photos" / folder / "a.png")
    for name, one, other in (("ade", "training", "validation"), ("photos", "train", "val")):
        layout = "ade20k" if name == "ade" else "imagenet"
        assert [named_split(tmp_path / name, s, layout) for s in ("train", "training")] == [one] * 2
        assert [named_split(tmp_path / name, s, layout) for s in ("val", "validation")] == [other] * 2
        assert named_split(tmp_path / name, "test", layout) == "test"
    (tmp_path / "photos" / "validation").mkdir()  # a folder of this name is meant
    assert named_split(tmp_path / "photos", "validation", "imagenet") == "validation"


def test_several_classes_in_an_image_are_spread_alike():
    rng = np.random.default_rng(0)
    classes = [set(np.flatnonzero(rng.random(5) < (0.5, 0.3, 0.2, 0.1, 0.05)).tolist()) for _ in range(400)]
    names = [f"{i}.png" for i in range(400)]
    chosen = divide(names, names, classes, 0.2, 0)
    assert abs(sum(chosen) - 80) <= 4
    total, kept = Counter(), Counter()
    for content_of, val in zip(classes, chosen, strict=True):
        total.update(content_of)
        kept.update(content_of if val else ())
    for c, n in total.items():
        assert abs(kept[c] - 0.2 * n) <= 2, (c, n, kept[c])


def test_what_has_a_split_or_is_too_small_is_not_divided(root, tmp_path):
    image(tmp_path / "two/train/ant/0.png", 0)
    with pytest.raises(UserError, match=r"--val-split 0\.2: 1 images are too few"):
        open_classes(tmp_path / "two", ValSplit(0.2))
    image(tmp_path / "two/val/ant/0.png", 0)
    with pytest.raises(UserError, match=r"these are in .*two/val: leave the option out"):
        open_classes(tmp_path / "two", ValSplit(0.2))
    with pytest.raises(UserError, match=r"--val-split divides .*CLASS"):
        open_classes(tmp_path, ValSplit(0.2))


def test_objects(tmp_path):
    pytest.importorskip("pycocotools")
    data = content([thing(10 * i, (3, 7)[i % 2], [1, 1, 9, 9]) for i in range(1, 9)], images=10)
    file = write_coco(tmp_path, data)
    train, val = open_objects(tmp_path, ValSplit(0.2), drop_empty=True)
    assert len(val) == 2 and len(train) == 8 - sum(bool(val.objects_of(i)) for i in range(2))
    again = open_objects(file, ValSplit(0.2))
    assert names_of(again[1]) == names_of(val) and len(again[0]) == 8
    assert val.categories == train.categories and val.path(0).is_file()
    from sgformer.data.coco import ground_truth

    assert {i["file_name"] for i in ground_truth(val)["images"]} == set(names_of(val))
    write_coco(tmp_path, data, "val")
    with pytest.raises(UserError, match=r"these are in .*instances_val.json"):
        open_objects(tmp_path, ValSplit(0.2))


@pytest.mark.parametrize(
    ("json_file", "folder", "as_file"),
    [
        ("annotations/instances_train2017.json", "train2017", False),
        ("annotations/instances_train2017.json", "train2017", True),
        ("annotations/instances_train.json", "images/train", False),
        ("annotations/instances_default.json", "images/default", False),
        ("all.json", "all", True),
    ],
)
def test_objects_are_found_where_training_finds_them(tmp_path, json_file, folder, as_file):
    pytest.importorskip("pycocotools")
    written = write_coco(tmp_path / "w", content([thing(10 * i, 3, [1, 1, 9, 9]) for i in range(1, 6)], images=5))
    file, images = tmp_path / "d" / json_file, tmp_path / "d" / folder
    for path in (file, images):
        path.parent.mkdir(parents=True, exist_ok=True)
    written.rename(file)
    (tmp_path / "w/train").rename(images)
    for listing in open_objects(file if as_file else tmp_path / "d", ValSplit(0.2)):
        assert listing.folder.samefile(images) and all(listing.path(i).is_file() for i in range(len(listing)))


@pytest.mark.parametrize("inner", ["training", "."])
def test_label_maps(tmp_path, inner):
    for i in range(10):
        image(tmp_path / "images" / inner / f"{i}.jpg", i)
        (tmp_path / "annotations" / inner).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((12, 16), i % 2, np.uint8)).save(tmp_path / "annotations" / inner / f"{i}.png")
    train, val = open_label_maps(tmp_path, ValSplit(0.2))
    assert len(train) == 8 and sorted(int(val.class_indices(i)[0, 0]) for i in range(2)) == [0, 1]
    assert val.classes == train.classes == ("0", "1") and val.split == "validation"
    names = tuple(names_of(val))
    assert names_of(open_label_maps(tmp_path, ValSplit(0.2, names=names))[1]) == list(names)


def test_evaluation_takes_the_written_names(root, tmp_path):
    _, val = open_classes(root, ValSplit(0.2))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/split.json").write_text(json.dumps(splitting.to_json(0.2, 0, val)))
    weights, about = tmp_path / "run/best.safetensors", {"val_split": 0.2}
    image(root / "ant/new.png", 999)  # after the run
    kept = splitting.kept_by(weights, about, root, "val", "imagenet")
    assert names_of(open_classes(root, kept)[1]) == names_of(val)
    assert splitting.kept_by(weights, {}, root, "val", "imagenet") is None
    (root / val.paths[0]).unlink()
    with pytest.raises(UserError, match=r"split\.json: 1 of its 7 validation images are not in this data: ant/"):
        open_classes(root, kept)
    image(tmp_path / "other/ant/x.png", 1)
    image(tmp_path / "other/bee/x.png", 2)
    image(tmp_path / "other/cow/x.png", 3)
    assert len(open_classes(tmp_path / "other", kept)[1]) == 3  # all of it is new to the weights
    (tmp_path / "run/split.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        splitting.kept_by(weights, about, root, "val", "imagenet")
    (tmp_path / "run/split.json").unlink()
    with pytest.raises(UserError, match="copy it here from their run"):
        splitting.kept_by(weights, about, root, "val", "imagenet")
    (root / "val").mkdir()
    assert splitting.kept_by(weights, about, root, "val", "imagenet") is None


@pytest.mark.parametrize("task", ["classify", "detect", "segment"])
def test_a_run_writes_its_split_and_evaluation_and_resume_keep_to_it(tmp_path, monkeypatch, task):
    pytest.importorskip("lightning")
    pytest.importorskip("pycocotools")
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "d"
    more: dict = {"epochs": 1}
    if task == "classify":
        for i in range(10):
            image(data / ("ant", "bee")[i % 2] / f"{i}.png", i)
        more |= {"warmup_epochs": 0}
    elif task == "detect":
        write_coco(data, content([thing(10 * i, (3, 7)[i % 2], [1, 1, 19, 19]) for i in range(1, 11)], images=10))
        more |= {"head_width": 8, "rois": 8}
    else:
        for i in range(10):
            image(data / f"images/{i}.jpg", i)
            (data / "annotations").mkdir(exist_ok=True)
            Image.fromarray((np.arange(192).reshape(12, 16) > 90 + i).astype(np.uint8)).save(
                data / f"annotations/{i}.png"
            )
        more = {"steps": 2, "val_every": 2, "head": "semantic-fpn", "head_width": 8}
    shared = {"model": "sgformer_n", "image_size": 32, "batch_size": 4, "workers": 0, "device": "cpu", "native": "off"}
    run = sgformer.train(task, data=str(data), run="r", val_split=0.2, **shared, **more)
    written = json.loads((run.path / "split.json").read_text())
    assert len(written["val"]) == 2 and written["val_split"] == 0.2
    result = sgformer.evaluate(run.path, data, workers=0, device="cpu")
    assert result.counted().startswith("2 images")
    if task == "classify":  # features are scored on the images that the weights do not know, too
        found = sgformer.evaluate(run.path, data, knn=True, workers=0, device="cpu")
        assert (found.images, found.train_images) == (2, 8)
        with pytest.raises(UserError, match=r"split\.json says which of these images the weights know"):
            sgformer.evaluate(run.path, data, knn=True, val_split=0.5)
    written["val"] = written["val"][:1]  # as if the data had been others
    (run.path / "split.json").write_text(json.dumps(written))
    with pytest.raises(UserError, match=r"split\.json: the data changed: 1 images would be on the other side"):
        sgformer.train(task, resume=run.path, **{key: 2 * value for key, value in more.items() if key in ("epochs",)})


def test_what_is_left_out_is_said_once(root, tmp_path):
    (root / "ant/notes.txt").touch()
    (root / "bee/.old").mkdir()
    train, val = open_classes(root, ValSplit(0.2))
    assert len(left_out(train)) == 1 and "1 .txt" in left_out(train)[0] and left_out(val) == []
    for i in range(5):
        image(tmp_path / f"m/images/{i}.png", i)
        (tmp_path / "m/annotations").mkdir(exist_ok=True)
        Image.fromarray(np.zeros((12, 16), np.uint8)).save(tmp_path / f"m/annotations/{i}.png")
    (tmp_path / "m/annotations/7.bmp").touch()
    train, val = open_label_maps(tmp_path / "m", ValSplit(0.2))
    assert left_out(train) == ["training: left out: 1 .bmp"] and left_out(val) == []
