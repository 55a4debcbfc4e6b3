"""The embedded data set: the same to the byte from the seed, honest splits, three valid layouts."""

import gzip
import hashlib
import itertools
import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from sgformer.cli.data import data_scenes
from sgformer.core.errors import UserError
from sgformer.data.check import check_imagefolder
from sgformer.data.imagefolder import scan_splits
from sgformer.data.scenes import (
    DIGIT_FORMS,
    FASHION_CLASSES,
    compose,
    load_sources,
    make_scenes,
    read_idx,
    segmentation,
)

pytest.importorskip("skimage")
datasets = pytest.importorskip("sklearn.datasets")


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def sources():
    return {split: load_sources(split) for split in ("train", "val")}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One small data set of every layout."""
    root = tmp_path_factory.mktemp("scenes")
    return {layout: make_scenes(root / layout, 20, 10, 48, 5, layout) for layout in ("imagenet", "coco", "ade20k")}


# --- what it is made of ----------------------------------------------------------------------------------------------


def test_train_and_val_share_no_photograph(sources):
    train, val = (sources[split].photographs for split in ("train", "val"))
    assert len(train) >= 5 and len(val) >= 3
    pixels = [{hashlib.sha256(image.tobytes()).hexdigest() for image in part.values()} for part in (train, val)]
    assert not set(train) & set(val) and not pixels[0] & pixels[1]


def test_train_and_val_digits_are_whole_forms(sources):
    digits = datasets.load_digits()
    train, val = (sources[split].sprites for split in ("train", "val"))
    assert len(train.images) + len(val.images) == len(digits.images) == DIGIT_FORMS[-1]
    assert len(train.images) in DIGIT_FORMS
    np.testing.assert_array_equal(np.concatenate([train.labels, val.labels]), digits.target)
    assert min(np.bincount(val.labels, minlength=10)) >= 30
    seen = {image.tobytes() for image in train.images}
    assert not any(image.tobytes() in seen for image in val.images)


def test_every_form_repeats_one_sequence_of_labels():
    target = datasets.load_digits().target
    forms = ["".join(map(str, target[a:b])) for a, b in itertools.pairwise(DIGIT_FORMS)]
    whole = max(forms, key=forms.count)
    assert len(whole) == 130 and forms.count(whole) >= 6

    def is_part_of(form):  # the same order, with some left out
        rest = iter(whole)
        return sum(digit in rest for digit in form)

    assert all(len(form) - is_part_of(form) <= 4 for form in forms)


# --- determinism -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["imagenet", "coco", "ade20k"])
def test_same_seed_same_bytes_with_any_number_of_workers(made, tmp_path, layout):
    again = make_scenes(tmp_path / "again", 20, 10, 48, 5, layout, workers=2)
    assert contents(again) == contents(made[layout])


def test_another_seed_or_split_gives_other_scenes(made, tmp_path):
    other = contents(make_scenes(tmp_path / "other", 20, 10, 48, 6))
    this = contents(made["imagenet"])
    images = [name for name in this if name.endswith(".jpg")]
    assert len(images) == 30 and len({this[name] for name in images}) == 30
    assert set(this) == set(other) and not {this[name] for name in images} & set(other.values())


def test_more_scenes_begin_with_the_same_ones(made, tmp_path):
    more = contents(make_scenes(tmp_path / "more", 30, 10, 48, 5))
    fewer = {name: digest for name, digest in contents(made["imagenet"]).items() if name != "scenes.json"}
    assert fewer.items() <= more.items()


# --- scenes ----------------------------------------------------------------------------------------------------------


def test_sizes_run_from_an_eighth_to_most_of_the_frame(sources):
    heights = []
    for i in range(150):
        _, (thing,) = compose(np.random.default_rng(i), sources["train"], 64, i % 10)
        heights.append(np.ptp(np.flatnonzero(thing.mask.any(1))) + 1)
    assert min(heights) <= 12 and max(heights) >= 48
    assert min(heights) >= 6


def test_every_object_can_be_told_from_its_ground(sources):
    """The object's own brightness differs from that of the pixels around it."""
    weak = 0
    for i in range(150):
        image, (thing,) = compose(np.random.default_rng(i), sources["val"], 64, i % 10)
        light = np.asarray(image.convert("L"), dtype=float) / 255
        near = np.asarray(Image.fromarray(thing.mask).convert("L").filter(ImageFilter.MaxFilter(5))) > 0
        inside, around = light[thing.mask], light[near & ~thing.mask]
        weak += abs(inside.mean() - around.mean()) < 0.12
    assert weak <= 3


def test_objects_of_a_scene_are_disjoint_visible_and_counted(sources):
    counts = set()
    for i in range(60):
        image, things = compose(np.random.default_rng(i), sources["train"], 64)
        assert image.size == (64, 64) and image.mode == "RGB"
        assert sum(thing.mask.astype(int) for thing in things).max() == 1
        assert all(thing.mask.sum() >= 6 for thing in things)
        assert not things[-1].occluded
        counts.add(len(things))
    assert counts >= {1, 2, 3, 4, 5}


def test_keypoints_are_on_the_ink_towards_their_corners(sources):
    for i in range(60):
        _, (thing,) = compose(np.random.default_rng(i), sources["train"], 96, i % 10)
        pixel = max(2, np.ptp(np.flatnonzero(thing.mask.any(1))) // 8)  # of the sprite; of several, ends are the mean
        near = np.asarray(Image.fromarray(thing.mask).convert("L").filter(ImageFilter.MaxFilter(2 * pixel + 1))) > 0
        assert thing.ends.shape == (4, 2) and all(near[int(y), int(x)] for x, y in thing.ends)
        left_top, right_top, right_bottom, left_bottom = thing.ends
        assert min(left_bottom[1], right_bottom[1]) > max(left_top[1], right_top[1])  # turned by 18 degrees at most
        assert (left_top - right_bottom).sum() < 0 and (left_bottom - right_top) @ (1, -1) < 0


def test_keypoints_of_the_coco_layout(made):
    data = json.loads((made["coco"] / "annotations/instances_train2017.json").read_text())
    assert data["categories"][3]["keypoints"] == ["left_top", "right_top", "right_bottom", "left_bottom"]
    assert data["categories"][3]["skeleton"] == [[1, 2], [2, 3], [3, 4], [4, 1]]
    points = np.array([annotation["keypoints"] for annotation in data["annotations"]]).reshape(-1, 4, 3)
    assert set(points[..., 2].ravel()) == {1, 2} and (points[..., 2] == 1).mean() < 0.2  # some are hidden
    corners = np.array([annotation["bbox"] for annotation in data["annotations"]])[:, None]
    inside = (points[..., :2] >= corners[..., :2] - 1.5) & (
        points[..., :2] <= corners[..., :2] + corners[..., 2:] + 0.5
    )
    assert inside.all(-1)[points[..., 2] == 2].mean() > 0.98  # the boxes are those of the visible parts


# --- layouts ---------------------------------------------------------------------------------------------------------


def test_imagenet_layout_is_balanced_and_passes_the_check(made):
    train, val = scan_splits(made["imagenet"])
    assert train.classes == tuple("0123456789")
    assert set(train.counts()) == {2} and set(val.counts()) == {1}
    report = check_imagefolder(made["imagenet"])
    assert report.problems == report.notes == []
    assert report.splits["train"].widths == (48, 48, 48)


def decoded(rle):
    runs = rle["counts"]
    values = np.repeat(np.arange(len(runs)) % 2, runs).astype(bool)
    return values.reshape(rle["size"][::-1]).T


def filled(polygons, height, width):
    """Pixels whose centre lies in one of the polygons (even-odd rule)."""
    y, x = np.mgrid[:height, :width] + 0.5
    mask = np.zeros((height, width), bool)
    for polygon in polygons:
        points = np.reshape(polygon, (-1, 2))
        inside = np.zeros_like(mask)
        for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, 0), strict=True):
            assert x0 == x1 or y0 == y1
            inside ^= (x0 == x1) & (x < x0) & (np.minimum(y0, y1) < y) & (y < np.maximum(y0, y1))
        mask |= inside
    return mask


def mask_of(annotation, size):
    form = annotation["segmentation"]
    return decoded(form) if isinstance(form, dict) else filled(form, size, size)


@pytest.mark.parametrize("split", ["train", "val"])
def test_coco_layout(made, split):
    data = json.loads((made["coco"] / f"annotations/instances_{split}2017.json").read_text())
    assert [category["name"] for category in data["categories"]] == list("0123456789")
    images = {image["id"]: image for image in data["images"]}
    assert len(images) == {"train": 20, "val": 10}[split]
    for image in images.values():
        with Image.open(made["coco"] / f"{split}2017" / image["file_name"]) as file:
            assert file.size == (image["width"], image["height"]) == (48, 48)
    assert len({a["id"] for a in data["annotations"]}) == len(data["annotations"])
    assert {a["image_id"] for a in data["annotations"]} == set(images)
    for annotation in data["annotations"]:
        mask = mask_of(annotation, 48)
        left, top, width, height = annotation["bbox"]
        assert annotation["area"] == mask.sum() > 0
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert (left, top) == (columns[0], rows[0])
        assert (left + width, top + height) == (columns[-1] + 1, rows[-1] + 1)
        assert annotation["category_id"] in range(1, 11) and annotation["iscrowd"] == 0
    assert {type(a["segmentation"]) for a in data["annotations"]} == {list, dict}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_pycocotools_reads_the_same_masks(made):
    coco = pytest.importorskip("pycocotools.coco")
    reader = coco.COCO(made["coco"] / "annotations/instances_train2017.json")
    for annotation in reader.anns.values():
        np.testing.assert_array_equal(reader.annToMask(annotation).astype(bool), mask_of(annotation, 48))


def test_ade20k_labels_are_the_coco_masks(made):
    """Both layouts hold the same scenes."""
    names = (made["ade20k"] / "classes.txt").read_text().splitlines()
    assert names == ["Idx\tName", *(f"{i + 1}\t{i}" for i in range(10))]
    for split, folder in (("train", "training"), ("val", "validation")):
        data = json.loads((made["coco"] / f"annotations/instances_{split}2017.json").read_text())
        for image in data["images"]:
            name = f"{folder}/{image['id']:08d}"
            photo = made["ade20k"] / "images" / f"{name}.jpg"
            assert photo.read_bytes() == (made["coco"] / f"{split}2017" / image["file_name"]).read_bytes()
            expected = np.zeros((48, 48), np.uint8)
            for annotation in data["annotations"]:
                if annotation["image_id"] == image["id"]:
                    expected[mask_of(annotation, 48)] = annotation["category_id"]
            with Image.open(made["ade20k"] / "annotations" / f"{name}.png") as labels:
                assert labels.mode == "L"
                np.testing.assert_array_equal(np.asarray(labels), expected)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.data())
def test_any_mask_survives_its_coco_form(height, width, data):
    bits = data.draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    mask = np.reshape(bits, (height, width))
    for covered in (False, True):
        form = segmentation(mask, covered)
        assert isinstance(form, dict) or not covered
        got = decoded(form) if isinstance(form, dict) else filled(form, height, width)
        np.testing.assert_array_equal(got, mask)


def test_a_hole_is_rle_and_a_block_one_polygon():
    ring = np.ones((3, 3), bool)
    assert segmentation(ring) == [[0, 0, 3, 0, 3, 3, 0, 3]]
    ring[1, 1] = False
    assert segmentation(ring) == {"size": [3, 3], "counts": [0, 4, 1, 4]}


# --- other sprites, errors -------------------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def clothes(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "idx"
    folder.mkdir()
    for stem, zipped in (("train", True), ("t10k", False)):
        images = np.zeros((20, 28, 28), np.uint8)
        images[:, 4:24, 6:22] = rng.integers(60, 256, (20, 20, 16))
        for kind, array in (("images-idx3", images), ("labels-idx1", np.arange(20, dtype=np.uint8) % 10)):
            data = idx(array)
            path = folder / (f"{stem}-{kind}-ubyte" + (".gz" if zipped else ""))
            path.write_bytes(gzip.compress(data) if zipped else data)
    return folder


def test_idx_sprites(clothes, tmp_path):
    out = make_scenes(tmp_path / "out", 10, 10, 48, sprites=f"fashion-mnist:{clothes}")
    assert scan_splits(out)[0].classes == tuple(sorted(FASHION_CLASSES))
    assert json.loads((out / "scenes.json").read_text())["splits"]["train"]["sprites"] == 20


def test_read_idx(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    (tmp_path / "plain").write_bytes(idx(array))
    (tmp_path / "zipped.gz").write_bytes(gzip.compress(idx(array)))
    for name in ("plain", "zipped.gz"):
        np.testing.assert_array_equal(read_idx(tmp_path / name), array)
    wide = bytes([0, 0, 11, 1]) + struct.pack(">I2h", 2, -1, 300)
    (tmp_path / "wide").write_bytes(wide)
    np.testing.assert_array_equal(read_idx(tmp_path / "wide"), [-1, 300])


@pytest.mark.parametrize(
    "data",
    [b"", b"\0\0", b"text, not IDX", idx(np.zeros(9, np.uint8))[:-1], gzip.compress(idx(np.zeros(99, np.uint8)))[:-9]],
    ids=["empty", "short", "text", "cut", "cut gzip"],
)
def test_broken_idx_files_are_named(tmp_path, data):
    (tmp_path / "broken").write_bytes(data)
    with pytest.raises(UserError, match="broken: "):
        read_idx(tmp_path / "broken")


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="not an empty folder"):
        make_scenes(tmp_path, 10, 10)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_nothing_half_written_stays(tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("sgformer.data.scenes.compose", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_scenes(tmp_path / "out", 10, 10)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "voc"}, "imagenet, coco, ade20k.*'voc'"),
        ({"image_size": 8}, "image size.*8"),
        ({"train": 3}, "train.*10.*3"),
        ({"val": 0, "layout": "coco"}, "val.*1.*0"),
        ({"seed": -1}, "seed.*-1"),
        ({"workers": -1}, "workers.*-1"),
        ({"sprites": "mnist"}, "fashion-mnist:DIR.*'mnist'"),
        ({"sprites": "fashion-mnist:/nowhere"}, "/nowhere: holds neither train-images"),
    ],
)
def test_bad_values_are_named_and_nothing_is_written(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        make_scenes(tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_command(tmp_path, capsys):
    (tmp_path / "out").mkdir()  # an empty folder is welcome
    assert data_scenes(str(tmp_path / "out"), train=10, val=10, image_size=32) == 0
    assert "10 training" in capsys.readouterr().out
    generator = json.loads((tmp_path / "out" / "scenes.json").read_text())["generator"]
    assert generator == {"layout": "imagenet", "train": 10, "val": 10, "image_size": 32, "seed": 0, "sprites": None}
