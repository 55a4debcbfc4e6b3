"""`data check` of every layout: what is wrong is named, what training says is said, nothing else."""

import json

import numpy as np
import pytest
from coco_scene import content, thing, write_coco
from PIL import Image

from sgformer.cli import main
from sgformer.core.errors import UserError
from sgformer.data.checks import check_data
from sgformer.data.sharding import make_shards

BOX = [8, 4, 16, 12]


def image(path, seed=0, size=(40, 36)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def coco(tmp_path):
    pytest.importorskip("pycocotools")
    write_coco(tmp_path, content([thing(10, 3, BOX), thing(20, 7, [40, 30, 30, 30])]))
    data = content([thing(10, 3, [2, 2, 40, 40])], images=1)
    write_coco(tmp_path, data, "val")
    return tmp_path


def test_objects(coco, capsys):
    report = check_data(coco)
    assert report.problems == []
    assert report.splits["train"].per_class == {"cat": 1, "dog": 1} and report.splits["train"].counted == "objects"
    assert report.notes == ["train: 1 boxes partly outside the image, clipped"]
    assert report.training == (
        "2 classes; instances_train.json: 2 images, 2 objects with masks; 1 boxes partly outside the image, clipped; "
        "instances_val.json: 1 images, 1 objects with masks"
    )
    assert main(["data", "check", str(coco)]) == 0
    assert "train: 2 images, 2 objects in 2 classes" in capsys.readouterr().out
    assert main(["data", "check", str(coco), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["training"] == report.training


def test_what_is_wrong_with_objects(coco):
    Image.new("RGB", (48, 64)).save(coco / "train/10.png")
    (coco / "val/10.png").write_bytes((coco / "train/20.png").read_bytes())
    report = check_data(coco)
    assert any("10.png: 48 x 64 pixels as displayed, but 64 x 48 in instances_train.json" in p for p in report.problems)
    assert report.duplicates == [("train/20.png", "val/10.png")]
    (coco / "train/10.png").unlink()
    report = check_data(coco)
    assert any("1 of 2 images are not in" in problem for problem in report.problems)
    assert set(report.splits["train"].unreadable) == {"train/10.png"}
    assert report.training.startswith("stops: ") and "1 of 2 images are not in" in report.training
    write_coco(coco, content([thing(10, 3, BOX), thing(20, 7, [40, 30, 30, 30])]))
    (coco / "annotations/instances_val.json").write_text("{")
    report = check_data(coco)
    assert report.training.startswith("stops: ") and "malformed JSON" in report.training


def test_a_single_file_says_how_to_divide_it(coco):
    report = check_data(coco / "annotations/instances_train.json")
    assert list(report.splits) == ["train"] and "--val-split .2" in report.training and not report.problems


@pytest.fixture
def labels(tmp_path):
    for i, split in enumerate(("training", "training", "validation")):
        image(tmp_path / f"images/{split}/{i}.jpg", i)
        values = np.zeros((36, 40), np.uint8)
        values[:9], values[9:18] = 1, 255
        (tmp_path / f"annotations/{split}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(tmp_path / f"annotations/{split}/{i}.png")
    (tmp_path / "classes.txt").write_text("ground\nroad\ncar\n")
    return tmp_path


def test_label_maps(labels):
    report = check_data(labels)
    assert report.problems == []
    assert report.splits["train"].per_class == {"ground": 2 * 18 * 40, "road": 2 * 9 * 40, "car": 0}
    assert report.notes == [
        "train: classes without a pixel (1): car",
        "train: 25.0% of the pixels have no class (255)",
        "val: classes without a pixel (1): car",
        "val: 25.0% of the pixels have no class (255)",
    ]
    assert report.training == "2 training and 1 validation images, 3 classes"


def masks_of_255(labels):
    for path in (labels / "annotations").rglob("*.png"):
        values = np.zeros((36, 40), np.uint8)
        values[:9] = 255
        Image.fromarray(values).save(path)


def test_masks_of_0_and_255_are_read_as_training_reads_them(labels):
    masks_of_255(labels)
    (labels / "classes.txt").write_text("ground\nroad\n")
    report = check_data(labels)
    assert report.problems == [] and report.splits["train"].per_class == {"ground": 2 * 27 * 40, "road": 2 * 9 * 40}
    assert report.notes == [
        f"{split}: label maps hold 0 and 255 only: 255 is read as class road" for split in ("train", "val")
    ]
    assert report.training == "2 training and 1 validation images, 2 classes"


def test_masks_of_0_and_255_that_training_refuses(labels):
    masks_of_255(labels)
    report = check_data(labels)  # three classes
    assert report.training.startswith("stops: ") and "2 label maps hold 0 and 255 only" in report.training
    assert report.training.removeprefix("stops: ") in report.problems


def test_what_is_wrong_with_label_maps(labels):
    Image.fromarray(np.full((36, 40), 7, np.uint8)).save(labels / "annotations/training/0.png")
    Image.fromarray(np.zeros((40, 36), np.uint8)).save(labels / "annotations/validation/2.png")
    problems = check_data(labels).problems
    assert len(problems) == 2
    assert (
        "0.png: label 7 at row 0, column 0" in problems[0] and "2.png: 36 x 40 pixels, its image 40 x 36" in problems[1]
    )
    (labels / "images/validation/2.jpg").unlink()
    report = check_data(labels)
    assert report.training.startswith("stops: no image for ") and report.problems


def test_folders_of_classes_with_and_without_a_split(tmp_path):
    for i in range(4):
        image(tmp_path / f"a/{('ant', 'bee')[i % 2]}/{i}.png", i)
        image(tmp_path / f"b/{('train', 'val')[i // 2]}/{('ant', 'bee')[i % 2]}/{i}.png", i)
    report = check_data(tmp_path / "a")
    assert report.splits["all"].per_class == {"ant": 2, "bee": 2} and "--val-split .2" in report.training
    make_shards(tmp_path / "a", tmp_path / "shards")
    (tmp_path / "a").rename(tmp_path / "train")
    (tmp_path / "c").mkdir()
    (tmp_path / "train").rename(tmp_path / "c/train")
    for unsplit in ("c", "shards"):
        again = check_data(tmp_path / unsplit)
        assert list(again.splits) == ["train"] and again.problems == []
        assert again.training == report.training
    assert check_data(tmp_path / "b").training == "2 training and 2 validation images, 2 classes"
    (tmp_path / "b/val/cow").mkdir()
    assert "classes unknown to training (1): cow" in check_data(tmp_path / "b").training


def test_files_of_other_tools(tmp_path):
    for i, split in enumerate(("train", "val")):
        image(tmp_path / f"images/{split}/{i}.png", i)
        (tmp_path / f"labels/{split}").mkdir(parents=True)
        (tmp_path / f"labels/{split}/{i}.txt").write_text("0 .5 .5 .5 .5\n1 .5 .5 .1 .1\n0 .1 .1 .1 .1\n")
    (tmp_path / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [cat, dog]\n")
    report = check_data(tmp_path)
    assert report.splits["val"].per_class == {"cat": 2, "dog": 1}
    needed = f"training does not read YOLO labels; this converts it: sgformer data from {tmp_path} OUT --layout coco"
    assert report.problems == [needed] and report.training == f"stops: {needed}"
    assert main(["data", "check", str(tmp_path)]) == 1
    (tmp_path / "images/val/1.png").write_text("no image")
    assert check_data(tmp_path).problems == ["1 images that cannot be read", needed]
    (tmp_path / "labels/train/0.txt").write_text("9 .5 .5 .5 .5")
    with pytest.raises(UserError, match=r"0\.txt, line 1: class 9"):
        check_data(tmp_path)


def test_nothing_at_all(tmp_path):
    with pytest.raises(UserError, match="known formats"):
        check_data(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        check_data(tmp_path / "nowhere")


def test_images_of_another_folder_are_named(tmp_path, capsys):
    """As `sgformer predict --json` writes them, from photographs elsewhere."""
    pytest.importorskip("pycocotools")
    write_coco(tmp_path / "whole", content([thing(10, 3, BOX)]))
    (old,) = (tmp_path / "whole/annotations").glob("*train*.json")
    told = json.loads(old.read_text())
    photos = next(path for path in (tmp_path / "whole").rglob("*") if path.suffix in (".png", ".jpg")).parent
    for entry in told["images"]:
        entry["file_name"] = f"/another/machine/{entry['file_name']}"
    (tmp_path / "apart").mkdir()
    (tmp_path / "apart/seen.json").write_text(json.dumps(told))
    command = ["data", "check", str(tmp_path / "apart/seen.json")]
    assert main(command) == 2 and "name the folder of the images with --images" in capsys.readouterr().err
    assert main([*command, "--images", str(photos)]) == 0
    assert "no problem found" in capsys.readouterr().out
    assert main(["data", "check", str(photos), "--images", str(photos)]) == 2
    assert "--images is for annotation files" in capsys.readouterr().err
