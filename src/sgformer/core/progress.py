"""Progress on stderr: rich's bar on a terminal if installed, else one line of text every few seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from sgformer.core.names import printable
from sgformer.core.terminal import say

T = TypeVar("T")


def track(items: Iterable[T], total: int, label: str, every: float = 10.0) -> Iterator[T]:
    """Yield the items and show how many of `total` are done; without a terminal, one line every `every` seconds."""
    if sys.stderr.isatty():
        try:
            from rich.console import Console
            from rich.markup import escape
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        except ImportError:
            pass
        else:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
                yield from progress.track(items, total=total, description=escape(printable(label)))
            return
    start = last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last >= every:
            last = now
            left = (now - start) / done * (total - done)
            say(f"{label}: {done} of {total}, {left:.0f} s left", file=sys.stderr)
