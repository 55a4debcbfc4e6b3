import json

import numpy as np
import pytest
import torch
from coco_scene import content, rectangle, thing, write_coco
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sgformer.core.errors import UserError
from sgformer.data import coco
from sgformer.data.coco import CocoDataset, collate, decode_mask, find_coco, ground_truth, read_coco
from sgformer.data.detection_transforms import eval_transform, train_transform
from sgformer.data.imagefolder import EpochSampler

mask_tools = pytest.importorskip("pycocotools.mask")

BOX = [8, 4, 16, 12]


def read(tmp_path, annotations, **more):
    write_coco(tmp_path, content(annotations, **more))
    return read_coco(*find_coco(tmp_path, "train"))


def test_category_ids_with_gaps_become_indices_by_ascending_id(tmp_path):
    listing = read(tmp_path, [thing(10, 7, BOX), thing(20, 3, BOX)])
    assert listing.classes == ("cat", "dog")
    assert [listing.objects_of(i)[0][0] for i in range(2)] == [1, 0]
    assert listing.own_ids == (3, 7)


def test_polygons_and_both_kinds_of_rle_mean_the_same_pixels(tmp_path):
    mask = np.zeros((48, 64), np.uint8)
    mask[4:16, 8:24] = 1
    packed = mask_tools.encode(np.asfortranarray(mask))
    flat = np.concatenate([[0], mask.T.ravel(), [2]])
    runs = np.diff(np.flatnonzero(np.diff(flat))).tolist()
    forms = [
        rectangle(*BOX),
        {"size": [48, 64], "counts": packed["counts"].decode()},
        {"size": [48, 64], "counts": [int(np.flatnonzero(mask.T.ravel())[0]), *runs]},
    ]
    listing = read(tmp_path, [thing(10, 3, BOX, segmentation=form) for form in forms])
    target = CocoDataset(listing).target(0)
    assert listing.has_masks
    for got in target["masks"]:
        assert np.array_equal(got.numpy(), mask)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.randoms(use_true_random=False))
def test_compressed_rle_is_understood_exactly(height, width, random):
    mask = np.array([[random.random() < 0.5 for _ in range(width)] for _ in range(height)], np.uint8)
    text = mask_tools.encode(np.asfortranarray(mask))["counts"].decode()
    runs = coco._runs(text)
    flat = np.concatenate([np.full(n, i % 2, np.uint8) for i, n in enumerate(runs)])
    assert np.array_equal(flat.reshape(width, height).T, mask)
    image = coco.CocoImage(1, "a.png", width, height)
    checked = coco._segmentation({"size": [height, width], "counts": text}, image, "here")
    if mask.any():
        assert np.array_equal(decode_mask(checked, height, width), mask)
    else:
        assert checked == []


def test_what_cannot_be_used_is_left_out_and_counted(tmp_path):
    listing = read(
        tmp_path,
        [
            thing(10, 3, BOX),
            thing(10, 3, [5, 5, 0, 7]),
            thing(10, 3, [5, 5, 7, -1]),
            thing(10, 3, [100, 5, 7, 7]),
            thing(10, 3, [-6, 40, 16, 16]),
            thing(10, 7, BOX, iscrowd=1, segmentation={"size": [48, 64], "counts": [0, 48 * 64]}),
            thing(10, 7, BOX, segmentation=[[1, 1, 2, 2]]),
            thing(99, 3, BOX),
        ],
    )
    assert listing.notes == {
        coco.NO_AREA: 2,
        coco.OUTSIDE: 1,
        coco.CLIPPED: 1,
        coco.CROWD: 1,
        coco.NO_MASK: 1,
        coco.ORPHANS: 1,
        f"{coco.UNUSED} (dog)": 1,
    }
    assert [box for _, box, _ in listing.objects_of(0)] == [[8, 4, 24, 16], [0, 40, 10, 48]]
    assert listing.objects_of(1) == []
    for what in listing.notes:
        assert what in listing.describe()


def test_images_without_objects_stay_or_go(tmp_path):
    file = write_coco(tmp_path, content([thing(20, 3, BOX)], images=3))
    assert len(read_coco(file, tmp_path / "train")) == 3
    listing = read_coco(file, tmp_path / "train", drop_empty=True)
    assert [image.id for image in listing.images] == [20]
    assert listing.notes[coco.EMPTY] == 2


def test_data_without_masks_is_boxes_only(tmp_path):
    some = [thing(10, 3, BOX), thing(20, 3, BOX, segmentation=[])]
    file = write_coco(tmp_path, content(some))
    listing = read_coco(file, tmp_path / "train")
    assert not listing.has_masks and listing.notes[coco.MASKLESS] == 1
    assert "masks" not in CocoDataset(listing).target(0)
    assert not read_coco(write_coco(tmp_path, content(some[:1])), tmp_path / "train", masks=False).has_masks
    bare = write_coco(tmp_path, content([thing(20, 3, BOX, segmentation=[])]))
    with pytest.raises(UserError, match=r"annotation 1: has no mask, nor has any other.*--masks false"):
        read_coco(bare, tmp_path / "train", masks=True)


def test_a_rectangle_among_polygons_keeps_the_masks_and_its_box_is_its_mask(tmp_path):
    some = [thing(10, 3, BOX), thing(20, 7, BOX), thing(20, 3, [50, 40, 30, 5], segmentation=[])]
    listing = read(tmp_path, some)
    assert listing.has_masks and listing.notes[coco.BOXES_AS_MASKS] == 1
    mask = CocoDataset(listing).target(1)["masks"][1].numpy()
    expected = np.zeros((48, 64), np.uint8)
    expected[40:45, 50:] = 1  # clipped to the image
    assert np.array_equal(mask, expected)
    assert np.array_equal(decode_mask(ground_truth(listing)["annotations"][2]["segmentation"], 48, 64), expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": None}, "no list 'images'"),
        ({"categories": []}, "no categories"),
        ({"categories": [{"id": 3, "name": "cat"}, {"id": 3, "name": "dog"}]}, "same id: 3"),
        ({"categories": [{"id": 3, "name": "cat"}, {"id": 4, "name": "cat"}]}, "same name: cat"),
        ({"categories": [{"id": 3}]}, "category 0 needs id and name"),
        ({"images": [{"id": 1, "file_name": "a.png", "width": 4, "height": [0]}]}, r"must be integers, got 4 x \[0\]"),
        ({"images": [{"id": 1, "file_name": "a.png", "width": 4, "height": 0}]}, "image 0 has no width and height"),
        (
            {"images": [{"id": 1, "file_name": name, "width": 4, "height": 4} for name in ("a.png", "b.png")]},
            "two images have the id 1",
        ),
        ({"images": [{"id": 1}]}, "image 0 needs id and file_name"),
        ({"annotations": [5]}, "annotation number 0: needs image_id"),
        ({"annotations": [{"id": 5, **thing(10, 99, BOX)}]}, "annotation 5: category_id 99 is not among"),
        ({"annotations": [{"id": 5, **thing(10, 3, BOX), "bbox": [1, 2, 3]}]}, "annotation 5: bbox must be"),
        (
            {"annotations": [{"id": 5, **thing(10, 3, BOX), "bbox": [1, 2, 3, float("nan")]}]},
            "annotation 5: bbox must be",
        ),
        (
            {"annotations": [{"id": 5, **thing(10, 3, BOX), "segmentation": [[0, 0, 5]]}]},
            "annotation 5: a polygon must be",
        ),
        ({"annotations": [{"id": 5, **thing(10, 3, BOX), "segmentation": [[1e9] * 6]}]}, "far outside"),
        ({"annotations": [{"id": 5, **thing(10, 3, BOX), "segmentation": [[float("nan")] * 6]}]}, "far outside"),
        (
            {"annotations": [{"id": 5, **thing(10, 3, BOX), "segmentation": {"size": [9, 9], "counts": [81]}}]},
            r"size \[9, 9\], its image \[48, 64\]",
        ),
        (
            {"annotations": [{"id": 5, **thing(10, 3, BOX), "segmentation": {"size": [48, 64], "counts": [1, 2]}}]},
            "do not add up to the image's 3072 pixels",
        ),
        (
            {"annotations": [{"id": 5, **thing(10, 3, BOX), "segmentation": {"size": [48, 64], "counts": "~garbage"}}]},
            "do not add up",
        ),
    ],
)
def test_what_cannot_be_right_is_named(tmp_path, change, words):
    file = write_coco(tmp_path, content([thing(10, 3, BOX)]))
    file.write_text(json.dumps({**content([thing(10, 3, BOX)]), **change}))
    with pytest.raises(UserError, match=words) as error:
        read_coco(file, tmp_path / "train")
    assert str(file) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [("{\n 'a': 1}", "line 2"), ("[1, 2]", "expected an object"), ("\xff", "malformed"), ("", "line 1")],
)
def test_malformed_json_is_named_with_its_place(tmp_path, text, words):
    file = tmp_path / "bad.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=words) as error:
        read_coco(file, tmp_path)
    assert "bad.json" in str(error.value)


@pytest.mark.parametrize(
    "name", ["../secret.png", "/etc/passwd", "a/../../b.png", "..\\b.png", "C:\\b.png", "", "a\0b", "half\ud800"]
)
def test_paths_out_of_the_image_folder_are_refused(tmp_path, name):
    data = content([])
    data["images"][0]["file_name"] = name
    file = tmp_path / "x.json"
    file.write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"leaves the image folder|needs id|holds characters"):
        read_coco(file, tmp_path, check_files=False)


@pytest.mark.parametrize("junk", [{}, [1], None, "a" * 3000])
@pytest.mark.parametrize("field", ["category_id", "image_id", "file_name", "width", "bbox", "segmentation"])
def test_junk_is_a_short_line(tmp_path, field, junk):
    data = content([thing(10, 3, [4, 5, 20, 10])], images=1)
    entry = data["images"][0] if field in data["images"][0] else data["annotations"][0]
    entry[field] = junk
    file = write_coco(tmp_path, content([thing(10, 3, [4, 5, 20, 10])], images=1))
    file.write_text(json.dumps(data))
    try:
        read_coco(file, tmp_path / "train", check_files=False)
    except UserError as error:
        assert str(file) in str(error) and "\n" not in str(error) and len(str(error)) < 400
    else:
        # none at all, of an image that is not listed, or read from the image or the mask instead
        assert field in ("segmentation", "image_id") or (field in ("width", "bbox") and junk is None)


def test_missing_images_are_named(tmp_path):
    write_coco(tmp_path, content([thing(10, 3, BOX)]))
    (tmp_path / "train" / "20.png").unlink()
    with pytest.raises(UserError, match=r"1 of 2 images are not in .*train: 20.png"):
        read_coco(*find_coco(tmp_path, "train"))


def test_a_missing_first_image_does_not_hide_the_folder(tmp_path):
    """The folder that holds most of the images is theirs, and only what is missing is missing."""
    write_coco(tmp_path, content([thing(10, 7, BOX), thing(20, 3, BOX)]))
    file, folders = find_coco(tmp_path, "train")
    images = json.loads(file.read_text())["images"]
    (folders[0] / images[0]["file_name"]).unlink()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with pytest.raises(
        UserError, match=rf"1 of {len(images)} images are not in {folders[0]}: {images[0]['file_name']};"
    ):
        read_coco(file, [elsewhere, *folders])
    listing = read_coco(file, [elsewhere, *folders], check_files=False)
    dataset = CocoDataset(listing, bad_images="skip")
    assert [dataset[i].skipped is None for i in range(len(images))] == [False] + [True] * (len(images) - 1)


@pytest.mark.parametrize(
    ("file", "images"),
    [
        ("annotations/instances_train2017.json", "train2017"),
        ("annotations/instances_train.json", "train"),
        ("annotations/instances_train.json", "images/train"),
        ("annotations/instances_train.json", "images"),
        ("train/_annotations.coco.json", "train"),
    ],
)
def test_the_usual_layouts_are_found(tmp_path, file, images):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / images).mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(json.dumps(content([thing(10, 3, BOX)], images=1)))
    Image.new("RGB", (64, 48)).save(tmp_path / images / "10.png")
    for data in (tmp_path, tmp_path / file):
        listing = read_coco(*find_coco(data, "train"))
        assert listing.path(0) == tmp_path / images / "10.png"


def test_a_folder_of_nothing_says_what_was_expected(tmp_path):
    with pytest.raises(UserError, match=r"annotations/instances_val2017.json"):
        find_coco(tmp_path, "val")
    with pytest.raises(UserError, match="no such file or folder"):
        find_coco(tmp_path / "nowhere", "val")


def test_validation_classes_are_matched_by_name(tmp_path):
    train = read(tmp_path, [thing(10, 3, BOX)])
    data = content([thing(10, 1, BOX)], categories=[{"id": 1, "name": "dog"}])
    listing = read_coco(write_coco(tmp_path, data, "val"), tmp_path / "val", categories=train.categories)
    assert listing.classes == ("cat", "dog")
    assert listing.own_ids == (None, 1)
    assert listing.objects_of(0)[0][0] == 1
    data["categories"][0]["name"] = "cow"
    with pytest.raises(UserError, match="1 classes are unknown to the training data: cow"):
        read_coco(write_coco(tmp_path, data, "val"), tmp_path / "val", categories=train.categories)


def test_samples_depend_on_seed_epoch_and_index_alone(tmp_path):
    listing = read(tmp_path, [thing(10, 3, BOX), thing(10, 7, [30, 20, 20, 20])], images=4)
    dataset = CocoDataset(listing, train_transform(64, multi_scale=True), seed=5)

    def batches(workers):
        sampler = EpochSampler(len(dataset), 2, train=True, seed=5)
        loader = torch.utils.data.DataLoader(
            dataset, batch_sampler=sampler, num_workers=workers, collate_fn=collate, persistent_workers=workers > 0
        )
        for epoch in range(2):
            sampler.set_epoch(epoch)
            yield from loader

    for a, b in zip(batches(0), batches(2), strict=True):
        assert torch.equal(a.index, b.index)
        for x, y, s, t in zip(a.image, b.image, a.target, b.target, strict=True):
            assert torch.equal(x, y)
            assert all(torch.equal(s[k], t[k]) for k in ("boxes", "labels", "masks"))


@pytest.mark.parametrize("multi_scale", [False, True])
def test_boxes_and_masks_stay_together(tmp_path, multi_scale):
    listing = read(tmp_path, [thing(10, 3, BOX), thing(10, 7, [30, 20, 20, 20])], images=1)
    dataset = CocoDataset(listing, train_transform(96, multi_scale))
    sizes = set()
    for epoch in range(20):
        sample = dataset[epoch, 0]
        target = sample.target
        sizes.add(tuple(sample.image.shape))
        assert sample.image.dtype == torch.float32
        assert sample.image.min() >= 0 and sample.image.max() <= 1
        assert target["masks"].shape == (len(target["boxes"]), *sample.image.shape[1:])
        for box, mask in zip(target["boxes"], target["masks"], strict=True):
            if mask.any():
                rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
                inside = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
                assert (inside.float() - box).abs().max() <= 2
    assert len(sizes) > 3 if multi_scale else sizes == {(3, 96, 128)}


def test_bad_images_stop_or_are_left_out(tmp_path):
    listing = read(tmp_path, [thing(10, 3, BOX)])
    Image.new("RGB", (48, 64)).save(tmp_path / "train" / "20.png")
    with pytest.raises(UserError, match=r"20.png: 48 x 64 pixels .* but 64 x 48 in .*--bad-images skip"):
        CocoDataset(listing)[1]
    dataset = CocoDataset(listing, eval_transform(32), bad_images="skip")
    batch = collate([dataset[0], dataset[1]])
    assert batch.index.tolist() == [0] and len(batch.image) == 1
    assert len(batch.skipped) == 1 and "20.png" in batch.skipped[0]


@pytest.mark.parametrize("key", ["images", "categories"])
def test_ids_of_two_kinds_cannot_be_evaluated(tmp_path, key):
    data = content([thing(10, 3, [4, 4, 8, 8])])
    data[key][1 if key == "images" else 0]["id"] = "other"
    listing = read_coco(write_coco(tmp_path, data), tmp_path / "train")
    with pytest.raises(UserError, match=rf"ids of {key} are numbers and text \((10|3), other\)"):
        ground_truth(listing)


def test_ground_truth_is_the_file_with_what_pycocotools_needs(tmp_path):
    bare = {"image_id": 10, "category_id": 3, "bbox": [1, 1, 4, 4], "segmentation": rectangle(1, 1, 4, 4)}
    data = content([])
    data["annotations"] = [bare, {"id": 0, **thing(10, 3, BOX, iscrowd=1)}]
    listing = read_coco(write_coco(tmp_path, data), tmp_path / "train")
    truth = ground_truth(listing)
    assert [a["id"] for a in truth["annotations"]] == [1, 2]
    assert [a["iscrowd"] for a in truth["annotations"]] == [0, 1]
    assert truth["annotations"][0]["area"] == 16
    assert truth["annotations"][1]["bbox"] == BOX


def test_very_many_masks_of_a_large_image_are_reduced_with_it(tmp_path, monkeypatch):
    """At most `MASKS` bytes: image, boxes and masks stay together, and what is said of the original's size stays."""
    boxes = [[x, y, 16, 12] for x, y in ((0, 0), (40, 8), (20, 30))]
    listing = read(tmp_path, [thing(10, 3, box, segmentation=rectangle(*box)) for box in (*boxes, BOX)])
    whole = CocoDataset(listing)[0]
    monkeypatch.setattr(coco, "MASKS", 4 * 48 * 64 // 4)
    sample = CocoDataset(listing)[0]
    assert sample.image.size == (32, 24) and sample.target["masks"].shape == (4, 24, 32)
    assert sample.target["size"] == whole.target["size"] == (48, 64)
    np.testing.assert_array_equal(sample.target["boxes"].numpy(), whole.target["boxes"].numpy() / 2)
    expected = np.zeros((24, 32), np.uint8)
    expected[2:8, 4:12] = 1
    np.testing.assert_array_equal(sample.target["masks"][3].numpy(), expected)
    assert sample.target["masks"].numel() <= coco.MASKS
    image, target = train_transform(32, False)(sample.image, sample.target)
    assert tuple(target["masks"].shape[-2:]) == tuple(image.shape[-2:]) == (32, 42)
    monkeypatch.undo()
    assert coco.bounded_size(300, 3000, 4000) == (819, 1092)  # enough for the recipes' 800 pixels


@pytest.mark.parametrize(
    "names", [["10.png", "/elsewhere/10.png"], ["/elsewhere/10.png", "10.png"], ["10.png", "./10.png"]]
)
def test_two_names_of_one_file_are_an_error_in_any_order(tmp_path, names):
    data = content([thing(10, 3, BOX), thing(20, 7, BOX)])
    file = write_coco(tmp_path, data)
    for about, name in zip(data["images"], names, strict=True):
        about["file_name"] = name
    file.write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"both stand for .*train/10\.png"):
        read_coco(*find_coco(tmp_path, "train"))
