"""The ADE20K layout: `ROOT/images/{training,validation}/*.jpg`, `ROOT/annotations/{training,validation}/*.png`.

A label map is a PNG of one channel, as large as its image, whose values are classes: 8-bit or 16-bit grey, or a
palette (whose indices are then the classes; colours are ignored). The value 255 (65535 in data sets of more than 255
labels) means no class: such pixels are ignored in training and evaluation. `reduce_zero_label` also ignores 0 and
shifts the other labels down by one, the convention for ADE20K, whose 0 is "other".
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from sgformer.core.errors import StalledError, UserError
from sgformer.core.names import canonical
from sgformer.core.parse import MAX_SMALL, read_bytes
from sgformer.core.progress import track
from sgformer.data.dense_transforms import DenseTransform
from sgformer.data.identity import class_differences
from sgformer.data.image import IMAGE_EXTENSIONS, in_time, looked_at, read_image
from sgformer.data.imagefolder import EpochSampler, bad_image, place_of, seeded, walk
from sgformer.data.layouts import hint

LAYOUT = (
    "expected {root}/images/{{training,validation}}/NAME.jpg and {root}/annotations/{{training,validation}}/NAME.png"
)

#: Files with class names, in order of precedence.
NAME_FILES = ("classes.txt", "objectInfo150.txt")


def ignore_label(num_labels: int) -> int:
    """The value for "no class" if files use the labels 0 to `num_labels - 1`: 255, or 65535 if 255 is a label."""
    return 255 if num_labels <= 255 else 65535


@dataclass(frozen=True)
class LabelledFolder:
    """The listing of a split. Image `i` is `images[i]`, its label map `labels[i]`.

    Attributes:
        root: the data set's folder.
        split: "training" or "validation".
        classes: names; the position is the class index.
        images, labels: files, sorted.
        reduce_zero_label: whether label 0 means no class and label n is class n - 1.
        named: whether the number of classes was given, and not inferred from the labels.
        binary: whether the files hold 0 and 255 for the two classes, see `label_values.check_values`.
        ignored, left_out: as of `imagefolder.ImageFolder`.
    """

    root: Path
    split: str
    classes: tuple[str, ...]
    images: tuple[Path, ...]
    labels: tuple[Path, ...]
    reduce_zero_label: bool = False
    named: bool = True
    binary: bool = False
    ignored: Counter[str] = field(default_factory=Counter)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    def path(self, index: int) -> Path:
        """The path of image `index`."""
        return self.images[index]

    def entries(self) -> list[tuple[str, str]]:
        """The name of each image; see `data.identity`."""
        folder = self.root / "images"
        return [(path.relative_to(folder).as_posix(), "") for path in self.images]

    @property
    def ignore(self) -> int:
        """The class index of pixels without a class."""
        return ignore_label(len(self.classes) + self.reduce_zero_label)

    def class_indices(self, index: int, values: np.ndarray | None = None) -> np.ndarray:
        """Class indices (H, W) int64 of an image; `ignore` for no class.

        Args:
            index: the image's index.
            values: its label map from `read_label_map`; by default the file is read.

        Raises:
            UserError: the file is not a label map, or has an out-of-range label; names it.
        """
        path = self.labels[index]
        values = (read_label_map(path) if values is None else values).astype(np.int64)
        if self.binary:
            if (wrong := (values != 0) & (values != 255)).any():
                row, column = np.argwhere(wrong)[0].tolist()
                raise UserError(
                    f"{path}: value {int(values[row, column])} at row {row}, column {column}, but these masks hold 0 "
                    "and 255 for two classes; is its edge anti-aliased?"
                )
            return values // 255
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
    """List a split. Files are read only if the number of classes has to be inferred from the label maps.

    Args:
        root: folder that holds `images` and `annotations`.
        split: subfolder of both.
        classes: number of classes, or their names, which a file of names in `root` must agree with; by default those
            of `classes.txt` or `objectInfo150.txt` in `root`, or else inferred from the highest label in the split.
        reduce_zero_label: treat label 0 as "no class" and n as class n - 1.

    Raises:
        UserError: a folder is missing or empty, an image has no label map or vice versa, or the class names do not
            match `classes`; names the files.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; {_expected(root)}")
    files = {}
    ignored: Counter[str] = Counter()
    left_out: dict[str, list[str]] = {}
    for kind, extensions in (("images", IMAGE_EXTENSIONS), ("annotations", frozenset([".png"]))):
        folder = root / kind / split
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; {_expected(root)}")
        files[kind] = _by_stem(folder, extensions, f"{kind}/", ignored, left_out)
    images, labels = files["images"], files["annotations"]
    if not images and not labels:
        raise UserError(f"{root / 'images' / split}: no images in it; {_expected(root)}")
    for one, other, what in ((images, labels, "label map"), (labels, images, "image")):
        if unpaired := [str(one[stem]) for stem in one if stem not in other]:
            more = f" and {len(unpaired) - 5} more" if len(unpaired) > 5 else ""
            raise UserError(f"no {what} for {', '.join(unpaired[:5])}{more}; add them, or remove these files")
    order = sorted(images)
    paths = tuple(labels[stem] for stem in order)
    named = classes is not None or _names_file(root) is not None
    if classes is None or isinstance(classes, int):
        classes = _class_names(root, paths, classes, reduce_zero_label)
    elif source := _names_file(root):
        names = read_class_names(source, reduce_zero_label)
        unnamed = list(classes) == [str(i + reduce_zero_label) for i in range(len(names))]
        if not unnamed and (differing := class_differences(classes, names)):
            raise UserError(f"{source}: not the classes of the training; {'; '.join(differing)}")
    return LabelledFolder(
        root,
        split,
        tuple(classes),
        tuple(images[s] for s in order),
        paths,
        reduce_zero_label,
        named,
        ignored=ignored,
        left_out=left_out,
    )


def _expected(root: Path) -> str:
    says = hint(root, "ade20k")
    return LAYOUT.format(root=root) + (f"; {says}" if says else "")


def _by_stem(
    folder: Path, extensions: frozenset[str], place: str, ignored: Counter[str], left_out: dict[str, list[str]]
) -> dict[str, Path]:
    """The files with these extensions by stem, which pairs them; the others go to `ignored` and `left_out`."""
    files: dict[str, Path] = {}
    for name in sorted(walk(str(folder), place, set(), left_out), key=place_of):
        path = folder / name.removeprefix(place)
        if path.suffix.lower() not in extensions:
            ignored[path.suffix.lower()] += 1
            continue
        stem = canonical(path.relative_to(folder).with_suffix("").as_posix())
        if stem in files:
            raise UserError(f"{files[stem]} and {path.name} have the same stem: keep only one of them")
        files[stem] = path
    return files


def _names_file(root: Path) -> Path | None:
    return next((root / name for name in NAME_FILES if (root / name).is_file()), None)


def _class_names(root: Path, labels: Sequence[Path], count: int | None, reduce_zero: bool) -> list[str]:
    source = _names_file(root)
    if source is not None:
        names = read_class_names(source, reduce_zero)
        if count is not None and count != len(names):
            raise UserError(f"{source} has {len(names)} classes, --classes is {count}")
        return names
    if count is None:
        none = (255, 65535)
        maps = (read_label_map(path) for path in labels)
        highest = (int(m[~np.isin(m, none)].max(initial=0)) for m in maps)
        count = max(track(highest, len(labels), "finding the highest label")) + 1 - reduce_zero
        if count < 1:
            raise UserError(f"{root}: the label maps hold only 0, which --reduce-zero-label ignores")
    return [str(i + reduce_zero) for i in range(count)]


def read_class_names(path: str | os.PathLike[str], reduce_zero_label: bool = False) -> list[str]:
    """Read class names in index order.

    The file has one name per line, quoted or not; or tab-separated columns under a header that starts with `Idx`, the
    label, and ends with `Name` (ADE20K's `objectInfo150.txt`). Of several names (`floor, flooring`) the first is used.
    Such a table may omit label 0, which is then "background".

    Raises:
        UserError: the file is unreadable, or the table lacks or repeats a label.
    """
    path = Path(path)
    try:
        lines = [line for line in read_bytes(path, MAX_SMALL).decode("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not readable as UTF-8 text ({error})") from None
    if not lines or not lines[0].lower().startswith("idx"):
        if not lines:
            raise UserError(f"{path}: no class names in it")
        return [_unquoted(line.strip()) for line in lines]
    table: dict[int, str] = {}
    for line in lines[1:]:
        label, *_, names = line.split("\t")
        if not label.strip().isdecimal() or len(label) > 9 or int(label) in table:
            raise UserError(f"{path}: expected a new label and a name, separated by a tab, got {line.strip()!r}")
        table[int(label)] = names.split(";")[0].split(",")[0].strip()
    if not reduce_zero_label:
        table.setdefault(0, "background")
    first = int(reduce_zero_label)
    table.pop(first - 1, None)
    wanted = range(first, first + len(table))
    if not table or sorted(table) != list(wanted):
        missing = ", ".join(str(label) for label in sorted(set(wanted) - set(table))[:8])
        raise UserError(f"{path}: labels must be consecutive from {first}; missing: {missing or 'all'}")
    return [table[label] for label in wanted]


def _unquoted(name: str) -> str:
    """A name without the pair of quotes around it."""
    return name[1:-1] if len(name) > 2 and name[0] == name[-1] and name[0] in "\"'" else name


def read_label_map(path: str | os.PathLike[str]) -> np.ndarray:
    """Read a label map's stored values: (H, W) uint8, uint16 or wider; of a palette image, the indices.

    Raises:
        UserError: the file is unreadable, or has more than one channel or negative values.
    """
    rawmode, mode, values = in_time(lambda: _stored_values(path), path)
    if mode not in ("1", "L", "P") and not mode.startswith("I"):
        raise UserError(f"{path}: a label map must have one channel of class values; this one is {mode}")
    # Pillow scales 2-bit and 4-bit grey values to the full range: undo it.
    values = values // {"L;2": 85, "L;4": 17}.get(rawmode, 1)
    if values.min(initial=0) < 0:
        raise UserError(f"{path}: a label map must not have negative values")
    return values.astype(np.uint8) if mode == "1" else values


def _stored_values(path: str | os.PathLike[str]) -> tuple[str, str, np.ndarray]:
    """The file's raw mode, Pillow's mode, and the pixel values."""
    return looked_at(_values, path, None)


def _values(image: Image.Image) -> tuple[str, str, np.ndarray]:
    rawmode = image.tile[0][3] if image.tile else ""  # type: ignore[attr-defined]
    image.load()
    return rawmode if isinstance(rawmode, str) else "", image.mode, np.asarray(image)


class DenseSample(NamedTuple):
    """A transformed image and its class indices (or None, and the reason), and its index in the data set."""

    image: torch.Tensor | None
    target: torch.Tensor | None
    index: int  # type: ignore[assignment]
    skipped: str | None = None


class DenseBatch(NamedTuple):
    """The readable samples of a batch.

    Attributes:
        image: (B, 3, H, W) float32, or a list of (3, H, W) of different sizes.
        target: (B, H, W) int64 class indices, or a list of (H, W).
        index: (B,) int64 indices in the data set.
        skipped: one line per skipped sample with the file and the reason.
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
        listing: from `scan`.
        transform: see `sgformer.data.dense_transforms`.
        seed: for the transform's random numbers.
        bad_images: "stop" raises a UserError at an unreadable file or a pair of different sizes; "skip" leaves it out
            of the batch. An out-of-range label always raises: it indicates wrong settings, not a bad file.
    """

    def __init__(self, listing: LabelledFolder, transform: DenseTransform, *, seed: int = 0, bad_images: str = "stop"):
        if bad_images not in ("stop", "skip"):
            raise UserError(f"bad_images must be 'stop' or 'skip', got {bad_images!r}")
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
    """Stack samples of equal size, i.e. training crops."""
    batch = collate_sizes(samples)
    if not len(batch.index):
        return batch._replace(image=torch.empty(0), target=torch.empty(0))
    return batch._replace(image=torch.stack(list(batch.image)), target=torch.stack(list(batch.target)))


def collate_sizes(samples: Sequence[DenseSample]) -> DenseBatch:
    """Collate samples of different sizes to lists."""
    readable = [s for s in samples if s.image is not None and s.target is not None]
    return DenseBatch(
        [s.image for s in readable],  # type: ignore[misc]
        [s.target for s in readable],  # type: ignore[misc]
        torch.tensor([s.index for s in readable], dtype=torch.int64),
        tuple(s.skipped for s in samples if s.skipped is not None),
    )


class StepSampler(EpochSampler):
    """Training batches counted in steps instead of passes: an endless stream of permutations, cut into rounds.

    An epoch of `EpochSampler` corresponds to a round of `steps` batches, which may be less or more than a pass over the
    data: the last batch of a pass is completed from the next. Pairs are (pass, index), so every repetition of an image
    is augmented differently. Global batch k starts at position k * batch_size * world of the stream.

    Args:
        length: number of images.
        batch_size: images per batch on this rank.
        steps: batches per round.
        seed: for the permutations.
        rank, world: this process's index, and the number of processes.
    """

    def __init__(self, length: int, batch_size: int, steps: int, *, seed: int = 0, rank: int = 0, world: int = 1):
        super().__init__(length, batch_size, train=True, seed=seed, rank=rank, world=world)
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first = self._resume[1] if self.epoch == self._resume[0] else 0
        start, global_batch = self.epoch * self.steps, self.batch_size * self.world
        current, order = -1, np.empty(0, dtype=np.int64)
        for batch in range(start + first, start + self.steps):
            pairs = []
            for place in range(batch * global_batch + self.rank, (batch + 1) * global_batch, self.world):
                number, position = divmod(place, self.length)
                if number != current:
                    current, order = number, np.random.default_rng((self.seed, number)).permutation(self.length)
                pairs.append((number, int(order[position])))
            yield pairs
