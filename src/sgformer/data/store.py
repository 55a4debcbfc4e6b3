"""Access to a data set's files and byte ranges, on a local disk or at any URL that fsspec supports."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from sgformer.core.errors import MissingError, StalledError, UserError, first_line, require
from sgformer.core.files import replacing, try_folder
from sgformer.core.names import is_address, without_login
from sgformer.data.image import in_time

MAX_OPEN = 64  # files that a process keeps open


# The local half is by hand: fsspec's local reads take 1.5 to 4 times as long (docs/notes/libraries.md).
class Store:
    """Files below a local folder or a URL that fsspec supports (`s3://bucket/data`, `memory://data`).

    Safe to fork and to pickle: every process opens its own files and connections.

    Args:
        root: the folder or URL.
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
        """A file's name in messages, and its path if it is local."""
        return os.path.join(self.root, file) if self.local else without_login(f"{self.root}/{file}".rstrip("/"))

    def read(self, file: str, start: int = 0, size: int | None = None) -> bytes:
        """Read `size` bytes from `start`; fewer at the end of the file; None: all.

        Raises:
            StalledError: the file cannot be read, whatever its content.
        """
        (result,) = self.read_many([(file, start, size)])
        if isinstance(result, StalledError):
            raise result
        return result

    def read_many(self, ranges: Sequence[tuple[str, int, int | None]]) -> list[bytes | StalledError]:
        """As `read`, for several ranges; from a URL concurrently if the driver supports it."""
        if self.local:
            return [in_time(lambda one=one: self._read_local(*one), self.name(one[0])) for one in ranges]  # type: ignore[misc]

        def read() -> list[Any]:
            system, root = self.system()
            files = [f"{root}/{file}" for file, _, _ in ranges]
            starts = [None if size is None else start for _, start, size in ranges]
            ends = [None if size is None else start + size for _, start, size in ranges]
            return system.cat_ranges(files, starts, ends, on_error="return")

        try:
            results = in_time(read, self.name(ranges[0][0]))
        except UserError:
            raise
        except Exception as error:  # drivers raise their libraries' exceptions
            results = [error] * len(ranges)
        return [
            unreadable(self.name(one[0]), result) if isinstance(result, BaseException) else bytes(result)
            for one, result in zip(ranges, results, strict=True)
        ]

    def size(self, file: str) -> int | None:
        """A file's size in bytes; None if the server does not report it.

        Raises:
            StalledError: the file is missing or unreachable.
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
        """Open a file for sequential reading."""
        if self.local:
            return open(self.name(file), "rb")
        system, root = self.system()
        return system.open(f"{root}/{file}", "rb")

    def list(self, folder: str) -> list[str]:
        """The names of the files in a folder, sorted; empty if the folder does not exist."""
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
        """Write a small file, on a local disk atomically.

        Raises:
            UserError: the URL cannot be written to.
            OSError: the local file cannot be written.
        """
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
        """The fsspec file system and the root's path in it.

        Raises:
            UserError: the URL's protocol is unknown, or its driver is not installed.
        """
        if self._process != os.getpid():  # connections do not survive a fork
            self._reset()
        if self._system is None:
            core = require("fsspec.core", extra="train")
            scheme = self.root.partition("://")[0]
            try:
                system, root = core.url_to_fs(self.root)
            except ImportError as error:
                raise UserError(f"{self.root}: {scheme}:// needs another package: {first_line(error)}") from None
            except Exception as error:
                hint = "" if "://" in first_line(error) else f" ({first_line(error)})"
                raise UserError(f"{self.root}: fsspec cannot open this URL{hint}") from None
            self._system = system, root.rstrip("/")
        return self._system

    def _read_local(self, file: str, start: int, size: int | None) -> bytes | StalledError:
        try:
            if size is None or not hasattr(os, "pread"):
                with open(self.name(file), "rb") as opened:
                    opened.seek(start)
                    return opened.read(-1 if size is None else size)
            parts, handle = [], self._handle(file)
            while size and (part := os.pread(handle, size, start)):  # short reads are possible
                parts.append(part)
                start, size = start + len(part), size - len(part)
            return b"".join(parts)
        except OSError as error:
            return unreadable(self.name(file), error)

    def _handle(self, file: str) -> int:
        """An open file descriptor, cached: opening a file per image is slow on network file systems."""
        if self._process != os.getpid():
            self._reset()
        with self._lock:
            if file not in self._files:
                while len(self._files) >= MAX_OPEN:
                    os.close(self._files.popitem(last=False)[1])
                self._files[file] = os.open(self.name(file), os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            self._files.move_to_end(file)
            return self._files[file]

    def __del__(self) -> None:
        if getattr(self, "_process", None) == os.getpid():
            for handle in self._files.values():
                with contextlib.suppress(OSError):
                    os.close(handle)


def new_folder(out: str | os.PathLike[str]) -> Path:
    """The absolute path of a folder that `appearing` will create, before the work whose results go there.

    Raises:
        UserError: it is a file or holds something, or cannot be written.
    """
    path = Path(out).absolute()  # `.` has no name for the temporary folder beside it
    if os.path.exists(path) and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{out}: not an empty folder; pass another one")
    try_folder(out, option=None, beside=_part(path).name)
    return path


def _part(out: Path) -> Path:
    return out.with_name(f".{out.name}.part-{os.getpid()}")


@contextlib.contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `out`, renamed to `out` when the block succeeds, otherwise removed.

    Args:
        out: of `new_folder`.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    part = _part(out)
    try:
        part.mkdir()
        yield part
        if out.exists():
            out.rmdir()
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def unreadable(name: str, error: BaseException) -> StalledError:
    """The error for a file that cannot be read."""
    if isinstance(error, FileNotFoundError):
        return MissingError(f"{name}: no such file")
    return StalledError(f"{name}: cannot be read ({first_line(error)})")
