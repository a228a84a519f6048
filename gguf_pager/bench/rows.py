"""Rows made of runs: one for the prompt and one for the tokens after it, as llama-bench has them, with its field names.

Ours follow after llama-bench's. Times of one round are compared with each other only, because the machine changes from
round to round. What is not known is None, and a reason stands in the row.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from gguf_pager.bench import comparisons
from gguf_pager.bench.cases import Case, budget_bytes
from gguf_pager.bench.comparisons import Disturbed
from gguf_pager.bench.runner import Run
from gguf_pager.bench.samples import PhaseName, Sample, median, samples_of
from gguf_pager.bench.worker import PhaseResult
from gguf_pager.energy.meter import Energy, energy_of
from gguf_pager.energy.model import Constant, Usage


@dataclass(frozen=True, slots=True)
class Common:
    """What all rows of a benchmark share. `machine` goes into each of them as it is."""

    model_filename: str
    machine: Mapping[str, Any]
    device_bytes_per_s: float | None
    stream_bytes_per_s: float | None
    idle_w: float | None
    constants: Mapping[str, Constant]
    tokens: str
    is_warm: bool
    n_rounds: int


def rows_of(runs: Sequence[Run], common: Common) -> list[dict[str, Any]]:
    """Return the rows of runs of one shape, in the order of the cases: each with its prompt first."""
    cases = list(dict.fromkeys(run.case for run in runs))
    known = comparisons.disturbed(runs)
    rows = []
    for case in cases:
        shape = case.shape
        phases: tuple[tuple[PhaseName, int], ...] = (("prompt", shape.n_prompt), ("gen", shape.n_gen))
        rows += [_row(case, name, runs, known, common) for name, n_tokens in phases if n_tokens]
    return rows


def _row(case: Case, name: PhaseName, runs: Sequence[Run], known: Disturbed, common: Common) -> dict[str, Any]:
    own = [run for run in runs if run.case == case]
    samples = samples_of(runs, case, name)
    row = _llama_bench_fields(case, name, own, samples, common)
    row |= _settings(case, own, common) | _speed(samples, own) | _work(name, samples, own, common)
    row |= _limit(case, name, samples, runs, common) | comparisons.ratios(case, name, runs, known)
    row |= _energy(name, samples, runs, common)
    row["status"], row["status_reason"] = _status(case, name, own, samples, row, known, common)
    return row | _sequences(case, name, samples, row) | comparisons.over_one(case, name, runs, known)


def _llama_bench_fields(case: Case, name: PhaseName, own: Sequence[Run], samples: Sequence[Sample],
                        common: Common) -> dict[str, Any]:
    """Return what llama-bench tells of a test, under its names. `n_depth` counts the prompt before generated tokens."""
    shape, facts = case.shape, next((run.facts for run in own if "model_type" in run.facts), {})
    ns, ts = [sample.phase.ns for sample in samples], [sample.ts for sample in samples]
    begun_at = min((run.begun_at for run in own), default=0.0)
    return {
        "cpu_info": common.machine.get("cpu_info"),
        "gpu_info": "",
        "backends": "CPU",
        "model_filename": common.model_filename,
        "model_type": facts.get("model_type"),
        "model_size": facts.get("model_size"),
        "model_n_params": facts.get("model_n_params"),
        "n_batch": shape.n_batch,
        "n_ubatch": facts.get("n_ubatch", shape.n_ubatch),
        "n_threads": shape.n_threads,
        "type_k": "f16",
        "type_v": "f16",
        "n_gpu_layers": 0,
        "use_mmap": case.mode != "resident",
        "repack": case.is_repacked,
        "n_prompt": shape.n_prompt if name == "prompt" else 0,
        "n_gen": shape.n_gen if name == "gen" else 0,
        "n_depth": shape.n_depth + (shape.n_prompt if name == "gen" else 0),
        "test_time": datetime.fromtimestamp(begun_at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "avg_ns": round(statistics.mean(ns)) if ns else None,
        "stddev_ns": _stddev(ns),
        "avg_ts": statistics.mean(ts) if ts else None,
        "stddev_ts": _stddev(ts),
        "samples_ns": ns,
        "samples_ts": ts,
    }


def _stddev(values: Sequence[float]) -> float | None:
    """Return the sample's deviation; of one value there is none, where llama-bench says 0."""
    return statistics.stdev(values) if len(values) > 1 else None


def _settings(case: Case, own: Sequence[Run], common: Common) -> dict[str, Any]:
    facts = next((run.facts for run in own if "model_type" in run.facts), {})
    made = [run for run in own if run.is_made] or own
    cached = [run.cached_bytes for run in made]
    worst = next((run for run in made if run.cap == "none"), made[0])  # one run without it, and the row has none
    source_tokens = facts.get("n_source_tokens")
    return {
        "mode": case.mode,
        "budget": case.budget,
        "budget_bytes": budget_bytes(case.budget) if case.budget else None,
        "cap": worst.cap,
        "cap_bytes": worst.cap_bytes,
        "cap_reason": worst.cap_reason,
        "read_ahead_kb": made[0].read_ahead_kb,
        "cache": _cache(made, common),
        "cached_bytes": None if None in cached else max(value for value in cached if value is not None),
        "tokens": common.tokens.partition(":")[0],
        "tokens_repeat": None if source_tokens is None else source_tokens < case.shape.n_tokens,
        "policy": facts.get("policy"),
        "look_ahead": facts.get("look_ahead"),
        "io": facts.get("io"),
        "n_readers": facts.get("n_readers"),
        "piece_bytes": facts.get("piece_bytes"),
        "profile": facts.get("profile"),
        "arena_bytes": facts.get("arena_bytes"),
        "gomp_spincount": facts.get("gomp_spincount"),
        "n_rounds": common.n_rounds,
        **common.machine,
    }


def _cache(made: Sequence[Run], common: Common) -> str:
    if common.is_warm:
        return "warm"
    if not all(run.is_cache_controlled for run in made):
        return "not controlled"
    return "cold, not verified" if any(run.cached_bytes is None for run in made) else "cold"


def _speed(samples: Sequence[Sample], own: Sequence[Run]) -> dict[str, Any]:
    ts = [sample.ts for sample in samples]
    first = [run.prompt.ns / 1e9 if run.prompt else run.token_ns[0] / 1e9
             for run in own if run.prompt or run.token_ns]
    return {
        "median_ts": median(ts),
        "min_ts": min(ts, default=None),
        "max_ts": max(ts, default=None),
        "load_s": median([run.facts["load_s"] for run in own if "load_s" in run.facts]),
        "usable_s": median([run.facts["usable_s"] for run in own if "usable_s" in run.facts]),
        "first_token_s": median(first),
    }


def _work(name: PhaseName, samples: Sequence[Sample], own: Sequence[Run], common: Common) -> dict[str, Any]:
    def middle(of: Callable[[PhaseResult], float | None]) -> float | None:
        return median([value for sample in samples if (value := of(sample.phase)) is not None])

    waiting, device = middle(_stall_bytes_per_s), common.device_bytes_per_s
    return {
        "hit_rate": _hit_rate(name, [sample.phase for sample in samples]),
        "read_bytes_per_token": middle(lambda phase: _ratio(phase.bytes_read, phase.n_tokens)),
        "wasted_bytes_per_token": middle(lambda phase: _ratio(phase.bytes_wasted, phase.n_tokens)),
        "foreseen_per_miss": middle(lambda phase: _ratio(phase.foreseen, phase.misses or 1)),
        "in_vain_per_miss": middle(lambda phase: _ratio(phase.in_vain, phase.misses or 1)),
        "io_bytes_per_token": middle(lambda phase: _ratio(phase.io_bytes, phase.n_tokens)),
        "stall_share": middle(lambda phase: _ratio(phase.stall_ns, phase.ns)),
        "stall_bytes_per_s": waiting,
        "stall_vs_device": waiting / device if waiting is not None and device else None,
        "left_alone": _most([sample.phase.left_alone for sample in samples]),
        "major_faults": middle(lambda phase: phase.major_faults),
        "user_s": middle(lambda phase: phase.user_s),
        "system_s": middle(lambda phase: phase.system_s),
        "cpu_s_per_token": middle(lambda phase: (phase.user_s + phase.system_s) / phase.n_tokens),
        "peak_rss_bytes": _most([run.facts.get("peak_rss_bytes") for run in own]),
        "cap_peak_bytes": _most([run.cap_peak_bytes for run in own]),
    }


def _sequences(case: Case, name: PhaseName, samples: Sequence[Sample], row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what tells of several sequences: all other figures are of all of them together."""
    n_parallel, speed = case.shape.n_parallel, row["median_ts"]
    unions = [union for sample in samples if (union := _union(sample, n_parallel)) is not None] if name == "gen" else []
    return {"n_parallel": n_parallel, "sequence_ts": _ratio(speed, n_parallel), "expert_union": median(unions)}


def _union(sample: Sample, n_parallel: int) -> float | None:
    """Return the experts that a step wants, each once, over those that one token wants; None where nobody has counted them."""
    phase, of_one = sample.phase, sample.run.facts.get("experts_per_token")
    if phase.hits is None or phase.misses is None or not of_one:
        return None
    return (phase.hits + phase.misses) / (phase.n_tokens / n_parallel) / int(of_one)


def _stall_bytes_per_s(phase: PhaseResult) -> float | None:
    """Return the bandwidth while computing waited for reads; None where it hardly waited."""
    if phase.stall_bytes is None or phase.stall_ns is None or phase.stall_ns < LEAST_STALL_NS:
        return None
    return phase.stall_bytes / phase.stall_ns * 1e9


def _hit_rate(name: PhaseName, phases: Sequence[PhaseResult]) -> float | None:
    """Return the share of the experts wanted that need not be read.

    A prompt's counts by bytes: an expert that was read ahead is found in its slot, but read all the same.
    """
    if name == "prompt":
        wanted = sum(phase.expert_bytes or 0 for phase in phases if phase.bytes_read is not None)
        read = sum(phase.bytes_read or 0 for phase in phases)
        return max(0.0, 1 - read / wanted) if wanted else None
    hits = sum(phase.hits or 0 for phase in phases)
    wanted = hits + sum(phase.misses or 0 for phase in phases)
    return hits / wanted if wanted else None


def _ratio(value: float | None, of: float) -> float | None:
    return None if value is None else value / of


def _most(values: Sequence[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)


# ---- the limit ------------------------------------------------------------------------------------------------------

def _limit(case: Case, name: PhaseName, samples: Sequence[Sample], runs: Sequence[Run],
           common: Common) -> dict[str, Any]:
    """Return the speed that computing with all weights in RAM, plus reading the missed bytes, would allow.

    Computing counts with the least time that was seen, for a limit is a bound: the resident model's, with the same
    kernels, or this case's own outside of its stalls. Reading counts with the device's best bandwidth.
    """
    none = {"device_bytes_per_s": common.device_bytes_per_s, "stream_bytes_per_s": common.stream_bytes_per_s,
            "limit_ts": None, "limit_compute": None, "efficiency": None}
    if case.mode == "resident":
        return none
    compute: list[tuple[float, str]] = [
        (sample.ns_per_token, "resident") for other in {run.case for run in runs}
        if other.mode == "resident" and not other.is_repacked and other.shape == case.shape
        for sample in samples_of(runs, other, name)]
    compute += [((sample.phase.ns - sample.phase.stall_ns) / sample.phase.n_tokens, "own") for sample in samples
                if sample.phase.stall_ns is not None]
    bandwidth = common.device_bytes_per_s
    limits = []
    for sample in samples:
        counted = sample.phase.bytes_read if sample.run.facts.get("io") == "direct" else None
        n_bytes = sample.phase.io_bytes if counted is None else counted
        if not compute or n_bytes is None or (n_bytes and not bandwidth):
            return none
        reading_ns = n_bytes / sample.phase.n_tokens / bandwidth * 1e9 if bandwidth else 0.0
        limits.append(min(compute)[0] + reading_ns)
    if not limits:
        return none
    efficiencies = [limit / sample.ns_per_token for limit, sample in zip(limits, samples, strict=True)]
    return none | {"limit_ts": 1e9 / statistics.median(limits), "limit_compute": min(compute)[1],
                   "efficiency": statistics.median(efficiencies)}


# ---- energy ---------------------------------------------------------------------------------------------------------

def _energy(name: PhaseName, samples: Sequence[Sample], runs: Sequence[Run], common: Common) -> dict[str, Any]:
    """Return the energy of all runs of a row together: joules over tokens, not a mean of ratios."""
    phases = [sample.phase for sample in samples]
    if not phases:
        return Energy("none", energy_reason="no run came so far").as_json()
    n_tokens = sum(phase.n_tokens for phase in phases)
    usage = Usage(
        seconds=sum(phase.ns for phase in phases) / 1e9,
        cpu_s=sum(phase.user_s + phase.system_s for phase in phases),
        bytes_read=_sum([phase.bytes_read if phase.io_bytes is None else phase.io_bytes for phase in phases]),
        resident_bytes=max(phase.resident_bytes for phase in phases),
        ram_read_bytes=_sum([_ram_read_bytes(sample, name, runs) for sample in samples]),
    )
    counted = {"n_prompt_tokens": n_tokens} if name == "prompt" else {"n_tokens": n_tokens}
    return energy_of([phase.reading for phase in phases], common.idle_w, usage=usage, constants=common.constants,
                     **counted).as_json()


def _sum(values: Sequence[int | None]) -> int | None:
    return None if None in values else sum(value for value in values if value is not None)


def _ram_read_bytes(sample: Sample, name: PhaseName, runs: Sequence[Run]) -> int | None:
    """Return what computing read from RAM; where nobody counted the experts, as ours did with the same batches."""
    if sample.phase.ram_read_bytes is not None:
        return sample.phase.ram_read_bytes
    for run in runs:
        phase = run.prompt if name == "prompt" else run.gen
        if (phase is not None and phase.ram_read_bytes is not None and run.turn == sample.run.turn
                and run.case.shape == sample.run.case.shape
                and run.facts.get("n_ubatch") == sample.run.facts.get("n_ubatch")):
            return phase.ram_read_bytes
    return None


# ---- what a row is worth --------------------------------------------------------------------------------------------

def _status(case: Case, name: PhaseName, own: Sequence[Run], samples: Sequence[Sample], row: Mapping[str, Any],
            known: Disturbed, common: Common) -> tuple[str, str | None]:
    """Return "ok", or why a row is not what it seems: "invalid", "timeout", "failed", "interrupted", "disturbed".

    A run that went wrong later than this phase has no part in it, unless no phase follows.
    """
    invalid = _invalid(name, own, samples, row)
    if invalid is not None:
        return "invalid", invalid
    is_last = name == "gen" or not case.shape.n_gen
    reached = {id(sample.run) for sample in samples}
    wrong = [run for run in own if run.status != "ok" and (is_last or id(run) not in reached)]
    if wrong:
        n_right = len(own) - len(wrong)
        others = f"; {n_right} of {len(own)} runs came to their end" if n_right else ""
        return wrong[0].status, f"{wrong[0].reason}{others}"
    if len(own) < common.n_rounds:
        return "interrupted", f"{len(own)} of {common.n_rounds} rounds"
    disturbed = known.get((case, name)) or comparisons.unsteady(row)
    return ("ok", None) if disturbed is None else ("disturbed", disturbed)


def _invalid(name: PhaseName, own: Sequence[Run], samples: Sequence[Sample], row: Mapping[str, Any]) -> str | None:
    not_paged = next((run.facts["not_paged_reason"] for run in own if run.facts.get("not_paged_reason")), None)
    if not_paged is not None:
        return f"it was not paged: {not_paged}"
    if row["same_logits"] is False:
        return "its logits differ from those of stock llama.cpp: please report this"
    read, wanted = _sum([sample.phase.bytes_read for sample in samples]), _sum([sample.phase.expert_bytes for sample in samples])
    told = _sum([sample.phase.io_bytes for sample in samples])
    if row["io"] == "direct" and read and told is not None and read > MOST_OF_TOLD * told + IN_FLIGHT_BYTES * len(samples):
        return f"it counted {read:,} bytes of reads where the system counted {told:,}: please report this"
    if name == "gen" and read and wanted and read > MOST_OF_WANTED * wanted:
        return f"it read {read / wanted:.2f} times the bytes of the experts it wanted: they were counted twice"
    if row["cache"] == "cold" and row["cached_bytes"] > COLD_BYTES:
        return (f"{row['cached_bytes']:,} bytes of the file stayed in the page cache: another process uses it, or its file "
                "system keeps it")
    return None


MOST_OF_TOLD = 1.02
"""Times the bytes that the system has counted (/proc/self/io). What arrived during waits, over their time, tells nothing of that kind: waits
of half a millisecond begin when pieces of a megabyte are on their way, which count in full when they arrive."""

IN_FLIGHT_BYTES = 64 << 20
"""The system counts a read when it begins, we when it ends: at a phase's start so much may be on its way, in layers read ahead."""

MOST_OF_WANTED = 1.5
"""Times the bytes of all experts that single tokens wanted: nothing missed takes more, nor does what is read in vain."""

LEAST_STALL_NS = 20_000_000
"""Of a phase: of less, the pieces that were on their way when a stall began or ended would be most."""

COLD_BYTES = 64 << 20
"""Of the file in the page cache do not matter: the header and what others look at."""
