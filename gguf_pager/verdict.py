"""Whether a model runs here, and how, in a sentence: arithmetic over what is known of model, memory and disk."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from gguf_pager.memory import budget
from gguf_pager.memory.budget import ClassNeed, format_bytes
from gguf_pager.memory.probe import Memory
from gguf_pager.model.layout import Layout

PROCESS_BYTES = 48 << 20
"""Python with llama_cpp imported and nothing loaded: 46.7 MB resident (Python 3.11, llama-cpp-python 0.3.36, Linux)."""

_MISSES = ((0.0, 1.0), (0.125, 0.656), (0.25, 0.381), (0.5, 0.128), (1.0, 0.0))
"""The share of a token's experts that has to be read, by the share of all experts that is in memory: an LRU on the recorded routing
of gpt-oss-20b, the less predictable of the two recordings that we have (Qwen3-30B on code: 0.406, 0.207 and 0.058)."""

_WELL_S = 0.1
"""Reading takes at most so long per token where a model "runs well": ten tokens a second, if computing costs nothing."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to expect of `budget="auto"`: stock llama.cpp, well, slowly, not known how fast, or not at all, and why."""

    kind: Literal["stock", "well", "slowly", "unknown", "no"]
    sentence: str


def process_bytes(layout: Layout, arena_bytes: int) -> int:
    """Estimate what a process with an arena of this size takes, without KV cache and compute buffers."""
    return PROCESS_BYTES + layout.dense_bytes + budget.WORK_BYTES + arena_bytes


def share_missed(share_resident: float) -> float:
    """Return which part of a token's experts has to be read when this part of all is in memory, from 0 to 1."""
    for (before, missed_before), (after, missed_after) in pairwise(_MISSES):
        if share_resident <= after:
            at = (share_resident - before) / (after - before)
            return missed_before + at * (missed_after - missed_before)
    return 0.0


def judge(layout: Layout, needs: tuple[ClassNeed, ...], memory: Memory, bytes_per_s: float | None) -> Verdict:
    """Say how a model would run with `budget="auto"`.

    `needs` are its slots', empty without experts; `bytes_per_s` what was measured of the disk, None where nothing was.
    """
    spare = budget.auto_budget_bytes(memory.available_bytes, memory.total_bytes)
    has = f"{format_bytes(memory.reachable_bytes)} can be had"
    if not layout.layers:
        return Verdict("stock", "Has no experts, so that nothing is paged: stock llama.cpp runs it.")
    if budget.fits_whole(layout.tensor_bytes, memory.available_bytes, memory.total_bytes):
        return Verdict("stock", f"Runs well: all {format_bytes(layout.tensor_bytes)} of it fit into memory, and stock llama.cpp "
                                "runs it.")
    least, full = budget.least_arena_bytes(needs), budget.full_arena_bytes(needs)
    least_process = process_bytes(layout, least)
    if least_process > memory.reachable_bytes:
        return Verdict("no", f"Does not fit: it needs {format_bytes(least_process)} at least, and {has}.")
    arena = min(full, spare - process_bytes(layout, 0))
    is_scarce = arena < least
    arena, setting = (least, "with --budget min, because little memory is free ") if is_scarce else (arena, "")
    share = arena / full
    read_bytes = layout.bytes_per_token * share_missed(share)
    what = (f"{setting}({format_bytes(arena)} of its {format_bytes(layout.expert_bytes)} of experts stay in memory, {share:.0%}; "
            f"a token reads about {read_bytes / 1e6:,.0f} MB of the others")
    if bytes_per_s is None and not is_scarce:
        return Verdict("unknown", f"Runs {what}; how long that takes here is not measured yet).")
    takes = "" if bytes_per_s is None else f", {read_bytes / bytes_per_s:.2f} s at the {bytes_per_s / 1e9:.1f} GB/s measured here"
    if not is_scarce and bytes_per_s is not None and read_bytes / bytes_per_s <= _WELL_S:
        return Verdict("well", f"Runs well {what}{takes}).")
    return Verdict("slowly", f"Runs, slowly, {what}{takes}).")
