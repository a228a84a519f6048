"""Runs the cases in turn, round by round, each run in a process of its own under the cap, and gathers what they tell."""

from __future__ import annotations

import json
import math
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

from gguf_pager.bench import disk, memory
from gguf_pager.bench.cases import Case, Shape
from gguf_pager.bench.interrupts import Interrupts
from gguf_pager.bench.worker import PhaseResult, Task
from gguf_pager.memory import probe
from gguf_pager.memory.budget import full_arena_bytes, least_arena_bytes, parse_budget
from gguf_pager.memory.cap import Cap, memory_cap
from gguf_pager.model.layout import Layout
from gguf_pager.pager import Options, Pager
from gguf_pager.verdict import process_bytes

Status = Literal["ok", "timeout", "failed"]

SETTLE_S = 60.0
"""The longest that the model is read through before the first run, so that a disk's own cache favours nobody."""

CALIBRATE_SHARE, CALIBRATE_BYTES = 1.02, 16 << 20
"""What a cap leaves above the memory that ours took uncapped, for what differs from run to run."""

CALIBRATE_STEPS = 8
"""Of decoding, in a context for all of it: the cache for what was not decoded is in memory all the same."""

ESTIMATE_BYTES = 256 << 20
"""For what an estimate does not know: KV cache and compute buffers, of each sequence."""

STOCK_SPIN_COUNT = "300000"
"""What libgomp takes where nobody has said anything (gomp_spin_count_var in env.c of GCC's libgomp). Reading a model's
header through ggml loads libgomp with our own choice, which is not stock's."""


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
    energy_source: str | None
    no_energy_reason: str | None
    is_spin_chosen: bool
    """Whether the user has said how OpenMP's threads wait, which then holds for stock as well."""


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
    is_cache_controlled: bool = True
    is_made: bool = True
    """Whether there was a process at all."""
    n_done: int = 0
    begun_at: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)
    prompt: PhaseResult | None = None
    gen: PhaseResult | None = None
    token_ns: list[int] = field(default_factory=list)
    token_stall_ns: list[int] = field(default_factory=list)
    layers: list[dict[str, Any]] | None = None


class Runner:
    """Makes the runs. `tell` gets a line about each, for people who wait.

    All methods raise KeyboardInterrupt soon after one of `interrupts` has come; nothing of a run is left then.
    """

    def __init__(self, settings: Settings, layout: Layout, device: disk.Device, interrupts: Interrupts,
                 tell: Callable[[str], None]) -> None:
        self.settings, self.layout, self.device, self.interrupts = settings, layout, device, interrupts
        self.stream_bytes_per_s: float | None = None
        self._tell = tell
        self._setting = probe.read_ahead_setting(layout.paths[0])
        self._given_up: dict[Case, Run] = {}
        """Cases that could not finish in time, and their run: what it did not reach is not tried again."""

    def settle(self) -> None:
        """Read the model through once and measure the device."""
        self._tell("reading the model once, so that no run finds the disk's own cache warmer than another ...")
        self.stream_bytes_per_s = disk.read_through(self.layout.paths, SETTLE_S, self.interrupts.check)
        self.device.sample(disk.N_PATTERNS)

    def calibrate(self, shape: Shape, budget: str) -> int:
        """Return the cap under which ours fits with a budget that is not in bytes, found in a run that is not counted.

        Where that run fails, or nothing can be capped anyway, the cap is an estimate.
        """
        with memory_cap(1 << 30) as trial:
            can_cap = trial.method != "none"
        if can_cap:
            self._tell(f"finding out how much memory {budget} of the experts take, for the cap ...")
            run = self._make(Case("paged", shape, None, budget), 0, most_steps=CALIBRATE_STEPS)
            if run.status == "ok":
                return int(run.facts["peak_rss_bytes"] * CALIBRATE_SHARE) + CALIBRATE_BYTES
            self._tell(f"that run {run.status}: {run.reason}; the cap is an estimate")
        return estimate_cap_bytes(self.layout, budget, shape.n_parallel)

    def rounds(self, cases: Sequence[Case]) -> Iterator[Run]:
        """Yield the runs of cases that take turns."""
        n_runs, n_made, begun = self.settings.n_rounds * len(cases), 0, time.monotonic()
        for turn in range(self.settings.n_rounds):
            for case in cases:
                n_made += 1
                run = self.run(case, turn)
                self._tell(f"[{n_made}/{n_runs}] {label(run)}: {outcome(run)}")
                if n_made == len(cases) < n_runs:
                    left_s = (time.monotonic() - begun) / n_made * (n_runs - n_made)
                    self._tell(f"about {math.ceil(left_s / 60)} minutes more; Ctrl-C keeps the rows that are finished")
                yield run

    def run(self, case: Case, turn: int) -> Run:
        """Make one run; whatever goes wrong is told in it. What a case could not reach in time is not tried again."""
        before = self._given_up.get(case)
        if before is not None and before.prompt is None:
            return Run(case, turn, "timeout", before.reason, begun_at=time.time(), is_made=False)
        needed, available = self.layout.tensor_bytes, probe.memory().available_bytes
        if case.mode == "resident" and needed > available:
            reason = f"{needed:,} bytes of weights do not fit into the {available:,} that are free"
            return Run(case, turn, "failed", reason, begun_at=time.time(), is_made=False)
        run = self._make(case, turn, is_prompt_only=before is not None)
        if before is not None and run.status == "ok":
            run.status, run.reason = "timeout", before.reason
        elif run.status == "timeout" and before is None:
            self._given_up[case] = run
        return run

    def _make(self, case: Case, turn: int, *, is_prompt_only: bool = False, most_steps: int | None = None) -> Run:
        self.interrupts.check()
        run = Run(case, turn, begun_at=time.time())
        try:
            run.is_cache_controlled = disk.drop_from_page_cache(self.layout.paths)
            run.cached_bytes = disk.cached_bytes(self.layout.paths)
            self.device.sample()
            self._touch_memory(case)
            with disk.read_ahead(self._setting, case.read_ahead_kb) as kb, memory_cap(case.cap_bytes) as cap:
                run.read_ahead_kb = kb
                run.cap, run.cap_bytes, run.cap_reason = cap.method, cap.limit_bytes, cap.reason
                self._spawn(run, cap, is_prompt_only=is_prompt_only, most_steps=most_steps)
                if probe.read_ahead_kb(self.layout.paths[0]) != kb:
                    run.read_ahead_kb = None  # somebody else has set it meanwhile
                self.device.sample()  # around each run: of the few samples of a short benchmark the best is too low
                run.cap_peak_bytes = cap.peak_bytes()
                if run.status == "failed" and cap.oom_kills():
                    run.reason = f"it needs more memory than the cap of {cap.limit_bytes:,} bytes: the kernel ended it"
                    run.reason += f" ({cap.reason})" if cap.reason else ""
        except OSError as error:
            run.status, run.reason = "failed", str(error)
        return run

    def _touch_memory(self, case: Case) -> None:
        """Last before a run: what lies idle for some seconds may be gone again."""
        wanted = case.cap_bytes if case.cap_bytes is not None else self.layout.tensor_bytes
        memory.touch(min(wanted, probe.memory().available_bytes * 3 // 4), self.interrupts.check)

    def _spawn(self, run: Run, cap: Cap, *, is_prompt_only: bool, most_steps: int | None) -> None:
        settings, case = self.settings, run.case
        # A cap is made of what a run took, which is less than what a context may come to use: so the kernel decides.
        is_made_for_it = case.cap_bytes is not None and case.budget is not None and parse_budget(case.budget).kind != "bytes"
        options = settings.options | ({"overcommit": True} if is_made_for_it else {})
        task = Task(str(settings.model), case.mode, case.shape, is_prompt_only, case.budget, options,
                    case.is_repacked, settings.is_warm, settings.tokens, run.turn, settings.n_rounds,
                    settings.power_command, settings.energy_source, settings.no_energy_reason, os.getpid(),
                    time.monotonic_ns(), most_steps)
        command = cap.command([sys.executable, "-m", "gguf_pager.bench.worker", task.to_json()])
        with tempfile.TemporaryFile() as complaints:
            # A session of its own: a Ctrl-C is for this process, which then ends that one.
            with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=complaints,
                                  start_new_session=True, env=self._environment(case)) as child:
                try:
                    self._listen(run, child, time.monotonic() + settings.timeout_s)
                finally:
                    if child.poll() is None:
                        with suppress(ProcessLookupError):
                            os.killpg(child.pid, signal.SIGKILL)
                        child.wait()  # giving back many gigabytes takes a while, and the cap can only go after it
            if run.status == "ok" and child.returncode != 0:
                run.status, run.reason = "failed", _complaint(complaints, child.returncode)
        if run.status == "ok" and "digest" not in run.facts:
            run.status, run.reason = "failed", "the run ended without a result"

    def _environment(self, case: Case) -> dict[str, str]:
        environment = dict(os.environ)
        if case.mode != "paged" and not self.settings.is_spin_chosen:
            environment["GOMP_SPINCOUNT"] = STOCK_SPIN_COUNT
        return environment

    def _listen(self, run: Run, child: subprocess.Popen[bytes], deadline_s: float) -> None:
        """Take in what the child tells until it ends, or until its time is up."""
        assert child.stdout is not None
        pending = b""
        with selectors.DefaultSelector() as selector:
            selector.register(child.stdout, selectors.EVENT_READ)
            selector.register(self.interrupts, selectors.EVENT_READ)
            while True:
                ready = selector.select(max(0.0, deadline_s - time.monotonic()))
                self.interrupts.check()
                if not ready:
                    run.status, run.reason = "timeout", f"not done within {self.settings.timeout_s:g} s: {_reached(run)}"
                    return
                if all(key.fileobj is not child.stdout for key, _ in ready):
                    continue  # a signal that is nobody's business here
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
        run.n_done = len(values["token_ns"])
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
    each = " of each sequence" if run.case.shape.n_parallel > 1 else ""
    return f"{run.n_done} of {run.case.shape.n_gen} tokens{each} were decoded"


def _complaint(complaints: IO[bytes], returncode: int) -> str:
    complaints.seek(0)
    lines = complaints.read().decode("utf-8", "replace").strip().splitlines()
    ended = f"signal {-returncode}" if returncode < 0 else f"exit code {returncode}"
    return f"the run ended with {ended}" + (f": {lines[-1][:300]}" if lines else "")


def label(run: Run) -> str:
    """Return the case's label with the cap that was really in force."""
    return run.case.label + (f", cap {run.cap_bytes / 1e9:.2f} GB" if run.cap_bytes is not None else "")


def estimate_cap_bytes(layout: Layout, budget: str, n_parallel: int = 1) -> int:
    """Return about what a process of ours takes with a budget that is a share, "min" or "auto"."""
    needs, asked = Pager(layout, Options()).needs, parse_budget(budget)
    share = asked.value if asked.kind == "share" else None
    arena_bytes = (least_arena_bytes(needs) if asked.kind == "min"
                   else int((share or 1.0) * full_arena_bytes(needs)))
    return int(process_bytes(layout, arena_bytes) * CALIBRATE_SHARE) + n_parallel * ESTIMATE_BYTES


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
