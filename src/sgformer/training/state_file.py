"""Training state on disk: written to a temporary file, sealed with a checksum, then renamed.

`torch.save` writes a ZIP archive; the seal is the archive's comment, so a checkpoint is a single file that `torch.load`
reads as usual. The preceding state is kept.

By hand: neither torch nor Lightning detects a checkpoint that a crash or a disk has damaged; they load or fail midway.
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
from sgformer.core.files import make_folder, refuse_links
from sgformer.models.released import read_pickle

SEAL = b"sgformer blake2b "  # followed by 64 hexadecimal digits, the checksum of everything before
LENGTH = len(SEAL) + 64
END_OF_ARCHIVE = struct.Struct("<4s4H2LH")  # the last field is the length of the comment


class StateIO(TorchCheckpointIO):
    """Writes Lightning's checkpoints sealed and fsynced."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a sealed file; removes it if writing fails.

        Raises:
            OSError: the disk is full or not writable; names the file.
        """
        path = Path(path)
        try:
            make_folder(path.parent)
            path.unlink(missing_ok=True)  # what a killed process left, or a link
            with path.open("x+b") as file:
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
    """Append the checksum to a ZIP archive opened for reading and writing."""
    end = file.seek(-END_OF_ARCHIVE.size, os.SEEK_END)
    *fields, comment = END_OF_ARCHIVE.unpack(file.read())
    if fields[0] != b"PK\5\6" or comment:
        raise ValueError("not a ZIP archive without a comment")
    file.seek(end)
    file.write(END_OF_ARCHIVE.pack(*fields, LENGTH))
    size = file.tell()
    file.write(SEAL + _digest(file, size))


def check_seal(path: Path) -> None:
    """Verify the checksum of a state file.

    Raises:
        UserError: the file is truncated, damaged or unreadable; names it.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END) - LENGTH
            file.seek(max(0, size))
            stored = file.read()
            if not stored.startswith(SEAL):
                raise UserError(f"{path}: not a complete checkpoint: truncated, or not written by `sgformer train`")
            if stored[len(SEAL) :] != _digest(file, size):
                raise UserError(f"{path}: damaged: its checksum does not match its content")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def read_step(path: Path) -> int:
    """Verify a state file and read its number of updates, without its tensors.

    Raises:
        UserError: the file is damaged, or not a training state.
    """
    check_seal(path)  # which whoever can write the file can write, too
    try:
        return int(read_pickle(path)["global_step"])
    except (UserError, ValueError, TypeError, KeyError, OverflowError) as error:
        why = str(error).removeprefix(f"{path}: ") if isinstance(error, UserError) else first_line(error)
        raise UserError(f"{path}: not a readable checkpoint ({why})") from None


def publish(unfinished: Path, path: Path, previous: Path) -> None:
    """Rename a written state to `path`; the existing one becomes `previous`."""
    refuse_links(path.parent)
    if path.exists():
        os.replace(path, previous)
    os.replace(unfinished, path)
    if hasattr(os, "O_DIRECTORY"):  # fsync the renames, too
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
    """The OSError behind an error of torch's writer, or None."""
    while error is not None:
        if isinstance(error, OSError):
            return error
        error = error.__cause__ or error.__context__
    return None
