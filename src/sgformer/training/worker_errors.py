"""Translate failures of worker processes into actionable errors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from sgformer.core.errors import UserError

# torch's message when a data worker dies, and those of gloo and NCCL when a peer is gone.
WORKER = r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: ([\w ]+))?"
GONE = (
    r"Connection closed by peer|Connection reset by peer|Broken pipe|remote process exited|Socket Timeout|NCCL .*abort"
)


@contextmanager
def worker_errors() -> Iterator[None]:
    """Turn the death of a data worker or of a distributed peer into a UserError."""
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if worker := re.search(WORKER, text):
            how = f"was killed ({worker[2].strip()})" if worker[2] else "ended unexpectedly"
            raise UserError(
                f"data worker {worker[1]} {how}: out of memory? try fewer --workers or a smaller "
                "--batch-size (--workers 0 loads in the main process and shows the cause)"
            ) from error
        if missing := re.match(r"(\w+) does not have a deterministic implementation", text):
            raise UserError(f"--deterministic: this device has no deterministic {missing[1]}; drop it") from error
        if re.search(GONE, text):
            raise UserError(
                "another process of this run has died; its output or its machine's log shows the cause "
                "(killed, out of memory, lost network)"
            ) from error
        raise
