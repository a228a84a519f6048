"""How large a model's arena becomes: what the user asked for, against what this process has already taken."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from gguf_pager import budget, probe
from gguf_pager.budget import Budget
from gguf_pager.errors import BudgetError
from gguf_pager.layout import Layout
from gguf_pager.pager import Options, Pager
from gguf_pager.residency import Residency


@dataclass(slots=True)
class Request:
    """What somebody who opens a model wants.

    `output_rows` is the number of logit rows that will be kept, for the budget: by llama.cpp of a batch's tokens where
    `has_all_outputs`, by the caller of a context's tokens where `keeps_all_outputs`. `opened` and `reason` tell what became of the
    last model opened: its pager, or why it runs as stock llama.cpp. `is_any_model`: it is for whatever is opened, so that
    a mirror may be another model's.
    """

    budget: Budget
    options: Options
    output_rows: int = 1
    is_any_model: bool = False
    has_all_outputs: bool = False
    keeps_all_outputs: bool = False
    opened: list[Pager] = field(default_factory=list)
    reason: str | None = None

    def count_outputs(self, n_ctx: int, n_batch: int) -> None:
        """Set `output_rows` for a context of so many tokens, and batches of so many."""
        if self.has_all_outputs:
            self.output_rows = n_batch + (n_ctx if self.keeps_all_outputs else n_batch)


_DRIFT_BYTES, _DRIFT_SHARE = 4 << 20, 0.01
"""What a second attempt in the same process may need beyond the first, in heap that the first has left in pieces: 1.5
MiB of 127 were seen, with the smallest of models."""


def _too_small(wanted: int, least: int) -> BudgetError:
    least += _DRIFT_BYTES + int(least * _DRIFT_SHARE)
    return BudgetError(
        f"A budget of {budget.format_bytes(wanted)} is too small: this model needs at least "
        f"{budget.format_bytes(least)} ({least} bytes). Raise it, or say budget='min'."
    )


def may_be_enough(layout: Layout, pager: Pager, request: Request) -> bool:
    """Return whether a budget suffices for a process without KV cache: what is resident now, dense weights, slots."""
    least = (probe.process_memory().resident_bytes + layout.dense_bytes + budget.WORK_BYTES
             + budget.least_arena_bytes(pager.needs))
    return request.budget.kind != "bytes" or int(request.budget.value or 0) >= least


def _arena_bytes(pager: Pager, request: Request, kept: Residency, before: probe.ProcessMemory) -> tuple[int, int]:
    """Return what the budget leaves for the arena, and all that it does not leave.

    What the context has allocated but not touched yet counts as used: it will be.
    """
    full = budget.full_arena_bytes(pager.needs)
    if request.budget.kind == "share":
        least = budget.least_arena_bytes(pager.needs)
        wanted = round((request.budget.value or 1) * full)
        if wanted < least:
            raise BudgetError(
                f"{(request.budget.value or 0) * 100:g}% of the experts are too few: this model needs at least "
                f"{math.ceil(least / full * 10_000) / 100:.2f}% ({least} bytes) to compute one token."
            )
        return wanted, 0
    if request.budget.kind == "min":
        return budget.least_arena_bytes(pager.needs), 0
    now = probe.process_memory()
    untouched = max(0, (now.allocated_bytes - before.allocated_bytes) - (now.resident_bytes - before.resident_bytes))
    not_yet_resident = 0 if kept.method in ("lock", "copy") else pager.layout.dense_bytes
    rows = request.output_rows * pager.layout.n_vocab * 4
    used = now.resident_bytes + untouched + not_yet_resident + rows + budget.WORK_BYTES
    if request.budget.kind == "bytes":
        total = int(request.budget.value or 0)
    else:
        memory = probe.memory()
        total = now.resident_bytes + budget.auto_budget_bytes(memory.available_bytes, memory.total_bytes)
    return min(full, max(0, total - used)), used


def open_or_shrink(
    pager: Pager, request: Request, kept: Residency, n_ubatch: int, is_uncut: bool, before: probe.ProcessMemory
) -> int:
    """Open the arena with the first context, if its batches fit; otherwise return the n_ubatch that does.

    `before` is the process before the context was made. Batches that must not be cut are not: what does not fit is then
    left to llama.cpp's mapping.

    Raises:
        BudgetError: not even one token's experts fit.
    """
    slots = pager.n_slots
    if not pager.is_open:
        arena, used = _arena_bytes(pager, request, kept, before)
        least = budget.least_arena_bytes(pager.needs)
        if arena < least and (n_ubatch == 1 or is_uncut):
            raise _too_small(int(request.budget.value or arena + used), used + least)
        slots = budget.share_slots(pager.needs, max(arena, least))
        if request.budget.kind == "min":
            slots = tuple(need.n_least for need in pager.needs)
        if arena < least:
            return max(1, n_ubatch // 2)  # smaller batches have smaller buffers
    fitting = n_ubatch if is_uncut else budget.largest_ubatch(pager.layout, slots, n_ubatch)
    if fitting == n_ubatch and not pager.is_open:
        pager.open(slots)
    return fitting
