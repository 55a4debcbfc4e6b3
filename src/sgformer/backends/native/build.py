"""Compiling the kernels with this machine's own C++ compiler, for its own processor, with a cache.

By hand and not by ``torch.utils.cpp_extension``, which needs ninja and the headers of Python and torch, takes a minute,
and ignores that machines with different processors may share a home.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
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

log = logging.getLogger("sgformer")


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
        if folder is not None and _can_write(folder):
            if (foreign := foreign_part(folder)) is None:
                return _load(folder / name) or _compile(command, folder / name)
            log.warning(
                f"{folder}: not loaded from, as others own or can write {foreign}: the kernels are compiled for this "
                "process alone (chmod go-w, or name another folder in XDG_CACHE_HOME)"
            )
        with tempfile.TemporaryDirectory() as private:
            return _compile(command, Path(private) / name)
    except OSError as error:
        raise UnavailableError(f"{error.filename or SOURCE.name}: {error.strerror or error}") from error


def sources() -> list[Path]:
    """All files that the compiler reads here."""
    return sorted(path for path in SOURCE.parent.iterdir() if path.suffix in (".cpp", ".h"))


def _file_name(*key: str) -> str:
    """The file name of the library: one for each key and content of the sources."""
    parts = [*key, *(part for path in sources() for part in (path.name, path.read_text()))]
    return f"kernels-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.so"


def _load(file: Path) -> ctypes.CDLL | None:
    """A compiled library; None if it is not there, damaged, without a symbol, or if others can write it."""
    if not file.is_file() or foreign_part(file) is not None:
        return None
    with contextlib.suppress(OSError, AttributeError):
        return declare(ctypes.CDLL(str(file)))
    return None


def _compile(command: Sequence[str], file: Path) -> ctypes.CDLL:
    # Under another name first: concurrent processes must not load a half-written file. It is loaded under that name,
    # as the system's loader would give a damaged library again that it holds under the file's own.
    handle, name = tempfile.mkstemp(suffix=".so", dir=file.parent)
    os.close(handle)
    try:
        done = subprocess.run(
            [*command, str(SOURCE), "-o", name], capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line.lower()] or ["no reason given"]
            raise UnavailableError(f"{command[0]} failed: {lines[0][:200]}")
        os.chmod(name, 0o700)  # whatever the umask
        library = declare(ctypes.CDLL(name))
        os.replace(name, file)
        return library
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"{command[0]} did not finish within {TIMEOUT} s") from None
    finally:
        Path(name).unlink(missing_ok=True)


def _cache() -> Path | None:
    """The cache folder; None without a home. A relative path is ignored, as the XDG specification says."""
    try:
        given = Path(os.environ.get("XDG_CACHE_HOME", ""))
        base = given if given.is_absolute() else Path.home() / ".cache"
    except RuntimeError:
        return None
    return base / "sgformer" if base.is_absolute() else None


def _can_write(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def foreign_part(path: Path) -> Path | None:
    """The first part of an absolute path, links followed, by which another user could change what is found there: not
    owned by this user or root, or writable by others; None if there is none. A path that ends in a folder that only
    its owner can write, below folders of which the same is true or that are sticky, as /tmp, has none."""
    if not hasattr(os, "getuid"):  # Windows
        return None
    here, left, links = Path(path.anchor), list(reversed(path.parts[1:])), 0
    while True:
        about = here.lstat()
        if about.st_uid not in (os.getuid(), 0) or (not left and about.st_uid != os.getuid()):
            return here
        if stat.S_ISLNK(about.st_mode):
            target, here, links = Path(os.readlink(here)), here.parent, links + 1
            if links > 40:
                return path
            left += reversed(target.parts)  # an absolute one begins anew, as pathlib joins
        elif _written_by_others(about) and not (left and about.st_mode & stat.S_ISVTX):
            return here
        if not left:
            return None
        here = here.parent if left[-1] == ".." else here / left[-1]
        left.pop()


def _written_by_others(about: os.stat_result) -> bool:
    """Whether someone else has the right to write; a group of this user alone, as many systems make it, is no one."""
    if about.st_mode & stat.S_IWOTH:
        return True
    if not about.st_mode & stat.S_IWGRP:
        return False
    import grp
    import pwd

    try:
        user, group = pwd.getpwuid(os.getuid()).pw_name, grp.getgrgid(about.st_gid)
    except KeyError:
        return True
    return group.gr_name != user or bool(set(group.gr_mem) - {user})


def _processor() -> str:
    """The identity of the processor's instruction set: different machines may share a home."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(
        sorted({line for line in lines if line.startswith(("flags", "model name", "Features", "CPU part"))})
    )
