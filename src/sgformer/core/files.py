"""Atomic file writes.

A file is written as `NAME.tmp` and renamed when complete. A killed process leaves at most that temporary file; readers
see either the old file or the new one.
"""

from __future__ import annotations

import errno
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sgformer.core.errors import UserError


@contextmanager
def replacing(path: str | os.PathLike[str], sync: bool = False) -> Iterator[Path]:
    """Yield a temporary path, renamed to `path` when the block ends and removed if the block fails.

    Args:
        path: the destination.
        sync: fsync before renaming, so that the file survives a power failure.

    Raises:
        OSError: the file cannot be written; names `path`, not the temporary file.
    """
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.tmp")
    try:
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


def try_folder(path: str | os.PathLike[str], option: str = "--out") -> None:
    """Try to create a folder and to write in it, before work whose results go there; nothing is left behind.

    Raises:
        UserError: that fails; names the folder and the option.
    """
    try:
        _try_to_write(Path(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({_why(error)}): name another folder with {option}") from None


def try_file(path: str | os.PathLike[str], option: str = "--out") -> None:
    """Try to write a file and to create its folder, before work whose result it takes; nothing is left behind.

    Raises:
        UserError: that fails; names the file and the option.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a folder")
        _try_to_write(path.parent, f"{path.name}.tmp")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({_why(error)}): name another file with {option}") from None


def _try_to_write(folder: Path, name: str | None = None) -> None:
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
