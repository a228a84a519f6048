"""A signal that comes while a prompt is computed is handled then; what its handler raises ends the decode, and nothing is
wrong afterwards. Counted in tokens, not in seconds, where it can be: machines differ."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import llama_cpp
import numpy as np
import pytest
from conftest import Factory, evaluate, some_tokens
from test_install import decode, low_level

import gguf_pager

Model = Callable[..., Path]

N_TOKENS = 4000
"""5 s or more at a token a time."""

N_BEGUN = 20
"""Tokens of it that are computed before it is interrupted."""

LONG = {"n_ctx": N_TOKENS + 96, "n_batch": N_TOKENS, "n_ubatch": 1}


class Alarm(Exception):
    """Raised by a handler of ours."""


@contextlib.contextmanager
def alarm(handler: Callable[[], None]) -> Iterator[None]:
    """Call the handler by SIGALRM, again and again."""

    def handle(number: int, frame: FrameType | None) -> None:
        handler()

    before = signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def raising(pager: gguf_pager.Pager) -> Callable[[], None]:
    """Return a handler that raises once a prompt is begun."""
    first = pager.stats().tokens

    def raise_alarm() -> None:
        if pager.stats().tokens >= first + N_BEGUN:
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise Alarm("the user's own")

    return raise_alarm


@pytest.mark.parametrize("arch", ["qwen3moe", "jamba"])
def test_exception_of_a_handler_ends_a_prompt_and_the_next_has_the_same_bits(
    zoo_model: Model, paged: Factory, arch: str
) -> None:
    llm = paged(zoo_model(arch), **LONG, logits_all=True)
    tokens = some_tokens(N_TOKENS)
    expected = evaluate(llm, tokens[:24], [20])
    llm.reset()
    before = llm.pager.stats().tokens
    with alarm(raising(llm.pager)), pytest.raises(Alarm, match="the user's own") as raised:
        llm.eval(tokens)
    assert N_BEGUN <= llm.pager.stats().tokens - before < N_TOKENS / 2
    assert "raise_alarm" in [entry.name for entry in raised.traceback]
    llm.reset()
    np.testing.assert_array_equal(evaluate(llm, tokens[:24], [20]), expected)


def test_handler_that_only_notes_changes_nothing(zoo_model: Model, paged: Factory) -> None:
    n_tokens = N_TOKENS // 3
    llm = paged(zoo_model("qwen3moe"), **LONG)
    tokens = some_tokens(n_tokens)
    llm.eval(tokens)
    expected = np.array(llm._ctx.get_logits()[: llm.n_vocab()])
    llm.reset()
    before, seen = llm.pager.stats().tokens, []
    with alarm(lambda: seen.append(llm.pager.stats().tokens - before)):
        llm.eval(tokens)
    assert llm.n_tokens == n_tokens
    np.testing.assert_array_equal(np.array(llm._ctx.get_logits()[: llm.n_vocab()]), expected)
    assert any(0 < n < n_tokens for n in seen), "the handler ran while the prompt was computed"


def test_decode_of_a_worker_thread_goes_on_and_the_main_thread_is_interrupted(zoo_model: Model, paged: Factory) -> None:
    n_tokens = N_TOKENS // 3
    llm = paged(zoo_model("qwen3moe"), **LONG)
    tokens = some_tokens(n_tokens)
    worker = threading.Thread(target=llm.eval, args=[tokens])
    with pytest.raises(Alarm), alarm(raising(llm.pager)):
        worker.start()
        time.sleep(60)
    assert worker.is_alive(), "the main thread was interrupted while the other computed"
    worker.join(60)
    assert llm.n_tokens == n_tokens


def test_low_level_decode_is_interrupted_and_the_context_goes_on(zoo_model: Model) -> None:
    tokens = some_tokens(N_TOKENS)
    with gguf_pager.install(budget="min") as installed, low_level(zoo_model("qwen3moe"), **LONG) as (model, context):
        rows = [decode(model, context, tokens[:10]), decode(model, context, tokens[10:12], 10)]
        with alarm(raising(installed.pagers[0])), pytest.raises(Alarm):
            decode(model, context, tokens[12:], 12)
        assert installed.pagers[0].stats().tokens < N_TOKENS / 2
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(context), 0, 12, -1)
        rows.append(decode(model, context, tokens[12:20], 12))
    with gguf_pager.install(budget="min"), low_level(zoo_model("qwen3moe"), **LONG) as (model, context):
        expected = [decode(model, context, tokens[:10]), decode(model, context, tokens[10:12], 10),
                    decode(model, context, tokens[12:20], 12)]
    np.testing.assert_array_equal(np.concatenate(rows), np.concatenate(expected))


CLOSES = """
import signal, sys
import gguf_pager
path, n, n_begun, end = sys.argv[1], *map(int, sys.argv[2:4]), sys.argv[4]
llm = gguf_pager.Llama(path, budget="min", n_ctx=n + 96, n_batch=n, n_ubatch=1, n_threads=1, verbose=False)
pager = llm.pager

def close(*_):
    if pager.stats().tokens >= n_begun:
        signal.setitimer(signal.ITIMER_REAL, 0)
        llm.close()
        print(pager.is_open)
        if end == "exit":
            sys.exit(7)

signal.signal(signal.SIGALRM, close)
signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
try:
    llm.eval([5 + i % 290 for i in range(n)])
except gguf_pager.EngineError as error:
    print(error)
finally:
    print(pager.is_open, pager.stats().tokens)
"""


@pytest.mark.parametrize(("end", "code"), [("exit", 7), ("go on", 0)])
def test_handler_may_close_the_model_that_computes(zoo_model: Model, end: str, code: int) -> None:
    """Services close what they have on SIGTERM. It is freed when nobody computes with it any more."""
    n_tokens = N_TOKENS if end == "exit" else N_TOKENS // 4
    done = subprocess.run([sys.executable, "-c", CLOSES, str(zoo_model("qwen3moe")), str(n_tokens), str(N_BEGUN), end],
                          capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, done.stderr
    while_computing, *message, afterwards = done.stdout.splitlines()
    assert while_computing == "True" and message == ([] if code else ["This Llama is closed: make a new one."])
    is_open, n_computed = afterwards.split()
    assert is_open == "False" and (int(n_computed) < n_tokens / 2 if code else int(n_computed) == n_tokens)


SLOW_MEMORY = """
#include <sys/syscall.h>
#include <unistd.h>
int madvise(void *at, unsigned long n_bytes, int advice) {
    if (advice == 23) { sleep(3); }
    return (int) syscall(SYS_madvise, at, n_bytes, advice);
}
"""

WAITS_FOR_MEMORY = """
import signal, sys
import gguf_pager
llm = gguf_pager.Llama(sys.argv[1], budget="min", n_ctx=64, n_batch=16, n_threads=1, verbose=False)
class Alarm(Exception): pass
def handle(*_): raise Alarm
signal.signal(signal.SIGALRM, handle)
signal.setitimer(signal.ITIMER_REAL, 0.2)
try:
    llm.pager.wait_present()
except Alarm:
    print(llm.pager.native().is_present())
llm.pager.wait_present()
print(llm.pager.native().is_present())
"""


def test_waiting_for_the_arena_is_interrupted(zoo_model: Model, tmp_path: Path) -> None:
    """It takes a second or more per gigabyte on a virtual machine, and another model's opening waits for it."""
    compiler = shutil.which(os.environ.get("CC") or "gcc") or shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("there is no C compiler, or no LD_PRELOAD to slow memory down")
    source, library = tmp_path / "memory.c", tmp_path / "memory.so"
    source.write_text(SLOW_MEMORY)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True, timeout=60)
    done = subprocess.run([sys.executable, "-c", WAITS_FOR_MEMORY, str(zoo_model("qwen3moe"))], capture_output=True, text=True,
                          timeout=60, check=False, env={**os.environ, "LD_PRELOAD": str(library)})
    assert (done.returncode, done.stdout) == (0, "False\nTrue\n"), done.stderr


CHILD = """
import os, signal, sys, threading, time
import llama_cpp, gguf_pager
kind, path, n, n_begun = *sys.argv[1:3], *map(int, sys.argv[3:])

def interrupt():
    while pager.stats().tokens < n_begun:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)

settings = {"n_ctx": n + 96, "n_batch": n, "n_ubatch": 1, "n_threads": 1, "verbose": False}
if kind == "install":
    installed = gguf_pager.install(budget="min")
    llm = llama_cpp.Llama(path, **settings)
    pager = installed.pagers[0]
else:
    llm = gguf_pager.Llama(path, budget="min", **settings)
    pager = llm.pager
threading.Thread(target=interrupt).start()
try:
    llm.eval([5 + i % 290 for i in range(n)])
except KeyboardInterrupt:
    print(pager.stats().tokens)
llm.close()
"""


@pytest.mark.parametrize("kind", ["Llama", "install"])
def test_ctrl_c_ends_a_prompt(zoo_model: Model, kind: str) -> None:
    done = subprocess.run([sys.executable, "-c", CHILD, kind, str(zoo_model("qwen3moe")), str(N_TOKENS), str(N_BEGUN)],
                          capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert N_BEGUN <= int(done.stdout) < N_TOKENS / 2


@pytest.mark.parametrize("format_arguments", [(), ("--json",)])
def test_ctrl_c_ends_a_run_with_its_figures(zoo_model: Model, tmp_path: Path, format_arguments: tuple[str, ...]) -> None:
    prompt = tmp_path / "prompt"
    prompt.write_text("word " * (N_TOKENS // 2))
    arguments = ["run", str(zoo_model("qwen3moe")), "-f", str(prompt), "--budget", "min", "-c", str(4 * N_TOKENS),
                 "-b", str(4 * N_TOKENS), "-ub", "1", "-t", "1", "--progress", *format_arguments]
    with subprocess.Popen([sys.executable, "-m", "gguf_pager", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as child:
        assert child.stderr is not None
        shown = ""
        while "prompt" not in shown:  # what takes longer than a second is said
            shown += os.read(child.stderr.fileno(), 4096).decode()
            assert child.poll() is None, shown
        child.send_signal(signal.SIGINT)
        out, rest = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "Traceback" not in rest
    figures: Any = out if format_arguments else rest
    assert re.search("finish_reason.*interrupt" if format_arguments else r"tok/s|peak", figures), figures + rest
