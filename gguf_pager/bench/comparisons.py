"""What of two rows may be compared, and which rows cannot be as they are: then something disturbed the machine.

No figure is taken away. But a row that was disturbed is in no ratio, and a ratio that cannot be has a reason.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from gguf_pager.bench.cases import Case
from gguf_pager.bench.runner import Run
from gguf_pager.bench.samples import PhaseName, Sample, median, paired, samples_of

Disturbed = Mapping[tuple[Case, PhaseName], str]
"""Why a case's phase cannot have been measured undisturbed."""

UNASKED = "stock was not measured"

MOST_OVER_RICHER = 1.25
"""Times the speed of a case with more memory. Up to 1.22 was measured where nothing disturbed (ours at 100 % beside the resident
model, benchmarks/results/epyc-2core-24gb): our arena lies in huge pages, and stock's file in the page cache in large ones."""

MOST_SPREAD = 2.5
"""The fastest run over the slowest. Machines that are shared drift by two within the hour (benchmarks/LOG.md), tokens differ."""

MOST_RATIO_SPREAD = 2.0
"""The same of ratios within rounds, from which drift has gone."""


# ---- what cannot be --------------------------------------------------------------------------------------------------

def disturbed(runs: Sequence[Run]) -> Disturbed:
    """Return what cannot have been measured undisturbed, with the reason."""
    cases = list(dict.fromkeys(run.case for run in runs))
    names: tuple[PhaseName, ...] = ("prompt", "gen")
    found: dict[tuple[Case, PhaseName], str] = {}
    for name in names:
        samples = {case: samples_of(runs, case, name) for case in cases}
        for case in cases:
            reason = _spread(samples[case]) or next(
                (why for other in cases if (why := _slower(name, samples[case], samples[other])) is not None), None)
            if reason is not None:
                found[case, name] = reason
    return found


def _spread(samples: Sequence[Sample]) -> str | None:
    speeds = [sample.ts for sample in samples]
    if speeds and max(speeds) > MOST_SPREAD * min(speeds):
        return f"the fastest run was {max(speeds) / min(speeds):.1f} times as fast as the slowest"
    settings = {sample.run.read_ahead_kb for sample in samples}
    if len(settings) > 1:
        return "the device's read-ahead was not the same in all runs: somebody else sets it, too"
    return None


def _slower(name: PhaseName, richer: Sequence[Sample], poorer: Sequence[Sample]) -> str | None:
    """Return a reason if one was slower than another that cannot be faster, having less memory and the same kernels."""
    if not richer or not poorer or not _has_more_memory(name, richer[0].run, poorer[0].run):
        return None
    times = median(paired(poorer, richer))
    if times is None or times <= MOST_OVER_RICHER:
        return None
    return (f"it had more memory than \"{poorer[0].run.case.label}\"{_cap_words(poorer[0].run)}, which was {times:.2f} times as fast "
            "in the same rounds")


def _cap_words(run: Run) -> str:
    return "" if run.case.mode == "paged" or run.cap_bytes is None else f" in {run.cap_bytes / 1e9:.2f} GB"


def _has_more_memory(name: PhaseName, one: Run, other: Run) -> bool:
    """Whether one run has all that the other has and more, so that it cannot be slower but for noise.

    A prompt of ours is no such case: a larger arena takes longer to become present, which the first prompt pays for.
    """
    if one.case.shape != other.case.shape or one.case.is_repacked or other.case.is_repacked:
        return False
    if one.case.mode == "resident":
        return other.case.mode != "resident"
    if one.case.mode != other.case.mode:
        return False
    if one.case.mode == "stock":
        return (one.read_ahead_kb == other.read_ahead_kb and other.cap_bytes is not None
                and (one.cap_bytes is None or one.cap_bytes > other.cap_bytes))
    return name == "gen" and (one.facts.get("arena_bytes") or 0) > (other.facts.get("arena_bytes") or math.inf)


# ---- beside stock, and beside what is resident -----------------------------------------------------------------------

def ratios(case: Case, name: PhaseName, runs: Sequence[Run], known: Disturbed) -> dict[str, Any]:
    """Return how many times as fast as others ours is: as stock under the same cap at the best read-ahead measured, and as
    what is resident. What there is not is None; for stock `vs_stock_reason` says why."""
    result: dict[str, Any] = dict.fromkeys(
        ("vs_stock", "vs_stock_low", "vs_stock_high", "vs_stock_read_ahead_kb", "vs_stock_tried_kb", "vs_stock_reason",
         "vs_resident", "vs_repacked", "same_logits", "same_logits_rounds"))
    if case.mode != "paged":
        return result
    samples = samples_of(runs, case, name)
    result |= _beside_stock(case, name, samples, runs, known)
    for other in dict.fromkeys(run.case for run in runs):
        if other.mode == "resident" and other.shape == case.shape and (other, name) not in known:
            key = "vs_repacked" if other.is_repacked else "vs_resident"
            result[key] = median(paired(samples, samples_of(runs, other, name)))
    return result | _same_logits(case, runs)


def _beside_stock(case: Case, name: PhaseName, samples: Sequence[Sample], runs: Sequence[Run],
                  known: Disturbed) -> dict[str, Any]:
    stock = list(dict.fromkeys(run.case for run in runs if run.case.mode == "stock" and run.case.shape == case.shape))
    if not stock:
        return {"vs_stock_reason": UNASKED}
    cap_bytes, reason = _cap_in_force(case, runs)
    if cap_bytes is None:
        return {"vs_stock_reason": f"no ratio without a cap: {reason}"}
    rivals = [other for other in stock if _cap_in_force(other, runs)[0] == cap_bytes]
    if not rivals:
        others = [_cap_in_force(other, runs) for other in stock]
        return {"vs_stock_reason": "stock did not run under the same cap: "
                                   + next((str(why) for none, why in others if none is None), "its caps were others")}
    result: dict[str, Any] = {"vs_stock_tried_kb": sorted(
        {run.read_ahead_kb for run in runs if run.case in rivals and run.is_made}, key=lambda kb: (kb is None, kb or 0))}
    theirs = {other: found for other in rivals if (found := samples_of(runs, other, name))}
    if not samples:
        return result | {"vs_stock_reason": "ours has no result"}
    if not theirs:
        wrong = next(run for run in runs if run.case in rivals)
        return result | {"vs_stock_reason": f"stock has no result: {wrong.status}"}
    speeds = {other: median([sample.ts for sample in found]) or 0.0 for other, found in theirs.items()}
    best = max(speeds, key=lambda other: speeds[other])
    for other, found in theirs.items():  # one that could not have been the best, disturbed or not, does not matter
        if (other, name) in known and (other == best or MOST_SPREAD * max(sample.ts for sample in found) > speeds[best]):
            return result | {"vs_stock_reason": f"{other.label} was disturbed: {known[other, name]}"}
    found_ratios = paired(samples, theirs[best])
    if not found_ratios:
        return result | {"vs_stock_reason": "no round has a result of both"}
    return result | {"vs_stock": median(found_ratios), "vs_stock_low": min(found_ratios), "vs_stock_high": max(found_ratios),
                     "vs_stock_read_ahead_kb": theirs[best][0].run.read_ahead_kb}


def _cap_in_force(case: Case, runs: Sequence[Run]) -> tuple[int | None, str | None]:
    """Return the cap that every run of a case was under; None with the reason where one was under none, or another."""
    own = [run for run in runs if run.case == case and run.is_made]
    free = next((run for run in own if run.cap == "none"), None)
    if free is not None:
        return None, free.cap_reason or "none was in force"
    caps = {run.cap_bytes for run in own}
    return (caps.pop(), None) if len(caps) == 1 else (None, "it was not the same in all runs" if caps else "no run was made")


def unsteady(row: Mapping[str, Any]) -> str | None:
    """Return a reason if ratios to stock differ more from round to round than what drifts with the machine."""
    low, high = row["vs_stock_low"], row["vs_stock_high"]
    if low is None or high <= MOST_RATIO_SPREAD * low:
        return None
    return f"its ratio to stock was between {low:.2f} and {high:.2f} in {row['n_rounds']} rounds"


# ---- several sequences beside one --------------------------------------------------------------------------------------

def over_one(case: Case, name: PhaseName, runs: Sequence[Run], known: Disturbed) -> dict[str, float | None]:
    """Return how many times as fast several sequences together are as one was, otherwise the same and in the same rounds; None
    where one was not measured, or was disturbed."""
    one = _of_one_sequence(case, list(dict.fromkeys(run.case for run in runs)))
    found = ([] if one is None or (one, name) in known
             else paired(samples_of(runs, case, name), samples_of(runs, one, name)))
    return {"over_1": median(found), "over_1_low": min(found, default=None), "over_1_high": max(found, default=None)}


def _of_one_sequence(case: Case, cases: Sequence[Case]) -> Case | None:
    """Return the same case with one sequence. A cap made for several may be another: stock's is then that of the same budget."""
    if case.shape.n_parallel == 1:
        return None
    shape = replace(case.shape, n_parallel=1)
    budgets = {other.budget for other in cases if (other.mode, other.shape, other.cap_bytes) == ("paged", case.shape, case.cap_bytes)}
    caps = {other.cap_bytes for other in cases if (other.mode, other.shape) == ("paged", shape) and other.budget in budgets}
    return next((other for other in cases
                 if other == replace(case, shape=shape, cap_bytes=other.cap_bytes)
                 and (case.mode != "stock" or other.cap_bytes in caps)), None)


def _same_logits(case: Case, runs: Sequence[Run]) -> dict[str, Any]:
    """Return whether ours ended with the logits of the others of its round, and in how many rounds that could be told.

    Only the same kernels and the same batches give the same bits: so not repacked ones, and not those of another n_ubatch,
    unless both take the prompt in one piece.
    """
    longest = case.shape.n_parallel * max(case.shape.n_prompt, case.shape.n_depth, 1)
    answers: dict[int, bool] = {}
    for run in runs:
        if run.case == case and "digest" in run.facts:
            same = [other.facts["digest"] == run.facts["digest"] for other in runs
                    if other.case.mode != "paged" and not other.case.is_repacked and other.turn == run.turn
                    and other.case.shape == case.shape and "digest" in other.facts
                    and (other.facts["n_ubatch"] == run.facts["n_ubatch"]
                         or longest <= min(other.facts["n_ubatch"], run.facts["n_ubatch"]))
                    and (other.gen is None) == (run.gen is None)]
            if same:
                answers[run.turn] = all(same)
    return {"same_logits": all(answers.values()) if answers else None, "same_logits_rounds": len(answers)}
