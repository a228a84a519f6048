"""Apple silicon's own counters without root, through IOReport. Untested: no such machine was at hand.

Needs the extra `gguf-pager[mac]`, which is zeus-apple-silicon. It gives cumulative millijoules, None for what a chip or
a macOS does not report. By its source it adds up the dies of an Ultra chip, which it calls experimental itself.
"""

from __future__ import annotations

import importlib
import sys
from functools import partial
from typing import Any

from gguf_pager.energy.source import Absent, Counter, CounterSource, NoReading

NAME = "ioreport"

FIELDS = ("cpu_total_mj", "gpu_mj", "gpu_sram_mj", "dram_mj", "ane_mj")
"""Parts that do not contain each other; single cores lie within cpu_total_mj."""


def find(platform: str = sys.platform) -> CounterSource | Absent:
    """Return the sum of what the chip reports."""
    if platform != "darwin":
        return Absent(NAME, "macOS only")
    try:
        monitor = importlib.import_module("zeus_apple_silicon").AppleEnergyMonitor()
    except ImportError:
        return Absent(NAME, "needs zeus-apple-silicon: pip install 'gguf-pager[mac]'")
    except RuntimeError as error:  # what its C++ throws
        return Absent(NAME, f"zeus-apple-silicon: {error}")
    try:
        present = [field for field in FIELDS if _value(monitor, field) is not None]
    except NoReading as error:
        return Absent(NAME, str(error))
    if not present:
        return Absent(NAME, "this chip reports no energy")
    counters = [Counter(field, partial(_read_j, monitor, field), None) for field in present]
    scope = f"chip: {', '.join(field.removesuffix('_mj') for field in present)} (untested)"
    return CounterSource(NAME, scope, "part", counters, least_s=10.0)


def _value(monitor: Any, field: str) -> int | None:
    try:
        value = getattr(monitor.get_cumulative_energy(), field)
    except (RuntimeError, AttributeError) as error:  # refused by its C++, or a version with other fields
        raise NoReading(f"zeus-apple-silicon: {error}") from None
    return None if value is None else int(value)


def _read_j(monitor: Any, field: str) -> float:
    value = _value(monitor, field)
    if value is None:
        raise NoReading(f"{field} is no longer reported")
    return value / 1e3
