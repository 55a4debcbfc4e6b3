import json

import numpy as np
import pytest
import torch
from coco_scene import POINTS, content, pointed, pointed_content, thing, write_coco
from torchvision import tv_tensors
from torchvision.transforms import v2

pytest.importorskip("pycocotools")

from sgformer.core.errors import UserError
from sgformer.data import keypoints
from sgformer.data.checks import check_data
from sgformer.data.coco import CocoDataset, find_coco, ground_truth, read_coco, single_coco
from sgformer.data.detection_transforms import SidedFlip, join_keypoints, train_transform
from sgformer.data.keypoints import PERSON, Skeleton, mirror_order, require_same

BOX = [4, 4, 24, 24]
CORNERS = [[4, 4, 2], [27, 4, 2], [27, 27, 2], [4, 27, 1]]
ORDER = [0, 2, 1, 3]  # of POINTS, in a mirror


def read(root, data, **options):
    return read_coco(write_coco(root, data), root / "train", **{"keypoints": True, "masks": False, **options})


def test_keypoints_are_read_beside_the_boxes(tmp_path):
    data = pointed_content([pointed(10, 3, BOX), pointed(20, 7, [10, 8, 30, 30])])
    listing = read(tmp_path, data)
    assert listing.skeleton == Skeleton(tuple(POINTS["keypoints"]), ((1, 2), (1, 3), (1, 4)))
    assert Skeleton.of(listing.skeleton.to_metadata()) == listing.skeleton
    assert listing.keypoints_of(0).tolist() == [CORNERS] and listing.objects_of(0) == [(0, [4, 4, 28, 28], None)]
    assert "2 objects of 4 keypoints" in listing.describe() and not listing.notes
    plain = read(tmp_path, data, keypoints=False)
    assert plain.skeleton is None
    assert (
        plain.objects
        == read(tmp_path, content([thing(10, 3, BOX), thing(20, 7, [10, 8, 30, 30])]), keypoints=False).objects
    )


@pytest.mark.parametrize(
    ("category", "words"),
    [
        ({"keypoints": "nose"}, "category dog: keypoints must be a list of names, got nose"),
        ({"keypoints": ["nose", 3]}, "must be a list of names"),
        ({"keypoints": ["nose", "tail", "nose"]}, "category dog: keypoints of the same name: nose"),
        ({"skeleton": [[0, 1]]}, r"skeleton must be pairs of keypoints, counted from 1 to 4, got \[0, 1\]"),
        ({"skeleton": [[1, 5]]}, "counted from 1 to 4"),
        ({"skeleton": [[1, 2, 3]]}, "must be pairs"),
        ({"skeleton": "nose-tail"}, "must be pairs"),
        (
            {"keypoints": ["a"], "skeleton": []},
            "category cat has other keypoints than dog: 4 for 1; one network finds one",
        ),
        ({"keypoints": ["nose", "left_eye", "tail", "right_eye"]}, "number 3 is right_eye, not tail"),
    ],
)
def test_a_category_that_is_wrong_is_named(tmp_path, category, words):
    data = pointed_content([pointed(10, 3, BOX)])
    data["categories"][0] |= category
    for mode in (True, None):
        with pytest.raises(UserError, match=words):
            read(tmp_path, data, keypoints=mode)
    assert read(tmp_path, data, keypoints=False)  # a detector need not care


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            [1, 2, 2],
            "annotation 1: 3 numbers for keypoints, but its class has 4 of them, so x, y and visibility are 12",
        ),
        ([1, 2, 2] * 3 + [1, 2, 3], "annotation 1: keypoint tail has visibility 3; it must be 0"),
        ([1, 2, 0.5] + [1, 2, 0] * 3, "keypoint nose has visibility 0.5"),
        ([1, 2, 2] * 3 + [1, None, 2], "keypoints must be numbers"),
        ([1, 2, 2] * 3 + [1, float("nan"), 2], "keypoints must be numbers"),
        ({"nose": [1, 2]}, "keypoints must be numbers"),
    ],
)
def test_an_annotation_that_is_wrong_is_named(tmp_path, values, words):
    for crowd in (0, 1):  # of a crowd region too: pycocotools takes what is there
        with pytest.raises(UserError, match=words):
            read(tmp_path, pointed_content([pointed(10, 3, BOX, keypoints=values, iscrowd=crowd)]))


def test_what_is_not_used_is_counted(tmp_path):
    outside = [[-3, 4, 2], [64.2, 4, 1], [30, 48, 2], [-0.5, -0.5, 2]]  # of 64 x 48 pixels
    things = [
        pointed(10, 3, BOX, keypoints=[v for point in outside for v in point], num_keypoints=4),
        pointed(10, 3, BOX, keypoints=[7, 7, 0] * 4, num_keypoints=0),
        thing(20, 7, [10, 8, 30, 30]),
        pointed(20, 7, BOX, num_keypoints=1),
        pointed(20, 7, [5, 4, 24, 24], keypoints=[str(v) for point in CORNERS for v in point]),
    ]
    listing = read(tmp_path, pointed_content(things))
    assert listing.notes == {
        keypoints.OUTSIDE: 2,
        keypoints.POINTLESS: 2,
        keypoints.MISCOUNTED: 1,
        "numbers written as text, read as numbers": 1,
    }
    first, second = listing.keypoints_of(0).tolist()
    assert first == [[0, 0, 0], [0, 0, 0], [30, 48, 2], [-0.5, -0.5, 2]] and not np.any(second)
    assert listing.keypoints_of(1)[2].tolist() == CORNERS


def test_classes_without_keypoints_are_left_out(tmp_path):
    data = pointed_content([pointed(10, 3, BOX), thing(10, 7, BOX), thing(20, 7, [1, 1, 9, 9])])
    data["categories"][0].pop("keypoints")  # the dog's
    listing = read(tmp_path, data)
    assert listing.classes == ("cat",) and listing.own_ids == (3,) and len(listing) == 2
    assert listing.notes == {keypoints.WITHOUT: 2}
    truth = ground_truth(listing)
    assert [c["id"] for c in truth["categories"]] == [3] and [a["category_id"] for a in truth["annotations"]] == [3]
    both = read(tmp_path, data, keypoints=None)
    assert both.classes == ("cat", "dog") and not both.notes and not both.keypoints_of(1).any()
    with pytest.raises(UserError, match=r"none of its categories has keypoints.*sgformer train detect"):
        read(tmp_path, content([thing(10, 3, BOX)]))
    assert read(tmp_path, content([thing(10, 3, BOX)]), keypoints=None).skeleton is None


def test_truth_has_what_pycocotools_needs(tmp_path):
    data = pointed_content([pointed(10, 3, BOX), thing(20, 7, BOX, iscrowd=1), pointed(20, 3, BOX, num_keypoints=2)])
    first, crowd, other = ground_truth(read(tmp_path, data))["annotations"]
    assert first["keypoints"] == [v for point in CORNERS for v in point] and first["num_keypoints"] == 4
    assert crowd["keypoints"] == [0] * 12 and crowd["num_keypoints"] == 0
    assert other["num_keypoints"] == 2  # as the file has it


def test_the_file_of_keypoints_is_preferred(tmp_path):
    for name in ("instances_train2017", "person_keypoints_train2017"):
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "annotations" / f"{name}.json").write_text("{}")
    (tmp_path / "train2017").mkdir()
    assert find_coco(tmp_path, "train")[0].stem == "instances_train2017"
    file, folders = find_coco(tmp_path, "train", keypoints=True)
    assert file.stem == "person_keypoints_train2017" and folders[0] == tmp_path / "train2017"
    assert find_coco(file, "train")[1][0] == tmp_path / "train2017"
    assert single_coco(tmp_path, True) == file != single_coco(tmp_path)
    (tmp_path / "annotations" / "instances_train2017.json").unlink()
    assert find_coco(tmp_path, "train")[0] == file


def test_data_check_reads_them(tmp_path):
    for split in ("train", "val"):
        write_coco(
            tmp_path, pointed_content([pointed(10, 3, BOX), pointed(20, 7, BOX, keypoints=[99, 9, 2] * 4)]), split
        )
    report = check_data(tmp_path)
    assert f"val: 4 {keypoints.OUTSIDE}" in report.notes and "4 keypoints" in report.training
    write_coco(tmp_path, pointed_content([pointed(10, 3, BOX, keypoints=[1])]), "val")
    assert any("1 numbers for keypoints" in problem for problem in check_data(tmp_path).problems)


def test_other_keypoints_than_training_s_are_refused(tmp_path):
    known = Skeleton(("a", "b"))
    require_same(Skeleton(("a", "b"), ((1, 2),)), known, tmp_path)
    with pytest.raises(UserError, match="not those of training: number 2 is c, not b"):
        require_same(Skeleton(("a", "c")), known, tmp_path)
    with pytest.raises(UserError, match="not those of w: 1 for 2"):
        require_same(Skeleton(("a",)), known, tmp_path, "w")
    with pytest.raises(UserError, match="it has none"):
        require_same(None, known, tmp_path)


# -- in a mirror ------------------------------------------------------------------------------------------------------


def test_sides_are_read_off_names():
    order, alone, sided = mirror_order(PERSON)
    assert order == [0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15] and not alone and sided
    assert mirror_order(["eye-Left", "tail", "eye-Right"]) == ([2, 1, 0], [], True)
    assert mirror_order(["leftover", "bright", "top"]) == ([0, 1, 2], [], False)
    assert mirror_order(["left_a", "right_a", "left_b"]) == ([1, 0, 2], ["left_b"], True)
    assert mirror_order(["a", "b", "left_c"], ["b:a"]) == ([1, 0, 2], [], True)


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        (["a"], "a pair is two keypoints, A:B, got a"),
        (["a:a"], "a pair is two keypoints"),
        (["a:x"], "no keypoint x; there are a, b, c"),
        (["a:b", "c:a"], "a is in two pairs"),
    ],
)
def test_pairs_that_make_no_sense(pairs, words):
    with pytest.raises(UserError, match=words):
        mirror_order(["a", "b", "c"], pairs)


def sample(tmp_path, *things):
    dataset = CocoDataset(read(tmp_path, pointed_content(list(things) or [pointed(10, 3, BOX)])))
    return dataset[0].image, dataset[0].target


def test_a_mirrored_left_eye_is_a_right_one(tmp_path):
    image, target = sample(tmp_path)
    mirrored = join_keypoints(*SidedFlip(1.0, ORDER)(image, target))[1]["keypoints"]
    own = join_keypoints(image, target)[1]["keypoints"]
    assert own[0].tolist() == [[4.5, 4.5, 1], [27.5, 4.5, 1], [27.5, 27.5, 1], [4.5, 27.5, 1]]
    nose, left, right, tail = mirrored[0].tolist()
    assert left == [64 - 27.5, 27.5, 1] and right == [64 - 27.5, 4.5, 1]  # each where the other's mirror image is
    assert nose == [64 - 4.5, 4.5, 1] and tail == [64 - 4.5, 27.5, 1]
    pixels, again = SidedFlip(1.0, ORDER)(*SidedFlip(1.0, ORDER)(image, target))
    assert np.array_equal(np.asarray(pixels), np.asarray(image)) and torch.equal(again["points"], target["points"])
    assert SidedFlip(0.0, ORDER)(image, target)[1] is target


def test_a_bright_pixel_and_its_keypoint_stay_together(tmp_path):
    """Through resizing and flips."""
    from PIL import Image

    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[20:22, 40:42] = 255  # its middle is between four pixels, at 40.5, 20.5 of their numbers
    entry = pointed(10, 3, [30, 10, 20, 20], keypoints=[40.5, 20.5, 2] * 4)
    _, target = sample(tmp_path, entry)
    for flip in (0.0, 1.0):
        image, found = train_transform(96, False, flip, ORDER)(Image.fromarray(pixels), dict(target))
        rows, columns = np.nonzero(image[0].numpy() > 0.5)
        assert found["keypoints"][0, 0, :2].tolist() == pytest.approx(
            [columns.mean() + 0.5, rows.mean() + 0.5], abs=0.01
        )
        assert found["keypoints"].dtype == torch.float32 and set(found) == {"boxes", "labels", "keypoints", "size"}


def test_what_a_crop_cuts_off_is_not_learnt(tmp_path):
    image, target = sample(tmp_path, pointed(10, 3, BOX), pointed(10, 7, [40, 4, 8, 8]))
    cut = v2.functional.crop
    target = {k: cut(v, 0, 0, 20, 24) if isinstance(v, tv_tensors.TVTensor) else v for k, v in target.items()}
    points = join_keypoints(cut(image, 0, 0, 20, 24), target)[1]["keypoints"]
    assert points.tolist() == [[[4.5, 4.5, 1], [0, 0, 0], [0, 0, 0], [0, 0, 0]], [[0, 0, 0]] * 4]


def test_keypoints_of_objects_that_are_dropped_go_with_them(tmp_path):
    image, target = sample(tmp_path, pointed(10, 3, [9, 9, 0.4, 9]), pointed(10, 7, BOX), thing(10, 3, [1, 1, 30, 30]))
    found = train_transform(48, False, 0.0, ORDER)(image, target)[1]
    assert found["labels"].tolist() == [2, 1] and found["keypoints"].shape == (2, 4, 3)
    assert found["keypoints"][0, 0].tolist() == [4.5, 4.5, 1] and not found["keypoints"][1].any()
    empty = train_transform(48, True, 1.0, ORDER)(*sample(tmp_path, pointed(20, 3, BOX)))[1]
    assert empty["keypoints"].shape == (0, 4, 3) and empty["boxes"].shape == (0, 4)


def test_annotations_that_differ_in_keypoints_are_no_twins(tmp_path):
    listing = read(tmp_path, pointed_content([pointed(10, 3, BOX), pointed(10, 3, BOX, keypoints=[9, 9, 2] * 4)]))
    assert len(listing.objects_of(0)) == 2
    assert json.loads(listing.objects[0])[1][3] == [[9, 9, 2]] * 4
