"""A memory cap for child processes: a cgroup of our own (v1 or v2), or systemd's where only that is allowed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from gguf_pager import kernel, probe

_ROOT = Path("/sys/fs/cgroup")
_TRIAL_BYTES = 64 << 20
_SHELL = 'echo $$ > "$0" && exec "$@"'
"""Moves itself into the group before it becomes the command, so that not one page is charged elsewhere."""


@dataclass(frozen=True, slots=True)
class Cap:
    """A group that limits what is started in it. `method` is "cgroup1", "cgroup2", "systemd" or "none"."""

    method: str
    limit_bytes: int | None
    reason: str | None = None
    folder: Path | None = None

    def command(self, arguments: Sequence[str]) -> list[str]:
        """Return the command line that runs `arguments` under the cap."""
        if self.method == "systemd":
            return ["systemd-run", "--user", "--scope", "--quiet", "-p", f"MemoryMax={self.limit_bytes}",
                    "-p", "MemorySwapMax=0", "--", *arguments]
        if self.folder is not None:
            return ["/bin/sh", "-c", _SHELL, str(self.folder / "cgroup.procs"), *arguments]
        return list(arguments)

    def peak_bytes(self) -> int | None:
        """Return the most memory, page cache included, that was ever charged to the group; None where unknown."""
        if self.folder is None:
            return None
        name = "memory.max_usage_in_bytes" if self.method == "cgroup1" else "memory.peak"
        try:
            return int(kernel.read_text(self.folder / name))
        except (OSError, ValueError):
            return None

    def oom_kills(self) -> int | None:
        """Return how many processes of the group the kernel has ended for want of memory; None where unknown."""
        if self.folder is None:
            return None
        name = "memory.oom_control" if self.method == "cgroup1" else "memory.events"
        try:
            fields = dict(line.split() for line in kernel.read_lines(self.folder / name))
            return int(fields["oom_kill"])
        except (OSError, ValueError, KeyError):
            return None


@contextmanager
def memory_cap(limit_bytes: int | None) -> Iterator[Cap]:
    """Make a cap for the time of the block. Where the machine allows none, the cap's method is "none" with the reason."""
    if limit_bytes is None:
        yield Cap("none", None, "no cap was asked for")
        return
    if sys.platform != "linux":
        yield Cap("none", None, "only Linux has memory cgroups")
        return
    reasons = []
    for method, make in (("cgroup2", _make_v2), ("cgroup1", _make_v1)):
        try:
            folder = make(limit_bytes)
        except OSError as error:
            reasons.append(f"{method}: {error.strerror or error}")
            continue
        try:
            yield Cap(method, limit_bytes, _swap_reason(folder), folder)
        finally:
            _remove(folder)
        return
    if _systemd_allows():
        yield Cap("systemd", limit_bytes)
        return
    yield Cap("none", None, "; ".join([*reasons, "systemd-run --user: refused or missing"]))


_SWAP_LIMITS = ("memory.memsw.limit_in_bytes", "memory.swap.max")


def _swap_reason(folder: Path) -> str | None:
    """Return what a group does not limit: where the kernel does not account for swap, a process can leave through it."""
    if any((folder / name).exists() for name in _SWAP_LIMITS) or probe.memory().swap_bytes == 0:
        return None
    return "swap is not limited"


def _new_name() -> str:
    return f"gguf_pager-{os.getpid()}-{time.monotonic_ns()}"


def _make_v1(limit_bytes: int) -> Path:
    base = _ROOT / "memory"
    if not (base / "memory.limit_in_bytes").exists():
        raise OSError("no such controller here")
    folder = base / _new_name()
    folder.mkdir()
    try:
        (folder / "memory.limit_in_bytes").write_text(str(limit_bytes))
        with suppress(OSError):  # only where swap is accounted
            (folder / "memory.memsw.limit_in_bytes").write_text(str(limit_bytes))
    except OSError:
        folder.rmdir()
        raise
    return folder


def _make_v2(limit_bytes: int) -> Path:
    if not (_ROOT / "cgroup.controllers").exists():
        raise OSError("not mounted")
    name = next((line.split("::", 1)[1] for line in kernel.read_lines(Path("/proc/self/cgroup")) if "::" in line), "/")
    # A group with processes may not hand controllers down, so a sibling of ours is made, not a child.
    own = _ROOT / name.lstrip("/")
    base = own.parent if own != _ROOT else _ROOT
    folder = base / _new_name()
    folder.mkdir()
    try:
        if not (folder / "memory.max").exists():
            raise OSError("the memory controller is not delegated to this user")
        (folder / "memory.max").write_text(str(limit_bytes))
        with suppress(OSError):
            (folder / "memory.swap.max").write_text("0")
        with open(folder / "cgroup.procs", "w"):
            pass  # moving a process in will be allowed
    except OSError:
        folder.rmdir()
        raise
    return folder


def _remove(folder: Path) -> None:
    """Remove the group once its processes are gone; a killed child may take a moment."""
    for _ in range(100):
        try:
            folder.rmdir()
            return
        except OSError:
            time.sleep(0.02)


def _systemd_allows() -> bool:
    if shutil.which("systemd-run") is None:
        return False
    # systemd takes the setting also where it has no memory controller to apply it with: so the group is asked.
    ask = f'cat "{_ROOT}$(sed -n s/^0:://p /proc/self/cgroup)/memory.max"'
    trial = ["systemd-run", "--user", "--scope", "--quiet", "-p", f"MemoryMax={_TRIAL_BYTES}", "sh", "-c", ask]
    try:
        done = subprocess.run(trial, capture_output=True, text=True, errors="replace", timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.stdout.strip() == str(_TRIAL_BYTES)
