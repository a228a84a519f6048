"""One run in a process of its own: load, compute, say what it took.

The process is started by runner.py, within the memory cap. It gets a `Task` as JSON in its only argument and prints
JSON lines: each event as it happens, so that a run that is stopped has told how far it came.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf_pager import kernel
from gguf_pager.bench import disk, tokens
from gguf_pager.bench.cases import Mode, Shape
from gguf_pager.bench.sequences import sequences_of
from gguf_pager.energy import meter
from gguf_pager.energy.meter import Reading
from gguf_pager.energy.source import Absent
from gguf_pager.errors import PagerError
from gguf_pager.memory import probe
from gguf_pager.model import engine
from gguf_pager.model.layout import Layout, read_layout

if TYPE_CHECKING:
    from gguf_pager.pager import Pager

_PROGRESS_S = 1.0
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Task:
    """What a worker is to do. `turn` of `n_turns` says which part of the tokens; `spawned_ns` is the parent's clock.

    `energy_source` is the name of the source to read, the same in all runs; None: there is none, and `no_energy_reason`
    says why. `most_steps` ends decoding earlier, in a context for all of it.
    """

    model: str
    mode: Mode
    shape: Shape
    is_prompt_only: bool
    budget: str | None
    options: dict[str, Any]
    is_repacked: bool
    is_warm: bool
    tokens: str
    turn: int
    n_turns: int
    power_command: str | None
    energy_source: str | None
    no_energy_reason: str | None
    parent_pid: int
    spawned_ns: int
    most_steps: int | None = None

    def to_json(self) -> str:
        """Return the argument that a worker is started with."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Task:
        """Return what `to_json` was made of."""
        values = json.loads(text)
        return cls(**values | {"shape": Shape(**values["shape"])})


@dataclass(frozen=True, slots=True)
class PhaseResult:
    """What the prompts of all sequences, or the tokens after them, took. Pager's counters are None in other modes.

    `expert_bytes`: experts wanted, found or not, each once per batch. `ram_read_bytes`: weights that computing had to
    read, each once per batch; None where the experts are not known.
    """

    n_tokens: int
    ns: int
    hits: int | None
    misses: int | None
    bytes_read: int | None
    bytes_wasted: int | None
    stall_ns: int | None
    stall_bytes: int | None
    left_alone: int | None
    expert_bytes: int | None
    ram_read_bytes: int | None
    io_bytes: int | None
    major_faults: int
    user_s: float
    system_s: float
    resident_bytes: int
    reading: Reading
    foreseen: int | None = None
    in_vain: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> PhaseResult:
        """Return what `to_json` was made of."""
        return cls(**values | {"reading": Reading(**values["reading"])})


@dataclass(frozen=True, slots=True)
class Totals:
    """A pager's counters at one moment, summed over its layers."""

    hits: int
    misses: int
    bytes_read: int
    bytes_wasted: int
    stall_ns: int
    stall_bytes: int
    left_alone: int
    foreseen: int
    in_vain: int
    expert_bytes: int
    """Of all experts that were wanted, found or not."""


class _Counters:
    """Reads a pager's counters, or says that there are none."""

    def __init__(self, pager: Pager | None) -> None:
        self._native = pager.native() if pager else None
        self._expert_bytes = [layer.expert_bytes for layer in pager.layout.layers] if pager else []

    def totals(self) -> Totals | None:
        """Return all of them."""
        if self._native is None:
            return None
        rows = self._native.counters()
        hits, misses, bytes_read, bytes_wasted, stall_ns, stall_bytes, _, left_alone, _, _, foreseen, in_vain, *_ = (
            sum(column) for column in zip(*rows, strict=True))
        wanted = sum((row[0] + row[1]) * size for row, size in zip(rows, self._expert_bytes, strict=True))
        return Totals(hits, misses, bytes_read, bytes_wasted, stall_ns, stall_bytes, left_alone, foreseen, in_vain, wanted)

    def stall_ns(self) -> int:
        """Return the time waited for reads so far: asked for at every token, so nothing else."""
        return 0 if self._native is None else sum(row[4] for row in self._native.counters())


@dataclass(frozen=True, slots=True)
class _Moment:
    ns: int
    totals: Totals | None
    io_bytes: int | None
    usage: resource.struct_rusage


class _Phase:
    """Measures what lies between its making and `end`."""

    def __init__(self, counters: _Counters, energy: meter.Meter) -> None:
        self._counters, self._energy = counters, energy
        energy.start()
        self._begun = self._now()

    def _now(self) -> _Moment:
        return _Moment(time.monotonic_ns(), self._counters.totals(), storage_bytes(),
                       resource.getrusage(resource.RUSAGE_SELF))

    def end(self, n_tokens: int, dense_reads_bytes: int, token_bytes: int | None) -> PhaseResult:
        """Return what it took; `dense_reads_bytes` is what all its batches read of weights that are no experts', and
        `token_bytes` the experts' where no pager counts them."""
        first, last = self._begun, self._now()
        reading = self._energy.read().within((last.ns - first.ns) / 1e9)
        counted: dict[str, int | None] = dict.fromkeys(
            ("hits", "misses", "bytes_read", "bytes_wasted", "stall_ns", "stall_bytes", "left_alone", "foreseen", "in_vain"))
        expert_bytes = token_bytes
        if first.totals is not None and last.totals is not None:
            counted = {name: getattr(last.totals, name) - getattr(first.totals, name) for name in counted}
            expert_bytes = last.totals.expert_bytes - first.totals.expert_bytes
        io_bytes = last.io_bytes - first.io_bytes if last.io_bytes is not None and first.io_bytes is not None else None
        return PhaseResult(
            n_tokens=n_tokens, ns=last.ns - first.ns, io_bytes=io_bytes, expert_bytes=expert_bytes,
            ram_read_bytes=None if expert_bytes is None else dense_reads_bytes + expert_bytes,
            major_faults=last.usage.ru_majflt - first.usage.ru_majflt,
            user_s=last.usage.ru_utime - first.usage.ru_utime, system_s=last.usage.ru_stime - first.usage.ru_stime,
            resident_bytes=probe.process_memory().resident_bytes, reading=reading,
            **counted,
        )


def storage_bytes() -> int | None:
    """Return what this process has caused to be read from storage, as Linux counts it; None elsewhere."""
    try:
        lines = kernel.read_lines(Path("/proc/self/io"))
    except OSError:
        return None
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def tell(event: str, **values: Any) -> None:
    """Print one event."""
    print(json.dumps({"event": event, **values}), flush=True)


def die_with(parent_pid: int) -> None:
    """End this process when its parent ends without having ended it, as a kill -9 would have it. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:  # it ended before
            os._exit(1)


def open_model(task: Task) -> Any:
    """Return the Llama of a task's mode, loaded."""
    engine.load()  # before llama_cpp: it bounds libgomp's spinning, unless the environment has said something
    from llama_cpp import Llama as Stock
    from llama_cpp import llama_cpp as low

    from gguf_pager import Llama

    shape = task.shape
    arguments: dict[str, Any] = {
        "model_path": task.model, "n_ctx": shape.n_ctx,
        "n_batch": shape.n_batch, "n_ubatch": shape.n_ubatch, "n_threads": shape.n_threads,
        "n_threads_batch": shape.n_threads, "verbose": False,
    }
    if task.mode == "paged":
        return Llama(budget=task.budget or "auto", n_seq_max=shape.n_parallel, **arguments, **task.options)
    load, make = low.llama_model_load_from_file, low.llama_init_from_model

    def load_as_asked(path: bytes, params: Any, /) -> Any:
        params.use_extra_bufts = task.is_repacked
        return load(path, params)

    def make_as_asked(model: Any, params: Any, /) -> Any:
        if shape.n_parallel > 1:  # as ours has it: one cache, of which each sequence takes what it needs
            params.n_seq_max, params.kv_unified = shape.n_parallel, True
        return make(model, params)

    low.llama_model_load_from_file, low.llama_init_from_model = load_as_asked, make_as_asked
    try:
        return Stock(**arguments, use_mmap=task.mode == "stock")
    finally:
        low.llama_model_load_from_file, low.llama_init_from_model = load, make


def energy_source(task: Task) -> meter.Found:
    """Return the source that all runs are measured with; it may be gone by now."""
    if task.energy_source is None:
        return Absent("none", task.no_energy_reason or "not asked for")
    found = meter.find_all(task.power_command)
    for source in found:
        if source.name != task.energy_source and not isinstance(source, Absent):
            source.close()
    return next(source for source in found if source.name == task.energy_source)


class Run:
    """A loaded model, and the two phases that are measured."""

    def __init__(self, task: Task, llm: Any, layout: Layout) -> None:
        self.task, self.llm, self.layout = task, llm, layout
        self.pager: Pager | None = getattr(llm, "pager", None)
        self.token_ns: list[int] = []
        self.token_stall_ns: list[int] = []
        self._counters = _Counters(self.pager)
        self._meter = meter.Meter(energy_source(task))
        shape = task.shape
        ids = tokens.read_ids(task.tokens, layout.values, layout.n_vocab,
                              lambda raw: llm.tokenize(raw, add_bos=True, special=False), task.turn, shape.n_tokens)
        self.n_source_tokens = len(ids)
        taken = tokens.take(ids, shape.n_sequence_tokens, task.turn, task.n_turns, shape.n_parallel)
        before_gen = shape.n_depth + shape.n_prompt
        self._depths = [own[: shape.n_depth] for own in taken]
        self._prompts = [own[shape.n_depth : before_gen] for own in taken]
        self._steps = [list(step) for step in zip(*(own[before_gen:] for own in taken), strict=True)][: task.most_steps]
        self._sequences = sequences_of(llm, shape.n_parallel)

    def prefill(self) -> PhaseResult:
        """Compute the prompts, batch by batch."""
        shape = self.task.shape
        if shape.n_depth:
            self._sequences.extend(self._depths)
        phase = _Phase(self._counters, self._meter)
        n_ubatches = self._sequences.extend(self._prompts)
        return phase.end(shape.n_parallel * shape.n_prompt, n_ubatches * self.layout.dense_bytes, None)

    def decode(self) -> PhaseResult:
        """Compute the tokens after them, one by one, or one of each sequence."""
        shape = self.task.shape
        if shape.n_depth and not shape.n_prompt:
            self._sequences.extend(self._depths)
        ends, stalls = [], []
        told_s = time.monotonic()
        phase = _Phase(self._counters, self._meter)
        begun_ns, begun_stall_ns = time.monotonic_ns(), self._counters.stall_ns()
        for i, step in enumerate(self._steps):
            self._sequences.step(step)
            ends.append(time.monotonic_ns())
            stalls.append(self._counters.stall_ns())
            if ends[-1] / 1e9 - told_s > _PROGRESS_S:
                told_s = ends[-1] / 1e9
                tell("decoding", n_done=i + 1)
        n_ubatches = len(self._steps) * -(-shape.n_parallel // self.n_ubatch)
        is_alone = shape.n_parallel == 1  # several may want the same experts
        result = phase.end(len(self._steps) * shape.n_parallel, n_ubatches * self.layout.dense_bytes,
                           len(self._steps) * self.layout.bytes_per_token if is_alone else None)
        self.token_ns = _differences(begun_ns, ends)
        self.token_stall_ns = _differences(begun_stall_ns, stalls) if self.pager else []
        return result

    @property
    def n_ubatch(self) -> int:
        """The batch that is computed at once: what was asked for, and at most a call's and the context's tokens."""
        from llama_cpp import llama_cpp as low

        return int(low.llama_n_ubatch(self.llm.ctx))

    def digest(self) -> str:
        """Return a hash of the logits of each sequence's last token, which every token before it has a part in."""
        return hashlib.sha256(b"".join(self._sequences.logits())).hexdigest()

    def facts(self) -> dict[str, Any]:
        """Return what is worth knowing of the model and of the pager."""
        from llama_cpp import llama_cpp as low

        text = ctypes.create_string_buffer(256)
        low.llama_model_desc(self.llm.model, text, len(text))
        pager = self.pager
        return {
            "model_type": text.value.decode("utf-8", "replace"),
            "model_size": int(low.llama_model_size(self.llm.model)),
            "model_n_params": int(low.llama_model_n_params(self.llm.model)),
            "n_ubatch": self.n_ubatch,
            "n_source_tokens": self.n_source_tokens,
            "experts_per_token": sum(layer.n_used for layer in self.layout.layers),
            "gomp_spincount": os.environ.get("GOMP_SPINCOUNT"),
            "not_paged_reason": getattr(self.llm, "not_paged_reason", None),
            "io": ("direct" if pager.is_direct else "buffered") if pager else None,
            "policy": pager.options.policy if pager else None,
            "look_ahead": pager.options.look_ahead if pager else None,
            "n_readers": pager.options.n_readers if pager else None,
            "piece_bytes": pager.options.piece_bytes if pager else None,
            "profile": pager.options.profile if pager else None,
            "arena_bytes": pager.arena_bytes if pager else None,
        }

    def heat(self) -> list[dict[str, Any]] | None:
        """Return how often each expert of each layer was chosen, and which are in slots now."""
        pager = self.pager
        if pager is None:
            return None
        return [{"block": layer.block, "chosen": pager.times_chosen(i), "resident": list(pager.native().resident(i))}
                for i, layer in enumerate(self.layout.layers)]


def _differences(first: int, later: Sequence[int]) -> list[int]:
    return [after - before for before, after in zip([first, *later], later, strict=False)]


def work(task: Task) -> None:
    """Do a task, telling every step."""
    layout = read_layout(task.model)
    started_ns = time.monotonic_ns()
    if task.is_warm:  # here and not in the parent, so that the cap has to pay for it
        disk.fill_page_cache(layout.paths)
        tell("warmed", cached_bytes=disk.cached_bytes(layout.paths))
    warm_ns = time.monotonic_ns()
    llm = open_model(task)
    usable_ns = time.monotonic_ns()
    run = Run(task, llm, layout)
    tell("loaded", load_s=(usable_ns - warm_ns) / 1e9,
         usable_s=(usable_ns - warm_ns + started_ns - task.spawned_ns) / 1e9, **run.facts())
    if task.shape.n_prompt:
        tell("prefilled", phase=run.prefill().to_json())
    if task.shape.n_gen and not task.is_prompt_only:
        tell("decoded", phase=run.decode().to_json(), token_ns=run.token_ns, token_stall_ns=run.token_stall_ns)
    if run.pager is not None:
        run.pager.wait_present()  # or a short run's peak is less than the budget takes, and a cap made of it kills
    tell("done", digest=run.digest(), peak_rss_bytes=probe.process_memory().peak_bytes, layers=run.heat())
    llm.close()


def main() -> None:
    """Read the task, do it; an error of ours is an event, any other ends the process with its traceback."""
    task = Task.from_json(sys.argv[1])
    die_with(task.parent_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is asked, and ends this process
    try:
        work(task)
    except (PagerError, ValueError, MemoryError) as error:  # ValueError: what llama_cpp raises when it cannot load
        tell("failed", reason=str(error) or type(error).__name__)
        sys.exit(1)


if __name__ == "__main__":
    main()
