"""Files of a data set, on a disk or behind any address that fsspec opens; ranges of bytes of them."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from sgformer.core.errors import MissingError, StalledError, UserError, first_line, require
from sgformer.core.files import replacing
from sgformer.data.image import in_time

MOST_OPEN = 64  # files that a process keeps open


def is_address(root: str | os.PathLike) -> bool:
    """Whether data is behind an address, such as `s3://bucket/data`, not in a folder."""
    return bool(re.match(r"[A-Za-z][\w+.-]*(::[\w+.-]+)*://", os.fspath(root)))


class Store:
    """Files below a local folder, or below an address that fsspec opens (`s3://bucket/data`, `memory://data`).

    Safe to fork and to pickle: open files and connections are each process's own.

    Args:
        root: the folder or address.
    """

    def __init__(self, root: str | os.PathLike):
        self.root = os.fspath(root).rstrip("/") if is_address(root) else os.fspath(root)
        self.local = not is_address(root)
        if self.root.startswith(("file://", "local://")):
            self.root, self.local = self.root.partition("://")[2], True
        self._reset()

    def _reset(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._files: OrderedDict[str, int] = OrderedDict()
        self._system: tuple[Any, str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "local": self.local}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def name(self, file: str = "") -> str:
        """What messages call a file."""
        return os.path.join(self.root, file) if self.local else f"{self.root}/{file}".rstrip("/")

    def read(self, file: str, start: int = 0, size: int | None = None) -> bytes:
        """`size` bytes from `start` on; fewer where the file ends.

        Raises:
            StalledError: it cannot be read, which says nothing about its content.
        """
        (result,) = self.read_many([(file, start, size)])
        if isinstance(result, StalledError):
            raise result
        return result

    def read_many(self, ranges: Sequence[tuple[str, int, int | None]]) -> list[bytes | StalledError]:
        """As `read`, for several ranges: from an address all at once, where its driver can do that."""
        if self.local:
            return [in_time(lambda one=one: self._read_local(*one), self.name(one[0])) for one in ranges]  # type: ignore[misc]

        def read() -> list[Any]:
            system, root = self.system()
            files = [f"{root}/{file}" for file, _, _ in ranges]
            starts = [None if size is None else start for _, start, size in ranges]
            ends = [None if size is None else start + size for _, start, size in ranges]
            return system.cat_ranges(files, starts, ends, on_error="return")

        try:
            found = in_time(read, self.name(ranges[0][0]))
        except UserError:
            raise
        except Exception as error:  # drivers raise whatever their libraries do
            found = [error] * len(ranges)
        return [
            unreadable(self.name(one[0]), got) if isinstance(got, BaseException) else bytes(got)
            for one, got in zip(ranges, found, strict=True)
        ]

    def size(self, file: str) -> int | None:
        """Bytes in a file; None where an address does not tell.

        Raises:
            StalledError: it is not there, or cannot be reached.
        """
        try:
            if self.local:
                return os.stat(self.name(file)).st_size
            system, root = self.system()
            return in_time(lambda: system.info(f"{root}/{file}")["size"], self.name(file))
        except UserError:
            raise
        except Exception as error:
            raise unreadable(self.name(file), error) from None

    def open(self, file: str) -> IO[bytes]:
        """A file to be read from front to back."""
        if self.local:
            return open(self.name(file), "rb")
        system, root = self.system()
        return system.open(f"{root}/{file}", "rb")

    def list(self, folder: str) -> list[str]:
        """Names of the files in a folder, sorted; none if there is no such folder."""
        try:
            if self.local:
                return sorted(entry.name for entry in os.scandir(self.name(folder)) if entry.is_file())
            system, root = self.system()
            return sorted(path.rstrip("/").rpartition("/")[2] for path in system.ls(f"{root}/{folder}", detail=False))
        except FileNotFoundError:
            return []
        except UserError:
            raise
        except Exception as error:
            raise unreadable(self.name(folder), error) from None

    def write(self, file: str, data: bytes) -> None:
        """Write a small file, whole or not at all."""
        if not self.local:
            system, root = self.system()
            try:
                system.pipe_file(f"{root}/{file}", data)
            except Exception as error:
                raise UserError(f"{self.name(file)}: cannot be written ({first_line(error)})") from None
            return
        with replacing(self.name(file)) as unfinished:
            unfinished.write_bytes(data)

    def system(self) -> tuple[Any, str]:
        """fsspec's file system and the path of the root in it.

        Raises:
            UserError: the address is of no known kind, or what opens its kind is not installed.
        """
        if self._process != os.getpid():  # connections do not survive a fork
            self._reset()
        if self._system is None:
            core = require("fsspec.core", extra="train")
            scheme = self.root.partition("://")[0]
            try:
                system, root = core.url_to_fs(self.root)
            except ImportError as error:
                raise UserError(f"{self.root}: {scheme}:// needs a package more: {first_line(error)}") from None
            except Exception as error:
                hint = "" if "://" in first_line(error) else f" ({first_line(error)})"
                raise UserError(f"{self.root}: fsspec cannot open such an address{hint}") from None
            self._system = system, root.rstrip("/")
        return self._system

    def _read_local(self, file: str, start: int, size: int | None) -> bytes | StalledError:
        try:
            if size is None or not hasattr(os, "pread"):
                with open(self.name(file), "rb") as opened:
                    opened.seek(start)
                    return opened.read(-1 if size is None else size)
            parts, handle = [], self._handle(file)
            while size and (part := os.pread(handle, size, start)):  # the system may give less than it is asked for
                parts.append(part)
                start, size = start + len(part), size - len(part)
            return b"".join(parts)
        except OSError as error:
            return unreadable(self.name(file), error)

    def _handle(self, file: str) -> int:
        """An open file: opening one for every image is what a network file system is slow at."""
        if self._process != os.getpid():
            self._reset()
        with self._lock:
            if file not in self._files:
                while len(self._files) >= MOST_OPEN:
                    os.close(self._files.popitem(last=False)[1])
                self._files[file] = os.open(self.name(file), os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            self._files.move_to_end(file)
            return self._files[file]

    def __del__(self) -> None:
        if getattr(self, "_process", None) == os.getpid():
            for handle in self._files.values():
                with contextlib.suppress(OSError):
                    os.close(handle)


@contextlib.contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A folder to fill, beside `out`, whose place it takes when the block has ended well; else it is removed.

    Args:
        out: not there, or an empty folder.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.part-{os.getpid()}")
    try:
        part.mkdir()
        yield part
        if out.exists():
            out.rmdir()
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def unreadable(name: str, error: BaseException) -> StalledError:
    """The error of a file that did not come."""
    if isinstance(error, FileNotFoundError):
        return MissingError(f"{name}: no such file")
    return StalledError(f"{name}: cannot be read ({first_line(error)})")


def printable(text: str) -> str:
    """A name from a file of a stranger's, fit for a terminal."""
    return text if text.isprintable() else ascii(text)[1:-1]
