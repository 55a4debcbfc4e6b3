"""Errors meant for the person at the keyboard, and the gate to optional packages."""

from __future__ import annotations

import importlib
import signal
from pathlib import Path
from types import ModuleType


class UserError(ValueError):
    """Something the user can put right. The message is one line that names the file or value and says what to do.

    The command line prints it as `sgformer: error: ...` and exits with status 2.
    """

    LONGEST = 1000  # characters: what is quoted from a file must not fill the screen

    def __init__(self, message: str):
        # A DataLoader worker re-raises an exception as `type(whole traceback as text)`: keep the line that matters.
        kind = type(self)
        line = message.rsplit(f"{kind.__module__}.{kind.__qualname__}: ", 1)[-1].strip()
        super().__init__(line if len(line) <= self.LONGEST else line[: self.LONGEST - 4] + " ...")


class StalledError(UserError):
    """A file did not come: a disk, mount or server gave no answer, or a shard is gone.

    No image need be damaged, so `--bad-images skip` stops at it, too.
    """


class MissingError(StalledError):
    """There is no such file."""


class Interrupted(Exception):
    """Training was asked to stop by a signal and did so after an update, with its checkpoint written."""

    def __init__(self, signum: int, step: int, run: Path):
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}")
        self.signum = signum
        self.run = run


def first_line(error: BaseException) -> str:
    """What an error of a library or of the system says, short enough to be part of a line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    lines = text.strip().splitlines() or [type(error).__name__]
    return " ".join(lines[0].split())[:200]


def first_sentence(error: BaseException) -> str:
    """The beginning of what an error of a library says."""
    return first_line(error).split(". ")[0]


def require(module: str, extra: str) -> ModuleType:
    """Import an optional package, or say which extra brings it.

    Args:
        module: name to import, e.g. `"skimage.data"`.
        extra: the extra of this package that installs it, e.g. `"demo"`.

    Returns:
        The imported module.

    Raises:
        UserError: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # A package that is there but lacks one of its own needs is a broken install: let that traceback through.
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise
        raise UserError(
            f"this needs the package {error.name!r}, which is not installed: pip install 'sgformer[{extra}]'"
        ) from None
