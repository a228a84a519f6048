"""Memory that a run finds as its neighbours found it: present in this machine, if the machine is a virtual one."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable
from contextlib import suppress

HUGE_PAGE_BYTES = 2 << 20
"""Of x86-64, and of arm64 with pages of 4 KiB."""

_STEP_BYTES = 128 << 20
"""Touched between two looks at whether somebody wants an end: 0.3 s where the host has to find the memory."""


def huge_buffer(n_bytes: int) -> memoryview:
    """Return touched memory in huge pages where the system has them, as the arena is.

    A disk takes few pieces of memory per request (254 here): in pages of 4 KiB a read of 1 MiB is more than one request,
    and such reads gave 1.6 to 2.2 GB/s where these give 3.8. The mapping must be private: shared memory has none.
    """
    if sys.platform == "darwin":
        memory = mmap.mmap(-1, n_bytes)
        memory.write(bytes(n_bytes))
        return memoryview(memory)
    spare_bytes = 2 * HUGE_PAGE_BYTES  # so that every page of the buffer lies within a huge one
    memory = mmap.mmap(-1, n_bytes + spare_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    memory.write(bytes(n_bytes + spare_bytes))  # or the first reads would wait for its pages
    return memoryview(memory)[HUGE_PAGE_BYTES : HUGE_PAGE_BYTES + n_bytes]


def touch(n_bytes: int, check: Callable[[], None] = lambda: None) -> None:
    """Use this much memory once and free it; `check` is called now and then, and may raise.

    The host of a virtual machine takes back what lies idle there for some seconds, and gives it again page by page, at 1 to
    2 s per GB where that was measured (benchmarks/LOG.md, 2026-11-24). Whoever ran first would pay for those after.
    """
    touched = []
    for at in range(0, n_bytes, _STEP_BYTES):
        check()
        touched.append(huge_buffer(min(_STEP_BYTES, n_bytes - at)))
