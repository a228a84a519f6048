"""The memory groups (cgroups, version 1 and 2) above this process: what each limits, and what it can still give."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gguf_pager import kernel

PROC, ROOT = Path("/proc/self"), Path("/sys/fs/cgroup")

_UNLIMITED = 1 << 60
"""Version 1 states 'no limit' as the largest multiple of a page."""


@dataclass(frozen=True, slots=True)
class OwnPages:
    """What this process has in RAM of files, in bytes: `mapped` its part of what it shares, and how much of it is `locked`."""

    mapped_bytes: int = 0
    locked_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Group:
    """A group with a limit. `available_bytes` is what it can still give, `version` that of cgroups."""

    limit_bytes: int
    available_bytes: int
    version: int


def find_groups(own: OwnPages, proc: Path = PROC, root: Path = ROOT) -> list[Group]:
    """Return every group that limits this process: its own one and those above, in all hierarchies that know memory."""
    found = []
    for version, folder in _folders(proc, root):
        group = _read_v2(folder, own) if version == 2 else _read_v1(folder, own)
        if group is not None:
            found.append(group)
    return found


def _folders(proc: Path, root: Path) -> Iterator[tuple[int, Path]]:
    """Yield (version, folder) of this process's groups, each followed by those above it as far as they can be seen."""
    try:
        memberships = kernel.read_lines(proc / "cgroup")
    except OSError:
        return
    mounts = _mounts(proc)
    for line in memberships:
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            version, places = 2, mounts[2] or [("/", root)]
        elif "memory" in controllers.split(","):
            version, places = 1, mounts[1] or [("/", root / "memory")]
        else:
            continue
        for top, base in places:
            yield from ((version, folder) for folder in _upwards(name, top, base))


def _upwards(name: str, top: str, base: Path) -> Iterator[Path]:
    """Yield a group's folder and those above it, up to where a hierarchy is mounted; `top` is the group mounted there.

    In a container the kernel may tell the host's names: what is mounted is then this container's own group.
    """
    parts = Path(name).parts[1:]
    above = Path(top).parts[1:]
    parts = parts[len(above):] if parts[: len(above)] == above else ()
    while parts:
        yield base.joinpath(*parts)
        parts = parts[:-1]
    yield base


def _mounts(proc: Path) -> dict[int, list[tuple[str, Path]]]:
    """Return per version (group, folder) of what is mounted (proc_pid_mountinfo(5))."""
    found: dict[int, list[tuple[str, Path]]] = {1: [], 2: []}
    try:
        lines = (proc / "mountinfo").read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return found
    for line in lines:
        mount, _, source = line.partition(" - ")
        fields, kind = mount.split(), source.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        place = (_unescape(fields[3]), Path(_unescape(fields[4])))
        if kind[0] == "cgroup2":
            found[2].append(place)
        elif kind[0] == "cgroup" and "memory" in kind[2].split(","):
            found[1].append(place)
    return found


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _read_v2(folder: Path, own: OwnPages) -> Group | None:
    """`memory.high` throttles a group above it until it stands still, so it limits as `memory.max` does."""
    limits = [limit for name in ("memory.max", "memory.high") if (limit := read_int(folder / name)) is not None]
    if not limits:
        return None
    stat = _read_stat(folder)
    # Half of the kernel's own caches: it counts at least that much of them as available, too (si_mem_available).
    given_back = _reclaimable(stat, "file_mapped", "file_dirty", "file_writeback", own) + stat.get("slab_reclaimable", 0) // 2
    return _group(2, min(limits), read_int(folder / "memory.current"), given_back)


def _read_v1(folder: Path, own: OwnPages) -> Group | None:
    """`memory.stat` tells the tightest limit of all groups above, also of those outside of a container.

    Its fields without `total_` are of this group alone, while usage is that of the groups below as well. The soft limit is
    none: it only says whom the kernel takes from first.
    """
    stat = _read_stat(folder)
    limits = [limit for limit in (read_int(folder / "memory.limit_in_bytes"), stat.get("hierarchical_memory_limit"))
              if limit is not None and limit < _UNLIMITED]
    if not limits:
        return None
    whole = {name.removeprefix("total_"): value for name, value in stat.items() if name.startswith("total_")} or stat
    given_back = _reclaimable(whole, "mapped_file", "dirty", "writeback", own)
    return _group(1, min(limits), read_int(folder / "memory.usage_in_bytes"), given_back)


def _group(version: int, limit_bytes: int, usage_bytes: int | None, given_back_bytes: int) -> Group:
    used = max(0, (usage_bytes or 0) - given_back_bytes)
    return Group(limit_bytes, max(0, limit_bytes - used), version)


def _reclaimable(stat: dict[str, int], mapped: str, dirty: str, writeback: str, own: OwnPages) -> int:
    """Return the bytes of file cache that the kernel gives back for the asking.

    The two lists hold what is in files, without what is locked (unevictable) and without shared memory, which is in no
    file. Off go pages that have to be written first, and those that other processes have mapped: their programs and
    models. Of all mapped pages, locked ones and shared memory are counted, too, though they are in neither list.
    """
    in_files = stat.get("inactive_file", 0) + stat.get("active_file", 0)
    to_write = stat.get(dirty, 0) + stat.get(writeback, 0)
    locked_by_others = max(0, stat.get("unevictable", 0) - own.locked_bytes)
    mapped_by_others = stat.get(mapped, 0) - own.mapped_bytes - locked_by_others - stat.get("shmem", 0)
    return max(0, in_files - to_write - max(0, mapped_by_others))


def _read_stat(folder: Path) -> dict[str, int]:
    try:
        return {name: int(value) for name, value in
                (line.split() for line in kernel.read_lines(folder / "memory.stat"))}
    except (OSError, ValueError):
        return {}


def read_int(path: Path) -> int | None:
    """Return the number in a file of the kernel's; None where there is none."""
    try:
        return int(kernel.read_text(path))
    except (OSError, ValueError):
        return None
