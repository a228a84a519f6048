"""How large a model's arena becomes: what the user asked for, against what this process has already taken."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from gguf_pager.errors import BudgetError, EngineError
from gguf_pager.memory import budget, probe
from gguf_pager.memory.budget import Budget, ClassNeed, format_bytes
from gguf_pager.memory.residency import Residency
from gguf_pager.model.layout import Layout
from gguf_pager.pager import Options, Pager


@dataclass(slots=True, eq=False)
class Request:
    """What somebody who opens a model wants.

    `output_rows` is the number of logit rows that will be kept, for the budget: by llama.cpp of a batch's tokens where
    `has_all_outputs`, by the caller of a context's tokens where `keeps_all_outputs`. `opened` and `reason` tell what became of the
    last model opened: its pager, or why it runs as stock llama.cpp. `is_any_model`: it is for whatever is opened, so that
    a mirror may be another model's. Of more than one sequence the context has a single cache.
    """

    budget: Budget
    options: Options
    output_rows: int = 1
    is_any_model: bool = False
    has_all_outputs: bool = False
    keeps_all_outputs: bool = False
    n_sequences: int = 1
    opened: list[Pager] = field(default_factory=list)
    reason: str | None = None

    def count_outputs(self, n_ctx: int, n_batch: int) -> None:
        """Set `output_rows` for a context of so many tokens, and batches of so many."""
        if self.has_all_outputs:
            self.output_rows = n_batch + (n_ctx if self.keeps_all_outputs else n_batch)
        else:
            self.output_rows = self.n_sequences  # llama.cpp sets a row aside for each


NEED_MULTIPLES = ("kimi-linear", "minimax-01")
"""Architectures whose n_ubatch must be a multiple of n_seq_max where sequences are kept apart. llama.cpp measures their graphs
with n_ubatch tokens of one sequence, divided among the caches of all (TAG_RESERVE_DIAG_DECAY in llama-context.cpp), and an
assertion ends the process where that leaves a rest."""


def suitable_ubatch(layout: Layout, n_ubatch: int, n_sequences: int) -> int:
    """Return `n_ubatch`, or the next smaller one where llama.cpp would end the process because of it.

    Raises:
        EngineError: there is none.
    """
    if layout.architecture not in NEED_MULTIPLES or n_ubatch % n_sequences == 0:
        return n_ubatch
    if n_ubatch < n_sequences:
        raise EngineError(f"{layout.architecture} with {n_sequences} separate sequences needs an n_ubatch of at least "
                          f"{n_sequences}, not {n_ubatch}: raise it, or set kv_unified.")
    return n_ubatch // n_sequences * n_sequences


_DRIFT_BYTES, _DRIFT_SHARE = 4 << 20, 0.01
"""What a second attempt in the same process may need beyond the first, in heap that the first has left in pieces: 1.5
MiB of 127 were seen, with the smallest of models."""

_INSIST = "insist on it (overcommit=True, or --overcommit on the command line)"


def _with_drift(n_bytes: int) -> int:
    return n_bytes + _DRIFT_BYTES + int(n_bytes * _DRIFT_SHARE)


def _way_out(is_the_contexts: bool, otherwise: str) -> str:
    """Return the sentence that says what to do: `otherwise`, or first to ask for a smaller context."""
    said = f"lower n_ubatch or n_ctx, or {otherwise}" if is_the_contexts else otherwise
    return f"{said[0].upper()}{said[1:]}."


def _too_small(wanted: int, least: int, context_bytes: int, promised_bytes: int) -> BudgetError:
    """Say what a budget in bytes must be. Of `least`, `context_bytes` are the context's, which can be made smaller; `promised_bytes`, if
    any, are others', which the budget is for as well."""
    is_the_contexts = least - context_bytes <= wanted
    least = _with_drift(least)
    whose = f", of which this context takes {format_bytes(context_bytes)}" if is_the_contexts else ""
    way_out = _way_out(is_the_contexts, "raise it, or say budget='min'")
    beside = ", with what else is open in this process" if promised_bytes else ""
    return BudgetError(
        f"A budget of {format_bytes(wanted)} is too small: this model needs at least "
        f"{format_bytes(least)} ({least} bytes){beside}{whose}. {way_out}"
    )


def _has(memory: probe.Memory) -> str:
    """Say what there is, for the end of a sentence."""
    where = "the machine has" if memory.limit_bytes is None else "its cgroup allows"
    return f"this process can get {format_bytes(memory.reachable_bytes)} of the {format_bytes(memory.total_bytes)} that {where}"


def may_be_enough(layout: Layout, pager: Pager, request: Request) -> bool:
    """Return whether a budget suffices for a process without KV cache: what is resident now, dense weights, slots."""
    least = (probe.process_memory().resident_bytes + layout.dense_bytes + budget.WORK_BYTES
             + budget.least_arena_bytes(pager.needs))
    return request.budget.kind != "bytes" or int(request.budget.value or 0) >= least


def check_room(pager: Pager, request: Request) -> None:
    """Refuse what this machine has no room for before anything of the model is resident; KV cache and buffers come on top.

    Raises:
        BudgetError: with what there is and, of a budget that is not in bytes, the least that works.
    """
    if request.budget.kind == "bytes":
        wanted, memory = int(request.budget.value or 0), probe.memory()
        if not request.options.overcommit and wanted > budget.most_bytes(memory.reachable_bytes):
            raise BudgetError(
                f"A budget of {format_bytes(wanted)} is more than there is: {_has(memory)}. Lower it, free memory, or {_INSIST}."
            )
        return
    dense = pager.layout.dense_bytes
    wanted = _share_bytes(pager.needs, request.budget.value) if request.budget.kind == "share" else 0
    _check_room(pager.needs, request, wanted, dense + budget.WORK_BYTES)


def make_room_for_cache(pager: Pager, request: Request, cache: int, kept: Residency, promised_bytes: int) -> None:
    """Give back, before a context is made, what its cache takes of a budget in bytes; or refuse it.

    llama.cpp fills all of a cache with zeros when it makes one: afterwards the budget would have been exceeded. Where it is not, what is
    missing is better known afterwards. `promised_bytes`: as in `open_or_shrink`.

    Raises:
        BudgetError: too few slots would be left.
    """
    if request.budget.kind != "bytes":
        return
    wanted, resident = int(request.budget.value or 0), probe.process_memory().resident_bytes
    if pager.is_open:
        n_slots = _slots_without(pager, resident + cache + promised_bytes - wanted)
        if n_slots is not None:
            pager.shrink(n_slots)
            return
        has_room = resident <= wanted
    else:
        has_room = wanted >= (resident + promised_bytes + untouched_dense_bytes(pager, kept) + budget.WORK_BYTES
                              + budget.least_arena_bytes(pager.needs))
    if has_room and resident + cache > wanted:  # without a context of that size it would do
        raise BudgetError(f"A budget of {format_bytes(wanted)} has no room for this context: its cache takes {format_bytes(cache)} or more. "
                          "Lower n_ctx, or raise the budget.")


def check_cache(pager: Pager, request: Request, n_cells: int, cache: int, kept: Residency) -> None:
    """Refuse a context of `n_cells` tokens, of all sequences, whose cache of so many bytes this machine has no room for.

    Raises:
        BudgetError: with what there is, and a way out.
    """
    if request.options.overcommit and request.budget.kind != "auto":
        return
    dense = untouched_dense_bytes(pager, kept)
    arena = 0 if pager.is_open else budget.least_arena_bytes(pager.needs)
    memory = probe.memory()
    if cache + arena + dense > memory.available_bytes:
        raise BudgetError(f"There is no room for a context of {n_cells:,} tokens: its cache takes {format_bytes(cache)} or "
                          f"more, and {format_bytes(memory.available_bytes)} are available beside the model; {_has(memory)}. "
                          "Lower n_ctx, free memory, or raise the limit of the container.")


def _check_room(needs: Sequence[ClassNeed], request: Request, arena_bytes: int, other_bytes: int, context_bytes: int = 0) -> None:
    """Refuse an arena (the least one, if that is larger) that does not fit beside what else will become resident.

    `context_bytes` are those of a context, which can be made smaller.
    """
    is_auto = request.budget.kind == "auto"
    if request.options.overcommit and not is_auto:
        return
    least, memory = budget.least_arena_bytes(needs), probe.memory()
    spare = budget.auto_budget_bytes(memory.available_bytes, memory.total_bytes) if is_auto else memory.available_bytes
    if max(arena_bytes, least) + other_bytes <= spare:
        return
    n_bytes = _with_drift(probe.process_memory().resident_bytes + other_bytes + least)
    needed = f"this model needs at least {format_bytes(n_bytes)} ({n_bytes} bytes) for the whole process"
    is_the_contexts = context_bytes > 0 and least + other_bytes - context_bytes <= spare
    if is_the_contexts:
        needed += f", {format_bytes(context_bytes)} of them for this context"
    if least + other_bytes > memory.available_bytes:
        insist = "" if is_auto else f" or {_INSIST}"
        way_out = _way_out(is_the_contexts, f"free memory, raise the limit of the container{insist}")
        raise BudgetError(f"The memory here is too small: {needed}, and {_has(memory)}. {way_out}")
    if is_auto:
        raise BudgetError(f"The memory that budget='auto' may take is too small: {needed}, {_has(memory)}, and 'auto' leaves "
                          f"{format_bytes(memory.available_bytes - spare)} to others. "
                          + _way_out(is_the_contexts, "say budget='min' or a size"))
    most = int((memory.available_bytes - other_bytes) / budget.full_arena_bytes(needs) * 1000) / 10
    raise BudgetError(f"There is no room for {(request.budget.value or 0) * 100:g}% of the experts, {format_bytes(arena_bytes)}: "
                      f"{needed}, and {_has(memory)}. The largest share that fits is {most:g}%; lower it, or {_INSIST}.")


def _share_bytes(needs: Sequence[ClassNeed], share: float | None) -> int:
    return round((share or 1) * budget.full_arena_bytes(needs))


@dataclass(frozen=True, slots=True)
class Taken:
    """What a process that has just made a context has taken.

    `untouched_bytes` are those that the context has allocated or will, and that are not resident yet; `context_bytes` all of it. Of the
    former `score_bytes` are for scores of attention, `output_bytes` for rows of logits of all tokens.
    """

    resident_bytes: int
    untouched_bytes: int
    context_bytes: int
    score_bytes: int = 0
    output_bytes: int = 0


@dataclass(slots=True)
class Untouched:
    """What a context has allocated and not touched, as it computes batches: buffers are laid out for `n_ubatch` tokens, those of scores
    for as many that look at `n_cells` others, and fewer touch their part. Of rows of logits it is not known."""

    buffer_bytes: int
    score_bytes: int
    output_bytes: int
    n_ubatch: int
    n_cells: int
    most_tokens: int = 0
    most_scores: int = 0

    def note(self, n_tokens: int, count_cells: Callable[[], int]) -> None:
        """Take note that a batch was computed; `count_cells` says how many its last token looks at."""
        n_tokens = min(n_tokens, self.n_ubatch)
        self.most_tokens = max(self.most_tokens, n_tokens)
        if self.score_bytes and n_tokens * self.n_cells > self.most_scores:
            self.most_scores = max(self.most_scores, n_tokens * min(count_cells(), self.n_cells))

    def count_bytes(self) -> int:
        """Return how much that still is."""
        n_scores = self.n_ubatch * self.n_cells
        return (self.buffer_bytes * (self.n_ubatch - self.most_tokens) // self.n_ubatch
                + self.score_bytes * (n_scores - self.most_scores) // n_scores + self.output_bytes)


def measure_context(pager: Pager, request: Request, before: probe.ProcessMemory, n_ubatch: int = 0, n_scores: int = 0) -> Taken:
    """Return what was taken since `before`, when a context was yet to be made and no arena was on its way into memory.

    `n_scores`: see `budget.count_scores`.
    """
    now = probe.process_memory()
    allocated, touched = now.allocated_bytes - before.allocated_bytes, now.resident_bytes - before.resident_bytes
    outputs = request.output_rows * pager.layout.n_vocab * 4
    work = budget.converted_bytes(pager.layout, n_ubatch) + n_scores * budget.CONVERTED_BYTES
    later = outputs + (work if pager.is_open else max(0, work - budget.WORK_BUFFER_BYTES))
    if request.options.look_ahead:
        later += budget.look_ahead_bytes(pager.layout)
    untouched = max(0, allocated - touched) + later
    scores = min(untouched - later, n_scores * budget.SCORE_BYTES) + min(later - outputs, n_scores * budget.CONVERTED_BYTES)
    return Taken(now.resident_bytes, untouched, max(0, allocated) + later, scores, outputs if request.has_all_outputs else 0)


def untouched_dense_bytes(pager: Pager, kept: Residency) -> int:
    """Return how much of the dense weights becomes resident with the first tokens only."""
    return 0 if kept.method in ("lock", "copy") else pager.layout.dense_bytes


def _arena_bytes(
    pager: Pager, needs: Sequence[ClassNeed], request: Request, kept: Residency, taken: Taken, promised_bytes: int
) -> tuple[int, int]:
    """Return what the budget leaves for the arena, and all that it does not leave.

    What this context and others have allocated but not touched yet counts as used: it will be.

    Raises:
        BudgetError: a share that is too small for any context, or the machine has no room for that.
    """
    full, least = budget.full_arena_bytes(needs), budget.least_arena_bytes(needs)
    other = taken.untouched_bytes + promised_bytes + untouched_dense_bytes(pager, kept) + budget.WORK_BYTES
    if request.budget.kind == "bytes":
        used = taken.resident_bytes + other
        return min(full, max(0, int(request.budget.value or 0) - used)), used
    if request.budget.kind == "share":
        wanted = _share_bytes(needs, request.budget.value)
        if wanted < least:
            raise BudgetError(
                f"{(request.budget.value or 0) * 100:g}% of the experts are too few: this model needs at least "
                f"{math.ceil(least / full * 10_000) / 100:.2f}% ({least} bytes) to compute one token."
            )
        _check_room(needs, request, wanted, other, taken.context_bytes)
        return wanted, 0
    _check_room(needs, request, least, other, taken.context_bytes)
    if request.budget.kind == "min":
        return least, 0
    memory = probe.memory()
    spare = budget.auto_budget_bytes(memory.available_bytes, memory.total_bytes)
    return min(full, max(least, spare - other)), 0


def _slots_without(pager: Pager, excess: int) -> list[int] | None:
    """Return the slots that are left of an open arena if so many bytes are given back; None: too few would be."""
    needs, slots = pager.needs, list(pager.n_slots)
    for index in sorted(range(len(needs)), key=lambda i: -needs[i].expert_bytes):
        if excess <= 0:
            break
        n_gone = min(max(0, slots[index] - needs[index].n_least), math.ceil(excess / needs[index].stride_bytes))
        slots[index] -= n_gone
        excess -= n_gone * needs[index].stride_bytes
    return slots if excess <= 0 else None


def _make_room(pager: Pager, request: Request, taken: Taken, promised_bytes: int) -> None:
    """Give back as many slots of an open arena as a further context needs memory; of a budget in bytes alone.

    Raises:
        BudgetError: too few would be left.
    """
    if request.budget.kind != "bytes":
        return
    wanted = int(request.budget.value or 0)
    excess = taken.resident_bytes + taken.untouched_bytes + promised_bytes - wanted
    n_slots = _slots_without(pager, excess)
    if n_slots is None:
        spare = sum(max(0, n - need.n_least) * need.stride_bytes for n, need in zip(pager.n_slots, pager.needs, strict=True))
        raise _too_small(wanted, wanted + excess - spare, taken.context_bytes, promised_bytes)
    pager.shrink(n_slots)


def open_or_shrink(pager: Pager, request: Request, kept: Residency, taken: Taken, promised_bytes: int) -> None:
    """Open the arena with the first context; for a further one give back what it needs.

    `taken` was measured once the context was there. `promised_bytes`: what others of this process, which were there before it,
    are still to touch.

    Raises:
        BudgetError: not even one token's experts fit beside what else there is.
    """
    needs = pager.needs
    if pager.is_open:
        _make_room(pager, request, taken, promised_bytes)
        return
    arena, used = _arena_bytes(pager, needs, request, kept, taken, promised_bytes)
    least = budget.least_arena_bytes(needs)
    if arena < least:
        raise _too_small(int(request.budget.value or 0), used + least, taken.context_bytes, promised_bytes)
    if request.budget.kind == "min":
        pager.open(tuple(need.n_least for need in needs))
    else:
        pager.open(budget.share_slots(needs, arena))
