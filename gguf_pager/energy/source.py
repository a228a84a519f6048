"""What every source of joules looks like: a counter that is subtracted, or a gauge of watts summed over time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from gguf_pager import kernel

Covers = Literal["machine", "part"]
"""Whether a source sees all that the machine draws, or a part such as the processor."""

MOST_W = 5_000.0
"""More than one counter of one machine can tell: a larger step is a counter that was reset, not one that wrapped."""


class NoReading(Exception):
    """A source cannot say how much was used; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Absent:
    """A source this machine does not have, or does not let this user read."""

    name: str
    reason: str


class Source(Protocol):
    """Joules since `begin`. Reading raises NoReading; afterwards the interval is lost, the source is not."""

    name: str
    scope: str
    covers: Covers
    period_s: float
    """Poll at least this often: a counter must not wrap twice between two polls, a gauge not change unseen."""
    least_s: float
    """Shorter intervals say nothing, because the source is renewed too rarely."""
    joules: float
    begun_s: float
    polled_s: float

    def begin(self) -> None:
        """Start an interval, forgetting the last one."""

    def poll(self) -> None:
        """Add what was used since the last poll."""

    def close(self) -> None:
        """Give back what is open; harmless when repeated."""


@dataclass(frozen=True, slots=True)
class Counter:
    """A number of joules that only grows, until it wraps at `range_j`; None where it never does."""

    name: str
    read_j: Callable[[], float]
    range_j: float | None
    close: Callable[[], None] = lambda: None


class CounterSource:
    """The sum of counters, each subtracted on its own since each wraps on its own."""

    def __init__(self, name: str, scope: str, covers: Covers, counters: Sequence[Counter], *, period_s: float = 5.0,
                 least_s: float = 0.05, clock: Callable[[], float] = time.monotonic) -> None:
        self.name, self.scope, self.covers = name, scope, covers
        self.period_s, self.least_s = period_s, least_s
        self.counters = tuple(counters)
        self.joules = self.begun_s = self.polled_s = 0.0
        self._clock = clock
        self._last_j: list[float] = []

    def begin(self) -> None:
        """Note where the counters stand."""
        self._last_j = [counter.read_j() for counter in self.counters]
        self.begun_s = self.polled_s = self._clock()
        self.joules = 0.0

    def poll(self) -> None:
        """Add what the counters have moved, at most one wrap each."""
        now_j = [counter.read_j() for counter in self.counters]
        now_s = self._clock()
        for counter, before_j, after_j in zip(self.counters, self._last_j, now_j, strict=True):
            self.joules += _step_j(counter, before_j, after_j, now_s - self.polled_s)
        self._last_j, self.polled_s = now_j, now_s

    def close(self) -> None:
        """Close what the counters hold open."""
        for counter in self.counters:
            counter.close()


def _step_j(counter: Counter, before_j: float, after_j: float, seconds: float) -> float:
    step_j = after_j - before_j
    if step_j >= 0:
        return step_j
    if counter.range_j is None:
        raise NoReading(f"{counter.name} went backwards")
    step_j += counter.range_j
    if step_j < 0 or step_j > MOST_W * max(seconds, 0.1):
        raise NoReading(f"{counter.name} was reset while it was read")
    return step_j


class GaugeSource:
    """Watts, read now and then; between two readings they are taken to change evenly."""

    def __init__(self, name: str, scope: str, covers: Covers, read_w: Callable[[], float], *, period_s: float = 0.5,
                 least_s: float = 0.5, clock: Callable[[], float] = time.monotonic) -> None:
        self.name, self.scope, self.covers = name, scope, covers
        self.period_s, self.least_s = period_s, least_s
        self.joules = self.begun_s = self.polled_s = 0.0
        self._read_w, self._clock = read_w, clock
        self._last_w = 0.0

    def begin(self) -> None:
        """Take the first sample."""
        self._last_w = self._read_w()
        self.begun_s = self.polled_s = self._clock()
        self.joules = 0.0

    def poll(self) -> None:
        """Take a sample and add the trapezoid before it."""
        now_w = self._read_w()
        now_s = self._clock()
        self.joules += (self._last_w + now_w) / 2 * (now_s - self.polled_s)
        self._last_w, self.polled_s = now_w, now_s

    def close(self) -> None:
        """Nothing is held open."""


def read_text(path: Path) -> str:
    """Return a small file's text without the newline; raises NoReading with what the system said."""
    try:
        return kernel.read_text(path)
    except OSError as error:
        raise NoReading(f"{path}: {error.strerror}") from None


def read_int(path: Path) -> int:
    """Return a small file's number; raises NoReading."""
    text = read_text(path)
    try:
        return int(text)
    except ValueError:
        raise NoReading(f"{path}: not a number: {text[:40]!r}") from None


def children(folder: Path, pattern: str) -> list[Path]:
    """Return what matches in a folder, sorted; nothing if there is no such folder or it may not be listed."""
    try:
        return sorted(folder.glob(pattern))
    except OSError:
        return []
