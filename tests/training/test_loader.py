"""Processes that read images end with the one they read for."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("lightning")
from sgformer.core.errors import UserError
from sgformer.training.worker_errors import worker_errors

# A batch that does not fit in a pipe, so that both readers wait to hand one over; the second can read the first one's
# pipe, too, so that it never breaks.
PROGRAM = """
import multiprocessing, os, sys, time
import numpy as np
from sgformer.data.imagefolder import EpochSampler
from sgformer.training.fit import build_loader

class Pictures:
    def __getitem__(self, key):
        return np.zeros(1 << 20, np.uint8), os.getpid()

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    loader = build_loader(Pictures(), EpochSampler(100, 1, train=False), 2, list)
    batches = iter(loader)
    print(*{next(batches)[0][1] for _ in range(8)}, flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_readers_that_wait_to_hand_over_a_batch_end_with_a_killed_process(tmp_path, method):
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "program.py"), method]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    readers = [int(pid) for pid in process.stdout.readline().split()]
    try:
        assert len(readers) == 2 and all(map(alive, readers))
        time.sleep(2)  # both are waiting
        process.kill()
        process.wait()
        deadline = time.monotonic() + 30  # without help they stay for ever
        while any(map(alive, readers)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not any(map(alive, readers))
    finally:
        process.kill()
        for reader in filter(alive, readers):
            os.kill(reader, signal.SIGKILL)


def alive(pid: int) -> bool:
    """Whether there is such a process, other than one that has ended and nobody asked for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "DataLoader worker (pid 31) is killed by signal: Bus error. It is possible that dataloader's workers are "
            "out of shared memory. Please try to raise your shared memory limit."
        ),
        RuntimeError("unable to write to file </torch_31_1>: No space left on device (28)"),
        RuntimeError("unable to allocate shared memory(shm) for file </torch_31_1>: Success (0)"),
        OSError(28, "No space left on device", "/dev/shm/sem.mp-x"),
    ],
)
def test_full_shared_memory_says_what_it_is(error):
    with (
        pytest.raises(UserError, match=r"shared memory .* full \(/dev/shm .*--shm-size 8g .*--workers"),
        worker_errors(),
    ):
        raise error


@pytest.mark.slow
def test_a_script_without_a_main_guard_says_what_it_is(tmp_path):
    """Where workers are spawned, they run the script again."""
    from photos import QUICK, make_photos

    photos = make_photos(tmp_path / "photos")
    options = {**QUICK, "workers": 1, "data": str(photos), "run": str(tmp_path / "run")}
    lines = ["import multiprocessing, sgformer", "multiprocessing.set_start_method('spawn', force=True)"]
    lines.append(f"sgformer.train('classify', **{options!r})")
    (tmp_path / "program.py").write_text("\n".join(lines))
    done = subprocess.run([sys.executable, str(tmp_path / "program.py")], capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("sgformer.core.errors.UserError: data workers run the main script again")
