"""Atomic file writes.

A file is written as `NAME.tmp` and renamed when complete. A killed process leaves at most that temporary file; readers
see either the old file or the new one.

A run folder may come from somebody else, with links in it that lead elsewhere. Nothing is written through a link below
a folder that was passed to `distrust_links`, whatever its name is or was.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from sgformer.core.errors import UserError

_distrusted: set[tuple[int, int]] = set()  # device and inode of folders


def distrust_links(folder: str | os.PathLike[str]) -> None:
    """From now on this process writes through no link below a folder; the way to it may have some."""
    with suppress(OSError):
        _distrusted.add(_identity(folder))


def distrust_run(weights: str | os.PathLike[str]) -> None:
    """`distrust_links` for the run folder that weights are, or lie in: whoever made it may have set some, and results
    are often written there."""
    path = Path(weights)
    if path.is_dir() or (path.parent / "config.yaml").is_file():
        distrust_links(path if path.is_dir() else path.parent)


def refuse_links(path: str | os.PathLike[str]) -> None:
    """Raise UserError if `path`, or a folder on the way to it, is a link below a folder of `distrust_links`."""
    link = None
    place = Path(os.path.abspath(path))
    for part in (place, *place.parents) if _distrusted else ():
        with suppress(OSError):  # not there yet
            if link is not None and _identity(part) in _distrusted:
                raise UserError(f"{link}: a link in {part}, through which nothing is written; remove it")
            link = part if part.is_symlink() else link


def _identity(folder: str | os.PathLike[str]) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Create a folder, and those above it, unless it is there.

    Raises:
        UserError: see `refuse_links`.
        OSError: it cannot be created.
    """
    refuse_links(path)
    Path(path).mkdir(parents=True, exist_ok=True)
    return Path(path)


def remove_folder(path: str | os.PathLike[str]) -> None:
    """Remove a folder and what is in it, if it is there.

    Raises:
        UserError: see `refuse_links`.
        OSError: it cannot be removed.
    """
    refuse_links(path)
    if os.path.lexists(path):
        shutil.rmtree(path)


@contextmanager
def appending(path: str | os.PathLike[str], newline: str | None = None) -> Iterator[IO[str]]:
    """Open a text file to append to, in UTF-8; what UTF-8 cannot hold is escaped.

    Raises:
        UserError: see `refuse_links`; or it is no file, but a device, say.
        OSError: it cannot be opened.
    """
    with open_to_append(path, newline) as file:
        yield file


def open_to_append(path: str | os.PathLike[str], newline: str | None = None) -> IO[str]:
    """As `appending`, for callers that close the file."""
    refuse_links(path)
    if os.path.lexists(path) and not stat.S_ISREG(os.stat(path).st_mode):
        raise UserError(f"{path}: not a file; remove it")
    return open(path, "a", encoding="utf-8", errors="backslashreplace", newline=newline)


@contextmanager
def replacing(path: str | os.PathLike[str], sync: bool = False) -> Iterator[Path]:
    """Yield a temporary path, renamed to `path` when the block ends and removed if the block fails.

    Args:
        path: the destination.
        sync: fsync before renaming, so that the file survives a power failure.

    Raises:
        UserError: see `refuse_links`; a link in the file's own place is replaced.
        OSError: the file cannot be written; names `path`, not the temporary file.
    """
    path = Path(path)
    refuse_links(path.parent)
    unfinished = path.with_name(f"{path.name}.tmp")
    try:
        unfinished.unlink(missing_ok=True)  # what a killed process left, or a link
        yield unfinished
        if sync:
            with open(unfinished, "rb") as file:
                os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        if error.filename is None or os.fspath(error.filename) == str(unfinished):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
    finally:
        unfinished.unlink(missing_ok=True)


def fitting(stem: str, folder: str | os.PathLike[str], spare: int = 32) -> str:
    """A file name's stem, cut so that `spare` more bytes fit into the longest name that the file system takes."""
    try:
        limit = os.pathconf(folder, "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):  # not on Windows
        limit = 255
    encoded = os.fsencode(stem)
    if len(encoded) <= limit - spare:
        return stem
    return encoded[: limit - spare].decode("utf-8", "ignore")  # without the half of a last character


def try_folder(path: str | os.PathLike[str], option: str | None = "--out", beside: str | None = None) -> None:
    """Try to create a folder and to write in it, before work whose results go there; nothing is left behind.

    Args:
        path: the folder.
        option: what names it on the command line; None: an argument without a name.
        beside: the name of the temporary folder beside it, if it is written there and renamed.

    Raises:
        UserError: that fails; names the folder and the option.
    """
    place = Path(path)
    try:
        _try_to_write(place if beside is None else place.parent, beside)
    except OSError as error:
        advice = f"name another folder with {option}" if option else "name another folder"
        raise UserError(f"{path}: cannot be written ({_why(error)}): {advice}") from None


def try_file(path: str | os.PathLike[str], option: str | None = "--out") -> None:
    """Try to write a file and to create its folder, before work whose result it takes; nothing is left behind.

    Args:
        path: the file.
        option: what names it on the command line; None: an argument without a name.

    Raises:
        UserError: that fails; names the file and the option.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a folder")
        _try_to_write(path.parent, f"{path.name}.tmp")
    except OSError as error:
        named = f" with {option}" if option else ""
        raise UserError(f"{path}: cannot be written ({_why(error)}): name another file{named}") from None


def _try_to_write(folder: Path, name: str | None = None) -> None:
    refuse_links(folder)
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    existing = new[-1].parent if new else folder
    if not existing.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{existing} is not a directory")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        if name is not None and not os.path.lexists(folder / name):  # is the name possible?
            (folder / name).touch()
            (folder / name).unlink()
    finally:
        for place in new:
            with suppress(OSError):  # another process may have removed or filled it meanwhile
                place.rmdir()


def _why(error: OSError) -> str:
    return error.strerror or type(error).__name__


def write_text(path: str | os.PathLike[str], text: str, newline: str | None = None) -> None:
    """Write UTF-8 text atomically; `newline` is that of `open`. What UTF-8 cannot hold is escaped: \\udcff.

    Raises:
        OSError: the file cannot be written.
    """
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8", errors="backslashreplace", newline=newline)


def write_json(path: str | os.PathLike[str], value: Any, indent: int | None = 2) -> None:
    """Write JSON with a trailing newline, atomically; see `to_json`.

    Raises:
        OSError: the file cannot be written.
    """
    write_text(path, to_json(value, indent) + "\n")


def to_json(value: Any, indent: int | None = 2) -> str:
    """JSON text; NaN and infinity, which JSON lacks, become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value
