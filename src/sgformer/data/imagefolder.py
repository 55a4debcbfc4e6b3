"""The ImageNet layout: `ROOT/train/CLASS/*.jpg`, `ROOT/val/CLASS/*.jpg`; listing, reading, resumable sampling.

A sample depends on (seed, epoch, index) alone, not on the number of workers or on previous reads. The epoch is sent to
the workers with the index, so it also reaches persistent workers:

    listing = scan(root, "train")
    dataset = ImageFolderDataset(listing, transform, seed=0)
    sampler = EpochSampler(len(dataset), batch_size=64, train=True, seed=0, rank=rank, world=world)
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=4, persistent_workers=True)
    for epoch in range(first_epoch, epochs):
        sampler.set_epoch(epoch)                  # after sampler.resume_at(first_epoch, batches_done)
        for image, target, index, skipped in loader: ...
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler, default_collate

from sgformer.core.errors import StalledError, UserError
from sgformer.core.names import canonical, quoted, some, visible
from sgformer.data.addons import ADDONS
from sgformer.data.image import IMAGE_EXTENSIONS, read_image


@dataclass(frozen=True)
class ImageFolder:
    """The listing of a split of an image folder. Image `i` is `path(i)`, of class `classes[targets[i]]`.

    Attributes:
        root: the data set's folder.
        split: the split's folder below it, e.g. `"train"`.
        classes: class names in index order.
        paths: image paths relative to `folder`, with forward slashes, sorted by class index, then by name.
        targets: class index of each path.
        ignored: number of other files by extension; hidden files are not counted.
        left_out: what else was left out, names by reason.
        folder: what the paths are relative to; None: `root / split`.
    """

    root: Path
    split: str
    classes: tuple[str, ...]
    paths: tuple[str, ...]
    targets: tuple[int, ...]
    ignored: Counter[str] = field(default_factory=Counter)
    folder: Path | None = None
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> Path:
        """The path of image `index`."""
        return (self.folder or self.root / self.split) / self.paths[index]

    def counts(self) -> list[int]:
        """Images per class, in the order of `classes`."""
        return np.bincount(np.asarray(self.targets, dtype=np.int64), minlength=len(self.classes)).tolist()

    def entries(self) -> list[tuple[str, str]]:
        """(name, class) of each image; see `data.identity`."""
        return [(path, self.classes[target]) for path, target in zip(self.paths, self.targets, strict=True)]

    def read_bytes(self, indices: Sequence[int]) -> list[bytes | UserError]:
        """The files' bytes, or the error for each unreadable file."""
        results: list[bytes | UserError] = []
        for path in map(self.path, indices):
            try:
                results.append(path.read_bytes())
            except OSError as error:
                results.append(UserError(f"{path}: {error.strerror or error}"))
        return results

    def read_many(self, indices: Sequence[int]) -> Iterator[Image.Image | UserError]:
        """The images, or the error for each unreadable one, in the order of `indices`."""
        for index in indices:
            try:
                yield read_image(self.path(index))
            except UserError as error:
                yield error


class Listing(Protocol):
    """A split's images, as an `ImageFolder` or a `ShardFolder` of tar shards."""

    @property
    def split(self) -> str: ...
    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def paths(self) -> tuple[str, ...]: ...
    @property
    def targets(self) -> tuple[int, ...]: ...
    @property
    def ignored(self) -> Counter[str]: ...
    def __len__(self) -> int: ...
    def path(self, index: int) -> Any: ...
    def counts(self) -> list[int]: ...
    def entries(self) -> list[tuple[str, str]]: ...
    def read_bytes(self, indices: Sequence[int]) -> list[bytes | UserError]: ...
    def read_many(self, indices: Sequence[int]) -> Iterator[Image.Image | UserError]: ...


def is_image_folder(root: str | os.PathLike) -> bool:
    """Whether there is a folder of a split in `root`."""
    return any((Path(root) / split).is_dir() for split in ("train", "val"))


def scan(root: str | os.PathLike, split: str = "train", classes: Sequence[str] | None = None) -> ImageFolder:
    """List a split of an image folder without opening images.

    Every folder in `root/split` is a class and may contain nested folders. Files without an image extension, hidden
    files and folders, broken links and unreadable folders are left out and counted: see `left_out`. Names of classes
    are matched to `classes` by `core.names.canonical`.

    Args:
        root: folder with the splits.
        split: `"train"` or `"val"`.
        classes: class names in index order, e.g. those of the training split or of a trained model; by default the
            folder names, sorted by code point.

    Raises:
        UserError: a folder is missing, a class has no images or is not among `classes`, two class folders have names
            that look alike, or there is a folder too many between split and classes.
    """
    listing, unknown, empty = list_split(root, split, classes)
    folder = listing.root / split
    if unknown:
        raise UserError(f"{folder}: classes unknown to training ({len(unknown)}): {quoted(unknown)}")
    if empty:
        raise UserError(f"{folder}: class folders without images ({len(empty)}): {some(empty)}; fill or remove them")
    return listing


def list_split(
    root: str | os.PathLike, split: str, classes: Sequence[str] | None = None
) -> tuple[ImageFolder, list[str], list[str]]:
    """As `scan`, but returns unusable class folders instead of raising.

    Returns:
        The listing, the folders that are not among `classes` (not listed), the class folders without images, with the
        reason if there is one besides that they are empty.

    Raises:
        UserError: a folder is missing, holds no class folders or one too many above them, or two look alike.
    """
    root = Path(root)
    folder = root / split
    left_out: dict[str, list[str]] = {}
    layout = f"expected the ImageNet layout, {root}/train/CLASS/*.jpg and {root}/val/CLASS/*.jpg"
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; {layout}")
    if not folder.is_dir():
        meant = _meant(root, split)
        raise UserError(f"{root}: no folder {split!r} (folders: {some(_folders(root)) or 'none'}); {meant}{layout}")
    names, loose = _class_folders(folder, left_out)
    if not names:
        few = f", but {len(loose)} images" if (loose := [file for file in loose if _is_image(file)]) else ""
        raise UserError(f"{folder}: holds no class folders{few}; {layout}")
    found = {canonical(name): name for name in names}
    if len(found) < len(names):
        alike = [name for name in names if sum(canonical(name) == canonical(other) for other in names) > 1]
        raise UserError(f"{folder}: class folders whose names look alike: {quoted(alike)}; merge or rename them")
    order = tuple(names if classes is None else classes)
    known = {canonical(name) for name in order}
    _refuse_extra_level(folder, names, () if classes is None else known)
    paths: list[str] = []
    targets: list[int] = []
    empty: list[str] = []
    ignored = Counter(_extension(file) for file in loose if not _is_image(file))
    if images := [file for file in loose if _is_image(file)]:
        left_out[LOOSE] = sorted(images)
    for index, name in enumerate(order):
        if (name := found.get(canonical(name), "")) == "":
            continue
        reasons: dict[str, list[str]] = {}
        files = sorted(walk(os.path.join(folder, name), f"{name}/", set(), reasons), key=place_of)
        images = [file for file in files if _is_image(file)]
        others = Counter(_extension(file) for file in files if not _is_image(file))
        paths.extend(images)
        targets.extend([index] * len(images))
        ignored.update(others)
        for reason, where in reasons.items():
            left_out.setdefault(reason, []).extend(where)
        if not images:
            why = _describe(others, reasons)
            empty.append(f"{visible(name)} ({why})" if why else visible(name))
    unknown = [name for name in names if canonical(name) not in known]
    return ImageFolder(root, split, order, tuple(paths), tuple(targets), ignored, left_out=left_out), unknown, empty


def left_out(listing: Any) -> list[str]:
    """A line that says what is in the folders but not in a listing, with count and reason, if there is anything."""
    what = _describe(listing.ignored, getattr(listing, "left_out", {}))
    return [f"{listing.split}: left out: {what}"] if what else []


def folders_between(listing: Listing) -> list[str]:
    """A line if every class folder holds the same folders, two or more, and no images itself: those may be meant."""
    if not isinstance(listing, ImageFolder) or listing.folder is not None:
        return []
    inner: dict[int, set[str]] = {}
    for path, target in zip(listing.paths, listing.targets, strict=True):
        parts = path.split("/", 2)
        inner.setdefault(target, set()).add(parts[1] if len(parts) > 2 else "")
    if len(inner) < 2:
        return []
    first, *others = inner.values()
    if "" in first or len(first) < 2 or any(names != first for names in others):
        return []
    return [
        f"{listing.split}: each of the classes {quoted(listing.classes)} holds the folders {quoted(sorted(first))} and "
        f"no images itself: if those are the classes, the layout is {listing.root}/{listing.split}/CLASS"
    ]


def _describe(ignored: Mapping[str, int], reasons: Mapping[str, Sequence[str]]) -> str:
    """`2 .txt, 3 .heic (HEIC needs pip install pillow-heif), 1 broken link (ant/4.jpg)`."""
    parts = []
    for extension, count in sorted(ignored.items()):
        addon = ADDONS.get(extension)
        parts.append(f"{count} {extension or 'without extension'}" + (f" ({addon.advice})" if addon else ""))
    for reason, names in sorted(reasons.items()):
        parts.append(f"{len(names)} {reason.replace('(s)', 's' * (len(names) > 1))} ({quoted(sorted(names), 3)})")
    return ", ".join(parts)


def absent(listing: Listing) -> list[str]:
    """A line that names the classes without images, if there are any."""
    names = [name for name, count in zip(listing.classes, listing.counts(), strict=True) if not count]
    what = f"{len(names)} of {len(listing.classes)} classes {'have' if len(names) > 1 else 'has'} no image"
    return [f"{listing.split}: {what}: {quoted(names)}"] if names else []


def scan_splits(root: str | os.PathLike) -> tuple[ImageFolder, ImageFolder]:
    """List `train` and `val` with the class indices of `train`; `val` may lack classes, but not add any.

    Raises:
        UserError: as `scan`.
    """
    train = scan(root, "train")
    return train, scan(root, "val", train.classes)


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _class_folders(folder: Path, left_out: dict[str, list[str]]) -> tuple[list[str], list[str]]:
    """The names of a split's class folders, sorted, and of its other files. A broken link without an extension counts
    as a class folder: a class must not vanish."""
    names, files = [], []
    for entry in os.scandir(folder):
        if entry.is_symlink() and not os.path.exists(entry.path):
            if entry.name.startswith(".") or _extension(entry.name):
                left_out.setdefault(BROKEN, []).append(entry.name)
            else:
                names.append(entry.name)
        elif entry.is_dir():
            if entry.name.startswith("."):
                left_out.setdefault(HIDDEN, []).append(entry.name)
            else:
                names.append(entry.name)
        elif not entry.name.startswith("."):
            files.append(entry.name)
    return sorted(names, key=place_of), files


def place_of(name: str) -> tuple[str, str]:
    """What names are sorted by: the same order however accents are coded."""
    return canonical(name), name


def _refuse_extra_level(folder: Path, names: Sequence[str], known: Collection[str]) -> None:
    """Raise UserError if the only folder in a split holds folders and no images: those are the classes."""
    if len(names) > 1 or canonical(names[0]) in known or not (folder / names[0]).is_dir():
        return
    inner, files = _class_folders(folder / names[0], {})
    if inner and not any(map(_is_image, files)):
        raise UserError(
            f"{folder}: holds one folder, {visible(names[0])}, and that holds {quoted(inner)}: if these are the "
            f"classes, move them up: {folder}/{visible(inner[0])}"
        )


def _meant(root: Path, split: str) -> str:
    """Advice on the folder that was probably meant by one that lacks a split; "" if there is none."""
    if root.name in ("train", "val") and (root.parent / split).is_dir():
        return f"did you mean {root.parent}, the folder that holds {split!r}? "
    for name in _folders(root):
        if (root / name / "train").is_dir() and (root / name / split).is_dir():
            return f"did you mean {root / name}? "
    names = {"train": ("training",), "val": ("validation", "valid", "test", "testing", "dev")}.get(split, ())
    close = [name for name in _folders(root) if name.lower() in (split.lower(), *names)]
    return f"is it {root / close[0]}? Rename it to {split!r}; " if close else ""


def _extension(file: str) -> str:
    return os.path.splitext(file)[1].lower()


def _is_image(file: str) -> bool:
    return _extension(file) in IMAGE_EXTENSIONS


# Reasons, besides a file's extension, to leave something out.
LOOSE = "image(s) in no class folder"
HIDDEN = "folder(s) with a leading dot"
HIDDEN_IMAGE = "image(s) with a leading dot"
BROKEN = "broken link(s)"
UNREADABLE = "folder(s) that cannot be read"
AGAIN = "link(s) to folders that are listed already"


# By hand: os.walk hides what cannot be read, and does not tell broken links from files without a look at each.
def walk(folder: str, prefix: str, visited: set[str], left_out: dict[str, list[str]]) -> Iterator[str]:
    """Non-hidden files below a folder, as `prefix` and their path below it, with forward slashes; follows symlinks,
    each target once. What is passed over is noted in `left_out`, by reason."""
    real = os.path.realpath(folder)
    if real in visited:
        left_out.setdefault(AGAIN, []).append(prefix[:-1])
        return
    visited.add(real)
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        left_out.setdefault(UNREADABLE, []).append(f"{prefix[:-1]}: {error.strerror}")
        return
    for entry in entries:
        name = prefix + entry.name
        broken = entry.is_symlink() and not os.path.exists(entry.path)
        if not broken and entry.is_dir():
            if entry.name.startswith("."):
                left_out.setdefault(HIDDEN, []).append(name)
            else:
                yield from walk(entry.path, f"{name}/", visited, left_out)
        elif entry.name.startswith("."):
            if _is_image(entry.name):
                left_out.setdefault(HIDDEN_IMAGE, []).append(name)
        elif broken:
            left_out.setdefault(BROKEN, []).append(name)
        else:
            yield name


def bad_image(error: UserError) -> UserError:
    """Add the remedies to an unreadable image's error."""
    if isinstance(error, StalledError):
        return error
    return UserError(f"{error}; repair or remove it, or pass --bad-images skip")


class Sample(NamedTuple):
    """A transformed image (or None, and the reason), its class index, and its index in the data set.

    Data sets of other tasks have other targets.
    """

    image: Any
    target: Any
    index: int  # type: ignore[assignment]  # shadows tuple.index
    skipped: str | None = None


class Batch(NamedTuple):
    """A collated batch of the readable images.

    Attributes:
        image: (B, ...) tensor; of shape (0,) if no image is readable.
        target: (B,) int64 class indices.
        index: (B,) int64 indices in the data set.
        skipped: one line per skipped image with the file and the reason.
    """

    image: Any
    target: torch.Tensor
    index: torch.Tensor  # type: ignore[assignment]
    skipped: tuple[str, ...]


class ImageFolderDataset(Dataset):
    """The images of a listing, transformed.

    `dataset[i]` or `dataset[epoch, i]` gives a `Sample`. While the transform runs, the global generators of `random`,
    NumPy and torch (CPU) are seeded from (seed, epoch, i) and restored afterwards (except for the cached second normal
    deviate of NumPy's legacy functions).

    Args:
        listing: from `scan` or `shards.open_split`.
        transform: a callable on a PIL image of mode RGB.
        seed: for the transform's random numbers.
        bad_images: `"stop"` raises a UserError on an unreadable image; `"skip"` gives a `Sample` without an image,
            which `collate` leaves out of the batch. It is not replaced by another image.
    """

    def __init__(
        self,
        listing: Listing,
        transform: Callable | None = None,
        *,
        seed: int = 0,
        bad_images: str = "stop",
    ):
        if bad_images not in ("stop", "skip"):
            raise UserError(f"bad_images must be 'stop' or 'skip', got {bad_images!r}")
        self.listing = listing
        self.transform = transform
        self.seed = seed
        self.bad_images = bad_images
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch for integer indices. It does not reach persistent workers: use `EpochSampler` with them."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.listing)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[int | tuple[int, int]]) -> list[Sample]:
        """Read a batch, as DataLoader requests it: remote shards fetch it in one call."""
        pairs = [key if isinstance(key, tuple) else (self.epoch, key) for key in keys]
        images = self.listing.read_many([index for _, index in pairs])
        return [self._sample(epoch, index, image) for (epoch, index), image in zip(pairs, images, strict=True)]

    def _sample(self, epoch: int, index: int, image: Image.Image | UserError) -> Sample:
        target = self.listing.targets[index]
        if isinstance(image, UserError):
            if self.bad_images == "skip" and not isinstance(image, StalledError):
                return Sample(None, target, index, str(image))
            raise bad_image(image) from image
        pixels: Any = image
        if self.transform is not None:
            with seeded(self.seed, epoch, index):
                pixels = self.transform(image)
        return Sample(pixels, target, index)


def collate(samples: Sequence[Sample]) -> Batch:
    """Collate the readable samples; the others are listed in `batch.skipped`."""
    readable = [sample for sample in samples if sample.skipped is None]
    return Batch(
        default_collate([sample.image for sample in readable]) if readable else torch.empty(0),
        torch.tensor([sample.target for sample in readable], dtype=torch.int64),
        torch.tensor([sample.index for sample in readable], dtype=torch.int64),
        tuple(sample.skipped for sample in samples if sample.skipped is not None),
    )


#: The bit generator of NumPy's global functions within `seeded`.
_SPARE = np.random.MT19937()


@contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """Seed `random`, `numpy.random` and torch's CPU generator from integers >= 0, and restore them afterwards."""
    words = np.random.SeedSequence(entropy).generate_state(3).tolist()
    states = random.getstate(), np.random.get_bit_generator(), torch.get_rng_state()  # type: ignore[attr-defined]
    random.seed(words[0])
    # Swap NumPy's generator: copying and restoring its state takes three times as long as everything else here.
    np.random.set_bit_generator(_SPARE if states[1] is not _SPARE else np.random.MT19937())  # type: ignore[attr-defined]
    np.random.seed(words[1])  # noqa: NPY002
    torch.random.default_generator.manual_seed(words[2])  # torch.manual_seed would also reset the accelerators
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_bit_generator(states[1])  # type: ignore[attr-defined]
        torch.set_rng_state(states[2])


# By hand: torch's DistributedSampler cannot resume mid-epoch, and in evaluation repeats images to give all ranks the
# same number. Here the position follows from (seed, epoch, batch), so no sampler state is stored.
class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) as a function of (seed, epoch), split over ranks: a DataLoader `batch_sampler`.

    In training, every epoch is a permutation cut into global batches of `batch_size * world`, of which rank r takes
    every world-th image from the r-th on. An incomplete last global batch is dropped (a smaller data set is repeated to
    fill one), so all ranks have the same number of batches. In evaluation the order is that of the data set, rank r
    takes every world-th image, and nothing is dropped or repeated: ranks may differ by one batch.

    With `balance`, every class gets the same number of places in a training epoch, of as many places as there are
    images: of a common class some images are left out, those of a rare one repeat. A repetition comes as (epoch +
    REPEAT * n, index), so that it is augmented differently.

    Args:
        length: number of images.
        batch_size: images per batch on this rank.
        train: shuffle and drop incomplete batches, or yield everything once in order.
        seed: for the permutations.
        rank, world: this process's index, and the number of processes.
        balance: in training, the class index of each image, to draw all classes equally often.
    """

    REPEAT = 2**20

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        train: bool,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        epoch: int = 0,
        balance: Sequence[int] | None = None,
    ):
        if length < 1 or batch_size < 1 or not 0 <= rank < world:
            raise ValueError(f"got length {length}, batch_size {batch_size}, rank {rank} of {world}")
        self.length, self.batch_size, self.train, self.seed = length, batch_size, train, seed
        self.rank, self.world, self.epoch = rank, world, epoch
        self._resume = (epoch, 0)
        self._by_class: list[np.ndarray] = []
        if balance is not None:
            targets = np.asarray(balance, dtype=np.int64)
            self._by_class = [np.flatnonzero(targets == label) for label in np.unique(targets)]

    @property
    def sampler(self) -> EpochSampler:
        """Itself: Lightning calls `set_epoch` on `loader.batch_sampler.sampler`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self.epoch = epoch

    def resume_at(self, epoch: int, batch: int) -> None:
        """Resume mid-epoch: epoch `epoch` starts at batch `batch`, counted from 0; other epochs are complete."""
        if not 0 <= batch <= len(self):
            raise ValueError(f"batch {batch} of an epoch that has {len(self)}")
        self.epoch = epoch
        self._resume = (epoch, batch)

    def __len__(self) -> int:
        """Batches per full epoch on this rank, regardless of `resume_at`."""
        if self.train:
            return max(1, self.length // (self.batch_size * self.world))
        return -(-len(range(self.rank, self.length, self.world)) // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, repeats = self.epoch, np.zeros(self.length, dtype=np.int64)
        if self.train:
            generator = np.random.default_rng((self.seed, epoch))
            if self._by_class:
                order, repeats = self._balanced(generator)
            else:
                order = generator.permutation(self.length)
            places = len(self) * self.batch_size * self.world
            order, repeats = np.resize(order, places), np.resize(repeats, places)
        else:
            order = np.arange(self.length)
        mine, again = order[self.rank :: self.world].tolist(), repeats[self.rank :: self.world].tolist()
        first = self._resume[1] if epoch == self._resume[0] else 0
        for start in range(first * self.batch_size, len(mine), self.batch_size):
            part = slice(start, start + self.batch_size)
            yield [(epoch + self.REPEAT * n, index) for n, index in zip(again[part], mine[part], strict=True)]

    def _balanced(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """An epoch's order with all classes equally often, and for each place how often its image came before."""
        share, rest = divmod(self.length, len(self._by_class))
        extra = np.zeros(len(self._by_class), dtype=np.int64)
        extra[generator.permutation(len(self._by_class))[:rest]] = 1
        indices, repeats = [], []
        for images, more in zip(self._by_class, extra.tolist(), strict=True):
            rounds = -(-(share + more) // len(images))
            indices.append(np.concatenate([generator.permutation(images) for _ in range(rounds)] or [images[:0]]))
            repeats.append(np.repeat(np.arange(rounds), len(images)))
            indices[-1], repeats[-1] = indices[-1][: share + more], repeats[-1][: share + more]
        mixed = generator.permutation(self.length)
        return np.concatenate(indices)[mixed], np.concatenate(repeats)[mixed]
