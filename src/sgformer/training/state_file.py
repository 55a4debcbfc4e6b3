"""The training state on disk: written under another name, sealed with a checksum, and only then put in its place.

`torch.save` writes a ZIP archive; the seal is the archive's comment, so that a checkpoint is one file, which
`torch.load` reads as any other. The state before the last one is kept until the next.
"""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path
from typing import IO, Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from sgformer.core.errors import UserError, first_line

SEAL = b"sgformer blake2b "  # and 64 hexadecimal digits: of everything before
LENGTH = len(SEAL) + 64
END_OF_ARCHIVE = struct.Struct("<4s4H2LH")  # the last field is the length of the comment


class StateIO(TorchCheckpointIO):
    """How Lightning writes training states: sealed, and flushed to the disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a sealed file, or none.

        Raises:
            OSError: the disk is full, or does not let us write; names the file.
        """
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w+b") as file:
                torch.save(checkpoint, file)
                seal(file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:
            path.unlink(missing_ok=True)
            cause = _os_error(error)
            if cause is None:
                raise
            raise OSError(cause.errno, cause.strerror, str(path)) from error


def seal(file: IO[bytes]) -> None:
    """Add the checksum to a ZIP archive that is open for reading and writing."""
    end = file.seek(-END_OF_ARCHIVE.size, os.SEEK_END)
    *fields, comment = END_OF_ARCHIVE.unpack(file.read())
    if fields[0] != b"PK\5\6" or comment:
        raise ValueError("not a ZIP archive without a comment")
    file.seek(end)
    file.write(END_OF_ARCHIVE.pack(*fields, LENGTH))
    size = file.tell()
    file.write(SEAL + _digest(file, size))


def check_seal(path: Path) -> None:
    """Read a state file through.

    Raises:
        UserError: it is not to the bit what was written; names it.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END) - LENGTH
            file.seek(max(0, size))
            found = file.read()
            if not found.startswith(SEAL):
                raise UserError(f"{path}: not a whole checkpoint: cut short, or not written by `sgformer train`")
            if found[len(SEAL) :] != _digest(file, size):
                raise UserError(f"{path}: damaged: its checksum does not match what is in it")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def read_step(path: Path) -> int:
    """The number of updates in a state file, read without its tensors, after looking at its seal.

    Raises:
        UserError: it is damaged, or holds something else.
    """
    check_seal(path)
    try:
        return int(torch.load(path, map_location="cpu", mmap=True, weights_only=True)["global_step"])
    except Exception as error:  # a ZIP archive that holds anything else fails in many ways
        raise UserError(f"{path}: not a readable checkpoint ({first_line(error)})") from None


def publish(unfinished: Path, path: Path, previous: Path) -> None:
    """Put a written state in its place; the one that was there becomes the previous one."""
    if path.exists():
        os.replace(path, previous)
    os.replace(unfinished, path)
    if hasattr(os, "O_DIRECTORY"):  # the names have to reach the disk, too
        folder = os.open(path.parent, os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _digest(file: IO[bytes], size: int) -> bytes:
    """The checksum of a file's first `size` bytes."""
    digest = hashlib.blake2b(digest_size=32)
    file.seek(0)
    while size > 0 and (block := file.read(min(size, 2**22))):
        digest.update(block)
        size -= len(block)
    file.seek(0, os.SEEK_END)
    return digest.hexdigest().encode()


def _os_error(error: BaseException | None) -> OSError | None:
    """What the system said, where torch's writer hides it behind an error of its own."""
    while error is not None:
        if isinstance(error, OSError):
            return error
        error = error.__cause__ or error.__context__
    return None
