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
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from sgformer.core.errors import UserError, first_line
from sgformer.core.names import is_address, some
from sgformer.core.parse import read_json
from sgformer.core.progress import track
from sgformer.data import ade20k, imagefolder, layouts
from sgformer.data.ade20k import LabelledFolder, read_label_map
from sgformer.data.coco import (
    EMPTY,
    SPLIT_NAMES,
    CocoListing,
    find_coco,
    image_folders,
    read_coco,
    single_coco,
    split_name,
)
from sgformer.data.formats import find_format
from sgformer.data.imagefolder import ImageFolder, Listing
from sgformer.data.layouts import hint
from sgformer.data.shards import Index, ShardFolder, is_shards, open_train, require_index
from sgformer.data.store import Store

FILE = "split.json"
#: The two sides, by the names of the layouts.
SIDES = {"train": 0, "training": 0, "val": 1, "validation": 1}
OWN_NAMES = {"imagenet": ("train", "val"), "coco": ("train", "val"), "ade20k": ("training", "validation")}
#: Layout -> the kind of formats that it is one of; and those whose images are divided here.
FORMAT_OF = {"imagenet": "classes", "coco": "objects"}
DIVIDED = ("image-folder", "shards", "coco")

Side = TypeVar("Side", Listing, CocoListing, LabelledFolder)


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

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise UserError(f"--val-split must be in (0, 1), e.g. .2, got {self.fraction:g}")

    def divide(
        self, names: Sequence[str], contents: Callable[[], Sequence[Any]], classes: Sequence[Collection[int]]
    ) -> list[bool]:
        """Which images are for validation.

        Args:
            names: of the images, below the data set's folder; unique.
            contents: gives a key for each image, the same for files with the same bytes.
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
        chosen = divide(names, contents(), classes, self.fraction, self.seed)
        if len(set(chosen)) < 2:
            raise UserError(f"--val-split {self.fraction:g}: {len(names)} images are too few to divide")
        return chosen


def divide(
    names: Sequence[str], contents: Sequence[Any], classes: Sequence[Collection[int]], fraction: float, seed: int
) -> list[bool]:
    """Which images are for validation: iterative stratification (Sechidis et al., 2011) over groups of equal files.

    The rarest class that is left is dealt out first, each group to the side that lacks most images of it.
    """
    groups = _equal(names, contents)
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


def _equal(names: Sequence[str], contents: Sequence[Any]) -> list[list[int]]:
    """Indices of the images in groups of equal contents, by name."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for i in sorted(range(len(names)), key=lambda i: names[i]):
        groups[contents[i]].append(i)
    return list(groups.values())


def contents_of(files: Sequence[Path]) -> list[Any]:
    """A key for each file, the same for files with the same bytes. Only files of the same length are read."""
    lengths = [_length(path, i) for i, path in enumerate(files)]
    counts = Counter(lengths)
    places = track(range(len(files)), len(files), "comparing files")
    return [lengths[i] if counts[lengths[i]] == 1 else _digest(files[i], i) for i in places]


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


def unsplit(data: str | os.PathLike[str], layout: str) -> str | None:
    """What holds all images of a data set without validation images: a folder or split of it, "." for itself, or of
    COCO the file; None if there are validation images, or the data is in another layout.

    Args:
        data: the data set.
        layout: "imagenet", also as shards, "coco" or "ade20k".
    """
    if layout in FORMAT_OF and (found := find_format(FORMAT_OF[layout], data)) and found.name not in DIVIDED:
        return None
    if layout == "coco":
        file = None if is_address(data) else single_coco(data)
        return None if file is None else str(file)
    if layout == "imagenet" and is_shards(data):
        splits = Index.read(data).splits
        return "train" if splits.get("train") and not splits.get("val") else None
    return None if is_address(data) else layouts.unsplit(Path(data), layout)


def open_classes(
    root: str | os.PathLike[str], split: ValSplit, classes: Sequence[str] | None = None
) -> tuple[Listing, Listing]:
    """Training and validation images of `ROOT/CLASS/*`, or of `ROOT/train/CLASS/*` without `ROOT/val`, or of shards
    with training images only.

    Raises:
        UserError: there is a validation split, or no folder of classes.
    """
    whole = open_whole(root, classes)

    def contents() -> Sequence[Any]:
        if isinstance(whole, ShardFolder):
            return [tuple(place) for place in whole.places[:, 2:].tolist()]  # length and CRC-32: nothing is read
        return contents_of([whole.path(i) for i in range(len(whole))])

    chosen = split.divide(whole.paths, contents, [(target,) for target in whole.targets])

    def part(name: str, val: bool) -> Listing:
        kept = [i for i in range(len(whole)) if chosen[i] == val]
        paths, targets = tuple(whole.paths[i] for i in kept), tuple(whole.targets[i] for i in kept)
        if isinstance(whole, ShardFolder):
            return dataclasses.replace(whole, split=name, paths=paths, targets=targets, places=whole.places[kept])
        return dataclasses.replace(whole, split=name, paths=paths, targets=targets, **_said(val))

    return part("train", False), part("val", True)


def open_whole(root: str | os.PathLike[str], classes: Sequence[str] | None = None) -> ImageFolder | ShardFolder:
    """All images of a data set for classification without validation images, as the split "train".

    Raises:
        UserError: as of `open_classes`.
    """
    if is_shards(root):
        if Index.read(root).splits.get("val"):
            raise _has_its_own(Store(root).name("val"))
        return open_train(root, classes)
    folder = Path(root)
    _refuse_split(folder, "imagenet")
    if (inner := unsplit(folder, "imagenet")) is None:
        says = hint(folder, "imagenet")
        raise UserError(
            f"{folder}: --val-split divides {folder}/CLASS/*.jpg or {folder}/train/CLASS/*.jpg{says and f'; {says}'}"
        )
    require_index(folder)
    whole = imagefolder.scan(folder, inner, classes)
    return dataclasses.replace(whole, split="train", folder=folder / inner)


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
    file = single_coco(data, options.get("keypoints"))
    if file is None:
        raise _has_its_own(find_coco(data, "val")[0])
    names = (split_name(file), *SPLIT_NAMES["train"])
    whole = read_coco(file, image_folders(Path(data), file, names, images), **options)
    content = [{label for label, _, _ in whole.objects_of(i)} for i in range(len(whole))]
    files = [whole.path(i) for i in range(len(whole))]
    chosen = split.divide([image.file_name for image in whole.images], lambda: contents_of(files), content)
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
    _refuse_split(folder, "ade20k")
    inner = unsplit(folder, "ade20k") or "."
    whole = ade20k.scan(folder, inner, classes, reduce_zero_label)
    names = [path.relative_to(folder / "images" / inner).as_posix() for path in whole.images]
    content: list[Collection[int]] = [()] * len(whole)
    if split.names is None:
        maps = (np.unique(read_label_map(path)).tolist() for path in whole.labels)
        content = list(track(maps, len(whole), "finding the classes of each image"))
    chosen = split.divide(names, lambda: contents_of(whole.images), content)

    def part(name: str, val: bool) -> LabelledFolder:
        kept = [i for i in range(len(whole)) if chosen[i] == val]
        images, labels = (tuple(values[i] for i in kept) for values in (whole.images, whole.labels))
        return dataclasses.replace(whole, split=name, images=images, labels=labels, **_said(val))

    return part("training", False), part("validation", True)


def _refuse_split(root: Path, layout: str) -> None:
    """Raise UserError if there are validation images."""
    found = layouts.validation_folder(root, layout)
    if found is not None and found.name not in SIDES:
        name = "val" if layout == "imagenet" else "validation"
        raise UserError(f"{found}: are these validation images? Rename it to {name!r} and leave --val-split out")
    if found is not None:
        raise _has_its_own(found)


def _has_its_own(place: Path | str) -> UserError:
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
    if "val_split" not in metadata or split not in SIDES or unsplit(data, layout) is None:
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


def own_name(data: str | os.PathLike[str], split: str, layout: str) -> str:
    """The name that a layout has for a split, unless there is a folder of the name given."""
    there = any((Path(data) / folder / split).is_dir() for folder in (".", "images"))
    return OWN_NAMES[layout][SIDES[split]] if split in SIDES and not there else split


def named_split(data: str | os.PathLike[str], split: str, layout: str) -> str:
    """The split that `eval` opens: as named, also by the name of another layout (`val`, `validation`), or, of data that
    are not split, "all" for all images.

    Raises:
        UserError: validation images are asked for, and there are none.
    """
    inner = unsplit(data, layout)
    if inner is None or (layout == "coco" and Path(data).is_file()):  # a file is its own split
        return own_name(data, split, layout)
    if SIDES.get(split) == 1:
        how = f"--data {inner}" if layout == "coco" else f"--split {'all' if inner == '.' else inner}"
        raise UserError(f"{data}: no validation images; {how} evaluates on all of its images")
    return inner if split == "all" and layout != "coco" else split


def side(parts: tuple[Side, Side], split: str) -> Side:
    """The listing of a split.

    Raises:
        UserError: it has no images.
    """
    listing = parts[SIDES[split]]
    if not len(listing):
        raise UserError(f"--split {split}: none of these images were trained on")
    return listing
