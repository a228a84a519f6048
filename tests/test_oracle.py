"""The oracle: logits of the paged model equal those of stock llama-cpp-python bit for bit, at every position.

Stock runs without weight repacking (which changes the last bits), with the same threads and the same n_ubatch: the user's,
whatever the budget. Every architecture of the zoo is tried at the smallest budget, at 25 %, and at 100 %, with batches that are
longer than n_ubatch, as long, and shorter; the first two budgets evict all the time. What is multiplied is multiplied by us.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import make_zoo
import numpy as np
import numpy.typing as npt
import pytest
from conftest import some_tokens
from llama_cpp import llama_cpp as low

import gguf_pager
from gguf_pager.hooks import hooks
from gguf_pager.model import engine

BUDGETS = ("min", "25%", "100%")
UBATCHES = (512, 64, 16, 7)
N_BATCHED, N_SINGLE = 100, 12
"""Tokens of a prompt that is longer than most of UBATCHES, and tokens after it, one by one."""

Logits = npt.NDArray[np.single]

# What the issue names; the zoo holds more, and all of it is tried.
REQUIRED = (
    "llama", "qwen2moe", "qwen3moe", "qwen3next", "qwen35moe", "deepseek2", "deepseek32", "deepseek4", "kimi-linear",
    "kimi-k3", "gpt-oss", "llama4", "gemma4", "glm4moe", "minimax-m2", "olmoe", "granitemoe", "phimoe", "dbrx", "grok",
    "hunyuan-moe", "ernie4_5-moe", "bailingmoe2", "grovemoe", "smallthinker",
)


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """What llama.cpp says of each graph is longer than what it computes here takes."""
    with make_zoo.quiet():
        yield


# ---- who computes ----

@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A model of llama.h's, without repacking."""
    params = low.llama_model_default_params()
    params.use_extra_bufts = False
    model = low.llama_model_load_from_file(os.fsencode(path), params)
    assert model
    try:
        yield model
    finally:
        low.llama_model_free(model)


@contextlib.contextmanager
def context_of(model: Any, n_ubatch: int, **settings: Any) -> Iterator[Any]:
    """A context that computes n_ubatch tokens at once, with two threads."""
    params = low.llama_context_default_params()
    defaults = {"n_ctx": 512, "n_batch": 512, "n_ubatch": n_ubatch, "n_threads": 2, "n_threads_batch": 2,
                "flash_attn_type": low.LLAMA_FLASH_ATTN_TYPE_DISABLED}
    for name, value in (defaults | settings).items():
        setattr(params, name, value)
    context = low.llama_init_from_model(model, params)
    assert context
    try:
        assert low.llama_n_ubatch(context) == n_ubatch, "what was asked for"
        yield context
    finally:
        low.llama_free(context)


def decode(model: Any, context: Any, places: Sequence[tuple[int, int]], first_token: int = 0) -> Logits:
    """Decode one batch, a token at each place, which is a sequence and a position in it; return the logits of all."""
    tokens = some_tokens(first_token + len(places))[first_token:]
    batch = low.llama_batch_init(len(places), 0, 1)
    batch.n_tokens = len(places)
    for i, (sequence, position) in enumerate(places):
        batch.token[i], batch.pos[i], batch.logits[i] = tokens[i], position, 1
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
    try:
        assert low.llama_decode(context, batch) == 0
    finally:
        low.llama_batch_free(batch)
    n_vocab = low.llama_vocab_n_tokens(low.llama_model_get_vocab(model))
    return np.array([np.ctypeslib.as_array(low.llama_get_logits_ith(context, i), shape=(n_vocab,)) for i in range(len(places))])


def evaluate(model: Any, context: Any) -> Logits:
    """Feed the tokens in one batch and then one by one; return the logits of every position."""
    rows = [decode(model, context, [(0, i) for i in range(N_BATCHED)])]
    rows += [decode(model, context, [(0, i)], i) for i in range(N_BATCHED, N_BATCHED + N_SINGLE)]
    return np.concatenate(rows)


def stock_logits(path: Path, ubatches: Sequence[int]) -> dict[int, Logits]:
    """Return what stock computes, by n_ubatch."""
    found = {}
    with opened(path) as model:
        for n_ubatch in ubatches:
            with context_of(model, n_ubatch) as context:
                found[n_ubatch] = evaluate(model, context)
            assert np.isfinite(found[n_ubatch]).all() and found[n_ubatch].std() > 0
    return found


@contextlib.contextmanager
def opened_paged(path: Path, budget: str, **options: Any) -> Iterator[tuple[Any, gguf_pager.Pager]]:
    """A paged model and its pager; where 25 % of a tiny one cannot hold one token's experts, at the next share that can.

    Experts are brought in with the first context.
    """
    with gguf_pager.install(budget=budget, **options) as installed, opened(path) as model:
        try:
            low.llama_free(low.llama_init_from_model(model, low.llama_context_default_params()))
        except gguf_pager.BudgetError:
            assert budget == "25%"
        else:
            yield model, installed.pagers[0]
            return
    with gguf_pager.install(budget="40%", **options) as installed, opened(path) as model:
        low.llama_free(low.llama_init_from_model(model, low.llama_context_default_params()))
        yield model, installed.pagers[0]


def check_served(context: Any, pager: gguf_pager.Pager, has_single_tokens: bool = True) -> None:
    """Check that all was computed by us, feed-forwards an expert at a time, with the bits of ggml's."""
    tap, stats = hooks.contexts[int(context)].tap, pager.stats()
    (n_kinds, n_other_kinds), (n_ffns, n_other_ffns) = tap.count_kinds(), tap.count_ffns()
    assert stats.left_alone == 0, f"{stats.left_alone} nodes left alone"
    assert n_ffns > 0 and n_other_ffns == 0
    assert n_other_kinds == 0 and (n_kinds > 0 or not has_single_tokens)


def check_equal(logits: Logits, reference: Logits, where: str) -> None:
    different = np.flatnonzero((logits != reference).any(axis=1))
    assert different.size == 0, f"positions {different.tolist()} differ, {where}"


def check_paged(path: Path, budget: str, reference: dict[int, Logits], **options: Any) -> gguf_pager.Stats:
    """Compare paged with stock at one budget; return what the pager counted."""
    with opened_paged(path, budget, **options) as (model, pager):
        for n_ubatch, expected in reference.items():
            with context_of(model, n_ubatch) as context:
                check_equal(evaluate(model, context), expected, f"at {budget}, n_ubatch {n_ubatch}")
                check_served(context, pager)
        stats = pager.stats()
    assert stats.misses > 0
    return stats


# ---- what is tried ----

def test_zoo_holds_every_required_architecture() -> None:
    assert set(REQUIRED) <= set(make_zoo.ARCHS)
    assert not set(REQUIRED) & set(make_zoo.UNBUILDABLE)
    assert all(make_zoo.UNBUILDABLE.values()), "every architecture left out has its reason"


def test_one_other_bit_is_found() -> None:
    logits = np.ones((3, 4), np.single)
    other = logits.copy()
    check_equal(logits, other, "nowhere")
    other.view(np.uint32)[1, 2] ^= 1
    with pytest.raises(AssertionError, match=r"positions \[1\] differ"):
        check_equal(logits, other, "nowhere")


@pytest.mark.parametrize("arch", make_zoo.ARCHS)
def test_logits_equal_stock_bit_for_bit(zoo_model: Callable[..., Path], arch: str) -> None:
    path = zoo_model(arch)
    reference = stock_logits(path, UBATCHES)
    for budget in BUDGETS:
        stats = check_paged(path, budget, reference)
        # 100 % is of the slots: with several shape classes they may be shared out a little unevenly.
        assert (stats.evictions > 0) == (budget != "100%")


LENGTHS = (23, 17, 9, 4)


def sequences_logits(model: Any, n_ubatch: int, kv_unified: bool, check: Callable[[Any], None] = lambda context: None) -> Logits:
    """Four sequences of different lengths in one batch, then a token of each at a time."""
    with context_of(model, n_ubatch, n_seq_max=4, kv_unified=kv_unified) as context:
        places = [(s, at) for at in range(max(LENGTHS)) for s in range(4) if at < LENGTHS[s]]
        rows = [decode(model, context, places)]
        for step in range(3):
            rows.append(decode(model, context, [(s, LENGTHS[s] + step) for s in range(4)], len(places) + 4 * step))
        check(context)
        return np.concatenate(rows)


@pytest.mark.parametrize("arch", make_zoo.ARCHS)
def test_several_sequences_in_one_batch_equal_stock(zoo_model: Callable[..., Path], arch: str) -> None:
    path, cases = zoo_model(arch), [(n_ubatch, kv_unified) for n_ubatch in (64, 16) for kv_unified in (False, True)]
    with opened(path) as model:
        reference = {case: sequences_logits(model, *case) for case in cases}
    with opened_paged(path, "min") as (model, pager):
        for case in cases:
            logits = sequences_logits(model, *case, lambda context: check_served(context, pager, has_single_tokens=False))
            check_equal(logits, reference[case], f"n_ubatch and kv_unified {case}")
        assert pager.stats().evictions > 0


@pytest.mark.parametrize("file_type", make_zoo.TYPES)
def test_logits_equal_stock_in_every_type_that_ggml_multiplies(zoo_model: Callable[..., Path], file_type: str) -> None:
    """With many rows per expert ggml takes other kernels than with few: 30 of a batch of 100, 5 of 16, 2 of 7."""
    path = zoo_model("llama", file_type)
    reference = stock_logits(path, (512, 16, 7))
    for budget in ("min", "25%"):
        assert check_paged(path, budget, reference).evictions > 0


def test_zoo_makes_every_type_that_ggml_multiplies() -> None:
    assert len(make_zoo.TYPES) == 28
    loaded, numbers = engine.load(), set(make_zoo.TYPES.values())
    assert {kind for kind in range(max(numbers) + 1) if engine.can_multiply(loaded, kind)} == numbers


@pytest.mark.parametrize("arch", ("qwen3moe", "gpt-oss", "deepseek2", "glm4moe"))
@pytest.mark.parametrize("file_type", ("q4_k_m", "mxfp4", "q8_0", "f16"))
def test_logits_of_other_layers_equal_stock_in_common_types(zoo_model: Callable[..., Path], arch: str, file_type: str) -> None:
    path = zoo_model(arch, file_type)
    assert check_paged(path, "50%", stock_logits(path, (512, 16))).evictions > 0


@pytest.mark.parametrize("arch", ("qwen3moe", "gpt-oss"))
def test_logits_equal_stock_with_every_option(zoo_model: Callable[..., Path], arch: str) -> None:
    path = zoo_model(arch)
    reference = stock_logits(path, (512, 16))
    for options in ({"policy": "lru"}, {"io": "buffered"}, {"read_ahead": False}, {"n_readers": 1}, {"piece_bytes": 4096},
                    {"lock_dense": "copy"}, {"lock_dense": "off"}):
        assert check_paged(path, "40%", reference, **options).evictions > 0, options


@pytest.mark.parametrize("arch", ("qwen3moe", "gpt-oss"))
def test_pinned_experts_survive_eviction_and_change_no_bit(zoo_model: Callable[..., Path], arch: str) -> None:
    path, pins = zoo_model(arch), {0: [1, 3], 1: [2]}
    reference = stock_logits(path, (512, 16))
    with opened_paged(path, "60%") as (model, pager):
        pager.pin(pins)
        for n_ubatch, expected in reference.items():
            with context_of(model, n_ubatch) as context:
                check_equal(evaluate(model, context), expected, f"n_ubatch {n_ubatch}")
                check_served(context, pager)
        assert pager.stats().evictions > 0
        for layer, experts in pins.items():
            assert set(experts) <= set(pager.resident_experts(layer))


def embeddings(model: Any, check: Callable[[Any], None] = lambda context: None) -> Logits:
    """Return what becomes of each token of one batch."""
    pooling = low.LLAMA_POOLING_TYPE_NONE
    with context_of(model, 32, n_ctx=64, n_batch=32, embeddings=True, pooling_type=pooling) as context:
        tokens = some_tokens(20)
        batch = low.llama_batch_init(32, 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
        assert low.llama_decode(context, batch) == 0
        low.llama_batch_free(batch)
        n_embd = low.llama_model_n_embd(model)
        check(context)
        return np.array([np.ctypeslib.as_array(ctypes.cast(low.llama_get_embeddings_ith(context, i), ctypes.POINTER(ctypes.c_float)),
                                               shape=(n_embd,)) for i in range(len(tokens))])


@pytest.mark.parametrize("arch", make_zoo.WITHOUT_DECODE)
def test_models_that_see_all_tokens_at_once_equal_stock(zoo_model: Callable[..., Path], arch: str) -> None:
    """Their batches cannot be cut, and need not be."""
    path = zoo_model(arch)
    with opened(path) as model:
        reference = embeddings(model)
    assert np.isfinite(reference).all() and reference.std() > 0
    for budget in ("min", "50%", "100%"):
        with opened_paged(path, budget) as (model, pager):
            found = embeddings(model, lambda context: check_served(context, pager, has_single_tokens=False))
            check_equal(found, reference, f"at {budget}")
            assert pager.stats().misses > 0
