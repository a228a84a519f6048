"""Other programs on our processors: noticed by what the system counts, answered with fewer threads for a token."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil

from gguf_pager.pace import Look, Pace
from gguf_pager.pager import Pager

log = logging.getLogger("gguf_pager")

_LOOK_S = 0.2
"""How often to look: 20 of the ticks in which Linux counts what processors do."""

_LOOK_SHARE = 500
"""A look takes at most this part of the time until the next one: with many threads it takes longer."""

_PAUSE_S = 0.1
"""A pause between two tokens from which on what was counted before is of no interest."""

_TASKS, _STAT = "/proc/self/task", "/proc/stat"

FLASH_ATTENTION_DISABLED = 0
"""LLAMA_FLASH_ATTN_TYPE_DISABLED in llama.h."""

_IDLE, _IOWAIT, _N_FIELDS = 3, 4, 8
"""In a line of /proc/stat, see proc(5); of its fields those after the eighth are counted in others already."""


def depends_on_threads(params: Any) -> bool:
    """Return whether a token's bits depend on the number of threads, in a context of these llama_context_params.

    With flash attention they do, from 512 positions on: every thread takes its share of the positions, and then the
    shares are added up (`use_split_kv_path` in ggml-cpu/ops.cpp).
    """
    return int(params.flash_attn_type) != FLASH_ATTENTION_DISABLED


class Counts:
    """What the system has counted up to now: how long threads of ours have waited, and what our processors did."""

    def __init__(self) -> None:
        self.at_s, self.own_s = time.monotonic(), time.process_time()
        self.waited_ns = _waited_ns()
        self.processors = _processors()

    def since(self, before: Counts) -> Look:
        """Return what happened since `before`."""
        wall_s = self.at_s - before.at_s
        if wall_s <= 0:
            return Look()
        waited = None
        if self.waited_ns is not None and before.waited_ns is not None:  # a new thread has counted from 0
            waited = sum(ns - before.waited_ns.get(task, 0) for task, ns in self.waited_ns.items()) / 1e9 / wall_s
        if self.processors is None or before.processors is None or self.processors.keys() != before.processors.keys():
            return Look(waited)
        idle = busy = 0.0
        for number, (idle_now, all_now) in self.processors.items():
            idle_then, all_then = before.processors[number]
            if all_now > all_then:
                share = (idle_now - idle_then) / (all_now - all_then)
                idle, busy = idle + share, busy + 1 - share
        others = max(0.0, busy - (self.own_s - before.own_s) / wall_s)
        return Look(waited, idle, others, len(self.processors))


def _waited_ns() -> dict[str, int] | None:
    """Return for how long each thread was ready to run and did not; None where the system does not say."""
    waited, ran_ns = {}, 0
    try:
        for task in os.listdir(_TASKS):
            try:
                with open(f"{_TASKS}/{task}/schedstat", "rb", buffering=0) as file:
                    ran, waited[task] = map(int, file.read(96).split()[:2])
                    ran_ns += ran
            except (ProcessLookupError, FileNotFoundError):
                if task == str(os.getpid()):
                    return None  # no thread has it
                continue  # this one has ended
    except (OSError, ValueError):
        return None
    return waited if ran_ns else None  # a kernel that does not count says 0


def _processors() -> dict[int, tuple[float, float]] | None:
    """Return for how long each processor that we may use was idle, and was there; None where nobody says."""
    try:
        if sys.platform != "linux":
            return {number: (times.idle, sum(times)) for number, times in enumerate(psutil.cpu_times(percpu=True))}
        usable, processors = os.sched_getaffinity(0), dict[int, tuple[float, float]]()
        with open(_STAT, "rb") as file:
            for line in file:
                name, *fields = line.split()
                if not name.startswith(b"cpu"):
                    break
                if name != b"cpu" and (number := int(name[3:])) in usable:  # "cpu" is the sum of all
                    ticks = [int(field) for field in fields[:_N_FIELDS]]
                    processors[number] = (ticks[_IDLE] + ticks[_IOWAIT], sum(ticks))
        return processors or None
    except (OSError, ValueError, IndexError):
        return None


class Adaptation:
    """Computes single tokens with fewer threads where that is faster. Between them a context has what its user has set.

    `read_threads` and `set_threads` are the context's.
    """

    def __init__(self, pager: Pager, read_threads: Callable[[], int], set_threads: Callable[[int], None]) -> None:
        self.pace = Pace()
        self._pager, self._read_threads, self._set_threads = pager, read_threads, set_threads
        self._lowered: tuple[int, int] | None = None
        """What the user has set and what the context has instead, while it has."""
        self._counts: Counts | None = None
        self._wait_s = _LOOK_S
        self._ended_s = 0.0

    def compute(self, compute: Callable[[], int]) -> int:
        """Return what `compute` returns, which computes a token: 0, or why it did not."""
        self._restore()
        ceiling = self._read_threads()
        if ceiling < 2:
            return compute()
        self.pace.limit(ceiling)
        n_threads = self.pace.n_threads
        stalled_ns = self._pager.stall_ns() if self.pace.wants_times else None
        begun_s = time.monotonic()
        if begun_s - self._ended_s > _PAUSE_S:
            self._counts = None
        try:
            if n_threads != ceiling:
                self._lowered = ceiling, n_threads
                self._set_threads(n_threads)
            result = compute()
        finally:
            self._ended_s = time.monotonic()
            self._restore()
        self._pager.n_threads = n_threads
        if result == 0:
            if stalled_ns is not None:
                self.pace.note(self._ended_s - begun_s - (self._pager.stall_ns() - stalled_ns) / 1e9)
            self._look(n_threads)
        return result

    def _restore(self) -> None:
        """Give the context its user's threads; a Ctrl-C may have come in between the last time."""
        if self._lowered is not None:
            ceiling, n_threads = self._lowered
            if self._read_threads() == n_threads:  # else another thread has set them meanwhile
                self._set_threads(ceiling)
            self._lowered = None

    def _look(self, n_threads: int) -> None:
        """Compare what the system counts with the last look, if that is old enough and about this number of threads."""
        if self._counts is None or self.pace.n_threads != n_threads:
            if self.pace.n_threads != n_threads:
                log.debug("%d threads compute, after %d", self.pace.n_threads, n_threads)
            self._count()
        elif self._ended_s - self._counts.at_s >= self._wait_s:
            before = self._counts
            self.pace.heed(self._count().since(before))

    def _count(self) -> Counts:
        begun_s = time.monotonic()
        self._counts = Counts()
        self._wait_s = max(_LOOK_S, (time.monotonic() - begun_s) * _LOOK_SHARE)
        return self._counts
