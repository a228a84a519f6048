"""What a framework hands to llama_cpp.Llama while we are installed: our arguments are taken, unknown ones refused."""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from conftest import ARGUMENTS, Footprint

import gguf_pager
from gguf_pager import BudgetError, PagerError
from gguf_pager.arguments import check_names

Model = Callable[..., Path]


@pytest.fixture(autouse=True)
def unwrapped_afterwards(zoo_model: Model, footprint: Callable[[Path], Footprint]) -> Any:
    yield
    assert footprint(zoo_model("qwen3moe")).wrapped == ()


def open_stock(path: Path, **given: Any) -> llama_cpp.Llama:
    """As LangChain, LlamaIndex and others do with their `model_kwargs`."""
    return llama_cpp.Llama(model_path=str(path), **ARGUMENTS | given)


def test_budget_and_options_of_the_one_model_go_before_the_installed(zoo_model: Model) -> None:
    path = zoo_model("qwen3moe")
    with gguf_pager.install(budget="min", policy="lru") as installed:
        first, second = open_stock(path), open_stock(path, budget="100%", n_readers=3)
        pagers = installed.pagers
        assert [pager.options.policy for pager in pagers] == ["lru", "lru"], "what is not given is as installed"
        assert pagers[1].n_slots > pagers[0].n_slots and pagers[1].options.n_readers == 3
        first.close()
        second.close()


@pytest.mark.parametrize(("given", "error", "words"), (
    ({"budgt": "25%"}, TypeError, "Did you mean budget"),
    ({"n_reader": 3}, TypeError, "Did you mean n_readers"),
    ({"budget": "25 percent"}, BudgetError, "not understood"),
    ({"policy": "fifo"}, PagerError, "does not exist"),
))
def test_what_nobody_knows_is_refused(zoo_model: Model, given: dict[str, Any], error: type[Exception], words: str) -> None:
    with gguf_pager.install(budget="min"), pytest.raises(error, match=words):
        open_stock(zoo_model("qwen3moe"), **given)


def test_arguments_of_earlier_versions_are_swallowed_as_by_stock(zoo_model: Model) -> None:
    """LangChain hands them over whether or not its user has given them."""
    with gguf_pager.install(budget="min") as installed:
        llm = open_stock(zoo_model("qwen3moe"), n_parts=-1, f16_kv=True)
        assert len(installed.pagers) == 1
        llm.close()


def test_stock_is_stock_when_nobody_has_installed(zoo_model: Model) -> None:
    llm = open_stock(zoo_model("qwen3moe"), budget="min", whatever=1)
    assert not hasattr(llm, "pager")
    llm.close()


def test_signature_stays_readable_for_frameworks() -> None:
    before = inspect.signature(llama_cpp.Llama.__init__)
    with gguf_pager.install(budget="min"):
        assert inspect.signature(llama_cpp.Llama.__init__) == before


def test_subclass_of_stocks_is_paged_too(zoo_model: Model) -> None:
    class Theirs(llama_cpp.Llama):  # type: ignore[misc]
        def __init__(self, **given: Any) -> None:
            super().__init__(**given)

    with gguf_pager.install(budget="min") as installed:
        llm = Theirs(model_path=str(zoo_model("qwen3moe")), budget="60%", **ARGUMENTS)
        assert len(installed.pagers) == 1
        llm.close()


MEASURE = """
import json, sys
import gguf_pager
gguf_pager.Llama
import llama_cpp
kind, path, budget, logits_all = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "all"
given = dict(n_ctx=8192, n_batch=64, n_threads=1, verbose=False, logits_all=logits_all)
if kind == "ours":
    llm = gguf_pager.Llama(path, budget=budget, **given)
    pager = llm.pager
else:
    installed = gguf_pager.install(budget=budget)
    llm = llama_cpp.Llama(path, **given)
    pager = installed.pagers[0]
pager.wait_present()
llm.eval(list(range(5, 69)))
if logits_all:
    llm.scores.fill(0)  # as a long text would
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
print(json.dumps({"arena": pager.arena_bytes, "peak": peak, "scores": llm.scores.nbytes}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize("kind", ("ours", "installed"))
def test_scores_that_llama_is_about_to_keep_are_counted(tmp_path: Path, kind: str) -> None:
    """llama_cpp.server and guidance say logits_all by themselves: 900 MiB became 1,297 under install()."""
    import make_trace_model

    path = tmp_path / "model.gguf"
    make_trace_model.make(path, "tiny", layers=6, experts=64, n_ff=512)
    budget = 170 << 20

    def measured(logits_all: str) -> dict[str, int]:
        done = subprocess.run([sys.executable, "-c", MEASURE, kind, str(path), str(budget), logits_all],
                              capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr[-800:]
        return dict(json.loads(done.stdout))

    without, kept = measured("last"), measured("all")
    assert kept["scores"] > 10 << 20
    assert without["arena"] - kept["arena"] > kept["scores"] * 0.9
    assert max(without["peak"], kept["peak"]) <= budget * 1.03


def test_llama_cpps_own_server_hands_over_nothing_that_is_refused() -> None:
    """It was: `rpc_servers`, which llama_cpp.Llama swallows, so that the server could not be used with install()."""
    tree = ast.parse((Path(llama_cpp.__file__).parent / "server" / "model.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and any(
        keyword.arg == "n_gpu_layers" for keyword in node.keywords)]
    assert calls
    for call in calls:
        check_names({keyword.arg: None for keyword in call.keywords if keyword.arg})
