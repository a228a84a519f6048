"""With how many threads to compute the next token, while others take processors: decided from times alone.

ggml's threads wait for each other at every operation. One that shares its processor with another program keeps all of
them waiting, so that fewer threads, each with a processor of its own, are often faster, and sometimes they are not: hence
a number is tried for a few tokens, and kept where it is faster. Results do not depend on it, with the exception that
`contention.depends_on_threads` knows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

CONTENDED = 0.2
"""Threads of ours that are ready to run and do not, on average, from which on fewer are tried. Two threads on two quiet
processors: 0.01 to 0.03; beside one program that spins: 0.8 (benchmarks/LOG.md)."""

ROOM = 0.75
"""Processors that nobody uses, on average, from which on one thread more is tried."""

_OTHERS, _IDLE = 0.5, 0.5
"""Where the system does not say how long threads wait: fewer are tried while others use more processors than the first,
and fewer than the second are idle."""

_GAIN = 0.92
"""The share of its time that a token may take at most with another number of threads, for that number to be kept."""

_N_BASELINE, _N_TRIAL, _N_KEPT = 3, 4, 8
"""Tokens timed before a trial, during one, and remembered."""

_HOPELESS_AT_ONCE, _HOPELESS = 1.5, 1.2
"""How much longer a trial's first token, or its first tokens on average, may take before it is broken off."""

_FIRST_GAP, _LONGEST_GAP = 8, 256
"""Tokens from a trial in vain to the next: doubled each time."""

_NEAR_GAP = 4
"""Tokens until still fewer are tried: all wait for a single thread that shares its processor, so that one fewer may be of
no use where two are."""

_GAP_WITHOUT_ROOM, _LONGEST_WITHOUT_ROOM = 256, 1024
"""Likewise, from fewer threads to more, while the system says that there is no room: it may be wrong."""

_GAP_UNTOLD, _LONGEST_UNTOLD = 32, 512
"""Likewise, where the system does not say."""

_WORSE = 1.3
"""How much longer than when their number was chosen tokens take, from which on more threads are tried again."""

_CALM_LOOKS = 16
"""Looks without contention after which trials in vain are forgotten."""


@dataclass(frozen=True, slots=True)
class Look:
    """What the system says about the last moments. Averages over their time, in processors; None: it does not say.

    `waited`: threads of ours that were ready and did not run; `idle`: processors that nobody used; `others`: those that
    other programs used; `n_processors`: those that we may use.
    """

    waited: float | None = None
    idle: float | None = None
    others: float | None = None
    n_processors: int | None = None


@dataclass(slots=True)
class _Trial:
    """Another number of threads, being timed. `before_s` is a token's time without it; `has_room`: the system says so."""

    n_threads: int
    before_s: float
    has_room: bool
    times_s: list[float] = field(default_factory=list)


def _typical(times_s: Iterable[float]) -> float:
    """Return the mean without the longest: a suspended machine is no news about threads."""
    ordered = sorted(times_s)
    kept = ordered[:-1] if len(ordered) > 2 else ordered
    return sum(kept) / len(kept)


def _is_contended(look: Look) -> bool:
    if look.waited is not None:
        return look.waited >= CONTENDED
    return look.others is not None and look.idle is not None and look.others > _OTHERS and look.idle < _IDLE


class Pace:
    """Decides. It is given the user's number of threads, tokens' times and looks, and answers with `n_threads`."""

    def __init__(self) -> None:
        self._ceiling = self._n = 1
        self._forget()

    def _forget(self) -> None:
        self._trial: _Trial | None = None
        self._is_contended = self._has_room = False
        self._times_s: deque[float] = deque(maxlen=_N_KEPT)
        self._look = Look()
        self._further = 0
        self._n_calm = 0
        self._since_fewer = self._since_more = 0
        self._gap_fewer = 0
        self._gap_more = self._gap_with_room = 0
        self._kept_s = float("inf")

    @property
    def n_threads(self) -> int:
        """The number of threads for the next token."""
        return self._trial.n_threads if self._trial else self._n

    @property
    def wants_times(self) -> bool:
        """Whether tokens' times are of use now; on a quiet machine they are not."""
        return self._n < self._ceiling or self._is_contended or self._trial is not None

    def limit(self, n_threads: int) -> None:
        """Take what the user has set, and start from it if it is new."""
        if n_threads != self._ceiling:
            self._ceiling = self._n = n_threads
            self._forget()

    def heed(self, look: Look) -> None:
        """Take note of what the system says about the tokens since the look before; none of them of a trial."""
        if self._trial is not None:
            return
        self._look = look
        self._has_room = look.idle is not None and look.idle >= ROOM
        self._set_contended(_is_contended(look))

    def _set_contended(self, is_contended: bool) -> None:
        if is_contended and not self._is_contended:
            self._times_s.clear()  # those of a quiet machine
        self._is_contended = is_contended
        self._n_calm = 0 if is_contended else self._n_calm + 1
        if self._n_calm == _CALM_LOOKS and self._n == self._ceiling:
            self._gap_fewer = 0

    def note(self, compute_s: float) -> None:
        """Take note of a token's time, without what it waited for reads, and decide about the next one."""
        if compute_s <= 0:  # a clock that was set
            return
        if self._trial is not None:
            self._judge(self._trial, compute_s)
            return
        self._times_s.append(compute_s)
        self._since_fewer += 1
        self._since_more += 1
        if len(self._times_s) < _N_BASELINE:
            return
        gap_fewer = _NEAR_GAP if self._further else self._gap_fewer
        if self._is_contended and self._n > 1 and self._since_fewer >= gap_fewer:
            self._try(self._fewer(), has_room=False)
        elif self._n < self._ceiling:
            now_s = _typical(self._times_s)
            if len(self._times_s) == _N_KEPT and now_s > self._kept_s * _WORSE:
                self._kept_s, self._gap_more = now_s, _FIRST_GAP
            if self._has_room and self._since_more >= self._gap_with_room:
                self._try(self._more(), has_room=True)
            elif self._since_more >= self._gap_more:
                self._try(self._more(), has_room=False)

    def _fewer(self) -> int:
        """Return as many as others leave processors, or one fewer than now; less `_further`."""
        look, first = self._look, self._n - 1
        if look.others is not None and look.n_processors is not None:
            left = look.n_processors - int(look.others + 0.75)  # they get less than they want
            if 1 <= left < self._n:
                first = left
        return max(1, first - self._further)

    def _more(self) -> int:
        idle = int((self._look.idle or 0) + 1 - ROOM)
        return min(self._ceiling, self._n + max(idle, 1))

    def _try(self, n_threads: int, *, has_room: bool) -> None:
        self._trial = _Trial(n_threads, _typical(self._times_s), has_room)

    def _judge(self, trial: _Trial, compute_s: float) -> None:
        trial.times_s.append(compute_s)
        now_s, n = _typical(trial.times_s), len(trial.times_s)
        if n == _N_TRIAL and now_s <= trial.before_s * _GAIN:
            self._keep(trial)
        elif n == _N_TRIAL or now_s > trial.before_s * (_HOPELESS_AT_ONCE if n == 1 else _HOPELESS):
            self._drop(trial)

    def _keep(self, trial: _Trial) -> None:
        self._trial, self._n = None, trial.n_threads
        self._times_s.clear()
        self._times_s.extend(trial.times_s)
        self._is_contended = self._has_room = False  # until the next look, at this number
        self._n_calm = self._since_fewer = self._since_more = 0
        self._gap_fewer, self._gap_with_room = 0, 0
        self._gap_more = _GAP_UNTOLD if self._look.idle is None else _GAP_WITHOUT_ROOM
        self._kept_s = _typical(trial.times_s)
        self._further = 0

    def _drop(self, trial: _Trial) -> None:
        is_fewer = trial.n_threads < self._n
        self._trial = None
        if is_fewer:
            self._since_fewer = 0
            self._further = 2 * self._further or 1
            if self._fewer() * 2 < self._n or self._fewer() == trial.n_threads:  # that was all of it
                self._further, self._gap_fewer = 0, _longer(self._gap_fewer, _LONGEST_GAP)
            return
        self._since_more = 0
        self._gap_more = _longer(self._gap_more, _LONGEST_UNTOLD if self._look.idle is None else _LONGEST_WITHOUT_ROOM)
        if trial.has_room:
            self._gap_with_room = _longer(self._gap_with_room, _LONGEST_GAP)


def _longer(gap: int, longest: int) -> int:
    return min(max(2 * gap, _FIRST_GAP), longest)
