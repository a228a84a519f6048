"""A memory cap for child processes: a cgroup of our own (v1 or v2), or systemd's where only that is allowed."""

from __future__ import annotations

import mmap
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from gguf_pager import kernel
from gguf_pager.aftermath import undone_when_killed
from gguf_pager.memory import probe

_ROOT = Path("/sys/fs/cgroup")
_PROC = Path("/proc/self")
_TRIAL_BYTES = 64 << 20
_UNLIMITED = 1 << 60
"""cgroup v1 states 'no limit' as the largest multiple of a page."""
_SHELL = 'echo $$ > "$0" && exec "$@"'
"""Moves itself into the group before it becomes the command, so that not one page is charged elsewhere."""
_REMOVE = 'i=0; while [ "$i" -lt 600 ] && [ -d "$1" ] && ! rmdir "$1"; do sleep 0.1; i=$((i + 1)); done'
"""A group goes once its processes are gone: a killed one first gives back its memory."""


@dataclass(frozen=True, slots=True)
class Cap:
    """A group that limits what is started in it. `method` is "cgroup1", "cgroup2", "systemd" or "none".

    `limit_bytes` is the limit in force: not more than this process has itself, whatever was asked for. `reason` says so, and
    what else is weaker than it looks.
    """

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
        return _number(self.folder / ("memory.max_usage_in_bytes" if self.method == "cgroup1" else "memory.peak"))

    def oom_kills(self) -> int | None:
        """Return how many processes of the group the kernel has ended for want of memory; None where unknown."""
        if self.folder is None:
            return None
        return _field(self.folder / ("memory.oom_control" if self.method == "cgroup1" else "memory.events"), "oom_kill")


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
        with undone_when_killed(_REMOVE, [str(folder)]):
            try:
                yield _described(method, folder, limit_bytes)
            finally:
                _remove(folder)
        return
    above = _systemd_folder()
    if above is not None:
        in_force = _least(limit_bytes, _limits_v2(above) + _own_limits())
        yield Cap("systemd", in_force, _less_reason(limit_bytes, in_force))
        return
    yield Cap("none", None, "; ".join([*reasons, "systemd-run --user: refused or missing"]))


def _described(method: str, folder: Path, asked_bytes: int) -> Cap:
    """Return a group with the limit that is in force, and all that is weaker than it looks."""
    in_force = _least(asked_bytes, (_limits_v1(folder) if method == "cgroup1" else _limits_v2(folder)) + _own_limits())
    reasons = [_less_reason(asked_bytes, in_force), _swap_reason(folder)]
    if method == "cgroup1" and _number(folder.parent / "memory.use_hierarchy") == 0:
        reasons.append("the groups above do not count what this one takes")
    return Cap(method, in_force, "; ".join(reason for reason in reasons if reason) or None, folder)


def _less_reason(asked_bytes: int, in_force_bytes: int) -> str | None:
    if in_force_bytes >= asked_bytes:
        return None
    return f"{asked_bytes:,} bytes were asked for, and the group that this runs in has only {in_force_bytes:,}"


_SWAP_LIMITS = ("memory.memsw.limit_in_bytes", "memory.swap.max")


def _swap_reason(folder: Path) -> str | None:
    """Return what a group does not limit: where the kernel does not account for swap, a process can leave through it."""
    if any((folder / name).exists() for name in _SWAP_LIMITS) or probe.memory().swap_bytes == 0:
        return None
    return "swap is not limited"


# ---- where groups are, and what limits them -------------------------------------------------------------------------

def _number(path: Path) -> int | None:
    """Return a file's number; None for "max", and where there is none."""
    try:
        return int(kernel.read_text(path))
    except (OSError, ValueError):
        return None


def _field(path: Path, name: str) -> int | None:
    try:
        return int(dict(line.split(maxsplit=1) for line in kernel.read_lines(path))[name])
    except (OSError, ValueError, KeyError):
        return None


def _own_folder(base: Path, *, is_v1: bool) -> Path:
    """Return the group of this process below the hierarchy's `base`.

    /proc/self/cgroup names it from the root of the hierarchy, and a container without a cgroup namespace sees only its own
    part of that: the mount's root in /proc/self/mountinfo says which, and is left off. What is not to be seen at all
    ("/../other", of a process that entered from outside) has the base itself.
    """
    name, mounted = "/", "/"
    with suppress(OSError):
        for line in kernel.read_lines(_PROC / "cgroup"):
            _, controllers, path = line.split(":", 2)
            if "memory" in controllers.split(",") if is_v1 else controllers == "":
                name = path
    with suppress(OSError):
        for line in kernel.read_lines(_PROC / "mountinfo"):
            fields = line.split()
            if fields[4] in (str(base), os.path.realpath(base)):
                mounted = fields[3]
    if mounted != "/" and (name == mounted or name.startswith(f"{mounted}/")):
        name = name[len(mounted):]
    folder = base / name.lstrip("/")
    return folder if ".." not in folder.parts and folder.is_dir() else base


def _upwards(folder: Path) -> Iterator[Path]:
    """Yield a group and all above it that can be seen."""
    while folder.is_relative_to(_ROOT):
        yield folder
        folder = folder.parent


def _limits_v1(folder: Path) -> list[int]:
    """Return the limits of a group and of those above it, those that cannot be seen included."""
    found = [_number(group / "memory.limit_in_bytes") for group in _upwards(folder)]
    found.append(_field(folder / "memory.stat", "hierarchical_memory_limit"))
    return [limit for limit in found if limit is not None and limit < _UNLIMITED]


def _limits_v2(folder: Path) -> list[int]:
    """Return the same of version 2. Above memory.high the kernel takes back as much as it can, so it is a limit, too."""
    found = [_number(group / name) for group in _upwards(folder) for name in ("memory.max", "memory.high")]
    return [limit for limit in found if limit is not None]


def _own_limits() -> list[int]:
    """Return the limits that this process itself is under, in either version."""
    base = _ROOT / "memory"
    return _limits_v2(_own_folder(_ROOT, is_v1=False)) + (_limits_v1(_own_folder(base, is_v1=True)) if base.is_dir() else [])


def _least(asked_bytes: int, limits: Sequence[int]) -> int:
    """Return what is in force of a limit below others; the kernel leaves off what is no whole page, which is no matter."""
    least = min([asked_bytes, *limits])
    return least if asked_bytes - least >= mmap.PAGESIZE else asked_bytes


# ---- making and removing them ---------------------------------------------------------------------------------------

def _new_name() -> str:
    return f"gguf_pager-{os.getpid()}-{time.monotonic_ns()}"


def _make_v1(limit_bytes: int) -> Path:
    base = _ROOT / "memory"
    if not (base / "memory.limit_in_bytes").exists():
        raise OSError("no such controller here")
    own = _own_folder(base, is_v1=True)
    folder = own / _new_name()
    folder.mkdir()
    try:
        # Not above our own, even where the groups above do not count it (use_hierarchy 0, before Linux 5.11).
        limit_bytes = min([limit_bytes, *_limits_v1(own)])
        (folder / "memory.limit_in_bytes").write_text(str(limit_bytes))
        with suppress(OSError):  # only where swap is accounted
            (folder / "memory.memsw.limit_in_bytes").write_text(str(limit_bytes))
        _enter(folder)
    except OSError:
        _remove(folder)
        raise
    return folder


def _make_v2(limit_bytes: int) -> Path:
    if not (_ROOT / "cgroup.controllers").exists():
        raise OSError("not mounted")
    own = _own_folder(_ROOT, is_v1=False)
    # A group with processes may not hand controllers down, so a sibling of ours is made, not a child; such as systemd's
    # scopes and services are, below a slice. What limits us does not limit a sibling: so its limit is made no higher.
    base = own.parent if own != _ROOT else _ROOT
    folder = base / _new_name()
    folder.mkdir()
    try:
        if not (folder / "memory.max").exists():
            raise OSError("the memory controller is not delegated to this user")
        (folder / "memory.max").write_text(str(min([limit_bytes, *_limits_v2(own)])))
        with suppress(OSError):
            (folder / "memory.swap.max").write_text("0")
        _enter(folder)
    except OSError:
        _remove(folder)
        raise
    return folder


def _enter(folder: Path) -> None:
    """Try whether a process may move into a group: that depends on both groups and on what lies above them.

    Raises:
        OSError: it may not.
    """
    done = subprocess.run(["/bin/sh", "-c", _SHELL, str(folder / "cgroup.procs"), "true"], stdin=subprocess.DEVNULL,
                          capture_output=True, check=False)
    if done.returncode:
        raise OSError("no process may be moved into a group of its own")


def _remove(folder: Path) -> None:
    """Remove the group once its processes are gone; a killed child may take a moment."""
    for _ in range(100):
        try:
            folder.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.02)


def _systemd_folder() -> Path | None:
    """Return the group in which systemd makes capped ones for this user; None where it does not."""
    if shutil.which("systemd-run") is None:
        return None
    # systemd takes the setting also where it has no memory controller to apply it with: so the group is asked.
    ask = f'name=$(sed -n s/^0:://p /proc/self/cgroup) && echo "$name" && cat "{_ROOT}$name/memory.max"'
    trial = ["systemd-run", "--user", "--scope", "--quiet", "-p", f"MemoryMax={_TRIAL_BYTES}", "sh", "-c", ask]
    try:
        done = subprocess.run(trial, capture_output=True, text=True, errors="replace", timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.splitlines()
    return (_ROOT / lines[0].lstrip("/")).parent if lines[1:] == [str(_TRIAL_BYTES)] else None
