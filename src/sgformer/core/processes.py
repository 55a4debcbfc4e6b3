"""Child processes that end with their parent."""

from __future__ import annotations

import multiprocessing
import os
import threading


def end_with_parent(worker: int = 0) -> None:
    """Call in a child process: it exits as soon as its parent is gone, whatever it is doing.

    Without this, a data worker blocked on its queue would hang forever after the training process was killed.

    Args:
        worker: the worker index that `DataLoader` passes to `worker_init_fn`; unused.
    """
    parent = multiprocessing.parent_process()
    if parent is None:  # not started by multiprocessing
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
