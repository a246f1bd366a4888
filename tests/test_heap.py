"""What is freed in the middle of the heap goes back to the system."""

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has such a heap")

FREED = '''"""Prints the resident kB around a trim of a heap of 64 MiB whose last block alone is in use."""
import ctypes
from step_grpo import heap

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)


def resident():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1])


heap.share()
blocks = [libc.malloc(4096) for _ in range(2**14)]
for block in blocks:
    ctypes.memset(block, 1, 4096)
for block in blocks[:-1]:
    libc.free(block)
full = resident()
heap.trim()
print(full, resident())
'''


def test_trim_gives_back_what_lies_between_things_in_use():
    said = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True).stdout
    full, trimmed = map(int, said.split())
    assert full - trimmed > 60 * 2**10
