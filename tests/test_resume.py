"""After a saved state, a failed read or an interrupt: the next answer is the one it would have been."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from conftest import Factory, some_tokens
from llama_cpp import llama_cpp as low
from test_llama import check_equal

import gguf_pager
from gguf_pager import PagerIOError
from gguf_pager.hooks import hooks

Model = Callable[..., Path]
ARCHITECTURES = ("qwen3moe", "gpt-oss", "qwen3next", "jamba", "lfm2moe")
"""Attention; with windows; hybrid, three ways."""
PROMPT, OTHER = some_tokens(12, 3), some_tokens(9, 4)
GREEDY: dict[str, Any] = {"temp": 0.0}


def greedy(llm: llama_cpp.Llama, prompt: list[int], n: int = 8) -> list[int]:
    found = []
    for token in llm.generate(prompt, **GREEDY):
        found.append(token)
        if len(found) == n:
            return found
    raise AssertionError


def last_row(llm: llama_cpp.Llama) -> np.ndarray[Any, Any]:
    return np.ctypeslib.as_array(low.llama_get_logits_ith(llm.ctx, -1), shape=(llm.n_vocab(),)).copy()


def go_on(llm: llama_cpp.Llama, n: int = 6) -> list[int]:
    """Sample, evaluate, sample: as a program does that has its own loop."""
    tokens = []
    for _ in range(n):
        tokens.append(int(llm.sample(**GREEDY)))
        llm.eval(tokens[-1:])
    return tokens


@pytest.fixture
def installed_class() -> Iterator[type[llama_cpp.Llama]]:
    with gguf_pager.install(budget="min"):
        yield llama_cpp.Llama


# ---- states ----

@pytest.mark.parametrize("logits_all", (False, True))
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_loaded_state_is_sampled_from_at_once(zoo_model: Model, paged: Factory, arch: str, logits_all: bool) -> None:
    """In the same object, whatever it has evaluated meanwhile, and in a new one, which has evaluated nothing; to the bit."""
    llm = paged(zoo_model(arch), logits_all=logits_all)
    llm.eval(PROMPT)
    row, state = last_row(llm), llm.save_state()
    expected = go_on(llm)
    llm.reset()
    llm.eval(OTHER)
    llm.load_state(state)
    check_equal(last_row(llm)[None], row[None])
    assert go_on(llm) == expected
    other = paged(zoo_model(arch), "60%", logits_all=logits_all)
    other.load_state(pickle.loads(pickle.dumps(state)))
    check_equal(last_row(other)[None], row[None])
    assert go_on(other) == expected
    other.load_state(state)
    tokens = other.generate(PROMPT, **GREEDY)
    assert [next(tokens) for _ in expected] == expected, "the prompt is there already"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_state_that_stock_has_saved_is_sampled_from_at_once(zoo_model: Model, stock: Factory, paged: Factory, arch: str) -> None:
    """It has no row of results: the last token is evaluated again, or, where none can be taken back, all of them."""
    theirs = stock(zoo_model(arch), n_ubatch=1)
    theirs.eval(PROMPT)
    state = theirs.save_state()
    expected = go_on(theirs)
    llm = paged(zoo_model(arch))
    llm.load_state(state)
    assert go_on(llm) == expected
    llm.reset()
    llm.eval(OTHER)
    llm.load_state(state)
    assert go_on(llm) == expected


def test_stock_takes_a_state_of_ours(zoo_model: Model, stock: Factory, paged: Factory) -> None:
    llm, theirs = paged(zoo_model("qwen3moe")), stock(zoo_model("qwen3moe"))
    llm.eval(PROMPT)
    theirs.load_state(llm.save_state())
    assert greedy(theirs, PROMPT) == greedy(llm, PROMPT)


def test_state_without_scores_takes_no_memory_for_them(zoo_model: Model, paged: Factory) -> None:
    llm = paged(zoo_model("qwen3moe"))
    llm.eval(PROMPT)
    state = llm.save_state()
    assert state.scores.shape == (len(PROMPT), llm.n_vocab()) and state.scores.strides == (0, 0)
    assert state.last_logits.shape == (llm.n_vocab(),)


@pytest.mark.parametrize("cache", (llama_cpp.LlamaRAMCache, llama_cpp.LlamaDiskCache), ids=("ram", "disk"))
def test_caches_serve(zoo_model: Model, paged: Factory, tmp_path: Path, cache: Any) -> None:
    llm = paged(zoo_model("qwen3next"))
    plain = [str(llm(text, max_tokens=8, temperature=0.0)["choices"][0]["text"]) for text in ("the rain", "a hen")]
    llm.set_cache(cache(str(tmp_path / "states")) if cache is llama_cpp.LlamaDiskCache else cache())
    for _ in range(2):
        assert [str(llm(text, max_tokens=8, temperature=0.0)["choices"][0]["text"]) for text in ("the rain", "a hen")] == plain


# ---- failed reads ----

@contextmanager
def failing(pager: gguf_pager.Pager, after: int = 0) -> Iterator[None]:
    """Let the decode after so many others fail as a failed read does: aborted in the middle, and told so."""
    compute, count = hooks._compute, [0]

    def fail(name: str, ctx: Any, *args: Any) -> int:
        count[0] += 1
        if count[0] != after + 1:
            return compute(name, ctx, *args)
        calls = [0]

        @low.ggml_abort_callback
        def abort(_: Any) -> bool:
            calls[0] += 1
            return calls[0] > 40

        low.llama_set_abort_callback(ctx, abort, None)
        try:
            assert compute(name, ctx, *args) == 2
        finally:
            low.llama_set_abort_callback(ctx, low.ggml_abort_callback(), None)
        raise PagerIOError("as if", errno=errno.EIO, path=str(pager.paths[0]), offset_bytes=0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hooks, "_compute", fail)
        yield


@pytest.mark.parametrize("logits_all", (False, True))
@pytest.mark.parametrize("after", (0, 1, 2, 4))
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_same_prompt_after_a_failed_read_has_the_same_answer(
    zoo_model: Model, paged: Factory, arch: str, after: int, logits_all: bool
) -> None:
    """At the first token after the prompt it was sampled from stale logits; hybrid models answered -1 until reset()."""
    llm = paged(zoo_model(arch), logits_all=logits_all)
    expected = greedy(llm, PROMPT)
    llm.reset()
    llm.eval(OTHER)
    assert llm.pager is not None
    for _ in range(2):
        with failing(llm.pager, after), pytest.raises(PagerIOError):
            greedy(llm, PROMPT)
        assert greedy(llm, PROMPT) == expected


@pytest.mark.parametrize("arch", ("qwen3moe", "qwen3next"))
def test_real_failure_then_the_same_prompt(zoo_model: Model, paged: Factory, tmp_path: Path, arch: str) -> None:
    path = tmp_path / "model.gguf"
    shutil.copy(zoo_model(arch), path)
    llm, whole = paged(path, logits_all=True), path.read_bytes()
    expected = greedy(llm, PROMPT)
    status = path.stat()
    generation = llm.generate(PROMPT, **GREEDY)
    next(generation)
    os.truncate(path, 4096)
    with pytest.raises(PagerIOError):
        next(generation)
    with open(path, "r+b") as file:
        file.write(whole)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert greedy(llm, PROMPT) == expected


@pytest.mark.parametrize("arch", ("qwen3moe", "qwen3next"))
def test_own_loop_goes_on_after_a_failure_where_it_was(zoo_model: Model, paged: Factory, arch: str) -> None:
    """Whoever calls eval himself has lost nothing but the tokens of the call that failed."""
    llm = paged(zoo_model(arch))
    llm.eval(PROMPT)
    expected = go_on(llm)
    llm.reset()
    llm.eval(PROMPT)
    assert llm.pager is not None
    with failing(llm.pager), pytest.raises(PagerIOError):
        llm.eval(OTHER)
    assert llm.n_tokens == len(PROMPT)
    assert go_on(llm) == expected
