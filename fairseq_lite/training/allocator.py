"""Memory that a step frees is wanted again by the next: let the C library keep it."""

from __future__ import annotations

import ctypes
import os
import sys

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_TOP_PAD_BYTES = 64 * 1024 * 1024


def keep_freed_memory() -> bool:
    """Tell glibc not to give freed memory back to the system.

    By default it maps every large tensor anew and unmaps it when freed, so each step faults its
    pages in again; on a CPU that cost a tenth to a fifth of a bfloat16 step. The peak stays the
    same, but the process does not shrink below it. MALLOC_… in the environment comes first.

    Returns:
        Whether it was done: only on Linux with glibc.
    """
    if not sys.platform.startswith("linux") or any(k.startswith("MALLOC_") for k in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, _TOP_PAD_BYTES))
    taken = [mallopt(name, value) == 1 for name, value in settings]
    return all(taken)
