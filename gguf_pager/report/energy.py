"""What `energy` shows: each source, and the constants of the model."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from gguf_pager import __version__
from gguf_pager.energy.meter import Live
from gguf_pager.energy.source import Absent, Source
from gguf_pager.report import number


def energy_facts(found: Sequence[Source | Absent], present: Sequence[Source], live: Sequence[Live],
                 constants: dict[str, dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Return what each source is and showed; `live` belongs to `present`, best first as `found`."""
    shown = dict(zip((source.name for source in present), live, strict=True))
    sources: list[dict[str, Any]] = []
    for source in found:
        now = shown.get(source.name)
        row: dict[str, Any] = {"name": source.name, "is_present": now is not None}
        if now is None or isinstance(source, Absent):
            reason = source.reason if isinstance(source, Absent) else None
            row |= {"scope": None, "covers": None, "watts": None, "avg_power_w": None, "reason": reason}
        else:
            row |= {"scope": source.scope, "covers": source.covers, "watts": list(now.watts) or None,
                    "avg_power_w": now.avg_power_w, "reason": now.reason}
        sources.append(row)
    best = next((row for row in sources if row["avg_power_w"] is not None), None)
    status = "none" if best is None else "measured" if best["covers"] == "machine" else "partial"
    return {
        "gguf_pager_version": __version__,
        "seconds": seconds,
        "energy_status": status,
        "energy_method": best["name"] if best else None,
        "energy_scope": best["scope"] if best else None,
        "avg_power_w": best["avg_power_w"] if best else None,
        "energy_reason": None if best else "; ".join(f"{row['name']}: {row['reason']}" for row in sources),
        "sources": sources,
        "model_constants": constants,
    }


def energy_text(facts: dict[str, Any]) -> str:
    """Return `energy_facts` for people."""
    lines = []
    for row in facts["sources"]:
        power = number(row["avg_power_w"], ",.2f")
        lines.append(f"{row['name']:10}{power:>9} W  {row['scope'] or row['reason']}")
        if row["scope"] and row["reason"]:
            lines.append(f"{'':23}{row['reason']}")
        if row["watts"]:
            lines.append(f"{'':23}{', '.join(f'{watts:,.2f}' for watts in row['watts'])} W")
    status = {"measured": "the whole machine", "partial": "a part of the machine",
              "none": "nothing can be measured here: figures are modelled or missing"}[facts["energy_status"]]
    method = facts["energy_method"]
    lines += ["", f"Energy: {facts['energy_status']}" + (f", by {method}" if method else "") + f" ({status}).", "",
              "The model, used where nothing is measured, with its bounds:"]
    for name, constant in facts["model_constants"].items():
        bounds = f"{constant['low']:g} to {constant['high']:g}" if constant["low"] != constant["high"] else "no bounds"
        lines += [f"  {name:26}{constant['value']:>8g} {constant['unit']}, {bounds}",
                  textwrap.fill(constant["source"], 96, initial_indent=" " * 4, subsequent_indent=" " * 4)]
    return "\n".join(lines)
