"""Create tar shards from an image folder, or an index for existing shards; `shards.py` reads both."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from sgformer.core.errors import UserError, first_line
from sgformer.core.names import is_address, printable, some
from sgformer.core.parse import parse_json
from sgformer.core.progress import track
from sgformer.data.image import IMAGE_EXTENSIONS
from sgformer.data.imagefolder import ImageFolder, left_out, scan_splits
from sgformer.data.shards import COLUMNS, INDEX, LONGEST_NAME, SPLITS, tars_in, write_index
from sgformer.data.splitting import open_whole, unsplit
from sgformer.data.store import Store, appearing, new_folder, unreadable

log = logging.getLogger("sgformer")
BLOCK = tarfile.BLOCKSIZE
#: Class indices from this on require classes.txt.
MAX_UNNAMED = 1_000_000
#: A member of a shard is KEY.KIND; as in WebDataset, KEY ends at the first dot of the file name.
MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)


class _Hashed:
    """Wraps a file being read or written, tracking its SHA-256 and its length."""

    def __init__(self, file: IO[bytes]):
        self.file, self.digest, self.length, self.last = file, hashlib.sha256(), 0, b""

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.digest.update(data)
        self.length += len(data)
        self.last = (self.last + data)[-BLOCK:]
        return data

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.length += len(data)
        return self.file.write(data)

    def tell(self) -> int:
        return self.length


def make_shards(source: str | os.PathLike, out: str | os.PathLike, shard_size: int = 512) -> Path:
    """Pack a folder in the ImageNet layout into tar shards; the same folder gives the same bytes.

    Files are copied byte for byte, unreadable images included; what is left out is logged. `out` appears when it is
    complete.

    Args:
        source: folder with `train/CLASS/*` and `val/CLASS/*`, or `CLASS/*`, which becomes the split "train".
        out: folder to create.
        shard_size: maximum size of a shard in MB (10^6 bytes); a larger file gets a shard of its own.

    Returns:
        `out`.

    Raises:
        UserError: `source` has another layout, `out` is not empty, or `shard_size` is not above 0.
        OSError: a file cannot be read or written; `out` is then not created.
    """
    if shard_size < 1:
        raise UserError(f"--shard-size must be above 0, got {shard_size}")
    if is_address(out):
        raise UserError(f"{out}: shards are written to a local folder; copy it to its destination afterwards")
    out = new_folder(out)
    listings: Sequence[Any] = [open_whole(source)] if unsplit(source, "imagenet") else scan_splits(source)
    for line in (line for listing in listings for line in left_out(listing)):
        log.warning(f"note: {line}")
    with appearing(out) as part:
        splits = {listing.split: _write_split(listing, part / listing.split, shard_size) for listing in listings}
        write_index(Store(part), listings[0].classes, splits)
    return out


def _write_split(listing: ImageFolder, folder: Path, shard_size: int) -> list[dict[str, Any]]:
    """Write a split's shards; returns their index entries."""
    folder.mkdir()
    shards: list[dict[str, Any]] = []
    order = np.random.default_rng(0).permutation(len(listing)).tolist()
    writer: _Writer | None = None
    try:
        for index in track(order, len(order), f"packing {listing.split}"):
            name, target = listing.paths[index], listing.targets[index]
            members = _members(name, target, listing.path(index).read_bytes())
            if writer is not None and writer.length_with(members) > shard_size * 10**6:
                shards.append(writer.close())
                writer = None
            if writer is None:
                writer = _Writer(folder / f"{len(shards):06}.tar")
            writer.add(f"{index:08}", name, target, members)
        if writer is not None:
            shards.append(writer.close())
    finally:
        if writer is not None:
            writer.raw.close()
    return shards


class _Writer:
    """One shard being written."""

    def __init__(self, path: Path):
        self.path, self.raw = path, path.open("wb")
        self.file = _Hashed(self.raw)
        self.tar = tarfile.TarFile(fileobj=cast(IO[bytes], self.file), mode="w", format=tarfile.USTAR_FORMAT)
        self.columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}

    def length_with(self, members: Mapping[str, bytes]) -> int:
        """Size of the complete file if this were its last sample."""
        added = sum(BLOCK + _padded(len(data), BLOCK) for data in members.values())
        return _padded(self.file.length + added + 2 * BLOCK, tarfile.RECORDSIZE)  # two empty blocks mark the end

    def add(self, key: str, name: str, target: int, members: Mapping[str, bytes]) -> None:
        """Add one sample, from `_members`."""
        offset, *_ = [self._member(key + kind, data) for kind, data in members.items()]
        image, *_ = members.values()
        values = (name, target, offset, len(image), zlib.crc32(image))
        for column, value in zip(self.columns.values(), values, strict=True):
            column.append(value)

    def _member(self, name: str, data: bytes) -> int:
        """Write a member without time or user; returns the offset of its data."""
        member = tarfile.TarInfo(name)
        member.size = len(data)
        self.tar.addfile(member, io.BytesIO(data))
        return self.file.length - _padded(len(data), BLOCK)

    def close(self) -> dict[str, Any]:
        """Finish the file; returns its index entry."""
        self.tar.close()
        self.raw.close()
        return _entry(self.path.name, self.file, self.columns)


def _members(name: str, target: int, image: bytes) -> dict[str, bytes]:
    """A sample's members by kind, the image first."""
    about = {".cls": str(target).encode(), ".json": json.dumps({"name": name}).encode()}
    return {os.path.splitext(name)[1].lower(): image, **about}


def _padded(length: int, unit: int) -> int:
    return -(-length // unit) * unit


def _entry(name: str, file: _Hashed, columns: Mapping[str, list[Any]]) -> dict[str, Any]:
    facts = {"file": name, "bytes": file.length, "sha256": file.digest.hexdigest(), "samples": len(columns["names"])}
    return {**facts, **columns}


# -- an index for existing shards -------------------------------------------------------------------------------------


def index_shards(root: str | os.PathLike) -> dict[str, Any]:
    """Scan tar shards and write `shards.json` beside them.

    The shards are `root/train/*.tar` and `root/val/*.tar`. A sample consists of an image and a `.cls` with the class
    index, adjacent and with the same key; a `.json` may give the image's `name`. Class names are the lines of
    `root/classes.txt`, otherwise the indices.

    Args:
        root: a folder, or a URL that can be listed and written to.

    Returns:
        `{"samples": {split: count}, "classes": count, "extra": {kind: count}}`; `extra` counts unused members.

    Raises:
        UserError: an index exists, there are no shards, or a shard is incomplete or has an invalid sample; names the
            shard.
    """
    store = Store(root)
    if INDEX in store.list(""):
        raise UserError(f"{store.name(INDEX)}: already exists; remove it to recreate it")
    splits: dict[str, list[dict[str, Any]]] = {}
    extra: Counter[str] = Counter()
    for split in SPLITS:
        if files := tars_in(store, split):
            scans = (_scan_shard(store, f"{split}/{file}", extra) for file in files)
            splits[split] = list(track(scans, len(files), f"reading {split}"))
    if not splits:
        packed = [file for split in SPLITS for file in store.list(split) if file.endswith((".tgz", ".tar.gz"))]
        hint = "; decompress .gz: images are read by their offset in a shard" if packed else ""
        raise UserError(f"{store.name()}: expected train/*.tar and val/*.tar{hint}")
    highest = max(max(shard["targets"]) for shards in splits.values() for shard in shards)
    classes = _class_names(store, highest)
    write_index(store, classes, splits)
    samples = {split: sum(shard["samples"] for shard in shards) for split, shards in splits.items()}
    return {"samples": samples, "classes": len(classes), "extra": dict(extra)}


def _class_names(store: Store, highest: int) -> list[str]:
    if "classes.txt" not in store.list(""):
        if highest >= MAX_UNNAMED:  # before a name is generated for each
            raise UserError(f"{store.name()}: a .cls holds {highest}: this many classes must be named in classes.txt")
        return [str(i) for i in range(highest + 1)]
    where = store.name("classes.txt")
    try:
        names = [line.strip() for line in store.read("classes.txt").decode("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise UserError(f"{where}: not UTF-8 text") from None
    if len(set(names)) != len(names):
        raise UserError(f"{where}: repeated names: {some([name for name, n in Counter(names).items() if n > 1])}")
    if highest >= len(names):
        raise UserError(f"{where}: {len(names)} names, but class index {highest} occurs (indices start at 0)")
    return names


def _scan_shard(store: Store, path: str, extra: Counter[str]) -> dict[str, Any]:
    """Read one tar file sequentially; returns its index entry."""
    where = store.name(path)
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    sample: dict[str, Any] = {}
    done: set[str] = set()

    def finish() -> None:
        """Append the completed sample to the columns."""
        if not sample:
            return
        missing = [kind for kind in ("image", "cls") if kind not in sample]
        if missing:
            raise UserError(f"{where}: sample {_shown(sample['key'])} has no {' and no .'.join(missing)}")
        offset, size, crc, kind = sample["image"]
        name = sample.get("name") or f"{sample['key']}{kind}"
        for column, value in zip(columns.values(), (name, sample["cls"], offset, size, crc), strict=True):
            column.append(value)

    try:
        with store.open(path) as raw:
            file = _Hashed(raw)
            with tarfile.open(fileobj=cast(IO[bytes], file), mode="r|") as tar:
                for member in tar:
                    tar.members = []  # type: ignore[attr-defined]  # it would accumulate all members
                    parts = MEMBER.fullmatch(member.name)
                    if parts is None or not member.isreg() or member.issparse():
                        if not member.isdir():
                            extra[_shown(member.name.rpartition("/")[2])] += 1
                        continue
                    key, kind = parts[1], f".{parts[2].lower()}"
                    if sample.get("key") != key:
                        finish()
                        if key in done:
                            raise UserError(f"{where}: the members of sample {_shown(key)} are not adjacent")
                        done.add(key)
                        sample = {"key": key}
                    if len(key) > LONGEST_NAME - 16:
                        raise UserError(f"{where}: a member's name has {len(key)} characters")
                    if not _take(sample, kind, member, tar, where):
                        extra[_shown(kind)] += 1
            while file.read(2**20):  # the checksum includes everything after the end mark
                pass
            if file.last != bytes(BLOCK):  # tarfile accepts a file that ends between two members
                raise tarfile.ReadError("no end mark")
            finish()
    except (UserError, KeyboardInterrupt):
        raise
    except tarfile.TarError as error:
        raise UserError(f"{where}: not a complete tar file ({first_line(error)})") from None
    except OSError as error:
        raise unreadable(where, error) from None
    except Exception as error:  # from tarfile on broken headers, from drivers on broken connections
        raise UserError(f"{where}: not a readable tar file ({first_line(error)})") from None
    if not columns["names"]:
        raise UserError(f"{where}: holds no samples")
    return _entry(path.partition("/")[2], file, columns)


def _take(sample: dict[str, Any], kind: str, member: tarfile.TarInfo, tar: tarfile.TarFile, where: str) -> bool:
    """Add a member to its sample; False if it is not used."""
    key = _shown(sample["key"])
    if kind in IMAGE_EXTENSIONS:
        if "image" in sample:
            raise UserError(f"{where}: sample {key} has two images, {sample['image'][3]} and {kind}")
        data = _content(tar, member)
        sample["image"] = (member.offset_data, len(data), zlib.crc32(data), kind)
    elif kind == ".cls":
        text = _content(tar, member)[:40] if member.size <= 32 else b"?"
        if not re.fullmatch(rb"\s*\d{1,9}\s*", text):
            raise UserError(f"{where}: {key}.cls does not hold a class index")
        sample["cls"] = int(text)
    elif kind == ".json":
        with contextlib.suppress(UserError):
            about = parse_json(_content(tar, member), key) if member.size <= 2**20 else {}
            name = about.get("name") if isinstance(about, dict) else None
            if isinstance(name, str) and 0 < len(name) <= LONGEST_NAME:
                sample["name"] = name
    else:
        return False
    return True


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None
    data = file.read()
    if len(data) != member.size:
        raise tarfile.ReadError("unexpected end of data")
    return data


def _shown(text: str) -> str:
    return printable(text if len(text) <= 60 else f"{text[:57]}...")
