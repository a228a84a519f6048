"""What this machine and this process have: memory, limits, the disk's read-ahead. Unknown is None."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import resource
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from gguf_pager import kernel
from gguf_pager.memory import allocator, cgroup


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of RAM of the machine as this process has it: all that any part of the program may plan with.

    `total_bytes` is the smaller of the RAM, `ram_bytes`, and `limit_bytes`, the tightest limit of a cgroup above this
    process (None without one, as `cgroup_version`). `available_bytes` is what can still be had; `held_bytes` is what this
    process holds and the kernel does not take back.
    """

    total_bytes: int
    available_bytes: int
    limit_bytes: int | None
    swap_bytes: int
    ram_bytes: int | None = None
    held_bytes: int = 0
    cgroup_version: int | None = None

    @property
    def reachable_bytes(self) -> int:
        """What this process can come to hold, with what it holds already."""
        return min(self.total_bytes, self.available_bytes + self.held_bytes)


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """Bytes of this process: resident, the most ever resident (None where unknown), and allocated, touched or not.

    `allocated_bytes` is what the allocator says it has handed out, or private address space where none says so truly
    (`allocator.find_allocator`); that does not grow when an allocation fits where another one was.
    """

    resident_bytes: int
    peak_bytes: int | None
    allocated_bytes: int


_LIBC = ctypes.CDLL(None)
_MLOCK_ONFAULT = 1


def give_back_free_memory() -> None:
    """Make what was freed in the heaps not resident any more, where the allocator can: what is allocated next is then seen."""
    allocator.trim()


def memory() -> Memory:
    """Return what RAM there is, as the kernel and the cgroups above this process state it."""
    ram, pages = psutil.virtual_memory(), _own_pages()
    total, available, limit, version = int(ram.total), int(ram.available), None, None
    for group in cgroup.find_groups(cgroup.OwnPages(pages.mapped_bytes, pages.locked_bytes)):
        available = min(available, group.available_bytes)
        if group.limit_bytes < total:
            total, limit, version = group.limit_bytes, group.limit_bytes, group.version
    return Memory(total, available, limit, int(psutil.swap_memory().total), int(ram.total), pages.held_bytes, version)


@dataclass(frozen=True, slots=True)
class _OwnPages:
    """This process's pages in bytes. `mapped`: of files, `locked`: those the kernel cannot take back, `held`: those it does
    not count as available, anonymous and locked ones."""

    mapped_bytes: int
    locked_bytes: int
    held_bytes: int


def _own_pages() -> _OwnPages:
    if sys.platform != "linux":
        resident = process_memory().resident_bytes
        return _OwnPages(0, 0, resident)
    try:
        pages = _kilobytes(Path("/proc/self/smaps_rollup"))  # counts its part of a page that others have mapped, too
        mapped = pages["Pss_File"]
    except (OSError, KeyError):  # before Linux 5.10, or forbidden
        pages = _kilobytes(Path("/proc/self/status"))
        return _OwnPages(pages["RssFile"], pages["VmLck"], pages["RssAnon"] + pages["RssShmem"] + pages["VmLck"])
    held = pages["Pss_Anon"] + pages["Pss_Shmem"]
    return _OwnPages(mapped, pages["Locked"], held + min(pages["Locked"], mapped))


def _kilobytes(path: Path) -> dict[str, int]:
    """Return the fields of a file of /proc that end in kB, in bytes."""
    lines = (line.partition(":") for line in kernel.read_lines(path))
    return {key: int(value.split()[0]) * 1024 for key, _, value in lines if value.endswith("kB")}


def process_memory() -> ProcessMemory:
    """Return what this process uses now."""
    if sys.platform == "linux":
        fields, known = _kilobytes(Path("/proc/self/status")), allocator.find_allocator()
        return ProcessMemory(fields["VmRSS"], fields["VmHWM"], fields["VmData"] if known is None else known.count_bytes())
    info = psutil.Process().memory_info()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
    return ProcessMemory(int(info.rss), int(peak), int(info.vms))


def lock_limit_bytes() -> int | None:
    """Return how much this process may lock in RAM; None: no limit.

    Whether it may lock more than it was set is for the kernel to say: root in a container may not always, and others with
    CAP_IPC_LOCK may. So one byte more is locked, of pages that are not there.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return None
    lock, flags = getattr(_LIBC, "mlock2", None), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    try:
        room = mmap.mmap(-1, soft + 1, flags=flags, prot=mmap.PROT_READ)  # nobody sets memory aside for such pages
    except (OSError, OverflowError, ValueError):
        return soft
    with room:
        view = np.frombuffer(room, np.uint8)
        address, n_bytes = ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(soft + 1)
        failed = lock is None or lock(address, n_bytes, ctypes.c_uint(_MLOCK_ONFAULT)) != 0
        del view  # or the mapping could not be closed
    return soft if failed else None


def page_cache_bytes(file: int, offset_bytes: int, n_bytes: int) -> int | None:
    """Return how much of a part of an open file is in the page cache, by mincore, in whole pages; None where that fails.

    `offset_bytes` is a multiple of mmap.ALLOCATIONGRANULARITY. Since 5.2 Linux tells the truth only to those who own the
    file or may write it, and "all of it" to others.
    """
    with mmap.mmap(file, n_bytes, access=mmap.ACCESS_READ, offset=offset_bytes) as window:
        pages = np.zeros(-(-n_bytes // mmap.PAGESIZE), np.uint8)
        view = np.frombuffer(window, np.uint8)
        failed = _LIBC.mincore(ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(n_bytes), ctypes.c_void_p(pages.ctypes.data))
        del view  # or the mapping could not be closed
    return None if failed else int((pages & 1).sum()) * mmap.PAGESIZE


def read_ahead_kb(path: str | Path) -> int | None:
    """Return the read-ahead of the device that holds a file, in KiB; None where it cannot be told."""
    setting = read_ahead_setting(path)
    return None if setting is None else cgroup.read_int(setting)


def read_ahead_setting(path: str | Path) -> Path | None:
    """Return the file under /sys in which a device's read-ahead can be read and set."""
    try:
        device = os.stat(path).st_dev
        node = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    except OSError:
        return None
    for folder in (node, node.parent):  # a partition's queue is its disk's
        if (folder / "queue" / "read_ahead_kb").exists():
            return folder / "queue" / "read_ahead_kb"
    return None


def cpu_name() -> str:
    """Return the processor's name for people."""
    if sys.platform == "darwin":
        asked = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False)
        return asked.stdout.strip() or platform.machine()
    with suppress(OSError):
        for line in kernel.read_lines(Path("/proc/cpuinfo")):
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def device_name(path: str | Path) -> str | None:
    """Return the name of the disk that holds a file, and its model where it tells one: "nvme0n1 (Samsung SSD 990)"."""
    setting = read_ahead_setting(path)
    if setting is None:
        return None
    disk = setting.parent.parent
    try:
        model = kernel.read_text(disk / "device" / "model")
    except OSError:
        return disk.name
    return f"{disk.name} ({model})" if model else disk.name
