"""User-facing errors, and imports of optional packages."""

from __future__ import annotations

import importlib
import signal
from pathlib import Path
from types import ModuleType

from sgformer.core.names import printable, without_login

#: How this package is installed; docs/install.md says so at length. It is on no index: by its name alone, pip would
#: install what somebody else registers there.
INSTALL = "pip install '.{extra}' in the folder of sgformer's repository"


def how_to_install(extra: str = "") -> str:
    """The command that installs this package, with one of its extras."""
    return INSTALL.format(extra=f"[{extra}]" if extra else "")


class UserError(ValueError):
    """An error the user can fix. The message is one line: the offending file or value, and the remedy.

    What does not print is escaped, whatever names the message quotes, and addresses lose their passwords. The command
    line prints it as `sgformer: error: ...` and exits with status 2.
    """

    MAX_LENGTH = 1000  # characters: text quoted from a file must not fill the screen

    def __init__(self, message: str):
        # A DataLoader worker re-raises an exception as `type(traceback as text)`: keep its last line.
        kind = type(self)
        line = message.rsplit(f"{kind.__module__}.{kind.__qualname__}: ", 1)[-1].strip()
        line = printable(without_login(line))
        super().__init__(line if len(line) <= self.MAX_LENGTH else line[: self.MAX_LENGTH - 4] + " ...")


class StalledError(UserError):
    """A read failed before any content arrived: a disk, mount or server did not respond, or a shard is missing.

    The images themselves may be intact, so this stops a run even with `--bad-images skip`.
    """


class MissingError(StalledError):
    """The file does not exist."""


class Interrupted(Exception):
    """A signal stopped training after an update, with its checkpoint written."""

    def __init__(self, signum: int, step: int, run: Path):
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}")
        self.signum = signum
        self.run = run


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, at most 200 characters; the class name if the message is empty."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    lines = text.strip().splitlines() or [type(error).__name__]
    return " ".join(lines[0].split())[:200]


def first_sentence(error: BaseException) -> str:
    """The first sentence of an exception's message."""
    return first_line(error).split(". ")[0]


def require(module: str, extra: str) -> ModuleType:
    """Import an optional package, or raise an error that names the extra that installs it.

    Args:
        module: the name to import, e.g. `"skimage.data"`.
        extra: the extra of this package that installs it, e.g. `"demo"`.

    Returns:
        The imported module.

    Raises:
        UserError: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # The package is installed but lacks a dependency of its own, a broken installation: keep that traceback.
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise
        raise UserError(
            f"this needs the package {error.name!r}, which is not installed: {how_to_install(extra)}"
        ) from None
