"""What is shown on the terminal and in logs: names from anywhere, which cannot steer a terminal, and no passwords."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

from sgformer.core.names import printable, without_login


def say(*lines: object, file: TextIO | None = None) -> None:
    """Print lines, by default to stdout; line breaks and whatever else in them does not print become escapes."""
    shown = (printable(without_login(str(line))) for line in lines)
    print("\n".join(shown), file=sys.stdout if file is None else file, flush=True)


def escape_log(name: str) -> None:
    """Escape the records of a logger as `say` escapes lines."""
    logging.getLogger(name).addFilter(_harmless)


def _harmless(record: logging.LogRecord) -> bool:
    record.msg, record.args = printable(without_login(record.getMessage())), ()
    return True


escape_log("sgformer")
