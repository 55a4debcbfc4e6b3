"""Processes of our own: child processes that end with their parent, and what none of ours prints."""

from __future__ import annotations

import os
import threading
import warnings


def ignore_image_warnings() -> None:
    """Ignore Pillow's warnings of odd metadata and of images that are large but within `data.image.MAX_PIXELS`: they
    would appear once per file and process. For our own processes; another program decides that itself."""
    warnings.filterwarnings("ignore", module=r"PIL\.")


def end_with_parent(worker: int = 0) -> None:
    """Call in a child process: it exits as soon as its parent is gone, whatever it is doing, and ignores warnings of
    images.

    Without this, a data worker blocked on its queue would hang forever after the training process was killed.

    Args:
        worker: the worker index that `DataLoader` passes to `worker_init_fn`; unused.
    """
    import multiprocessing  # not at the head: the command line starts without

    ignore_image_warnings()
    parent = multiprocessing.parent_process()
    if parent is None:  # not started by multiprocessing
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
