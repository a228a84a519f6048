"""What `energy --model-paper` shows: arXiv 2508.06978 again beside its own ranges, and what a cache would change."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from gguf_pager import __version__
from gguf_pager.energy.model import Constant, constants_json
from gguf_pager.energy.paper import (
    ASSUMPTIONS,
    CODE,
    CONSTANTS,
    GEOMETRIES,
    RANGES_SOURCE,
    ROUTING_SOURCE,
    Cache,
    Energy,
    Geometry,
    Medium,
    active_experts,
    busiest_experts,
    energy,
    ratios,
)

MEASURED = {"12.5%": 0.63, "25%": 0.82, "50%": 0.96}
"""Hit rates of gguf_pager's decode with so many of the experts in RAM."""

MEASURED_SOURCE = ("decode with the recorded routing of Qwen3-30B-A3B on code, not of the paper's models: mode paged in "
                   "benchmarks/results/xeon-2core-24gb/qwen3-30b-16l-2026-11-24.jsonl of gguf_pager")
MEDIA: tuple[Medium, ...] = ("hbm", "ddr5", "ssd")
CACHES: tuple[Cache, ...] = ("ddr5", "hbm")


def _parts(made: Energy) -> dict[str, float]:
    parts = asdict(made)
    return {"step_s": parts.pop("step_s"), "j_per_token": made.total_j,
            **{name.replace("_j", "_j_per_token"): joules for name, joules in parts.items()}}


def _model_facts(geometry: Geometry, constants: Mapping[str, Constant], hit_rate: float | None) -> dict[str, Any]:
    ssd, ddr5 = ratios(geometry, "ssd", constants), ratios(geometry, "ddr5", constants)
    low, high = min(ssd.values()), max(ssd.values())
    rates = sorted({*MEASURED.values(), *([] if hit_rate is None else [hit_rate])})
    return {
        "name": geometry.name,
        "source": geometry.source,
        "devices": geometry.devices,
        "expert_bytes": geometry.expert_bytes(constants),
        "ssd_per_hbm_low": low,
        "ssd_per_hbm_high": high,
        "paper_ssd_per_hbm_low": geometry.paper_low,
        "paper_ssd_per_hbm_high": geometry.paper_high,
        "deviation_low": low / geometry.paper_low - 1,
        "deviation_high": high / geometry.paper_high - 1,
        "batches": [{
            "batch_sequences": batch,
            "active_experts_per_layer": active_experts(geometry, batch),
            "busiest_device_experts_per_layer": busiest_experts(geometry, batch),
            "ddr5_per_hbm": ddr5[batch],
            "ssd_per_hbm": ssd[batch],
            **{medium: _parts(energy(geometry, batch, medium, constants)) for medium in MEDIA},
        } for batch in geometry.batches],
        "cached": [{
            "hit_rate": rate,
            "cache": cache,
            "per_hbm": [{"batch_sequences": batch, "ssd_per_hbm": ratio}
                        for batch, ratio in ratios(geometry, "ssd", constants, rate, cache).items()],
        } for cache in CACHES for rate in rates],
    }


def paper_facts(constants: Mapping[str, Constant] = CONSTANTS, hit_rate: float | None = None) -> dict[str, Any]:
    """Return the comparison for each model of the paper; a hit rate given by the user is added to the usual ones."""
    return {
        "gguf_pager_version": __version__,
        "paper": "arXiv 2508.06978",
        "ranges_source": RANGES_SOURCE,
        "routing_source": ROUTING_SOURCE,
        "is_with_constants_of_paper": constants == CONSTANTS,
        "hit_rate": hit_rate,
        "measured_hit_rates": dict(MEASURED),
        "measured_hit_rates_source": MEASURED_SOURCE,
        "models": [_model_facts(geometry, constants, hit_rate) for geometry in GEOMETRIES],
        "cache_assumptions": list(ASSUMPTIONS),
        "constants": constants_json(constants),
    }


def _model_lines(model: dict[str, Any], notes: Mapping[float, str]) -> list[str]:
    lines = [f"{model['name']}, {model['devices']} devices, {model['expert_bytes'] / 1e6:,.0f} MB per expert",
             "           joules per token          times HBM     of the SSD's joules, %",
             "  batch    HBM     DDR5      SSD    DDR5    SSD    experts  other reads  computing  background"]
    for row in model["batches"]:
        ssd = row["ssd"]
        shares = [100 * ssd[f"{part}_j_per_token"] / ssd["j_per_token"]
                  for part in ("expert_reads", "other_reads", "compute", "background")]
        lines.append(f"{row['batch_sequences']:7}{row['hbm']['j_per_token']:7.3f}{row['ddr5']['j_per_token']:9.3f}"
                     f"{ssd['j_per_token']:9.3f}{row['ddr5_per_hbm']:8.2f}{row['ssd_per_hbm']:7.2f}"
                     f"{shares[0]:11.0f}{shares[1]:13.0f}{shares[2]:11.0f}{shares[3]:12.0f}")
    lines.append(f"  SSD / HBM: here {model['ssd_per_hbm_low']:.2f} to {model['ssd_per_hbm_high']:.2f}, in the paper "
                 f"{model['paper_ssd_per_hbm_low']} to {model['paper_ssd_per_hbm_high']}: "
                 f"{model['deviation_low']:+.1%} and {model['deviation_high']:+.1%} off.")
    lines += ["", "  With a cache before the SSD, times HBM, for batches of",
              f"  {'hits in':10}" + "".join(f"{row['batch_sequences']:8}" for row in model["batches"])]
    for cached in model["cached"]:
        label = f"{cached['hit_rate']:.4g} {cached['cache'].upper()}"
        lines.append(f"  {label:10}" + "".join(f"{row['ssd_per_hbm']:8.2f}" for row in cached["per_hbm"])
                     + f"  {notes[cached['hit_rate']]}")
    return [*lines, ""]


def paper_text(facts: dict[str, Any]) -> str:
    """Return `paper_facts` for people."""
    def fill(text: str, indent: str) -> str:
        return textwrap.fill(text.replace(CODE, "the patch"), 96, initial_indent=indent,
                             subsequent_indent=" " * len(indent))

    made = "Nothing is fitted." if facts["is_with_constants_of_paper"] else "WITH CONSTANTS OF YOURS, not the paper's."
    lines = [f"Energy per token of {facts['paper']} from its constants, by a roofline. {made}", ""]
    notes = {rate: f"measured, {share} in RAM" for share, rate in facts["measured_hit_rates"].items()}
    if facts["hit_rate"] is not None:
        notes[facts["hit_rate"]] = "as asked"
    for model in facts["models"]:
        lines += _model_lines(model, notes)
    lines += [fill(f"Measured hit rates: {facts['measured_hit_rates_source']}.", ""), "", "What is assumed of the cache:", *(fill(text, "  - ") for text in facts["cache_assumptions"]), "",
              "Constants and their sources, where the patch is", f"  {CODE}:"]
    for name, constant in facts["constants"].items():
        lines += [f"  {name:24}{constant['value']:>10.6g} {constant['unit']}", fill(constant["source"], " " * 4)]
    for model in facts["models"]:
        lines += [f"  {model['name']}", fill(model["source"], " " * 4)]
    return "\n".join([*lines, "  Routing", fill(facts["routing_source"], " " * 4),
                      "  The paper's ranges", fill(facts["ranges_source"], " " * 4)])
