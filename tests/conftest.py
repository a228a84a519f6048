"""Models made once per session, stock llama-cpp-python to compare with, and what a process must give back."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

os.environ["GGUF_PAGER_CACHE"] = tempfile.mkdtemp(prefix="gguf_pager-tests-")  # processes that tests start inherit it

import gguf

import gguf_pager

gguf_pager.Llama  # noqa: B018  before llama_cpp: it sets what libgomp reads once

import llama_cpp
import make_talking_model
import make_trace_model
import make_zoo
import zoo_metadata
from llama_cpp import llama_cpp as low

from gguf_pager import hooks

# One thread: two beside the readers, on a machine with two cores, spin for seconds at ggml's barriers.
ARGUMENTS: dict[str, Any] = {"n_ctx": 128, "n_batch": 64, "n_threads": 1, "n_threads_batch": 1, "verbose": False}

ROOT = Path(__file__).resolve().parent.parent

PLACES = [(place.owner, place.name, place.pristine) for place in hooks.hooks._wrapping._places]
UNWRAPPED = {name: function for owner, name, function in PLACES if owner is low}

Logits = npt.NDArray[np.single]
Factory = Callable[..., Any]


# ---- what is kept between processes ----

CACHE = Path(os.environ["GGUF_PAGER_CACHE"])
"""Where models opened for more than one test, and processes, keep things: never in the user's own folder."""


def pytest_unconfigure() -> None:
    """Also in the process that only hands tests out to others, which has a folder as well."""
    shutil.rmtree(CACHE, ignore_errors=True)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that one test keeps is found by another."""
    monkeypatch.setenv("GGUF_PAGER_CACHE", str(CACHE / uuid.uuid4().hex))


# ---- models ----

@pytest.fixture(scope="session")
def zoo_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`zoo_model(arch, file_type="")`: the path of a tiny random model of this architecture. Not to be changed."""
    folder = tmp_path_factory.mktemp("zoo")

    def model(arch: str, file_type: str = "") -> Path:
        path = folder / f"{arch}-{file_type}.gguf"
        if not path.exists():
            make_zoo.make(arch, path, file_type=file_type)
        return path

    return model


@pytest.fixture(scope="session")
def trace_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with recorded routing. Not to be changed."""
    path = tmp_path_factory.mktemp("trace") / "tiny.gguf"
    make_trace_model.make(path, "tiny")
    return path


@pytest.fixture(scope="session")
def dense_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model without experts. Not to be changed."""
    path = tmp_path_factory.mktemp("dense") / "dense.gguf"
    row = zoo_metadata.Arch({"expert_count": 0, "expert_used_count": 0})
    metadata = make_zoo.model_keys("llama", row, 32)
    writer = make_zoo.new_writer(path, metadata)
    for name, shape in make_zoo.tidy(make_zoo.tensor_shapes(metadata), row).items():
        writer.add_tensor(name, make_zoo.random_values(name, shape, row, 1))
    make_zoo.finish(writer)
    return path


@pytest.fixture(scope="session")
def lora(zoo_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter for zoo_model("qwen3moe") that changes attention and all experts."""
    path = tmp_path_factory.mktemp("lora") / "lora.gguf"
    make_zoo.make_lora(zoo_model("qwen3moe"), path)
    return path


@contextmanager
def of_all_workers(factory: pytest.TempPathFactory, name: str) -> Iterator[Path]:
    """Hold a folder that all of pytest-xdist's workers share: what takes long to make is made by the first that wants it."""
    folder = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder /= name
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kept = ROOT / "models"
    try:
        with of_all_workers(tmp_path_factory, "source") as folder:
            return make_talking_model.fetch_source(kept if kept.is_dir() else folder)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"pip cannot download {make_talking_model.SOURCE}: {error.stderr[-200:]}")


def made(path: Path, source: Path, *arguments: str) -> Path:
    """Make a model as a user would, in a process of its own, and check how much memory that takes."""
    program = ("import resource, runpy, sys; sys.argv = sys.argv[1:]\n"
               "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
               "finally: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
    done = subprocess.run([sys.executable, "-c", program, str(ROOT / "scripts" / "make_talking_model.py"), str(path), "--source",
                           str(source), *arguments], capture_output=True, text=True, check=False, timeout=300,
                          env={**os.environ, "PYTHONPATH": str(ROOT / "scripts")})
    assert done.returncode == 0, done.stderr
    assert sys.platform != "linux" or int(done.stdout.split()[-1]) < 1_000_000, "kilobytes"
    return path


@pytest.fixture(scope="session")
def small(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 experts, the first six blocks: 0.3 GB."""
    with of_all_workers(tmp_path_factory, "talking") as folder:
        path = folder / "small.gguf"
        return path if path.exists() else made(path, source, "--blocks", "6")


def with_vocabulary(source: Path, target: Path, template: str, renamed: Sequence[str] = ()) -> Path:
    """Copy a model with another chat template, and with its last control tokens called something else."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    make_zoo.copy_fields(reader, writer)
    [fields] = writer.kv_data
    fields["tokenizer.chat_template"].value = template
    types = fields["tokenizer.ggml.token_type"].value
    controls = [i for i, kind in enumerate(types) if kind == gguf.TokenType.CONTROL and i > 2]
    for i, name in zip(reversed(controls), renamed, strict=False):
        fields["tokenizer.ggml.tokens"].value[i] = name
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    make_zoo.finish(writer)
    return target


# ---- who computes ----

@contextmanager
def unpacked() -> Iterator[None]:
    """Let stock llama-cpp-python leave weights as they are meanwhile: repacking changes the last bits."""
    load = low.llama_model_load_from_file

    def load_unpacked(path: bytes, params: Any, /) -> Any:
        params.use_extra_bufts = False
        return load(path, params)

    low.llama_model_load_from_file = load_unpacked
    try:
        yield
    finally:
        low.llama_model_load_from_file = load


@pytest.fixture
def stock() -> Iterator[Factory]:
    """`stock(path, **arguments)`: llama_cpp.Llama without weight repacking, which changes the last bits."""
    made: list[llama_cpp.Llama] = []

    def make(path: Path, **arguments: Any) -> llama_cpp.Llama:
        with unpacked():
            made.append(llama_cpp.Llama(str(path), **ARGUMENTS | arguments))
        return made[-1]

    yield make
    for llm in made:
        llm.close()


@pytest.fixture
def paged() -> Iterator[Factory]:
    """`paged(path, budget="min", **arguments)`: our Llama."""
    made: list[gguf_pager.Llama] = []

    def make(path: Path, budget: float | str = "min", **arguments: Any) -> gguf_pager.Llama:
        made.append(gguf_pager.Llama(str(path), budget=budget, **ARGUMENTS | arguments))
        return made[-1]

    yield make
    for llm in made:
        llm.close()


@pytest.fixture
def pair(stock: Factory, paged: Factory) -> Factory:
    """`pair(path, budget="min", options={}, **arguments)`: ours and stock, which compute batches of the same length."""

    def make(path: Path, budget: str = "min", options: dict[str, Any] | None = None, **arguments: Any) -> Any:
        ours, theirs = paged(path, budget, **arguments, **options or {}), stock(path, **arguments)
        assert low.llama_n_ubatch(ours.ctx) == low.llama_n_ubatch(theirs.ctx)
        return ours, theirs

    return make


def evaluate(llm: llama_cpp.Llama, tokens: Sequence[int], batches: Sequence[int] = ()) -> Logits:
    """Feed tokens in batches of these lengths, the rest one by one; return the logits of every one of them.

    The model must have been opened with logits_all=True.
    """
    first, at = llm.n_tokens, 0
    for length in (*batches, *[1] * (len(tokens) - sum(batches))):
        llm.eval(list(tokens[at : at + length]))
        at += length
    return np.array(llm.scores[first : first + len(tokens)])


@pytest.fixture
def logits() -> Callable[..., Logits]:
    """`logits(llm, tokens, batches=())`, see `evaluate`."""
    return evaluate


def some_tokens(n: int, seed: int = 7) -> list[int]:
    """Return random ordinary tokens of the zoo's vocabulary."""
    return [int(token) for token in np.random.default_rng(seed).integers(5, 300, n)]


# ---- what must be given back ----

@dataclass(frozen=True)
class Footprint:
    """What a model costs a process, memory apart."""

    n_fds: int
    n_threads: int
    mappings: tuple[str, ...]
    wrapped: tuple[str, ...]


_PF_EXITING = 4
"""Of the kernel's sched.h: a thread that has been joined stays in the list for a moment."""


def _is_alive(task: Path) -> bool:
    try:
        flags = (task / "stat").read_text().rpartition(")")[2].split()[6]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return not int(flags) & _PF_EXITING


def footprint_of(folder: Path) -> Footprint:
    """Return what this process holds now; mappings are those of files in `folder`."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    return Footprint(
        n_fds=len(os.listdir("/proc/self/fd")),
        n_threads=sum(_is_alive(task) for task in Path("/proc/self/task").iterdir()),
        mappings=tuple(line for line in maps if str(folder) in line),
        wrapped=tuple(name for owner, name, function in PLACES if getattr(owner, name) is not function),
    )


def settled_footprint_of(folder: Path, wanted: Footprint) -> Footprint:
    """Return it once it is as wanted, or after seconds: a thread that Python has joined ends a moment later."""
    end = time.monotonic() + 5
    while (found := footprint_of(folder)) != wanted and time.monotonic() < end:
        time.sleep(0.01)
    return found


@pytest.fixture
def footprint() -> Callable[[Path], Footprint]:
    """`footprint(folder)`, see `footprint_of`."""
    return footprint_of


# ---- small things ----

def drop_identity(answer: Any) -> Any:
    """Return a completion without what differs from call to call: ids, times and names of models."""
    if isinstance(answer, dict):
        return {key: drop_identity(value) for key, value in answer.items() if key not in ("id", "created", "model")}
    if isinstance(answer, list):
        return [drop_identity(item) for item in answer]
    return answer


def stated_minimum(message: str) -> int:
    """Return the smallest budget that a BudgetError names."""
    found = re.search(r"\((\d+) bytes\)", message)
    assert found, message
    return int(found[1])
