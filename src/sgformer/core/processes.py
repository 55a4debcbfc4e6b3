"""Processes that work for another one."""

from __future__ import annotations

import multiprocessing
import os
import threading


def end_with_parent(worker: int = 0) -> None:
    """Called in a process that works for another one: end it, whatever it is doing, as soon as that one is gone.

    A reader that waits to hand over a batch, say, would wait for ever after its training was killed.

    Args:
        worker: its number, which a `DataLoader` tells.
    """
    parent = multiprocessing.parent_process()
    if parent is None:  # nobody started it
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
