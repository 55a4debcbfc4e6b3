"""A validation split for data that has none: `--val-split .2`.

Images are assigned by a seed and their names, so that the same data give the same split everywhere; classes are spread
alike over both sides, and files with the same bytes are on one side. A run writes the names of its validation images to
`split.json`, and evaluating its weights on the same data reads them there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from sgformer.core.errors import UserError, first_line
from sgformer.core.names import is_address, some
from sgformer.core.parse import read_json
from sgformer.core.progress import track
from sgformer.data import ade20k, imagefolder
from sgformer.data.ade20k import LabelledFolder, read_label_map
from sgformer.data.coco import EMPTY, SPLIT_NAMES, CocoListing, find_coco, image_folders, read_coco, single_coco
from sgformer.data.imagefolder import ImageFolder
from sgformer.data.layouts import class_folders, hint, is_single

FILE = "split.json"
#: The two sides, by the names of the layouts.
SIDES = {"train": 0, "training": 0, "val": 1, "validation": 1}


Side = TypeVar("Side", ImageFolder, CocoListing, LabelledFolder)


@dataclasses.dataclass(frozen=True)
class ValSplit:
    """How to divide a data set.

    Attributes:
        fraction: the share of validation images, in (0, 1).
        seed: another seed, another split.
        names: the validation images of an earlier run, which are taken instead.
        source: the file with those names, for messages.
    """

    fraction: float
    seed: int = 0
    names: tuple[str, ...] | None = None
    source: str = ""

    def divide(self, names: Sequence[str], files: Sequence[Path], classes: Sequence[Collection[int]]) -> list[bool]:
        """Which images are for validation.

        Args:
            names: of the images, below the data set's folder; unique.
            files: the images.
            classes: the classes in each image.

        Raises:
            UserError: a side would be empty; or images of `self.names` are not there.
        """
        if self.names is not None:
            wanted = set(self.names)
            if not wanted & set(names):  # other data, of which the run has seen nothing
                return [True] * len(names)
            if missing := sorted(wanted - set(names)):
                raise UserError(
                    f"{self.source}: {len(missing)} of its {len(wanted)} validation images are not in this data: "
                    f"{some(missing, 4)}"
                )
            return [name in wanted for name in names]
        chosen = divide(names, files, classes, self.fraction, self.seed)
        if len(set(chosen)) < 2:
            raise UserError(f"--val-split {self.fraction:g}: {len(names)} images are too few to divide")
        return chosen


def divide(
    names: Sequence[str], files: Sequence[Path], classes: Sequence[Collection[int]], fraction: float, seed: int
) -> list[bool]:
    """Which images are for validation: iterative stratification (Sechidis et al., 2011) over groups of equal files.

    The rarest class that is left is dealt out first, each group to the side that lacks most images of it.
    """
    groups = equal_files(names, files)
    order = sorted(range(len(groups)), key=lambda g: _draw(seed, names[groups[g][0]]))
    contents = [Counter(c for i in group for c in set(classes[i])) for group in groups]
    totals: Counter[int] = sum(contents, Counter())
    # What each side still lacks of every class, and of images: [training, validation].
    lacking = {c: [(1 - fraction) * n, fraction * n] for c, n in totals.items()}
    wanted = [(1 - fraction) * len(names), fraction * len(names)]
    holding: dict[int, list[int]] = defaultdict(list)
    for g in order:
        for c in contents[g]:
            holding[c].append(g)
    side: dict[int, int] = {}

    def assign(g: int, lack: Sequence[float]) -> None:
        side[g] = max((0, 1), key=lambda s: (round(lack[s], 9), wanted[s]))
        wanted[side[g]] -= len(groups[g])
        for c, n in contents[g].items():
            lacking[c][side[g]] -= n

    for c in sorted(totals, key=lambda c: (totals[c], c)):
        for g in holding[c]:
            if g not in side:
                assign(g, lacking[c])
    for g in order:
        if g not in side:
            assign(g, wanted)
    chosen = [False] * len(names)
    for g, group in enumerate(groups):
        for i in group:
            chosen[i] = side[g] == 1
    return chosen


def _draw(seed: int, name: str) -> bytes:
    return hashlib.blake2b(f"{seed}/{name}".encode("utf-8", "surrogateescape"), digest_size=16).digest()


def equal_files(names: Sequence[str], files: Sequence[Path]) -> list[list[int]]:
    """Indices of the images in groups of files with the same bytes. Only files of the same length are read."""
    lengths = [_length(path, i) for i, path in enumerate(files)]
    counts = Counter(lengths)
    groups: dict[Any, list[int]] = defaultdict(list)
    for i in track(range(len(files)), len(files), "comparing files"):
        groups[lengths[i] if counts[lengths[i]] == 1 else _digest(files[i], i)].append(i)
    return sorted((sorted(group, key=lambda i: names[i]) for group in groups.values()), key=lambda g: names[g[0]])


# Files that cannot be read are equal to none; training will name them.
def _length(path: Path, index: int) -> Any:
    try:
        return path.stat().st_size
    except OSError:
        return path, index


def _digest(path: Path, index: int) -> Any:
    try:
        return hashlib.blake2b(path.read_bytes(), digest_size=16).digest()
    except OSError:
        return path, index


def _said(val: bool) -> dict[str, Any]:
    """What a side says was left out: training says it of the whole, validation nothing."""
    return {"ignored": Counter(), "left_out": {}} if val else {}


# -- the three layouts ------------------------------------------------------------------------------------------------


def open_classes(
    root: str | os.PathLike[str], split: ValSplit, classes: Sequence[str] | None = None
) -> tuple[ImageFolder, ImageFolder]:
    """Training and validation images of `ROOT/CLASS/*`, or of `ROOT/train/CLASS/*` without `ROOT/val`.

    Raises:
        UserError: there is a validation split, or no folder of classes.
    """
    folder = Path(root)
    if (folder / "val").is_dir():
        raise _has_its_own(folder / "val")
    if not (folder / "train").is_dir() and not class_folders(folder):
        says = hint(folder, "imagenet")
        raise UserError(
            f"{folder}: --val-split divides {folder}/CLASS/*.jpg or {folder}/train/CLASS/*.jpg{says and f'; {says}'}"
        )
    whole = imagefolder.scan(folder, "train" if (folder / "train").is_dir() else ".", classes)
    whole = dataclasses.replace(whole, folder=folder / whole.split)
    files = [whole.path(i) for i in range(len(whole))]
    chosen = split.divide(whole.paths, files, [(target,) for target in whole.targets])

    def part(name: str, val: bool) -> ImageFolder:
        kept = [i for i in range(len(whole)) if chosen[i] == val]
        paths, targets = tuple(whole.paths[i] for i in kept), tuple(whole.targets[i] for i in kept)
        return dataclasses.replace(whole, split=name, paths=paths, targets=targets, **_said(val))

    return part("train", False), part("val", True)


def open_objects(
    data: str | os.PathLike[str], split: ValSplit, images: Any = None, drop_empty: bool = False, **options: Any
) -> tuple[CocoListing, CocoListing]:
    """Training and validation images of a COCO file, or of a folder with a single one.

    Args:
        data: file or folder.
        split: how to divide it.
        images, drop_empty, options: see `data.coco.read_coco`; `drop_empty` is for training.

    Raises:
        UserError: there is a validation split, or no COCO file.
    """
    file = single_coco(data)
    if file is None:
        raise _has_its_own(find_coco(data, "val")[0])
    names = (file.stem.removeprefix("instances_"), *SPLIT_NAMES["train"])
    whole = read_coco(file, image_folders(Path(data), file, names, images), **options)
    content = [{label for label, _, _ in whole.objects_of(i)} for i in range(len(whole))]
    files = [whole.path(i) for i in range(len(whole))]
    chosen = split.divide([image.file_name for image in whole.images], files, content)
    train = [i for i in range(len(whole)) if not chosen[i]]
    kept = [i for i in train if content[i] or not drop_empty]
    notes = +Counter({**whole.notes, EMPTY: len(train) - len(kept)})

    def part(indices: Sequence[int], notes: Counter[str]) -> CocoListing:
        images, objects = tuple(whole.images[i] for i in indices), tuple(whole.objects[i] for i in indices)
        return dataclasses.replace(whole, images=images, objects=objects, notes=notes)

    return part(kept, notes), part([i for i in range(len(whole)) if chosen[i]], Counter())


def open_label_maps(
    root: str | os.PathLike[str], split: ValSplit, classes: Any = None, reduce_zero_label: bool = False
) -> tuple[LabelledFolder, LabelledFolder]:
    """Training and validation images of `images/training` and `annotations/training`, or of `images` and `annotations`.

    Raises:
        UserError: there is a validation split, or there are no label maps.
    """
    folder = Path(root)
    if (folder / "images" / "validation").is_dir():
        raise _has_its_own(folder / "images" / "validation")
    inner = "training" if (folder / "images" / "training").is_dir() else "."
    whole = ade20k.scan(folder, inner, classes, reduce_zero_label)
    names = [path.relative_to(folder / "images" / inner).as_posix() for path in whole.images]
    content: list[Collection[int]] = [()] * len(whole)
    if split.names is None:
        maps = (np.unique(read_label_map(path)).tolist() for path in whole.labels)
        content = list(track(maps, len(whole), "finding the classes of each image"))
    chosen = split.divide(names, whole.images, content)

    def part(name: str, val: bool) -> LabelledFolder:
        kept = [i for i in range(len(whole)) if chosen[i] == val]
        images, labels = (tuple(values[i] for i in kept) for values in (whole.images, whole.labels))
        return dataclasses.replace(whole, split=name, images=images, labels=labels, **_said(val))

    return part("training", False), part("validation", True)


def _has_its_own(place: Path) -> UserError:
    return UserError(f"--val-split is for data without validation images; these are in {place}: leave the option out")


# -- written and read again -------------------------------------------------------------------------------------------


def names_of(listing: Any) -> list[str]:
    """The images of one side, as `split.json` names them."""
    if isinstance(listing, CocoListing):
        return [image.file_name for image in listing.images]
    if isinstance(listing, LabelledFolder):
        inner = "training" if (listing.root / "images" / "training").is_dir() else "."
        return [path.relative_to(listing.root / "images" / inner).as_posix() for path in listing.images]
    return list(listing.paths)


def to_json(fraction: float, seed: int, val: Any) -> dict[str, Any]:
    """The content of `split.json`."""
    return {"val_split": fraction, "seed": seed, "val": sorted(names_of(val))}


def kept_by(
    weights: str | os.PathLike[str],
    metadata: Mapping[str, Any],
    data: str | os.PathLike[str],
    split: str,
    layout: str,
) -> ValSplit | None:
    """The split that the run of some weights wrote beside them, to evaluate them on the same data.

    Args:
        weights: their file.
        metadata: theirs.
        data: what they are evaluated on.
        split: the split that is evaluated.
        layout: its layout: "imagenet", "coco" or "ade20k".

    Returns:
        None if the weights were trained without --val-split, or the data has validation images of its own.

    Raises:
        UserError: the file is missing or damaged.
    """
    if "val_split" not in metadata or split not in SIDES or is_address(data):
        return None
    root = Path(data)
    if layout == "imagenet":
        single = is_single(root, layout) and bool((root / "train").is_dir() or class_folders(root))
    else:
        single = bool(single_coco(root)) if layout == "coco" else is_single(root, layout)
    if not single:
        return None
    file = Path(weights).parent / FILE
    if not file.exists():
        raise UserError(
            f"{file}: no such file; it names the images that --val-split kept from these weights: copy it here from "
            "their run"
        )
    try:
        content = read_json(file)
        names = tuple(str(name) for name in content["val"])
        return ValSplit(float(content["val_split"]), int(content["seed"]), names, str(file))
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{file}: damaged ({first_line(error)}); copy it from the run again") from None


def side(parts: tuple[Side, Side], split: str) -> Side:
    """The listing of a split.

    Raises:
        UserError: it has no images.
    """
    listing = parts[SIDES[split]]
    if not len(listing):
        raise UserError(f"--split {split}: none of these images were trained on")
    return listing
