"""Masks as tools paint them: 0 and 255 are two classes, soft edges and classes without a pixel are named."""

import numpy as np
import pytest
from PIL import Image

from sgformer.core.errors import UserError
from sgformer.data.ade20k import scan
from sgformer.data.imagefolder import left_out
from sgformer.data.label_values import check_values, read_values

HALF = np.repeat([[0], [255]], 4, axis=0).repeat(10, axis=1).astype(np.uint8)


def save(root, labels, names=(), split="training"):
    for i, values in enumerate(labels):
        for kind, array in (("images", np.zeros((*values.shape, 3), np.uint8)), ("annotations", values)):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(root / kind / split / f"{i}.png")
    if names:
        (root / "classes.txt").write_text("\n".join(names))
    return root


def test_255_is_the_second_of_two_named_classes(tmp_path):
    listing, notes = check_values(scan(save(tmp_path, [HALF, HALF * 0], ["ground", "road"])))
    assert notes == ["training: 2 label maps hold 0 and 255 only: 255 is read as class road"]
    assert np.array_equal(listing.class_indices(0), HALF // 255) and listing.class_indices(0).dtype == np.int64
    Image.fromarray(np.where(HALF > 0, 254, 0).astype(np.uint8)).save(listing.labels[1])
    with pytest.raises(UserError, match=r"1\.png: value 254 at row 4, column 0.*anti-aliased"):
        listing.class_indices(1)


def test_two_classes_may_be_given_by_number(tmp_path):
    assert check_values(scan(save(tmp_path, [HALF]), classes=2))[0].binary


def test_validation_and_evaluation_read_as_training_did(tmp_path):
    listing = scan(save(tmp_path, [HALF], ["ground", "road"]))
    assert check_values(listing, True)[0].binary
    plain, notes = check_values(listing, False)
    assert not plain.binary
    assert notes == ["training: 1 of 2 classes has no pixel in 1 label maps: road; 255 means 'no class'"]
    save(tmp_path, [HALF // 255])
    plain, notes = check_values(listing, True)  # painted 0 and 1, as `predict` writes them
    assert not plain.binary and not notes and np.array_equal(plain.class_indices(0), HALF // 255)


def test_validation_maps_that_are_not_sampled_may_hold_the_255(tmp_path):
    listing = scan(save(tmp_path, [HALF * 0, HALF], ["ground", "road"]))
    read, notes = check_values(listing, True, limit=1)  # the first one only
    assert read.binary and np.array_equal(read.class_indices(1), HALF // 255)
    assert notes == ["training: 1 of 2 classes has no pixel in 1 of 2 label maps: road"]
    assert not check_values(listing, False, limit=1)[0].binary
    assert not check_values(listing, limit=1)[0].binary


@pytest.mark.parametrize(("names", "reduce"), [([], False), (["a", "b", "c"], False), (["a", "b"], True)])
def test_255_is_explained_where_there_are_not_two_classes(tmp_path, names, reduce):
    with pytest.raises(UserError, match=r"1 label maps hold 0 and 255 only, and 255 means 'no class'.*classes\.txt"):
        check_values(
            scan(save(tmp_path, [HALF], names), classes=None if names or not reduce else 2, reduce_zero_label=reduce)
        )


def test_nothing_but_no_class(tmp_path):
    with pytest.raises(UserError, match="hold 255 only, and 255 means 'no class'"):
        check_values(scan(save(tmp_path, [HALF * 0 + 255], ["a", "b", "c"])))
    with pytest.raises(UserError, match=r"no pixel of 1 label maps has a class \(they hold 255\)"):
        check_values(scan(tmp_path), False)


@pytest.mark.parametrize("names", [[], ["ground", "road"]])
def test_soft_edges_are_named(tmp_path, names):
    soft = np.concatenate([np.zeros(40), np.linspace(10, 250, 9), np.full(40, 255)]).astype(np.uint8)[None].repeat(9, 0)
    with pytest.raises(UserError, match=r"mostly 0 and 255, and 10 % values between: .*soft \(anti-aliased\) edges"):
        check_values(scan(save(tmp_path, [soft], names)))


def test_labels_beside_a_void_of_255_are_no_soft_edge(tmp_path):
    """Twenty classes, most pixels background, 255 around the objects: PASCAL VOC."""
    voc = np.concatenate([np.zeros(80), np.arange(1, 21), np.full(10, 255)]).astype(np.uint8)[None]
    listing, notes = check_values(scan(save(tmp_path, [voc])))
    assert len(listing.classes) == 21 and notes == []


def test_classes_without_a_pixel_are_counted_and_named(tmp_path):
    maps = [np.array([[0, 1, 3, 255]], np.uint8), np.array([[1, 1, 1, 1]], np.uint8)]
    listing = scan(save(tmp_path, maps, ["ground", "road", "car", "tree", "Küste"]))
    assert check_values(listing)[1] == [
        "training: 2 of 5 classes have no pixel in 2 label maps: car, Küste; 255 means 'no class'"
    ]
    assert read_values(listing).pixels == {0: 1, 1: 5, 3: 1, 255: 1}
    assert "in 1 of 2 label maps" in check_values(listing, limit=1)[1][0]


def test_files_left_out_are_said(tmp_path):
    save(tmp_path, [HALF])
    (tmp_path / "annotations/training/7.bmp").touch()
    (tmp_path / "images/training/.old").mkdir()
    assert left_out(scan(tmp_path)) == ["training: left out: 1 .bmp, 1 folder with a leading dot (images/.old)"]
