"""What malloc has handed out in this process, whichever allocator serves it: servers preload jemalloc, mimalloc or tcmalloc.

Each way of counting is tried with a few megabytes before its word is taken: glibc's mallinfo2 is there, and says nothing,
under an allocator that has taken malloc's place.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass

_LIBC = ctypes.CDLL(None)

_TRIAL_BYTES = (2 << 20, 40 << 20)
"""One from glibc's heap at the latest after a few frees, one mapped by itself always (its threshold ends at 32 MiB)."""

_TRIAL_SHARE = 0.9
"""Other threads may free a little meanwhile."""

_JEMALLOC_ALL_ARENAS = 4096
"""MALLCTL_ARENAS_ALL in jemalloc's malloc_macros.h."""


class _Mallinfo2(ctypes.Structure):
    """What glibc's mallinfo2 returns (mallinfo(3)): `uordblks` is in use in the heaps, `hblkhd` mapped by itself."""

    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks",
                                                     "uordblks", "fordblks", "keepcost")]


@dataclass(frozen=True, slots=True)
class Allocator:
    """A way to count what is handed out, and to make what was freed not resident any more."""

    name: str
    count_bytes: Callable[[], int]
    trim: Callable[[], None]


def _glibc() -> Allocator | None:
    mallinfo2, trim = getattr(_LIBC, "mallinfo2", None), getattr(_LIBC, "malloc_trim", None)
    if mallinfo2 is None or trim is None:
        return None
    mallinfo2.restype = _Mallinfo2

    def count_bytes() -> int:
        info = mallinfo2()
        return int(info.uordblks + info.hblkhd)

    return Allocator("glibc", count_bytes, lambda: trim(ctypes.c_size_t(0)))


def _jemalloc() -> Allocator | None:
    """Its statistics are exact, but as of the last time that `epoch` was written."""
    mallctl = getattr(_LIBC, "mallctl", None) or getattr(_LIBC, "je_mallctl", None)
    if mallctl is None:
        return None

    def count_bytes() -> int:
        now, n_bytes = ctypes.c_uint64(1), ctypes.c_size_t(0)
        mallctl(b"epoch", None, None, ctypes.byref(now), ctypes.c_size_t(8))
        length = ctypes.c_size_t(ctypes.sizeof(n_bytes))
        mallctl(b"stats.allocated", ctypes.byref(n_bytes), ctypes.byref(length), None, ctypes.c_size_t(0))
        return n_bytes.value

    def trim() -> None:
        for name in (b"thread.tcache.flush", b"arena.%d.purge" % _JEMALLOC_ALL_ARENAS):
            mallctl(name, None, None, None, ctypes.c_size_t(0))

    return Allocator("jemalloc", count_bytes, trim)


def _tcmalloc() -> Allocator | None:
    ask, release = (getattr(_LIBC, f"MallocExtension_{name}", None) for name in ("GetNumericProperty", "ReleaseFreeMemory"))
    if ask is None or release is None:
        return None

    def count_bytes() -> int:
        n_bytes = ctypes.c_size_t(0)
        ask(b"generic.current_allocated_bytes", ctypes.byref(n_bytes))
        return n_bytes.value

    return Allocator("tcmalloc", count_bytes, lambda: release())


def _mimalloc() -> Allocator | None:
    """It tells what it has committed, in steps of 64 KiB; a thread's own figures are added up when they are merged."""
    ask, merge, collect = (getattr(_LIBC, f"mi_{name}", None) for name in ("process_info", "stats_merge", "collect"))
    if ask is None or merge is None or collect is None:
        return None

    def count_bytes() -> int:
        merge()
        fields = [ctypes.c_size_t(0) for _ in range(8)]
        ask(*(ctypes.byref(field) for field in fields))
        return fields[5].value

    return Allocator("mimalloc", count_bytes, lambda: collect(ctypes.c_bool(True)))


def _sees_what_malloc_gives(allocator: Allocator) -> bool:
    """Return whether its count grows with blocks like those of a context's buffers, and shrinks when they are freed."""
    posix_memalign = _LIBC.posix_memalign  # what ggml takes
    n_seen = 0
    for n_bytes in _TRIAL_BYTES:
        before, block = allocator.count_bytes(), ctypes.c_void_p()
        if posix_memalign(ctypes.byref(block), ctypes.c_size_t(64), ctypes.c_size_t(n_bytes)):
            continue  # a limit on address space: nobody will get such a block
        during = allocator.count_bytes()
        _LIBC.free(block)
        allocator.trim()
        after = allocator.count_bytes()
        if min(during - before, during - after) < n_bytes * _TRIAL_SHARE:
            return False
        n_seen += 1
    return n_seen > 0


@functools.cache
def find_allocator() -> Allocator | None:
    """Return how to count what this process's allocator hands out; None where nobody tells the truth about it."""
    for make in (_glibc, _jemalloc, _tcmalloc, _mimalloc):
        allocator = make()
        if allocator is not None and _sees_what_malloc_gives(allocator):
            return allocator
    return None


def trim() -> None:
    """Make what was freed not resident any more, as far as the allocators here can."""
    for make in (_glibc, _jemalloc, _tcmalloc, _mimalloc):
        allocator = make()
        if allocator is not None:
            allocator.trim()
