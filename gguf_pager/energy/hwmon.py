"""TI's ina sensors on a board's supply rails, through Linux's hwmon (Documentation/hwmon/sysfs-interface.rst)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gguf_pager.energy.source import (
    Absent,
    Counter,
    CounterSource,
    Covers,
    GaugeSource,
    NoReading,
    children,
    read_int,
    read_text,
)

NAME = "hwmon"

INPUT_RAIL = re.compile(r"^(VDD_IN|VIN_SYS_5V0|POM_5V_IN|5V_IN|VIN|TOTAL)$", re.IGNORECASE)
"""Labels of the rail that feeds all others: Jetson boards, and those that simply say so."""


@dataclass(frozen=True, slots=True)
class Rail:
    """One channel. `path` counts microjoules if it `is_energy`, else it gives microwatts."""

    label: str
    path: Path
    is_energy: bool


def find(root: Path = Path("/sys/class/hwmon"), rail: str | None = None) -> CounterSource | GaugeSource | Absent:
    """Return one rail: the one named, the board's input, or the only one.

    Several rails are not added up: one may feed another, and nothing in hwmon tells.
    """
    rails, reasons = _rails(root)
    if not rails:
        return Absent(NAME, "; ".join(reasons) or f"no ina sensors with power or energy under {root}")
    inputs = [found for found in rails if INPUT_RAIL.match(found.label)]
    named = [found for found in rails if found.label == rail]
    chosen = named if rail else inputs or rails
    labels = ", ".join(found.label for found in rails)
    if len(chosen) != 1:
        return Absent(NAME, f"cannot tell which rail feeds the board, of: {labels}")
    found = chosen[0]
    covers: Covers = "machine" if found in inputs else "part"
    scope = f"rail {found.label}" + (", the board's input" if covers == "machine" else "")
    if found.is_energy:
        return CounterSource(NAME, scope, covers, [Counter(found.label, partial(_read_micro, found.path), None)])
    return GaugeSource(NAME, scope, covers, partial(_read_micro, found.path), period_s=0.1)


def _rails(root: Path) -> tuple[list[Rail], list[str]]:
    """Return the readable channels, energy rather than power where one has both, and why others are not."""
    rails: dict[tuple[str, str], Rail] = {}
    reasons = []
    for device in children(root, "hwmon*"):
        try:
            if not read_text(device / "name").startswith("ina"):
                continue
        except NoReading:
            continue
        for kind in ("power", "energy"):  # energy last: it replaces power
            for path in children(device, f"{kind}*_input"):
                number = path.name.removeprefix(kind).removesuffix("_input")
                try:
                    read_int(path)
                except NoReading as error:
                    reasons.append(str(error))
                    continue
                rails[device.name, number] = Rail(_label(device, kind, number), path, kind == "energy")
    return list(rails.values()), reasons


def _label(device: Path, kind: str, number: str) -> str:
    for name in (f"{kind}{number}_label", f"in{number}_label"):
        try:
            return read_text(device / name)
        except NoReading:
            continue
    return f"{device.name} {number}"


def _read_micro(path: Path) -> float:
    return read_int(path) / 1e6
