"""An interrupt at any line of our code and of llama_cpp's: what is opened, asked or installed next is as if there had been none."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from conftest import ARGUMENTS, Factory, Footprint, some_tokens
from llama_cpp import _logger
from llama_cpp import llama_cpp as low
from test_errors import touch
from test_files import current_callbacks
from test_install import decode, low_level
from test_resume import OTHER, PROMPT, greedy

import gguf_pager
from gguf_pager import deferral, fingerprint, llama_log
from gguf_pager.hooks import hooks

Model = Callable[..., Path]
FOLDERS = (os.path.dirname(llama_cpp.__file__), os.path.dirname(gguf_pager.__file__))

STEP = int(os.environ.get("GGUF_PAGER_INTERRUPT_STEP", "15"))
"""Every ninth line, to save ten minutes; 1 for all."""

pytestmark = pytest.mark.filterwarnings(  # llama_cpp frees samplers in __del__, where an interrupt is only told
    "ignore::pytest.PytestUnraisableExceptionWarning")


def interrupted_at(k: int, work: Callable[[], Any], folders: tuple[str, ...] = FOLDERS) -> bool:
    """Raise KeyboardInterrupt at the k-th line of these folders that runs, the first time that it does.

    Return whether there was such a line.
    """
    seen: set[tuple[str, int]] = set()
    has_struck = [False]

    def trace(frame: Any, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(folders) or frame.f_code.co_name in ("apply_func", "__del__"):
            return None  # what runs in there is lost in ctypes, or in the destructor, and is no interrupt of the work
        if event == "line" and not has_struck[0]:
            seen.add((frame.f_code.co_filename, frame.f_lineno))
            if len(seen) == k:
                has_struck[0] = True
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    with contextlib.suppress(KeyboardInterrupt):  # one that strikes in a generator's end is told, not raised
        try:
            work()
        finally:
            sys.settrace(None)
    return has_struck[0]


@pytest.mark.parametrize("arch", ("qwen3moe", "qwen3next"))
def test_generation(zoo_model: Model, paged: Factory, arch: str) -> None:
    llm = paged(zoo_model(arch), logits_all=True)
    expected, other = greedy(llm, PROMPT, 3), greedy(llm, OTHER, 3)
    k = 1
    while interrupted_at(k, functools.partial(greedy, llm, PROMPT if k % 2 else OTHER, 3)):
        assert greedy(llm, PROMPT, 3) == expected, k
        assert greedy(llm, OTHER, 3) == other, k
        k += STEP
    assert k > 80


def open_one(path: Path) -> gguf_pager.Llama:
    return gguf_pager.Llama(str(path), budget="min", **ARGUMENTS)


def check_next_is_paged(path: Path, k: int) -> None:
    gc.collect()  # an interrupt's traceback holds what it has met
    llm = open_one(path)
    assert llm.pager is not None and llm.not_paged_reason is None, k
    llm.eval(some_tokens(2))
    assert llm.pager.stats().misses > 0, k
    llm.close()
    if k % 8 == 0:
        theirs = llama_cpp.Llama(str(path), **ARGUMENTS)
        assert not hooks.contexts, f"{k}: nobody has asked for this one to be paged"
        theirs.close()


OUR_OWN = (os.path.dirname(gguf_pager.__file__),)


def test_opening(zoo_model: Model, footprint: Callable[[Path], Footprint]) -> None:
    path = zoo_model("qwen3moe")
    check_next_is_paged(path, 0)
    before, k = footprint(path).wrapped, 1
    while interrupted_at(k, lambda: open_one(path).close(), OUR_OWN):
        check_next_is_paged(path, k)
        assert footprint(path).wrapped == before == (), k
        assert not hooks.models, k
        k += STEP
    assert k > 200


def test_listening_to_the_log(zoo_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an interrupt leaves of it. It called itself at every line that llama.cpp said from then on, and later it was never put
    in place again: the next loads called the file /proc/self/fd/N."""
    path, k, lost, said = zoo_model("qwen3moe"), 1, list[object](), list[bytes]()
    callback = low.llama_log_callback(lambda level, text, data: said.append(text))
    monkeypatch.setattr(sys, "unraisablehook", lambda told: lost.append(told.exc_type))
    try:
        while interrupted_at(k, lambda: open_one(path).close(), (str(llama_log.__file__),)):
            lost.clear()  # the interrupt itself, where it has struck in a callback
            low.llama_log_set(callback, None)
            before = current_callbacks()
            open_one(path).close()
            assert current_callbacks() == before, k
            assert not lost, k
            assert any(str(path).encode() in text for text in said), k
            assert not any(b"/proc/self/fd" in text for text in said), k
            said.clear()
            low.llama_log_set(_logger.llama_log_callback, ctypes.c_void_p(0))
            k += 1
    finally:
        low.llama_log_set(_logger.llama_log_callback, ctypes.c_void_p(0))
    assert k > 25


def test_comparing_a_touched_file(zoo_model: Model, tmp_path: Path) -> None:
    """In the middle of a graph, where no exception can pass: one before the first line of ours was lost."""
    path, tokens = Path(shutil.copy(zoo_model("qwen3moe"), tmp_path / "model.gguf")), some_tokens(5)
    count, k, outcomes = [-10_000], 1, list[str]()

    @low.ggml_backend_sched_eval_callback
    def meddle(address: int, ask: bool, data: int | None) -> bool:
        count[0] += 1
        if count[0] == 20:
            touch(path)
        return False

    with gguf_pager.install(budget="min"), low_level(path, cb_eval=meddle) as (model, context):
        memory = low.llama_get_memory(context)
        decode(model, context, tokens[:4])
        expected = decode(model, context, tokens[4:], 4)

        def work() -> None:
            assert low.llama_memory_seq_rm(memory, 0, 4, -1)
            count[0] = 0
            try:
                assert (decode(model, context, tokens[4:], 4) == expected).all()
                outcomes.append("done")
            except KeyboardInterrupt:
                outcomes.append("interrupted")

        while interrupted_at(k, work, (str(fingerprint.__file__),)):
            assert outcomes.pop() == "interrupted", k
            work()
            assert outcomes.pop() == "done", k
            k += 1
    assert k > 40


def test_keeping_a_ctrl_c(zoo_model: Model) -> None:
    """Who keeps it is put in the place of the handler, and was left there."""
    path, k = zoo_model("qwen3moe"), 1
    while interrupted_at(k, lambda: open_one(path).close(), (str(deferral.__file__),)):
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, k
        k += 1
    assert k > 15
    check_next_is_paged(path, k)


def test_closing(zoo_model: Model, footprint: Callable[[Path], Footprint]) -> None:
    path, k = zoo_model("qwen3moe"), 1
    while True:
        llm = open_one(path)
        llm.eval(some_tokens(2))
        was_interrupted = interrupted_at(k, llm.close)
        llm.close()
        del llm
        check_next_is_paged(path, k)
        assert footprint(path).wrapped == (), k
        if not was_interrupted:
            break
        k += STEP
    assert k > 20


def test_installing_and_uninstalling(zoo_model: Model, footprint: Callable[[Path], Footprint]) -> None:
    path, k = zoo_model("qwen3moe"), 1

    def work() -> None:
        with gguf_pager.install(budget="min"):
            pass

    while interrupted_at(k, work, OUR_OWN):
        if hooks.installed:  # what an interrupt has kept from being taken back can be taken back
            gguf_pager.uninstall()
        assert not hooks.installed, k
        check_next_is_paged(path, k)
        assert footprint(path).wrapped == (), k
        k += 1
    assert k > 40
