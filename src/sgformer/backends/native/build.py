"""Compiling the kernels with this machine's own C++ compiler, for its own processor, with a cache.

By hand and not by ``torch.utils.cpp_extension``, which needs ninja and the headers of Python and torch, takes a minute,
and ignores that machines with different processors may share a home.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from sgformer.backends.native.interface import declare

SOURCE = Path(__file__).with_name("kernels.cpp")  # which includes all others
# No -ffast-math: rounding by a large constant, which exp() needs, would be optimised away.
FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-fPIC", "-shared", "-fno-math-errno", "-Wno-psabi")
# -mcpu has another meaning on x86. On many Intel processors gcc by default copies vectors of 64 bytes in halves, which
# costs linear maps two thirds of their speed.
X86 = platform.machine().lower() in ("x86_64", "amd64")
PROCESSOR = ("-march=native", "-mprefer-vector-width=512") if X86 else ("-mcpu=native",)
TIMEOUT = 120  # seconds for the compiler


class UnavailableError(RuntimeError):
    """The kernels cannot be compiled here; the message is one line."""


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernels, compiled now if they are not in the cache.

    Raises:
        UnavailableError: there is no C++ compiler with OpenMP, it failed, or the result cannot be loaded.
    """
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "g++", "c++", "clang++"))), None)
    if compiler is None:
        raise UnavailableError("there is no C++ compiler (tried $CXX, g++, c++, clang++)")
    command = [compiler, *FLAGS, *PROCESSOR]
    try:
        status = os.stat(compiler)  # another compiler version, another file
        name = _file_name(*command, str(status.st_size), str(status.st_mtime_ns), _processor())
        folder = _cache()
        if folder is not None and (folder / name).is_file():
            with contextlib.suppress(OSError):  # damaged: compile it again
                return declare(ctypes.CDLL(str(folder / name)))
        with contextlib.ExitStack() as stack:
            if folder is None or not _can_write(folder):  # compiled for this process alone
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            _compile(command, folder / name)
            return declare(ctypes.CDLL(str(folder / name)))
    except OSError as error:
        raise UnavailableError(f"{error.filename or SOURCE.name}: {error.strerror or error}") from error


def sources() -> list[Path]:
    """All files that the compiler reads here."""
    return sorted(path for path in SOURCE.parent.iterdir() if path.suffix in (".cpp", ".h"))


def _file_name(*key: str) -> str:
    """The file name of the library: one for each key and content of the sources."""
    parts = [*key, *(part for path in sources() for part in (path.name, path.read_text()))]
    return f"kernels-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.so"


def _compile(command: Sequence[str], file: Path) -> None:
    # Under another name first: concurrent processes must not load a half-written file.
    handle, name = tempfile.mkstemp(suffix=".so", dir=file.parent)
    os.close(handle)
    try:
        done = subprocess.run(
            [*command, str(SOURCE), "-o", name], capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line.lower()] or ["no reason given"]
            raise UnavailableError(f"{command[0]} failed: {lines[0][:200]}")
        os.replace(name, file)
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"{command[0]} did not finish within {TIMEOUT} s") from None
    finally:
        Path(name).unlink(missing_ok=True)


def _cache() -> Path | None:
    """The cache folder; None without a home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sgformer"
    except RuntimeError:
        return None


def _can_write(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def _processor() -> str:
    """The identity of the processor's instruction set: different machines may share a home."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(
        sorted({line for line in lines if line.startswith(("flags", "model name", "Features", "CPU part"))})
    )
