"""The batcher alone: the bits of an answer, of a conversation that goes on or shares a beginning; who waits, who ends, what fails."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batching import ATTENTION, OTHER_WIDTHS, RECURRENT, Zoo, ask, batching, begin, tokens_of

import gguf_pager
from gguf_pager import guard, hooks
from gguf_pager.errors import PagerError
from gguf_pager.serve.answers import Answer, Token
from gguf_pager.serve.batcher import Keeper, ServerClosing
from gguf_pager.serve.embeddings import Embedder
from gguf_pager.serve.seat import RequestError, Seat
from gguf_pager.serve.sequences import LEAST_MARKED
from gguf_pager.serve.states import States

# ---- bits ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("architecture", ATTENTION)
def test_answer_has_the_bits_of_llama(zoo_model: Zoo, architecture: str) -> None:
    path, prompt = zoo_model(architecture), tokens_of(1, 100)
    with batching(path, 3) as batcher:
        tokens, rows, _ = ask(batcher, prompt)
    with gguf_pager.Llama(str(path), budget="min", n_ctx=768, n_batch=64, n_ubatch=64, n_threads=1, n_threads_batch=1, n_seq_max=3,
                          verbose=False, profile=False) as llm:
        expected = []
        for step in (prompt, *([token] for token in tokens[:-1])):
            llm.eval(step)
            expected.append(guard._last_row(llm).copy())
    assert np.array_equal(rows, expected)


@pytest.mark.parametrize("architecture", RECURRENT)
def test_recurrent_model_comes_back_to_where_it_was_marked(zoo_model: Zoo, architecture: str) -> None:
    path, prompt = zoo_model(architecture), tokens_of(4, LEAST_MARKED + 40)
    with batching(path) as batcher:
        first, rows, answer = ask(batcher, prompt)
        assert answer.n_cached == 0
        again, others, answer = ask(batcher, prompt)
        assert answer.n_cached == len(prompt) - 1 and again == first and np.array_equal(rows, others)
        other = prompt[:-10] + tokens_of(5, 10)
        tokens, rows, answer = ask(batcher, other)
        assert answer.n_cached == 0, "before the mark there is nothing to come back to"
    with batching(path) as batcher:
        fresh, others, _ = ask(batcher, other)
    assert fresh == tokens and np.array_equal(rows, others)


@pytest.mark.parametrize("architecture", ATTENTION)
def test_beginning_of_another_conversation_is_shared(zoo_model: Zoo, architecture: str) -> None:
    """The first stays as it is: nobody's tokens are another's."""
    path, system = zoo_model(architecture), tokens_of(6, 80)
    first, second = system + tokens_of(7, 30), system + tokens_of(8, 30)
    with batching(path, 2) as batcher:
        ask(batcher, first)
        _, _, answer = ask(batcher, second)
        assert answer.n_cached == 80
        again, others, answer = ask(batcher, first)
        assert answer.n_cached == len(first) - 1
    with batching(path, 2) as batcher:
        ask(batcher, first)
        said, rows, _ = ask(batcher, first)
    assert again == said and np.array_equal(rows, others)


@pytest.mark.parametrize("architecture", ["gpt-oss", "afmoe"])
@pytest.mark.parametrize("swa_full", [True, False])
def test_beginning_that_a_sliding_window_has_passed_is_not_shared(zoo_model: Zoo, architecture: str, swa_full: bool) -> None:
    """llama.cpp gives the places behind a window to other sequences, also in a cache as large as the context."""
    path, long, other = zoo_model(architecture), tokens_of(30, 200), tokens_of(31, 100)
    with batching(path, 2, swa_full=swa_full) as batcher:
        second = batcher.sequences[1]
        ask(batcher, long[:140])
        said, _, answer = ask(batcher, other)
        assert answer.sequence is second
        ask(batcher, long)  # goes on where the other one lies
        lowest = hooks.low.llama_memory_seq_pos_min(hooks.low.llama_get_memory(batcher.llm.ctx), second.number)
        assert lowest > 50, "if this fails, the test shows nothing"
        _, _, answer = ask(batcher, other + said[:-1] + [5])
        assert answer.n_cached == len(other) + len(said) - 1, "what goes on needs what its window sees"
        _, again, answer = ask(batcher, other)
        assert answer.n_cached == 99, "what its window sees is enough"
        near, nearer = other[:50] + tokens_of(33, 60), other[:50] + tokens_of(34, 60)
        _, rows, answer = ask(batcher, near)
        assert answer.n_cached == 0 and answer.sequence is not second
        _, others, answer = ask(batcher, nearer)
        assert answer.n_cached == 50, "of the new one, all is there"
    for tokens, found in ((near, rows), (nearer, others), (other, again)):
        with batching(path, 2, swa_full=swa_full) as batcher:
            fresh = ask(batcher, tokens)[1]
        assert np.allclose(fresh[0], found[0], atol=OTHER_WIDTHS), "batches of other widths have other last bits, and no more"


def test_conversations_at_once_do_not_mix(zoo_model: Zoo) -> None:
    path = zoo_model("qwen3moe")
    prompts = [tokens_of(seed, 40 + 11 * seed) for seed in range(5)]
    with batching(path, 1) as batcher:
        alone = [ask(batcher, prompt)[1] for prompt in prompts]
    with batching(path, 3) as batcher:
        answers = [begin(batcher, prompt) for prompt in prompts]
        together = [np.array([token.kept for token in answer.tokens()]) for answer in answers]
    for one, other in zip(alone, together, strict=True):
        assert np.allclose(one[0], other[0], atol=OTHER_WIDTHS), "batches of other widths have other last bits, and no more"


# ---- order, ends ----------------------------------------------------------------------------------------------------------

def test_requests_wait_in_order(zoo_model: Zoo) -> None:
    ended: list[int] = []
    with batching(zoo_model("qwen3moe"), 1) as batcher:
        answers = [begin(batcher, tokens_of(seed, 30), 8) for seed in range(4)]
        batcher.on_end.append(lambda answer: ended.append(answers.index(answer)))
        assert batcher.load().n_running + batcher.load().n_waiting >= 3
        for answer in answers:
            list(answer.tokens())
    assert ended == sorted(ended) and batcher.load().n_waiting == 0


def test_answer_that_is_given_up_frees_its_sequence(zoo_model: Zoo) -> None:
    with batching(zoo_model("qwen3moe"), 1) as batcher:
        forever = begin(batcher, tokens_of(1, 30), 200)
        waiting = begin(batcher, tokens_of(2, 30), 4)
        given_up = begin(batcher, tokens_of(3, 30), 4)
        batcher.give_up(given_up)
        next(forever.tokens())
        batcher.give_up(forever)
        assert len(list(waiting.tokens())) == 4
        assert list(given_up.tokens()) == []
        assert len(list(forever.tokens())) < 200
        assert batcher.totals.given_up == 2


def test_closing_ends_what_runs_and_refuses_what_waits(zoo_model: Zoo) -> None:
    with batching(zoo_model("qwen3moe"), 1) as batcher:
        running, waiting = begin(batcher, tokens_of(1, 30), 200), begin(batcher, tokens_of(2, 30))
        next(running.tokens())
        batcher.close()
        list(running.tokens())
        with pytest.raises(ServerClosing, match="shutting down"):
            list(waiting.tokens())
        with pytest.raises(ServerClosing):
            begin(batcher, tokens_of(3, 30))
        with pytest.raises(ServerClosing):
            batcher.call(lambda: None)


@pytest.mark.parametrize("architecture", ["qwen3moe", "afmoe", "granitehybrid"])
@pytest.mark.parametrize("budget", ["min", "auto"])
def test_batch_that_is_computed_is_stopped_and_what_was_before_is_kept(zoo_model: Zoo, tmp_path: Path, architecture: str, budget: str) -> None:
    """A long prompt in one batch may take minutes. Stock's context, where all of a model fits, knows no tap of ours."""
    path, begun = zoo_model(architecture), tokens_of(2, 90)
    given: dict[str, Any] = {"n_ctx": 4096, "n_batch": 4096, "n_ubatch": 4096, "budget": budget}
    with batching(path, **given) as batcher:
        batcher.keeper = States(batcher, tmp_path, 1 << 30)
        said, _, _ = ask(batcher, begun)
        longer, n_before = begun + said[:-1] + tokens_of(3, 3900), batcher.totals.prompt_tokens
        answer, n_batches = begin(batcher, longer), batcher.totals.batches
        while batcher.totals.prompt_tokens == n_before:
            time.sleep(0.001)
        batcher.close(0.01)
        assert batcher.totals.batches == n_batches, "if this fails, it was computed too quickly to be stopped"
        with pytest.raises(ServerClosing):
            list(answer.tokens())
        with pytest.raises(ServerClosing):
            begin(batcher, begun)
    short = begun + said[:-1] + tokens_of(3, 30)
    with batching(path, **given) as batcher:
        batcher.keeper = States(batcher, tmp_path, 1 << 30)
        _, rows, answer = ask(batcher, short)
        assert answer.n_cached == (0 if architecture == "granitehybrid" else len(begun) + len(said) - 1)
    with batching(path, **given) as batcher:
        ask(batcher, begun)
        assert np.allclose(ask(batcher, short)[1][0], rows[0], atol=OTHER_WIDTHS)


def test_answer_that_is_given_up_in_its_prompt_ends_with_the_batch(zoo_model: Zoo) -> None:
    with batching(zoo_model("qwen3moe"), n_ctx=4096) as batcher:
        answer = begin(batcher, tokens_of(1, 4000))
        while batcher.totals.batches == 0:
            time.sleep(0.001)
        batcher.give_up(answer)
        n_batches = batcher.totals.batches
        assert list(answer.tokens()) == [] and batcher.totals.batches <= n_batches + 1
        assert batcher.totals.prompt_tokens < 4000 and batcher.totals.given_up == 1


def test_failed_batch_is_told_to_everybody_in_it_and_the_next_works(zoo_model: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real failure of the disk is tried in test_serve_faults; this is any exception at all."""
    low = hooks.low
    with batching(zoo_model("qwen3moe"), 2) as batcher:
        said, rows, _ = ask(batcher, tokens_of(1, 30))
        answers = [begin(batcher, tokens_of(seed, 30), 100) for seed in (1, 2)]
        for answer in answers:
            next(answer.tokens())
        real = low.llama_decode
        monkeypatch.setattr(low, "llama_decode", lambda *_: 1)
        for answer in answers:
            with pytest.raises(PagerError, match="llama_decode returned 1"):
                list(answer.tokens())
        monkeypatch.setattr(low, "llama_decode", real)
        again, others, answer = ask(batcher, tokens_of(1, 30))
        assert answer.n_cached == 0 and again == said and np.array_equal(rows, others)


def test_sampler_that_fails_ends_its_own_answer_only(zoo_model: Zoo) -> None:
    def fail(_: int) -> int:
        raise RuntimeError("no token")

    with batching(zoo_model("qwen3moe"), 2) as batcher:
        good = begin(batcher, tokens_of(1, 30), 20)
        bad = Answer(np.array(tokens_of(2, 30), np.intc), fail, 20)
        batcher.begin(bad)
        with pytest.raises(RuntimeError, match="no token"):
            list(bad.tokens())
        assert len(list(good.tokens())) == 20


def test_answer_ends_with_the_context(zoo_model: Zoo) -> None:
    with batching(zoo_model("qwen3moe"), 1, n_ctx=256) as batcher:
        tokens, _, _ = ask(batcher, tokens_of(1, 250), 1000)
        assert len(tokens) <= 7 and batcher.sequences[0].n_ids <= 256


def test_tokens_come_as_they_are_put() -> None:
    answer = Answer(np.zeros(1, np.intc), lambda row: 0, 5)
    threading.Thread(target=lambda: (time.sleep(0.05), answer.put(Token(3, None)), answer.end())).start()
    assert [token.id for token in answer.tokens()] == [3] and answer.n_generated == 1


# ---- who goes at the wrong time, what fails at the wrong place ----------------------------------------------------------

def test_request_that_is_given_up_before_it_has_begun_is_not_computed(zoo_model: Zoo) -> None:
    with batching(zoo_model("qwen3moe")) as batcher:
        place = Seat(batcher)
        place.close()  # its client has gone while it waited for a thread
        place.create_completion(tokens_of(1, 30), max_tokens=200, temperature=0)
        ask(batcher, tokens_of(2, 30))
        assert batcher.totals.given_up == 1 and batcher.totals.generated_tokens < 100


def test_nothing_is_called_once_it_ends(zoo_model: Zoo) -> None:
    """Conversations are written then, which takes a while: who asked for something would wait forever."""
    class Slow(Keeper):
        def close(self) -> None:
            with pytest.raises(ServerClosing):
                batcher.call(lambda: None)
            closed.append(True)

    closed: list[bool] = []
    with batching(zoo_model("qwen3moe")) as batcher:
        batcher.keeper = Slow()
        closer = threading.Thread(target=batcher.close, daemon=True)
        closer.start()
        closer.join(30)
        assert closed == [True]


@pytest.mark.parametrize("architecture", ["qwen3moe", "granitehybrid"])
def test_first_batch_that_fails_leaves_nothing_in_the_context(zoo_model: Zoo, monkeypatch: pytest.MonkeyPatch, architecture: str) -> None:
    """llama.cpp keeps those parts of a batch that were computed before it failed."""
    path, prompt, low = zoo_model(architecture), tokens_of(1, 30), hooks.low
    with batching(path) as batcher:
        said, rows, _ = ask(batcher, prompt)
    with batching(path) as batcher:
        real = low.llama_decode
        monkeypatch.setattr(low, "llama_decode", lambda *given: real(*given) or 2)
        with pytest.raises(PagerError, match="returned 2"):
            ask(batcher, prompt)
        monkeypatch.setattr(low, "llama_decode", real)
        again, others, _ = ask(batcher, prompt)
    assert again == said and np.array_equal(rows, others)


def test_embeddings_of_many_texts_let_answers_go_on(zoo_model: Zoo) -> None:
    with batching(zoo_model("qwen3moe")) as batcher:
        embedder, n_calls = Embedder(batcher), []
        real = batcher.call
        batcher.call = lambda function: (n_calls.append(1), real(function))[1]  # type: ignore[method-assign]
        vectors, n_tokens = embedder.embed([tokens_of(seed, 20) for seed in range(5)])
        assert len(vectors) == 5 and n_tokens == 100 and len(n_calls) == 5, "a batch of answers fits between two of them"
        embedder.close()


@pytest.mark.parametrize("architecture", ["deepseek4", "qwen4exp"])
def test_embeddings_that_would_end_the_process_are_refused(zoo_model: Zoo, architecture: str) -> None:
    with batching(zoo_model(architecture)) as batcher:
        with pytest.raises(RequestError, match="cannot give embeddings"):
            Embedder(batcher).embed([5, 6, 7])
        assert ask(batcher, tokens_of(1, 30))[0]
