"""Saved states and caches of prompts: in another process, after other texts, damaged, of another model; what is computed is counted."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
from conftest import Factory, some_tokens
from llama_cpp import llama_cpp as low
from llama_cpp.llama_cache import BaseLlamaCache
from test_resume import failing, go_on, greedy, last_row

import gguf_pager
from gguf_pager import EngineError
from gguf_pager.hooks import hooks
from gguf_pager.saved import SavedState

Model = Callable[..., Path]

QUANTIZED = {"flash_attn": True, "type_k": low.GGML_TYPE_Q8_0, "type_v": low.GGML_TYPE_Q8_0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3moe": ("qwen3moe", {}),
    "qwen3moe, two sequences": ("qwen3moe", {"n_seq_max": 2}),
    "qwen3moe, all logits": ("qwen3moe", {"logits_all": True}),
    "qwen3moe, flash attention": ("qwen3moe", {"flash_attn": True}),
    "qwen3moe, quantized": ("qwen3moe", QUANTIZED),
    "deepseek2, two sequences": ("deepseek2", {"n_seq_max": 2}),
    "llama4": ("llama4", {}),
    "qwen3next, quantized": ("qwen3next", QUANTIZED),
    "qwen3next, two sequences, all logits": ("qwen3next", {"n_seq_max": 2, "logits_all": True}),
    "granitehybrid": ("granitehybrid", {}),
    "lfm2moe, two sequences": ("lfm2moe", {"n_seq_max": 2}),
    "jamba": ("jamba", {}),
}
PROMPT, MORE = some_tokens(40, 1), some_tokens(20, 2)
N_ANSWER = 8
MOST = len(MORE) + N_ANSWER + 4
"""Tokens computed of a turn whose beginning is there: one makes a row of results that the saved one is written to, and an answer
may be longer by those that complete a letter. All of it are twice as many."""


@contextmanager
def counting() -> Iterator[list[int]]:
    """Count the tokens that are computed meanwhile."""
    n_tokens, compute = [0], hooks._compute

    def counted(name: str, ctx: Any, *args: Any) -> int:
        n_tokens[0] += args[-1].n_tokens
        return compute(name, ctx, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hooks, "_compute", counted)
        yield n_tokens


def answer(llm: llama_cpp.Llama, prompt: list[int]) -> str:
    return str(llm.create_completion(prompt, max_tokens=N_ANSWER, temperature=0.0)["choices"][0]["text"])


def said(llm: llama_cpp.Llama, prompt: list[int]) -> list[int]:
    """Return a conversation after an answer: all that was computed."""
    answer(llm, prompt)
    return [int(token) for token in llm.input_ids[: llm.n_tokens]]


def other_model(path: Path, copy: Path) -> Path:
    """Write a model with the same header and other keys in its attention, as a fine-tune has."""
    shutil.copy(path, copy)
    keys = next(tensor for tensor in gguf.GGUFReader(copy, "r+").tensors if tensor.name == "blk.0.attn_k.weight")
    keys.data[:] = -keys.data
    keys.data.flush()
    return copy


# ---- another process ------------------------------------------------------------------------------------------------

ELSEWHERE = """
import json, pathlib, pickle, sys
from conftest import ARGUMENTS
from test_resume import failing, go_on, last_row
from test_saved_states import CASES, answer, counting
import gguf_pager, llama_cpp
for work in json.loads(sys.argv[1]):
    folder, (_, given) = pathlib.Path(work["folder"]), CASES[work["case"]]
    with gguf_pager.Llama(work["model"], budget="60%", **ARGUMENTS | given) as llm:
        llm.load_state(pickle.loads((folder / "state").read_bytes()))
        rows, tokens = [last_row(llm).tolist()], go_on(llm)
        rows.append(last_row(llm).tolist())
    with gguf_pager.Llama(work["model"], budget="min", **ARGUMENTS | given) as llm, counting() as n_tokens:
        llm.set_cache(llama_cpp.LlamaDiskCache(str(folder / "conversations")))
        text = answer(llm, work["turn"])
    print(json.dumps({"rows": rows, "tokens": tokens, "text": text, "n_tokens": n_tokens[0]}))
"""


def test_another_process_goes_on_as_this_one_would(zoo_model: Model, paged: Factory, tmp_path: Path) -> None:
    """From a pickled state at once, to the bit; and the next turn of a conversation, whose beginning is not computed again."""
    works, expected = [], []
    for index, (case, (arch, given)) in enumerate(CASES.items()):
        folder, model = tmp_path / str(index), zoo_model(arch)
        folder.mkdir()
        llm = paged(model, **given)
        llm.eval(PROMPT)
        (folder / "state").write_bytes(pickle.dumps(llm.save_state()))
        rows = [last_row(llm).tolist()]
        tokens = go_on(llm)
        rows.append(last_row(llm).tolist())
        llm.close()
        llm = paged(model, **given)
        llm.set_cache(llama_cpp.LlamaDiskCache(str(folder / "conversations")))
        turn = said(llm, PROMPT) + MORE
        llm.set_cache(None)
        works.append({"folder": str(folder), "case": case, "model": str(model), "turn": turn})
        expected.append((rows, tokens, answer(llm, turn)))
        llm.close()
    program = f"import sys\nsys.path[:0] = {sys.path!r}\n{ELSEWHERE}"
    done = subprocess.run([sys.executable, "-c", program, json.dumps(works)], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    for case, wanted, line in zip(CASES, expected, done.stdout.splitlines(), strict=True):
        found = json.loads(line)
        assert (found["rows"], found["tokens"], found["text"]) == wanted, case
        assert found["n_tokens"] <= MOST, case


# ---- sliding windows ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("how", ("paged", "not paged", "installed"))
@pytest.mark.parametrize("given", ({}, {"swa_full": False}), ids=("full", "small"))
def test_window_is_whole_after_a_loaded_state(zoo_model: Model, given: dict[str, Any], how: str) -> None:
    """The logits of a text that begins like the one before were off by half their size; llama.cpp says nothing."""
    prompt = PROMPT[:25] + some_tokens(5, 9)
    path, arguments = str(zoo_model("gpt-oss")), {"n_ctx": 256, "n_batch": 64, "n_threads": 1, "verbose": False, **given}
    arguments["budget"] = "auto" if how == "not paged" else "min"
    installation = gguf_pager.install() if how == "installed" else None
    made = llama_cpp.Llama if how == "installed" else gguf_pager.Llama
    llm, other = made(path, **arguments), made(path, **arguments)
    try:
        assert hooks.is_paged(llm) == (how != "not paged")
        llm.eval(PROMPT)
        state = llm.save_state()
        llm.reset()
        greedy(llm, prompt, 1)
        expected, tokens = last_row(llm), greedy(llm, prompt)
        other.load_state(state)
        with counting() as n_tokens:
            greedy(other, PROMPT, 24)
            assert n_tokens[0] <= 24, "whoever only goes on computes nothing twice"
        memory = low.llama_get_memory(other.ctx)
        assert low.llama_memory_seq_pos_min(memory, 0) > 25 - low.llama_model_n_swa(other.model) > 0, "something is lost"
        greedy(other, prompt, 1)
        assert np.abs(last_row(other) - expected).max() < 0.05
        assert greedy(other, prompt) == tokens
        # In a loop of one's own, too.
        other.load_state(state)
        go_on(other, 24)
        other.n_tokens = 25
        other.eval(prompt[25:])
        assert np.abs(last_row(other) - expected).max() < 0.05
    finally:
        llm.close()
        other.close()
        if installation is not None:
            installation.uninstall()


def test_window_that_fails_to_be_computed_again_is_computed_later(zoo_model: Model, paged: Factory) -> None:
    llm, other = paged(zoo_model("gpt-oss"), n_ctx=256), paged(zoo_model("gpt-oss"), n_ctx=256)
    llm.eval(PROMPT[:25])
    llm.eval(MORE)
    expected = last_row(llm)
    llm.reset()
    llm.eval(PROMPT)
    other.load_state(llm.save_state())
    go_on(other, 24)
    other.n_tokens = 25
    with failing(other.pager), pytest.raises(gguf_pager.PagerIOError):
        other.eval(MORE)
    assert other.n_tokens == 25
    other.eval(MORE)
    assert np.abs(last_row(other) - expected).max() < 0.05


# ---- states that cannot be loaded -----------------------------------------------------------------------------------

def test_state_of_another_model_or_setting_is_refused(zoo_model: Model, paged: Factory, tmp_path: Path) -> None:
    """And what was there before can be gone on with."""
    path = zoo_model("qwen3moe")
    llm = paged(path)
    llm.eval(PROMPT)
    state = llm.save_state()
    expected = go_on(llm)
    for name, model, given in (("weights", other_model(path, tmp_path / "other.gguf"), {}), ("frequency", path, {"rope_freq_base": 5000.0}),
                               ("type", path, {"type_k": low.GGML_TYPE_Q8_0}), ("flash", path, {"flash_attn": True})):
        other = paged(model, **given)
        other.eval(PROMPT)
        row = last_row(other)
        with pytest.raises(EngineError, match="another model or version, or with other settings"):
            other.load_state(pickle.loads(pickle.dumps(state)))
        assert other.n_tokens == len(PROMPT) and np.array_equal(last_row(other), row), name
    same = paged(path, "60%", n_batch=32, n_seq_max=2)
    same.load_state(state)
    assert go_on(same) == expected


def test_state_of_stock_does_not_say_whose_it_is(zoo_model: Model, stock: Factory, paged: Factory, tmp_path: Path) -> None:
    """What llama.cpp refuses of it is refused in words; a cache does not use it, and the next answer does not meet it again."""
    theirs, llm, flash = stock(zoo_model("qwen3moe")), paged(zoo_model("qwen3moe")), paged(zoo_model("qwen3moe"), flash_attn=True)
    theirs.set_cache(on_disk(tmp_path))
    turn = said(theirs, PROMPT) + MORE
    state = theirs.save_state()
    with pytest.raises(EngineError, match="llama.cpp refuses this state"):
        flash.load_state(state)
    llm.load_state(state)
    assert llm.n_tokens == theirs.n_tokens
    for ours in (llm, flash):
        ours.reset()
        expected = answer(ours, turn)
        ours.reset()
        ours.set_cache(on_disk(tmp_path))
        with counting() as n_tokens:
            assert answer(ours, turn) == expected
        assert n_tokens[0] >= len(turn)


def test_state_without_logits_is_refused_where_all_are_wanted(zoo_model: Model, paged: Factory) -> None:
    llm, every = paged(zoo_model("qwen3moe")), paged(zoo_model("qwen3moe"), logits_all=True)
    llm.eval(PROMPT)
    with pytest.raises(EngineError, match="without logits_all"):
        every.load_state(llm.save_state())
    every.eval(PROMPT)
    llm.load_state(every.save_state())  # the other way round nothing is missing
    assert go_on(llm) == go_on(every)


def test_state_of_a_context_of_another_size(zoo_model: Model, paged: Factory) -> None:
    """From a smaller one the Llama took its size as well, and failed as soon as the text grew longer than that."""
    small, large = paged(zoo_model("qwen3moe"), n_ctx=256), paged(zoo_model("qwen3moe"), n_ctx=512)
    small.eval(PROMPT)
    large.load_state(small.save_state())
    assert go_on(large) == go_on(small)
    large.eval(some_tokens(300, 5))
    assert large.n_tokens == len(PROMPT) + 6 + 300 and len(large.input_ids) == 512
    with pytest.raises(EngineError, match=r"346 tokens, and this context has room for 256: .* larger n_ctx"):
        small.load_state(large.save_state())
    assert small.n_tokens == len(PROMPT) + 6


def test_damaged_state_is_refused(zoo_model: Model, paged: Factory) -> None:
    """A byte of each part is changed: keys and values, tokens, the last row."""
    llm = paged(zoo_model("qwen3moe"))
    llm.eval(PROMPT)
    state = llm.save_state()
    pickled = pickle.dumps(state)
    for part in (state.llama_state[-64:], state.input_ids.tobytes()[:64], state.last_logits.tobytes()[:64], state.key.encode()):
        at = pickled.index(part) + 5
        with pytest.raises(EngineError, match="damaged"):
            pickle.loads(pickled[:at] + bytes([pickled[at] ^ 1]) + pickled[at + 1:])
    state.n_tokens = len(state.input_ids) + 1
    with pytest.raises(EngineError):
        llm.load_state(state)
    with pytest.raises(EngineError, match="of type str"):
        llm.load_state("a path")
    assert llm.n_tokens == len(PROMPT)
    llm.load_state(pickle.loads(pickled))


def test_pickled_state_holds_what_is_needed(zoo_model: Model, paged: Factory) -> None:
    """Stock's holds as many zeros as the text has logits."""
    llm = paged(zoo_model("qwen3moe"))
    llm.eval(PROMPT + MORE)
    llm.reset()
    llm.eval(PROMPT)
    state = llm.save_state()
    assert isinstance(state, SavedState)
    assert len(pickle.dumps(state)) < state.llama_state_size + 4 * (len(state.input_ids) + llm.n_vocab()) + 2000
    again = pickle.loads(pickle.dumps(state))
    assert not again.input_ids[len(PROMPT):].any(), "nor what was there before"
    assert again.scores.shape == state.scores.shape and np.array_equal(again.last_logits, state.last_logits)


# ---- caches ---------------------------------------------------------------------------------------------------------

def on_disk(folder: Path, **given: Any) -> llama_cpp.LlamaDiskCache:
    return llama_cpp.LlamaDiskCache(str(folder), **given)


@pytest.mark.parametrize("arch", ("qwen3moe", "gpt-oss", "qwen3next"))
@pytest.mark.parametrize("kind", ("disk", "ram"))
def test_conversations_that_alternate_are_all_kept(zoo_model: Model, paged: Factory, tmp_path: Path, kind: str, arch: str) -> None:
    """They begin alike, as a system prompt makes them: the disk's cache kept the last one only."""
    cache = on_disk(tmp_path) if kind == "disk" else llama_cpp.LlamaRAMCache()
    conversations = [PROMPT[:10] + some_tokens(30, seed) for seed in (11, 12, 13)]
    llm = paged(zoo_model(arch), n_ctx=256)
    llm.set_cache(cache)
    for turn in range(2):
        for index, conversation in enumerate(conversations):
            with counting() as n_tokens:
                conversations[index] = said(llm, conversation) + MORE
            assert turn == 0 or n_tokens[0] <= MOST
    llm.close()
    llm = paged(zoo_model(arch), n_ctx=256)
    llm.set_cache(on_disk(tmp_path) if kind == "disk" else cache)
    for conversation in conversations:
        with counting() as n_tokens:
            answer(llm, conversation)
        assert n_tokens[0] <= MOST


def test_conversation_has_one_state_on_disk(zoo_model: Model, paged: Factory, tmp_path: Path) -> None:
    """The one after its last turn, which holds those before, where tokens can be taken back."""
    llm = paged(zoo_model("qwen3moe"), n_ctx=256)
    cache = on_disk(tmp_path)
    llm.set_cache(cache)
    text = PROMPT
    for _ in range(3):
        text = said(llm, text) + MORE
    assert len(cache.cache) == 1


def test_capacity_is_what_was_asked_for(zoo_model: Model, paged: Factory, tmp_path: Path) -> None:
    """The limit of diskcache itself is lower, and throws out ten at once, the new one included."""
    cache = on_disk(tmp_path)
    cache.cache.reset("size_limit", 1)  # as if each were a gigabyte
    llm = paged(zoo_model("qwen3moe"))
    llm.set_cache(cache)
    for seed in (11, 12, 13):
        answer(llm, some_tokens(20, seed))
    assert len(cache.cache) == 3
    small = on_disk(tmp_path / "small", capacity_bytes=1)
    llm.cache = small
    assert answer(llm, PROMPT) and len(small.cache) == 0


@pytest.mark.parametrize("what", ("changed", "cut", "gone"))
def test_damaged_file_of_a_cache_is_computed_instead(zoo_model: Model, paged: Factory, tmp_path: Path, what: str,
                                                    caplog: pytest.LogCaptureFixture) -> None:
    llm = paged(zoo_model("qwen3moe"))
    llm.set_cache(on_disk(tmp_path))
    turn = said(llm, PROMPT) + MORE
    expected = answer(llm, turn)
    (kept,) = tmp_path.rglob("*.val")
    whole = kept.read_bytes()
    half = len(whole) // 2
    if what == "gone":
        kept.unlink()
    else:
        kept.write_bytes(whole[:half] if what == "cut" else whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1:])
    fresh = paged(zoo_model("qwen3moe"))
    fresh.set_cache(on_disk(tmp_path))
    with counting() as n_tokens:
        assert answer(fresh, turn) == expected
    assert n_tokens[0] >= len(turn)
    assert what == "gone" or "is not used" in caplog.text


def test_conversation_of_another_model_is_computed_instead(zoo_model: Model, paged: Factory, tmp_path: Path) -> None:
    """Both may keep theirs in the same folder."""
    path = zoo_model("qwen3moe")
    models = [paged(path), paged(other_model(path, tmp_path / "other.gguf"))]
    expected = [answer(llm, PROMPT) for llm in models]
    turns = [[int(token) for token in llm.input_ids[: llm.n_tokens]] + MORE for llm in models]
    for llm in models:
        llm.reset()
        llm.set_cache(on_disk(tmp_path / "conversations"))
        assert answer(llm, PROMPT) == expected[models.index(llm)]
    for llm, turn in zip(models, turns, strict=True):
        llm.reset()
        with counting() as n_tokens:
            answer(llm, turn)
        assert n_tokens[0] <= MOST


class Own(BaseLlamaCache):
    """A cache that somebody has written himself."""

    def __init__(self, problem: type[Exception] | None = None) -> None:
        super().__init__()
        self.kept: dict[tuple[int, ...], Any] = {}
        self.problem = problem

    @property
    def cache_size(self) -> int:
        return len(self.kept)

    def __contains__(self, key: Any) -> bool:
        return bool(self.kept)

    def __getitem__(self, key: Any) -> Any:
        best = max(self.kept, key=lambda kept: llama_cpp.Llama.longest_token_prefix(kept, key), default=key)
        return self.kept[best]

    def __setitem__(self, key: Any, value: Any) -> None:
        if self.problem is not None:
            raise self.problem("full")
        self.kept[tuple(key)] = value


def test_cache_of_ones_own_serves(zoo_model: Model, paged: Factory, caplog: pytest.LogCaptureFixture) -> None:
    llm = paged(zoo_model("qwen3moe"))
    llm.set_cache(Own())
    turn = said(llm, PROMPT) + MORE
    llm.reset()
    with counting() as n_tokens:
        expected = answer(llm, turn)
    assert n_tokens[0] <= MOST and llm.cache.cache_size == 2 and turn in llm.cache
    llm.set_cache(Own(OSError))
    assert answer(llm, turn) == expected, "an answer is not lost because it cannot be kept"
    assert "cannot be kept: full" in caplog.text
