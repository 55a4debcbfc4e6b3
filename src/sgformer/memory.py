"""What the C library does with freed memory."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt, in malloc.h


def keep_freed_memory() -> bool:
    """Let this process keep the memory it frees, instead of giving it back to the system after every large tensor.

    glibc maps anew whatever is larger than 32 MiB at most and trims its heap; the system then zeroes page after page
    of what the next step needs again. Where the same large tensors come and go, as in training on the CPU, that costs a
    sixth of the time (docs/performance.md). The process stays as large as it has ever been.

    Returns:
        Whether the C library took the setting; other libraries than glibc have no such setting.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, 1 << 30)) and bool(mallopt(_TRIM_THRESHOLD, (1 << 31) - 1))
