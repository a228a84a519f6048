"""What one process learns of a model's experts, the next begins with: the same tokens, fewer reads."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ARGUMENTS, some_tokens
from test_install import decode, low_level

import gguf_pager
from gguf_pager import cache, profile
from gguf_pager.model.layout import Layout, read_layout

Factory = Callable[..., Any]
Model = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of profiles, empty."""
    monkeypatch.setenv("GGUF_PAGER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "profiles"


def chosen_by(llm: Any) -> list[list[int]]:
    return [llm.pager.times_chosen(i) for i in range(len(llm.pager.layout.layers))]


def kept(layout: Layout) -> list[list[float]]:
    known = profile.read(layout)
    assert known is not None
    return [row.tolist() for row in known]


def teach(layout: Layout, favourites: list[int]) -> None:
    """Keep a profile in which each layer has these favourites, the first most."""
    rows = [[0] * layer.n_experts for layer in layout.layers]
    for row in rows:
        for place, expert in enumerate(favourites):
            row[expert] = 100 - place
    profile.write(layout, rows)


def resident(llm: Any) -> list[list[int]]:
    return [llm.pager.resident_experts(i) for i in range(len(llm.pager.layout.layers))]


def wait_until_warm(llm: Any, n_per_layer: int) -> None:
    deadline = time.monotonic() + 20
    while any(len(experts) < n_per_layer for experts in resident(llm)):
        assert time.monotonic() < deadline, resident(llm)
        time.sleep(0.005)
    time.sleep(0.05)


# ---- what is kept ----

def test_close_keeps_how_often_each_expert_was_chosen(paged: Factory, trace_model: Path, folder: Path) -> None:
    llm = paged(trace_model, "60%")
    llm.eval(some_tokens(9))
    chosen, layout = chosen_by(llm), llm.pager.layout
    assert not folder.exists()
    llm.close()
    assert kept(layout) == chosen and sum(chosen[0]) == 9 * layout.layers[0].n_used
    text = next(folder.iterdir()).read_text()
    assert set(json.loads(text)) == {"format", "chosen"}, "numbers and nothing else"


def test_older_choices_count_for_less(paged: Factory, trace_model: Path, folder: Path,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "HALF_LIFE_TOKENS", 4)
    chosen = []
    for seed, n_tokens in ((1, 6), (2, 4)):
        llm = paged(trace_model, "60%")
        llm.eval(some_tokens(n_tokens, seed))
        chosen.append(np.array(chosen_by(llm)))
        llm.close()
    assert np.allclose(kept(llm.pager.layout), chosen[1] + chosen[0] / 2)


def test_nothing_is_kept_of_a_model_that_computed_nothing(paged: Factory, trace_model: Path, folder: Path) -> None:
    paged(trace_model, "60%").close()
    assert not folder.exists()


def test_model_is_known_by_its_contents(trace_model: Path, zoo_model: Model, folder: Path, tmp_path: Path) -> None:
    layout = read_layout(trace_model)
    teach(layout, [3])
    copy = tmp_path / "elsewhere.gguf"
    shutil.copy(trace_model, copy)
    assert profile.read(read_layout(copy)) is not None, "wherever it lies"
    assert profile.read(read_layout(zoo_model("qwen3moe"))) is None
    renamed = dataclasses.replace(layout, values=layout.values | {"general.name": "another"})
    assert profile.read(renamed) is None
    with copy.open("ab") as file:
        file.write(b"more")
    assert profile.read(read_layout(copy)) is None


DAMAGED: list[Any] = [
    None, 7, [], {}, {"format": 0}, {"format": 1}, {"format": 1, "chosen": 3}, {"format": 1, "chosen": [[1.0]]},
    {"format": 1, "chosen": [["a"] * 16] * 4}, {"format": 1, "chosen": [[1] * 15] * 4}, {"format": 1, "chosen": [[1] * 16] * 3},
    {"format": 1, "chosen": [[-1] * 16] * 4}, {"format": 1, "chosen": [[1e308] * 16] * 4}, {"format": 1, "chosen": [[float("nan")] * 16] * 4},
    {"format": 1, "chosen": [[1] * 16] * 3 + [[10**400] * 16]}, {"format": 1, "chosen": [[1] * 16] * 3 + [[[1], 2] * 8]},
    {"format": 2, "chosen": [[1] * 16] * 4},
]


@pytest.mark.parametrize("value", DAMAGED, ids=lambda value: str(value)[:40])
def test_damaged_profile_is_none(trace_model: Path, folder: Path, value: Any) -> None:
    layout = read_layout(trace_model)
    assert [layer.n_experts for layer in layout.layers] == [16] * 4
    cache.write_json(profile.name_of(layout), {"format": 1, "chosen": [[1] * 16] * 4})
    assert profile.read(layout) is not None
    cache.write_json(profile.name_of(layout), value)
    assert profile.read(layout) is None


def test_damaged_profile_fails_no_model_and_is_replaced(paged: Factory, trace_model: Path, folder: Path) -> None:
    layout = read_layout(trace_model)
    cache.write_json(profile.name_of(layout), {"format": 1, "chosen": "x"})
    llm = paged(trace_model, "60%")
    llm.eval(some_tokens(3))
    chosen = chosen_by(llm)
    llm.close()
    assert kept(layout) == chosen


def test_folder_keeps_the_newest(trace_model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "N_KEPT", 3)
    folder.mkdir(parents=True)
    for age in range(5):
        path = folder / f"{age:032x}.json"
        path.write_text('{"format":0,"chosen":[[1]]}')
        os.utime(path, (1e9 - age, 1e9 - age))
    layout = read_layout(trace_model)
    teach(layout, [1])
    assert {path.name for path in folder.iterdir()} == {f"{0:032x}.json", f"{1:032x}.json", Path(profile.name_of(layout)).name}


def test_only_what_we_have_written_is_ever_deleted(trace_model: Path, folder: Path, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "N_KEPT", 0)
    folder.mkdir(parents=True)
    ours, target = '{"format":1,"chosen":[[1]]}', tmp_path / "target.json"
    target.write_text(ours)
    others = {"settings.json": ours, "0" * 31 + ".json": ours, "A" * 32 + ".json": ours, "1" * 32 + ".json": "{}",
              "2" * 32 + ".json": '{"my": "notes"}', "3" * 32 + ".json": "", "4" * 32 + ".txt": ours, ".new-now": "x"}
    for name, text in others.items():
        (folder / name).write_text(text)
    (folder / ("5" * 32 + ".json")).symlink_to(target)
    (folder / ("6" * 32 + ".json")).mkdir()
    os.mkfifo(folder / ("7" * 32 + ".json"))
    (folder / ("8" * 32 + ".json")).write_text(ours)
    (folder / ".new-stale").touch()
    for path in (*folder.iterdir(), target):
        if path.name != ".new-now":
            os.utime(path, (1e9, 1e9), follow_symlinks=False)
    teach(read_layout(trace_model), [1])
    left = {path.name for path in folder.iterdir()}
    assert left == {*others, "5" * 32 + ".json", "6" * 32 + ".json", "7" * 32 + ".json"} and target.exists()


def test_model_that_nobody_closes_is_kept_when_the_program_ends(trace_model: Path, folder: Path) -> None:
    program = (f"from gguf_pager import Llama\nllm = Llama({str(trace_model)!r}, budget='60%', n_ctx=64, n_threads=1, "
               "verbose=False)\nllm.eval([7, 8, 9])\n")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and done.stderr == ""
    layout = read_layout(trace_model)
    assert sum(kept(layout)[0]) == 3 * layout.layers[0].n_used    # the last layer computes the last token alone


def test_fork_keeps_nothing(paged: Factory, trace_model: Path, folder: Path) -> None:
    llm = paged(trace_model, "60%")
    llm.eval(some_tokens(3))
    pid = os.fork()
    if pid == 0:
        llm.pager.keep_profile()
        os._exit(0)
    os.waitpid(pid, 0)
    assert not folder.exists()


# ---- when it is kept ----

LEARNING = """
import sys, time
from pathlib import Path
from gguf_pager import Llama, profile
profile.Keeper.every_s, profile.Keeper.idle_s = float(sys.argv[2]), float(sys.argv[3])
llm = Llama(sys.argv[1], budget="60%", n_ctx=64, n_threads=1, n_threads_batch=1, verbose=False)
for i in range(10**9 if sys.argv[4] == "busy" else 3):
    llm.reset()
    llm.eval([7, 8, 9])
    print(llm.pager.times_chosen(0), flush=True)
    time.sleep(0.01)
time.sleep(60)
"""


def learn(path: Path, folder: Path, every_s: float, idle_s: float, how: str, ending: signal.Signals) -> list[list[float]]:
    """Let a child use a model, end it by a signal once its profile exists, and return what the profile says."""
    child = subprocess.Popen([sys.executable, "-c", LEARNING, str(path), str(every_s), str(idle_s), how],
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not (folder.exists() and any(entry.suffix == ".json" for entry in folder.iterdir())):
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        child.send_signal(ending)
        assert child.wait(30) == -ending
        assert child.stderr is not None and child.stderr.read() == "", "it ends in silence"
    finally:
        child.kill()
    return kept(read_layout(path))


@pytest.mark.parametrize("ending", (signal.SIGTERM, signal.SIGHUP, signal.SIGKILL))
def test_process_that_rests_has_kept_all_however_it_ends(trace_model: Path, folder: Path, ending: signal.Signals) -> None:
    known = learn(trace_model, folder, 1000, 0.4, "rests", ending)
    assert sum(known[0]) == 3 * 3 * 4, "three rounds of three tokens that choose four experts each"


@pytest.mark.parametrize("ending", (signal.SIGTERM, signal.SIGHUP))
def test_process_that_never_rests_has_kept_what_is_a_period_old(
    trace_model: Path, folder: Path, ending: signal.Signals
) -> None:
    known = learn(trace_model, folder, 0.5, 1000, "busy", ending)
    assert sum(known[0]) > 0


def test_what_was_kept_once_is_not_counted_again(
    paged: Factory, trace_model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile, "HALF_LIFE_TOKENS", 1 << 60)
    llm = paged(trace_model, "60%")
    for n_tokens in (5, 3, 0):
        llm.eval(some_tokens(n_tokens))
        llm.pager.keep_profile()
        assert kept(llm.pager.layout) == chosen_by(llm)
    chosen, layout = chosen_by(llm), llm.pager.layout
    llm.close()
    assert kept(layout) == chosen


def test_what_could_not_be_kept_is_kept_later(paged: Factory, trace_model: Path, folder: Path) -> None:
    llm = paged(trace_model, "60%")
    llm.eval(some_tokens(5))
    folder.parent.mkdir(exist_ok=True)
    folder.write_text("a file is in its place")
    llm.pager.keep_profile()
    folder.unlink()
    llm.pager.keep_profile()
    assert kept(llm.pager.layout) == chosen_by(llm)


def test_two_processes_of_one_model_lose_nothing(trace_model: Path, folder: Path) -> None:
    program = ("import sys\nfrom gguf_pager import profile, read_layout\nprofile.HALF_LIFE_TOKENS = 1 << 60\n"
               "layout = read_layout(sys.argv[1])\nfor i in range(100):\n"
               "    assert profile.write(layout, [[4] * 16] * 4)\n")
    running = [subprocess.Popen([sys.executable, "-c", program, str(trace_model)]) for _ in range(2)]
    assert [process.wait(60) for process in running] == [0, 0]
    assert kept(read_layout(trace_model)) == [[800.0] * 16] * 4


def test_lock_that_is_never_given_back_holds_up_nobody(paged: Factory, trace_model: Path, folder: Path) -> None:
    llm = paged(trace_model, "60%")
    llm.eval(some_tokens(5))
    chosen, layout = chosen_by(llm), llm.pager.layout
    with cache.locked(0) as is_alone:
        assert is_alone
        llm.pager._keeper.keep(is_last=False)
        assert not folder.exists(), "another process has its turn"
        begun = time.monotonic()
        llm.close()
        assert time.monotonic() - begun < 5
    assert kept(layout) == chosen


def test_thread_lives_while_something_is_to_be_kept(
    paged: Factory, trace_model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile.Keeper, "idle_s", 0.05)

    def n_threads() -> int:
        return sum(thread.name == "gguf_pager profile" for thread in threading.enumerate())

    llm = paged(trace_model, "60%")
    for n_tokens in (3, 4):
        assert n_threads() == 0
        llm.eval(some_tokens(n_tokens))
        assert n_threads() == 1
        deadline = time.monotonic() + 20
        while n_threads():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert np.allclose(kept(llm.pager.layout), chosen_by(llm), rtol=1e-2)
    llm.eval(some_tokens(3))
    llm.close()
    assert n_threads() == 0


# ---- what is done with it ----

def test_most_used_come_first_of_all_layers(trace_model: Path) -> None:
    layout = read_layout(trace_model)
    known = [np.zeros(16) for _ in layout.layers]
    known[0][[3, 5]] = 8, 2     # of 10 choices, 4 per token
    known[2][[5, 9]] = 500, 500
    order = profile.most_used(layout, known, (1000,))
    assert [(layer, expert) for layer, expert, _ in order] == [(0, 3), (2, 5), (2, 9), (0, 5)], "by share, not by number"
    assert [round(share, 6) for *_, share in order] == [3.2, 2.0, 2.0, 0.8]
    assert len(profile.most_used(layout, known, (2,))) == 2, "no more than there are slots"


def test_shape_classes_have_slots_of_their_own(trace_model: Path) -> None:
    layout = read_layout(trace_model)
    first = layout.layers[0]
    other = dataclasses.replace(first, block=9, slices=tuple(
        dataclasses.replace(piece, slice_bytes=piece.slice_bytes * 2) for piece in first.slices))
    layout = dataclasses.replace(layout, layers=(first, other), shapes=(first.shape, other.shape))
    known = [np.arange(16.0), np.ones(16)]
    order = profile.most_used(layout, known, (3, 2))
    assert [(layer, expert) for layer, expert, _ in order] == [(0, 15), (0, 14), (0, 13), (1, 0), (1, 1)]


def test_next_model_begins_with_the_favourites(paged: Factory, trace_model: Path, folder: Path) -> None:
    teach(read_layout(trace_model), [9, 3, 14, 2])
    llm = paged(trace_model, "60%")
    wait_until_warm(llm, 4)
    assert resident(llm) == [[2, 3, 9, 14]] * 4
    stats = llm.pager.stats()
    assert stats.hits == stats.misses == stats.stall_ns == 0 and stats.bytes_read == stats.resident_bytes > 0
    other = paged(trace_model, "60%", profile=False)
    time.sleep(0.1)
    assert resident(other) == [[]] * 4


def test_tokens_are_stocks_whatever_was_guessed(pair: Factory, trace_model: Path, logits: Factory, folder: Path) -> None:
    tokens = some_tokens(40)
    for favourites in ([9, 3, 14, 2], list(range(16))):
        teach(read_layout(trace_model), favourites)
        for batches in ((), (24,)):
            ours, stock = pair(trace_model, "60%", logits_all=True)   # computes at once, while guesses come
            assert np.array_equal(logits(ours, tokens, batches), logits(stock, tokens, batches))
            assert ours.pager.stats().left_alone == 0


def test_off_is_off(paged: Factory, trace_model: Path, folder: Path) -> None:
    llm = paged(trace_model, "60%", profile=False)
    llm.eval(some_tokens(5))
    llm.close()
    assert not folder.exists()
    with gguf_pager.install(budget="60%", profile=False), low_level(trace_model) as (model, context):
        decode(model, context, some_tokens(4))
    assert not folder.exists()
    with gguf_pager.install(budget="60%"), low_level(trace_model) as (model, context):
        decode(model, context, some_tokens(4))
    assert len(list(folder.iterdir())) == 1


def test_failed_guess_fails_no_model(paged: Factory, trace_model: Path, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    shutil.copy(trace_model, path)
    layout = read_layout(path)
    teach(layout, [15])
    llm = gguf_pager.Llama(str(path), budget="60%", lock_dense="off", **ARGUMENTS)
    try:
        wait_until_warm(llm, 1)
        size_bytes = path.stat().st_size
        os.truncate(path, size_bytes + 1)
        with pytest.raises(gguf_pager.PagerIOError):
            llm.eval([7])
        os.truncate(path, size_bytes)
        llm.reset()
        llm.eval([7])
    finally:
        llm.close()


ENDS = """
import sys
import gguf_pager
llm = gguf_pager.Llama(sys.argv[1], budget="min", n_ctx=64, n_batch=16, n_threads=1, verbose=False)
llm.eval(list(range(5, 15)))
"""


def test_process_that_closes_nothing_ends(trace_model: Path) -> None:
    """Its model is closed while the interpreter is taken down, when the thread that keeps profiles is gone or stands still."""
    running = [subprocess.Popen([sys.executable, "-c", ENDS, str(trace_model)]) for _ in range(6)]
    try:
        assert [child.wait(60) for child in running] == [0] * 6
    finally:
        for child in running:
            child.kill()


def test_tokens_are_computed_where_no_further_thread_is_to_be_had(trace_model: Path, folder: Path) -> None:
    """The profile's thread is no reason to fail; what was learned is kept at the end."""
    llm = gguf_pager.Llama(str(trace_model), budget="60%", **ARGUMENTS)
    before = threading.stack_size()
    threading.stack_size(1 << 46)  # more than the address space has: no thread can be made
    try:
        llm.eval(some_tokens(8))
        with pytest.raises(RuntimeError):
            threading.Thread(target=print).start()
    finally:
        threading.stack_size(before)
        llm.close()
    assert len(list(folder.iterdir())) == 1


def test_model_collected_as_garbage_in_the_profiles_own_thread(
        trace_model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is closed there, in the middle of the count."""
    raised: list[object] = []
    monkeypatch.setattr(threading, "excepthook", raised.append)
    monkeypatch.setattr(profile.Keeper, "idle_s", 0.3)
    llm = gguf_pager.Llama(str(trace_model), budget="60%", **ARGUMENTS)
    keeper, own = llm.pager._keeper, [llm]
    count = llm.pager.times_chosen

    def collect(layer: int) -> list[int]:
        if threading.current_thread() is keeper._thread and own:
            own.pop().close()
        return count(layer)

    monkeypatch.setattr(llm.pager, "times_chosen", collect)
    llm.eval(some_tokens(8))
    keeper._thread.join(20)
    assert not own
    assert not raised
    assert len(list(folder.iterdir())) == 1
