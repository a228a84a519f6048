"""Runs the cases in turn, round by round, each run in a process of its own under the cap, and gathers what they tell."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from gguf_pager import probe
from gguf_pager.bench import disk
from gguf_pager.bench.cases import Case, Shape
from gguf_pager.bench.worker import PhaseResult, Task
from gguf_pager.cap import Cap, memory_cap
from gguf_pager.layout import Layout

Status = Literal["ok", "timeout", "failed"]

SETTLE_S = 60.0
"""The longest that the model is read through before the first run, so that a disk's own cache favours nobody."""

CALIBRATE_SHARE, CALIBRATE_BYTES = 1.02, 16 << 20
"""What a cap leaves above the memory that ours took uncapped, for what differs from run to run."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How every run is made. `n_rounds` runs of each case; `options` go to our Llama."""

    model: Path
    n_rounds: int
    timeout_s: float
    is_warm: bool
    tokens: str
    options: dict[str, Any]
    power_command: str | None
    no_energy_reason: str | None


@dataclass(slots=True)
class Run:
    """What one run told, as far as it came. `status` is "ok" when it came to its end."""

    case: Case
    turn: int
    status: Status = "ok"
    reason: str | None = None
    cap: str = "none"
    cap_bytes: int | None = None
    cap_reason: str | None = None
    cap_peak_bytes: int | None = None
    read_ahead_kb: int | None = None
    cached_bytes: int | None = None
    n_done: int = 0
    begun_at: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)
    prompt: PhaseResult | None = None
    gen: PhaseResult | None = None
    token_ns: list[int] = field(default_factory=list)
    token_stall_ns: list[int] = field(default_factory=list)
    layers: list[dict[str, Any]] | None = None


class Runner:
    """Makes the runs. `tell` gets a line about each, for people who wait."""

    def __init__(self, settings: Settings, layout: Layout, device: disk.Device, tell: Callable[[str], None]) -> None:
        self.settings, self.layout, self.device = settings, layout, device
        self.stream_bytes_per_s: float | None = None
        self._tell = tell
        self._setting = probe.read_ahead_setting(layout.paths[0])
        self._given_up: dict[Case, str] = {}
        """Cases that could not finish in time, and where they stopped: what they cannot do is not tried again."""

    def settle(self) -> None:
        """Read the model through once and measure the device."""
        self._tell("reading the model once, so that no run finds the disk's own cache warmer than another ...")
        self.stream_bytes_per_s = disk.read_through(self.layout.paths, SETTLE_S)
        self.device.sample(disk.N_PATTERNS)

    def calibrate(self, shape: Shape, budget: str) -> int | None:
        """Return the cap under which ours fits with this budget, found in a run that is not counted; None if it failed."""
        run = self.run(Case("paged", shape, None, budget), 0)
        peak_bytes = run.facts.get("peak_rss_bytes")
        if run.status != "ok" or peak_bytes is None:
            self._tell(f"no cap for {budget}: {run.reason}")
            return None
        return int(peak_bytes * CALIBRATE_SHARE) + CALIBRATE_BYTES

    def rounds(self, cases: Sequence[Case]) -> Iterator[Run]:
        """Yield the runs of cases that take turns."""
        n_runs, n_made = self.settings.n_rounds * len(cases), 0
        for turn in range(self.settings.n_rounds):
            for case in cases:
                n_made += 1
                run = self.run(case, turn)
                self._tell(f"[{n_made}/{n_runs}] {case.label}: {outcome(run)}")
                yield run

    def run(self, case: Case, turn: int) -> Run:
        """Make one run; whatever goes wrong is told in it."""
        run = Run(case, turn, begun_at=time.time())
        given_up = self._given_up.get(case)
        if given_up == "load":
            run.status, run.reason = "timeout", "not tried again"
            return run
        disk.drop_from_page_cache(self.layout.paths)
        run.cached_bytes = disk.cached_bytes(self.layout.paths)
        self.device.sample()
        with disk.read_ahead(self._setting, case.read_ahead_kb) as kb, memory_cap(case.cap_bytes) as cap:
            run.read_ahead_kb = kb
            run.cap, run.cap_bytes, run.cap_reason = cap.method, cap.limit_bytes, cap.reason
            self._spawn(run, cap, is_prompt_only=given_up == "gen")
            run.cap_peak_bytes = cap.peak_bytes()
            if run.status == "failed" and cap.oom_kills():
                run.reason = f"it needs more memory than the cap of {case.cap_bytes:,} bytes: the kernel ended it"
        if run.status == "timeout":
            # What it did reach is measured in every round.
            self._given_up[case] = "gen" if run.prompt is not None else "load"
        return run

    def _spawn(self, run: Run, cap: Cap, *, is_prompt_only: bool) -> None:
        settings, case = self.settings, run.case
        task = Task(str(settings.model), case.mode, case.shape, is_prompt_only, case.budget, settings.options,
                    case.is_repacked, settings.is_warm, settings.tokens, run.turn, settings.n_rounds,
                    settings.power_command, settings.no_energy_reason, os.getpid(), time.monotonic_ns())
        command = cap.command([sys.executable, "-m", "gguf_pager.bench.worker", task.to_json()])
        with tempfile.TemporaryFile() as complaints:
            # A session of its own: a Ctrl-C is for this process, which then ends that one.
            with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=complaints,
                                  start_new_session=True) as child:
                try:
                    self._listen(run, child, time.monotonic() + settings.timeout_s)
                finally:
                    if child.poll() is None:
                        with suppress(ProcessLookupError):
                            os.killpg(child.pid, signal.SIGKILL)
            if run.status == "ok" and child.returncode != 0:
                run.status, run.reason = "failed", _complaint(complaints, child.returncode)
        if is_prompt_only and run.status == "ok":
            run.status, run.reason = "timeout", "only the prompt was tried again"

    def _listen(self, run: Run, child: subprocess.Popen[bytes], deadline_s: float) -> None:
        """Take in what the child tells until it ends, or until its time is up."""
        assert child.stdout is not None
        pending = b""
        with selectors.DefaultSelector() as selector:
            selector.register(child.stdout, selectors.EVENT_READ)
            while True:
                if not selector.select(max(0.0, deadline_s - time.monotonic())):
                    run.status, run.reason = "timeout", f"not done within {self.settings.timeout_s:g} s: {_reached(run)}"
                    return
                some = os.read(child.stdout.fileno(), 1 << 16)
                if not some:
                    break
                *lines, pending = (pending + some).split(b"\n")
                for line in lines:
                    _take(run, line)
        child.wait()


def _take(run: Run, line: bytes) -> None:
    """Note one event. Lines that are none, which a library may print, are passed over."""
    try:
        values = json.loads(line)
        event = values.pop("event")
    except (ValueError, AttributeError, KeyError, TypeError):
        return
    if event == "prefilled":
        run.prompt = PhaseResult.from_json(values["phase"])
    elif event == "decoding":
        run.n_done = values["n_done"]
    elif event == "decoded":
        run.gen = PhaseResult.from_json(values["phase"])
        run.n_done = run.gen.n_tokens
        run.token_ns, run.token_stall_ns = values["token_ns"], values["token_stall_ns"]
    elif event == "failed":
        run.status, run.reason = "failed", values["reason"]
    elif event == "done":
        run.layers = values.pop("layers")
        run.facts |= values
    elif event == "warmed":
        run.cached_bytes = values["cached_bytes"]
    else:
        run.facts |= values


def _reached(run: Run) -> str:
    """Say how far a run came."""
    if "load_s" not in run.facts:
        return "it was still loading"
    if run.case.shape.n_prompt and run.prompt is None:
        return "it was still computing the prompt"
    return f"{run.n_done} of {run.case.shape.n_gen} tokens were decoded"


def _complaint(complaints: IO[bytes], returncode: int) -> str:
    complaints.seek(0)
    lines = complaints.read().decode("utf-8", "replace").strip().splitlines()
    ended = f"signal {-returncode}" if returncode < 0 else f"exit code {returncode}"
    return f"the run ended with {ended}" + (f": {lines[-1][:300]}" if lines else "")


def outcome(run: Run) -> str:
    """Return a run's figures, or what went wrong, in a few words."""
    parts = []
    if run.prompt is not None:
        parts.append(f"prefill {run.prompt.n_tokens / run.prompt.ns * 1e9:.1f} tok/s")
    if run.gen is not None:
        parts.append(f"decode {run.gen.n_tokens / run.gen.ns * 1e9:.2f} tok/s")
    if run.status != "ok":
        parts.append(f"{run.status}: {run.reason}")
    return ", ".join(parts)
