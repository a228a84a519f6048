"""What the commands print: tables for people, dictionaries for JSON. Unknown is None there, a dash here."""

from __future__ import annotations

import math
import os
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import click

from gguf_pager import __version__, budget
from gguf_pager.budget import format_bytes
from gguf_pager.doctor import Check, process_bytes
from gguf_pager.energy.meter import Live
from gguf_pager.energy.source import Absent, Source
from gguf_pager.layout import Layout, Slice
from gguf_pager.pager import Pager, Stats
from gguf_pager.probe import Memory

_COLORS = {"ok": "green", "note": "yellow", "problem": "red"}


# ---- run ------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True, slots=True)
class Mark:
    """A moment: the clock, the tokens computed so far, and the pager's counters, if there is one."""

    seconds: float
    n_tokens: int
    stats: Stats | None


@dataclass(frozen=True, slots=True)
class Phase:
    """What was computed between two moments."""

    begin: Mark
    end: Mark

    def figures(self) -> dict[str, Any]:
        """Return speed, and what the pager counted: None without one."""
        n_tokens, seconds = self.end.n_tokens - self.begin.n_tokens, self.end.seconds - self.begin.seconds
        before, after = self.begin.stats, self.end.stats
        facts: dict[str, Any] = {"tokens": n_tokens, "seconds": seconds,
                                 "tokens_per_s": n_tokens / seconds if n_tokens and seconds else None}
        names = ("hits", "misses", "bytes_read", "stall_ns", "evictions", "left_alone")
        if before is None or after is None:
            return facts | dict.fromkeys((*names, "hit_rate", "bytes_read_per_token", "stall_share"))
        facts |= {name: getattr(after, name) - getattr(before, name) for name in names}
        wanted = facts["hits"] + facts["misses"]
        facts["hit_rate"] = facts["hits"] / wanted if wanted else None
        facts["bytes_read_per_token"] = facts["bytes_read"] / n_tokens if n_tokens else None
        facts["stall_share"] = facts["stall_ns"] / 1e9 / seconds if seconds else None
        return facts


def run_facts(settings: dict[str, Any], prompt: Phase, decode: Phase, peak_bytes: int | None) -> dict[str, Any]:
    """Return the statistics of a run; `settings` go in as they are."""
    after = decode.end.stats
    return settings | {
        "prompt": prompt.figures(),
        "decode": decode.figures(),
        "arena_bytes": after.arena_bytes if after else None,
        "resident_expert_bytes": after.resident_bytes if after else None,
        "peak_memory_bytes": peak_bytes,
    }


def run_line(facts: dict[str, Any]) -> str:
    """Return the last line of `run`: speed, hits, reads, stalls, memory."""
    prompt, decode = facts["prompt"], facts["decode"]
    parts = [f"decode {_number(decode['tokens_per_s'], '.1f')} tok/s ({decode['tokens']:,} tokens)"]
    if prompt["tokens"] > 1:
        parts.append(f"prompt {_number(prompt['tokens_per_s'], '.1f')} tok/s ({prompt['tokens']:,} tokens)")
    if facts["is_paged"]:
        read = decode["bytes_read_per_token"]
        parts += [
            f"hits {_number(decode['hit_rate'], '.1%')}",
            f"read {_number(None if read is None else read / 1e6, '.2f')} MB per token",
            f"stalled {_number(decode['stall_share'], '.0%')}",
        ]
        if decode["left_alone"]:
            parts.append(f"{decode['left_alone']:,} graph nodes left to llama.cpp")
    else:
        parts.append("not paged")
    peak = facts["peak_memory_bytes"]
    parts.append(f"peak memory {format_bytes(peak) if peak is not None else '-'}")
    return ", ".join(parts)


def _number(value: float | None, style: str) -> str:
    return "-" if value is None else format(value, style)


class Progress:
    """One line on stderr, written again and again while something takes longer than a second."""

    def __init__(self, is_wanted: bool | None) -> None:
        self._is_terminal = os.isatty(2)
        is_shown = self._is_terminal if is_wanted is None else is_wanted
        # A descriptor of our own, because llama_cpp points 2 at /dev/null while it loads.
        self._fd = os.dup(2) if is_shown else None

    @contextmanager
    def during(self, describe: Callable[[], str]) -> Iterator[None]:
        """Show what `describe` returns, from another thread, for the time of the block."""
        if self._fd is None:
            yield
            return
        done = threading.Event()
        thread = threading.Thread(target=self._show, args=(self._fd, describe, done), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _show(self, fd: int, describe: Callable[[], str], done: threading.Event) -> None:
        before, after, period_s = ("\r", "\x1b[K", 0.25) if self._is_terminal else ("", "\n", 1.0)
        wait_s, erase = 1.0, b""
        with suppress(OSError):  # nobody reads it any more
            while not done.wait(wait_s):
                os.write(fd, f"{before}{describe()}{after}".encode())
                wait_s, erase = period_s, b"\r\x1b[K" if self._is_terminal else b""
            os.write(fd, erase)


# ---- inspect --------------------------------------------------------------------------------------------------------

def inspection(layout: Layout, pager: Pager | None, memory: Memory) -> dict[str, Any]:
    """Return what a model is made of and what budgets mean for it. `pager` need not be open; None without experts."""
    return {
        "gguf_pager_version": __version__,
        "architecture": layout.architecture,
        "name": layout.name,
        "files": [{"path": str(path), "file_bytes": path.stat().st_size} for path in layout.paths],
        "tensor_bytes": layout.tensor_bytes,
        "expert_bytes": layout.expert_bytes,
        "dense_bytes": layout.dense_bytes,
        "idle_bytes": layout.idle_bytes,
        "n_blocks": layout.values.get(f"{layout.architecture}.block_count"),
        "n_expert_layers": len(layout.layers),
        "bytes_per_token": layout.bytes_per_token if layout.layers else None,
        "is_direct_io_possible": pager.is_direct if pager else None,
        "align_bytes": pager.align if pager and pager.is_direct else None,
        "layers": [{"block": layer.block, "kind": layer.kind, "shape_class": layout.class_of(layer),
                    "n_experts": layer.n_experts, "n_used": layer.n_used, "types": [s.type_name for s in layer.slices]}
                   for layer in layout.layers],
        "shape_classes": [_shape_class(layout, pager, i) for i in range(len(layout.shapes))] if pager else [],
        "budgets": _budgets(layout, pager, memory) if pager else [],
    }


def _shape_class(layout: Layout, pager: Pager, index: int) -> dict[str, Any]:
    layers = [layer for layer in layout.layers if layout.class_of(layer) == index]
    columns = zip(*(layer.slices for layer in layers), strict=True)
    return {
        "n_layers": len(layers),
        "n_experts": sum(layer.n_experts for layer in layers),
        "expert_bytes": layers[0].expert_bytes,
        "slot_bytes": pager.needs[index].stride_bytes,
        "slices": [_slice_column(column, pager) for column in columns],
    }


def _slice_column(pieces: Sequence[Slice], pager: Pager) -> dict[str, Any]:
    """Return one slice of a shape class: equal in size in all of its layers, perhaps not in type."""
    n_bytes = pieces[0].slice_bytes
    return {
        "name": pieces[0].name.split(".")[2],
        "types": sorted({piece.type_name for piece in pieces}),
        "slice_bytes": n_bytes,
        "is_multiple_of_align": n_bytes % pager.align == 0 if pager.is_direct else None,
    }


def _budgets(layout: Layout, pager: Pager, memory: Memory) -> list[dict[str, Any]]:
    """Return a row per budget worth knowing, as Llama would understand it."""
    least, full = budget.least_arena_bytes(pager.needs), budget.full_arena_bytes(pager.needs)
    spare = budget.auto_budget_bytes(memory.available_bytes, memory.total_bytes)
    useful = math.ceil(budget.useful_arena_bytes(layout, pager.align) / full * 10_000) / 100
    wanted = [
        ("smallest", "min", least),
        ("useful", f"{useful:g}%", int(useful / 100 * full)),
        ("quarter", "25%", int(0.25 * full)),
        ("half", "50%", int(0.50 * full)),
        ("this_machine", "auto", min(full, spare - process_bytes(layout, 0))),
        ("full", "100%", full),
    ]
    rows = []
    for name, text, arena in wanted:
        is_stock = text == "auto" and layout.tensor_bytes + budget.WORK_BYTES <= spare
        is_paged = arena >= least and not is_stock
        slots = budget.share_slots(pager.needs, arena) if is_paged else None
        rows.append({
            "name": name,
            "budget": text,
            "arena_bytes": arena if is_paged else None,
            "process_bytes": process_bytes(layout, arena) if is_paged else None,
            "n_experts": sum(slots) if slots else None,
            "share_of_experts": sum(slots) / sum(need.n_all for need in pager.needs) if slots else None,
            "reason": "the model fits into memory: stock llama.cpp runs it" if is_stock
            else None if is_paged else "too small to compute one token",
        })
    return rows


def inspection_text(facts: dict[str, Any]) -> str:
    """Return an `inspection` for people."""
    files = facts["files"]
    n_bytes = sum(file["file_bytes"] for file in files)
    lines = [
        files[0]["path"] + (f" and {len(files) - 1} more" if len(files) > 1 else ""),
        f"{facts['name']}, architecture {facts['architecture']}, {format_bytes(n_bytes)}",
        "",
        f"  experts     {format_bytes(facts['expert_bytes']):>12}  {_experts_of(facts['layers'], facts['n_blocks'])}",
        f"  dense       {format_bytes(facts['dense_bytes']):>12}  needed for every token, kept in RAM",
        f"  idle        {format_bytes(facts['idle_bytes']):>12}  tables looked up by row, blocks that are not loaded",
        "",
    ]
    if not facts["layers"]:
        return "\n".join([*lines, "It has no experts: there is nothing to page."])
    lines.append(f"A token reads {facts['bytes_per_token'] / 1e6:,.1f} MB when no expert is resident.")
    align = facts["align_bytes"]
    lines += [f"Direct reads: {f'in multiples of {align} bytes' if align else 'not on this file system'}.", ""]
    for i, shape in enumerate(facts["shape_classes"]):
        lines.append(f"Shape class {i}: {shape['n_layers']} layers, {shape['n_experts']:,} experts of "
                     f"{shape['expert_bytes']:,} bytes, in slots of {shape['slot_bytes']:,}")
        lines += [f"  {piece['name']:20} {'/'.join(piece['types']):10} {piece['slice_bytes']:>12,} bytes"
                  f"{_alignment_note(piece)}" for piece in shape["slices"]]
    lines += ["", f"  {'budget':10} {'for experts':>12} {'resident':>9} {'process':>12}"]
    for row in facts["budgets"]:
        if row["reason"]:
            lines.append(f"  {row['budget']:10} {row['reason']}")
            continue
        lines.append(f"  {row['budget']:10} {format_bytes(row['arena_bytes']):>12} {row['share_of_experts']:>9.2%} "
                     f"{format_bytes(row['process_bytes']):>12}{_BUDGET_NOTES.get(row['name'], '')}")
    return "\n".join([*lines, "", "Process: an estimate, without KV cache and compute buffers."])


_BUDGET_NOTES = {
    "smallest": "  just computes one token",
    "useful": "  one token's experts of all layers: with less, even a repeated token misses",
    "full": "  nothing is read twice",
}


def _alignment_note(piece: dict[str, Any]) -> str:
    return {True: "  whole sectors: read in place", False: "  not whole sectors: read around and moved",
            None: ""}[piece["is_multiple_of_align"]]


def _experts_of(layers: Sequence[dict[str, Any]], n_blocks: int | None) -> str:
    if not layers:
        return "none"
    counts = sorted({(layer["n_experts"], layer["n_used"]) for layer in layers})
    each = ", ".join(f"{n_used} of {n_experts}" for n_experts, n_used in counts)
    return f"{each} per token in {len(layers)} layers" + (f" ({n_blocks} blocks)" if n_blocks else "")


# ---- doctor ---------------------------------------------------------------------------------------------------------

def checks_json(checks: Sequence[Check]) -> dict[str, Any]:
    """Return all checks by name."""
    return {
        "gguf_pager_version": __version__,
        "n_problems": sum(check.status == "problem" for check in checks),
        "checks": {check.name: {"status": check.status, "message": check.message, "remedy": check.remedy,
                                "facts": check.facts} for check in checks},
    }


def checks_text(checks: Sequence[Check]) -> str:
    """Return one line per check, and one below it where something can be done."""
    lines = []
    for check in checks:
        label = check.name.replace("_", " ")
        lines.append(f"{click.style(f'{check.status:8}', fg=_COLORS[check.status])} {label:14} {check.message}")
        if check.remedy:
            lines.append(f"{'':24}{check.remedy}")
    return "\n".join(lines)


# ---- energy ---------------------------------------------------------------------------------------------------------

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
        power = _number(row["avg_power_w"], ",.2f")
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
