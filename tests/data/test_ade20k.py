"""Label maps of every kind mean the same; what does not fit is named; samples are a function of seed, pass, index."""

import struct
import zlib
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from sgformer.core.errors import UserError
from sgformer.data.ade20k import (
    LabelledFolderDataset,
    StepSampler,
    collate,
    collate_sizes,
    ignore_label,
    read_class_names,
    read_label_map,
    scan,
)
from sgformer.data.dense_transforms import as_tensors, train_transform

LABELS = np.array([[0, 1, 2, 3], [3, 2, 1, 255], [0, 0, 3, 3]], dtype=np.uint8)


def save(root, split="training", name="a", labels=LABELS, size=None):
    """An image of noise and its label map."""
    for kind in ("images", "annotations"):
        (root / kind / split / name).parent.mkdir(parents=True, exist_ok=True)
    height, width = size or labels.shape
    pixels = np.random.default_rng(len(name)).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / "images" / split / f"{name}.jpg")
    Image.fromarray(labels).save(root / "annotations" / split / f"{name}.png")


def png_of_grey(values, bits):
    """A grey PNG with so many bits per pixel, written by hand: Pillow writes only 1, 8 and 16."""
    rows = b""
    for row in values:
        packed = "".join(f"{v:0{bits}b}" for v in row)
        packed += "0" * (-len(packed) % 8)
        rows += b"\0" + bytes(int(packed[i : i + 8], 2) for i in range(0, len(packed), 8))

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = values.shape
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["8", "16", "palette", "palette 2 bits", "grey 2 bits", "grey 4 bits"])
def test_values_are_classes_whatever_the_kind_of_png(tmp_path, kind):
    values, path = np.where(LABELS == 255, 0, LABELS).astype(np.uint8), tmp_path / "a.png"
    if kind.startswith("grey"):
        path.write_bytes(png_of_grey(values, int(kind.split()[1])))
    elif kind.startswith("palette"):
        image = Image.fromarray(values, mode="P")
        image.putpalette([9, 9, 9] * 256 if kind == "palette" else [200, 0, 0, 0, 200, 0, 9, 9, 9, 9, 9, 9])
        image.save(path, **({"bits": 2} if "2" in kind else {}))
    else:
        Image.fromarray(values.astype(np.uint16 if kind == "16" else np.uint8)).save(path)
    assert np.array_equal(read_label_map(path), values)


def test_one_bit_and_large_values(tmp_path):
    Image.fromarray(LABELS > 1).save(tmp_path / "1.png")
    assert np.array_equal(read_label_map(tmp_path / "1.png"), LABELS > 1)
    big = np.array([[0, 300, 65535]], dtype=np.uint16)
    Image.fromarray(big).save(tmp_path / "2.png")
    assert np.array_equal(read_label_map(tmp_path / "2.png"), big)


def test_coloured_label_maps_and_broken_files_are_named(tmp_path):
    Image.new("RGB", (3, 3)).save(tmp_path / "rgb.png")
    with pytest.raises(UserError, match=r"rgb\.png: a label map must have one channel.*RGB"):
        read_label_map(tmp_path / "rgb.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "rgb.png").read_bytes()[:50])
    with pytest.raises(UserError, match=r"cut\.png"):
        read_label_map(tmp_path / "cut.png")


def test_label_zero_counts_or_does_not(tmp_path):
    save(tmp_path)
    plain = scan(tmp_path)
    assert plain.classes == ("0", "1", "2", "3") and plain.ignore == 255
    assert np.array_equal(plain.class_indices(0), LABELS)
    reduced = scan(tmp_path, reduce_zero_label=True)
    assert reduced.classes == ("1", "2", "3")
    assert np.array_equal(reduced.class_indices(0), [[255, 0, 1, 2], [2, 1, 0, 255], [255, 255, 2, 2]])


def test_more_than_255_labels_use_16_bits(tmp_path):
    assert [ignore_label(n) for n in (2, 255, 256, 1000)] == [255, 255, 65535, 65535]
    labels = np.array([[0, 255, 256, 299, 65535]], dtype=np.uint16)
    save(tmp_path, labels=labels)
    listing = scan(tmp_path)
    assert len(listing.classes) == 300 and listing.ignore == 65535
    assert np.array_equal(listing.class_indices(0), labels)
    assert np.array_equal(scan(tmp_path, reduce_zero_label=True).class_indices(0), [[65535, 254, 255, 298, 65535]])


@pytest.mark.parametrize(
    ("reduce", "classes", "says"), [(False, 3, "label 3 .* 0 to 2"), (True, 2, "label 3 .* 1 to 2")]
)
def test_a_label_beyond_the_classes_names_its_file_and_place(tmp_path, reduce, classes, says):
    save(tmp_path, name="x/y")
    listing = scan(tmp_path, classes=classes, reduce_zero_label=reduce)
    with pytest.raises(UserError, match=rf"y\.png: {says}") as error:
        listing.class_indices(0)
    assert "row 0, column 3" in str(error.value)
    dataset = LabelledFolderDataset(listing, as_tensors, bad_images="skip")
    with pytest.raises(UserError, match="label 3"):  # a mistake in the settings is not skipped
        dataset[0]


def test_pairs_are_found_by_name_and_missing_ones_named(tmp_path):
    for name in ("b", "a", "deep/c"):
        save(tmp_path, name=name)
    listing = scan(tmp_path)
    assert [p.name for p in listing.images] == ["a.jpg", "b.jpg", "c.jpg"]
    assert [p.stem for p in listing.labels] == ["a", "b", "c"]
    (tmp_path / "annotations/training/a.png").unlink()
    with pytest.raises(UserError, match=r"no label map for .*a\.jpg"):
        scan(tmp_path)
    (tmp_path / "images/training/a.jpg").unlink()
    (tmp_path / "images/training/b.jpg").unlink()
    with pytest.raises(UserError, match=r"no image for .*b\.png"):
        scan(tmp_path)
    with pytest.raises(UserError, match=r"validation: no such folder; expected"):
        scan(tmp_path, "validation")
    with pytest.raises(UserError, match="nowhere: no such folder"):
        scan(tmp_path / "nowhere")


def test_two_images_for_one_label_map(tmp_path):
    save(tmp_path)
    Image.new("RGB", (4, 3)).save(tmp_path / "images/training/a.png")
    with pytest.raises(UserError, match=r"a\.jpg and a\.png have the same stem"):
        scan(tmp_path)


def test_sizes_that_differ_are_named_or_skipped(tmp_path):
    save(tmp_path, name="good")
    save(tmp_path, name="odd", size=(5, 7))
    listing = scan(tmp_path)
    with pytest.raises(UserError, match=r"odd\.png: 4 x 3 pixels, but .*odd\.jpg has 7 x 5.*--bad-images skip"):
        LabelledFolderDataset(listing, as_tensors)[1]
    dataset = LabelledFolderDataset(listing, as_tensors, bad_images="skip")
    batch = collate([dataset[0], dataset[1]])
    assert batch.index.tolist() == [0] and batch.image.shape == (1, 3, 3, 4) and "odd.png" in batch.skipped[0]
    empty = collate([dataset[1]])
    assert not len(empty.target) and len(empty.skipped) == 1


def test_class_names_from_files(tmp_path):
    save(tmp_path)
    names = tmp_path / "objectInfo150.txt"
    names.write_text(
        "Idx\tRatio\tTrain\tVal\tName\n1\t.5\t9\t9\twall\n2\t.3\t9\t9\tfloor, flooring\n3\t.1\t9\t9\ttree\n"
    )
    assert scan(tmp_path, reduce_zero_label=True).classes == ("wall", "floor", "tree")
    assert scan(tmp_path).classes == ("background", "wall", "floor", "tree")
    with pytest.raises(UserError, match=r"objectInfo150\.txt has 3 classes, --classes is 5"):
        scan(tmp_path, classes=5, reduce_zero_label=True)
    (tmp_path / "classes.txt").write_text("sky\nsea\n\nsand\nrock\n")
    assert scan(tmp_path).classes == ("sky", "sea", "sand", "rock")
    names.write_text("Idx\tName\n1\ta\n3\tb\n")
    with pytest.raises(UserError, match="must be consecutive from 1; missing: 2"):
        read_class_names(names, reduce_zero_label=True)
    names.write_text("")
    with pytest.raises(UserError, match="no class names"):
        read_class_names(names)


def test_samples_do_not_depend_on_workers_or_history(tmp_path):
    rng = np.random.default_rng(0)
    for name in "abcdef":
        save(tmp_path, name=name, labels=rng.integers(0, 4, (40, 50)).astype(np.uint8))
    dataset = LabelledFolderDataset(scan(tmp_path), train_transform((32, 32), short_side=32), seed=3)

    def batches(workers):
        sampler = StepSampler(len(dataset), 4, steps=4, seed=1)
        return list(DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=workers))

    one, two = batches(0), batches(2)
    assert all(torch.equal(a.image, b.image) and torch.equal(a.target, b.target) for a, b in zip(one, two, strict=True))
    assert not torch.equal(dataset[0, 1].image, dataset[1, 1].image) and torch.equal(
        dataset[1, 1].image, dataset[1, 1].image
    )


def test_evaluation_keeps_sizes(tmp_path):
    save(tmp_path, name="a")
    save(tmp_path, name="b", labels=np.zeros((8, 6), np.uint8))
    dataset = LabelledFolderDataset(scan(tmp_path), as_tensors)
    batch = collate_sizes([dataset[0], dataset[1]])
    assert [tuple(x.shape) for x in batch.image] == [(3, 3, 4), (3, 8, 6)]
    assert [tuple(x.shape) for x in batch.target] == [(3, 4), (8, 6)]


@settings(deadline=None, max_examples=40)
@given(
    length=st.integers(1, 30), batch=st.integers(1, 8), world=st.integers(1, 3), steps=st.integers(1, 7), data=st.data()
)
def test_step_sampler_goes_through_passes_without_a_gap(length, batch, world, steps, data):
    rounds = 3

    def pairs(rank, start=0):
        sampler = StepSampler(length, batch, steps, seed=5, rank=rank, world=world)
        sampler.resume_at(start // steps, start % steps)
        result = []
        for epoch in range(start // steps, rounds):
            sampler.set_epoch(epoch)
            result.extend(sampler)
        return result

    everyone = [pairs(rank) for rank in range(world)]
    assert [len(p) for p in everyone] == [rounds * steps] * world
    flat = [pair for step in zip(*everyone, strict=True) for members in zip(*step, strict=True) for pair in members]
    assert len(set(flat)) == len(flat)  # no (pass, image) twice
    turns = Counter(turn for turn, _ in flat)
    assert all(turns[turn] == length for turn in range(len(flat) // length))  # every pass but the last is whole
    assert [turn for turn, _ in flat] == sorted(turn for turn, _ in flat)
    start = data.draw(st.integers(0, rounds * steps - 1))
    assert pairs(world - 1, start) == everyone[-1][start:]


def test_class_names_with_a_byte_order_mark_or_quotes(tmp_path):
    (tmp_path / "classes.txt").write_bytes("\ufeff\"road\"\r\n'it''s'\r\n5\" pipe\r\n猫\r\n".encode())
    assert read_class_names(tmp_path / "classes.txt") == ["road", "it''s", '5" pipe', "猫"]
