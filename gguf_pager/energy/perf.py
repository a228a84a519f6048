"""The `power` events of Linux's perf: the same registers as RAPL's, for those who may use perf and not powercap."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

from gguf_pager.energy.source import Absent, Counter, CounterSource, NoReading, read_int, read_text

NAME = "perf"

EVENTS = ("energy-pkg", "energy-ram")
"""`energy-cores` and `energy-gpu` lie within the package, `energy-psys` contains it."""

_SYSCALLS = {"x86_64": 298, "aarch64": 241}
"""perf_event_open; powers are x86's only, ARM is here so that a new one works."""

_ATTR_BYTES = 64
"""PERF_ATTR_SIZE_VER0 of linux/perf_event.h: type, size, config, and zeros."""

_CLOSE_ON_EXEC = 1 << 3
"""PERF_FLAG_FD_CLOEXEC."""


def perf_event_open(event_type: int, config: int, cpu: int) -> int:
    """Return a descriptor that counts an event on one CPU for all processes; raises OSError."""
    number = _SYSCALLS.get(platform.machine())
    if number is None:
        raise OSError(f"the system call's number is not known for {platform.machine()}")
    attr = struct.pack("=IIQ", event_type, _ATTR_BYTES, config).ljust(_ATTR_BYTES, b"\0")
    libc = ctypes.CDLL(None, use_errno=True)
    fd: int = libc.syscall(ctypes.c_long(number), ctypes.c_char_p(attr), ctypes.c_int(-1), ctypes.c_int(cpu),
                           ctypes.c_int(-1), ctypes.c_ulong(_CLOSE_ON_EXEC))
    if fd < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return fd


def find(root: Path = Path("/sys/bus/event_source/devices/power"),
         paranoid: Path = Path("/proc/sys/kernel/perf_event_paranoid"),
         open_event: Callable[[int, int, int], int] = perf_event_open) -> CounterSource | Absent:
    """Return the sum of packages and DRAM; `open_event` takes type, config and CPU and returns a descriptor."""
    if not (root / "type").exists():
        return Absent(NAME, f"the kernel has no power events ({root})")
    counters: list[Counter] = []
    try:
        event_type = read_int(root / "type")
        cpus = _cpus(read_text(root / "cpumask"))
        for event in EVENTS:
            if (root / "events" / event).exists():
                config, scale_j = _config(read_text(root / "events" / event)), _scale_j(root / "events", event)
                for cpu in cpus:
                    fd = open_event(event_type, config, cpu)
                    read_j = partial(_read_j, fd, scale_j)
                    counters.append(Counter(f"{event} of CPU {cpu}", read_j, None, _closer(fd)))
    except (NoReading, OSError) as error:
        for counter in counters:
            counter.close()
        return Absent(NAME, _refusal(error, paranoid))
    if not counters:
        return Absent(NAME, f"none of {', '.join(EVENTS)} under {root / 'events'}")
    scope = "CPU: " + ", ".join(counter.name for counter in counters)
    if not any(counter.name.startswith("energy-ram") for counter in counters):
        scope += "; no DRAM counter"
    return CounterSource(NAME, scope, "part", counters)


def _refusal(error: Exception, paranoid: Path) -> str:
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    try:
        return f"perf_event_open: {reason} (perf_event_paranoid is {read_int(paranoid)}; root or CAP_PERFMON may)"
    except NoReading:
        return f"perf_event_open: {reason}"


def _cpus(mask: str) -> list[int]:
    """Return the CPUs of a mask like "0,18-19": one for each package."""
    cpus: list[int] = []
    try:
        for part in mask.split(","):
            first, _, last = part.partition("-")
            cpus += range(int(first), int(last or first) + 1)
    except ValueError:
        raise NoReading(f"cpumask not understood: {mask!r}") from None
    return cpus


def _config(text: str) -> int:
    """Return the number of "event=0x02"."""
    key, _, value = text.partition("=")
    try:
        if key == "event":
            return int(value, 0)
    except ValueError:
        pass
    raise NoReading(f"event not understood: {text!r}")


def _scale_j(events: Path, event: str) -> float:
    unit = read_text(events / f"{event}.unit")
    if unit != "Joules":
        raise NoReading(f"{event} counts {unit}")
    try:
        return float(read_text(events / f"{event}.scale"))
    except ValueError:
        raise NoReading(f"{event}.scale is not a number") from None


def _read_j(fd: int, scale_j: float) -> float:
    try:
        raw = os.read(fd, 8)
    except OSError as error:
        raise NoReading(f"perf event: {error.strerror}") from None
    if len(raw) != 8:
        raise NoReading("perf event: short read")
    return int.from_bytes(raw, "little") * scale_j  # the kernel widens the register to 64 bits: it does not wrap


def _closer(fd: int) -> Callable[[], None]:
    open_fds = [fd]

    def close() -> None:
        if open_fds:
            os.close(open_fds.pop())

    return close
