"""What `inspect` shows: what a model is made of, and what budgets mean for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from gguf_pager import __version__
from gguf_pager.errors import printable
from gguf_pager.memory import budget
from gguf_pager.memory.budget import format_bytes
from gguf_pager.memory.probe import Memory
from gguf_pager.model.layout import Layout, Slice
from gguf_pager.pager import Pager
from gguf_pager.verdict import judge, process_bytes, share_missed


def inspection(layout: Layout, pager: Pager | None, memory: Memory, bytes_per_s: float | None) -> dict[str, Any]:
    """Return what a model is made of and what budgets mean for it. `pager` need not be open; None without experts.

    `bytes_per_s` is what was measured of its disk; None where nothing was.
    """
    verdict = judge(layout, tuple(pager.needs) if pager else (), memory, bytes_per_s)
    return {
        "gguf_pager_version": __version__,
        "verdict": verdict.kind,
        "verdict_sentence": verdict.sentence,
        "architecture": layout.architecture,
        "name": layout.name,
        "files": [{"path": str(path), "file_bytes": path.stat().st_size} for path in layout.paths],
        "tensor_bytes": layout.tensor_bytes,
        "expert_bytes": layout.expert_bytes,
        "dense_bytes": layout.dense_bytes,
        "idle_bytes": layout.idle_bytes,
        "n_blocks": layout.n_blocks,
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
        is_stock = text == "auto" and budget.fits_whole(layout.tensor_bytes, memory.available_bytes, memory.total_bytes)
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


def inspection_text(facts: dict[str, Any], *, has_details: bool = False) -> str:
    """Return an `inspection` for people; the slots and how they are read with the details only."""
    files = facts["files"]
    n_bytes = sum(file["file_bytes"] for file in files)
    idle = facts["idle_bytes"]
    lines = [
        facts["verdict_sentence"],
        *(["How fast its disk reads: gguf-pager doctor MODEL --probe"] if facts["verdict"] == "unknown" else []),
        "",
        printable(files[0]["path"]) + (f" and {len(files) - 1} more" if len(files) > 1 else ""),
        f"{printable(facts['name'])}, architecture {printable(facts['architecture'])}, {format_bytes(n_bytes)}",
        "",
        f"  experts     {format_bytes(facts['expert_bytes']):>12}  {_experts_of(facts['layers'], facts['n_blocks'])}",
        f"  the rest    {format_bytes(facts['dense_bytes']):>12}  needed for every token, always in memory",
        *([f"  not kept    {format_bytes(idle):>12}  tables of which a token needs a row, blocks that are not loaded"] if idle else []),
        "",
    ]
    if not facts["layers"]:
        return "\n".join([*lines, "It has no experts: there is nothing to page."])
    lines.append(f"  {'budget':8} {'experts in memory':>21} {'whole program':>15} {'read per token':>15}")
    told = set[str]()
    for row in facts["budgets"]:
        if row["budget"] in told:  # what is useful may be a quarter
            continue
        told.add(row["budget"])
        if row["reason"]:
            lines.append(f"  {row['budget']:8} {row['reason']}")
            continue
        read = share_missed(row["share_of_experts"]) * facts["bytes_per_token"] / 1e6
        lines.append(f"  {row['budget']:8} {format_bytes(row['arena_bytes']):>12} {row['share_of_experts']:>8.1%} "
                     f"{format_bytes(row['process_bytes']):>15} {read:>12,.0f} MB{_BUDGET_NOTES.get(row['name'], '')}")
    lines += ["", "Whole program: without the context's cache and buffers. Read per token: about, as recorded of gpt-oss-20b."]
    return "\n".join([*lines, *(_details(facts) if has_details else ["More about the file: --details"])])


def _details(facts: dict[str, Any]) -> list[str]:
    align = facts["align_bytes"]
    lines = ["", f"A token reads {facts['bytes_per_token'] / 1e6:,.1f} MB when no expert is in memory.",
             f"Direct reads: {f'in multiples of {align} bytes' if align else 'not on this file system'}.", ""]
    for i, shape in enumerate(facts["shape_classes"]):
        lines.append(f"Shape class {i}: {shape['n_layers']} layers, {shape['n_experts']:,} experts of "
                     f"{shape['expert_bytes']:,} bytes, in slots of {shape['slot_bytes']:,}")
        lines += [f"  {piece['name']:20} {'/'.join(piece['types']):10} {piece['slice_bytes']:>12,} bytes"
                  f"{_alignment_note(piece)}" for piece in shape["slices"]]
    return lines


_BUDGET_NOTES = {
    "smallest": "  as little as can compute a token",
    "useful": "  one token's experts of all layers: with less, even a repeated token reads",
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
    of = f" of {n_blocks}" if n_blocks and n_blocks != len(layers) else ""
    return f"{each} used by a token, in each of {len(layers)}{of} layers"
