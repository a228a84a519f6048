"""The batcher alone: the bits of a conversation that goes on, comes back from disk, or shares a beginning; and what each model can."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import shutil
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
from llama_cpp import _internals
from llama_cpp.llama_grammar import LlamaGrammar

import gguf_pager
from gguf_pager import guard, hooks
from gguf_pager.errors import PagerError
from gguf_pager.serve import seat
from gguf_pager.serve.answers import Answer, Token, likeliest
from gguf_pager.serve.batcher import Batcher, Keeper, ServerClosing
from gguf_pager.serve.embeddings import Embedder
from gguf_pager.serve.seat import RequestError, Seat
from gguf_pager.serve.sequences import LEAST_MARKED, Sequence, choose, common_prefix
from gguf_pager.serve.state_files import State, read_state
from gguf_pager.serve.states import States

Zoo = Callable[..., Path]

ATTENTION = ("qwen3moe", "gpt-oss", "deepseek2", "llama4")
RECURRENT = ("granitehybrid", "qwen3next", "lfm2moe", "jamba")
SLIDING = ("gpt-oss",)

OTHER_WIDTHS = 0.1
"""How far logits are apart at most that were computed in batches of other widths: 0.01 to 0.03 on an EPYC without AVX-512, less on others. What
belongs to another text is off by ones."""


@contextmanager
def batching(path: Path, n_sequences: int = 1, n_ctx: int = 256, **given: Any) -> Iterator[Batcher]:
    given = {"budget": "min", "n_batch": 64, "n_ubatch": 64, "n_threads": 1, "n_threads_batch": 1, **given}
    with gguf_pager.Llama(str(path), n_ctx=n_ctx * n_sequences, n_seq_max=n_sequences, verbose=False, profile=False, **given) as llm:
        batcher = Batcher(llm, n_sequences)
        try:
            yield batcher
        finally:
            batcher.close()


def tokens_of(seed: int, n_tokens: int, n_vocab: int = 32) -> list[int]:
    return np.random.default_rng(seed).integers(3, n_vocab, n_tokens).tolist()


def ask(batcher: Batcher, prompt: list[int], n_tokens: int = 6) -> tuple[list[int], np.ndarray, Answer]:
    """Return the tokens of an answer at temperature 0, the logits that each was chosen from, and the answer."""
    answer = begin(batcher, prompt, n_tokens)
    tokens = list(answer.tokens())
    rows = [token.kept for token in tokens]
    return [token.id for token in tokens], np.array(rows), answer


def begin(batcher: Batcher, prompt: list[int], n_tokens: int = 6) -> Answer:
    answer = Answer(np.array(prompt, np.intc), lambda row: 0, n_tokens, keep=lambda row, token: row.copy())
    answer.sample = lambda row: int(np.argmax(np.ctypeslib.as_array(
        hooks.low.llama_get_logits_ith(batcher.llm.ctx, row), shape=(batcher.llm._n_vocab,))))
    batcher.begin(answer)
    return answer


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


@pytest.mark.parametrize("architecture", [*ATTENTION, *RECURRENT])
def test_conversation_has_one_file_that_grows(zoo_model: Zoo, tmp_path: Path, architecture: str) -> None:
    path, prompt = zoo_model(architecture), tokens_of(2, 90)
    with batching(path) as batcher:
        batcher.keeper = States(batcher, tmp_path, 1 << 30)
        said, _, _ = ask(batcher, prompt)
        batcher.call(batcher.keeper.note_idle)
        _, _, answer = ask(batcher, prompt + said[:-1] + tokens_of(3, 20))
        assert answer.n_cached == len(prompt) + len(said) - 1, "all that was computed"
        key = batcher.keeper._key
    (kept,) = tmp_path.glob("*.state")
    found = read_state(kept, key)
    assert isinstance(found, State) and len(found.ids) == len(prompt) + len(said) - 1 + 20 + 5


@pytest.mark.parametrize("architecture", [*ATTENTION, *RECURRENT])
def test_restart_gives_what_memory_gives(zoo_model: Zoo, tmp_path: Path, architecture: str) -> None:
    path, prompt = zoo_model(architecture), tokens_of(2, 90)
    with batching(path) as batcher:
        batcher.keeper = States(batcher, tmp_path, 1 << 30)
        said, _, _ = ask(batcher, prompt)
        batcher.call(batcher.keeper.note_idle)
        batcher.keeper = Keeper()  # what comes now is not kept
        longer = prompt + said[:-1] + tokens_of(3, 20)
        tokens, rows, _ = ask(batcher, longer)
    with batching(path) as batcher:
        batcher.keeper = States(batcher, tmp_path, 1 << 30)
        again, others, answer = ask(batcher, longer)
        assert answer.n_cached == len(prompt) + len(said) - 1
    assert again == tokens
    if architecture in SLIDING:  # llama.cpp puts what is loaded elsewhere (docs/tuning.md, 6), and some processors add in another order then
        assert np.allclose(rows, others, atol=1e-4)
    else:
        assert np.array_equal(rows, others)


def test_state_of_another_model_is_left_alone(zoo_model: Zoo, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """llama.cpp takes it, if the shapes are the same (findings/state-of-another-model.sh)."""
    path, prompt = zoo_model("qwen3moe"), tokens_of(2, 90)
    other = tmp_path / "other.gguf"
    shutil.copy(path, other)
    keys = next(tensor for tensor in gguf.GGUFReader(other, "r+").tensors if tensor.name == "blk.0.attn_k.weight")
    keys.data[:] = -keys.data
    keys.data.flush()
    states = tmp_path / "states"
    with batching(path) as batcher:
        batcher.keeper = States(batcher, states, 1 << 30)
        ask(batcher, prompt)
    with batching(other) as batcher:
        fresh = ask(batcher, prompt)[1]
        batcher.memory.cut(batcher.sequences[0], 0)
        batcher.keeper = States(batcher, states, 1 << 30)
        assert "of other models" in caplog.text
        _, rows, answer = ask(batcher, prompt)
        assert answer.n_cached == 0 and np.array_equal(rows, fresh)


@pytest.mark.parametrize("change", ["cut", "flipped", "empty", "mark", "described"])
def test_damaged_state_is_left_alone(zoo_model: Zoo, tmp_path: Path, caplog: pytest.LogCaptureFixture, change: str) -> None:
    path, prompt = zoo_model("qwen3moe"), tokens_of(2, 90)
    with batching(path) as batcher:
        batcher.keeper = States(batcher, tmp_path, 1 << 30)
        _, rows, _ = ask(batcher, prompt)
    (kept,) = tmp_path.glob("*.state")
    data = bytearray(kept.read_bytes())
    if change == "cut":
        del data[len(data) // 2:]
    elif change == "flipped":
        data[len(data) // 3] ^= 1
    elif change == "empty":
        data.clear()
    elif change == "mark":
        data[-1] ^= 1
    else:
        data[-30] ^= 1
    kept.write_bytes(data)
    with batching(path) as batcher:
        batcher.keeper = States(batcher, tmp_path, 1 << 30)
        _, again, answer = ask(batcher, prompt)
        assert answer.n_cached == 0 and np.array_equal(rows, again) and "left alone" in caplog.text
    assert kept.exists(), "whatever it is, it is not ours to remove"


def test_states_keep_to_their_size_and_the_oldest_goes(zoo_model: Zoo, tmp_path: Path) -> None:
    with batching(zoo_model("qwen3moe")) as batcher:
        batcher.keeper = states = States(batcher, tmp_path, 1 << 30)
        prompts = [tokens_of(seed, 100) for seed in range(20, 24)]
        for prompt in prompts[:2]:
            ask(batcher, prompt)
            batcher.call(states.note_idle)
        one = max(path.stat().st_size for path in tmp_path.glob("*.state"))
        states._most_bytes = int(one * 2.5)
        ask(batcher, prompts[0])  # used again: the other one is the oldest now
        for prompt in prompts[2:]:
            ask(batcher, prompt)
            batcher.call(states.note_idle)
        assert sum(path.stat().st_size for path in tmp_path.glob("*")) <= one * 2.5 and states.n_states == 2
        _, _, answer = ask(batcher, prompts[2])
        assert answer.n_cached == 99


@contextmanager
def two_with(folder: Path, path: Path) -> Iterator[tuple[Batcher, Batcher]]:
    """Two servers of a model that keep conversations in the same folder."""
    with batching(path) as one, batching(path) as other:
        for batcher in (one, other):
            batcher.keeper = States(batcher, folder, 1 << 30)
        yield one, other


def keep(batcher: Batcher) -> None:
    batcher.call(batcher.keeper.note_idle)


def test_two_with_one_folder_go_on_with_what_the_other_has_kept(zoo_model: Zoo, tmp_path: Path) -> None:
    path, prompt = zoo_model("qwen3moe"), tokens_of(2, 90)
    with two_with(tmp_path, path) as (one, other):
        said, _, _ = ask(one, prompt)
        keep(one)
        longer = prompt + said[:-1] + tokens_of(3, 20)
        _, rows, answer = ask(one, longer)
        assert answer.n_cached == len(prompt) + len(said) - 1
        _, others, answer = ask(other, longer)
        assert answer.n_cached == len(prompt) + len(said) - 1 and np.array_equal(rows, others)


def test_two_with_one_folder_do_not_overwrite_each_other(zoo_model: Zoo, tmp_path: Path) -> None:
    """Both go on with the same conversation, in different ways."""
    path, prompt = zoo_model("qwen3moe"), tokens_of(2, 90)
    with batching(path) as batcher:
        batcher.keeper = States(batcher, tmp_path, 1 << 30)
        said, _, _ = ask(batcher, prompt)
    begun = prompt + said[:-1]
    ways = [begun + tokens_of(seed, 40) for seed in (3, 4)]
    with two_with(tmp_path, path) as both:
        for batcher, way in zip(both, ways, strict=True):
            assert ask(batcher, way)[2].n_cached == len(begun)
        for batcher in both:
            keep(batcher)
        assert len(list(tmp_path.glob("*.state"))) == 2, "the first has replaced what it had loaded, the second has not"
        for batcher, way in zip(both, reversed(ways), strict=True):
            assert ask(batcher, [*way, 5])[2].n_cached >= len(way), "each knows what the other has added"
    for way in ways:
        with batching(path) as batcher:
            batcher.keeper = States(batcher, tmp_path, 1 << 30)
            assert ask(batcher, way)[2].n_cached == len(way) - 1


def test_two_that_write_again_and_again_leave_no_wrong_state(zoo_model: Zoo, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An inode that is free is given to the next file: another one at the same path can have the same."""
    path, begin_of = zoo_model("qwen3moe"), tokens_of(2, 60)
    with two_with(tmp_path, path) as both, batching(path) as alone:
        def talk(batcher: Batcher, seed: int) -> None:
            chosen = np.random.default_rng(seed)
            for _ in range(12):
                prompt = begin_of + tokens_of(int(chosen.integers(3)), int(chosen.integers(2, 90)))
                answers.append((prompt, ask(batcher, prompt, 2)[1]))
                keep(batcher)

        answers: list[tuple[list[int], np.ndarray]] = []
        threads = [threading.Thread(target=talk, args=(batcher, seed)) for seed, batcher in enumerate(both)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(answers) == 24
        for prompt, rows in answers:
            alone.call(lambda: alone.memory.clear(alone.sequences[0]))
            assert np.allclose(ask(alone, prompt, 2)[1][0], rows[0], atol=OTHER_WIDTHS)
    assert "damaged" not in caplog.text and not list(tmp_path.glob(".new-*"))


def test_file_that_is_being_written_is_not_taken_for_a_left_one(zoo_model: Zoo, tmp_path: Path) -> None:
    """Who was killed has locked nothing any more."""
    left, written = tmp_path / ".new-1.state", tmp_path / ".new-2.state"
    left.write_bytes(b"half")
    with batching(zoo_model("qwen3moe")) as batcher:
        states = States(batcher, tmp_path, 1 << 30)
        assert not left.exists()
        with states._new_file(written):
            States(batcher, tmp_path, 1 << 30)
            assert written.exists()
        States(batcher, tmp_path, 1 << 30)
        assert not written.exists()


def test_folder_that_is_removed_is_made_again(zoo_model: Zoo, tmp_path: Path) -> None:
    folder, prompt = tmp_path / "states", tokens_of(2, 90)
    with batching(zoo_model("qwen3moe")) as batcher:
        batcher.keeper = States(batcher, folder, 1 << 30)
        ask(batcher, prompt)
        keep(batcher)
        shutil.rmtree(folder)
        ask(batcher, tokens_of(3, 90))
        assert ask(batcher, prompt)[2].n_cached == 89, "it was written again before it gave way"
        keep(batcher)
        assert len(list(folder.glob("*.state"))) == 2


def test_state_of_the_future_is_not_the_newest_for_long(zoo_model: Zoo, tmp_path: Path) -> None:
    """The clock was ahead, or is set back."""
    with batching(zoo_model("qwen3moe")) as batcher:
        batcher.keeper = States(batcher, tmp_path, 1 << 30)
        for seed in (2, 3):
            ask(batcher, tokens_of(seed, 90))
            keep(batcher)
        first, second = sorted(tmp_path.glob("*.state"), key=lambda path: path.stat().st_mtime_ns)
        later = time.time() + 86400
        os.utime(first, (later, later))
        os.utime(second, (later + 1, later + 1))
        again = States(batcher, tmp_path, 1 << 30)
        assert [state.path for state in again._states] == [first, second]
        assert first.stat().st_mtime_ns < second.stat().st_mtime_ns <= time.time_ns() + 1000
        again._use(again._states[0])
        assert [state.path for state in States(batcher, tmp_path, 1 << 30)._states] == [second, first]


def test_state_that_cannot_be_written_leaves_nothing_and_the_next_is_kept(zoo_model: Zoo, tmp_path: Path,
                                                                          caplog: pytest.LogCaptureFixture) -> None:
    """A limit on the size of files fails where a full disk does: in the middle."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with batching(zoo_model("qwen3moe")) as batcher:
        batcher.keeper = States(batcher, tmp_path, 1 << 30)
        said, _, _ = ask(batcher, tokens_of(2, 90))
        batcher.call(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1])))
        try:
            keep(batcher)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "cannot be kept" in caplog.text and list(tmp_path.iterdir()) == []
        assert ask(batcher, tokens_of(2, 90))[0] == said
        keep(batcher)
        assert len(list(tmp_path.iterdir())) == 1


def test_what_is_no_file_is_not_waited_for(zoo_model: Zoo, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.state")
    (tmp_path / "folder.state").mkdir()
    (tmp_path / "nowhere.state").symlink_to(tmp_path / "nothing")
    with batching(zoo_model("qwen3moe")) as batcher:
        batcher.keeper = States(batcher, tmp_path, 1 << 30)
        ask(batcher, tokens_of(2, 90))
        keep(batcher)
        assert batcher.keeper.n_states == 1


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


# ---- choosing ---------------------------------------------------------------------------------------------------------------

def a_sequence(number: int, ids: list[int], used_s: float, *, is_busy: bool = False) -> Sequence:
    found = Sequence(number, 64)
    found.note(ids)
    found.used_s = used_s
    if is_busy:
        found.answer = Answer(np.zeros(1, np.intc), lambda row: 0, 1)
    return found


def test_prefix_is_counted_to_the_first_difference() -> None:
    def array(*ids: int) -> np.ndarray:
        return np.array(ids, np.intc)

    assert common_prefix(array(), array(1)) == 0
    assert common_prefix(array(1, 2, 3), array(1, 2, 4)) == 2
    assert common_prefix(array(1, 2), array(1, 2, 3)) == 2


def test_conversation_that_goes_on_keeps_its_sequence() -> None:
    first, second = a_sequence(0, [1, 2, 3, 4], 5), a_sequence(1, [1, 2, 9, 9], 1)
    assert choose([first, second], np.array([1, 2, 3, 4, 5], np.intc)) == (first, None)


def test_answer_that_is_wanted_again_keeps_its_sequence() -> None:
    first, empty = a_sequence(0, [1, 2, 3, 4], 5), a_sequence(1, [], 0)
    assert choose([first, empty], np.array([1, 2, 3], np.intc)) == (first, None)


def test_new_conversation_takes_the_oldest_place_and_shares_a_beginning() -> None:
    first, second = a_sequence(0, [1, 2, 3, 4, 5, 6], 5), a_sequence(1, [7, 8], 1)
    assert choose([first, second], np.array([1, 2, 9], np.intc)) == (second, first)
    empty = a_sequence(2, [], 0)
    assert choose([first, second, empty], np.array([1, 2, 9], np.intc)) == (empty, first)


def test_place_that_is_mostly_the_same_is_taken_where_none_is_empty() -> None:
    first, second = a_sequence(0, [1, 2, 3, 4, 5, 6], 5), a_sequence(1, [7, 8], 1)
    assert choose([first, second], np.array([1, 2, 3, 4, 9], np.intc)) == (first, None)
    empty = a_sequence(2, [], 0)
    assert choose([first, empty], np.array([1, 2, 3, 4, 9], np.intc)) == (empty, first)
    assert choose([first, empty], np.array([1, 2, 3, 4, 9], np.intc), can_share=False) == (first, None)
    assert choose([first, second], np.array([1, 2, 9], np.intc), can_share=False) == (second, None)


def test_busy_sequences_are_left_alone() -> None:
    first, second = a_sequence(0, [1, 2, 3], 5, is_busy=True), a_sequence(1, [7, 8], 1)
    assert choose([first, second], np.array([1, 2, 3, 4], np.intc)) == (second, first)
    assert choose([first], np.array([1], np.intc)) is None


def test_tokens_come_as_they_are_put() -> None:
    answer = Answer(np.zeros(1, np.intc), lambda row: 0, 5)
    threading.Thread(target=lambda: (time.sleep(0.05), answer.put(Token(3, None)), answer.end())).start()
    assert [token.id for token in answer.tokens()] == [3] and answer.n_generated == 1


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


def test_state_that_another_server_has_replaced_is_not_taken_for_what_it_was(zoo_model: Zoo, tmp_path: Path) -> None:
    path, first, second = zoo_model("qwen3moe"), tokens_of(2, 90), tokens_of(3, 90)
    for name, prompt in (("one", first), ("two", second)):
        with batching(path) as batcher:
            batcher.keeper = States(batcher, tmp_path / name, 1 << 30)
            ask(batcher, prompt)
    with batching(path) as batcher:
        fresh = ask(batcher, first)[1]
    with batching(path) as batcher:
        batcher.keeper = States(batcher, tmp_path / "one", 1 << 30)
        (mine,), (others,) = ((tmp_path / name).glob("*.state") for name in ("one", "two"))
        shutil.copy(others, mine)
        _, rows, answer = ask(batcher, first)
        assert answer.n_cached == 0 and np.array_equal(rows, fresh)


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
