"""A budget for which there is no room is refused with what would work, in real groups, and nobody is killed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import make_trace_model
import make_zoo
import pytest
from conftest import stated_minimum

from gguf_pager import read_layout
from gguf_pager.bench.disk import drop_from_page_cache
from gguf_pager.memory.budget import least_cache_bytes
from gguf_pager.memory.cap import memory_cap

MIB = 1 << 20

SCRIPT = """
import json, sys
from pathlib import Path
import gguf_pager
told = {}
if int(sys.argv[3]):
    for _ in range(2):  # twice: the second time makes pages active
        Path(sys.argv[1]).read_bytes()
try:
    arguments = {"n_ctx": 256, "n_batch": 32, "n_threads": 1, "n_threads_batch": 1, "verbose": False} | json.loads(sys.argv[2])
    llm = gguf_pager.Llama(sys.argv[1], **arguments)
    llm.eval([int(llm.metadata["gguf_pager.trace.first_token"])])
    told["arena_bytes"] = llm.pager and llm.pager.arena_bytes
    llm.close()
except gguf_pager.BudgetError as error:
    told["error"] = str(error)
print(json.dumps(told))
"""


@dataclass(frozen=True)
class Told:
    """What a process in a group came to."""

    returncode: int
    error: str | None
    arena_bytes: int | None
    oom_kills: int | None


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model with 150 MB of dense weights and 57 MB of experts."""
    path = tmp_path_factory.mktemp("room") / "dense.gguf"
    make_trace_model.make(path, "tiny", layers=4, n_embd=2048, n_head=64, n_head_kv=64, head_dim=128)
    layout = read_layout(path)
    assert layout.dense_bytes > 140 * MIB and layout.expert_bytes > 50 * MIB
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model with 110 MB of experts and little else."""
    path = tmp_path_factory.mktemp("wide") / "wide.gguf"
    make_trace_model.make(path, "tiny", experts=64, n_ff=1024)
    yield path
    path.unlink()


def open_in_group(model: Path, limit_bytes: int, *, is_read_first: bool = False, **arguments: Any) -> Told:
    drop_from_page_cache([model])
    with memory_cap(limit_bytes) as cap:
        if cap.folder is None:
            pytest.skip(f"no group can be made here: {cap.method} {cap.reason}")
        command = cap.command([sys.executable, "-c", SCRIPT, str(model), json.dumps(arguments), str(int(is_read_first))])
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode in (0, 137, -9), done.stderr
        told = json.loads(done.stdout) if done.returncode == 0 else {}
        return Told(done.returncode, told.get("error"), told.get("arena_bytes"), cap.oom_kills())


def test_auto_plans_with_the_group_and_not_with_the_host_or_what_is_cached(wide: Path) -> None:
    """It has about 130 MiB to spare, less than the model. A share of the host's RAM as reserve, or one for a desktop, would leave nothing."""
    limit = 200 * MIB
    fresh = open_in_group(wide, limit, budget="auto")
    assert fresh.error is None and fresh.arena_bytes is not None and 20 * MIB < fresh.arena_bytes < 100 * MIB
    cached = open_in_group(wide, limit, is_read_first=True, budget="auto")
    assert cached.arena_bytes is not None and abs(cached.arena_bytes - fresh.arena_bytes) < 12 * MIB


def test_run_says_which_budget_auto_took_and_why(wide: Path) -> None:
    with memory_cap(200 * MIB) as cap:
        if cap.folder is None:
            pytest.skip(f"no group can be made here: {cap.method} {cap.reason}")
        command = cap.command([sys.executable, "-m", "gguf_pager", "run", str(wide), "First", "-n", "3", "--temp", "0"])
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("The model is larger than the memory that can be spared")]
    assert len(told) == 1 and re.search(r"of \d{3}\.\d+ MiB free, \d+\.\d+ MiB are taken, and \d+% of the experts", told[0]), done.stderr


@pytest.mark.parametrize("budget", ("auto", "min", "50%"))
def test_dense_weights_larger_than_the_group_are_refused_before_they_are_there(model: Path, budget: str) -> None:
    told = open_in_group(model, 150 * MIB, budget=budget)
    assert (told.returncode, told.oom_kills) == (0, 0), "nobody was killed"
    assert told.error is not None and "is too small: this model needs at least" in told.error and "of the 150.00 MiB that its cgroup allows" in told.error
    assert stated_minimum(told.error) > read_layout(model).dense_bytes


def test_named_least_works_in_a_group_of_that_size(model: Path) -> None:
    least = 150 * MIB
    for _ in range(3):  # before a context is made, its cache and buffers are not known
        told = open_in_group(model, least, budget="min")
        if told.error is None:
            break
        assert told.oom_kills == 0 and stated_minimum(told.error) > least
        least = stated_minimum(told.error)
    assert told.returncode == 0 and told.arena_bytes and told.oom_kills == 0


@pytest.mark.parametrize("budget", ("min", "2%", "auto"))
def test_buffers_of_large_batches_that_do_not_fit_are_refused_with_what_to_lower(wide: Path, budget: str) -> None:
    """With 2,048 tokens at once they take far more than the experts of one token."""
    large = {"n_ctx": 2048, "n_batch": 2048, "n_ubatch": 2048}
    limit = next(n for n in range(60 * MIB, 400 * MIB, 10 * MIB) if open_in_group(wide, n, budget=budget).error is None)
    told = open_in_group(wide, limit + 20 * MIB, budget=budget, **large)
    assert told.error is not None and (told.returncode, told.oom_kills) == (0, 0)
    assert "of them for this context" in told.error and "Lower n_ubatch or n_ctx, or " in told.error
    assert open_in_group(wide, limit + 20 * MIB, budget=budget, **large | {"n_ubatch": 64}).error is None
    if budget == "min":
        told = open_in_group(wide, stated_minimum(told.error), budget=budget, **large)
        assert told.error is None and (told.returncode, told.oom_kills) == (0, 0)


def test_share_that_does_not_fit_names_the_largest_that_does(model: Path) -> None:
    limit = read_layout(model).dense_bytes + 145 * MIB
    told = open_in_group(model, limit, budget="100%")
    assert told.oom_kills == 0 and told.error is not None and "The largest share that fits is " in told.error
    share = float(told.error.split("The largest share that fits is ")[1].split("%")[0])
    assert 0 < share < 100
    told = open_in_group(model, limit, budget="min")
    assert told.error is None and told.returncode == 0


def test_dense_weights_that_are_not_locked_need_their_room_as_well(model: Path) -> None:
    """They are copied in any case, so that nothing a token needs lies in a mapping whose file can fail."""
    told = open_in_group(model, 150 * MIB, budget="min", lock_dense="off")
    assert told.returncode == 0 and told.oom_kills == 0
    assert told.error is not None and stated_minimum(told.error) > 150 * MIB


def test_budget_above_the_group_is_refused_with_both_figures(model: Path) -> None:
    told = open_in_group(model, 300 * MIB, budget="2GiB")
    assert told.returncode == 0 and told.error is not None
    assert "2.00 GiB" in told.error and "of the 300.00 MiB that its cgroup allows" in told.error
    assert "overcommit" in told.error


def test_budget_of_exactly_the_group_is_taken(model: Path) -> None:
    told = open_in_group(model, 300 * MIB, budget=300 * MIB)
    assert told.returncode == 0 and told.error is None and told.oom_kills == 0 and told.arena_bytes


def test_whoever_insists_is_believed(model: Path) -> None:
    told = open_in_group(model, 300 * MIB, budget="2GiB", overcommit=True)
    assert told.returncode == 0 and told.error is None and told.arena_bytes
    told = open_in_group(model, 120 * MIB, budget="min", overcommit=True)
    assert told.returncode != 0 and told.oom_kills, "the group is really too small: what is refused otherwise would be killed"


def test_cache_larger_than_the_group_is_refused(model: Path) -> None:
    """Of 64 heads of 128 a token takes 128 KiB in four layers: llama.cpp fills the whole cache with zeros at once."""
    for budget in ("min", "50%", "600MiB"):
        told = open_in_group(model, 600 * MIB, budget=budget, n_ctx=16384)
        assert told.error is not None and (told.returncode, told.oom_kills) == (0, 0), budget


CACHE = """
import json, re, sys
import gguf_pager
gguf_pager.Llama
import llama_cpp
from llama_cpp import llama_cpp as low
said = []
hear = low.llama_log_callback(lambda level, text, data: said.append(text.decode("utf-8", "replace")))
found = {}
for path in sys.argv[1:]:
    said.clear()
    llm = llama_cpp.Llama(path, n_ctx=1, verbose=False)
    low.llama_log_set(hear, None)
    params = low.llama_context_default_params()
    params.n_ctx = 2048
    context = low.llama_init_from_model(llm.model, params)
    sizes = re.findall(r"(?:KV|RS|state) buffer size = +([0-9.]+) MiB", " ".join(said))
    found[path] = sum(map(float, sizes))
    low.llama_free(context)
    llm.close()
print(json.dumps(found))
"""


def test_cache_is_never_estimated_larger_than_it_is(zoo_model: Callable[..., Path], trace_model: Path) -> None:
    """Or what works would be refused. With what llama.cpp itself says of its buffers, for architectures of every kind."""
    paths = [str(trace_model), *(str(zoo_model(arch)) for arch in make_zoo.ARCHS)]
    done = subprocess.run([sys.executable, "-c", CACHE, *paths], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    for path in paths:
        estimate = least_cache_bytes(read_layout(path), 2048, 2, 2) / MIB
        assert estimate <= told[path] + 0.05, path
    known = told[str(trace_model)]
    assert known > 1 and abs(least_cache_bytes(read_layout(trace_model), 2048, 2, 2) / MIB - known) < 0.05
