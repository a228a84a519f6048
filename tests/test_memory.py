"""A budget is honest: the process that was given one stays under it, measured from outside and by the kernel."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import make_trace_model
import pytest

from gguf_pager.bench.disk import drop_from_page_cache
from gguf_pager.memory.cap import Cap, memory_cap

BUDGET_BYTES = 300_000_000
TOLERANCE = 1.03

SCRIPT = """
import json, resource, sys
from pathlib import Path
from gguf_pager import Llama
path, budget, n_ubatch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
llm = Llama(path, budget=budget, n_ctx=700, n_batch=512, n_ubatch=n_ubatch, n_threads=2, n_threads_batch=2, verbose=False)
first = int(llm.metadata["gguf_pager.trace.first_token"])
llm.eval([first + i for i in range(512)])
for i in range(100):
    llm.eval([first + 512 + i])
stats = llm.pager.stats()
peak = int(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line))
print(json.dumps({"peak_rss_bytes": peak * 1024, "arena_bytes": stats.arena_bytes, "left_alone": stats.left_alone,
                  "resident_bytes": stats.resident_bytes, "evictions": stats.evictions}))
"""

SEVERAL = """
import json, sys
from pathlib import Path
from gguf_pager import Llama
path, n_before, budgets = sys.argv[1], int(sys.argv[2]), [int(budget) for budget in sys.argv[3:]]

def compute(llm):
    first = int(llm.metadata["gguf_pager.trace.first_token"])
    llm.reset()
    llm.eval([first + i for i in range(690)])

llms = []
for i, budget in enumerate(budgets):
    llms.append(Llama(path, budget=budget, n_ctx=700, n_threads=2, n_threads_batch=2, verbose=False))
    if i < n_before:
        compute(llms[i])
for llm in llms:
    compute(llm)
peak = int(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line))
print(json.dumps({"peak_rss_bytes": peak * 1024, "n_arenas": len({id(llm.pager) for llm in llms})}))
"""
"""Contexts, of as many models as there are different budgets; the first `n_before` compute before the next is opened."""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 0.7 GB: more than twice the budget."""
    path = tmp_path_factory.mktemp("memory") / "trace.gguf"
    make_trace_model.make(path, preset="demo", layers=2)
    assert path.stat().st_size > 2 * BUDGET_BYTES
    yield path
    path.unlink()


def run(model: Path, cap: Cap, n_ubatch: int = 512) -> dict[str, int]:
    return run_script(cap, SCRIPT, model, BUDGET_BYTES, n_ubatch)


def run_script(cap: Cap, script: str, model: Path, *arguments: object) -> dict[str, int]:
    drop_from_page_cache([model])
    command = cap.command([sys.executable, "-c", script, str(model), *map(str, arguments)])
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("n_ubatch", (512, 64, 7))
def test_process_stays_under_its_budget(model: Path, n_ubatch: int) -> None:
    result = run(model, Cap("none", None), n_ubatch)
    assert result["peak_rss_bytes"] <= BUDGET_BYTES * TOLERANCE
    assert result["evictions"] > 0 and result["left_alone"] == 0
    assert result["resident_bytes"] <= result["arena_bytes"] < BUDGET_BYTES
    assert result["peak_rss_bytes"] > 0.75 * BUDGET_BYTES, "the budget is used, not wasted"


@pytest.mark.parametrize(("budgets", "n_before"), (
    ((460_000_000,) * 2, 0), ((460_000_000,) * 2, 1), ((760_000_000,) * 4, 0), ((760_000_000,) * 4, 2),
    ((BUDGET_BYTES, 700_000_000), 0), ((BUDGET_BYTES, 700_000_000), 1),
))
def test_several_contexts_stay_under_their_budget(model: Path, budgets: tuple[int, ...], n_before: int) -> None:
    """Each takes 140 MB, and touches most of that with its first batch: not a byte of it was resident when the next was sized."""
    result = run_script(Cap("none", None), SEVERAL, model, n_before, *budgets)
    assert result["n_arenas"] == len(set(budgets))
    assert 0.8 * budgets[-1] < result["peak_rss_bytes"] <= budgets[-1] * TOLERANCE


LONG = """
import json, sys
from pathlib import Path
from gguf_pager import BudgetError, Llama
path, budget, n_ctx, n_ubatch, n_further = sys.argv[1], *map(int, sys.argv[2:])
given = dict(budget=budget, n_threads=2, n_threads_batch=2, verbose=False)
llm, is_refused = Llama(path, n_ctx=n_ctx, n_batch=n_ubatch, n_ubatch=n_ubatch, **given), False
first = int(llm.metadata["gguf_pager.trace.first_token"])
for at in range(0, n_ctx - n_ubatch, n_ubatch):
    llm.eval([first + (at + i) % 2000 for i in range(n_ubatch)])
try:
    further = Llama(path, n_ctx=n_further, flash_attn=True, **given) if n_further else None
except BudgetError:
    is_refused = True
peak = int(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line))
print(json.dumps({"peak_rss_bytes": peak * 1024, "is_refused": is_refused}))
"""


@pytest.mark.parametrize(("budget_bytes", "n_ctx", "n_ubatch"), ((700_000_000, 4096, 512), (1_090_000_000, 4096, 1024)))
def test_scores_of_a_long_context_are_in_the_budget(model: Path, budget_bytes: int, n_ctx: int, n_ubatch: int) -> None:
    """Without flash attention, which is llama_cpp.Llama's default, they are converted in memory that is taken with the first batch."""
    result = run_script(Cap("none", None), LONG, model, budget_bytes, n_ctx, n_ubatch, 0)
    assert 0.75 * budget_bytes < result["peak_rss_bytes"] <= budget_bytes * TOLERANCE


@pytest.mark.parametrize(("n_further", "is_refused"), ((32768, False), (131072, True)))
def test_cache_of_a_further_context_never_exceeds_the_budget(model: Path, n_further: int, is_refused: bool) -> None:
    """llama.cpp fills it when it makes the context: before slots were given back for it, or it was refused."""
    result = run_script(Cap("none", None), LONG, model, 640_000_000, 700, 512, n_further)
    assert result["is_refused"] == is_refused and result["peak_rss_bytes"] <= 640_000_000 * TOLERANCE


def test_process_lives_under_a_cap_of_its_budget(model: Path) -> None:
    with memory_cap(BUDGET_BYTES) as cap:
        if cap.method == "none":
            pytest.skip(f"no memory cap can be made here: {cap.reason}")
        result = run(model, cap)
        peak = cap.peak_bytes()
    assert result["evictions"] > 0 and result["left_alone"] == 0
    assert peak is None or peak <= BUDGET_BYTES
