"""One phase of one run that came to its end: what rows are computed from, and compared by."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gguf_pager.bench.cases import Case
from gguf_pager.bench.runner import Run
from gguf_pager.bench.worker import PhaseResult

PhaseName = Literal["prompt", "gen"]


@dataclass(frozen=True, slots=True)
class Sample:
    """A phase, and the run that it was a part of."""

    run: Run
    phase: PhaseResult

    @property
    def ts(self) -> float:
        """Tokens per second."""
        return self.phase.n_tokens / self.phase.ns * 1e9

    @property
    def ns_per_token(self) -> float:
        """The time of a token."""
        return self.phase.ns / self.phase.n_tokens


def samples_of(runs: Sequence[Run], case: Case, name: PhaseName) -> list[Sample]:
    """Return the samples of one case and phase, in the order of the rounds."""
    return [Sample(run, phase) for run in runs
            if run.case == case and (phase := run.prompt if name == "prompt" else run.gen) is not None]


def paired(ours: Sequence[Sample], others: Sequence[Sample]) -> list[float]:
    """Return the ratios of speeds within each round: the machine changes from round to round."""
    theirs = {sample.run.turn: sample.ts for sample in others}
    return [sample.ts / theirs[sample.run.turn] for sample in ours if sample.run.turn in theirs]


def median(values: Sequence[float]) -> float | None:
    """Return the median; None of nothing."""
    return statistics.median(values) if values else None
