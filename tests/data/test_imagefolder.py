"""The ImageNet layout is listed the same is_global; samples and their order are functions of seed, epoch and index."""

import random
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from sgformer.core.errors import UserError
from sgformer.data.imagefolder import EpochSampler, ImageFolderDataset, collate, scan, scan_splits, seeded

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
    from timm.data.auto_augment import AugmentOp

    import sgformer.data.transforms  # noqa: F401  (what it mends)

    image = Image.linear_gradient("L").convert("RGB")
    seen = np.asarray(AugmentOp("PosterizeIncreasing", prob=1.0, magnitude=magnitude)(image))
    assert len(np.unique(seen)) == levels and seen.shape == (256, 256, 3)
