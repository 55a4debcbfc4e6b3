"""Classification data in tar shards of the WebDataset convention, on a disk or behind any address that fsspec opens.

`DIR/shards.json` says in which shard, and from which byte on, every image lies, so that any image is one read: the
order of images is that of the folder they came from, chance depends on (seed, epoch, index) as there, and a run on
shards is the run on the folder to the bit.

    sharding.make_shards("photos", "photos-shards")
    listing = open_split("photos-shards", "train")  # or "s3://bucket/photos-shards"; a folder gives an ImageFolder
    dataset = ImageFolderDataset(listing, transform)

A shard holds, for every image, KEY.jpg (the file's bytes, whatever its format), KEY.cls (its class index) and KEY.json
(its name). Images lie in the shards in an order drawn once, so that programs that read shards from front to back see
all classes; KEY counts them in the folder's order.
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

from sgformer.core.errors import MissingError, StalledError, UserError, first_line
from sgformer.data.image import read_image
from sgformer.data.imagefolder import Listing, scan, scan_splits, some
from sgformer.data.store import Store, is_address, printable, unreadable

INDEX = "shards.json"
FORMAT, VERSION = "sgformer shards", 1
SPLITS = ("train", "val")
#: What the index says of every image, and the type of its column there.
COLUMNS = {"names": str, "targets": int, "offsets": int, "sizes": int, "crc32": int}
LONGEST_NAME = 1024


# -- which kind of data -----------------------------------------------------------------------------------------------


def is_shards(root: str | os.PathLike) -> bool:
    """Whether `root` is a folder with an index of shards, or an address (`s3://...`), which cannot be anything else."""
    return is_address(root) or (Path(root) / INDEX).is_file()


def open_split(root: str | os.PathLike, split: str = "train", classes: Sequence[str] | None = None) -> Listing:
    """One split of a folder in the ImageNet layout, or of a folder or address of shards.

    Args:
        root: where the data set is.
        split: `"train"` or `"val"`.
        classes: class names in the order of their indices; by default the data set's own.

    Raises:
        UserError: as `scan`; or the index or a shard is missing, damaged, or cannot be reached.
    """
    if is_shards(root):
        return _listing(Index.read(root), split, classes)
    _refuse_lone_tars(root)
    return scan(root, split, classes)


def open_splits(root: str | os.PathLike) -> tuple[Listing, Listing]:
    """`train` and `val`, with the class indices of `train`.

    Raises:
        UserError: as `open_split`.
    """
    if not is_shards(root):
        _refuse_lone_tars(root)
        return scan_splits(root)
    index = Index.read(root)
    train = _listing(index, "train", None)
    if lacking := [name for name, count in zip(train.classes, train.counts(), strict=True) if not count]:
        raise UserError(f"{index.store.name('train')}: classes without an image ({len(lacking)}): {some(lacking)}")
    return train, _listing(index, "val", None)


def _refuse_lone_tars(root: str | os.PathLike) -> None:
    """Tell of shards that have no index."""
    if has_tars_only(root):
        raise UserError(f"{root}: tar shards without {INDEX}; make it with: sgformer data index {root}")


def has_tars_only(root: str | os.PathLike) -> bool:
    """Whether a folder has tars in its splits. Beside class folders they are what those were unpacked from."""
    folders = [folder for name in SPLITS if (folder := Path(root) / name).is_dir()]
    if any(path.is_dir() for folder in folders for path in folder.iterdir()):
        return False
    return any(tars_in(Store(root), folder.name) for folder in folders)


def _listing(index: Index, split: str, classes: Sequence[str] | None) -> ShardFolder:
    listing, unknown = index.split(split, classes)
    if unknown:
        raise UserError(
            f"{index.store.name(split)}: classes that training does not know ({len(unknown)}): {some(unknown)}"
        )
    if problems := listing.missing():
        raise UserError(some(problems, 3))
    return listing


# -- the index --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """One tar file as the index has it: its path below the root, its length in bytes, and the SHA-256 of it all."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardFolder:
    """One split of a data set in shards. Image `i` is of class `classes[targets[i]]`; see also `ImageFolder`.

    Attributes:
        store: where the shards are.
        split: `"train"` or `"val"`.
        classes: class names; the position is the class index.
        paths: the images' names, CLASS/FILE in the folder they came from; sorted by class index, then by name.
        targets: class index of each image.
        shards: the split's tar files.
        places: (N, 4) int64: shard, first byte, number of bytes, CRC-32 of each image.
        ignored: always empty: shards hold images only.
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
        """What messages call image `index`: its shard, and its name."""
        return f"{self.store.name(self.shards[self.places[index, 0]].file)}:{printable(self.paths[index])}"

    def counts(self) -> list[int]:
        """Images per class, in the order of `classes`."""
        return np.bincount(np.asarray(self.targets, dtype=np.int64), minlength=len(self.classes)).tolist()

    def read_bytes(self, indices: Sequence[int]) -> list[bytes | UserError]:
        """The files' bytes, or why there are none: a shard that gives no answer is a `StalledError`."""
        places = self.places[list(indices)].tolist()
        found = self.store.read_many([(self.shards[shard].file, start, size) for shard, start, size, _ in places])
        results: list[bytes | UserError] = []
        for index, (_, _, size, crc), got in zip(indices, places, found, strict=True):
            if isinstance(got, StalledError):
                results.append(got)
            elif len(got) != size:
                more = "" if len(got) < size else "; does the server know ranges?"
                results.append(UserError(f"{self.path(index)}: {len(got)} bytes came instead of {size}{more}"))
            elif zlib.crc32(got) != crc:
                results.append(UserError(f"{self.path(index)}: damaged: its checksum is not the one in {INDEX}"))
            else:
                results.append(got)
        return results

    def read_many(self, indices: Sequence[int]) -> Iterator[Image.Image | UserError]:
        """The images, or why one cannot be read, in the order of `indices`."""
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
        """A line for every shard that is not there, or not as long as it was."""

        def look(shard: Shard) -> str | None:
            try:
                size = self.store.size(shard.file)
            except StalledError as error:
                return str(error)
            if size in (None, shard.bytes):
                return None
            return f"{self.store.name(shard.file)}: {size} bytes instead of {shard.bytes}: cut short, or not this shard"

        if not self.store.local:
            self.store.system()  # whatever is wrong with the address is one error, not one a shard
        with ThreadPoolExecutor(16) as pool:
            return [line for line in pool.map(look, self.shards) if line]

    def damaged(self) -> Iterator[str | None]:
        """Read every shard through: a line where it is not to the bit what it was, else None."""
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
                right = digest.hexdigest() == shard.sha256
                yield None if right else f"{self.store.name(shard.file)}: damaged: not the bytes that {INDEX} tells of"


@dataclass(frozen=True)
class Index:
    """What `shards.json` holds, looked through.

    Attributes:
        store: where it was read.
        classes: class names; the position is the class index.
        splits: split -> its shards, each with its columns (`COLUMNS`).
    """

    store: Store
    classes: tuple[str, ...]
    splits: Mapping[str, Sequence[tuple[Shard, Mapping[str, list[Any]]]]]

    @classmethod
    def read(cls, root: str | os.PathLike) -> Index:
        """Read and check an index.

        Raises:
            UserError: it is missing, cannot be reached, or is not whole and right; names it.
        """
        store = Store(root)
        name = store.name(INDEX)
        try:
            data = store.read(INDEX)
        except MissingError as error:
            raise UserError(
                f"{error}; convert a folder with sgformer data shards, or make it for shards that are there with: "
                f"sgformer data index {root}"
            ) from None
        try:
            content = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{name}: not JSON ({first_line(error)})") from None
        try:
            return cls(store, *_checked(content))
        except _Wrong as wrong:
            raise UserError(f"{name}: {wrong}") from None

    def split(self, split: str, classes: Sequence[str] | None = None) -> tuple[ShardFolder, list[str]]:
        """The listing of a split, and its classes that are not among `classes` (their images are left out).

        Raises:
            UserError: there is no such split, or nothing in it.
        """
        if not self.splits.get(split):
            raise UserError(f"{self.store.name(INDEX)}: no split {split!r} in it (it has {some(sorted(self.splits))})")
        order = tuple(self.classes if classes is None else classes)
        place = {name: i for i, name in enumerate(order)}
        known = [place.get(name, -1) for name in self.classes]
        names: list[str] = []
        targets: list[int] = []
        blocks, seen = [], set()
        for number, (_, columns) in enumerate(self.splits[split]):
            names += columns["names"]
            seen.update(columns["targets"])
            targets += [known[target] for target in columns["targets"]]
            rest = [columns[name] for name in ("offsets", "sizes", "crc32")]
            blocks.append(np.array([[number] * len(rest[0]), *rest], dtype=np.int64).T)
        places = np.concatenate(blocks)
        # The folder's order. Where names do not say it (shards of others), that of the shards decides.
        ranked = sorted((i for i in range(len(names)) if targets[i] >= 0), key=lambda i: (targets[i], names[i]))
        listing = ShardFolder(
            self.store,
            split,
            order,
            tuple(names[i] for i in ranked),
            tuple(targets[i] for i in ranked),
            tuple(shard for shard, _ in self.splits[split]),
            places[ranked],
        )
        return listing, sorted(self.classes[target] for target in seen if known[target] < 0)


class _Wrong(Exception):
    """What is wrong with an index, in a few words."""


def _checked(content: Any) -> tuple[tuple[str, ...], dict[str, list[tuple[Shard, dict[str, list[Any]]]]]]:
    """Classes and splits of an index, if everything in it is of the right kind and within its bounds."""

    def must(right: bool, what: str) -> None:
        if not right:
            raise _Wrong(what)

    must(isinstance(content, dict) and content.get("format") == FORMAT, f"not an index of shards (no {FORMAT!r} in it)")
    must(content.get("version") == VERSION, f"version {content.get('version')!s:.20}, this package reads {VERSION}")
    classes, splits = content.get("classes"), content.get("splits")
    must(isinstance(classes, list) and all(isinstance(c, str) and c for c in classes), "classes is no list of names")
    must(0 < len(classes) == len(set(classes)), "no classes, or one twice")
    must(isinstance(splits, dict) and set(splits) <= set(SPLITS), f"splits are {' and '.join(SPLITS)}")
    result: dict[str, list[tuple[Shard, dict[str, list[Any]]]]] = {}
    for split, shards in splits.items():
        must(isinstance(shards, list), f"{split} is no list of shards")
        result[split] = []
        for number, about in enumerate(shards):
            where = f"{split}, shard {number}"
            must(isinstance(about, dict), f"{where}: not a mapping")
            file, length, sha = (about.get(name) for name in ("file", "bytes", "sha256"))
            must(isinstance(file, str) and is_plain_tar(file), f"{where}: file is not the plain name of a .tar")
            must(type(length) is int and 0 <= length < 2**62, f"{where}: bytes is no length")
            must(isinstance(sha, str) and bool(re.fullmatch("[0-9a-f]{64}", sha)), f"{where}: sha256 is none")
            columns = {name: about.get(name) for name in COLUMNS}
            for name, kind in COLUMNS.items():
                column = columns[name]
                must(isinstance(column, list) and all(type(v) is kind for v in column), f"{where}: {name} is wrong")
            must(len({len(column) for column in columns.values()}) == 1, f"{where}: columns differ in length")
            must(len(columns["names"]) == about.get("samples") != 0, f"{where}: samples is not their number")
            must(
                all(0 < len(name) <= LONGEST_NAME for name in columns["names"]), f"{where}: a name is empty or too long"
            )
            must(all(0 <= t < len(classes) for t in columns["targets"]), f"{where}: a target is no class index")
            must(all(0 <= crc < 2**32 for crc in columns["crc32"]), f"{where}: a crc32 is none")
            inside = all(
                min(o, s) >= 0 and o + s <= length for o, s in zip(columns["offsets"], columns["sizes"], strict=True)
            )
            must(inside, f"{where}: an image lies outside of its {length} bytes")
            result[split].append((Shard(f"{split}/{file}", length, sha), columns))
    return tuple(classes), result


def is_plain_tar(name: str) -> bool:
    """Whether a name is that of a tar file right in its folder: nothing hidden, and nothing that leads elsewhere."""
    return name.endswith(".tar") and not re.search(r"[/\\:\x00-\x1f\x7f]", name) and name[0] != "." and len(name) < 256


def tars_in(store: Store, split: str) -> list[str]:
    """Names of a split's tar files, sorted."""
    return [file for file in store.list(split) if is_plain_tar(file)]


def write_index(store: Store, classes: Sequence[str], splits: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write `shards.json`: of every split its shards, with what `Shard` and `COLUMNS` name."""
    content = {"format": FORMAT, "version": VERSION, "classes": list(classes), "splits": splits}
    store.write(INDEX, json.dumps(content, separators=(",", ":")).encode())
