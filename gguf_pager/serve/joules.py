"""What serving takes: joules since the start, by the machine's own counter where there is one, else by the model."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from gguf_pager.energy import meter
from gguf_pager.energy.model import Usage, estimate
from gguf_pager.energy.source import Absent, NoReading, Source
from gguf_pager.memory import probe

LEAST_PERIOD_S = 1.0
"""A gauge of watts is read so often at most while a server runs: each reading may be a transfer on a slow bus."""

Status = Literal["measured", "partial", "modelled", "none"]


@dataclass(frozen=True, slots=True)
class Drawn:
    """Joules since the start, idle time included; None with a reason. Bounds are the model's only."""

    status: Status
    method: str | None = None
    scope: str | None = None
    joules: float | None = None
    low_j: float | None = None
    high_j: float | None = None
    reason: str | None = None


class Joules:
    """Counts what is drawn from now on. A counter is read every few seconds, and whenever somebody asks; the model only then."""

    def __init__(self, bytes_read: Callable[[], int | None], found: Sequence[meter.Found] | None = None) -> None:
        """Choose of `found`, by default of all there is; `bytes_read` tells what was read from storage since the start."""
        self._bytes_read = bytes_read
        self._lock = threading.Lock()
        self._source: Source | None = None
        self._reason = ""
        self._failure: str | None = None
        self._earlier_j = 0.0
        self._began_s = self._looked_s = time.monotonic()
        self._began_cpu_s = time.process_time()
        self._resident_bytes = probe.process_memory().resident_bytes
        self._byte_seconds = 0.0
        found = meter.find_all() if found is None else found
        chosen = meter.choose(found)
        for source in found:
            if not isinstance(source, Absent) and source is not chosen:
                source.close()
        if isinstance(chosen, Absent):
            self._reason = chosen.reason
        else:
            self._begin(chosen)

    def _begin(self, source: Source) -> None:
        self._source = source
        try:
            source.begin()
        except NoReading as error:
            self._failure = str(error)
        done = threading.Event()
        self._end = weakref.finalize(self, _end, done, source)
        threading.Thread(target=_watch, args=(weakref.ref(self), done, max(source.period_s, LEAST_PERIOD_S)),
                         name="gguf_pager-joules", daemon=True).start()

    def now(self) -> Drawn:
        """Return what was drawn until now."""
        with self._lock:
            if self._source is not None:
                self._poll(self._source)
                drawn = self._measured(self._source)
                if drawn is not None:
                    return drawn
            return self._modelled()

    def poll(self) -> None:
        """Read the counter, if there is one."""
        with self._lock:
            if self._source is not None:
                self._poll(self._source)

    def _poll(self, source: Source) -> None:
        """Let the source count on; one that has failed begins anew, and what it had counted before is kept."""
        counted_j = source.joules
        try:
            if self._failure is None:
                source.poll()
            else:
                source.begin()
                self._failure = None
        except NoReading as error:
            if self._failure is None:
                self._earlier_j += counted_j
            self._failure = str(error)

    def _measured(self, source: Source) -> Drawn | None:
        """Return what the source says; None, and give it up, where it stands still."""
        about = source.name, source.scope
        if self._failure is not None:
            return Drawn("none", *about, reason=self._failure)
        try:
            joules = self._earlier_j + (source.joules if self._earlier_j else meter.joules_since_begin(source))
        except NoReading as error:
            if source.polled_s - source.begun_s < source.least_s:
                return Drawn("none", *about, reason=str(error))
            self._reason, self._source = str(error), None
            self._end()
            return None
        return Drawn("measured" if source.covers == "machine" else "partial", *about, joules)

    def _modelled(self) -> Drawn:
        now_s, resident_bytes = time.monotonic(), probe.process_memory().resident_bytes
        self._byte_seconds += (self._resident_bytes + resident_bytes) / 2 * (now_s - self._looked_s)
        self._looked_s, self._resident_bytes = now_s, resident_bytes
        seconds, bytes_read = now_s - self._began_s, self._bytes_read()
        usage = Usage(seconds, time.process_time() - self._began_cpu_s, bytes_read,
                      round(self._byte_seconds / seconds) if seconds else resident_bytes)
        result = estimate(usage)
        left_out = "reads of RAM are not in it" if bytes_read is not None else "reads of RAM and of storage are not in it"
        return Drawn("modelled", "model", meter.MODEL_SCOPE, result.value_j, result.low_j, result.high_j,
                     f"not measured: {self._reason}; {left_out}")


def _watch(joules: weakref.ref[Joules], done: threading.Event, period_s: float) -> None:
    while not done.wait(period_s):
        found = joules()
        if found is None:
            return
        found.poll()
        del found


def _end(done: threading.Event, source: Source) -> None:
    done.set()
    source.close()
