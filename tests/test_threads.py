"""A context's threads where ggml was built without OpenMP. This build has it mostly: then ggml is told to use ours and does
not, so that what is shown is that they come, go, and change nothing; a build without shows the rest with the same tests."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from conftest import some_tokens
from llama_cpp import llama_cpp as low

from gguf_pager import threads
from gguf_pager.hooks import hooks
from gguf_pager.threads import Threads

Factory = Callable[..., Any]

HAS_OPENMP = threads.are_kept()  # then a pool of ggml's has no threads of its own


@pytest.fixture
def not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if ggml kept no threads, whether it does or not."""
    monkeypatch.setattr(threads, "are_kept", lambda: False)


def threads_of(llm: Any) -> Threads:
    return hooks.contexts[int(llm.ctx)].threads


def n_threads_with(llm: Any) -> int:
    llm.pager.wait_present()  # which a thread sees to
    return psutil.Process().num_threads()


def test_ggml_is_left_alone_where_it_keeps_its_threads(paged: Factory, trace_model: Path) -> None:
    llm = paged(trace_model, "60%", n_threads=2)
    llm.eval(some_tokens(3))
    assert threads_of(llm).n_threads == (0 if threads.are_kept() else 2)


def test_tokens_are_stocks(not_kept: None, pair: Factory, logits: Factory, trace_model: Path) -> None:
    ours, stock = pair(trace_model, "60%", logits_all=True, n_threads=2, n_threads_batch=3)
    assert threads_of(ours).n_threads == 3
    tokens = some_tokens(40)
    assert np.array_equal(logits(ours, tokens, (24,)), logits(stock, tokens, (24,)))


def test_threads_stay_until_the_model_is_closed(not_kept: None, paged: Factory, trace_model: Path) -> None:
    counts = []
    for n_threads_batch in (1, 1, 5):
        llm = paged(trace_model, "60%", n_threads=1, n_threads_batch=n_threads_batch)
        assert threads_of(llm).n_threads == (0 if n_threads_batch == 1 else 5), "one thread is the caller's own"
        counts.append(n_threads_with(llm))
    n_readers = counts[1] - counts[0]
    assert counts[2] - counts[1] == n_readers + (0 if HAS_OPENMP else 4)
    llm.close()
    assert n_threads_with(llm) == counts[1]


def test_more_can_be_asked_for_later(not_kept: None, pair: Factory, logits: Factory, trace_model: Path) -> None:
    ours, stock = pair(trace_model, "60%", logits_all=True, n_threads=2, n_threads_batch=2)
    tokens = some_tokens(30)
    for n_threads, provided in ((2, 2), (4, 4), (1, 4)):
        for llm in (ours, stock):
            low.llama_set_n_threads(llm.ctx, n_threads, n_threads)
            llm.reset()
        assert np.array_equal(logits(ours, tokens, (16,)), logits(stock, tokens, (16,)))
        assert threads_of(ours).n_threads == provided


def test_fewer_can_compute(not_kept: None, pair: Factory, logits: Factory, trace_model: Path) -> None:
    """As beside other programs: those that are left over stay, and come back."""
    ours, stock = pair(trace_model, "60%", logits_all=True, n_threads=1, n_threads_batch=4)
    tokens = some_tokens(40)
    expected = logits(stock, tokens, (16,))
    ours.eval(tokens[:16])
    for at in range(16, 40):
        low.llama_set_n_threads(ours.ctx, (4, 1, 3, 2)[at % 4], 4)
        ours.eval(tokens[at : at + 1])
    assert np.array_equal(np.array(ours.scores[:40]), expected)
    assert threads_of(ours).n_threads == 4


def test_fork_closes_without_them(not_kept: None, paged: Factory, trace_model: Path) -> None:
    llm = paged(trace_model, "60%", n_threads=3)
    llm.eval(some_tokens(3))
    pid = os.fork()
    if pid == 0:
        signal.alarm(10)  # a hang ends here
        llm.close()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    llm.eval(some_tokens(3))


def test_unknown_struct_is_left_alone(not_kept: None, paged: Factory, trace_model: Path, monkeypatch: pytest.MonkeyPatch,
                                      caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(threads, "_DEFAULT_POLL", 51)
    with caplog.at_level(logging.INFO, "gguf_pager"):
        llm = paged(trace_model, "60%", n_threads=2)
    assert threads_of(llm).n_threads == 0 and "left as they are" in caplog.text
    llm.eval(some_tokens(3))
