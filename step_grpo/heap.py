"""The heap of the C library, where it is glibc: what a long run frees goes back, so that it does not grow."""

import ctypes
import os

ARENA_MAX = -8  # M_ARENA_MAX of malloc.h


def share() -> None:
    """Lets all threads of this process allocate from one heap.

    By itself glibc gives threads heaps of their own, and what is freed in one serves no other: a long run
    grew by tens of kilobytes a step (`benchmarks/soak.py` measures it). It heeds this only before threads
    run, so before JAX has devices. `MALLOC_ARENA_MAX` says otherwise.
    """
    if "MALLOC_ARENA_MAX" not in os.environ and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(ARENA_MAX, 1)


def trim() -> None:
    """Gives the system back all pages of the heap that nothing lies in.

    By itself glibc gives back what lies behind the last thing in use alone; what steps leave between the
    things that stay adds up.
    """
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
