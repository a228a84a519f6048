"""A model is known by more than its address: whoever frees it behind our back leaves nobody else's experts to its successor."""

from __future__ import annotations

import ctypes
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from conftest import UNWRAPPED, Footprint, Logits, some_tokens
from llama_cpp import llama_cpp as low
from test_llama import check_equal, context_of, decode

import gguf_pager
from gguf_pager.hooks import hooks

Model = Callable[..., Path]
TOKENS = some_tokens(6)


@pytest.fixture(autouse=True)
def nothing_left(zoo_model: Model, footprint: Callable[[Path], Footprint]) -> Iterator[None]:
    """Old names are warned of by llama_cpp, and used here all the same."""
    folder = zoo_model("qwen3moe").parent
    before = footprint(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield
    after = footprint(folder)
    assert (after.mappings, after.wrapped) == (before.mappings, before.wrapped)
    assert not hooks.models and not hooks.contexts


def plain_params() -> Any:
    params = low.llama_model_default_params()
    params.use_extra_bufts = False
    return params


def logits_of(model: Any, **settings: Any) -> Logits:
    n_vocab = low.llama_vocab_n_tokens(low.llama_model_get_vocab(model))
    with context_of(model, **settings) as context:
        return decode(context, TOKENS, 0, n_vocab)


def stock_logits(path: Path, **settings: Any) -> Logits:
    model = UNWRAPPED["llama_model_load_from_file"](os.fsencode(path), plain_params())
    try:
        return logits_of(model, **settings)
    finally:
        UNWRAPPED["llama_model_free"](model)


@pytest.fixture(scope="module")
def twins(zoo_model: Model, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models of one shape, whose experts differ."""
    folder = tmp_path_factory.mktemp("twins")
    first, second = folder / "first.gguf", folder / "second.gguf"
    shutil.copy(zoo_model("qwen3moe"), first)
    import make_zoo

    make_zoo.make("qwen3moe", second, seed=99)
    assert first.stat().st_size == second.stat().st_size
    return first, second


FREES = ("llama_model_free", "llama_free_model")


@pytest.mark.parametrize("free", FREES)
@pytest.mark.parametrize("is_seen", (True, False), ids=("by a wrapped name", "by a name bound before"))
def test_address_of_a_freed_model_is_its_successors(twins: tuple[Path, Path], free: str, is_seen: bool) -> None:
    """The issue's case: paged, freed by the older name, uninstalled; within ten rounds a stock model gets the address."""
    first, second = twins
    expected = stock_logits(second, n_ubatch=1)
    for _ in range(10):
        installation = gguf_pager.install(budget="min")
        model = low.llama_model_load_from_file(os.fsencode(first), plain_params())
        logits_of(model, n_ubatch=1)
        assert len(installation.pagers) == 1
        (getattr(low, free) if is_seen else UNWRAPPED[free])(model)
        assert len(installation.pagers) == (0 if is_seen else 1)
        installation.uninstall()
        other = low.llama_model_load_from_file(os.fsencode(second), plain_params())
        check_equal(logits_of(other, n_ubatch=1), expected)
        low.llama_model_free(other)
    hooks.forget_freed()


def test_model_that_was_freed_and_followed_unseen_is_not_mistaken(twins: tuple[Path, Path]) -> None:
    """Whoever has bound loading and freeing before we wrapped them, and makes a context by a name that is wrapped."""
    first, second = twins
    expected = stock_logits(second, n_ubatch=1)
    with gguf_pager.install(budget="min"):
        for _ in range(10):
            model = low.llama_model_load_from_file(os.fsencode(first), plain_params())
            logits_of(model, n_ubatch=1)
            UNWRAPPED["llama_model_free"](model)
            other = UNWRAPPED["llama_model_load_from_file"](os.fsencode(second), plain_params())
            check_equal(logits_of(other, n_ubatch=1), expected)
            UNWRAPPED["llama_model_free"](other)
        hooks.forget_freed()


def test_file_that_was_freed_unseen_is_opened_anew_and_not_shared(zoo_model: Model) -> None:
    expected = stock_logits(zoo_model("qwen3moe"), n_ubatch=1)
    with gguf_pager.install(budget="min") as installed:
        path = os.fsencode(zoo_model("qwen3moe"))
        UNWRAPPED["llama_model_free"](low.llama_model_load_from_file(path, plain_params()))
        model = low.llama_model_load_from_file(path, plain_params())
        check_equal(logits_of(model, n_ubatch=1), expected)
        assert len(installed.pagers) == 1
        low.llama_model_free(model)


def open_by(name: str, path: Path) -> Any:
    if name == "llama_model_load_from_splits":
        paths = (ctypes.c_char_p * 1)(os.fsencode(path))
        return low.llama_model_load_from_splits(paths, 1, plain_params())
    return getattr(low, name)(os.fsencode(path), plain_params())


@pytest.mark.parametrize("load", ("llama_model_load_from_file", "llama_load_model_from_file",
                                  "llama_model_load_from_splits"))
@pytest.mark.parametrize("make", ("llama_init_from_model", "llama_new_context_with_model"))
@pytest.mark.parametrize("free", FREES)
def test_every_name_pages(zoo_model: Model, load: str, make: str, free: str) -> None:
    path = zoo_model("qwen3moe")
    expected = stock_logits(path)
    with gguf_pager.install(budget="min") as installed:
        model = open_by(load, path)
        params = low.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_threads, params.n_threads_batch = 128, 32, 32, 1, 1
        params.flash_attn_type = low.LLAMA_FLASH_ATTN_TYPE_DISABLED
        context = getattr(low, make)(model, params)
        n_vocab = low.llama_vocab_n_tokens(low.llama_model_get_vocab(model))
        check_equal(decode(context, TOKENS, 0, n_vocab), expected)
        assert installed.pagers[0].stats().misses > 0
        low.llama_free(context)
        getattr(low, free)(model)
        assert not installed.pagers


def test_extended_batches_are_seen(zoo_model: Model) -> None:
    """llama_process is llama_decode by another name: a failed read must not come back as its number."""
    path = zoo_model("qwen3moe")
    expected = stock_logits(path)
    with gguf_pager.install(budget="min") as installed:
        model = low.llama_model_load_from_file(os.fsencode(path), plain_params())
        with context_of(model) as context:
            batch = low.llama_batch_ext_init(context)
            for i, token in enumerate(TOKENS):
                at = low.llama_batch_ext_add_token(batch, 0, token)
                low.llama_batch_ext_set_pos(batch, at, ctypes.byref(low.llama_pos(i)))
                low.llama_batch_ext_set_output_logits(batch, at, True)
            assert low.llama_process(context, low.LLAMA_PROCESS_TYPE_DECODE, batch) == 0
            n_vocab = low.llama_vocab_n_tokens(low.llama_model_get_vocab(model))
            rows = np.ctypeslib.as_array(low.llama_get_logits(context), shape=(len(TOKENS), n_vocab)).copy()
            low.llama_batch_ext_free(batch)
        check_equal(rows, expected)
        assert installed.pagers[0].stats().misses > 0
        low.llama_model_free(model)


def test_whatever_opens_or_frees_is_known_here() -> None:
    """A llama_cpp with a new name for it fails this test, not a user."""
    words = ("model_load", "load_model", "model_init", "model_free", "free_model", "init_from_model", "new_context")
    names = {name for name in dir(low) if name.startswith("llama_") and any(word in name for word in words)}
    assert names <= set(UNWRAPPED)
    assert {"llama_decode", "llama_encode", "llama_process", "llama_free"} <= set(UNWRAPPED)


def test_function_that_others_have_wrapped_is_called_through_and_left_to_them(zoo_model: Model) -> None:
    """They put theirs over ours, and stay when we go; when we come again ours is over theirs, which calls ours."""
    path, seen = zoo_model("qwen3moe"), []

    @contextmanager
    def theirs() -> Iterator[None]:
        inner = low.llama_model_load_from_file

        def traced(path_model: bytes, params: Any, /) -> Any:
            seen.append(path_model)
            return inner(path_model, params)

        low.llama_model_load_from_file = traced
        try:
            yield
        finally:
            low.llama_model_load_from_file = UNWRAPPED["llama_model_load_from_file"]

    installation = gguf_pager.install(budget="min")
    with theirs():
        installation.uninstall()
        for n in (1, 2):
            with gguf_pager.install(budget="min") as installed:
                llm = llama_cpp.Llama(str(path), n_ctx=64, n_threads=1, verbose=False)
                assert len(installed.pagers) == 1 and len(seen) == n  # not passed through twice, nor without end
                llm.close()


def test_function_that_others_wrap_for_a_while_is_ours_to_take_off_again(zoo_model: Model) -> None:
    """Their patch comes and goes while ours is on, and something else is opened meanwhile: it stayed for good, and a model
    was loaded within its own loading, so that nobody knew where it lay."""
    path = zoo_model("qwen3moe")
    with gguf_pager.install(budget="min") as installed:
        inner = low.llama_model_load_from_file

        def patched(path_model: bytes, params: Any, /) -> Any:
            return inner(path_model, params)

        low.llama_model_load_from_file = patched
        with gguf_pager.install(budget="60%"):
            pass  # looks at what is wrapped
        llm = llama_cpp.Llama(str(path), n_ctx=64, n_threads=1, verbose=False)
        assert [model.residency.method for model in hooks.models.values()] in (["lock"], ["copy"])
        assert len(installed._request.opened) == 1
        low.llama_model_load_from_file = inner
        llm.close()
    assert low.llama_model_load_from_file is UNWRAPPED["llama_model_load_from_file"]
