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

_CGROUP_V1_UNLIMITED = 1 << 60
"""cgroup v1 states 'no limit' as the largest multiple of a page."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of RAM. `limit_bytes` is the cgroup's, None without one; `available_bytes` respects it."""

    total_bytes: int
    available_bytes: int
    limit_bytes: int | None
    swap_bytes: int


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """Bytes of this process: resident, the most ever resident (None where unknown), and allocated, touched or not.

    `allocated_bytes` is what the C library has handed out where it tells (glibc 2.33 on), and private address space
    elsewhere, which does not grow when an allocation fits where another one was.
    """

    resident_bytes: int
    peak_bytes: int | None
    allocated_bytes: int


class _Mallinfo2(ctypes.Structure):
    """What glibc's mallinfo2 returns (mallinfo(3)): `uordblks` is in use in the heaps, `hblkhd` mapped by itself."""

    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks",
                                                     "uordblks", "fordblks", "keepcost")]


_LIBC = ctypes.CDLL(None)


def give_back_free_memory() -> None:
    """Make what was freed in the heaps not resident any more, where the C library can: what is allocated next is then seen."""
    trim = getattr(_LIBC, "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


def memory() -> Memory:
    """Return what RAM there is, as the kernel and the cgroup of this process state it."""
    ram = psutil.virtual_memory()
    available, limit = int(ram.available), None
    group = _cgroup_memory(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    if group is not None:
        limit, used = group
        available = min(available, max(0, limit - used))
    return Memory(int(ram.total), available, limit, int(psutil.swap_memory().total))


def _read_int(path: Path) -> int | None:
    try:
        return int(kernel.read_text(path))
    except (OSError, ValueError):
        return None


def _cgroup_memory(membership: Path, root: Path) -> tuple[int, int] | None:
    """Return (limit, used without reclaimable cache) of the tightest memory cgroup above this process, if there is one."""
    try:
        lines = kernel.read_lines(membership)
    except OSError:
        return None
    tightest: tuple[int, int] | None = None
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            base, limit_file, usage_file = root, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base, limit_file, usage_file = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        folder = base / name.lstrip("/")
        while True:
            limit = _read_int(folder / limit_file)
            if limit is not None and limit < _CGROUP_V1_UNLIMITED and (tightest is None or limit < tightest[0]):
                used = (_read_int(folder / usage_file) or 0) - _reclaimable(folder / "memory.stat")
                tightest = (limit, max(0, used))
            if folder in (base, folder.parent):
                break
            folder = folder.parent
    return tightest


def _reclaimable(stat: Path) -> int:
    """Return the bytes of file cache that the kernel would give up first."""
    try:
        fields = dict(line.split() for line in kernel.read_lines(stat))
    except (OSError, ValueError):
        return 0
    return int(fields.get("total_inactive_file", fields.get("inactive_file", 0)))


def process_memory() -> ProcessMemory:
    """Return what this process uses now."""
    if sys.platform == "linux":
        fields = {}
        for line in kernel.read_lines(Path("/proc/self/status")):
            key, _, value = line.partition(":")
            if value.endswith("kB"):
                fields[key] = int(value.split()[0]) * 1024
        allocated = fields["VmData"]
        mallinfo2 = getattr(_LIBC, "mallinfo2", None)
        if mallinfo2 is not None:
            mallinfo2.restype = _Mallinfo2
            info2 = mallinfo2()
            allocated = info2.uordblks + info2.hblkhd
        return ProcessMemory(fields["VmRSS"], fields["VmHWM"], allocated)
    info = psutil.Process().memory_info()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
    return ProcessMemory(int(info.rss), int(peak), int(info.vms))


def lock_limit_bytes() -> int | None:
    """Return how much this process may lock in RAM; None: no limit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY or os.geteuid() == 0:
        return None
    return soft


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
    return None if setting is None else _read_int(setting)


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
