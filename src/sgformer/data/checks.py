"""Check a data set of any layout before training: image folders, shards, COCO, label maps, files of other tools."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sgformer.core.errors import UserError
from sgformer.core.names import is_address, some
from sgformer.core.progress import track
from sgformer.data import ade20k, sources
from sgformer.data.check import CheckReport, check_imagefolder, check_images, compare_splits
from sgformer.data.coco import CocoListing, is_coco, single_coco, vanishing
from sgformer.data.formats import find_format, open_data
from sgformer.data.image import walk
from sgformer.data.imagefolder import ImageFolder
from sgformer.data.label_values import check_values
from sgformer.data.layouts import CONVERTS, SPLIT, class_folders, command
from sgformer.data.sources.base import LOST, Picture

SPLITS = ("train", "val")
LABEL_SPLITS = {"train": "training", "val": "validation"}


Place = str | os.PathLike[str]


def check_data(root: Place, workers: int = 0, images: Place | None = None) -> CheckReport:
    """Check a data set of any layout, read every image, and report.

    Args:
        root: folder, file or URL.
        workers: reading processes; 0 reads in this process.
        images: the folder of the images, if annotation files say another or none.

    Raises:
        UserError: it is in no layout and no format that can be converted, or not even one split can be listed.
    """
    if workers < 0:
        raise UserError(f"workers must be 0 or more, got {workers}")
    path = Path(root)
    if is_address(root) or not path.exists():
        return check_imagefolder(root, workers=workers)
    known = {kind: find_format(kind, root) for kind in ("classes", "objects")}
    found = sources.recognize(path)
    if known["objects"] is not None and (known["objects"].name != "coco" or found == "coco"):
        return check_objects(path, workers, images)
    if images is not None and found is None:
        raise UserError(f"--images is for annotation files, which {root} is not")
    if known["classes"] is not None and (known["classes"].name != "image-folder" or class_folders(path / "train")):
        return check_imagefolder(root, workers=workers)
    if found is None and (path / "images").is_dir() and next(walk(path / "annotations", (".png",)), None):
        return check_label_maps(path, workers)
    if found is not None:
        return check_source(path, found, workers, images)
    return check_imagefolder(root, workers=workers)


@dataclass(frozen=True)
class _Files(ImageFolder):
    """Images without a class each, and the counts of what is in them."""

    in_each_class: tuple[int, ...] = ()

    def counts(self) -> list[int]:
        return list(self.in_each_class)


def _files(folder: Path, split: str, classes: tuple[str, ...], names: list[str], counts: list[int]) -> _Files:
    return _Files(
        folder, split, classes, tuple(names), (0,) * len(names), Counter(), folder, in_each_class=tuple(counts)
    )


# -- objects ----------------------------------------------------------------------------------------------------------


def check_objects(root: Path, workers: int = 0, images: Place | None = None) -> CheckReport:
    """Of COCO annotations, and other registered formats of objects.

    Raises:
        UserError: no split can be listed.
    """
    report = CheckReport(os.fspath(root), True)
    single = single_coco(root) if is_coco(root) else None
    listings: dict[str, CocoListing] = {}
    failures: list[UserError] = []
    for split in ("train",) if single else SPLITS:
        classes = listings["train"].categories if "train" in listings else None
        try:
            listings[split] = _read(single or root, split, classes, failures, images)
        except UserError as error:
            failures.append(error)
    if not listings:
        raise failures[0]
    report.problems += [str(error) for error in failures]
    digests, files = {}, {}
    for split, listing in listings.items():
        objects = Counter(label for i in range(len(listing)) for label, _, _ in listing.objects_of(i))
        counts = [objects[i] for i in range(len(listing.classes))]
        names = [image.file_name for image in listing.images]
        files[split] = _files(listing.folder, split, listing.classes, names, counts)

        def size(index: int, width: int, height: int, listing: CocoListing = listing) -> str | None:
            image = listing.images[index]
            if (width, height) == (image.width, image.height):
                return None
            return (
                f"{listing.path(index)}: {width} x {height} pixels as displayed, but {image.width} x {image.height} in "
                f"{listing.json.name}"
            )

        report.splits[split], digests[split] = check_images(report, files[split], True, workers, size)
        report.splits[split].counted = "objects"
        report.notes += [f"{split}: {count} {note}" for note, count in listing.notes.items()]
        try:
            report.notes += vanishing(listing)
        except UserError as error:
            report.problems.append(str(error))
    compare_splits(report, files, digests)
    report.problems += [f"{a} is the same file as {b}" for a, b in report.duplicates]
    if failures:
        report.stop(str(failures[0]))
    else:
        classes_of = listings["train"]
        about = "; ".join(listing.describe() for listing in listings.values())
        report.training = f"{len(classes_of.classes)} classes; {about}{f'; {SPLIT}' if single else ''}"
    return report


def _read(
    root: Path, split: str, classes: tuple | None, failures: list[UserError], images: Place | None
) -> CocoListing:
    """A listing; if only images are missing, that is added to `failures`, and they are a problem each."""
    found = find_format("objects", root)
    options = {"masks": None, "drop_empty": False, "images": images}
    options |= {"keypoints": None} if found and found.name == "coco" else {}
    try:
        return open_data("objects", root, split, classes, check_files=True, **options)
    except UserError as error:
        if "--images" not in str(error):
            raise
        failures.append(error)
        return open_data("objects", root, split, classes, check_files=False, **options)


# -- label maps -------------------------------------------------------------------------------------------------------


def check_label_maps(root: Path, workers: int = 0) -> CheckReport:
    """Of the ADE20K layout: also reads every label map, and counts the pixels of each class.

    Raises:
        UserError: no split can be listed.
    """
    report = CheckReport(os.fspath(root), True)
    single = not (root / "images" / "validation").is_dir()
    inner = {"train": "training" if (root / "images" / "training").is_dir() else "."} if single else LABEL_SPLITS
    listings: dict[str, ade20k.LabelledFolder] = {}
    failures = []
    for split, folder in inner.items():
        classes = listings["train"].classes if "train" in listings else None
        try:
            listings[split] = ade20k.scan(root, folder, classes)
            binary = listings["train"].binary if "train" in listings and split != "train" else None
            listings[split], _ = check_values(listings[split], binary)
        except UserError as error:
            failures.append(error)
    if not listings:
        raise failures[0]
    report.problems += [str(error) for error in failures]
    digests, files = {}, {}
    for split, listing in listings.items():
        pixels = np.zeros(len(listing.classes) + 1, np.int64)
        base = root / "images" / inner[split]
        names = [path.relative_to(base).as_posix() for path in listing.images]
        files[split] = _files(base, split, listing.classes, names, [0] * len(listing.classes))

        def labels(
            index: int, width: int, height: int, listing: ade20k.LabelledFolder = listing, pixels: np.ndarray = pixels
        ) -> str | None:
            try:
                values = listing.class_indices(index)
            except UserError as error:
                return str(error)
            if values.shape != (height, width):
                own = f"{values.shape[1]} x {values.shape[0]} pixels"
                return f"{listing.labels[index]}: {own}, its image {width} x {height}"
            values[values == listing.ignore] = len(listing.classes)
            pixels += np.bincount(values.ravel(), minlength=len(pixels))
            return None

        result, digests[split] = check_images(report, files[split], True, workers, labels)
        result.counted, result.per_class = "pixels", dict(zip(listing.classes, pixels[:-1].tolist(), strict=True))
        report.splits[split] = result
        if listing.binary:
            report.notes.append(f"{split}: label maps hold 0 and 255 only: 255 is read as class {listing.classes[1]}")
        if empty := [name for name, count in result.per_class.items() if not count]:
            report.notes.append(f"{split}: classes without a pixel ({len(empty)}): {some(empty)}")
        if none := int(pixels[-1]):
            share = none / max(1, int(pixels.sum()))
            report.notes.append(f"{split}: {share:.1%} of the pixels have no class ({listing.ignore})")
    compare_splits(report, files, digests)
    report.problems += [f"{a} is the same file as {b}" for a, b in report.duplicates]
    if failures:
        report.stop(str(failures[0]))
    else:
        counts = [len(listing) for listing in listings.values()]
        about = f"{counts[0]} training and {counts[1]} validation images" if len(counts) > 1 else f"{counts[0]} images"
        report.training = f"{about}, {len(listings['train'].classes)} classes{f'; {SPLIT}' if single else ''}"
    return report


# -- files of other tools ---------------------------------------------------------------------------------------------


def check_source(root: Path, form: str, workers: int = 0, images: Place | None = None) -> CheckReport:
    """Of files that `sgformer data from` converts, in the first layout that they have enough for.

    Raises:
        UserError: they are damaged.
    """
    report = CheckReport(os.fspath(root), True)
    failures = []
    for layout in CONVERTS[form]:
        try:
            found = sources.read(root, layout, form, images, bad_images="skip")
        except UserError as error:
            failures.append(error)
            continue
        if found.classes and (layout != "imagenet" or all(picture.label for picture in found.pictures)):
            break
    else:
        raise failures[0] if failures else UserError(f"{root}: holds no classes")
    for split in dict.fromkeys(picture.split for picture in found.pictures):
        pictures = [picture for picture in found.pictures if picture.split == split and picture.data is None]
        objects = Counter(thing.label for picture in pictures for thing in picture.things)
        labels = Counter(picture.label for picture in pictures)
        counts = [objects[name] if objects else labels[name] for name in found.classes]
        if painted := any(picture.labels_of for picture in pictures):
            counts = _pixels(pictures, len(counts), report)
        names = [os.path.relpath(picture.path, root if root.is_dir() else root.parent) for picture in pictures]
        base = root if root.is_dir() else root.parent
        name = split or "all"
        report.splits[name], _ = check_images(report, _files(base, name, found.classes, names, counts), True, workers)
        report.splits[name].counted = "pixels" if painted else "objects" if objects else "images"
    report.problems += [
        f"{count} {note.removesuffix(', left out')}" for note, count in found.notes.items() if note in LOST
    ]
    report.notes += [f"{count} {note}" for note, count in found.notes.items() if note not in LOST]
    needed = f"training does not read {sources.FORMATS[form]}; this converts it: {command(root, layout)}"
    report.problems.append(needed)
    report.training = f"stops: {needed}"
    return report


def _pixels(pictures: Sequence[Picture], classes: int, report: CheckReport) -> list[int]:
    """The pixels of each class in masks; reports what is wrong with them."""
    counts = np.zeros(256, np.int64)
    for picture in track(pictures, len(pictures), "masks"):
        try:
            values = picture.labels_of() if picture.labels_of else None
        except UserError as error:
            report.problems.append(str(error))
            continue
        if values is not None:
            counts += np.bincount(values.ravel(), minlength=256)
            if picture.size and values.shape != picture.size[::-1]:
                own = f"its mask {values.shape[1]} x {values.shape[0]}"
                report.problems.append(f"{picture.path}: {picture.size[0]} x {picture.size[1]} pixels, {own}")
    return counts[:classes].tolist()
