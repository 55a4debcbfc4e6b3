"""Classification data in WebDataset-style tar shards, on a local disk or at any URL that fsspec supports.

`DIR/shards.json` gives the shard and the byte offset of every image, so each image takes one read. The order of images
is that of the source folder, and random numbers depend on (seed, epoch, index) in the same way, so a run on shards
equals the run on the folder bit for bit.

    sharding.make_shards("photos", "photos-shards")
    listing = open_split("photos-shards", "train")  # or "s3://bucket/photos-shards"; a folder gives an ImageFolder
    dataset = ImageFolderDataset(listing, transform)

A shard holds, for every image, KEY.jpg (the file's bytes, with the extension of its format), KEY.cls (its class index)
and KEY.json (its name). Images are shuffled once, so that programs that read shards sequentially meet all classes; KEY
is the index in the folder's order.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sgformer.core.errors import MissingError, StalledError, UserError
from sgformer.core.names import canonical, is_address, printable, some
from sgformer.core.parse import parse_json
from sgformer.data.image import read_image
from sgformer.data.imagefolder import Listing, place_of, scan, scan_splits
from sgformer.data.layouts import SPLIT
from sgformer.data.store import Store, unreadable

INDEX = "shards.json"
FORMAT, VERSION = "sgformer shards", 1
SPLITS = ("train", "val")
#: The index's columns for every image, and their types.
COLUMNS = {"names": str, "targets": int, "offsets": int, "sizes": int, "crc32": int}
LONGEST_NAME = 1024


# -- opening ----------------------------------------------------------------------------------------------------------


def is_shards(root: str | os.PathLike) -> bool:
    """Whether `root` is a folder with a shard index, or a URL (`s3://...`), which always means shards."""
    return is_address(root) or (Path(root) / INDEX).is_file()


def open_split(root: str | os.PathLike, split: str = "train", classes: Sequence[str] | None = None) -> Listing:
    """Open a split of a folder in the ImageNet layout, or of a folder or URL of shards.

    Args:
        root: the data set.
        split: `"train"` or `"val"`.
        classes: class names in index order; by default the data set's own.

    Raises:
        UserError: as `scan`; or the index or a shard is missing, damaged or unreachable.
    """
    if is_shards(root):
        return _listing(Index.read(root), split, classes)
    require_index(root)
    return scan(root, split, classes)


def open_splits(root: str | os.PathLike) -> tuple[Listing, Listing]:
    """Open `train` and `val`, with the class indices of `train`.

    Raises:
        UserError: as `open_split`.
    """
    if not is_shards(root):
        require_index(root)
        return scan_splits(root)
    index = Index.read(root)
    return _train(index, None), _listing(index, "val", None)


def open_train(root: str | os.PathLike, classes: Sequence[str] | None = None) -> ShardFolder:
    """The training images of shards, of which no class lacks images.

    Raises:
        UserError: as `open_split`.
    """
    return _train(Index.read(root), classes)


def _train(index: Index, classes: Sequence[str] | None) -> ShardFolder:
    train = _listing(index, "train", classes)
    if empty := [name for name, count in zip(train.classes, train.counts(), strict=True) if not count]:
        raise UserError(f"{index.store.name('train')}: classes without images ({len(empty)}): {some(empty)}")
    return train


def require_index(root: str | os.PathLike) -> None:
    """Raise UserError for shards without an index."""
    if has_tars_only(root):
        raise UserError(f"{root}: tar shards without {INDEX}; create it with: sgformer data index {root}")


def has_tars_only(root: str | os.PathLike) -> bool:
    """Whether a folder has tars in its splits. Tars beside class folders are the archives of those folders."""
    folders = [folder for name in SPLITS if (folder := Path(root) / name).is_dir()]
    if any(path.is_dir() for folder in folders for path in folder.iterdir()):
        return False
    return any(tars_in(Store(root), folder.name) for folder in folders)


def _listing(index: Index, split: str, classes: Sequence[str] | None) -> ShardFolder:
    listing, unknown = index.split(split, classes)
    if unknown:
        raise UserError(f"{index.store.name(split)}: classes unknown to training ({len(unknown)}): {some(unknown)}")
    if problems := listing.missing():
        raise UserError(some(problems, 3))
    return listing


# -- the index --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """A tar file's index entry: path relative to the root, size in bytes, SHA-256."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardFolder:
    """A split of a data set in shards. Image `i` is of class `classes[targets[i]]`; see also `ImageFolder`.

    Attributes:
        store: access to the shards.
        split: `"train"` or `"val"`.
        classes: class names in index order.
        paths: the images' names, CLASS/FILE in the source folder; sorted by class index, then by name.
        targets: class index of each image.
        shards: the split's tar files.
        places: (N, 4) int64: shard, offset, size in bytes, CRC-32 of each image.
        ignored: always empty.
    """

    store: Store
    split: str
    classes: tuple[str, ...]
    paths: tuple[str, ...]
    targets: tuple[int, ...]
    shards: tuple[Shard, ...]
    places: np.ndarray
    ignored: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> str:
        """The name of image `index` in messages: its shard and its name."""
        return f"{self.store.name(self.shards[self.places[index, 0]].file)}:{printable(self.paths[index])}"

    def counts(self) -> list[int]:
        """Images per class, in the order of `classes`."""
        return np.bincount(np.asarray(self.targets, dtype=np.int64), minlength=len(self.classes)).tolist()

    def entries(self) -> list[tuple[str, str]]:
        """(name, class) of each image; see `data.identity`."""
        return [(path, self.classes[target]) for path, target in zip(self.paths, self.targets, strict=True)]

    def read_bytes(self, indices: Sequence[int]) -> list[bytes | UserError]:
        """The files' bytes, or the error for each unreadable file; an unresponsive shard is a `StalledError`."""
        places = self.places[list(indices)].tolist()
        reads = self.store.read_many([(self.shards[shard].file, start, size) for shard, start, size, _ in places])
        results: list[bytes | UserError] = []
        for index, (_, _, size, crc), data in zip(indices, places, reads, strict=True):
            if isinstance(data, StalledError):
                results.append(data)
            elif len(data) != size:
                hint = "" if len(data) < size else "; does the server support range requests?"
                results.append(UserError(f"{self.path(index)}: got {len(data)} bytes instead of {size}{hint}"))
            elif zlib.crc32(data) != crc:
                results.append(UserError(f"{self.path(index)}: damaged: its checksum does not match {INDEX}"))
            else:
                results.append(data)
        return results

    def read_many(self, indices: Sequence[int]) -> Iterator[Image.Image | UserError]:
        """The images, or the error for each unreadable one, in the order of `indices`."""
        groups = [[index] for index in indices] if self.store.local else [list(indices)]
        for group in groups:
            for index, data in zip(group, self.read_bytes(group), strict=True):
                if isinstance(data, UserError):
                    yield data
                    continue
                try:
                    yield read_image(data, self.path(index))
                except UserError as error:
                    yield error

    def missing(self) -> list[str]:
        """One line for every shard that is missing or has another size."""

        def check(shard: Shard) -> str | None:
            try:
                size = self.store.size(shard.file)
            except StalledError as error:
                return str(error)
            if size in (None, shard.bytes):
                return None
            return f"{self.store.name(shard.file)}: {size} bytes instead of {shard.bytes}: truncated, or another shard"

        if not self.store.local:
            self.store.system()  # reports an invalid URL once, not per shard
        with ThreadPoolExecutor(16) as pool:
            return [line for line in pool.map(check, self.shards) if line]

    def damaged(self) -> Iterator[str | None]:
        """Verify the checksum of every shard: yields a line if it is damaged or unreadable, else None."""
        for shard in self.shards:
            digest = hashlib.sha256()
            try:
                with self.store.open(shard.file) as file:
                    while block := file.read(2**22):
                        digest.update(block)
            except UserError as error:
                yield str(error)
            except Exception as error:
                yield str(unreadable(self.store.name(shard.file), error))
            else:
                intact = digest.hexdigest() == shard.sha256
                yield None if intact else f"{self.store.name(shard.file)}: damaged: its checksum does not match {INDEX}"


@dataclass(frozen=True)
class Index:
    """The validated content of `shards.json`.

    Attributes:
        store: access to the files.
        classes: class names in index order.
        splits: split -> its shards, each with its columns (`COLUMNS`).
    """

    store: Store
    classes: tuple[str, ...]
    splits: Mapping[str, Sequence[tuple[Shard, Mapping[str, list[Any]]]]]

    @classmethod
    def read(cls, root: str | os.PathLike) -> Index:
        """Read and validate an index.

        Raises:
            UserError: the index is missing, unreachable or invalid; names it.
        """
        store = Store(root)
        name = store.name(INDEX)
        try:
            data = store.read(INDEX)
        except MissingError as error:
            raise UserError(
                f"{error}; convert a folder with sgformer data shards, or create the index of existing shards with: "
                f"sgformer data index {root}"
            ) from None
        content = parse_json(data, name)
        try:
            return cls(store, *_checked(content))
        except _InvalidIndex as error:
            raise UserError(f"{name}: {error}") from None

    def split(self, split: str, classes: Sequence[str] | None = None) -> tuple[ShardFolder, list[str]]:
        """The listing of a split, and those of its classes that are not among `classes`; their images are left out.

        Raises:
            UserError: the split is missing or empty.
        """
        if not self.splits.get(split):
            cure = f"; {SPLIT}" if split == "val" and self.splits.get("train") else ""
            raise UserError(f"{self.store.name(INDEX)}: no split {split!r} (splits: {some(sorted(self.splits))}){cure}")
        order = tuple(self.classes if classes is None else classes)
        place = {canonical(name): i for i, name in enumerate(order)}
        known = [place.get(canonical(name), -1) for name in self.classes]
        names: list[str] = []
        targets: list[int] = []
        blocks, present = [], set()
        for number, (_, columns) in enumerate(self.splits[split]):
            names += columns["names"]
            present.update(columns["targets"])
            targets += [known[target] for target in columns["targets"]]
            ranges = [columns[name] for name in ("offsets", "sizes", "crc32")]
            blocks.append(np.array([[number] * len(ranges[0]), *ranges], dtype=np.int64).T)
        places = np.concatenate(blocks)
        # The folder's order. Where names do not determine it (foreign shards), the shards' order is kept.
        ranked = sorted(
            (i for i in range(len(names)) if targets[i] >= 0), key=lambda i: (targets[i], *place_of(names[i]))
        )
        listing = ShardFolder(
            self.store,
            split,
            order,
            tuple(names[i] for i in ranked),
            tuple(targets[i] for i in ranked),
            tuple(shard for shard, _ in self.splits[split]),
            places[ranked],
        )
        return listing, sorted(self.classes[target] for target in present if known[target] < 0)


class _InvalidIndex(Exception):
    """The index is invalid; the message gives the reason."""


def _checked(content: Any) -> tuple[tuple[str, ...], dict[str, list[tuple[Shard, dict[str, list[Any]]]]]]:
    """Validate all types and bounds of an index; returns its classes and splits."""

    def must(valid: bool, problem: str) -> None:
        if not valid:
            raise _InvalidIndex(problem)

    must(isinstance(content, dict) and content.get("format") == FORMAT, f"not a shard index (format is not {FORMAT!r})")
    must(content.get("version") == VERSION, f"version {content.get('version')!s:.20}, this package reads {VERSION}")
    classes, splits = content.get("classes"), content.get("splits")
    must(isinstance(classes, list) and all(isinstance(c, str) and c for c in classes), "classes is not a list of names")
    must(0 < len(classes) == len(set(classes)), "classes is empty or has duplicates")
    must(isinstance(splits, dict) and set(splits) <= set(SPLITS), f"splits must be {' and '.join(SPLITS)}")
    result: dict[str, list[tuple[Shard, dict[str, list[Any]]]]] = {}
    for split, shards in splits.items():
        must(isinstance(shards, list), f"{split} is not a list of shards")
        result[split] = []
        for number, about in enumerate(shards):
            where = f"{split}, shard {number}"
            must(isinstance(about, dict), f"{where}: not a mapping")
            file, length, sha = (about.get(name) for name in ("file", "bytes", "sha256"))
            must(isinstance(file, str) and is_tar_name(file), f"{where}: file is not the bare name of a .tar")
            must(type(length) is int and 0 <= length < 2**62, f"{where}: bytes is not a size")
            must(isinstance(sha, str) and bool(re.fullmatch("[0-9a-f]{64}", sha)), f"{where}: sha256 is invalid")
            columns = {name: about.get(name) for name in COLUMNS}
            for name, kind in COLUMNS.items():
                column = columns[name]
                must(isinstance(column, list) and all(type(v) is kind for v in column), f"{where}: {name} is invalid")
            must(len({len(column) for column in columns.values()}) == 1, f"{where}: columns differ in length")
            must(len(columns["names"]) == about.get("samples") != 0, f"{where}: samples is not the number of images")
            must(
                all(0 < len(name) <= LONGEST_NAME for name in columns["names"]), f"{where}: a name is empty or too long"
            )
            must(all(0 <= t < len(classes) for t in columns["targets"]), f"{where}: a target is not a class index")
            must(all(0 <= crc < 2**32 for crc in columns["crc32"]), f"{where}: a crc32 is invalid")
            inside = all(
                min(o, s) >= 0 and o + s <= length for o, s in zip(columns["offsets"], columns["sizes"], strict=True)
            )
            must(inside, f"{where}: an image lies outside the file's {length} bytes")
            result[split].append((Shard(f"{split}/{file}", length, sha), columns))
    return tuple(classes), result


def is_tar_name(name: str) -> bool:
    """Whether a name is a bare tar file name: no path separators, not hidden."""
    return name.endswith(".tar") and not re.search(r"[/\\:\x00-\x1f\x7f]", name) and name[0] != "." and len(name) < 256


def tars_in(store: Store, split: str) -> list[str]:
    """The names of a split's tar files, sorted."""
    return [file for file in store.list(split) if is_tar_name(file)]


def write_index(store: Store, classes: Sequence[str], splits: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write `shards.json`: for every split its shards, with the entries of `Shard` and `COLUMNS`."""
    content = {"format": FORMAT, "version": VERSION, "classes": list(classes), "splits": splits}
    store.write(INDEX, json.dumps(content, separators=(",", ":")).encode())
