"""Measure an interval: find the sources, choose one, poll it while the work runs, say what came out and how.

    meter = Meter(choose(find_all()))
    meter.measure_idle(10)
    meter.start()
    ...                                  # the work
    energy = meter.stop(n_tokens=128)    # a phase: decode, or with n_prompt_tokens the prompt
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from gguf_pager.energy import apple, battery, command, hwmon, perf, rapl
from gguf_pager.energy.model import CONSTANTS, Constant, Usage, constants_json, estimate
from gguf_pager.energy.source import Absent, Covers, NoReading, Source

Found = Source | Absent

MODEL_SCOPE = "model: CPU time, file reads, resident RAM"


@dataclass(frozen=True, slots=True)
class Energy:
    """What an interval took. `energy_reason` says why something is None; bounds and constants are the model's only.

    `energy_net_j` is without what the machine draws idle. `j_per_token` and its kin are of generated tokens.
    """

    energy_status: Literal["measured", "partial", "modelled", "none"]
    energy_method: str | None = None
    energy_scope: str | None = None
    energy_total_j: float | None = None
    energy_idle_w: float | None = None
    energy_net_j: float | None = None
    j_per_token: float | None = None
    j_per_token_net: float | None = None
    j_per_prompt_token: float | None = None
    tokens_per_j: float | None = None
    avg_power_w: float | None = None
    energy_low_j: float | None = None
    energy_high_j: float | None = None
    energy_constants: dict[str, dict[str, Any]] | None = None
    energy_reason: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the fields by name, None where nothing is known."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, slots=True)
class Reading:
    """What a source said about one interval. `joules` is None with a reason where it said nothing."""

    joules: float | None
    seconds: float
    method: str | None
    scope: str | None
    covers: Covers | None
    reason: str | None

    def within(self, seconds: float) -> Reading:
        """Return the part of an interval of which only so much was the work: a slow source is read some time later."""
        if self.joules is None or self.seconds <= seconds:
            return self
        return replace(self, joules=self.joules * seconds / self.seconds, seconds=seconds)


@dataclass(frozen=True, slots=True)
class Live:
    """What one source showed while it was watched; `watts` are averages of equal parts of that time."""

    watts: tuple[float, ...]
    avg_power_w: float | None
    reason: str | None


def find_all(power_command: str | None = None, sysfs: Path = Path("/sys")) -> list[Found]:
    """Return every source there could be, best first: those that see the whole machine, then RAPL before perf.

    Close what is not used.
    """
    found: list[Found] = [
        command.find(power_command),
        battery.find(sysfs / "class/power_supply"),
        hwmon.find(sysfs / "class/hwmon"),
        rapl.find(sysfs / "class/powercap"),
        perf.find(sysfs / "bus/event_source/devices/power"),
        apple.find(),
    ]
    return sorted(found, key=lambda source: not isinstance(source, Absent) and source.covers == "part")


def choose(found: Sequence[Found], shortest_s: float | None = None) -> Found:
    """Return the first source that can tell of intervals this short, or an Absent with everybody's reason.

    Sources overlap, so none are added up.
    """
    reasons = []
    for source in found:
        if isinstance(source, Absent):
            reasons.append(f"{source.name}: {source.reason}")
        elif shortest_s is not None and source.least_s > shortest_s:
            reasons.append(f"{source.name}: needs {source.least_s:g} s or more")
        else:
            return source
    return Absent("none", "; ".join(reasons))


def joules_since_begin(source: Source) -> float:
    """Return what a source counted, once polled; raises NoReading where that says nothing."""
    seconds = source.polled_s - source.begun_s
    if seconds < source.least_s:
        raise NoReading(f"{source.name} needs {source.least_s:g} s or more, and this took {seconds:.2g} s")
    if source.joules <= 0:
        raise NoReading(f"{source.name} counted nothing: it stood still, as counters in virtual machines do")
    return source.joules


class Meter:
    """Measures one interval after the other with one source, polled by a thread of its own."""

    def __init__(self, source: Found, constants: Mapping[str, Constant] = CONSTANTS) -> None:
        self.source = source
        self.idle_w: float | None = None
        self._constants = constants
        self._reason: str | None = None
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def measure_idle(self, seconds: float, sleep: Callable[[float], None] = time.sleep) -> None:
        """Set `idle_w` to what the machine draws now, for that long; call it while nothing runs. `sleep` may raise."""
        if isinstance(self.source, Absent):
            return
        self.start()
        sleep(seconds)
        self.idle_w = self.stop().avg_power_w

    def start(self) -> None:
        """Begin an interval; what the source says against it is told by `stop`."""
        assert self._thread is None, "an interval is being measured"
        self._reason = None
        if isinstance(self.source, Absent):
            self._reason = self.source.reason
            return
        try:
            self.source.begin()
        except NoReading as error:
            self._reason = str(error)
            return
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(self.source, self._done), daemon=True)
        self._thread.start()

    def read(self) -> Reading:
        """End the interval and return what the source says about it."""
        if self._thread is not None:
            self._done.set()
            self._thread.join()
            self._thread = None
        if isinstance(self.source, Absent):
            return Reading(None, 0.0, None, None, None, self._reason or "no interval was begun")
        joules: float | None = None
        if self._reason is None:
            try:
                self.source.poll()
                joules = joules_since_begin(self.source)
            except NoReading as error:
                self._reason = str(error)
        return Reading(joules, self.source.polled_s - self.source.begun_s, self.source.name, self.source.scope,
                       self.source.covers, self._reason)

    def stop(self, *, n_tokens: int | None = None, n_prompt_tokens: int | None = None,
             usage: Usage | None = None) -> Energy:
        """End the interval and return its figures, see `energy_of`."""
        return energy_of([self.read()], self.idle_w, n_tokens=n_tokens, n_prompt_tokens=n_prompt_tokens, usage=usage,
                         constants=self._constants)

    def close(self) -> None:
        """Close the source."""
        if not isinstance(self.source, Absent):
            self.source.close()

    def _watch(self, source: Source, done: threading.Event) -> None:
        while not done.wait(source.period_s):
            try:
                source.poll()
            except NoReading as error:
                self._reason = str(error)  # read by stop, after this thread has ended
                return


def energy_of(readings: Sequence[Reading], idle_w: float | None, *, n_tokens: int | None = None,
              n_prompt_tokens: int | None = None, usage: Usage | None = None,
              constants: Mapping[str, Constant] = CONSTANTS) -> Energy:
    """Return the figures of intervals taken together, which generated tokens or computed tokens of a prompt, not both.

    With `usage`, that of all of them, the model answers where the source cannot tell of every one, and the reason says
    why it could not.
    """
    if n_tokens is not None and n_prompt_tokens is not None:
        raise ValueError("an interval is the prompt's or the generated tokens': measure them one after the other")
    joules = [reading.joules for reading in readings if reading.joules is not None]
    if readings and len(joules) == len(readings) and len({reading.method for reading in readings}) == 1:
        first = readings[0]
        status: Literal["measured", "partial"] = "measured" if first.covers == "machine" else "partial"
        return Energy(status, first.method, first.scope, **_figures(
            sum(joules), sum(reading.seconds for reading in readings), idle_w, n_tokens, n_prompt_tokens))
    reason = next((reading.reason for reading in readings if reading.joules is None), None) or (
        "the intervals were measured by different sources" if readings else "no interval was begun")
    if usage is None:
        return Energy("none", energy_reason=reason)
    return _modelled(usage, constants, reason, n_tokens, n_prompt_tokens)


def _modelled(usage: Usage, constants: Mapping[str, Constant], reason: str, n_tokens: int | None,
              n_prompt_tokens: int | None) -> Energy:
    result = estimate(usage, constants)
    figures = _figures(result.value_j, usage.seconds, None, n_tokens, n_prompt_tokens)
    reasons = [f"not measured: {reason}", figures.pop("energy_reason")]
    if usage.bytes_read is None:
        reasons.append("reads of storage are not known and not in it")
    if usage.ram_read_bytes is None:
        reasons.append("reads of RAM are not known and not in it")
    return Energy("modelled", "model", MODEL_SCOPE, energy_low_j=result.low_j, energy_high_j=result.high_j,
                  energy_constants=constants_json(constants),
                  energy_reason="; ".join(reason for reason in reasons if reason), **figures)


def _figures(joules: float, seconds: float, idle_w: float | None, n_tokens: int | None,
             n_prompt_tokens: int | None) -> dict[str, Any]:
    """Return the fields that follow from joules, gross and net, None without what they need."""
    reasons = []
    net_j = None if idle_w is None else joules - idle_w * seconds
    if net_j is None:
        reasons.append("no net figures: idle power was not measured")
    elif net_j < 0:
        net_j = None
        reasons.append("no net figures: the interval drew less than idle, which was then not idle")
    if n_tokens == 0 or n_prompt_tokens == 0:
        reasons.append("no figures per token: there was none")
    return {
        "energy_total_j": joules,
        "energy_idle_w": idle_w,
        "energy_net_j": net_j,
        "j_per_token": joules / n_tokens if n_tokens else None,
        "j_per_token_net": net_j / n_tokens if n_tokens and net_j is not None else None,
        "j_per_prompt_token": joules / n_prompt_tokens if n_prompt_tokens else None,
        "tokens_per_j": n_tokens / joules if n_tokens and joules else None,
        "avg_power_w": joules / seconds if seconds else None,
        "energy_reason": "; ".join(reasons) or None,
    }


def watch(sources: Sequence[Source], seconds: float, n_samples: int = 4,
          sleep: Callable[[float], None] = time.sleep) -> list[Live]:
    """Return what each source shows in that time, all of them watched at once."""
    watts: list[list[float]] = [[] for _ in sources]
    reasons: list[str | None] = [None] * len(sources)
    for step in range(n_samples + 1):
        if step:
            sleep(seconds / n_samples)
        for i, source in enumerate(sources):
            if reasons[i]:
                continue
            try:
                if step == 0:
                    source.begin()
                    continue
                joules, polled_s = source.joules, source.polled_s
                source.poll()
                if source.polled_s > polled_s:
                    watts[i].append((source.joules - joules) / (source.polled_s - polled_s))
            except NoReading as error:
                reasons[i] = str(error)
    return [_live(source, tuple(watts[i]), reasons[i]) for i, source in enumerate(sources)]


def _live(source: Source, watts: tuple[float, ...], reason: str | None) -> Live:
    if reason is not None:
        return Live((), None, reason)
    try:
        joules = joules_since_begin(source)
    except NoReading as error:
        return Live((), None, str(error))
    return Live(watts, joules / (source.polled_s - source.begun_s), None)
