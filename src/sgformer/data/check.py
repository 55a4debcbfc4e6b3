"""Look through an image folder or its shards before training on it, and report everything worth knowing at once."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from sgformer.core.errors import UserError
from sgformer.core.files import to_json
from sgformer.core.processes import end_with_parent
from sgformer.core.progress import track
from sgformer.data.formats import find_format, naming_formats, open_data
from sgformer.data.image import probe_image, read_image
from sgformer.data.imagefolder import Listing, list_split, some
from sgformer.data.shards import Index

#: The network's stride: images whose shorter side is below it are enlarged.
SMALL = 32


@dataclass
class SplitReport:
    """What was found in one split.

    Attributes:
        images: image files listed.
        per_class: class name -> number of image files.
        widths, heights: (smallest, median, largest) in pixels as displayed, of the readable images.
        modes: Pillow's mode -> number of images; all are read as RGB.
        rotated: images that EXIF turns or mirrors.
        small: images with a side below 32 pixels.
        unreadable: path relative to the root -> reason.
        ignored: extension -> number of files that are not images by name.
    """

    images: int
    per_class: dict[str, int]
    widths: tuple[int, int, int] | None = None
    heights: tuple[int, int, int] | None = None
    modes: dict[str, int] = field(default_factory=dict)
    rotated: int = 0
    small: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, int] = field(default_factory=dict)


@dataclass
class CheckReport:
    """What `check_imagefolder` found. `problems` should be put right before training; `notes` are good to know.

    Attributes:
        root: the data set's folder.
        decoded: whether every image was decoded to its end, or its header read only.
        splits: split name -> its report.
        duplicates: pairs (file in train, file in val) that are the same to the byte.
        conflicts: pairs of files of one split that are the same to the byte but lie in different classes.
        problems, notes: one line each.
    """

    root: str
    decoded: bool
    splits: dict[str, SplitReport] = field(default_factory=dict)
    duplicates: list[tuple[str, str]] = field(default_factory=list)
    conflicts: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        """Everything, as JSON."""
        return to_json(asdict(self))

    def to_text(self, limit: int = 20) -> str:
        """Everything, to be read on a terminal; long lists are cut after `limit` lines."""
        lines = [self.root]
        for name, split in self.splits.items():
            lines += ["", f"{name}: {split.images} images in {len(split.per_class)} classes"]
            if counts := split.per_class:
                low, high = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
                middle = statistics.median(counts.values())
                lines.append(
                    f"  per class   {counts[low]} ({low}) to {counts[high]} ({high}), median {middle:g}, "
                    f"imbalance {counts[high] / max(1, counts[low]):.3g}"
                )
            if split.widths and split.heights:
                (w0, w1, w2), (h0, h1, h2) = split.widths, split.heights
                lines.append(f"  pixels      width {w0} to {w2}, median {w1}; height {h0} to {h2}, median {h1}")
                lines.append(f"  kinds       {_tally(split.modes)}; turned by EXIF: {split.rotated}")
            lines.append(f"  unreadable  {len(split.unreadable)}")
            if split.ignored:
                lines.append(f"  ignored     {sum(split.ignored.values())} other files ({_tally(split.ignored)})")
        for title, items in (("problems", self.problems), ("notes", self.notes)):
            if items:
                lines += ["", f"{title} ({len(items)}):", *(f"  {item}" for item in items[:limit])]
                lines += [f"  ... and {len(items) - limit} more; --json lists all"] if len(items) > limit else []
        lines += [] if self.problems else ["", "no problem found"]
        return "\n".join(lines)


class _Inspector(NamedTuple):
    """What was seen of one file."""

    width: int
    height: int
    mode: str
    turned: bool
    digest: bytes
    reason: str | None


def check_imagefolder(root: str | os.PathLike, decode: bool = True, workers: int = 0) -> CheckReport:
    """List both splits, read every image, and report.

    Of shards, every one is also held against its checksum in the index.

    Args:
        root: folder with `train/CLASS/*` and `val/CLASS/*`, folder or address of shards, or another known format.
        decode: decode every image to its end, which finds truncated files; else only headers are read.
        workers: processes that read; 0 reads in this one.

    Raises:
        UserError: there is neither a train nor a val folder with classes, or the index of shards cannot be used.
    """
    if workers < 0:
        raise UserError(f"workers is 0 or more, got {workers}")
    report = CheckReport(os.fspath(root), decode)
    found = find_format("classes", root)
    with naming_formats("classes", unless=found is not None):
        listings = LISTERS.get(found.name if found else "image-folder", _list_any)(report, root)

    seen: dict[str, dict[bytes, int]] = {}
    for split, listing in listings.items():
        report.splits[split], seen[split] = _look_through(report, listing, decode, workers)
    if len(listings) == 2:
        train, val = listings["train"], listings["val"]
        for digest in seen["train"].keys() & seen["val"].keys():
            pair = train.paths[seen["train"][digest]], val.paths[seen["val"][digest]]
            report.duplicates.append((f"train/{pair[0]}", f"val/{pair[1]}"))
        report.duplicates.sort()
    report.problems += [f"{a} is the same file as {b}" for a, b in report.duplicates]
    report.problems += [f"{a} is the same file as {b}, in another class" for a, b in report.conflicts]
    return report


def _list_shards(report: CheckReport, root: str | os.PathLike) -> dict[str, Listing]:
    index = Index.read(root)
    listings: dict[str, Listing] = {}
    for split in index.splits:
        listing, _ = index.split(split)
        gone = listing.missing()
        report.problems += gone or [
            line for line in track(listing.damaged(), len(listing.shards), f"shards of {split}") if line
        ]
        if empty := [name for name, count in zip(listing.classes, listing.counts(), strict=True) if not count]:
            (report.problems if split == "train" else report.notes).append(
                f"{split}: classes without an image ({len(empty)}): {some(empty)}"
            )
        listings[split] = listing
    report.problems += [f"{index.store.name()}: no split {name!r}" for name in ("train", "val") if name not in listings]
    return listings


def _list_folders(report: CheckReport, root: str | os.PathLike) -> dict[str, Listing]:
    listings: dict[str, Listing] = {}
    failures = []
    root = Path(root)
    for split in ("train", "val"):
        known = listings["train"].classes if "train" in listings and split == "val" else None
        try:
            listings[split], unknown, empty = list_split(root, split, known)
        except UserError as error:
            failures.append(error)
            continue
        if unknown:
            report.problems.append(f"{split}: classes that train does not have ({len(unknown)}): {some(unknown)}")
        if empty:
            report.problems.append(f"{split}: class folders without an image ({len(empty)}): {some(empty)}")
        if missing := [name for name in known or () if not (root / split / name).is_dir()]:
            report.notes.append(f"{split}: classes of train that are missing ({len(missing)}): {some(missing)}")
    if not listings:
        raise failures[0]
    report.problems += [str(error) for error in failures]
    return listings


def _list_any(report: CheckReport, root: str | os.PathLike) -> dict[str, Listing]:
    """Of a format that is not looked at more closely: what opening it complains of."""
    listings: dict[str, Listing] = {}
    failures = []
    for split in ("train", "val"):
        known = listings["train"].classes if "train" in listings else None
        try:
            listings[split] = open_data("classes", root, split, known)
        except UserError as error:
            failures.append(error)
    if not listings:
        raise failures[0]
    report.problems += [str(error) for error in failures]
    return listings


#: Format -> what lists its splits and tells, too, what training would stop at.
LISTERS = {"image-folder": _list_folders, "shards": _list_shards}


def _look_through(
    report: CheckReport, listing: Listing, decode: bool, workers: int
) -> tuple[SplitReport, dict[bytes, int]]:
    """Read the images of one split. Returns its report and, by a hash of its bytes, the first file with them."""
    result = SplitReport(len(listing), dict(zip(listing.classes, listing.counts(), strict=True)))
    result.ignored = dict(sorted(listing.ignored.items()))
    looks: list[_Inspector] = []
    first: dict[bytes, int] = {}
    for index, look in enumerate(track(_looks(listing, decode, workers), len(listing), listing.split)):
        name = f"{listing.split}/{listing.paths[index]}"
        if look.reason is not None:
            result.unreadable[name] = look.reason
            report.problems.append(f"{name}: {look.reason}")
            continue
        looks.append(look)
        other = first.setdefault(look.digest, index)
        if listing.targets[other] != listing.targets[index]:
            report.conflicts.append((f"{listing.split}/{listing.paths[other]}", name))
    if looks:
        result.widths = _spread([look.width for look in looks])
        result.heights = _spread([look.height for look in looks])
    result.modes = dict(Counter(look.mode for look in looks).most_common())
    result.rotated = sum(look.turned for look in looks)
    result.small = sum(min(look.width, look.height) < SMALL for look in looks)
    if result.small:
        report.notes.append(f"{listing.split}: images with a side below {SMALL} pixels: {result.small}")
    if result.ignored:
        count = sum(result.ignored.values())
        report.notes.append(f"{listing.split}: files that are not images by their names, left out: {count}")
    return result, first


def _looks(listing: Listing, decode: bool, workers: int) -> Iterator[_Inspector]:
    """What is seen of every image, in order."""
    if workers == 0:
        yield from (_inspect(listing, decode, index) for index in range(len(listing)))
        return
    # The listing goes to each process once, not with every index.
    with multiprocessing.Pool(workers, _Reader.set, (listing, decode)) as pool:
        yield from pool.imap(_Reader.inspect, range(len(listing)), chunksize=32)


class _Reader:
    """What a process of the pool reads from."""

    task: tuple[Listing, bool]

    @classmethod
    def set(cls, listing: Listing, decode: bool) -> None:
        end_with_parent()
        cls.task = listing, decode

    @classmethod
    def inspect(cls, index: int) -> _Inspector:
        return _inspect(*cls.task, index)


def _inspect(listing: Listing, decode: bool, index: int) -> _Inspector:
    (data,) = listing.read_bytes([index])
    try:
        if isinstance(data, UserError):
            raise data
        header = probe_image(data, name="")
        if decode:
            read_image(data, name="")
    except UserError as error:
        reason = str(error).removeprefix(f"{listing.path(index)}: ").removeprefix(": ")
        return _Inspector(0, 0, "", False, b"", reason)
    digest = hashlib.blake2b(data, digest_size=16).digest()
    return _Inspector(header.width, header.height, header.mode, header.orientation != 1, digest, None)


def _spread(values: list[int]) -> tuple[int, int, int]:
    return min(values), round(statistics.median(values)), max(values)


def _tally(counts: dict[str, int]) -> str:
    return ", ".join(f"{name or 'without extension'} {count}" for name, count in counts.items())
