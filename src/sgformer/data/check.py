"""Check an image folder or its shards before training, and report all problems at once."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from sgformer.core.errors import UserError
from sgformer.core.files import to_json
from sgformer.core.names import printable, quoted, some
from sgformer.core.processes import end_with_parent
from sgformer.core.progress import track
from sgformer.data.formats import find_format, naming_formats, open_both, open_data
from sgformer.data.image import probe_image, read_image
from sgformer.data.imagefolder import Listing, absent, folders_between, left_out, list_split
from sgformer.data.layouts import SPLIT
from sgformer.data.shards import Index
from sgformer.data.splitting import open_whole, unsplit

#: The network's stride in pixels: smaller images are enlarged.
SMALL = 32


@dataclass
class SplitReport:
    """The report on one split.

    Attributes:
        images: number of image files.
        per_class: class name -> number of image files.
        widths, heights: (smallest, median, largest) of the readable images, in pixels after EXIF rotation.
        modes: Pillow's mode -> number of images; all are read as RGB.
        rotated: number of images that EXIF rotates or mirrors.
        small: number of images with a side below 32 pixels.
        unreadable: path relative to the root -> reason.
        ignored: extension -> number of files without an image extension.
        left_out: reason -> names of what else was left out.
        counted: what `per_class` counts: "images", "objects" or "pixels".
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
    left_out: dict[str, list[str]] = field(default_factory=dict)
    counted: str = "images"


@dataclass
class CheckReport:
    """The result of a check. `problems` should be fixed before training; `notes` are for information.

    Attributes:
        root: the data set's folder.
        decoded: whether images were fully decoded, or only their headers read.
        splits: split name -> its report.
        duplicates: byte-identical pairs (file in train, file in val).
        conflicts: byte-identical pairs of files in different classes of one split.
        problems, notes: one line each.
        training: what training would say about the data, or stop with.
    """

    root: str
    decoded: bool
    splits: dict[str, SplitReport] = field(default_factory=dict)
    duplicates: list[tuple[str, str]] = field(default_factory=list)
    conflicts: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    training: str = ""

    def stop(self, reason: str) -> None:
        """Say that training stops, and why; that is a problem if no other is."""
        self.training = f"stops: {reason}"
        if not self.problems:
            self.problems.append(reason)

    def to_json(self) -> str:
        """The full report as JSON."""
        return to_json(asdict(self))

    def to_text(self, limit: int = 20) -> str:
        """The report for a terminal; lists are cut after `limit` lines."""
        lines = [printable(self.root)]
        for name, split in self.splits.items():
            objects = f", {sum(split.per_class.values())} objects" if split.counted == "objects" else ""
            lines += ["", f"{name}: {split.images} images{objects} in {len(split.per_class)} classes"]
            if counts := split.per_class:
                low, high = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
                fewest, most = (f"{counts[name]} ({printable(name)})" for name in (low, high))
                middle = statistics.median(counts.values())
                kind = "" if split.counted == "images" else f" {split.counted}"
                lines.append(
                    f"  per class   {fewest} to {most}, median {middle:g}{kind}, "
                    f"imbalance {counts[high] / max(1, counts[low]):.3g}"
                )
            if split.widths and split.heights:
                (w0, w1, w2), (h0, h1, h2) = split.widths, split.heights
                lines.append(f"  pixels      width {w0} to {w2}, median {w1}; height {h0} to {h2}, median {h1}")
                lines.append(f"  kinds       {_tally(split.modes)}; rotated by EXIF: {split.rotated}")
            lines.append(f"  unreadable  {len(split.unreadable)}")
        for title, items in (("problems", self.problems), ("notes", self.notes)):
            if items:
                lines += ["", f"{title} ({len(items)}):", *(f"  {printable(item)}" for item in items[:limit])]
                lines += [f"  ... and {len(items) - limit} more; --json lists all"] if len(items) > limit else []
        lines += ["", f"training: {self.training}"] if self.training else []
        lines += [] if self.problems else ["", "no problem found"]
        return "\n".join(lines)


class _Probe(NamedTuple):
    """The properties of one file; `reason` is set if it is unreadable."""

    width: int
    height: int
    mode: str
    rotated: bool
    digest: bytes
    reason: str | None


def check_imagefolder(root: str | os.PathLike, decode: bool = True, workers: int = 0) -> CheckReport:
    """List both splits, read every image, and report.

    Every shard is also compared with its checksum in the index.

    Args:
        root: folder with `train/CLASS/*` and maybe `val/CLASS/*`, or with `CLASS/*`, folder or URL of shards, or
            another registered format.
        decode: fully decode every image, which detects truncated files; otherwise only headers are read.
        workers: reading processes; 0 reads in this process.

    Raises:
        UserError: there is neither a train nor a val folder with classes, or the shard index is invalid.
    """
    if workers < 0:
        raise UserError(f"workers must be 0 or more, got {workers}")
    report = CheckReport(os.fspath(root), decode)
    found = find_format("classes", root)
    single = unsplit(root, "imagenet")
    splits = (single,) if single else ("train", "val")
    with naming_formats("classes", root, found is not None):
        listings = LISTERS.get(found.name if found else "image-folder", _list_any)(report, root, splits)

    first = next(iter(listings.values()))
    if first.split != "val" and len(first.classes) < 2:
        report.problems.append(f"{first.split}: one class only ({quoted(first.classes)}): nothing to tell apart")
    digests: dict[str, dict[bytes, int]] = {}
    for split, listing in listings.items():
        report.splits[split], digests[split] = check_images(report, listing, decode, workers)
    compare_splits(report, listings, digests)
    report.problems += [f"{a} is the same file as {b}" for a, b in report.duplicates]
    report.problems += [f"{a} is the same file as {b}, in another class" for a, b in report.conflicts]
    try:
        if single:
            whole = open_whole(root)
            report.training = f"{SPLIT}; {len(whole)} images, {len(whole.classes)} classes"
        else:
            train, val = open_both(root)
            report.training = f"{len(train)} training and {len(val)} validation images, {len(train.classes)} classes"
    except UserError as error:
        report.stop(str(error))
    return report


def compare_splits(
    report: CheckReport, listings: Mapping[str, Listing], digests: Mapping[str, Mapping[bytes, int]]
) -> None:
    """Report files that are in train and in val."""
    if not {"train", "val"} <= listings.keys():
        return
    train, val = listings["train"], listings["val"]
    for digest in digests["train"].keys() & digests["val"].keys():
        pair = train.paths[digests["train"][digest]], val.paths[digests["val"][digest]]
        report.duplicates.append((f"train/{pair[0]}", f"val/{pair[1]}"))
    report.duplicates.sort()


def _list_shards(report: CheckReport, root: str | os.PathLike, splits: Sequence[str]) -> dict[str, Listing]:
    index = Index.read(root)
    listings: dict[str, Listing] = {}
    for split in index.splits:
        listing, _ = index.split(split)
        missing = listing.missing()
        report.problems += missing or [
            line for line in track(listing.damaged(), len(listing.shards), f"shards of {split}") if line
        ]
        if empty := [name for name, count in zip(listing.classes, listing.counts(), strict=True) if not count]:
            (report.problems if split == "train" else report.notes).append(
                f"{split}: classes without images ({len(empty)}): {some(empty)}"
            )
        listings[split] = listing
    report.problems += [f"{index.store.name()}: no split {name!r}" for name in splits if name not in listings]
    return listings


def _list_folders(report: CheckReport, root: str | os.PathLike, splits: Sequence[str]) -> dict[str, Listing]:
    listings: dict[str, Listing] = {}
    failures = []
    root = Path(root)
    for split in splits:
        known = listings["train"].classes if "train" in listings and split == "val" else None
        try:
            listing, unknown, empty = list_split(root, split, known)
        except UserError as error:
            failures.append(error)
            continue
        if split == ".":
            split, listing = "all", replace(listing, split="all", folder=root)
        listings[split] = listing
        if unknown:
            report.problems.append(f"{split}: classes missing from train ({len(unknown)}): {quoted(unknown)}")
        if empty:
            report.problems.append(f"{split}: class folders without images ({len(empty)}): {some(empty)}")
        if known:
            report.notes += absent(listing)
    if not listings:
        raise failures[0]
    report.problems += [str(error) for error in failures]
    return listings


def _list_any(report: CheckReport, root: str | os.PathLike, splits: Sequence[str]) -> dict[str, Listing]:
    """Listings of a format without checks of its own: reports what opening it raises."""
    listings: dict[str, Listing] = {}
    failures = []
    for split in splits:
        known = listings["train"].classes if "train" in listings else None
        try:
            listings[split] = open_data("classes", root, split, known)
        except UserError as error:
            failures.append(error)
    if not listings:
        raise failures[0]
    report.problems += [str(error) for error in failures]
    return listings


#: Format -> lists its splits, and reports what training would stop at.
LISTERS = {"image-folder": _list_folders, "shards": _list_shards}


def check_images(
    report: CheckReport,
    listing: Listing,
    decode: bool,
    workers: int,
    also: Callable[[int, int, int], str | None] | None = None,
) -> tuple[SplitReport, dict[bytes, int]]:
    """Read the images of one split.

    Args:
        report: gets the problems and notes.
        listing, decode, workers: see `check_imagefolder`.
        also: (index, width, height) -> what else is wrong with an image, or None.

    Returns:
        The split's report, and digest -> index of the first file with that content.
    """
    result = SplitReport(len(listing), dict(zip(listing.classes, listing.counts(), strict=True)))
    result.ignored = dict(sorted(listing.ignored.items()))
    result.left_out = dict(getattr(listing, "left_out", {}))
    probes: list[_Probe] = []
    first: dict[bytes, int] = {}
    for index, probe in enumerate(track(_probes(listing, decode, workers), len(listing), listing.split)):
        name = f"{listing.split}/{listing.paths[index]}"
        if probe.reason is not None:
            result.unreadable[name] = probe.reason
            report.problems.append(f"{name}: {probe.reason}")
            continue
        probes.append(probe)
        if also is not None and (problem := also(index, probe.width, probe.height)):
            report.problems.append(problem)
        other = first.setdefault(probe.digest, index)
        if listing.targets[other] != listing.targets[index]:
            report.conflicts.append((f"{listing.split}/{listing.paths[other]}", name))
    if probes:
        result.widths = _spread([probe.width for probe in probes])
        result.heights = _spread([probe.height for probe in probes])
    result.modes = dict(Counter(probe.mode for probe in probes).most_common())
    result.rotated = sum(probe.rotated for probe in probes)
    result.small = sum(min(probe.width, probe.height) < SMALL for probe in probes)
    if result.small:
        report.notes.append(f"{listing.split}: images with a side below {SMALL} pixels: {result.small}")
    report.notes += [*folders_between(listing), *left_out(listing)]
    return result, first


def _probes(listing: Listing, decode: bool, workers: int) -> Iterator[_Probe]:
    """Probe every image, in order."""
    if workers == 0:
        yield from (_probe(listing, decode, index) for index in range(len(listing)))
        return
    # The listing is sent to each process once, not with every index.
    with multiprocessing.Pool(workers, _Reader.set, (listing, decode)) as pool:
        yield from pool.imap(_Reader.probe, range(len(listing)), chunksize=32)


class _Reader:
    """The state of a pool process."""

    task: tuple[Listing, bool]

    @classmethod
    def set(cls, listing: Listing, decode: bool) -> None:
        end_with_parent()
        cls.task = listing, decode

    @classmethod
    def probe(cls, index: int) -> _Probe:
        return _probe(*cls.task, index)


def _probe(listing: Listing, decode: bool, index: int) -> _Probe:
    (data,) = listing.read_bytes([index])
    try:
        if isinstance(data, UserError):
            raise data
        header = probe_image(data, name="")
        if decode:
            read_image(data, name="")
    except UserError as error:
        reason = str(error).removeprefix(f"{listing.path(index)}: ").removeprefix(": ")
        return _Probe(0, 0, "", False, b"", reason)
    digest = hashlib.blake2b(data, digest_size=16).digest()
    return _Probe(header.width, header.height, header.mode, header.orientation != 1, digest, None)


def _spread(values: list[int]) -> tuple[int, int, int]:
    return min(values), round(statistics.median(values)), max(values)


def _tally(counts: dict[str, int]) -> str:
    return ", ".join(f"{name or 'without extension'} {count}" for name, count in counts.items())
