"""What a page shows beyond the rows: the tokens of one run one by one, and the use of every expert."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from gguf_pager.bench import comparisons
from gguf_pager.bench.cases import Case
from gguf_pager.bench.runner import Run, label


def timelines(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return per case the decode times of its run of median speed, in ns per step of one token of each sequence, and what of them
    was stalled."""
    known = comparisons.disturbed(runs)
    return [{"label": label(run), "mode": case.mode, "n_parallel": case.shape.n_parallel,
             "is_disturbed": (case, "gen") in known, "token_ns": run.token_ns,
             "token_stall_ns": run.token_stall_ns if case.mode == "paged" else None}
            for case, run in _middle_runs(runs)]


def heat(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return per case of ours how often each expert was chosen in that run, and which were in slots at its end."""
    return [{"label": case.label, "layers": run.layers} for case, run in _middle_runs(runs) if run.layers is not None]


def _middle_runs(runs: Sequence[Run]) -> Iterable[tuple[Case, Run]]:
    for case in dict.fromkeys(run.case for run in runs):
        done = [run for run in runs if run.case == case and run.token_ns]
        if done:
            middle_ns = statistics.median_low(sum(run.token_ns) for run in done)
            yield case, next(run for run in done if sum(run.token_ns) == middle_ns)
