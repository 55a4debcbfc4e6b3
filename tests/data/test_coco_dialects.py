"""What tools write in COCO files: read where the meaning is plain, with a count; named where it is not."""

import json

import numpy as np
import pytest
from coco_scene import content, rectangle, thing, write_coco
from PIL import Image

from sgformer.core.errors import UserError
from sgformer.data import coco
from sgformer.data import coco_dialects as dialects
from sgformer.data.coco import CocoDataset, decode_mask, find_coco, ground_truth, read_coco
from sgformer.results import Detections, as_coco, coco_result

pytest.importorskip("pycocotools")

BOX = [8, 4, 16, 12]


def write(root, data, file, folder):
    """A COCO file with grey images of the listed sizes (64 x 48 if unlisted) at `folder`/<last part of file_name>."""
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / folder).mkdir(parents=True, exist_ok=True)
    (root / file).write_text(json.dumps(data))
    for image in data["images"]:
        name = image["file_name"].replace("\\", "/").rpartition("/")[2].partition("?X")[0]
        Image.new("RGB", (64, 48), (90, 90, 90)).save(root / folder / name)
    return root / file


def read(root, data):
    return read_coco(write(root, data, "annotations/instances_train.json", "train"), root / "train")


def test_roboflow(tmp_path):
    """The first category names the project and is above the others; train, valid and test hold their own file."""
    data = content([thing(10, 1, BOX), thing(20, 2, BOX)])
    data["categories"] = [
        {"id": 0, "name": "pets", "supercategory": "none"},
        {"id": 1, "name": "cat", "supercategory": "pets"},
        {"id": 2, "name": "dog", "supercategory": "pets"},
    ]
    for split in ("train", "valid", "test"):
        write(tmp_path, data, f"{split}/_annotations.coco.json", split)
    train = read_coco(*find_coco(tmp_path, "train"))
    assert train.classes == ("cat", "dog") and train.own_ids == (1, 2)
    assert train.notes == {dialects.ROOT: 1}
    for split, folder in (("val", "valid"), ("test", "test")):
        listing = read_coco(*find_coco(tmp_path, split), categories=train.categories)
        assert listing.path(0) == tmp_path / folder / "10.png" and listing.classes == ("cat", "dog")
    assert [c["name"] for c in ground_truth(train)["categories"]] == ["cat", "dog"]


def test_a_root_with_the_name_of_its_only_class_is_no_twin(tmp_path):
    data = content([thing(10, 1, BOX)])
    data["categories"] = [
        {"id": 0, "name": "cell", "supercategory": "none"},
        {"id": 1, "name": "cell", "supercategory": "cell"},
    ]
    assert read(tmp_path, data).categories == ((1, "cell"),)


def test_a_root_with_objects_is_a_class(tmp_path):
    data = content([thing(10, 0, BOX)])
    data["categories"] = [
        {"id": 0, "name": "pets", "supercategory": "none"},
        {"id": 1, "name": "cat", "supercategory": "pets"},
    ]
    listing = read(tmp_path, data)
    assert listing.classes == ("pets", "cat") and listing.notes == {f"{coco.UNUSED} (cat)": 1}


@pytest.mark.parametrize(
    ("file", "images"),
    [
        ("annotations/instances_default.json", "images/default"),  # CVAT
        ("annotations/instances_default.json", "images"),
        ("result.json", "images"),  # Label Studio
        ("annotations.json", "JPEGImages"),  # labelme's converter
        ("labels.json", "data"),  # FiftyOne
        ("_annotations.coco.json", "."),
    ],
)
def test_a_single_split_is_found_and_says_how_to_split_it(tmp_path, file, images):
    path = write(tmp_path, content([thing(10, 3, BOX)]), file, images)
    assert coco.is_coco(tmp_path) and coco.single_coco(tmp_path) == path
    assert read_coco(*find_coco(path, "train")).path(0) == tmp_path / images / "10.png"
    with pytest.raises(UserError, match=rf"no annotations for 'val', only {file}; --val-split \.2 keeps a fifth"):
        find_coco(tmp_path, "val")


@pytest.mark.parametrize(
    "name",
    [
        "http://localhost:8080/data/upload/1/10.png",
        "https://bucket.s3.amazonaws.com/a%20b/10.png?X-Amz-Signature=1",
        "/data/local-files/?d=photos/10.png",
        "s3://bucket/10.png",
        "images\\10.png",
        "C:\\Users\\me\\train\\10.png",
        "/home/me/photos/10.png",
        "../../data/media/upload/1/10.png",
        "deeper/than/it/is/10.png",
    ],
)
def test_addresses_and_paths_elsewhere_are_found_by_their_last_parts(tmp_path, name):
    data = content([thing(10, 3, BOX), thing(10, 7, BOX)], images=1)
    data["images"][0]["file_name"] = name
    Image.new("RGB", (64, 48)).save(tmp_path / "10.png")
    listing = read(tmp_path, {**data, "images": [{**data["images"][0]}]})
    assert listing.path(0) == tmp_path / "train" / "10.png"
    assert listing.notes == {coco.ELSEWHERE: 1}


def test_the_longest_end_of_a_path_wins_and_one_file_is_not_two_images(tmp_path):
    data = content([thing(10, 3, BOX), thing(20, 7, BOX)])
    for image, folder in zip(data["images"], "ab", strict=True):
        image["file_name"] = f"/mnt/photos/{folder}/1.png"
        (tmp_path / "train" / folder).mkdir(parents=True)
        Image.new("RGB", (64, 48)).save(tmp_path / "train" / folder / "1.png")
    listing = read(tmp_path, data)
    assert [image.file_name for image in listing.images] == ["a/1.png", "b/1.png"]
    for folder in "ab":
        (tmp_path / "train" / folder / "1.png").unlink()
    with pytest.raises(UserError, match=r"/mnt/photos/b/1.png and /mnt/photos/a/1.png both stand for .*train/1.png"):
        read(tmp_path, data)


def test_nothing_outside_the_folder_is_read(tmp_path):
    data = content([thing(10, 3, BOX)], images=1)
    Image.new("RGB", (64, 48)).save(tmp_path / "secret.png")
    data["images"][0]["file_name"] = str(tmp_path / "secret.png")
    file = write_coco(tmp_path, content([]))
    file.write_text(json.dumps(data))
    with pytest.raises(UserError, match="leaves the image folder"):
        read_coco(file, tmp_path / "train")


def test_an_address_without_a_file_is_a_missing_image(tmp_path):
    data = content([thing(10, 3, BOX)])
    data["images"][1]["file_name"] = "https://host/20.png"
    file = write(tmp_path, data, "x.json", "train")
    (tmp_path / "train/20.png").unlink()
    with pytest.raises(UserError, match=r"1 of 2 images are not in .*train: 20.png"):
        read_coco(file, tmp_path / "train")


def test_the_first_image_may_be_missing(tmp_path):
    data = content([thing(20, 3, BOX)])
    for image in data["images"]:
        image["file_name"] = f"train/{image['file_name']}"
    write(tmp_path, data, "annotations/instances_train.json", "train")
    (tmp_path / "train/10.png").unlink()
    with pytest.raises(UserError, match=r"1 of 2 images are not in"):
        read_coco(*find_coco(tmp_path, "train"))
    listing = read_coco(*find_coco(tmp_path, "train"), check_files=False)
    assert listing.path(1) == tmp_path / "train/20.png"


@pytest.mark.parametrize("bare", [{}, {"bbox": []}, {"bbox": None, "segmentation": []}])
def test_no_box_and_no_mask_mean_nothing_here(tmp_path, bare):
    data = content([thing(10, 3, BOX), thing(10, 7, BOX)])
    data["annotations"].append({"id": 9, "image_id": 20, "category_id": None, **bare})
    listing = read(tmp_path, data)
    assert listing.objects_of(1) == [] and listing.notes == {dialects.NOTHING: 1}
    assert len(ground_truth(listing)["annotations"]) == 2


@pytest.mark.parametrize(
    "mask",
    [
        rectangle(*BOX),
        rectangle(*BOX)[0],  # VIA: flat
        [[[8, 4], [24, 4], [24, 16], [8, 16]]],  # points
        {"size": [48, 64], "counts": [8 * 48 + 4, *([12, 36] * 15), 12, 1952]},
    ],
)
def test_a_mask_without_a_box_gives_it(tmp_path, mask):
    bare = {"image_id": 10, "category_id": 3, "segmentation": mask}
    data = content([thing(20, 7, BOX)])
    data["annotations"] += [{"id": 8, **bare}]
    listing = read(tmp_path, data)
    assert [box for _, box, _ in listing.objects_of(0)] == [[8, 4, 24, 16]]
    pixels = np.zeros((48, 64), np.uint8)
    pixels[4:16, 8:24] = 1
    assert np.array_equal(CocoDataset(listing).target(0)["masks"][0].numpy(), pixels)
    truth = ground_truth(listing)["annotations"][1]
    assert truth["bbox"] == BOX and truth["area"] == 192
    assert np.array_equal(decode_mask(truth["segmentation"], 48, 64), pixels)


@pytest.mark.parametrize(
    ("size", "note"),
    [
        ({"width": None, "height": None}, dialects.SIZES),
        ({"width": 0, "height": 0}, dialects.SIZES),
        ({"width": -1, "height": -1}, dialects.SIZES),
        ({"width": 63.5, "height": 48}, dialects.SIZES),
        ({"width": "64", "height": "48"}, dialects.TEXT),
        ({"width": 64.0, "height": 48.0}, None),
    ],
)
def test_sizes(tmp_path, size, note):
    data = content([thing(10, 3, BOX), thing(10, 7, BOX)], images=1)
    data["images"][0] |= size
    listing = read(tmp_path, data)
    assert listing.images[0][2:] == (64, 48) and all(isinstance(v, int) for v in listing.images[0][2:])
    assert listing.notes == ({note: 1} if note else {})


def test_images_without_size_and_file_are_left_out_on_request(tmp_path):
    data = content([thing(10, 3, BOX), thing(10, 7, BOX)])
    data["images"][1] |= {"width": 0}
    file = write(tmp_path, data, "x.json", "train")
    (tmp_path / "train/20.png").unlink()
    with pytest.raises(UserError, match="image 1 has no width and height"):
        read_coco(file, tmp_path / "train")
    listing = read_coco(file, tmp_path / "train", check_files=False)
    assert len(listing) == 1 and listing.notes == {dialects.SIZES: 1, coco.UNSIZED: 1}


def test_ids_as_fractions_and_text_and_numbers_as_names(tmp_path):
    data = content([thing("10", 3.0, BOX), thing(20.0, "7", BOX)])
    data["categories"] = [{"id": 3.0, "name": 3}, {"id": 7, "name": "dog"}]
    data["images"][0]["id"] = 10.0
    listing = read(tmp_path, data)
    assert listing.categories == ((3, "3"), (7, "dog"))
    assert [listing.objects_of(i)[0][0] for i in range(2)] == [0, 1]
    assert listing.notes == {dialects.TEXT: 2}
    assert [a["image_id"] for a in ground_truth(listing)["annotations"]] == [10, 20]


def test_text_that_is_a_name_is_no_number(tmp_path):
    data = content([thing("007", 3, BOX), thing(7, 7, BOX)])
    data["images"][0]["id"], data["images"][1]["id"] = "007", 7
    listing = read(tmp_path, data)
    assert [listing.objects_of(i)[0][0] for i in range(2)] == [0, 1] and not listing.notes
    data["images"][0]["id"] = "7"  # beside 7: as they are written
    data["annotations"][0]["image_id"] = "7"
    assert [read(tmp_path, data).objects_of(i)[0][0] for i in range(2)] == [0, 1]


@pytest.mark.parametrize(("text", "crowd"), [("0", False), ("false", False), ("1", True), ("True", True)])
def test_iscrowd_as_text(tmp_path, text, crowd):
    data = content([thing(10, 3, BOX), thing(10, 7, BOX), thing(20, 3, BOX, iscrowd=text)])
    listing = read(tmp_path, data)
    assert bool(listing.objects_of(1)) != crowd
    assert [a["iscrowd"] for a in ground_truth(listing)["annotations"]] == [0, 0, int(crowd)]


def test_entries_twice_are_read_once(tmp_path):
    data = content([thing(10, 3, BOX), thing(10, 7, BOX), thing(20, 3, BOX)])
    data["images"].append(data["images"][0])
    data["categories"].append(data["categories"][1])
    data["annotations"].append({**data["annotations"][0], "id": 99})
    listing = read(tmp_path, data)
    assert [len(listing.objects_of(i)) for i in range(len(listing))] == [2, 1]
    assert listing.notes == {dialects.TWIN_IMAGES: 1, dialects.TWIN_CATEGORIES: 1, dialects.TWIN_OBJECTS: 1}
    assert len(ground_truth(listing)["annotations"]) == 3


def test_the_same_box_with_another_mask_is_another_object(tmp_path):
    data = content([thing(10, 3, BOX), thing(10, 3, BOX, segmentation=rectangle(8, 4, 8, 12)), thing(20, 7, BOX)])
    assert len(read(tmp_path, data).objects_of(0)) == 2


def test_unused_categories_of_validation_that_training_lacks_are_left_out(tmp_path):
    train = read(tmp_path, content([thing(10, 3, BOX), thing(20, 7, BOX)]))
    data = content([thing(10, 3, BOX)], images=1)
    data["categories"] += [{"id": 9, "name": "cow"}]
    file = write(tmp_path, data, "val.json", "val")
    listing = read_coco(file, tmp_path / "val", categories=train.categories)
    assert listing.classes == ("cat", "dog") and listing.notes == {coco.FOREIGN: 1}
    data["annotations"][0]["category_id"] = 9
    file.write_text(json.dumps(data))
    with pytest.raises(UserError, match="1 classes are unknown to the training data: cow"):
        read_coco(file, tmp_path / "val", categories=train.categories)


def test_boxes_as_corners_or_fractions_are_refused_not_clipped(tmp_path):
    corners = [[8, 4, 24, 16], [40, 30, 60, 44], [50, 2, 64, 48]]
    data = content([{"image_id": 10, "category_id": 3, "bbox": box} for box in corners])
    with pytest.raises(UserError, match=r"all 3 boxes look like \[x1, y1, x2, y2\] \(e.g. \[40, 30, 60, 44\]"):
        read(tmp_path, data)
    data = content([{"image_id": 10, "category_id": 3, "bbox": [0.1 * i, 0.2, 0.3, 0.4]} for i in range(3)])
    with pytest.raises(UserError, match=r"all 3 boxes lie in 0\.\.1 and look like fractions"):
        read(tmp_path, data)


@pytest.mark.parametrize("boxes", [[[2, 2, 30, 30], [1, 1, 60, 40], [0, 0, 64, 48]], [[40, 30, 60, 44]]])
def test_large_boxes_at_the_corner_are_boxes(tmp_path, boxes):
    data = content([{"image_id": 10, "category_id": 3, "bbox": box} for box in boxes])
    assert len(read(tmp_path, data).objects_of(0)) == len(boxes)


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("place", [".", "results"])
def test_predictions_are_annotations_again(tmp_path, monkeypatch, absolute, place):
    monkeypatch.chdir(tmp_path)
    detections = []
    for i, name in enumerate(("photos/a/0.png", "photos/b/0.png", "photos/b/1.png")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 48), (i, 0, 0)).save(tmp_path / name)
        mask = np.zeros((48, 64), np.uint8)
        mask[4:16, 8:24] = 1
        results = [coco_result(name, 7, [8, 4, 24, 16], 0.75, mask)] * (i < 2)
        detections.append(Detections(str(tmp_path / name) if absolute else name, results, (48, 64)))
    (tmp_path / place).mkdir(exist_ok=True)
    Image.new("RGB", (64, 48)).save(tmp_path / place / "0.png")  # of the same name, and not meant
    file = tmp_path / place / "seen.json"
    file.write_text(json.dumps(as_coco(detections, [3, 7], ["cat", "dog"])))
    listing = read_coco(*find_coco(file, "train"))
    found = [listing.path(i).resolve().relative_to(tmp_path).as_posix() for i in range(3)]
    assert found == ["photos/a/0.png", "photos/b/0.png", "photos/b/1.png"]
    assert listing.classes == ("cat", "dog") and listing.has_masks
    assert [listing.objects_of(i) and listing.objects_of(i)[0][:2] for i in range(3)] == [(1, [8, 4, 24, 16])] * 2 + [
        []
    ]
    assert np.array_equal(CocoDataset(listing).target(0)["masks"][0].numpy(), mask)
    monkeypatch.chdir("/")
    named = read_coco(*find_coco(file, "train", tmp_path / "photos"))
    assert [named.path(i).relative_to(tmp_path).as_posix() for i in range(3)] == found
