"""Fewer threads beside other programs: what the system counts is read right, and tokens stay what they are."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import some_tokens
from llama_cpp import llama_cpp as low

from gguf_pager import contention
from gguf_pager.contention import Adaptation, Counts
from gguf_pager.hooks import hooks
from gguf_pager.pace import CONTENDED, Look

Factory = Callable[..., Any]

SPIN = [sys.executable, "-c", "while True: pass"]

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and keeps threads to processors, as Linux has it")


@pytest.fixture
def one_processor() -> Iterator[None]:
    """This thread, and processes that it starts, on one processor."""
    usable = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(usable)})
    yield
    os.sched_setaffinity(0, usable)


@pytest.fixture
def spinner() -> Iterator[None]:
    """A program that never waits, on the processors of this thread."""
    process = subprocess.Popen(SPIN)
    yield
    process.kill()
    process.wait()


def adaptation_of(llm: Any) -> Adaptation:
    found = hooks.contexts[int(llm.ctx)].adaptation
    assert found is not None
    return found


def lower(llm: Any) -> None:
    """Let the controller try fewer threads for the next tokens, as it does after what it is told here."""
    adaptation = adaptation_of(llm)
    pace = adaptation.pace
    pace.limit(low.llama_n_threads(llm.ctx))
    pace.heed(Look(waited=1.0))
    for _ in range(3):
        pace.note(1e6)
    assert pace.n_threads < low.llama_n_threads(llm.ctx)


# ---- what is counted ----

@LINUX
@pytest.mark.alone
def test_program_beside_us_is_noticed(one_processor: None, spinner: None) -> None:
    before = Counts()
    while time.monotonic() - before.at_s < 1:
        pass
    look = Counts().since(before)
    assert look.n_processors == 1
    assert look.waited is not None and look.waited > CONTENDED
    assert look.others is not None and look.others > 0.2
    assert look.idle is not None and look.idle < 0.2


@LINUX
@pytest.mark.alone
def test_time_asleep_is_not_waiting(one_processor: None) -> None:
    before = Counts()
    time.sleep(0.3)
    look = Counts().since(before)
    assert look.waited is not None and look.waited < CONTENDED


@LINUX
def test_what_the_system_does_not_say_is_not_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = Counts()
    (task := tmp_path / str(os.getpid())).mkdir()
    monkeypatch.setattr(contention, "_TASKS", str(tmp_path))
    for text in (None, "", "0 0 0\n", "nonsense 1 2\n"):  # of kernels built without it
        if text is not None:
            (task / "schedstat").write_text(text)
        time.sleep(0.01)
        look = Counts().since(before)
        assert look.waited is None and look.n_processors == len(os.sched_getaffinity(0))
    monkeypatch.setattr(contention, "_STAT", str(tmp_path / "none"))
    assert Counts().since(before) == Look()
    (tmp_path / "empty").touch()
    monkeypatch.setattr(contention, "_STAT", str(tmp_path / "empty"))
    assert Counts().since(before) == Look()


def test_no_time_says_nothing() -> None:
    counts = Counts()
    assert counts.since(counts) == Look()


# ---- the number of threads ----

def test_only_the_token_is_computed_with_fewer(paged: Factory, trace_model: Path) -> None:
    llm = paged(trace_model, "60%", n_threads=3, n_threads_batch=2)
    llm.eval(some_tokens(3))
    assert llm.pager.stats().n_threads is None, "a batch has its own number"
    llm.eval(some_tokens(1))
    assert llm.pager.stats().n_threads == 3
    lower(llm)
    llm.eval(some_tokens(1))
    assert llm.pager.stats().n_threads in (1, 2)
    assert (low.llama_n_threads(llm.ctx), low.llama_n_threads_batch(llm.ctx)) == (3, 2)


def test_user_changes_the_number(paged: Factory, trace_model: Path) -> None:
    llm = paged(trace_model, "60%", n_threads=3)
    lower(llm)
    low.llama_set_n_threads(llm.ctx, 2, 1)
    llm.eval(some_tokens(1))
    assert llm.pager.stats().n_threads == 2
    lower(llm)
    low.llama_set_n_threads(llm.ctx, 1, 1)
    llm.eval(some_tokens(1))
    assert low.llama_n_threads(llm.ctx) == 1


def test_threads_come_back_when_decoding_fails(paged: Factory, trace_model: Path) -> None:
    pager, threads = paged(trace_model, "60%").pager, [4]

    def end() -> int:
        assert threads == [1]
        raise KeyboardInterrupt

    adaptation = Adaptation(pager, lambda: threads[0], lambda n: threads.__setitem__(0, n))
    adaptation.pace.limit(4)
    adaptation.pace.heed(Look(1.0, 0.0, 3.0, 4))
    for _ in range(3):
        adaptation.pace.note(1.0)
    with pytest.raises(KeyboardInterrupt):
        adaptation.compute(end)
    assert threads == [4]


def test_threads_come_back_after_an_interrupt_anywhere(paged: Factory, trace_model: Path) -> None:
    pager, threads, interrupts = paged(trace_model, "60%").pager, [4], []

    def set_threads(n: int) -> None:
        if n in interrupts:
            interrupts.remove(n)
            raise KeyboardInterrupt
        threads[0] = n

    for at in (1, 4):  # when they are lowered, and when they come back
        adaptation = Adaptation(pager, lambda: threads[0], set_threads)
        adaptation.pace.limit(4)
        adaptation.pace.heed(Look(1.0, 0.0, 3.0, 4))
        for _ in range(3):
            adaptation.pace.note(1.0)
        interrupts.append(at)
        with pytest.raises(KeyboardInterrupt):
            adaptation.compute(lambda: 0)
        assert adaptation.compute(lambda: 0) == 0 and threads == [4]


def test_what_another_thread_sets_meanwhile_stays(paged: Factory, trace_model: Path) -> None:
    pager, threads = paged(trace_model, "60%").pager, [4]

    def compute() -> int:
        threads[0] = 8
        return 0

    adaptation = Adaptation(pager, lambda: threads[0], lambda n: threads.__setitem__(0, n))
    adaptation.pace.limit(4)
    adaptation.pace.heed(Look(1.0, 0.0, 3.0, 4))
    for _ in range(3):
        adaptation.pace.note(1.0)
    assert adaptation.compute(compute) == 0 and threads == [8]


def test_left_alone_where_results_would_change(paged: Factory, trace_model: Path) -> None:
    """Flash attention adds up one share of the positions per thread."""
    for arguments in ({"adapt_threads": False}, {"flash_attn": True}):
        llm = paged(trace_model, "60%", n_threads=2, **arguments)
        assert hooks.contexts[int(llm.ctx)].adaptation is None
        llm.eval(some_tokens(1))
        assert llm.pager.stats().n_threads is None
    assert adaptation_of(paged(trace_model, "60%", n_threads=2))


# ---- results ----

ARCHITECTURES = ("qwen3moe", "gpt-oss", "deepseek2", "qwen3next", "granitehybrid", "llama4")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_bits_do_not_depend_on_the_number(arch: str, pair: Factory, logits: Factory, zoo_model: Factory) -> None:
    """Single tokens with any number of threads, between batches that keep theirs, and all with one."""
    ours, stock = pair(zoo_model(arch), logits_all=True, n_threads=1, n_threads_batch=2)
    dice, tokens = random.Random(arch), some_tokens(100)
    expected = logits(stock, tokens, (64, 1, 9, 1, 2))
    at = 0
    for length in (64, 1, 9, 1, 2, *[1] * 23):
        low.llama_set_n_threads(ours.ctx, dice.randint(1, 5), 2)
        ours.eval(tokens[at : at + length])
        at += length
    assert at == len(tokens)
    assert np.array_equal(np.array(ours.scores[: len(tokens)]), expected)


BUSY = """\
import os, subprocess, sys, time
os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:2]))
import numpy as np
from conftest import some_tokens, unpacked
import gguf_pager
Stock = gguf_pager.Llama.__mro__[1]
arguments = dict(n_ctx=128, n_batch=64, n_threads=2, n_threads_batch=2, logits_all=True, verbose=False)
tokens = some_tokens(60)

def pass_over(llm, used=None):
    llm.reset()
    for token in tokens:
        llm.eval([token])
        if used is not None:
            used.add(llm.pager.n_threads)
    return np.array(llm.scores[: len(tokens)])

with unpacked():
    stock = Stock(sys.argv[1], **arguments)
expected = pass_over(stock)
ours = gguf_pager.Llama(sys.argv[1], budget="60%", **arguments)
spinner = subprocess.Popen([sys.executable, "-c", "while True: pass"])
try:
    used, begun = set(), time.monotonic()
    while used != {1, 2} and time.monotonic() - begun < 60:
        assert np.array_equal(pass_over(ours, used), expected)
    for _ in range(5):
        assert np.array_equal(pass_over(ours, used), expected)
finally:
    spinner.kill()
print(*sorted(used))
"""


@LINUX
@pytest.mark.alone
def test_beside_a_program_that_spins(trace_model: Path) -> None:
    """Both processors are ours, and a third program wants one: fewer threads are tried, and the tokens are stock's."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one processor: there are no fewer threads than one")
    folder = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", BUSY, str(trace_model)], capture_output=True, text=True, timeout=240, check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join((str(folder), str(folder.parent / "scripts")))})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1", "2"]
