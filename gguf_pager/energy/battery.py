"""What a laptop takes from its battery: the whole machine with its display, and only while nothing charges it.

Documentation/ABI/testing/sysfs-class-power of the kernel. Fuel gauges renew their figures every few seconds.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from gguf_pager.energy.source import Absent, GaugeSource, NoReading, children, read_int, read_text

NAME = "battery"


def find(root: Path = Path("/sys/class/power_supply")) -> GaugeSource | Absent:
    """Return the sum of the machine's batteries, if they are its only supply now."""
    batteries = [folder for folder in children(root, "*") if _is_ours(folder)]
    if not batteries:
        return Absent(NAME, f"no battery under {root}")
    try:
        _read_w(batteries)
    except NoReading as error:
        return Absent(NAME, str(error))
    names = ", ".join(folder.name for folder in batteries)
    return GaugeSource(NAME, f"whole machine, from {names}", "machine", partial(_read_w, batteries), period_s=1.0,
                       least_s=10.0)


def _is_ours(folder: Path) -> bool:
    """Return whether this is a battery, and not that of a mouse, whose scope is "Device"."""
    try:
        if read_text(folder / "type") != "Battery":
            return False
        return not (folder / "scope").exists() or read_text(folder / "scope") != "Device"
    except NoReading:
        return False


def _read_w(batteries: list[Path]) -> float:
    """Return the watts that leave the batteries. A battery that is charged, or a machine on mains, says nothing."""
    watts, is_discharging = 0.0, False
    for folder in batteries:
        status = read_text(folder / "status")
        if status == "Discharging":
            is_discharging = True
            watts += _power_w(folder)
        elif status == "Charging":
            raise NoReading(f"{folder.name} is charging: the machine runs on mains")
    if not is_discharging:
        raise NoReading(f"{batteries[0].name} is not discharging: the machine runs on mains")
    if watts == 0:
        raise NoReading(f"{batteries[0].name} discharges, but tells no power")
    return watts


def _power_w(folder: Path) -> float:
    """Return power_now, or the product of current and voltage. Some drivers count discharge as negative."""
    if (folder / "power_now").exists():
        return abs(read_int(folder / "power_now")) / 1e6
    return abs(read_int(folder / "current_now")) / 1e6 * read_int(folder / "voltage_now") / 1e6
