"""The ImageNet layout is listed the same is_global; samples and their order are functions of seed, epoch and index."""

import importlib.machinery
import os
import random
import re
import shutil
import sys
import types
import unicodedata

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from torch.utils.data import DataLoader

from sgformer.core.errors import UserError
from sgformer.data import addons
from sgformer.data.image import read_image
from sgformer.data.imagefolder import (
    EpochSampler,
    ImageFolderDataset,
    collate,
    folders_between,
    left_out,
    list_split,
    scan,
    scan_splits,
    seeded,
)

FILES = {
    "train/ant": ["b.png", "a.PNG", "deep/er/c.jpg", "notes.txt", ".hidden.png", ".git/d.png"],
    "train/Bee": ["1.webp", "0.tif"],
    "val/ant": ["x.png"],
    "val/Bee": ["y.png", "z.bin"],
}


@pytest.fixture
def root(tmp_path):
    for folder, names in FILES.items():
        for name in names:
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix in (".txt", ".bin"):
                path.write_text("not an image")
            else:
                color = (len(name) * 9, 50, 200)
                Image.new("RGB", (12, 10), color).save(path, {".jpg": "JPEG"}.get(path.suffix))
    return tmp_path


def test_scan_lists_in_a_fixed_order(root):
    (root / "train" / "readme.md").write_text("about")
    train, val = scan_splits(root)
    assert train.classes == val.classes == ("Bee", "ant")
    assert train.paths == ("Bee/0.tif", "Bee/1.webp", "ant/a.PNG", "ant/b.png", "ant/deep/er/c.jpg")
    assert train.targets == (0, 0, 1, 1, 1)
    assert train.counts() == [2, 3]
    assert dict(train.ignored) == {".txt": 1, ".md": 1}
    assert dict(val.ignored) == {".bin": 1}
    assert all(train.path(i).is_file() for i in range(len(train)))


def test_scan_takes_the_class_order_of_a_model(root):
    val = scan(root, "val", ["ant", "cat", "Bee"])
    assert list(zip(val.paths, val.targets, strict=True)) == [("ant/x.png", 0), ("Bee/y.png", 2)]
    assert val.counts() == [1, 0, 1]


def test_val_may_lack_a_class_but_not_add_one(root):
    shutil.rmtree(root / "val" / "ant")
    assert scan_splits(root)[1].counts() == [1, 0]
    (root / "val" / "zebra").mkdir()
    with pytest.raises(UserError, match=r"val: classes .*\(1\): zebra"):
        scan_splits(root)


def test_class_folders_without_an_image_are_named(root):
    (root / "train" / "cow").mkdir()
    (root / "train" / "cow" / "movie.mp4").touch()
    with pytest.raises(UserError, match=r"train: class folders without images .*: cow"):
        scan(root)


def test_missing_folders_say_what_is_expected(root, tmp_path):
    (root / "val").rename(root / "validation")
    with pytest.raises(UserError, match=r"no folder 'val' \(folders: train, validation\).*val/CLASS"):
        scan_splits(root)
    with pytest.raises(UserError, match=r"gone: no such folder.*train/CLASS"):
        scan(tmp_path / "gone")
    (root / "flat" / "train").mkdir(parents=True)
    with pytest.raises(UserError, match=r"holds no class folders.*train/CLASS"):
        scan(root / "flat")


def test_links_are_followed_but_not_round_and_round(root):
    (root / "train" / "ant" / "deep" / "loop").symlink_to(root / "train" / "ant", target_is_directory=True)
    outside = root / "elsewhere"
    outside.mkdir()
    Image.new("RGB", (5, 5)).save(outside / "far.png")
    (root / "train" / "Bee" / "linked").symlink_to(outside, target_is_directory=True)
    listing = scan(root)
    assert "Bee/linked/far.png" in listing.paths
    assert listing.counts() == [3, 3]
    assert "1 link to folders that are listed already (ant/deep/loop)" in left_out(listing)[0]


# --- what is left out, and what is not meant -------------------------------------------------------------------------


def test_what_is_left_out_is_counted_with_its_reason(root):
    (root / "train/ant/gone.png").symlink_to(root / "nowhere.png")
    (root / "train/ant/lost").symlink_to(root / "nowhere")
    (root / "train/ant/._a.PNG").touch()
    (root / "train/.trash").mkdir()
    Image.new("RGB", (5, 5)).save(root / "train/loose.png")
    for name in ("1.heic", "2.HEIC", "3.jxl"):
        (root / "train/Bee" / name).touch()
    train, val = scan_splits(root)
    assert train.counts() == [2, 3]
    assert left_out(train) == [
        "train: left out: 2 .heic (HEIC needs pip install pillow-heif), 1 .jxl (JPEG XL needs pip install "
        "pillow-jxl-plugin), 1 .txt, 2 broken links (ant/gone.png, ant/lost), 2 folders with a leading dot (.trash, "
        "ant/.git), 1 image in no class folder (loose.png), 2 images with a leading dot (ant/._a.PNG, ant/.hidden.png)"
    ]
    assert left_out(val) == ["val: left out: 1 .bin"]


def test_a_folder_that_cannot_be_read_is_left_out_and_named(root, monkeypatch):
    def scandir(path, really=os.scandir):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return really(path)

    monkeypatch.setattr(os, "scandir", scandir)
    listing = scan(root)
    assert listing.counts() == [2, 2]
    assert "1 folder that cannot be read ('ant/deep: Permission denied')" in left_out(listing)[0].replace(
        "(ant/deep: Permission denied)", "('ant/deep: Permission denied')"
    )


def test_a_class_does_not_vanish(root):
    (root / "train/cow").symlink_to(root / "nowhere")
    with pytest.raises(UserError, match=r"class folders without images \(1\): cow \(1 folder that cannot be read"):
        scan(root)
    (root / "train/cow").unlink()
    (root / "train/cow").mkdir()
    (root / "train/cow/1.heic").touch()
    with pytest.raises(UserError, match=r"\(1\): cow \(1 .heic \(HEIC needs pip install pillow-heif\)\)"):
        scan(root)


def test_accents_match_however_they_are_coded(root):
    composed, decomposed = (unicodedata.normalize(form, "Ameisenbär") for form in ("NFC", "NFD"))
    (root / "train/ant").rename(root / "train" / composed)
    (root / "val/ant").rename(root / "val" / f"{decomposed} ")
    train, val = scan_splits(root)
    assert train.classes == val.classes == (composed, "Bee")[::1] and val.counts() == [1, 1]
    assert val.path(0).is_file() and val.path(1).is_file()
    (root / "train" / decomposed).mkdir()
    with pytest.raises(UserError, match=r"look alike: 'Ameisenba\\u0308r', Ameisenbär; merge or rename"):
        scan(root)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_folder_too_many_is_named(root, split):
    (root / "inner").mkdir()
    for name in ("ant", "Bee"):
        (root / split / name).rename(root / "inner" / name)
    (root / "inner").rename(root / split / "images")
    with pytest.raises(
        UserError, match=rf"{split}: holds one folder, images, .* Bee, ant.*move them up: .*{split}/Bee"
    ):
        scan_splits(root)


def test_folders_between_split_and_classes_are_doubted(root):
    assert folders_between(scan(root)) == []
    (root / "none/train/ant").mkdir(parents=True)
    assert folders_between(list_split(root / "none", "train")[0]) == []
    for batch in ("one", "two"):
        for name in ("ant", "Bee"):
            shutil.copytree(root / "train" / name, root / f"batches/train/{batch}/{name}")
    assert folders_between(scan(root / "batches")) == [
        "train: each of the classes one, two holds the folders Bee, ant and no images itself: "
        f"if those are the classes, the layout is {root}/batches/train/CLASS"
    ]


def test_the_folder_that_was_meant_is_named(root, tmp_path):
    with pytest.raises(UserError, match=rf"no folder 'train'.*did you mean {re.escape(str(root))}, the folder that"):
        scan(root / "train")
    shutil.copytree(root / "train", tmp_path / "outer/photos/train")
    with pytest.raises(UserError, match=r"did you mean .*outer/photos\?"):
        scan(tmp_path / "outer")
    (root / "train").rename(root / "Train")
    with pytest.raises(UserError, match=r"is it .*/Train\? Rename it to 'train'"):
        scan(root)
    (root / "flat/train").mkdir(parents=True)
    (root / "flat/train/1.png").touch()
    with pytest.raises(UserError, match="holds no class folders, but 1 images"):
        scan(root / "flat")


def test_another_package_reads_other_formats_if_it_is_there(tmp_path, monkeypatch):
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 64
    (tmp_path / "a.heic").write_bytes(heic)
    with pytest.raises(UserError, match=r"a\.heic: HEIC needs pip install pillow-heif$"):
        read_image(tmp_path / "a.heic")

    class Opener(ImageFile.ImageFile):
        format = "HEIF"

        def _open(self):
            self._size, self._mode, self.tile = (4, 3), "RGB", []
            self.im = Image.new("RGB", (4, 3), "red").im

        def load(self):
            return self.im.pixel_access(self.readonly)

    module = types.ModuleType("pillow_heif")
    module.HeifImageFile, module.__spec__ = Opener, importlib.machinery.ModuleSpec("pillow_heif", None)
    monkeypatch.setitem(sys.modules, "pillow_heif", module)
    before = dict(Image.OPEN)
    assert addons.PILLOW_HEIF.installed
    assert read_image(tmp_path / "a.heic").getpixel((0, 0)) == (255, 0, 0)
    assert before == Image.OPEN  # Pillow itself reads what it read before


# --- samples ---------------------------------------------------------------------------------------------------------


def noisy(image):
    """A transform that draws from all three generators."""
    return torch.tensor([random.random(), np.random.rand(), torch.rand(()).item(), image.width])  # noqa: NPY002


def test_a_sample_depends_on_seed_epoch_and_index_alone(root):
    dataset = ImageFolderDataset(scan(root), noisy, seed=3)
    first = dataset[1, 2].image
    random.random(), torch.rand(7)
    dataset[0, 0]
    assert torch.equal(first, dataset[1, 2].image)
    dataset.set_epoch(1)
    assert torch.equal(first, dataset[2].image)
    others = [dataset[0, 2], dataset[1, 3], ImageFolderDataset(scan(root), noisy, seed=4)[1, 2]]
    for other in others:
        assert (other.image[:3] != first[:3]).all()


def test_the_global_generators_are_left_as_they_were(root):
    dataset = ImageFolderDataset(scan(root), noisy, seed=0)

    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002

    with seeded(5):
        expected = draw()
    with seeded(5):
        dataset[0, 0]
        assert draw() == expected
    with pytest.raises(ZeroDivisionError), seeded(6):
        raise ZeroDivisionError
    with seeded(5):
        assert draw() == expected


def epochs(dataset, workers, persistent=False):
    sampler = EpochSampler(len(dataset), 2, train=True, seed=7)
    loader = DataLoader(
        dataset, batch_sampler=sampler, collate_fn=collate, num_workers=workers, persistent_workers=persistent
    )
    batches = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        batches += list(loader)
    return batches


def test_batches_do_not_depend_on_the_number_of_workers(root):
    dataset = ImageFolderDataset(scan(root), noisy, seed=1)
    expected = epochs(dataset, 0)
    assert len(expected) == 4
    assert not torch.equal(expected[0].image, expected[2].image)
    for got in (epochs(dataset, 1), epochs(dataset, 2, persistent=True)):
        for a, b in zip(expected, got, strict=True):
            assert torch.equal(a.image, b.image) and torch.equal(a.target, b.target) and torch.equal(a.index, b.index)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_stops_by_name_in_one_line(root, workers):
    (root / "train/ant/b.png").write_bytes(b"")
    dataset = ImageFolderDataset(scan(root), noisy)
    with pytest.raises(UserError, match=r"^\S*train/ant/b\.png: the file is empty.*--bad-images skip$"):
        list(DataLoader(dataset, batch_size=5, collate_fn=collate, num_workers=workers))


@pytest.mark.slow
def test_bad_images_are_skipped_counted_and_never_replaced(root):
    (root / "train/ant/b.png").write_bytes(b"junk")
    dataset = ImageFolderDataset(scan(root), noisy, bad_images="skip")
    (batch,) = DataLoader(dataset, batch_size=5, collate_fn=collate)
    assert batch.index.tolist() == [0, 1, 2, 4]
    assert batch.target.tolist() == [0, 0, 1, 1]
    assert batch.image.shape == (4, 4)
    assert len(batch.skipped) == 1 and "train/ant/b.png" in batch.skipped[0]
    empty = collate([dataset[3]])
    assert len(empty.target) == len(empty.index) == len(empty.image) == 0 and len(empty.skipped) == 1


# --- order -----------------------------------------------------------------------------------------------------------

sizes = st.tuples(st.integers(1, 60), st.integers(1, 9), st.integers(1, 5))


def served(length, batch, world, train, epoch=0, seed=0):
    """Batches of indices, by rank."""
    samplers = [
        EpochSampler(length, batch, train=train, seed=seed, rank=r, world=world, epoch=epoch) for r in range(world)
    ]
    ranks = [list(sampler) for sampler in samplers]
    assert [len(sampler) for sampler in samplers] == [len(batches) for batches in ranks]
    assert all(e == epoch for batches in ranks for one in batches for e, _ in one)
    return [[[index for _, index in one] for one in batches] for batches in ranks]


def flat(batches):
    return [index for one in batches for index in one]


@settings(deadline=None)
@given(sizes)
def test_evaluation_serves_every_image_once_over_all_ranks(size):
    length, batch, world = size
    if length < world:
        return
    ranks = served(*size, train=False)
    assert sorted(index for batches in ranks for index in flat(batches)) == list(range(length))
    assert all(len(one) <= batch for batches in ranks for one in batches)


@settings(deadline=None)
@given(sizes, st.integers(0, 3))
def test_training_ranks_have_equal_whole_batches_and_share_no_image(size, epoch):
    length, batch, world = size
    ranks = served(*size, train=True, epoch=epoch)
    assert len({len(batches) for batches in ranks}) == 1
    assert all(len(one) == batch for batches in ranks for one in batches)
    counts = np.bincount([index for batches in ranks for index in flat(batches)], minlength=length)
    if length >= batch * world:
        assert counts.max() == 1 and (counts == 0).sum() == length % (batch * world)
    else:
        assert counts.max() - counts.min() <= 1


@settings(deadline=None)
@given(st.integers(2, 60), st.integers(1, 9), st.sampled_from([1, 2, 4]))
def test_a_global_batch_is_the_same_images_on_any_number_of_ranks(length, batch, world):
    alone = served(length, batch * world, 1, train=True)[0]
    shared = served(length, batch, world, train=True)
    for step, together in enumerate(alone):
        assert sorted(together) == sorted(index for batches in shared for index in batches[step])


@settings(deadline=None)
@given(sizes, st.booleans(), st.data())
def test_resuming_gives_the_rest_of_the_epoch_then_whole_epochs(size, train, data):
    length, batch, world = size
    rank = data.draw(st.integers(0, min(world, length) - 1))
    sampler = EpochSampler(length, batch, train=train, rank=rank, world=world)
    sampler.set_epoch(2)
    whole = list(sampler)
    sampler.set_epoch(3)
    following = list(sampler)
    done = data.draw(st.integers(0, len(whole)))
    resumed = EpochSampler(length, batch, train=train, rank=rank, world=world)
    resumed.resume_at(2, done)
    resumed.set_epoch(2)
    assert list(resumed) == whole[done:]
    assert len(resumed) == len(whole)
    resumed.set_epoch(3)
    assert list(resumed) == following


def test_order_changes_with_epoch_and_seed():
    orders = [flat(served(50, 5, 1, True, epoch, seed)[0]) for epoch, seed in ((0, 0), (1, 0), (0, 1))]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert flat(served(50, 5, 1, False)[0]) == list(range(50))


@pytest.mark.parametrize("world", [1, 3])
def test_balanced_epochs_show_all_classes_equally_often(world):
    targets = [0] * 50 + [1] * 6 + [2] * 5 + [4]  # 3 has no images
    epochs = []
    for epoch in (0, 1):
        ranks = [
            EpochSampler(62, 2, train=True, seed=3, rank=r, world=world, epoch=epoch, balance=targets)
            for r in range(world)
        ]
        # As the ranks take turns within a global batch, whatever their number: the same order.
        steps = zip(*(list(rank) for rank in ranks), strict=True)
        pairs = [one[i] for step in steps for i in range(2) for one in step]
        shown = np.bincount([targets[index] for _, index in pairs], minlength=5)
        assert shown[3] == 0 and max(shown) - min(shown[[0, 1, 2, 4]]) <= 3  # an incomplete batch is dropped
        assert len(set(pairs)) == len(pairs)  # repeated images are augmented anew
        assert len({index for _, index in pairs if targets[index] == 0}) == shown[0]  # no common image comes twice
        epochs.append(pairs)
        resumed = EpochSampler(62, 2, train=True, seed=3, world=world, balance=targets)
        resumed.resume_at(epoch, 4)
        assert list(resumed) == list(ranks[0])[4:]
    assert {index for _, index in epochs[0]} != {index for _, index in epochs[1]}


def test_bad_arguments_say_what_they_are(root):
    with pytest.raises(ValueError, match="batch_size 0"):
        EpochSampler(5, 0, train=True)
    with pytest.raises(UserError, match="'replace'"):
        ImageFolderDataset(scan(root), bad_images="replace")


@pytest.mark.parametrize("magnitude, levels", [(10, 1), (7.5, 2), (0, 16)])
def test_augmentation_at_full_strength_posterizes_to_black(magnitude, levels):
    from sgformer.data.transforms import train_transform

    policy = train_transform((32, 32), auto_augment="rand-m9-inc1").transforms
    (posterize,) = (op for step in policy for op in getattr(step, "ops", ()) if op.name == "PosterizeIncreasing")
    posterize.prob, posterize.magnitude = 1.0, magnitude
    image = Image.linear_gradient("L").convert("RGB")
    seen = np.asarray(posterize(image))
    assert len(np.unique(seen)) == levels and seen.shape == (256, 256, 3)
