"""Errors about a wrong layout say what the folder looks like, and the command that helps."""

import json

import pytest
from coco_scene import content, thing, write_coco
from PIL import Image

from sgformer.core.errors import UserError
from sgformer.data import ade20k
from sgformer.data.converting import convert
from sgformer.data.formats import open_both, open_data
from sgformer.data.splitting import ValSplit, open_classes


def classes(root):
    return open_both(root)


def objects(root):
    return open_data("objects", root, "train")


def labels(root):
    return ade20k.scan(root, "training")


def image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6)).save(path)


def text(path, words):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(words)


def yolo(root):
    for split in ("train", "val"):
        image(root / f"images/{split}/0.jpg")
        text(root / f"labels/{split}/0.txt", "0 .5 .5 .5 .5")
    text(root / "data.yaml", "train: images/train\nnames: [cat]")


def roboflow_yolo(root):
    image(root / "train/images/0.jpg")
    text(root / "train/labels/0.txt", "0 .5 .5 .5 .5")
    text(root / "data.yaml", "train: ../train/images\nnames: [cat]")


def voc(root):
    image(root / "JPEGImages/0.jpg")
    text(root / "Annotations/0.xml", "<annotation><object/></annotation>")


def labelme(root):
    image(root / "0.jpg")
    text(root / "0.json", json.dumps({"version": "5", "shapes": [], "imagePath": "0.jpg"}))


def via(root):
    image(root / "train/0.jpg")
    text(root / "train/via.json", json.dumps({"0.jpg9": {"filename": "0.jpg", "regions": [{"shape_attributes": {}}]}}))


def table(root):
    image(root / "0.jpg")
    text(root / "train.csv", "file,label\n0.jpg,cat\n")


def coco(root):
    write_coco(root, content([thing(10, 3, [1, 1, 5, 5])]))


def label_maps(root):
    for split in ("training", "validation"):
        image(root / f"images/{split}/0.jpg")
        (root / f"annotations/{split}").mkdir(parents=True)
        Image.new("L", (8, 6)).save(root / f"annotations/{split}/0.png")


def folders(root):
    for name in ("ant", "bee"):
        for split in ("train", "val"):
            image(root / f"{split}/{name}/0.jpg")


def one_folder(root):
    for name in ("ant", "bee"):
        image(root / f"{name}/0.jpg")


def painted(root):
    image(root / "images/0.jpg")
    image(root / "masks/0.png")
    text(root / "labelmap.txt", "background:0,0,0::")


CONVERTED = "it looks like {}: `sgformer data from {{root}} OUT --layout {}` converts it"


@pytest.mark.parametrize(
    ("make", "open_it", "words"),
    [
        (yolo, objects, CONVERTED.format("YOLO labels", "coco")),
        (roboflow_yolo, objects, CONVERTED.format("YOLO labels", "coco")),
        (yolo, labels, CONVERTED.format("YOLO labels", "ade20k")),
        (voc, objects, CONVERTED.format("PASCAL VOC XML", "coco")),
        (voc, classes, "PASCAL VOC XML, which `sgformer data from {root} OUT --layout coco` converts, but not"),
        (labelme, objects, CONVERTED.format("labelme JSON", "coco")),
        (labelme, labels, CONVERTED.format("labelme JSON", "ade20k")),
        (via, objects, CONVERTED.format("VIA annotations", "coco")),
        (via, labels, CONVERTED.format("VIA annotations", "ade20k")),
        (table, classes, CONVERTED.format("a CSV list of files and labels", "imagenet")),
        (painted, labels, CONVERTED.format("colour-coded masks with a colour table", "ade20k")),
        (coco, labels, CONVERTED.format("COCO annotations", "ade20k")),
        (label_maps, classes, "the ADE20K layout, which `sgformer train segment` reads"),
        (label_maps, objects, "the ADE20K layout, which `sgformer train segment` reads"),
        (folders, objects, "folders of classes, which `sgformer train classify` reads"),
        (folders, labels, "folders of classes, which `sgformer train classify` reads"),
        (one_folder, classes, "there are no validation images: --val-split .2 keeps a fifth"),
    ],
)
def test_a_wrong_layout_says_what_it_is(tmp_path, make, open_it, words):
    make(tmp_path)
    with pytest.raises(UserError) as error:
        open_it(tmp_path)
    assert words.format(root=tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_damaged_data_set_of_the_right_layout_is_not_called_another(tmp_path):
    coco(tmp_path)
    (tmp_path / "annotations/instances_train.json").write_text('{"annotations": [')
    with pytest.raises(UserError, match=r"malformed JSON at line 1, column 18: Expecting value$"):
        objects(tmp_path)


def test_files_and_data_to_be_divided_say_so_too(tmp_path):
    yolo(tmp_path)
    with pytest.raises(
        UserError, match=r"it looks like YOLO labels, which `sgformer data from .* --layout coco` converts"
    ):
        open_classes(tmp_path, ValSplit(0.2))
    from sgformer.tasks.detect.config import DetectConfig
    from sgformer.tasks.detect.data import read_splits

    with pytest.raises(UserError, match=r"data\.yaml: it looks like YOLO labels: `sgformer data from .*data\.yaml OUT"):
        read_splits(DetectConfig(data=str(tmp_path / "data.yaml")))


def test_our_own_layouts_are_not_converted(tmp_path):
    label_maps(tmp_path / "in")
    with pytest.raises(UserError, match="the ADE20K layout, which `sgformer train segment` reads as it is"):
        convert(tmp_path / "in", tmp_path / "out", "coco")
