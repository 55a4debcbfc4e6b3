"""Faults of the machine, put into words a user can act on."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from sgformer.errors import UserError

# What torch says when a process that reads images dies, and what gloo and NCCL say when their other end has gone.
WORKER = r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: ([\w ]+))?"
GONE = (
    r"Connection closed by peer|Connection reset by peer|Broken pipe|remote process exited|Socket Timeout|NCCL .*abort"
)

PR_SET_PDEATHSIG = 1  # of Linux's <sys/prctl.h>


def end_with_parent(worker: int = 0) -> None:
    """Have the system end this process, one that reads images, when the one it reads for is gone.

    One that waits to hand over a batch would wait for ever, and hold its memory, after the other was killed. Linux
    only: elsewhere torch's own look every five seconds has to do, which such a process does not come to.

    Args:
        worker: its number, which a `DataLoader` tells.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():  # killed before the line above
        os._exit(1)


@contextmanager
def plain_faults() -> Iterator[None]:
    """Turn the death of a process that reads images, or of another one of a distributed run, into a UserError."""
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if worker := re.search(WORKER, text):
            how = f"was killed ({worker[2].strip()})" if worker[2] else "ended unexpectedly"
            raise UserError(
                f"process {worker[1]}, which reads images, {how}: out of memory? try fewer --workers or a smaller "
                "--batch-size (--workers 0 reads in the main process and shows the reason)"
            ) from error
        if lacking := re.match(r"(\w+) does not have a deterministic implementation", text):
            raise UserError(f"--deterministic: this device has no deterministic {lacking[1]}; train without") from error
        if re.search(GONE, text):
            raise UserError(
                "another process of this run has ended; what it printed, or its machine's log, has the reason "
                "(killed, out of memory, lost network)"
            ) from error
        raise
