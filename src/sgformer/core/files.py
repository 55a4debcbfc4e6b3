"""Files that are written whole or not at all.

What is being written is called `NAME.tmp` until it is complete. A process that is killed leaves at most that, and
whoever reads the name finds the old file or the new one.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: str | os.PathLike[str], sync: bool = False) -> Iterator[Path]:
    """The name to write to in place of `path`; renamed over it at the end of the block, removed if the block fails.

    Args:
        path: the file.
        sync: wait until the bytes are on the disk before renaming: the file also survives a power cut.

    Raises:
        OSError: cannot be written; names `path`, not the temporary name.
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


def write_text(path: str | os.PathLike[str], text: str, newline: str | None = None) -> None:
    """Write UTF-8 text; `newline` as of `open`.

    Raises:
        OSError: cannot be written.
    """
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8", newline=newline)


def write_json(path: str | os.PathLike[str], value: Any, indent: int | None = 2) -> None:
    """Write JSON, with a line break at the end; see `to_json`.

    Raises:
        OSError: cannot be written.
    """
    write_text(path, to_json(value, indent) + "\n")


def to_json(value: Any, indent: int | None = 2) -> str:
    """JSON text; NaN and infinity, which JSON does not have, become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value
