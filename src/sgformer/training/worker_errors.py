"""Faults of the machine, put into words a user can act on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from sgformer.core.errors import UserError

# What torch says when a process that reads images dies, and what gloo and NCCL say when their other end has gone.
WORKER = r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: ([\w ]+))?"
GONE = (
    r"Connection closed by peer|Connection reset by peer|Broken pipe|remote process exited|Socket Timeout|NCCL .*abort"
)


@contextmanager
def worker_errors() -> Iterator[None]:
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
