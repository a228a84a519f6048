"""Open, use and close, hundreds of times: memory, threads and descriptors end where they began."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ARGUMENTS, footprint_of, settled_footprint_of, some_tokens
from test_install import decode, low_level

import gguf_pager
from gguf_pager import BudgetError, PagerIOError
from gguf_pager.memory import probe

Model = Callable[..., Path]

WARM_UP = 40
"""Cycles after which the heap has found its size: stock llama_cpp.Llama grows by 6 MB in its first forty, too."""

BOUND_BYTES = 2 << 20
"""Growth allowed over 200 cycles, ten kilobytes each: a cycle's slots (350 kB each) and a tap's tables (12 kB) are
larger, and what was measured is 0.1 MB in all. Over 100 cycles only the slots would be seen, and a context's buffers."""


def live_bytes() -> int:
    """What is resident once all that was freed is given back: opening a model gives back, too, and leaves room in the heap
    of a long test run that fills again without anything leaking.
    """
    gc.collect()
    probe.give_back_free_memory()
    return probe.process_memory().resident_bytes


def check_constant(cycle: Callable[[], None], n_cycles: int, folder: Path) -> None:
    for _ in range(WARM_UP):
        cycle()
    resident_bytes, before = live_bytes(), footprint_of(folder)
    for _ in range(n_cycles):
        cycle()
    assert live_bytes() - resident_bytes < BOUND_BYTES
    assert settled_footprint_of(folder, before) == before


@pytest.mark.parametrize(("lock_dense", "n_cycles"), (("auto", 200), ("copy", 100)))
def test_opening_and_closing_leaks_nothing(zoo_model: Model, lock_dense: str, n_cycles: int) -> None:
    path = zoo_model("qwen3moe")

    def cycle() -> None:
        llm = gguf_pager.Llama(str(path), budget="60%", lock_dense=lock_dense, **ARGUMENTS)
        llm.eval(some_tokens(4))
        llm.close()

    check_constant(cycle, n_cycles, path)


def test_contexts_on_one_model_leak_nothing(zoo_model: Model) -> None:
    path = zoo_model("gpt-oss")

    def cycle() -> None:
        with low_level(path) as (model, context):
            decode(model, context, some_tokens(4))

    with gguf_pager.install(budget="60%") as installed:
        check_constant(cycle, 100, path)
        assert installed.pagers == [] and len(installed._request.opened) == 0


def test_refused_budgets_leak_nothing(zoo_model: Model) -> None:
    path = zoo_model("gpt-oss")

    def cycle() -> None:
        with contextlib.suppress(BudgetError):
            gguf_pager.Llama(str(path), budget=1, **ARGUMENTS)
            raise AssertionError

    check_constant(cycle, 60, path)


def test_failed_reads_leak_nothing(zoo_model: Model, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(zoo_model("gpt-oss").read_bytes())
    llm = gguf_pager.Llama(str(path), budget="min", **ARGUMENTS)
    size_bytes = path.stat().st_size

    def cycle() -> None:
        os.truncate(path, size_bytes + 1)
        with contextlib.suppress(PagerIOError):
            llm.eval(some_tokens(2))
            raise AssertionError
        os.truncate(path, size_bytes)
        llm.reset()
        llm.eval(some_tokens(2))

    check_constant(cycle, 200, tmp_path)
    llm.close()
