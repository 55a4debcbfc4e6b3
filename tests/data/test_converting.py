"""Every format of another tool is read with the right pixels, classes and splits, and what is wrong in it is named."""

import base64
import csv
import io
import json

import numpy as np
import pytest
from coco_scene import content, thing, write_coco
from PIL import Image

from sgformer.cli import main
from sgformer.core.errors import UserError
from sgformer.data import ade20k, sources
from sgformer.data.checks import check_data
from sgformer.data.coco import decode_mask, find_coco, read_coco
from sgformer.data.converting import convert
from sgformer.data.formats import open_both
from sgformer.data.imagefolder import scan
from sgformer.data.sources import base, yolo

pytest.importorskip("pycocotools")

SIZE = WIDTH, HEIGHT = 64, 48


def image(path, size=SIZE, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def text(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def coco(out, split="train"):
    """{file name: [(class, box as xyxy, mask)]}"""
    listing = read_coco(*find_coco(out, split))
    return {
        about.file_name: [(listing.classes[label], box, mask) for label, box, mask in listing.objects_of(i)]
        for i, about in enumerate(listing.images)
    }


def files(out):
    return sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())


# -- PASCAL VOC -------------------------------------------------------------------------------------------------------


def voc(name, *objects):
    things = "".join(
        f"<object><name>{label}</name><difficult>{difficult}</difficult><bndbox><xmin>{a}</xmin><ymin>{b}</ymin>"
        f"<xmax>{c}</xmax><ymax>{d}</ymax></bndbox><part><name>head</name></part></object>"
        for label, (a, b, c, d), difficult in objects
    )
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
    return f'<?xml version="1.0" encoding="utf-8"?>\n<annotation><filename>{name}</filename>{size}{things}</annotation>'


def test_voc_leaves_out_what_no_list_names(tmp_path):
    root = tmp_path / "VOC"
    for i, name in enumerate(("a", "b", "c")):
        image(root / f"JPEGImages/{name}.jpg", seed=i)
        text(root / f"Annotations/{name}.xml", voc(f"{name}.jpg", ("dog", (1, 1, 10, 8), 0)))
    text(root / "Annotations/gone.xml", voc("gone.jpg", ("dog", (1, 1, 10, 8), 0)))  # its image does not matter
    text(root / "ImageSets/Main/train.txt", "a\n")
    text(root / "ImageSets/Main/val.txt", "b\n")
    counts, found = convert(root, tmp_path / "out", "coco")
    assert counts == {"train": 1, "val": 1} and found.notes["annotations in no list of ImageSets, left out"] == 2
    assert set(coco(tmp_path / "out")) == {"a.jpg"}


def test_voc_with_lists_of_trainval_and_test_alone(tmp_path):
    root = tmp_path / "VOC"
    for i, name in enumerate(("a", "b")):
        image(root / f"JPEGImages/{name}.jpg", seed=i)
        text(root / f"Annotations/{name}.xml", voc(f"{name}.jpg", ("dog", (1, 1, 10, 8), 0)))
    text(root / "ImageSets/Main/trainval.txt", "a\n")
    text(root / "ImageSets/Main/test.txt", "b\n")
    found = sources.read(root, "coco", "voc")
    assert {picture.path.name: picture.split for picture in found.pictures} == {"a.jpg": "", "b.jpg": "test"}


def test_voc_counts_from_one_and_includes_the_last_pixel(tmp_path):
    root = tmp_path / "VOC"
    for i, split in enumerate(("train", "val")):
        image(root / f"JPEGImages/{i}.jpg", seed=i)
        text(root / f"Annotations/{i}.xml", voc(f"{i}.jpg", ("dog", (1, 1, 10, 8), 0), ("cat", (5, 5, 64, 48), i)))
        text(root / f"ImageSets/Main/{split}.txt", f"{i}\n")
        text(root / f"ImageSets/Main/dog_{split}.txt", f"{i} 1\n")
    counts, found = convert(root, tmp_path / "out", "coco")
    assert counts == {"train": 1, "val": 1} and found.classes == ("cat", "dog")
    assert coco(tmp_path / "out") == {"0.jpg": [("dog", [0, 0, 10, 8], None), ("cat", [4, 4, 64, 48], None)]}
    assert coco(tmp_path / "out", "val") == {"1.jpg": [("dog", [0, 0, 10, 8], None)]}  # the difficult one is a crowd
    assert {note.split(",")[0]: n for note, n in found.notes.items()} == {
        "difficult objects": 1,
        "files with boxes": 2,
    }
    assert (tmp_path / "out/train/0.jpg").read_bytes() == (root / "JPEGImages/0.jpg").read_bytes()


def test_xml_beside_images_counts_from_zero_if_it_says_so(tmp_path):
    """Roboflow and CVAT: files in train and valid, edges from 0."""
    for i, split in enumerate(("train", "valid")):
        image(tmp_path / f"in/{split}/a.b_{i}.png", seed=i)
        text(tmp_path / f"in/{split}/a.b_{i}.xml", voc("x.jpg", ("cat", (0, 2.5, 10, 8), 0)))
    convert(tmp_path / "in", tmp_path / "out", "coco")
    assert coco(tmp_path / "out") == {"a.b_0.png": [("cat", [0, 2.5, 10, 8], None)]}
    assert coco(tmp_path / "out", "val") == {"a.b_1.png": [("cat", [0, 2.5, 10, 8], None)]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("<annotation><object>", "malformed XML"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><annotation/>', "has a document type"),
        ("<annotation><object><bndbox/></object></annotation>", "object 1 has no name"),
        (voc("0.png", ("cat", (1, "x", 3, 4), 0)), "object 1: ymin must be a number, got 'x'"),
        (voc("0.png", ("cat", (1, "nan", 3, 4), 0)), "object 1: ymin must be a number, got 'nan'"),
    ],
)
def test_what_is_wrong_in_xml_is_named(tmp_path, content, words):
    image(tmp_path / "in/0.png")
    path = text(tmp_path / "in/0.xml", content)
    with pytest.raises(UserError, match=words) as error:
        convert(tmp_path / "in", tmp_path / "out", "coco", form="voc")
    assert str(path) in str(error.value) and not (tmp_path / "out").exists()


# -- YOLO -------------------------------------------------------------------------------------------------------------


def test_yolo_as_ultralytics_lays_it_out(tmp_path):
    root = tmp_path / "in"
    for i, split in enumerate(("train", "val")):
        image(root / f"images/{split}/{i}.png", seed=i)
        text(root / f"labels/{split}/{i}.txt", "1 0.5 0.5 0.25 0.5\n0 0.25 0.25 0.5 0.25 0.5 0.75\n")
    image(root / "images/train/none.png", seed=5)
    text(root / "data.yaml", "path: ../datasets/in\ntrain: images/train\nval: images/val\nnames:\n  0: cat\n  1: dog\n")
    counts, found = convert(root, tmp_path / "out", "coco")
    assert counts == {"train": 2, "val": 1} and found.classes == ("cat", "dog")
    triangle = [[16, 12, 32, 12, 32, 36]]
    rectangle = [[24, 12, 40, 12, 40, 36, 24, 36]]  # of the box, as its neighbour has a mask
    things = [("dog", [24, 12, 40, 36], None), ("cat", [16, 12, 32, 36], triangle)]
    assert coco(tmp_path / "out")["none.png"] == []
    got = coco(tmp_path / "out", "val")["1.png"]
    assert [thing[:2] for thing in got] == [thing[:2] for thing in things]
    listing = read_coco(*find_coco(tmp_path / "out", "train"), masks=True)
    assert [m for _, _, m in listing.objects_of(0)] == [rectangle, triangle]
    assert sum(found.notes.values()) == 1 and "without a label file" in next(iter(found.notes))


def test_yolo_counts_the_missing_labels_of_readable_images(tmp_path):
    for name in ("good", "plain", "bad"):
        image(tmp_path / f"in/{name}.png")
    text(tmp_path / "in/good.txt", "0 0.5 0.5 0.5 0.5")
    text(tmp_path / "in/classes.txt", "cat")
    text(tmp_path / "in/bad.png", "no image")
    counts, found = convert(tmp_path / "in", tmp_path / "out", "coco", bad_images="skip")
    assert counts == {"train": 2}
    assert found.notes[yolo.EMPTY] == found.notes[base.UNREADABLE] == 1


def test_yolo_as_roboflow_lays_it_out(tmp_path):
    root = tmp_path / "in"
    for i, split in enumerate(("train", "valid")):
        image(root / f"{split}/images/{i}.jpg", seed=i)
        text(root / f"{split}/labels/{i}.txt", "0 0.5 0.5 1 1")
    text(
        root / "data.yaml",
        "train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnc: 1\nnames: ['cat']\n",
    )
    assert convert(root, tmp_path / "out", "coco")[0] == {"train": 1, "val": 1}
    assert coco(tmp_path / "out", "val") == {"1.jpg": [("cat", [0, 0, 64, 48], None)]}
    assert convert(root / "data.yaml", tmp_path / "again", "coco")[0] == {"train": 1, "val": 1}


def test_yolo_beside_the_images_with_a_list_of_names(tmp_path):
    image(tmp_path / "in/0.png")
    text(tmp_path / "in/0.txt", "1 0.5 0.5 0.5 0.5\r\n")
    text(tmp_path / "in/classes.txt", "cat\r\ndog\r\n")
    assert convert(tmp_path / "in", tmp_path / "out", "coco")[0] == {"train": 1}
    assert coco(tmp_path / "out") == {"0.png": [("dog", [16, 12, 48, 36], None)]}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("2 0.5 0.5 0.5 0.5", "class 2, but .*classes.txt has 2 names: 0 to 1"),
        ("0 32 24 10 10", "fractions of the image's width and height, 0 to 1; got 32"),
        ("0 0.5 0.5 0.5", "expected `class x y w h` .*got 4 numbers"),
        ("0 0.5 0.5 0.5 inf", "must be a number, got 'inf'"),
        ("cat 0.5 0.5 0.5 0.5", "must be a number, got 'cat'"),
    ],
)
def test_what_is_wrong_in_a_line_is_named(tmp_path, line, words):
    image(tmp_path / "in/0.png")
    text(tmp_path / "in/0.txt", f"0 .5 .5 .5 .5\n{line}\n")
    text(tmp_path / "in/classes.txt", "cat\ndog\n")
    with pytest.raises(UserError, match=rf"0\.txt, line 2: .*{words}"):
        convert(tmp_path / "in", tmp_path / "out", "coco", form="yolo")


def test_yaml_does_not_lead_out_of_its_folder(tmp_path):
    image(tmp_path / "secret/0.png")
    image(tmp_path / "in/images/1.png")
    text(tmp_path / "in/labels/1.txt", "0 .5 .5 .5 .5")
    text(tmp_path / "in/data.yaml", f"train: {tmp_path}/secret\nnames: [cat]\n")
    with pytest.raises(UserError, match="is not below"):
        convert(tmp_path / "in", tmp_path / "out", "coco")


# -- labelme ----------------------------------------------------------------------------------------------------------


def labelme(name, *shapes, **more):
    entries = [{"label": label, "points": points, "shape_type": kind, **rest} for label, points, kind, rest in shapes]
    about = {"version": "5.4.1", "flags": {}, "imagePath": name, "imageData": None}
    return json.dumps({**about, "shapes": entries, "imageHeight": HEIGHT, "imageWidth": WIDTH, **more})


def png(mask):
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def test_labelme_shapes(tmp_path):
    image(tmp_path / "in/0.png")
    square = [[2, 2], [12, 2], [12, 8], [2, 8]]
    small = np.zeros((3, 4), np.uint8)
    small[1:, :2] = 255
    shapes = [
        ("cat", square, "polygon", {"group_id": 1}),
        ("cat", [[20, 20], [30, 20], [30, 30]], "polygon", {"group_id": 1}),
        ("dog", [[40, 30], [20, 10]], "rectangle", {}),
        ("dog", [[32, 24], [42, 24]], "circle", {}),
        ("dog", [[10, 20], [13, 22]], "mask", {"mask": png(small)}),
        ("dog", [[5, 5]], "point", {}),
    ]
    text(tmp_path / "in/0.json", labelme("..\\photos\\0.png", *shapes))
    _, found = convert(tmp_path / "in", tmp_path / "out", "coco")
    things = coco(tmp_path / "out")["0.png"]
    assert [name for name, _, _ in things] == ["cat", "dog", "dog", "dog"]
    assert things[0][2] == [[2, 2, 12, 2, 12, 8, 2, 8], [20, 20, 30, 20, 30, 30]]
    assert things[1][1] == [20, 10, 40, 30]
    assert np.allclose(things[2][1], [22, 14, 42, 34])
    disc = decode_mask(things[2][2], HEIGHT, WIDTH)
    assert abs(disc.sum() - np.pi * 100) < 10
    whole = np.zeros((HEIGHT, WIDTH), np.uint8)
    whole[21:23, 10:12] = 1
    assert np.array_equal(decode_mask(things[3][2], HEIGHT, WIDTH), whole)
    assert list(found.notes.values()) == [1]


def test_labelme_as_label_maps_in_the_order_of_the_shapes(tmp_path):
    image(tmp_path / "in/0.png")
    below = ("cat", [[0, 0], [20, 20]], "rectangle", {})
    above = ("ant", [[10, 10], [30, 30]], "rectangle", {})
    text(tmp_path / "in/0.json", labelme("0.png", below, above))
    convert(tmp_path / "in", tmp_path / "out", "ade20k")
    listing = ade20k.scan(tmp_path / "out", "training")
    expected = np.zeros((HEIGHT, WIDTH), np.int64)
    expected[:20, :20], expected[10:30, 10:30] = 2, 1
    assert listing.classes == ("background", "ant", "cat")
    assert np.array_equal(listing.class_indices(0), expected)


def test_labelme_with_its_image_inside_and_flags_as_classes(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    text(tmp_path / "in/0.json", labelme("0.png", imageData=png(pixels), flags={"cat": False, "dog": True}))
    convert(tmp_path / "in", tmp_path / "out", "imagenet")
    assert files(tmp_path / "out") == ["train/dog/0.png"]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out/train/dog/0.png")), pixels)


# -- VIA --------------------------------------------------------------------------------------------------------------


def region(shape, attributes, **values):
    return {"shape_attributes": {"name": shape, **values}, "region_attributes": attributes}


def via(*regions, name="0.png"):
    return {f"{name}99": {"filename": name, "size": 99, "regions": list(regions), "file_attributes": {}}}


SQUARE = {"all_points_x": [2, 12, 12, 2], "all_points_y": [2, 2, 8, 8]}


@pytest.mark.parametrize("kind", ["exported", "project", "first version", "table"])
def test_via_shapes(tmp_path, kind):
    image(tmp_path / "in/0.png")
    about = via(
        region("polygon", {"name": "cat"}, **SQUARE),
        region("rect", {"color": "red", "Class": "dog"}, x=20, y=10, width=20, height=16.5),
        region("circle", {"name": {"dog": True, "cat": False}}, cx=32, cy=24, r=10),
        region("ellipse", {"name": "dog"}, cx=32, cy=24, rx=20, ry=5, theta=np.pi / 2),
        region("point", {"name": "dog"}, cx=3, cy=3),
        region("rect", {}, x=0, y=0, width=5, height=5),
    )
    if kind == "project":
        about = {"_via_settings": {}, "_via_img_metadata": about, "_via_attributes": {}}
    if kind == "first version":
        about["0.png99"]["regions"] = {str(i): one for i, one in enumerate(about["0.png99"]["regions"])}
    if kind == "table":
        rows = [["filename", "file_size", "region_shape_attributes", "region_attributes"]]
        rows += [["0.png", "99", *map(json.dumps, one.values())] for one in about["0.png99"]["regions"]]
        rows.append(["1.png", "99", "{}", "{}"])
        image(tmp_path / "in/1.png")
        with open(tmp_path / "in/via.csv", "w", newline="") as file:
            csv.writer(file).writerows(rows)
    else:
        text(tmp_path / "in/via.json", json.dumps(about))
    assert sources.recognize(tmp_path / "in") == "via"
    _, found = convert(tmp_path / "in", tmp_path / "out", "coco")
    things = coco(tmp_path / "out")["0.png"]
    assert [name for name, _, _ in things] == ["cat", "dog", "dog", "dog", "object"]
    assert things[0][2] == [[2, 2, 12, 2, 12, 8, 2, 8]]
    assert things[1][1] == [20, 10, 40, 26.5]
    assert np.allclose(things[2][1], [22, 14, 42, 34])
    assert np.allclose(things[3][1], [27, 4, 37, 44])
    assert sorted(found.notes.values()) == [1, 1]


@pytest.mark.parametrize(
    ("about", "words"),
    [
        (
            via(region("rect", {"size": "s", "kind": "k"}, x=0, y=0, width=5, height=5)),
            "which of its attributes size, kind",
        ),
        (via(region("rect", {"name": ""}, x=0, y=0, width=5, height=5)), "its attributes have no value"),
        (via(region("rect", {"name": "cat"}, x=0, y="b", width=5, height=5)), "region 0: y must be a number"),
        (via(region("cube", {"name": "cat"})), "shape 'cube' is not known"),
        (via(region("polygon", {"name": "cat"}, all_points_x=[1, 2], all_points_y=[1])), "lacks its points"),
        (via("no region"), "region 0 needs shape_attributes"),
        (via(name="1.png"), "1 images are not below"),
        ({**via(), "b": {**via()["0.png99"]}}, "has annotations already"),
        ({"a": {"shape_attributes": {}}}, "needs a filename"),
        ({"project": {"data_format_version": "3.1"}, "metadata": {"1": {"vid": "1"}}, "view": {}}, "VIA 3"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_in_via_is_named(tmp_path, about, words):
    image(tmp_path / "in/0.png")
    text(tmp_path / "in/via.json", json.dumps(about))
    with pytest.raises(UserError, match=words) as error:
        convert(tmp_path / "in", tmp_path / "out", "coco", "via")
    assert "via.json" in str(error.value) or "in: 1 images" in str(error.value)


# -- masks ------------------------------------------------------------------------------------------------------------

COLOURS = np.array([[0, 0, 0], [128, 0, 0], [0, 128, 0], [224, 224, 192]], np.uint8)
TABLES = {
    "labelmap.txt": "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncat:128,0,0::\ndog:0,128,0::\n"
    "void:224,224,192::\n",
    "class_dict.csv": "name, r, g, b\nbackground,0,0,0\ncat,128,0,0\ndog,0,128,0\nVoid,224,224,192\n",
    "colors.json": '{"background": [0, 0, 0], "cat": [128, 0, 0], "dog": [0, 128, 0], "ignore": [224, 224, 192]}',
    "colors.txt": "0 0 0 background\n128 0 0 cat\n0 128 0 dog\n224 224 192 void\n",
}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("palette", [False, True])
def test_colours_become_classes(tmp_path, table, palette):
    values = np.random.default_rng(1).integers(0, 4, (HEIGHT, WIDTH))
    for folder, ending in (("train", "jpg"), ("val", "jpg"), ("train_labels", "png"), ("val_labels", "png")):
        path = image(tmp_path / f"in/{folder}/{folder.partition('_')[0]}_1{'_L' * ('_' in folder)}.{ending}")
        if ending == "png":
            mask = Image.fromarray(COLOURS[values])
            (mask.convert("P", palette=Image.Palette.ADAPTIVE) if palette else mask).save(path)
    text(tmp_path / "in" / table, TABLES[table])
    counts, found = convert(tmp_path / "in", tmp_path / "out", "ade20k")
    assert counts == {"train": 1, "val": 1} and found.classes == ("background", "cat", "dog")
    for split in ("training", "validation"):
        listing = ade20k.scan(tmp_path / "out", split)
        assert np.array_equal(listing.class_indices(0), np.where(values == 3, 255, values))
    assert any("no class" in note for note in found.notes)


def test_values_become_classes(tmp_path):
    """Roboflow: masks beside the images, a table of pixel values; 0 and 255 likewise."""
    for split in ("train", "valid"):
        image(tmp_path / f"in/{split}/a.jpg")
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        mask[:10] = 255
        Image.fromarray(mask).save(tmp_path / f"in/{split}/a_mask.png")
    text(tmp_path / "in/train/_classes.csv", "Pixel Value, Class\n0, background\n255, road\n")
    convert(tmp_path / "in", tmp_path / "out", "ade20k")
    listing = ade20k.scan(tmp_path / "out", "validation")
    assert listing.classes == ("background", "road")
    assert np.array_equal(listing.class_indices(0), (mask > 0).astype(np.int64))


def test_a_colour_that_the_table_lacks_is_named(tmp_path):
    image(tmp_path / "in/images/a.jpg")
    mask = COLOURS[np.zeros((HEIGHT, WIDTH), int)]
    mask[3, 5] = 1, 2, 3
    path = tmp_path / "in/masks/a.png"
    path.parent.mkdir()
    Image.fromarray(mask).save(path)
    text(tmp_path / "in/labelmap.txt", TABLES["labelmap.txt"])
    with pytest.raises(UserError, match=r"a\.png: 1 colours are not in .*the first 1, 2, 3 at row 3, column 5"):
        convert(tmp_path / "in", tmp_path / "out", "ade20k")
    assert not (tmp_path / "out").exists()


def test_colours_of_two_images_of_one_name_are_not_mixed(tmp_path):
    for folder in ("images/a", "images/b", "masks/a", "masks/b"):
        path = image(tmp_path / f"in/{folder}/1.png")
        if folder.startswith("masks"):
            Image.fromarray(COLOURS[np.zeros((HEIGHT, WIDTH), int)]).save(path)
    text(tmp_path / "in/labelmap.txt", TABLES["labelmap.txt"])
    with pytest.raises(UserError, match=r"images/a/1\.png and .*images/b/1\.png: two images of the same name"):
        convert(tmp_path / "in", tmp_path / "out", "ade20k")
    (tmp_path / "in/images/b/1.png").unlink()
    with pytest.raises(UserError, match=r"masks/a/1\.png and .*masks/b/1\.png: two masks of the same name"):
        convert(tmp_path / "in", tmp_path / "out", "ade20k")
    assert not (tmp_path / "out").exists()


def test_masks_of_objects_beside_those_of_classes_are_no_images(tmp_path):
    """CVAT and VOC: JPEGImages, SegmentationClass and SegmentationObject, all with the same names."""
    original = image(tmp_path / "in/JPEGImages/1.jpg")
    for folder, value in (("SegmentationClass", 1), ("SegmentationObject", 2)):
        path = image(tmp_path / f"in/{folder}/1.png")
        Image.fromarray(COLOURS[np.full((HEIGHT, WIDTH), value)]).save(path)
    text(tmp_path / "in/labelmap.txt", TABLES["labelmap.txt"])
    assert convert(tmp_path / "in", tmp_path / "out", "ade20k")[0] == {"train": 1}
    listing = ade20k.scan(tmp_path / "out", "training")
    assert listing.images[0].read_bytes() == original.read_bytes() and (listing.class_indices(0) == 1).all()


# -- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "table",
    [
        "id_code,diagnosis,label\n{0},x,cat\n{1},x,dog\n",  # Kaggle: no endings
        "\ufefffilename;class\nphotos/{0}.png;cat\nphotos/{1}.png;dog\n",
        "C:\\photos\\{0}.png,cat\nC:\\photos\\{1}.png,dog\n",  # no names of columns
        "label\tpath\ncat\t{0}.png\ndog\t{1}.png\ncat\t{0}.png\n",  # listed twice
    ],
)
def test_lists_of_files_and_labels(tmp_path, table):
    for split in ("train", "val"):
        for i in range(2):
            image(tmp_path / f"in/photos/{split}{i}.png", seed=i)
        text(tmp_path / f"in/{split}.csv", table.replace("id_code", "image_id").format(f"{split}0", f"{split}1"))
    convert(tmp_path / "in", tmp_path / "out", "imagenet", form="csv")
    assert files(tmp_path / "out") == [
        f"{split}/{name}/{split}{i}.png" for split in ("train", "val") for i, name in enumerate(("cat", "dog"))
    ]
    assert scan(tmp_path / "out", "train").classes == ("cat", "dog")


def test_a_list_with_boxes_and_a_column_of_splits(tmp_path):
    for i in range(2):
        image(tmp_path / f"in/{i}.png", seed=i)
    rows = "filename,width,height,class,xmin,ymin,xmax,ymax,split\n0.png,64,48,cat,1,2,30,40,train\n"
    text(tmp_path / "in/all.csv", rows + "0.png,64,48,dog,10,2,30,40,train\n1.png,64,48,cat,3,4,5,6,val\n")
    convert(tmp_path / "in/all.csv", tmp_path / "out", "coco")
    assert coco(tmp_path / "out") == {"0.png": [("cat", [1, 2, 30, 40], None), ("dog", [10, 2, 30, 40], None)]}
    assert coco(tmp_path / "out", "val") == {"1.png": [("cat", [3, 4, 5, 6], None)]}


def test_a_file_of_two_classes_and_missing_files_are_named(tmp_path):
    image(tmp_path / "in/0.png")
    path = text(tmp_path / "in/train.csv", "file,label\n0.png,cat\n0.png,dog\n")
    with pytest.raises(UserError, match=r"train\.csv, line 3: 0\.png is of class 'dog', and of 'cat' before"):
        convert(path, tmp_path / "out", "imagenet")
    path.write_text("file,label\n0.png,cat\n1.png,dog\n")
    with pytest.raises(UserError, match=r"1 images are not below .*1\.png.*--images.*--bad-images skip"):
        convert(path, tmp_path / "out", "imagenet")
    _, found = convert(path, tmp_path / "out", "imagenet", bad_images="skip")
    assert files(tmp_path / "out") == ["train/cat/0.png"]
    assert found.notes == {"images that are not there, left out": 1}


def test_open_images(tmp_path):
    root = tmp_path / "in"
    for split in ("train", "validation"):
        image(root / split / f"{split}01.jpg")
        text(
            root / f"{split}-annotations-bbox.csv",
            "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf\n"
            f"{split}01,xclick,/m/01,1,0.25,0.5,0.5,1,0,0,0\n{split}01,xclick,/m/02,1,0,1,0,1,0,0,1\n"
            "elsewhere,xclick,/m/02,1,0,1,0,1,0,0,0\n",
        )
        text(
            root / f"{split}-annotations-human-imagelabels-boxable.csv",
            f"ImageID,Source,LabelName,Confidence\n{split}01,verification,/m/01,1\n{split}01,verification,/m/02,0\n",
        )
    text(root / "class-descriptions-boxable.csv", "/m/01,Cat\n/m/02,Dog\n")
    _, found = convert(root, tmp_path / "out", "coco")
    assert coco(tmp_path / "out", "val") == {"validation01.jpg": [("Cat", [16, 24, 32, 48], None)]}
    assert found.classes == ("Cat", "Dog") and sorted(found.notes.values()) == [2, 2]
    convert(root, tmp_path / "labels", "imagenet")
    assert files(tmp_path / "labels") == ["train/Cat/train01.jpg", "val/Cat/validation01.jpg"]


def test_a_classifiers_predictions(tmp_path):
    for folder in "ab":
        image(tmp_path / f"in/{folder}/0.png", seed=ord(folder))
    labels = {"a": [{"class": "cat", "probability": 0.9}, {"class": "dog", "probability": 0.1}]}
    labels["b"] = labels["a"][::-1]
    told = [{"image": f"/elsewhere/in/{folder}/0.png", "labels": labels[folder]} for folder in "ab"]
    file = text(tmp_path / "in/told.json", json.dumps(told, indent=2))
    convert(file, tmp_path / "out", "imagenet")
    got = {path.parent.name: path.read_bytes() for path in (tmp_path / "out/train").rglob("*.png")}
    assert got == {n: (tmp_path / f"in/{f}/0.png").read_bytes() for n, f in (("cat", "a"), ("dog", "b"))}
    with pytest.raises(UserError, match=f"classifier's predictions: `sgformer data from {file} OUT --layout imagenet`"):
        open_both(file)


# -- all of them ------------------------------------------------------------------------------------------------------


def test_coco_becomes_label_maps(tmp_path):
    image(tmp_path / "in/images/0.png")
    things = [{"image_id": 1, "category_id": 5, "segmentation": [[0, 0, 10, 0, 10, 10, 0, 10]]}]
    content = {
        "images": [{"id": 1, "file_name": "0.png"}],
        "annotations": things,
        "categories": [{"id": 5, "name": "cat"}],
    }
    text(tmp_path / "in/result.json", json.dumps(content))
    convert(tmp_path / "in", tmp_path / "out", "ade20k")
    listing = ade20k.scan(tmp_path / "out", "training")
    assert listing.classes == ("background", "cat")
    assert listing.class_indices(0).sum() == 100 and listing.class_indices(0)[:10, :10].all()


@pytest.mark.parametrize(
    ("make", "layout", "words"),
    [
        (
            lambda root: text(root / "0.xml", voc("0.png", ("cat", (1, 1, 5, 5), 0))),
            "ade20k",
            "1 objects with a box only",
        ),
        (lambda root: text(root / "0.xml", voc("0.png", ("cat", (1, 1, 5, 5), 0))), "imagenet", "no class per image"),
        (lambda root: text(root / "a.csv", "file,label\n0.png,cat\n"), "coco", "no objects with boxes or outlines"),
        (lambda root: text(root / "a.csv", "file,label\n0.png,cat\n"), "ade20k", "no outlines or masks"),
        (lambda root: text(root / "0.xml", voc("0.png")), "coco", "holds no objects"),
        (lambda root: text(root / "notes.md", "x"), "coco", "in none of the formats .*--format"),
    ],
)
def test_what_a_layout_needs_and_a_source_lacks(tmp_path, make, layout, words):
    image(tmp_path / "in/0.png")
    make(tmp_path / "in")
    with pytest.raises(UserError, match=words):
        convert(tmp_path / "in", tmp_path / "out", layout)
    assert not (tmp_path / "out").exists()


def test_equal_names_in_different_folders_stay_apart(tmp_path):
    for folder in "ab":
        image(tmp_path / f"in/{folder}/0.png", seed=ord(folder))
    text(tmp_path / "in/train.csv", "file,label\na/0.png,cat\nb/0.png,cat\n")
    convert(tmp_path / "in", tmp_path / "out", "imagenet")
    names = files(tmp_path / "out")
    assert len(names) == 2
    assert {(tmp_path / "out" / name).read_bytes() for name in names} == {
        (tmp_path / f"in/{folder}/0.png").read_bytes() for folder in "ab"
    }


def test_unreadable_images_stop_or_are_left_out(tmp_path):
    image(tmp_path / "in/0.png")
    text(tmp_path / "in/1.png", "no image")
    text(tmp_path / "in/train.csv", "file,label\n0.png,cat\n1.png,cat\n")
    with pytest.raises(UserError, match=r"1\.png: .*--bad-images skip"):
        convert(tmp_path / "in", tmp_path / "out", "imagenet")
    convert(tmp_path / "in", tmp_path / "out", "imagenet", bad_images="skip")
    assert files(tmp_path / "out") == ["train/cat/0.png"]


@pytest.mark.parametrize(
    "broken",
    [
        {"imageData": "no base64!"},
        {"imageData": base64.b64encode(b"no image").decode()},
        {"imageData": base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()},
        {"shapes": [{"label": "cat", "shape_type": "mask", "points": [[1, 1], [4, 4]], "mask": "no base64!"}]},
    ],
)
def test_unreadable_images_within_labelme_stop_or_are_left_out(tmp_path, broken):
    image(tmp_path / "in/0.png")
    triangle = ("cat", [[1, 1], [9, 1], [9, 9]], "polygon", {})
    text(tmp_path / "in/0.json", labelme("0.png", triangle))
    text(tmp_path / "in/1.json", json.dumps({**json.loads(labelme("1.png", triangle)), **broken}))
    if "shapes" in broken:
        image(tmp_path / "in/1.png")
    with pytest.raises(UserError, match=r"1\.json: .*--bad-images skip") as error:
        convert(tmp_path / "in", tmp_path / "out", "coco")
    assert "\n" not in str(error.value)
    counts, found = convert(tmp_path / "in", tmp_path / "out", "coco", bad_images="skip")
    assert counts == {"train": 1} and found.notes["images that cannot be read, left out"] == 1
    assert "1 images that cannot be read" in check_data(tmp_path / "in").problems


def test_unreadable_masks_stop_or_are_left_out_with_their_image(tmp_path):
    for i in range(2):
        image(tmp_path / f"in/images/{i}.png", seed=i)
        (tmp_path / "in/masks").mkdir(exist_ok=True)
        Image.new("RGB", SIZE, (0, 0, 255 * i)).save(tmp_path / f"in/masks/{i}.png")
    text(tmp_path / "in/labelmap.txt", "road:0,0,0::\nsky:0,0,255::\n")
    data = (tmp_path / "in/masks/1.png").read_bytes()
    (tmp_path / "in/masks/1.png").write_bytes(data[:50])
    with pytest.raises(UserError, match=r"masks/1\.png: .*--bad-images skip"):
        convert(tmp_path / "in", tmp_path / "out", "ade20k")
    counts, found = convert(tmp_path / "in", tmp_path / "out", "ade20k", bad_images="skip")
    assert counts == {"train": 1} and found.notes["images that cannot be read, left out"] == 1
    assert files(tmp_path / "out") == ["annotations/training/0.png", "classes.txt", "images/training/0.png"]
    report = check_data(tmp_path / "in")
    assert report.splits["all"].per_class["sky"] == 0 and "1 images that cannot be read" in report.problems
    (tmp_path / "in/masks/0.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="no image of it can be read"):
        convert(tmp_path / "in", tmp_path / "none", "ade20k", bad_images="skip")


def test_unreadable_images_of_coco_stop_or_are_left_out(tmp_path):
    write_coco(tmp_path / "in", content([thing(10, 3, [1, 1, 9, 9]), thing(20, 3, [1, 1, 9, 9])]))
    (tmp_path / "in/train/20.png").write_text("no image")
    with pytest.raises(UserError, match=r"20\.png: .*--bad-images skip"):
        convert(tmp_path / "in/annotations/instances_train.json", tmp_path / "out", "ade20k")
    file = tmp_path / "in/annotations/instances_train.json"
    counts, _ = convert(file, tmp_path / "out", "ade20k", bad_images="skip")
    assert counts == {"train": 1}


def test_the_command_says_what_it_did(tmp_path, capsys):
    image(tmp_path / "in/0.png")
    text(tmp_path / "in/0.txt", "0 .5 .5 .5 .5")
    text(tmp_path / "in/classes.txt", "cat\n")
    assert main(["data", "from", str(tmp_path / "in"), str(tmp_path / "out"), "--layout", "coco"]) == 0
    said = capsys.readouterr().out
    assert "1 images of train, 1 classes, in the coco layout" in said and "--val-split .2" in said
    assert main(["data", "from", str(tmp_path / "in"), str(tmp_path / "out"), "--layout", "coco"]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert main(["data", "from", str(tmp_path / "in"), str(tmp_path / "new")]) == 2
    assert "--layout is missing" in capsys.readouterr().err


def test_formats_are_told_apart(tmp_path):
    assert sources.recognize(tmp_path) is None and sources.recognize(tmp_path / "nowhere") is None
    image(tmp_path / "0.png")
    assert sources.recognize(tmp_path) is None


@pytest.mark.parametrize("lines", ["a.png,cat\na.png,\n", "a.png,\na.png,cat\n"])
def test_a_line_without_a_label_takes_none_from_another_line(tmp_path, lines):
    image(tmp_path / "in/a.png")
    image(tmp_path / "in/b.png", seed=1)
    text(tmp_path / "in/list.csv", f"file,label\n{lines}b.png,dog\n")
    found = sources.read(tmp_path / "in", "imagenet", "csv")
    assert {picture.path.name: picture.label for picture in found.pictures} == {"a.png": "cat", "b.png": "dog"}
    assert found.notes["lines without a label, left out"] == 1
