"""Everything llama_cpp.Llama does goes on working, to the bit and to the token, with slots for a fraction of the experts."""

from __future__ import annotations

import contextlib
import gc
import inspect
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import make_trace_model
import make_zoo
import numpy as np
import pytest
from conftest import ARGUMENTS, Factory, Footprint, Logits, drop_identity, evaluate, some_tokens
from llama_cpp import llama_cpp as low

import gguf_pager
from gguf_pager import EngineError
from gguf_pager.memory import budget, probe

Model = Callable[..., Path]

BUDGETS = ("min", "60%")
"""One slot per expert of a token, and batches of two; both evict all the time."""

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a tree."}]


def check_paged(llm: gguf_pager.Llama) -> None:
    """The equality was worth something: experts came and went, and none was left to llama.cpp's mapping."""
    stats = llm.pager.stats()
    assert stats.evictions > 0
    assert stats.left_alone == 0


def check_equal(ours: Logits, theirs: Logits) -> None:
    assert np.isfinite(theirs).all() and theirs.std() > 0
    different = np.flatnonzero((ours != theirs).any(axis=1))
    assert different.size == 0, f"positions {different.tolist()} differ"


# ---- completions ----

@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("sampling", ({"temperature": 0.0}, {"temperature": 0.9, "seed": 3}), ids=("greedy", "sampled"))
def test_streamed_completion_equals_stock(
    zoo_model: Model, pair: Factory, budget: str, sampling: dict[str, Any]
) -> None:
    ours, theirs = pair(zoo_model("qwen3moe"), budget)

    def chunks(llm: llama_cpp.Llama) -> list[Any]:
        return [drop_identity(chunk) for chunk in llm("the rain in", max_tokens=30, stream=True, **sampling)]

    expected = chunks(theirs)
    assert len(expected) > 5
    assert chunks(ours) == expected
    check_paged(ours)


@pytest.mark.parametrize("stream", (False, True))
def test_chat_completion_equals_stock(zoo_model: Model, pair: Factory, stream: bool) -> None:
    ours, theirs = pair(zoo_model("qwen3moe"), chat_format="chatml")

    def answer(llm: llama_cpp.Llama) -> Any:
        got = llm.create_chat_completion(MESSAGES, max_tokens=20, temperature=0.0, stream=stream)
        return drop_identity(list(got) if stream else got)

    expected = answer(theirs)
    assert "".join(str(choice) for choice in expected)
    assert answer(ours) == expected
    check_paged(ours)


def test_logprobs_equal_stock(zoo_model: Model, pair: Factory) -> None:
    ours, theirs = pair(zoo_model("qwen3moe"), logits_all=True)
    arguments = {"max_tokens": 12, "logprobs": 5, "echo": True, "temperature": 0.0}
    expected = drop_identity(theirs("a hen and", **arguments))
    assert len(expected["choices"][0]["logprobs"]["top_logprobs"]) > 12
    assert drop_identity(ours("a hen and", **arguments)) == expected
    check_paged(ours)


def test_grammar_holds_and_equals_stock(zoo_model: Model, pair: Factory) -> None:
    ours, theirs = pair(zoo_model("qwen3moe"))

    def text(llm: llama_cpp.Llama) -> str:
        grammar = llama_cpp.LlamaGrammar.from_string('root ::= ("yes" | "no") " " [0-9] [0-9] [0-9]', verbose=False)
        return str(llm("is it", max_tokens=12, temperature=0.8, seed=5, grammar=grammar)["choices"][0]["text"])

    expected = text(theirs)
    assert expected.split()[0] in ("yes", "no") and expected.split()[1].isdigit()
    assert text(ours) == expected
    check_paged(ours)


def test_stop_word_ends_the_text_as_in_stock(zoo_model: Model, pair: Factory) -> None:
    ours, theirs = pair(zoo_model("qwen3moe"))
    whole = str(theirs("the", max_tokens=30, temperature=0.0)["choices"][0]["text"])
    stop = whole[len(whole) // 2 : len(whole) // 2 + 2]
    expected = drop_identity(theirs("the", max_tokens=30, temperature=0.0, stop=[stop]))
    assert expected["choices"][0]["finish_reason"] == "stop"
    assert drop_identity(ours("the", max_tokens=30, temperature=0.0, stop=[stop])) == expected
    check_paged(ours)


def test_callbacks_of_a_completion_are_called_as_in_stock(zoo_model: Model, pair: Factory) -> None:
    ours, theirs = pair(zoo_model("qwen3moe"), logits_all=True)

    def run(llm: llama_cpp.Llama) -> Any:
        seen: list[int] = []

        def never_e(ids: Any, scores: Any) -> Any:
            seen.append(len(ids))
            scores[ord("e")] = -np.inf
            return scores

        answer = llm(
            "the", max_tokens=30, temperature=0.0,
            logits_processor=llama_cpp.LogitsProcessorList([never_e]),
            stopping_criteria=llama_cpp.StoppingCriteriaList([lambda ids, scores: len(ids) >= 14]),
        )
        return seen, drop_identity(answer), drop_identity(llm("the", max_tokens=8, temperature=0.0, logit_bias={300: 3.0}))

    expected = run(theirs)
    assert 2 < len(expected[0]) < 20
    assert run(ours) == expected


def test_speculative_decoding_equals_stock(zoo_model: Model, pair: Factory) -> None:
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    draft = LlamaPromptLookupDecoding(max_ngram_size=2, num_pred_tokens=4)
    ours, theirs = pair(zoo_model("qwen3moe"), "60%", draft_model=draft)
    prompt = "the hen the hen the hen the"
    expected = drop_identity(theirs(prompt, max_tokens=24, temperature=0.0))
    assert drop_identity(ours(prompt, max_tokens=24, temperature=0.0)) == expected
    check_paged(ours)


def test_prompt_cache_serves_as_in_stock(zoo_model: Model, pair: Factory) -> None:
    ours, theirs = pair(zoo_model("qwen3moe"))

    def run(llm: llama_cpp.Llama) -> Any:
        llm.set_cache(llama_cpp.LlamaRAMCache())
        prompts = ("the rain in the", "on another", "the rain in the an")
        return [drop_identity(llm(prompt, max_tokens=6, temperature=0.0)) for prompt in prompts]

    assert run(ours) == run(theirs)
    check_paged(ours)


# ---- embeddings ----

TEXTS = ["the hen", "rain", "on and on and on"]


@pytest.mark.parametrize("budget", BUDGETS)
def test_embeddings_of_tokens_equal_stock(zoo_model: Model, pair: Factory, budget: str) -> None:
    ours, theirs = pair(zoo_model("qwen3moe"), budget, embedding=True, pooling_type=low.LLAMA_POOLING_TYPE_NONE)
    expected = theirs.embed(TEXTS)
    assert np.std(expected[0]) > 0
    assert ours.embed(TEXTS) == expected
    assert drop_identity(ours.create_embedding(TEXTS)) == drop_identity(theirs.create_embedding(TEXTS))
    check_paged(ours)


@pytest.mark.parametrize("pooling", ("MEAN", "CLS", "LAST"))
@pytest.mark.parametrize("budget", (*BUDGETS, "100%"))
def test_pooled_embeddings_equal_stock_that_cuts_no_batch(zoo_model: Model, pair: Factory, pooling: str, budget: str) -> None:
    """A pooled batch that is cut would end the process in an assertion of ggml's."""
    pooling_type = getattr(low, f"LLAMA_POOLING_TYPE_{pooling}")
    ours, theirs = pair(zoo_model("qwen3moe"), budget, embedding=True, pooling_type=pooling_type)
    expected = theirs.embed(TEXTS, normalize=True)
    assert np.std(expected[0]) > 0
    assert ours.embed(TEXTS, normalize=True) == expected
    stats = ours.pager.stats()
    assert stats.left_alone == 0 and stats.misses > 0
    assert (stats.evictions > 0) == (budget != "100%")


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("arch", ("llama-embed", "nomic-bert-moe"))
def test_embedding_models_equal_stock(zoo_model: Model, pair: Factory, arch: str, budget: str) -> None:
    ours, theirs = pair(zoo_model(arch), budget, embedding=True)
    texts = ["the hen", "rain and rain"]
    assert ours.embed(texts) == theirs.embed(texts)
    check_paged(ours)


# ---- state ----

def test_saved_state_goes_on_as_in_stock(zoo_model: Model, pair: Factory, paged: Factory) -> None:
    path, tokens = zoo_model("qwen3moe"), some_tokens(24)
    ours, theirs = pair(path, logits_all=True)
    for llm in (ours, theirs):
        evaluate(llm, tokens[:16], (16,))
    from_ours, from_theirs = ours.save_state(), theirs.save_state()
    assert from_ours.llama_state == from_theirs.llama_state
    expected = evaluate(theirs, tokens[16:])
    check_equal(evaluate(ours, tokens[16:]), expected)
    ours.load_state(from_ours)
    check_equal(evaluate(ours, tokens[16:]), expected)
    other = paged(path, logits_all=True)
    other.load_state(from_theirs)
    check_equal(evaluate(other, tokens[16:]), expected)
    theirs.load_state(from_ours)
    check_equal(evaluate(theirs, tokens[16:]), expected)
    check_paged(ours)


def shift(llm: llama_cpp.Llama, first: int, n: int) -> None:
    """Forget `n` tokens from `first` on and move the later ones up, as a full context does."""
    memory = low.llama_get_memory(llm.ctx)
    assert low.llama_memory_seq_rm(memory, 0, first, first + n)
    low.llama_memory_seq_add(memory, 0, first + n, -1, -n)
    llm.n_tokens -= n


@pytest.mark.parametrize("budget", BUDGETS)
def test_logits_behind_a_context_shift_equal_stock(zoo_model: Model, pair: Factory, budget: str) -> None:
    n_ctx = 256
    ours, theirs = pair(zoo_model("qwen3moe"), budget, n_ctx=n_ctx, n_batch=32, logits_all=True)
    assert ours.n_ctx() == theirs.n_ctx() == n_ctx
    tokens, results = some_tokens(n_ctx + 60), []
    for llm in (ours, theirs):
        rows = [evaluate(llm, tokens[:n_ctx], [32] * (n_ctx // 32))]
        shift(llm, 4, n_ctx // 2)
        rows.append(evaluate(llm, tokens[n_ctx : n_ctx + 30], (20,)))
        shift(llm, 0, 7)
        rows.append(evaluate(llm, tokens[n_ctx + 30 :]))
        results.append(np.concatenate(rows))
    check_equal(*results)
    check_paged(ours)


def test_full_context_is_refused_as_in_stock(zoo_model: Model, pair: Factory) -> None:
    ours, theirs = pair(zoo_model("qwen3moe"), n_ctx=256, n_batch=64)
    for llm in (theirs, ours):
        llm.eval(some_tokens(llm.n_ctx()))
        with pytest.raises(RuntimeError, match="llama_decode returned 1"):
            llm.eval([5])
        llm.reset()
    assert next(ours.generate([5, 6], temp=0.0)) == next(theirs.generate([5, 6], temp=0.0))


# ---- arguments of the original ----

@pytest.mark.parametrize("budget", BUDGETS)
def test_lora_on_experts_equals_stock(zoo_model: Model, lora: Path, pair: Factory, stock: Factory, budget: str) -> None:
    path, tokens = zoo_model("qwen3moe"), some_tokens(30)
    ours, theirs = pair(path, budget, logits_all=True, lora_path=str(lora), lora_scale=0.7)
    expected = evaluate(theirs, tokens, (20,))
    check_equal(evaluate(ours, tokens, (20,)), expected)
    plain = stock(path, logits_all=True)
    assert (evaluate(plain, tokens, (20,)) != expected).any(axis=1).all(), "the adapter changes every position"
    check_paged(ours)


@pytest.mark.parametrize("arguments", (
    {"use_mmap": False}, {"use_mlock": True}, {"flash_attn": True}, {"type_k": 8}, {"n_batch": 8}, {"n_ubatch": 4},
    {"n_ctx": 0}, {"rope_freq_scale": 0.5}, {"offload_kqv": False}, {"swa_full": True}, {"op_offload": True},
    {"n_threads": 2, "n_threads_batch": 2},
), ids=lambda arguments: ",".join(arguments))
def test_arguments_of_the_original_keep_their_meaning(
    zoo_model: Model, pair: Factory, arguments: dict[str, Any]
) -> None:
    ours, theirs = pair(zoo_model("qwen3moe"), "60%", logits_all=True, **arguments)
    assert ours.n_ctx() == theirs.n_ctx() and ours.n_batch == theirs.n_batch
    tokens = some_tokens(24)
    check_equal(evaluate(ours, tokens, (8, 8)), evaluate(theirs, tokens, (8, 8)))
    check_paged(ours)


def test_every_argument_of_the_original_is_taken() -> None:
    given = inspect.signature(llama_cpp.Llama.__init__).parameters.values()
    names = [parameter.name for parameter in given if parameter.kind == parameter.KEYWORD_ONLY]
    assert len(names) > 40
    for name in names:  # a name that is unknown is refused before the path is looked at
        with pytest.raises(Exception) as raised:  # whatever the original says of the value
            gguf_pager.Llama("/nowhere/model.gguf", **{name: None})
        assert "unknown argument" not in str(raised.value), name


@pytest.mark.parametrize("n_used", (2, 5, 10))
def test_overridden_number_of_experts_equals_stock_and_is_served(
    zoo_model: Model, pair: Factory, n_used: int
) -> None:
    ours, theirs = pair(zoo_model("qwen3moe"), logits_all=True, kv_overrides={"qwen3moe.expert_used_count": n_used})
    tokens = some_tokens(8)
    check_equal(evaluate(ours, tokens), evaluate(theirs, tokens))
    stats = ours.pager.stats()
    assert stats.left_alone == 0
    assert stats.hits + stats.misses == 8 * n_used * len(ours.pager.layout.layers)


def test_zero_ubatch_means_n_batch_as_in_stock(zoo_model: Model, pair: Factory) -> None:
    ours, theirs = pair(zoo_model("qwen3moe"), "60%", n_ubatch=0, logits_all=True)
    stats = ours.pager.stats()
    assert low.llama_n_ubatch(ours.ctx) == stats.n_ubatch == stats.n_ubatch_asked == ARGUMENTS["n_batch"]
    tokens = some_tokens(20)
    check_equal(evaluate(ours, tokens, (20,)), evaluate(theirs, tokens, (20,)))
    check_paged(ours)


def test_vocab_only_serves_the_tokenizer(zoo_model: Model, pair: Factory, paged: Factory) -> None:
    whole, vocabulary = paged(zoo_model("qwen3moe")), paged(zoo_model("qwen3moe"), vocab_only=True)
    assert vocabulary.pager is None
    text = b"the rain, the hen"
    assert vocabulary.tokenize(text) == whole.tokenize(text)
    assert vocabulary.detokenize(vocabulary.tokenize(text)) == text


def test_it_is_a_llama_and_knows_the_model(zoo_model: Model, pair: Factory) -> None:
    ours, theirs = pair(zoo_model("qwen3moe"))
    assert isinstance(ours, llama_cpp.Llama)
    assert ours.metadata == theirs.metadata
    for name in ("n_ctx", "n_embd", "n_vocab", "token_eos", "token_bos", "token_nl", "pooling_type"):
        assert getattr(ours, name)() == getattr(theirs, name)()


def test_pickled_llama_opens_the_same_model(zoo_model: Model, paged: Factory) -> None:
    llm = paged(zoo_model("qwen3moe"), "60%", logits_all=True, policy="lru", n_readers=3)
    copy = pickle.loads(pickle.dumps(llm))
    assert type(copy) is gguf_pager.Llama
    assert copy.pager is llm.pager, "a file that is opened again in the same way shares the slots"
    assert copy.pager.n_slots == llm.pager.n_slots
    assert (copy.pager.options.policy, copy.pager.options.n_readers) == ("lru", 3)
    tokens = some_tokens(12)
    check_equal(evaluate(copy, tokens, (8,)), evaluate(llm, tokens, (8,)))
    copy.close()


# ---- files ----

@pytest.mark.parametrize("parts", (3, 9))
def test_split_model_equals_stock(zoo_model: Model, pair: Factory, tmp_path: Path, parts: int) -> None:
    first = make_zoo.make_split(zoo_model("qwen3moe"), tmp_path, parts)
    ours, theirs = pair(first, logits_all=True)
    assert len(ours.pager.layout.paths) == parts
    assert len({piece.file for layer in ours.pager.layout.layers for piece in layer.slices}) > 1
    tokens = some_tokens(16)
    check_equal(evaluate(ours, tokens, (8,)), evaluate(theirs, tokens, (8,)))
    check_paged(ours)


def test_path_with_unusual_characters_is_found(zoo_model: Model, paged: Factory, tmp_path: Path) -> None:
    path = tmp_path / "modèle – ä b.gguf"
    path.symlink_to(zoo_model("qwen3moe"))
    llm = paged(path)
    llm.eval(some_tokens(4))
    assert llm.pager.stats().misses > 0


@pytest.mark.parametrize("method", ("lock", "copy"))
def test_second_model_on_a_file_leaves_the_first_ones_memory_alone(
    zoo_model: Model, stock: Factory, paged: Factory, footprint: Callable[[Path], Footprint], method: str
) -> None:
    path = zoo_model("qwen3moe")
    first = stock(path, logits_all=True)
    before = footprint(path).mappings
    assert before
    second = paged(path, logits_all=True, lock_dense=method)
    mine = set(footprint(path).mappings) - set(before)
    assert set(before) <= set(footprint(path).mappings)
    assert mine, "the experts are mapped, for nodes that are left alone"
    tokens = some_tokens(8)
    check_equal(evaluate(second, tokens), evaluate(first, tokens))


@pytest.mark.parametrize("method", ("lock", "copy", "off"))
def test_dense_weights_kept_in_any_way_give_the_same_logits(zoo_model: Model, pair: Factory, method: str) -> None:
    ours, theirs = pair(zoo_model("gemma4"), "60%", {"lock_dense": method}, logits_all=True)
    tokens = some_tokens(16)
    check_equal(evaluate(ours, tokens, (8,)), evaluate(theirs, tokens, (8,)))
    check_paged(ours)


# ---- models that are not paged ----

def test_dense_model_runs_as_stock_and_says_so(dense_model: Path, paged: Factory) -> None:
    theirs = llama_cpp.Llama(str(dense_model), logits_all=True, **ARGUMENTS)
    ours = paged(dense_model, "25%", logits_all=True)
    assert ours.pager is None
    assert ours.not_paged_reason == "it has no experts to page"
    check_equal(evaluate(ours, some_tokens(12), (8,)), evaluate(theirs, some_tokens(12), (8,)))
    theirs.close()


def test_model_that_fits_runs_as_stock_when_auto(zoo_model: Model, paged: Factory) -> None:
    path = zoo_model("qwen3moe")
    theirs = llama_cpp.Llama(str(path), logits_all=True, **ARGUMENTS)  # repacked, as nobody asked otherwise
    expected = evaluate(theirs, some_tokens(12), (8,))
    theirs.close()
    for ours in (paged(path, "auto", logits_all=True), gguf_pager.Llama(str(path), logits_all=True, **ARGUMENTS)):
        assert ours.pager is None
        assert "fit" in ours.not_paged_reason
        check_equal(evaluate(ours, some_tokens(12), (8,)), expected)
        ours.close()


def test_model_that_does_not_fit_is_paged_when_auto(
    pair: Factory, paged: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine that can spare 70 MB for a model of 85."""
    path = tmp_path / "model.gguf"
    make_trace_model.make(path, "tiny", layers=6, experts=64, n_ff=512)
    spare_bytes = 70_000_000
    machine = probe.Memory(8 << 30, spare_bytes + budget.AUTO_RESERVE_BYTES, None, 0)
    assert path.stat().st_size > spare_bytes
    monkeypatch.setattr(probe, "memory", lambda: machine)
    ours, theirs = pair(path, "auto", logits_all=True)
    assert ours.not_paged_reason is None
    assert all(0 < n < need.n_all for n, need in zip(ours.pager.n_slots, ours.pager.needs, strict=True))
    assert ours.pager.arena_bytes < spare_bytes - budget.WORK_BYTES
    tokens = make_trace_model.trace_tokens(ours.metadata)[:40]
    check_equal(evaluate(ours, tokens, (20,)), evaluate(theirs, tokens, (20,)))
    ours.close()
    monkeypatch.setattr(probe, "memory", lambda: probe.Memory(8 << 30, 1 << 20, None, 0))
    with pytest.raises(gguf_pager.BudgetError, match="too small: this model needs at least"):
        paged(path, "auto")


def test_paged_model_has_no_reason_not_to_be(zoo_model: Model, paged: Factory) -> None:
    assert paged(zoo_model("qwen3moe")).not_paged_reason is None


# ---- output ----

def test_quiet_model_prints_nothing(zoo_model: Model, paged: Factory, capfd: pytest.CaptureFixture[str]) -> None:
    llm = paged(zoo_model("qwen3moe"), "60%", verbose=False)
    llm("the", max_tokens=4)
    llm.pager.stats()
    llm.close()
    assert capfd.readouterr() == ("", "")


def test_verbose_model_prints_what_stock_prints(
    zoo_model: Model, paged: Factory, capfd: pytest.CaptureFixture[str]
) -> None:
    paged(zoo_model("qwen3moe"), verbose=True).close()
    out, err = capfd.readouterr()
    assert out == ""
    assert "print_info: arch" in err and "llama_context: n_ctx" in err


# ---- several at once ----

def run_all(*work: Callable[[], None]) -> None:
    """Run functions in threads of their own; raise what the first of them raised."""
    errors: list[BaseException] = []

    def guarded(function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as error:  # noqa: BLE001  raised below
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(function,), daemon=True) for function in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


def test_two_models_in_two_threads_equal_stock(zoo_model: Model, pair: Factory) -> None:
    models = [pair(zoo_model(arch), logits_all=True) for arch in ("qwen3moe", "gpt-oss")]
    tokens = some_tokens(24)
    expected = [evaluate(theirs, tokens, (12,)) for _, theirs in models]

    def work(index: int) -> Callable[[], None]:
        def run() -> None:
            for _ in range(4):
                models[index][0].reset()
                check_equal(evaluate(models[index][0], tokens, (12,)), expected[index])
        return run

    run_all(work(0), work(1))
    for ours, _ in models:
        check_paged(ours)


def test_models_opened_and_closed_in_threads_do_not_disturb_each_other(zoo_model: Model, stock: Factory) -> None:
    """Addresses of freed contexts are given out again at once: nobody may take a new one for the old."""
    paths = [zoo_model("qwen3moe"), zoo_model("gpt-oss"), zoo_model("qwen3moe")]
    tokens = some_tokens(4)
    expected = [evaluate(stock(path, logits_all=True, n_ubatch=1), tokens) for path in paths]

    def work(index: int) -> Callable[[], None]:
        def run() -> None:
            for _ in range(12):
                llm = gguf_pager.Llama(str(paths[index]), budget="min", logits_all=True, **ARGUMENTS)
                check_equal(evaluate(llm, tokens), expected[index])
                assert llm.pager.stats().misses > 0
                llm.close()
        return run

    run_all(work(0), work(1), work(2))


@contextlib.contextmanager
def context_of(model: Any, **settings: Any) -> Iterator[Any]:
    """A low-level context, with the rest of the settings as the tests have them."""
    params = low.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_threads, params.n_threads_batch = 128, 32, 32, 1, 1
    params.flash_attn_type = low.LLAMA_FLASH_ATTN_TYPE_DISABLED  # as llama_cpp.Llama has it
    for name, value in settings.items():
        setattr(params, name, value)
    context = low.llama_init_from_model(model, params)
    assert context
    try:
        yield context
    finally:
        low.llama_free(context)


def decode(context: Any, tokens: list[int], first: int, n_vocab: int) -> Logits:
    """Decode one batch; return the logits of all its tokens."""
    batch = low.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, first + i, 1, 0, 1
    try:
        assert low.llama_decode(context, batch) == 0
    finally:
        low.llama_batch_free(batch)
    return np.ctypeslib.as_array(low.llama_get_logits(context), shape=(len(tokens), n_vocab)).copy()


@pytest.mark.parametrize("budget", BUDGETS)
def test_two_contexts_on_one_model_in_two_threads_equal_stock(
    zoo_model: Model, stock: Factory, budget: str
) -> None:
    path = zoo_model("qwen3moe")
    prompts = [some_tokens(20, seed) for seed in (1, 2)]
    results: list[list[Logits]] = [[], []]
    with gguf_pager.install(budget=budget) as installed:
        params = low.llama_model_default_params()
        model = low.llama_model_load_from_file(os.fsencode(path), params)
        with context_of(model) as one, context_of(model) as two:
            assert low.llama_n_ubatch(one) == low.llama_n_ubatch(two) == 32
            n_vocab = low.llama_vocab_n_tokens(low.llama_model_get_vocab(model))

            def work(context: Any, index: int) -> Callable[[], None]:
                def run() -> None:
                    for _ in range(5):
                        low.llama_memory_clear(low.llama_get_memory(context), True)
                        rows = [decode(context, prompts[index][:10], 0, n_vocab)]
                        rows += [decode(context, [token], 10 + i, n_vocab)
                                 for i, token in enumerate(prompts[index][10:])]
                        results[index].append(np.concatenate(rows))
                return run

            run_all(work(one, 0), work(two, 1))
            stats = installed.pagers[0].stats()
        low.llama_model_free(model)
    theirs = stock(path, logits_all=True, n_ubatch=32)
    for index in (0, 1):
        theirs.reset()
        expected = evaluate(theirs, prompts[index], (10,))
        for rows in results[index]:
            check_equal(rows, expected)
    assert stats.evictions > 0
    assert stats.left_alone == 0


# ---- the end ----

def test_close_may_be_called_twice_and_frees_everything(
    zoo_model: Model, footprint: Callable[[Path], Footprint]
) -> None:
    path = zoo_model("qwen3moe")
    before = footprint(path)
    llm = gguf_pager.Llama(str(path), budget="min", **ARGUMENTS)
    llm.eval(some_tokens(4))
    assert footprint(path) != before
    pager = llm.pager
    misses = pager.stats().misses
    llm.close()
    assert footprint(path) == before
    llm.close()
    assert not pager.is_open
    assert pager.stats().misses == misses > 0, "the last counters can still be read"


def test_model_that_nobody_closes_leaks_nothing(zoo_model: Model, footprint: Callable[[Path], Footprint]) -> None:
    path = zoo_model("qwen3moe")
    gc.collect()  # what earlier tests have left
    before = footprint(path)
    llm = gguf_pager.Llama(str(path), budget="min", **ARGUMENTS)
    llm.eval(some_tokens(4))
    gone = weakref.ref(llm)
    del llm
    gc.collect()
    assert gone() is None
    assert footprint(path) == before


PUBLIC_METHODS = sorted(
    name for name, value in inspect.getmembers(llama_cpp.Llama, inspect.isfunction)
    if (not name.startswith("_") or name == "__call__")
    and name not in ("close", "set_cache", "logits_to_logprobs", "longest_token_prefix")  # these need no model
    and name != "create_chat_completion_openai_v1"  # needs another package; calls create_chat_completion
)

METHOD_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "__call__": ("the",), "create_completion": ("the",), "create_chat_completion": (MESSAGES,),
    "create_embedding": ("the",), "embed": ("the",),
    "detokenize": ([5],), "tokenize": (b"the",), "eval": ([5],), "generate": ([5],), "load_state": (None,),
    "set_seed": (1,),
}


USE_CLOSED = f"""
import sys
sys.path[:0] = {sys.path!r}
import gguf_pager
from test_llama import ARGUMENTS, METHOD_ARGUMENTS
llm = gguf_pager.Llama(sys.argv[1], budget="min", embedding=True, **ARGUMENTS)
llm.close()
for name in sys.argv[2:]:
    print(name, flush=True)
    try:
        result = getattr(llm, name)(*METHOD_ARGUMENTS.get(name, ()))
        assert hasattr(result, "__next__"), result
        next(result)
    except gguf_pager.EngineError as error:
        assert "closed" in str(error), error
    else:
        raise AssertionError("nothing was raised")
"""


def test_every_method_says_that_the_model_is_closed(zoo_model: Model) -> None:
    """In a process of its own, because stock methods of a closed model end it."""
    done = subprocess.run([sys.executable, "-c", USE_CLOSED, str(zoo_model("qwen3moe")), *PUBLIC_METHODS],
                          capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{done.stdout.split()[-1]}: {done.stderr[-500:]}"
    assert done.stdout.split() == PUBLIC_METHODS and len(PUBLIC_METHODS) > 20


def test_generator_of_a_closed_model_says_so(zoo_model: Model, paged: Factory) -> None:
    for start in (
        lambda llm: llm.generate(some_tokens(4), temp=0.0),
        lambda llm: llm("the rain", max_tokens=20, temperature=0.0, stream=True),
        lambda llm: llm.create_chat_completion(MESSAGES, max_tokens=20, stream=True),
    ):
        llm = paged(zoo_model("qwen3moe"))
        generator = start(llm)
        next(generator)
        next(generator)
        llm.close()
        with pytest.raises(EngineError, match="closed"):
            next(generator)
        with pytest.raises(StopIteration):
            next(generator)


def in_child(work: Callable[[], bool], seconds: int = 20) -> bool:
    """Fork, run, and return what the child found; a child that hangs is killed and counts as false."""
    child = os.fork()
    if child == 0:
        signal.alarm(seconds)
        found = False
        with contextlib.suppress(BaseException):
            found = work()
        os._exit(0 if found else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_forked_child_is_told_so_and_the_parent_goes_on(zoo_model: Model, pair: Factory) -> None:
    ours, theirs = pair(zoo_model("qwen3moe"), logits_all=True)
    tokens = some_tokens(16)
    expected = evaluate(theirs, tokens)
    check_equal(evaluate(ours, tokens[:8]), expected[:8])

    def refuses() -> bool:
        try:
            ours.eval(tokens[8:])
        except EngineError as error:
            return "fork" in str(error)
        return False

    def closes() -> bool:
        ours.close()
        return True

    def opens_its_own() -> bool:
        llm = gguf_pager.Llama(ours.model_path, budget="min", logits_all=True, **ARGUMENTS)
        return bool((evaluate(llm, tokens) == expected).all())

    started = time.monotonic()
    assert in_child(refuses)
    assert in_child(closes)
    assert in_child(opens_its_own)
    assert time.monotonic() - started < 15
    check_equal(evaluate(ours, tokens[8:]), expected[8:])


def test_pager_that_is_in_use_refuses_to_close_and_goes_on(pair: Factory, zoo_model: Callable[..., Path]) -> None:
    ours, stock = pair(zoo_model("qwen3moe"), logits_all=True)
    tokens = some_tokens(12)
    evaluate(ours, tokens[:6])
    with pytest.raises(EngineError, match="in use"):
        ours.pager.close()
    assert ours.pager.is_open
    evaluate(stock, tokens[:6])
    assert np.array_equal(evaluate(ours, tokens[6:]), evaluate(stock, tokens[6:]))
    ours.close()
    assert not ours.pager.is_open


# ---- in a notebook ----

def test_object_says_what_it_is(zoo_model: Callable[..., Path], dense_model: Path) -> None:
    with gguf_pager.Llama(str(zoo_model("qwen3moe")), budget="60%", **ARGUMENTS) as llm:
        assert re.fullmatch(r"<gguf_pager.Llama '[^']+\.gguf', budget='60%', <Pager: \S+ \S+ for experts, 6\d% of them>>", repr(llm))
        assert llm.pager is not None
        assert "no token yet" in repr(llm.pager.stats())
        llm.eval(some_tokens(4))
        assert re.search(r"<Stats: 4 tokens, \d+\.\d% hits, ", repr(llm.pager.stats()))
        pager = llm.pager
    assert "closed" in repr(llm) and repr(pager) == "<Pager: closed>"
    with pytest.raises(EngineError, match="closed"):
        llm.eval([1])
    with gguf_pager.Llama(str(dense_model), **ARGUMENTS) as llm:
        assert "no experts to page" in repr(llm)


def test_arguments_can_be_completed() -> None:
    names = inspect.signature(gguf_pager.Llama).parameters
    assert {"model_path", "n_ctx", "n_threads", "budget", "profile", "mirror", "overcommit"} <= names.keys()
    assert all(parameter.kind is not inspect.Parameter.VAR_KEYWORD for parameter in names.values())
    assert "profile" in str(gguf_pager.Llama.__doc__)
