"""The ImageNet layout: `ROOT/train/CLASS/*.jpg`, `ROOT/val/CLASS/*.jpg`; listing, reading, resumable sampling.

What a sample looks like depends on (seed, epoch, index) alone, not on the number of workers or on what was read before.
The epoch travels to the workers with the index, so persistent workers see it too:

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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler, default_collate

from sgformer.core.errors import StalledError, UserError
from sgformer.data.image import IMAGE_EXTENSIONS, read_image


@dataclass(frozen=True)
class ImageFolder:
    """One split of an image folder, listed. Image `i` is `path(i)`, of class `classes[targets[i]]`.

    Attributes:
        root: the data set's folder.
        split: the split's folder below it, e.g. `"train"`.
        classes: class names; the position is the class index.
        paths: image paths relative to `folder`, with forward slashes, sorted by class index, then by name.
        targets: class index of each path.
        ignored: how many other files there are, by extension (hidden files are not counted).
        folder: what the paths are relative to; None: `root / split`.
    """

    root: Path
    split: str
    classes: tuple[str, ...]
    paths: tuple[str, ...]
    targets: tuple[int, ...]
    ignored: Counter[str] = field(default_factory=Counter)
    folder: Path | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> Path:
        """Where image `index` is."""
        return (self.folder or self.root / self.split) / self.paths[index]

    def counts(self) -> list[int]:
        """Images per class, in the order of `classes`."""
        return np.bincount(np.asarray(self.targets, dtype=np.int64), minlength=len(self.classes)).tolist()

    def read_bytes(self, indices: Sequence[int]) -> list[bytes | UserError]:
        """The files' bytes, or why there are none."""
        results: list[bytes | UserError] = []
        for path in map(self.path, indices):
            try:
                results.append(path.read_bytes())
            except OSError as error:
                results.append(UserError(f"{path}: {error.strerror or error}"))
        return results

    def read_many(self, indices: Sequence[int]) -> Iterator[Image.Image | UserError]:
        """The images, or why one cannot be read, in the order of `indices`."""
        for index in indices:
            try:
                yield read_image(self.path(index))
            except UserError as error:
                yield error


class Listing(Protocol):
    """What a data set needs to know of the images of a split; an `ImageFolder`, or a `ShardFolder` of tar shards."""

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
    def read_bytes(self, indices: Sequence[int]) -> list[bytes | UserError]: ...
    def read_many(self, indices: Sequence[int]) -> Iterator[Image.Image | UserError]: ...


def is_image_folder(root: str | os.PathLike) -> bool:
    """Whether there is a folder of a split in `root`."""
    return any((Path(root) / split).is_dir() for split in ("train", "val"))


def scan(root: str | os.PathLike, split: str = "train", classes: Sequence[str] | None = None) -> ImageFolder:
    """List one split of an image folder. No image is opened.

    Every folder below `root/split` is a class; images may lie in nested folders inside it. Hidden files and folders are
    passed over; files without an image's extension are left out and counted.

    Args:
        root: folder that holds the splits.
        split: `"train"` or `"val"`.
        classes: class names in the order of their indices, e.g. those of the training split or of a trained model; by
            default the folder names, sorted by code point.

    Raises:
        UserError: a folder is missing, a class has no image, or is not among `classes`.
    """
    listing, unknown, empty = list_split(root, split, classes)
    folder = listing.root / split
    if unknown:
        raise UserError(f"{folder}: classes that training does not know ({len(unknown)}): {some(unknown)}")
    if empty:
        raise UserError(f"{folder}: class folders without an image ({len(empty)}): {some(empty)}; fill or remove them")
    return listing


def list_split(
    root: str | os.PathLike, split: str, classes: Sequence[str] | None = None
) -> tuple[ImageFolder, list[str], list[str]]:
    """As `scan`, but tells of unusable class folders instead of raising.

    Returns:
        The listing, the folders that are not among `classes` (not listed), the class folders without an image.

    Raises:
        UserError: a folder is missing, or there is no class folder in it.
    """
    root = Path(root)
    folder = root / split
    layout = f"expected the ImageNet layout, {root}/train/CLASS/*.jpg and {root}/val/CLASS/*.jpg"
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; {layout}")
    if not folder.is_dir():
        raise UserError(f"{root}: no folder {split!r} in it (found: {some(_folders(root)) or 'no folder'}); {layout}")
    names = _folders(folder)
    if not names:
        raise UserError(f"{folder}: no class folder in it; {layout}")
    order = tuple(names if classes is None else classes)
    paths: list[str] = []
    targets: list[int] = []
    empty: list[str] = []
    ignored = Counter(_extension(file) for file in _files(folder, recurse=False))
    for index, name in enumerate(order):
        if name not in names:
            continue
        files = sorted(_files(folder / name))
        images = [file for file in files if _extension(file) in IMAGE_EXTENSIONS]
        ignored.update(extension for file in files if (extension := _extension(file)) not in IMAGE_EXTENSIONS)
        paths.extend(f"{name}/{image}" for image in images)
        targets.extend([index] * len(images))
        if not images:
            empty.append(name)
    unknown = sorted(set(names) - set(order))
    return ImageFolder(root, split, order, tuple(paths), tuple(targets), ignored), unknown, empty


def scan_splits(root: str | os.PathLike) -> tuple[ImageFolder, ImageFolder]:
    """List `train` and `val` with the class indices of `train`; `val` may lack a class, but have no new one.

    Raises:
        UserError: as `scan`.
    """
    train = scan(root, "train")
    return train, scan(root, "val", train.classes)


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _extension(file: str) -> str:
    return os.path.splitext(file)[1].lower()


def _files(folder: Path, recurse: bool = True) -> Iterator[str]:
    """Files below a folder that are not hidden, relative to it, with forward slashes; follows links, once."""
    seen: set[str] = set()
    for here, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        folders[:] = [name for name in folders if not name.startswith(".")] if recurse and real not in seen else []
        if real not in seen:
            prefix = Path(here).relative_to(folder).as_posix() + "/"
            yield from (prefix.removeprefix("./") + name for name in files if not name.startswith("."))
        seen.add(real)


def bad_image(error: UserError) -> UserError:
    """An unreadable image's error with what can be done about it."""
    if isinstance(error, StalledError):
        return error
    return UserError(f"{error}; repair or remove it, or pass --bad-images skip")


def some(names: Sequence[str], limit: int = 8) -> str:
    """At most `limit` names and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


class Sample(NamedTuple):
    """One read image: what the transform made of it (or None, and why), its class index, position in the data set.

    Data sets of other tasks have their own kind of target.
    """

    image: Any
    target: Any
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    skipped: str | None = None


class Batch(NamedTuple):
    """A collated batch of the images that could be read.

    Attributes:
        image: (B, ...) tensor; empty of shape (0,) if none could be read.
        target: (B,) int64 class indices.
        index: (B,) int64 positions in the data set.
        skipped: one line for every image left out, naming the file and the reason.
    """

    image: Any
    target: torch.Tensor
    index: torch.Tensor  # type: ignore[assignment]
    skipped: tuple[str, ...]


class ImageFolderDataset(Dataset):
    """The images of a listing, transformed.

    `dataset[i]` or `dataset[epoch, i]` gives a `Sample`. While the transform runs, the global generators of `random`,
    NumPy and torch (CPU) are seeded from (seed, epoch, i); afterwards they go on as before (NumPy's old
    functions forget the second of a pair of normal numbers).

    Args:
        listing: what `scan` returned, or `shards.open_split`.
        transform: any callable on a PIL image of mode RGB.
        seed: of the transform's randomness.
        bad_images: `"stop"` raises a UserError on an unreadable image; `"skip"` gives a `Sample` without an image,
            which `collate` leaves out of the batch. It is never replaced by another image.
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
            raise UserError(f"bad_images is 'stop' or 'skip', got {bad_images!r}")
        self.listing = listing
        self.transform = transform
        self.seed = seed
        self.bad_images = bad_images
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch of plain integer indices. Workers that live on do not hear of it: use `EpochSampler` with them."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.listing)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[int | tuple[int, int]]) -> list[Sample]:
        """A batch at once, as a DataLoader asks for it: shards that are far away read it together."""
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
    """Make a `Batch` of the samples that have an image; the others are named in `batch.skipped`."""
    good = [sample for sample in samples if sample.skipped is None]
    return Batch(
        default_collate([sample.image for sample in good]) if good else torch.empty(0),
        torch.tensor([sample.target for sample in good], dtype=torch.int64),
        torch.tensor([sample.index for sample in good], dtype=torch.int64),
        tuple(sample.skipped for sample in samples if sample.skipped is not None),
    )


#: What NumPy's global functions draw from within `seeded`.
_SPARE = np.random.MT19937()


@contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """Seed `random`, `numpy.random` and torch's CPU generator from some integers >= 0; put them back afterwards."""
    words = np.random.SeedSequence(entropy).generate_state(3).tolist()
    states = random.getstate(), np.random.get_bit_generator(), torch.get_rng_state()  # type: ignore[attr-defined]
    random.seed(words[0])
    # Another generator takes NumPy's place: to copy the state of one and put it back takes three times all the rest.
    np.random.set_bit_generator(_SPARE if states[1] is not _SPARE else np.random.MT19937())  # type: ignore[attr-defined]
    np.random.seed(words[1])  # noqa: NPY002
    torch.random.default_generator.manual_seed(words[2])  # torch.manual_seed would also reset the accelerators
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_bit_generator(states[1])  # type: ignore[attr-defined]
        torch.set_rng_state(states[2])


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) as a function of (seed, epoch), shared out over ranks: a DataLoader `batch_sampler`.

    For training, every epoch is a permutation cut into global batches of `batch_size * world`, of which rank r takes
    every world-th image from the r-th on; an incomplete last global batch is dropped (a data set smaller than one is
    repeated to fill it), so that all ranks have equally many batches. For evaluation the order is that of the data set,
    rank r takes every world-th image, and nothing is dropped or repeated: ranks may differ by one batch.

    Args:
        length: number of images.
        batch_size: images per batch on this rank.
        train: shuffle and keep batches complete, or read everything once in order.
        seed: of the permutations.
        rank, world: this process among all.
    """

    def __init__(
        self, length: int, batch_size: int, *, train: bool, seed: int = 0, rank: int = 0, world: int = 1, epoch: int = 0
    ):
        if length < 1 or batch_size < 1 or not 0 <= rank < world:
            raise ValueError(f"got length {length}, batch_size {batch_size}, rank {rank} of {world}")
        self.length, self.batch_size, self.train, self.seed = length, batch_size, train, seed
        self.rank, self.world, self.epoch = rank, world, epoch
        self._resume = (epoch, 0)

    @property
    def sampler(self) -> EpochSampler:
        """Itself: Lightning looks for `set_epoch` on `loader.batch_sampler.sampler`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration serves."""
        self.epoch = epoch

    def resume_at(self, epoch: int, batch: int) -> None:
        """Go on in the middle: epoch `epoch` starts with its batch number `batch` (from 0); other epochs are whole."""
        if not 0 <= batch <= len(self):
            raise ValueError(f"batch {batch} of an epoch that has {len(self)}")
        self.epoch = epoch
        self._resume = (epoch, batch)

    def __len__(self) -> int:
        """Batches of a whole epoch on this rank, also after `resume_at`."""
        if self.train:
            return max(1, self.length // (self.batch_size * self.world))
        return -(-len(range(self.rank, self.length, self.world)) // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        if self.train:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.length)
            order = np.resize(order, len(self) * self.batch_size * self.world)
        else:
            order = np.arange(self.length)
        mine = order[self.rank :: self.world].tolist()
        first = self._resume[1] if epoch == self._resume[0] else 0
        for start in range(first * self.batch_size, len(mine), self.batch_size):
            yield [(epoch, index) for index in mine[start : start + self.batch_size]]
