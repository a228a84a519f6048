"""RAPL through Linux's powercap: the processor's own counters. A part of the machine: no disk, board or supply.

Layout: Documentation/power/powercap/powercap.rst of the kernel. `intel-rapl:0` is a package, `intel-rapl:0:2` a domain
within it; AMD's processors appear under the same names.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gguf_pager.energy.source import Absent, Counter, CounterSource, NoReading, children, read_int, read_text

NAME = "rapl"

TREES = ("intel-rapl", "intel-rapl-mmio")
"""Two ways to the same registers, by MSR and by MMIO. The first that can be read is taken, never both."""


@dataclass(frozen=True, slots=True)
class Zone:
    """A counter to be added: a package, or the DRAM of one. `key` is the same in both trees."""

    key: str
    folder: Path


def find(root: Path = Path("/sys/class/powercap")) -> CounterSource | Absent:
    """Return the sum of all packages and their DRAM.

    `core` and `uncore` lie within a package, `psys` contains the packages: adding any of them would count twice.
    """
    zones = _zones(root)
    if not zones:
        return Absent(NAME, f"no package zones under {root}")
    counters, refused = [], []
    for key, candidates in sorted(zones.items()):
        reasons = []
        for zone in candidates:
            try:
                counters.append(_counter(zone))
                break
            except NoReading as error:
                reasons.append(str(error))
        else:
            refused.append(f"{key} ({reasons[0]})")
    if not counters:
        return Absent(NAME, f"cannot be read: {'; '.join(refused)}. As root: chmod a+r {root}/*/energy_uj")
    scope = "CPU: " + ", ".join(counter.name for counter in counters)
    if refused:
        scope += f"; without {'; '.join(refused)}"
    if not any(key.endswith("dram") for key in zones):
        scope += "; no DRAM counter"
    return CounterSource(NAME, scope, "part", counters)


def _zones(root: Path) -> dict[str, list[Zone]]:
    """Return each package and DRAM once per tree, the preferred tree first.

    A zone shows up at the top of the class and again within its parent; its folder's name is the same in both places.
    """
    found: dict[str, list[Zone]] = {}
    for tree in TREES:
        folders: dict[str, Path] = {}
        for pattern in (f"{tree}:*", f"{tree}/{tree}:*", f"{tree}:*/{tree}:*", f"{tree}/{tree}:*/{tree}:*"):
            for folder in children(root, pattern):
                folders.setdefault(folder.name, folder)
        names = {}
        for zone_id, folder in folders.items():
            try:
                names[zone_id] = read_text(folder / "name")
            except NoReading:
                continue
        keys = set()
        for zone_id, name in sorted(names.items()):
            if name.startswith("package"):
                key = name
            elif name == "dram":
                key = f"{names.get(zone_id.rpartition(':')[0], zone_id)} dram"
            else:
                continue
            if key not in keys:  # a package listed twice in one tree is one package
                keys.add(key)
                found.setdefault(key, []).append(Zone(key, folders[zone_id]))
    return found


def _counter(zone: Zone) -> Counter:
    """Return a counter that has been read once, so that permission is known."""
    path = zone.folder / "energy_uj"
    read_int(path)
    range_uj = read_int(zone.folder / "max_energy_range_uj")
    return Counter(zone.key, partial(_read_j, path), range_uj / 1e6 if range_uj > 0 else None)


def _read_j(path: Path) -> float:
    return read_int(path) / 1e6
