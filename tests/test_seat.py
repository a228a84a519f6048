"""A seat of the batcher: what it refuses, logprobs, grammars and text as llama_cpp gives them."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from batching import Zoo, ask, batching, tokens_of
from llama_cpp import _internals
from llama_cpp.llama_grammar import LlamaGrammar

import gguf_pager
from gguf_pager.serve import seat
from gguf_pager.serve.answers import likeliest
from gguf_pager.serve.batcher import Keeper
from gguf_pager.serve.seat import RequestError, Seat

# ---- seats ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("prompt", "given", "told"), [
    ([], {}, "empty"), ([5] * 256, {}, "256"), ([10**6], {}, "vocabulary"), ([-1], {}, "vocabulary"),
    ([5], {"echo": True, "logprobs": 1}, "echo"),
])
def test_seat_refuses_what_cannot_be(zoo_model: Zoo, prompt: list[int], given: dict[str, Any], told: str) -> None:
    with batching(zoo_model("qwen3moe")) as batcher:
        place = Seat(batcher)
        with pytest.raises(RequestError, match=told):
            place.create_completion(prompt, **given)
        assert place.answers == [] and batcher.load().n_running == 0


def test_seats_at_once_give_what_llama_gives(zoo_model: Zoo) -> None:
    prompt, wanted = tokens_of(3, 20), {"max_tokens": 12, "temperature": 0.9, "seed": 7, "top_k": 20, "repeat_penalty": 1.2}
    path = zoo_model("qwen3moe")
    with gguf_pager.Llama(str(path), budget="min", n_ctx=256, n_batch=64, n_threads=1, n_threads_batch=1, verbose=False) as llm:
        expected = list(zip(range(12), llm.generate(prompt, temp=0.9, top_k=20, repeat_penalty=1.2), strict=False))
        del expected
        llm.set_seed(7)
        text = llm.create_completion(prompt, **wanted)["choices"][0]
    with batching(path) as batcher:
        ours = Seat(batcher).create_completion(prompt, **wanted)["choices"][0]
    assert ours == text


@pytest.mark.parametrize("given", [{}, {"logprobs": 2}, {"stop": ["no such text"]}])
def test_answer_that_the_server_ends_has_the_text_of_its_tokens(small: Path, given: dict[str, Any]) -> None:
    """It had tokens to count, and no text, where it was to come in one piece."""
    prompt, found = [5, 6, 7], list[dict[str, Any]]()
    with batching(small, n_ctx=2048) as batcher:
        whole = Seat(batcher).create_completion(prompt, max_tokens=300, temperature=0.0, seed=1, logit_bias={0: -100.0, 2: -100.0})
        ours = Seat(batcher)
        asking = threading.Thread(target=lambda: found.append(ours.create_completion(
            prompt, max_tokens=2000, temperature=0.0, seed=1, logit_bias={0: -100.0, 2: -100.0}, **given)))
        asking.start()
        while ours.n_tokens_given < 5:
            time.sleep(0.001)
        batcher.close()
        asking.join()
    choice, n_tokens = found[0]["choices"][0], found[0]["usage"]["completion_tokens"]
    assert 5 <= n_tokens < 2000 and choice["finish_reason"] == "length"
    assert choice["text"] and (whole["choices"][0]["text"].startswith(choice["text"]) or n_tokens > 300)


# ---- logprobs ---------------------------------------------------------------------------------------------------------------

def sorted_as_stock(logits: np.ndarray) -> list[tuple[float, int]]:
    found = llama_cpp.Llama.logits_to_logprobs(logits).tolist()
    return sorted(zip(found, range(len(found)), strict=True), reverse=True)


@pytest.mark.parametrize("row", [
    np.random.default_rng(1).normal(0, 5, 1000).astype(np.single), np.zeros(50, np.single), np.array([3, 1, 3, 2, 3, 2], np.single),
    np.array([-np.inf, 5, -np.inf, 5, 4], np.single), np.array([0.5, 0.25], np.single),
])
@pytest.mark.parametrize("n_tokens", [0, 1, 2, 5, 20])
def test_likeliest_tokens_are_those_that_stock_finds(row: np.ndarray, n_tokens: int) -> None:
    """To the last bit, and where several are as likely."""
    expected = sorted_as_stock(row)
    for token in (0, len(row) - 1):
        kept = likeliest(row, token, n_tokens)
        n_as_likely = int(np.sum(row == np.sort(row)[-min(n_tokens, len(row))])) if n_tokens else 0
        assert len(kept.ids) <= n_tokens + n_as_likely + 1
        assert sorted_as_stock(kept.row())[:n_tokens] == expected[:n_tokens]
        logprobs, stocks = ({i: logprob for logprob, i in found} for found in (sorted_as_stock(kept.row()), expected))
        assert logprobs[token] == stocks[token]


def test_logprobs_of_an_answer_are_stocks(zoo_model: Zoo) -> None:
    path, wanted = zoo_model("qwen3moe"), {"max_tokens": 12, "logprobs": 5, "temperature": 0}
    with gguf_pager.Llama(str(path), budget="min", n_ctx=256, n_batch=64, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False) as llm:
        expected = llm.create_completion([7], **wanted)["choices"][0]
    with batching(path) as batcher:
        found = Seat(batcher).create_completion([7], **wanted)["choices"][0]
    assert found["text"] == expected["text"]
    for name in ("tokens", "token_logprobs", "top_logprobs"):
        assert found["logprobs"][name] == expected["logprobs"][name]


def test_characters_of_several_tokens_come_whole_with_logprobs(zoo_model: Zoo) -> None:
    """Stock drops them where it streams (llama-cpp-python 0.3.36)."""
    with batching(zoo_model("qwen3moe")) as batcher:
        wanted: dict[str, Any] = {"max_tokens": 12, "temperature": 0}
        text = Seat(batcher).create_completion([7], **wanted)["choices"][0]["text"]
        assert any(ord(character) > 127 for character in text), "if this fails, the test shows nothing"
        chunks = list(Seat(batcher).create_completion([7], **wanted, logprobs=1, stream=True))
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text
        assert all(chunk["choices"][0]["logprobs"] for chunk in chunks[:-1])
        for i, character in enumerate(text):
            ours = Seat(batcher).create_completion([7], **wanted, logprobs=1, stop=[character])["choices"][0]
            assert ours["text"] == text[:text.index(character)] and ours["finish_reason"] == "stop", i


def test_logprobs_that_nobody_has_read_yet_take_little_memory(small: Path) -> None:
    """The rows of logits of these tokens would take 39 MB."""
    with batching(small, n_ctx=512) as batcher:
        place = Seat(batcher)
        chunks = place.create_completion([5, 6, 7], max_tokens=200, temperature=0, logprobs=20, stream=True, logit_bias={0: -100, 2: -100})
        next(chunks)
        tracemalloc.start()
        while batcher.load().n_running:
            time.sleep(0.01)
        assert tracemalloc.get_traced_memory()[0] < 2 << 20
        tracemalloc.stop()
        assert len(list(chunks)) >= 199


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_answers_leave_nothing_behind(small: Path) -> None:
    """Each sampler holds a list of 49,152 tokens: 0.6 MB that a collector of garbage does not see."""
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    gc.collect()
    gc.disable()
    try:
        with batching(small) as batcher:
            def ask_often(n: int) -> None:
                for _ in range(n):
                    Seat(batcher).create_completion([5, 6, 7], max_tokens=1, seed=1, logit_bias={9: 1.0})

            ask_often(20)
            before = resident_bytes()
            ask_often(60)
            assert resident_bytes() - before < 10 << 20
    finally:
        gc.enable()


# ---- grammars that would end the process ----------------------------------------------------------------------------------

def test_grammar_that_allows_no_token_is_told(zoo_model: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama_sampler_sample would end the process: so the place where that is seen is given logits that allow nothing."""
    with batching(zoo_model("qwen3moe")) as batcher:
        n_vocab = batcher.llm._n_vocab
        sampler, candidates = _internals.LlamaSampler(), _internals.LlamaTokenDataArray(n_vocab=n_vocab)
        sampler.add_greedy()
        row = (ctypes.c_float * n_vocab)(*[float("-inf")] * n_vocab)
        monkeypatch.setattr(seat.low, "llama_get_logits_ith", lambda *_: ctypes.cast(row, ctypes.POINTER(ctypes.c_float)))
        with pytest.raises(RequestError, match="allows no token"):
            seat._sample_allowed(sampler, batcher.llm._ctx, 0, candidates)
        row[7] = 1.0
        assert seat._sample_allowed(sampler, batcher.llm._ctx, 0, candidates) == 7


def test_grammar_is_kept_and_chosen_from_as_stock_does(zoo_model: Zoo) -> None:
    path, prompt = zoo_model("qwen3moe"), tokens_of(1, 30)
    wanted: dict[str, Any] = {"max_tokens": 6, "temperature": 0, "grammar": LlamaGrammar.from_string("root ::= [a-z]+")}
    with gguf_pager.Llama(str(path), budget="min", n_ctx=256, n_batch=64, n_threads=1, n_threads_batch=1, verbose=False) as llm:
        text = llm.create_completion(prompt, **wanted)["choices"][0]
    with batching(path) as batcher:
        assert Seat(batcher).create_completion(prompt, **wanted)["choices"][0] == text


@pytest.mark.parametrize(("limit", "grammar"), [("MOST_DEPTH", "root ::= (((((\"a\")))))"), ("MOST_GRAMMAR", "root ::= \"aaaaaaaa\"")])
def test_grammar_that_is_too_deep_or_long_is_refused(zoo_model: Zoo, monkeypatch: pytest.MonkeyPatch, limit: str, grammar: str) -> None:
    with batching(zoo_model("qwen3moe")) as batcher:
        Seat(batcher).create_completion(tokens_of(1, 30), grammar=LlamaGrammar.from_string("root ::= [a-z]+"), max_tokens=1)
        monkeypatch.setattr(seat, limit, 4)
        with pytest.raises(RequestError, match="simplify"):
            Seat(batcher).create_completion(tokens_of(1, 30), grammar=LlamaGrammar.from_string(grammar))


# ---- text -------------------------------------------------------------------------------------------------------------------

def test_text_is_stocks_but_for_tokens_that_it_leaves_out(small: Path) -> None:
    """llama-cpp-python 0.3.36 has room for 32 bytes of a token (findings/long-tokens-vanish.sh)."""
    indented = "\n" + " " * 40
    with batching(small) as batcher:
        place, llm = Seat(batcher), batcher.llm
        short = [token for token in range(llm.n_vocab()) if len(batcher.pieces[token]) <= 32]
        stock = llama_cpp.Llama.detokenize
        assert place.detokenize(short) == llm.detokenize(short) == stock(llm, short) and len(short) > 49_000
        (token,) = place.tokenize(indented.encode(), add_bos=False)
        assert place.detokenize([token, token]) == llm.detokenize([token, token]) == 2 * indented.encode()
        assert stock(llm, [token]) == b"", "if this fails, stock is right by now"
        assert place.detokenize([1], special=True) == llm.detokenize([1], special=True) != b""
        assert place.detokenize([]) == b""


def test_what_goes_wrong_beside_an_answer_ends_nothing(zoo_model: Zoo, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Keeper):
        def note_idle(self) -> None:
            raise RuntimeError("no idea")

    with batching(zoo_model("qwen3moe")) as batcher:
        batcher.keeper = Broken()
        batcher.on_end.append(lambda _: 1 / 0)  # type: ignore[arg-type,return-value]
        ask(batcher, tokens_of(1, 30))
        while "no idea" not in caplog.text:
            time.sleep(0.05)
        assert len(ask(batcher, tokens_of(1, 30))[0]) == 6 and "ZeroDivisionError" in caplog.text
