"""The report names everything that is wrong with a data set, and nothing that is not."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from sgformer.cli.data import data_check
from sgformer.core.errors import UserError
from sgformer.data.check import check_imagefolder


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for name in ("ant", "bee"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return tmp_path


def test_a_clean_folder_has_no_problem(root, capsys):
    report = check_imagefolder(root)
    assert report.problems == report.notes == []
    assert report.splits["train"].per_class == {"ant": 4, "bee": 4}
    assert report.splits["val"].widths == (50, 50, 50) and report.splits["val"].heights == (40, 40, 40)
    assert report.splits["train"].modes == {"RGB": 8}
    assert "no problem found" in report.to_text()
    assert data_check(str(root)) == 0
    assert "train: 8 images in 2 classes" in capsys.readouterr().out


def spoil(root):
    (root / "train/ant/cut.png").write_bytes((root / "train/ant/0.png").read_bytes()[:-2000])
    (root / "val/bee/none.jpg").touch()
    (root / "val/ant/copy.png").write_bytes((root / "train/ant/1.png").read_bytes())
    (root / "train/bee/twin.png").write_bytes((root / "train/ant/2.png").read_bytes())
    (root / "val/zebra").mkdir()
    (root / "train/cow").mkdir()
    (root / "train/ant/list.txt").write_text("0 1")
    Image.new("CMYK", (20, 90)).save(root / "val/bee/inks.tif")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (70, 60)).save(root / "val/bee/turned.jpg", exif=exif)


@pytest.mark.parametrize("workers", [0, 2])
def test_everything_wrong_is_named(root, workers, capsys):
    spoil(root)
    report = check_imagefolder(root, workers=workers)
    assert set(report.splits["train"].unreadable) == {"train/ant/cut.png"}
    assert "empty" in report.splits["val"].unreadable["val/bee/none.jpg"]
    assert report.duplicates == [("train/ant/1.png", "val/ant/copy.png")]
    assert report.conflicts == [("train/ant/2.png", "train/bee/twin.png")]
    assert report.splits["train"].ignored == {".txt": 1}
    val = report.splits["val"]
    assert val.modes == {"RGB": 5, "CMYK": 1, "L": 1}
    assert val.rotated == 1 and val.small == 1
    assert val.widths == (20, 50, 60) and val.heights == (40, 40, 90)
    text = report.to_text()
    for needle in ("cut.png", "none.jpg", "copy.png", "twin.png", "zebra", "cow"):
        assert any(needle in problem for problem in report.problems), needle
        assert needle in text
    assert all("\n" not in line for line in report.problems + report.notes)
    assert len(report.problems) == 6
    assert "train: left out: 1 .txt" in report.notes
    assert data_check(str(root), json=True, workers=workers) == 1
    assert json.loads(capsys.readouterr().out) == json.loads(report.to_json())


def test_headers_alone_do_not_find_a_truncated_file(root):
    (root / "train/ant/cut.png").write_bytes((root / "train/ant/0.png").read_bytes()[:-2000])
    assert check_imagefolder(root, decode=False).problems == []
    assert len(check_imagefolder(root).problems) == 1


def test_a_missing_split_is_a_problem_and_no_split_an_error(root, tmp_path):
    (root / "val").rename(root / "validation")
    report = check_imagefolder(root)
    assert set(report.splits) == {"train"}
    assert len(report.problems) == 1 and "/validation? Rename it to 'val'" in report.problems[0]
    assert report.training == f"stops: {report.problems[0]}" and "--val-split" not in report.training
    (root / "validation").rename(root / "test")
    (root / "train").rename(root / "training")
    with pytest.raises(UserError, match=r"no folder 'train' \(folders: test, training\)"):
        check_imagefolder(root)


def test_long_lists_are_cut_on_the_terminal_only(root):
    for i in range(30):
        (root / "train" / "ant" / f"bad{i:02d}.png").touch()
    report = check_imagefolder(root)
    assert len(report.problems) == 30
    assert "and 10 more" in report.to_text() and "bad25" not in report.to_text()
    assert "bad25" in report.to_json()


def test_one_class_is_nothing_to_tell_apart(root):
    for split in ("train", "val"):
        shutil.rmtree(root / split / "bee")
    assert check_imagefolder(root).problems == ["train: one class only (ant): nothing to tell apart"]
