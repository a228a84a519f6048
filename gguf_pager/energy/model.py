"""Joules from what a run used, where no counter can be read: an estimate between two bounds, and labelled as one.

The constants of reading are those of arXiv 2508.06978 (Kyung, Yun, Ahn: SSD offloading for LLM mixture-of-experts
weights considered harmful in energy efficiency; code at github.com/scale-snu/SSD-offloading). They alone say that reading
a byte from flash takes 24 times the energy of reading it from HBM. That paper's own totals, 3.8 to 12.5 and 4.7 to 9.8
times HBM's energy per token, contain computing, and background power times a latency: paper.py computes them again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from gguf_pager.errors import PagerError

_PAPER = "arXiv 2508.06978"


@dataclass(frozen=True, slots=True)
class Constant:
    """A number of the model. Where low equals high its source gives no range, so the bounds do not cover its error."""

    value: float
    low: float
    high: float
    unit: str
    source: str


CONSTANTS: Mapping[str, Constant] = MappingProxyType({
    "cpu_w_per_core": Constant(
        6.6, 2.0, 22.0, "W while one CPU is busy",
        "an assumption, for want of a better one: low a many-core server (Ampere Altra Max M128-30, 250 W TDP), high a "
        "desktop (i7-8700K, six cores, 134 W more at the wall under mprime: utcc.utoronto.ca/~cks/space/blog/tech/"
        "TDPAndPowerDraw), value their geometric mean"),
    "nvme_read_j_per_gb": Constant(0.82, 0.82, 0.82, "J/GB", f"{_PAPER}: 102.4 pJ/bit"),
    "ddr5_read_j_per_gb": Constant(0.074, 0.074, 0.074, "J/GB", f"{_PAPER}: 9.2 pJ/bit"),
    "dram_background_w_per_gb": Constant(
        0.305, 0.22, 0.39, "W/GB",
        f"low: 57 W of 256 GB of DDR5-7200, in figure_4_and_5.py of the code of {_PAPER}; high: the design notes of "
        "gguf_pager, whose source was not traced; value: the middle"),
    "hbm3_read_j_per_gb": Constant(0.034, 0.034, 0.034, "J/GB", f"{_PAPER}: 4.2 pJ/bit; for comparison, not used"),
})
"""GB are 10^9 bytes."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a run used. `bytes_read` from storage and `ram_read_bytes` by computing may be unknown: their terms are then
    left out.
    """

    seconds: float
    cpu_s: float
    bytes_read: int | None
    resident_bytes: int
    ram_read_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Estimate:
    """Joules, between two bounds."""

    low_j: float
    value_j: float
    high_j: float


def estimate(usage: Usage, constants: Mapping[str, Constant] = CONSTANTS) -> Estimate:
    """Return CPU time, file reads, reads of RAM and the background of resident RAM, each times its constant.

    Board, power supply, GPU, and RAM outside the process are not in it.
    """
    amounts = {
        "cpu_w_per_core": usage.cpu_s,
        "nvme_read_j_per_gb": (usage.bytes_read or 0) / 1e9,
        "ddr5_read_j_per_gb": (usage.ram_read_bytes or 0) / 1e9,
        "dram_background_w_per_gb": usage.resident_bytes / 1e9 * usage.seconds,
    }
    return Estimate(
        low_j=sum(constants[name].low * amount for name, amount in amounts.items()),
        value_j=sum(constants[name].value * amount for name, amount in amounts.items()),
        high_j=sum(constants[name].high * amount for name, amount in amounts.items()),
    )


def override(given: Mapping[str, float]) -> Mapping[str, Constant]:
    """Return the constants with some of them set by the user; raises PagerError for one that does not exist."""
    constants = dict(CONSTANTS)
    for name, value in given.items():
        if name not in constants:
            raise PagerError(f"There is no constant {name!r}: choose from {', '.join(constants)}.")
        if not math.isfinite(value) or value < 0:
            raise PagerError(f"{name} cannot be {value}.")
        constants[name] = Constant(value, value, value, constants[name].unit, "given by the user")
    return constants


def constants_json(constants: Mapping[str, Constant]) -> dict[str, dict[str, Any]]:
    """Return the constants as they go into a result."""
    return {name: {"value": constant.value, "low": constant.low, "high": constant.high, "unit": constant.unit,
                   "source": constant.source} for name, constant in constants.items()}
