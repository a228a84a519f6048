"""Conversations on disk: what comes back has the bits of what stayed in memory; of damaged, foreign or shared files nothing wrong comes."""

from __future__ import annotations

import os
import resource
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np
import pytest
from batching import ATTENTION, OTHER_WIDTHS, RECURRENT, SLIDING, Zoo, ask, batching, tokens_of

from gguf_pager.serve.batcher import Batcher, Keeper
from gguf_pager.serve.state_files import State, read_state
from gguf_pager.serve.states import States


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
