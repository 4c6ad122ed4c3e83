"""The allocator's settings: taken on glibc, left alone where the environment sets them."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

CALL = "from fairseq_lite.training import allocator; print(allocator.keep_freed_memory())"
# A block that glibc would map and unmap each time, four times over; counts the later page faults.
FAULTS = """
import ctypes, resource, sys
from fairseq_lite.training import allocator
if sys.argv[1] == "keep":
    assert allocator.keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def touch():
    block = libc.malloc(ctypes.c_size_t(1 << 26))
    ctypes.memset(block, 1, 1 << 26)
    libc.free(ctypes.c_void_p(block))
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")


def run(code: str, *args: str, **environment: str) -> str:
    words = [sys.executable, "-c", code, *args]
    found = subprocess.run(
        words, capture_output=True, text=True, timeout=60, env=environment or None
    )
    assert found.returncode == 0, found.stderr
    return found.stdout.strip()


@glibc
def test_freed_memory_is_used_again():
    assert int(run(FAULTS, "keep")) * 10 < int(run(FAULTS, "leave"))


@glibc
def test_the_environment_comes_first():
    assert run(CALL, PATH="/usr/bin:/bin", MALLOC_TRIM_THRESHOLD_="1000000") == "False"
