"""The ADE20K layout: `ROOT/images/{training,validation}/*.jpg`, `ROOT/annotations/{training,validation}/*.png`.

A label map is a PNG of one channel, as large as its image, whose values are classes: 8-bit or 16-bit grey, or a
palette (the values are then the indices; colours mean nothing). The value 255 is no class: such pixels count neither in
training nor in evaluation (in data sets of more than 255 labels, 65535 is). `reduce_zero_label` makes 0 such a
value too and shifts the others down by one, as is usual for ADE20K, whose 0 is "other".
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from sgformer.core.errors import StalledError, UserError
from sgformer.core.progress import track
from sgformer.data.dense_transforms import DenseTransform
from sgformer.data.image import IMAGE_EXTENSIONS, in_time, opened, read_image
from sgformer.data.imagefolder import EpochSampler, bad_image, seeded

LAYOUT = (
    "expected {root}/images/{{training,validation}}/NAME.jpg and {root}/annotations/{{training,validation}}/NAME.png"
)

#: Files that may hold the class names, the first one found counts.
NAME_FILES = ("classes.txt", "objectInfo150.txt")


def ignore_label(num_labels: int) -> int:
    """The value of pixels without a class, where files use the labels 0 to `num_labels - 1`: 255, or 65535 if taken."""
    return 255 if num_labels <= 255 else 65535


@dataclass(frozen=True)
class LabelledFolder:
    """One split, listed. Image `i` is `images[i]`, its label map `labels[i]`.

    Attributes:
        root: the data set's folder.
        split: "training" or "validation".
        classes: names; the position is the class index.
        images, labels: files, sorted.
        reduce_zero_label: whether label 0 is no class and label n is class n - 1.
    """

    root: Path
    split: str
    classes: tuple[str, ...]
    images: tuple[Path, ...]
    labels: tuple[Path, ...]
    reduce_zero_label: bool = False

    def __len__(self) -> int:
        return len(self.images)

    def path(self, index: int) -> Path:
        """Where image `index` is."""
        return self.images[index]

    @property
    def ignore(self) -> int:
        """The class index of pixels without a class."""
        return ignore_label(len(self.classes) + self.reduce_zero_label)

    def class_indices(self, index: int, values: np.ndarray | None = None) -> np.ndarray:
        """Class indices (H, W) int64 of an image, `ignore` where there is no class.

        Args:
            index: of the image.
            values: what `read_label_map` gave for its label map; by default the file is read.

        Raises:
            UserError: the file is no label map, or has a label beyond the classes; names it.
        """
        path = self.labels[index]
        values = (read_label_map(path) if values is None else values).astype(np.int64)
        none = values == self.ignore
        if self.reduce_zero_label:
            none |= values == 0
            values -= 1
        wrong = (values >= len(self.classes)) & ~none
        if wrong.any():
            row, column = np.argwhere(wrong)[0].tolist()
            first = int(self.reduce_zero_label)
            raise UserError(
                f"{path}: label {int(values[row, column]) + first} at row {row}, column {column}, but labels of the "
                f"{len(self.classes)} classes are {first} to {len(self.classes) - 1 + first} ({self.ignore}: no class)"
            )
        values[none] = self.ignore
        return values


def scan(
    root: str | os.PathLike[str],
    split: str = "training",
    classes: int | Sequence[str] | None = None,
    reduce_zero_label: bool = False,
) -> LabelledFolder:
    """List one split. Files are read only if the number of classes has to be found out from the label maps.

    Args:
        root: folder that holds `images` and `annotations`.
        split: subfolder of both.
        classes: number of classes, or their names; by default those of `classes.txt` or `objectInfo150.txt` in `root`,
            or else as many as the highest label in the split says.
        reduce_zero_label: take label 0 for "no class" and n for class n - 1.

    Raises:
        UserError: a folder is missing or empty, an image has no label map or the other way round, or the class names
            do not fit; the message names the files.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; {LAYOUT.format(root=root)}")
    found = {}
    for kind, extensions in (("images", IMAGE_EXTENSIONS), ("annotations", {".png"})):
        folder = root / kind / split
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; {LAYOUT.format(root=root)}")
        found[kind] = _by_stem(folder, extensions)
    images, labels = found["images"], found["annotations"]
    if not images and not labels:
        raise UserError(f"{root / 'images' / split}: no images in it; {LAYOUT.format(root=root)}")
    for one, other, what in ((images, labels, "label map"), (labels, images, "image")):
        if alone := [str(one[stem]) for stem in one if stem not in other]:
            more = f" and {len(alone) - 5} more" if len(alone) > 5 else ""
            raise UserError(f"no {what} for {', '.join(alone[:5])}{more}; add them, or remove the files without")
    order = sorted(images)
    paths = tuple(labels[stem] for stem in order)
    if classes is None or isinstance(classes, int):
        classes = _class_names(root, paths, classes, reduce_zero_label)
    return LabelledFolder(root, split, tuple(classes), tuple(images[s] for s in order), paths, reduce_zero_label)


def _by_stem(folder: Path, extensions: frozenset[str] | set[str]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in extensions and not path.name.startswith("."):
            stem = path.relative_to(folder).with_suffix("").as_posix()
            if stem in files:
                raise UserError(f"{files[stem]} and {path.name} have one name: keep only one of them")
            files[stem] = path
    return files


def _class_names(root: Path, labels: Sequence[Path], count: int | None, reduce_zero: bool) -> list[str]:
    source = next((root / name for name in NAME_FILES if (root / name).is_file()), None)
    if source is not None:
        names = read_class_names(source, reduce_zero)
        if count is not None and count != len(names):
            raise UserError(f"{source} has {len(names)} classes, --classes is {count}")
        return names
    if count is None:
        none = (255, 65535)
        maps = (read_label_map(path) for path in labels)
        tops = (int(m[~np.isin(m, none)].max(initial=0)) for m in maps)
        count = max(track(tops, len(labels), "looking for the highest label")) + 1 - reduce_zero
        if count < 1:
            raise UserError(f"{root}: the label maps hold nothing but 0, which --reduce-zero-label takes for no class")
    return [str(i + reduce_zero) for i in range(count)]


def read_class_names(path: str | os.PathLike[str], reduce_zero_label: bool = False) -> list[str]:
    """Class names in the order of their indices.

    The file has one name per line, in order; or columns under a header that begins with `Idx` and ends with `Name`,
    tabs between (ADE20K's `objectInfo150.txt`), where `Idx` is the label. Of several names (`floor, flooring`) the
    first counts. In such a table label 0 need not be named: it is "background".

    Raises:
        UserError: unreadable, or labels are missing or double in the table.
    """
    path = Path(path)
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as UTF-8 text ({error})") from None
    if not lines or not lines[0].lower().startswith("idx"):
        if not lines:
            raise UserError(f"{path}: no class names in it")
        return [line.strip() for line in lines]
    table: dict[int, str] = {}
    for line in lines[1:]:
        label, *_, names = line.split("\t")
        if not label.strip().isdigit() or int(label) in table:
            raise UserError(f"{path}: expected a new label and a name, with a tab between, got {line.strip()!r}")
        table[int(label)] = names.split(";")[0].split(",")[0].strip()
    if not reduce_zero_label:
        table.setdefault(0, "background")
    first = int(reduce_zero_label)
    table.pop(first - 1, None)
    wanted = range(first, first + len(table))
    if not table or sorted(table) != list(wanted):
        missing = ", ".join(str(label) for label in sorted(set(wanted) - set(table))[:8])
        raise UserError(f"{path}: labels have to run from {first} without a gap; missing: {missing or 'all'}")
    return [table[label] for label in wanted]


def read_label_map(path: str | os.PathLike[str]) -> np.ndarray:
    """The values of a label map as they stand in the file: (H, W) uint8 or uint16 (or wider); palette indices as such.

    Raises:
        UserError: unreadable, or more than one channel.
    """
    rawmode, mode, values = in_time(lambda: _stored_values(path), path)
    if mode not in ("1", "L", "P") and not mode.startswith("I"):
        raise UserError(f"{path}: a label map has one channel whose values are classes; this one is {mode}")
    # Pillow stretches grey values of 2 and 4 bits to the full range: undo it.
    values = values // {"L;2": 85, "L;4": 17}.get(rawmode, 1)
    if values.min(initial=0) < 0:
        raise UserError(f"{path}: a label map has no negative values")
    return values.astype(np.uint8) if mode == "1" else values


def _stored_values(path: str | os.PathLike[str]) -> tuple[str, str, np.ndarray]:
    """How Pillow unpacks the file's pixels, what it makes of them, and those."""
    with opened(path, None) as image:
        rawmode = image.tile[0][3] if image.tile else ""  # type: ignore[attr-defined]
        image.load()
        return rawmode if isinstance(rawmode, str) else "", image.mode, np.asarray(image)


class DenseSample(NamedTuple):
    """An image and its class indices as the transform left them (or None, and why), and its place in the data set."""

    image: torch.Tensor | None
    target: torch.Tensor | None
    index: int  # type: ignore[assignment]
    skipped: str | None = None


class DenseBatch(NamedTuple):
    """Those samples of a batch that could be read.

    Attributes:
        image: (B, 3, H, W) float32, or a list of (3, H, W) of any sizes.
        target: (B, H, W) int64 class indices, or a list of (H, W).
        index: (B,) int64 positions in the data set.
        skipped: one line for every sample left out, naming the file and the reason.
    """

    image: torch.Tensor | list[torch.Tensor]
    target: torch.Tensor | list[torch.Tensor]
    index: torch.Tensor  # type: ignore[assignment]
    skipped: tuple[str, ...]


class LabelledFolderDataset(Dataset):
    """The images and label maps of a listing, transformed together.

    `dataset[i]` or `dataset[epoch, i]` gives a `DenseSample`. While the transform runs, the global generators are
    seeded from (seed, epoch, i).

    Args:
        listing: what `scan` returned.
        transform: see `sgformer.data.dense_transforms`.
        seed: of the transform's randomness.
        bad_images: "stop" raises a UserError at an unreadable file or a pair of different sizes; "skip" leaves it out
            of the batch. A label beyond the classes always stops: it is a mistake in the settings, not in one file.
    """

    def __init__(self, listing: LabelledFolder, transform: DenseTransform, *, seed: int = 0, bad_images: str = "stop"):
        if bad_images not in ("stop", "skip"):
            raise UserError(f"bad_images is 'stop' or 'skip', got {bad_images!r}")
        self.listing, self.transform, self.seed, self.bad_images = listing, transform, seed, bad_images

    def __len__(self) -> int:
        return len(self.listing)

    def __getitem__(self, key: int | tuple[int, int]) -> DenseSample:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        path, label_path = self.listing.images[index], self.listing.labels[index]
        try:
            image, values = read_image(path), read_label_map(label_path)
            if image.size != values.shape[::-1]:
                wide, high = values.shape[::-1]
                raise UserError(f"{label_path}: {wide} x {high} pixels, but {path} has {image.width} x {image.height}")
        except UserError as error:
            if self.bad_images == "skip" and not isinstance(error, StalledError):
                return DenseSample(None, None, index, str(error))
            raise bad_image(error) from error
        labels = self.listing.class_indices(index, values)
        with seeded(self.seed, epoch, index):
            return DenseSample(*self.transform(image, labels), index)


def collate(samples: Sequence[DenseSample]) -> DenseBatch:
    """Stack samples of one size, those of a training crop."""
    batch = collate_sizes(samples)
    if not len(batch.index):
        return batch._replace(image=torch.empty(0), target=torch.empty(0))
    return batch._replace(image=torch.stack(list(batch.image)), target=torch.stack(list(batch.target)))


def collate_sizes(samples: Sequence[DenseSample]) -> DenseBatch:
    """Keep samples of any sizes as lists."""
    good = [s for s in samples if s.image is not None and s.target is not None]
    return DenseBatch(
        [s.image for s in good],  # type: ignore[misc]
        [s.target for s in good],  # type: ignore[misc]
        torch.tensor([s.index for s in good], dtype=torch.int64),
        tuple(s.skipped for s in samples if s.skipped is not None),
    )


class StepSampler(EpochSampler):
    """Training batches counted in steps, not in passes: an endless row of permutations, cut into rounds.

    Where `EpochSampler` has an epoch, this has a round of `steps` batches, which may be less or much more than a pass
    over the data: the last batch of one pass is filled up from the next. Pairs are (pass, index), so every appearance
    of an image is augmented anew. Global batch k holds the row's places k * batch_size * world and following.

    Args:
        length: number of images.
        batch_size: images per batch on this rank.
        steps: batches per round.
        seed: of the permutations.
        rank, world: this process among all.
    """

    def __init__(self, length: int, batch_size: int, steps: int, *, seed: int = 0, rank: int = 0, world: int = 1):
        super().__init__(length, batch_size, train=True, seed=seed, rank=rank, world=world)
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first = self._resume[1] if self.epoch == self._resume[0] else 0
        start, together = self.epoch * self.steps, self.batch_size * self.world
        current, order = -1, np.empty(0, dtype=np.int64)
        for batch in range(start + first, start + self.steps):
            pairs = []
            for place in range(batch * together + self.rank, (batch + 1) * together, self.world):
                turn, position = divmod(place, self.length)
                if turn != current:
                    current, order = turn, np.random.default_rng((self.seed, turn)).permutation(self.length)
                pairs.append((turn, int(order[position])))
            yield pairs
