"""Peak memory of one step, measured in a fresh process: `python -m sgformer.bench.memory CASE`."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import json
import os
import resource
import subprocess
import sys

import torch

from sgformer.bench.cases import Case, Unsupported, build
from sgformer.core.errors import UserError
from sgformer.core.terminal import say


def peak_memory(case: Case, timeout: float = 1800) -> int:
    """Peak memory of the network and one step, weights included, in bytes.

    On the CPU: the rise of a fresh process's peak resident memory over its level after the imports. The first call of
    a compiled network, which includes the compiler, is not counted. On CUDA: torch's own count.

    Raises:
        Unsupported: the case does not run, or exceeds `timeout` seconds.
    """
    command = [sys.executable, "-m", "sgformer.bench.memory", json.dumps(dataclasses.asdict(case))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    # One arena: otherwise the result depends on which thread allocates.
    environment["MALLOC_ARENA_MAX"] = "1"
    # Return freed memory at once: otherwise glibc's heap retains up to 600 MiB for any network and hides the real need.
    environment["MALLOC_TRIM_THRESHOLD_"] = str(1 << 20)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
    except subprocess.TimeoutExpired:
        raise Unsupported(f"measuring memory took longer than {timeout:g} s") from None
    if done.returncode == -9:
        raise Unsupported("out of memory")
    if done.returncode:
        raise Unsupported((done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"])[-1][:200])
    return int(done.stdout.split()[-1])


def measure(case: Case) -> int:
    """As :func:`peak_memory`, in this process."""
    if torch.device(case.device).type == "cuda":
        step = build(case)
        if case.backend != "eager":
            step()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    (torch.randn(64, 64) @ torch.randn(64, 64)).sum()  # allocates the thread pool and the libraries' own buffers
    baseline = _resident("VmRSS")
    step = build(case)
    if case.backend == "compile":
        before = _resident("VmRSS")
        step()
        gc.collect()
        _trim()
        baseline += _resident("VmRSS") - before
    _reset_peak()
    step()
    return max(0, _resident("VmHWM") - baseline)


def _resident(name: str) -> int:
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        for line in file:
            if line.startswith(name + ":"):
                return int(line.split()[1]) << 10
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage << 10


def _reset_peak() -> None:
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak to the current resident size (Linux); elsewhere it covers the whole process


def _trim() -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


if __name__ == "__main__":
    try:
        say(measure(Case(**json.loads(sys.argv[1]))))
    except (Unsupported, UserError, RuntimeError, MemoryError) as error:
        sys.exit(" ".join(str(error).split())[:200] or type(error).__name__)
