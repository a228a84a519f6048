"""A Ctrl-C while llama.cpp loads is not lost, whatever Python code it calls meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import llama_cpp
import make_trace_model
import pytest
from conftest import ARGUMENTS
from llama_cpp import _logger
from llama_cpp import llama_cpp as low

import gguf_pager
from gguf_pager.deferral import Deferral
from gguf_pager.hooks import hooks

Model = Callable[..., Path]


@pytest.fixture(autouse=True)
def handler_stays() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    assert signal.getsignal(signal.SIGINT) is before


def interrupt() -> str:
    os.kill(os.getpid(), signal.SIGINT)
    return "done"


def test_interrupt_is_raised_afterwards_and_what_was_made_undone() -> None:
    undone: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        Deferral().call(interrupt, undo=undone.append)
    assert undone == ["done"]


def test_interrupt_is_raised_also_where_the_call_fails() -> None:
    def fail() -> None:
        interrupt()
        raise ValueError

    with pytest.raises(KeyboardInterrupt):
        Deferral().call(fail, undo=lambda _: None)


def test_handler_that_raises_nothing_has_its_say() -> None:
    told: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: told.append(number))
    try:
        assert Deferral().call(interrupt, undo=lambda _: pytest.fail("nothing was raised")) == "done"
    finally:
        signal.signal(signal.SIGINT, before)
    assert told == [signal.SIGINT]


def test_second_interrupt_is_the_handlers_again() -> None:
    def twice() -> None:
        interrupt()
        interrupt()

    with pytest.raises(KeyboardInterrupt):
        Deferral().call(twice, undo=lambda _: None)


def test_other_threads_are_left_alone() -> None:
    found: list[object] = []

    def look() -> None:
        found.append(Deferral().call(lambda: signal.getsignal(signal.SIGINT), undo=lambda _: None))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGINT)]


@pytest.mark.parametrize("budget", ("auto", "min"))
@pytest.mark.parametrize("when", ("load", "context"))
def test_interrupt_in_llama_cpps_own_callback_ends_the_opening(zoo_model: Model, budget: str, when: str) -> None:
    """llama_cpp writes its log in Python: there the exception was printed and lost, and the program went on."""
    words = {"load": b"loaded meta data", "context": b"constructing llama_context"}[when]
    path, struck = str(zoo_model("qwen3moe")), list[bytes]()

    @low.llama_log_callback
    def log(level: int, text: bytes, data: int | None) -> None:
        if words in text and not struck:
            struck.append(text)
            interrupt()

    low.llama_log_set(log, None)
    try:
        with pytest.raises(KeyboardInterrupt):
            gguf_pager.Llama(path, budget=budget, **ARGUMENTS)
        assert struck and not hooks.models
    finally:
        low.llama_log_set(_logger.llama_log_callback, None)
    llm = gguf_pager.Llama(path, budget=budget, **ARGUMENTS)
    llm.eval([1, 2])
    llm.close()


def test_load_that_takes_long_ends_early(tmp_path: Path) -> None:
    """A model that fits is read whole: not to its end."""
    path = tmp_path / "model.gguf"
    make_trace_model.make(path, "tiny", layers=16)
    program = f"""
import os, signal, ctypes, sys
from llama_cpp import llama_cpp as low
import gguf_pager
from gguf_pager import deferral
seen = []
original = deferral.Deferral.__init__
def counting(self):
    original(self)
    inner = self.progress
    def progress(share, data):
        seen.append(share)
        if len(seen) == 3: os.kill(os.getpid(), signal.SIGINT)
        return inner(share, data)
    self.progress = deferral._Progress(progress)
deferral.Deferral.__init__ = counting
try:
    gguf_pager.Llama({str(path)!r}, verbose=False)
except KeyboardInterrupt:
    print("interrupted", len(seen) < 30)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["interrupted", "True"], (done.stdout, done.stderr)


def test_stock_without_us_is_left_alone(zoo_model: Model) -> None:
    handler = signal.getsignal(signal.SIGINT)
    llm = llama_cpp.Llama(str(zoo_model("qwen3moe")), **ARGUMENTS)
    assert signal.getsignal(signal.SIGINT) is handler
    llm.close()
