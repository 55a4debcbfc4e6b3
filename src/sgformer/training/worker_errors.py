"""Translate failures of worker processes into actionable errors."""

from __future__ import annotations

import multiprocessing
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sgformer.core.errors import UserError

# torch's message when a data worker dies, and those of gloo and NCCL when a peer is gone.
WORKER = r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: ([\w ]+))?"
GONE = (
    r"Connection closed by peer|Connection reset by peer|Broken pipe|remote process exited|Socket Timeout|NCCL .*abort"
)


# torch's and the kernel's messages when a worker cannot put a batch into /dev/shm.
SHARED_MEMORY = (
    r"out of shared memory|insufficient shared memory|shared memory\(shm\)|shared memory object|"
    r"unable to (?:write to|mmap|resize) file|No space left on device.*(?:/dev/shm|torch_)"
)
#: What to do if worker processes run the script that starts them.
UNGUARDED = (
    "data workers run the main script again when they start: put its code under if __name__ == '__main__':, "
    "or load in the main process with workers=0"
)


@contextmanager
def worker_errors() -> Iterator[None]:
    """Turn into a UserError the death of a data worker or of a distributed peer, full shared memory, a batch norm
    without enough values, and a training state of another network."""
    try:
        yield
    except UserError:
        raise
    except (RuntimeError, OSError, ValueError) as error:
        text = " ".join(str(error).split())
        if re.search(SHARED_MEMORY, text):
            raise UserError(
                f"the shared memory of the data workers is full ({_shared_memory()}): start the container with "
                "--shm-size 8g or --ipc host, or use fewer --workers (0: load in the main process)"
            ) from error
        if "Error(s) in loading state_dict" in text:
            raise UserError(
                "the training state is of another network than this version builds: start a new run, with --weights"
            ) from error
        if "Expected more than 1 value per channel" in text:
            raise UserError(
                "a batch norm of this network needs more than one value per channel: raise --batch-size (per process "
                "and accumulated part it must be above 1) or --image-size"
            ) from error
        if not isinstance(error, RuntimeError):
            raise
        if worker := re.search(WORKER, text):
            how = f"was killed ({worker[2].strip()})" if worker[2] else "ended unexpectedly"
            if not worker[2] and is_unguarded():
                raise UserError(UNGUARDED) from error
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


def refuse_reentry() -> None:
    """Raise UserError in a data worker that runs the main script, and with it the training, again."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise UserError(UNGUARDED)


def is_unguarded() -> bool:
    """Whether workers run the main script again, and it does not guard itself against that."""
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    if script is None or multiprocessing.get_start_method() == "fork":
        return False
    try:
        return "__name__" not in Path(script).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def _shared_memory() -> str:
    try:
        return f"/dev/shm has {shutil.disk_usage('/dev/shm').total / 2**20:.0f} MB"
    except OSError:
        return "/dev/shm"
