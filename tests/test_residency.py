"""Dense weights stay in RAM, in memory of ours, and only those of the model that was just loaded."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import mmap
import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Factory, evaluate, footprint_of, some_tokens
from llama_cpp import llama_cpp as low

from gguf_pager import BudgetError, _native, hooks, loading
from gguf_pager.files import ModelFiles, OpenedFile
from gguf_pager.memory import residency
from gguf_pager.model.layout import Layout, Range, open_layout, read_layout

Model = Callable[..., Path]


def state_of(llm: Any) -> residency.Residency:
    return hooks.hooks.models[llm.model].residency


def locked_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmLck:\s+(\d+) kB", status)
    assert found
    return int(found[1]) * 1024


def mapped_offsets(path: Path) -> list[tuple[int, int]]:
    """Return the file ranges that are mapped, as (first, end)."""
    return [(mapping.offset_bytes, mapping.offset_bytes + mapping.n_bytes) for mapping in mappings_of(path)]


def mappings_of(path: Path) -> list[residency.Mapping]:
    with contextlib.closing(OpenedFile(path)) as file:
        return residency.find_mappings(file)


def test_locked_weights_are_locked(zoo_model: Model, paged: Factory) -> None:
    before = locked_bytes()
    llm = paged(zoo_model("gemma4"), lock_dense="lock")
    dense_bytes = llm.pager.layout.dense_bytes
    assert state_of(llm).method == "lock"
    assert state_of(llm).n_bytes >= dense_bytes
    # Whole pages; and the arena, where the limit allows.
    assert dense_bytes <= locked_bytes() - before < dense_bytes + llm.pager.arena_bytes + (1 << 20)
    llm.close()
    assert locked_bytes() == before


@pytest.mark.parametrize(("method", "done"), (("auto", "lock"), ("lock", "lock"), ("copy", "copy"), ("off", "copy")))
def test_weights_are_no_longer_mapped_from_the_file(zoo_model: Model, paged: Factory, method: str, done: str) -> None:
    path = zoo_model("gemma4")
    llm = paged(path, lock_dense=method)
    assert state_of(llm).method == done
    mapped = mapped_offsets(path)
    assert mapped, "the experts are, for nodes that are left alone"
    for piece in llm.pager.layout.dense:
        for first, end in mapped:
            assert end <= piece.offset_bytes or first >= piece.offset_bytes + piece.n_bytes


def test_weights_are_not_locked_where_nobody_wants_it(zoo_model: Model, paged: Factory) -> None:
    before = locked_bytes()
    llm = paged(zoo_model("gemma4"), lock_dense="off")
    assert locked_bytes() - before in (0, -(-llm.pager.arena_bytes // mmap.PAGESIZE) * mmap.PAGESIZE), "but the arena"


def refuse(address: int, n_bytes: int) -> None:
    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


def test_auto_copies_where_locking_is_not_allowed(
    zoo_model: Model, pair: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_native, "memory_lock", refuse)
    ours, theirs = pair(zoo_model("gemma4"), logits_all=True)
    assert state_of(ours).method == "copy"
    assert state_of(ours).n_bytes >= ours.pager.layout.dense_bytes
    assert (evaluate(ours, some_tokens(6)) == evaluate(theirs, some_tokens(6))).all()


def test_lock_that_is_not_allowed_is_an_error_with_the_remedy(
    zoo_model: Model, paged: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = zoo_model("gemma4")
    monkeypatch.setattr(_native, "memory_lock", refuse)
    before = footprint_of(path)
    with pytest.raises(BudgetError, match=r"cannot be locked: Cannot allocate memory\. Raise the limit \(ulimit -l\)"):
        paged(path, lock_dense="lock")
    assert footprint_of(path) == before


def refuse_the_second(address: int, n_bytes: int) -> None:
    if LOCKED:
        refuse(address, n_bytes)
    LOCKED.append(address)


LOCKED: list[int] = []


def test_nothing_stays_locked_where_not_all_can_be(
    zoo_model: Model, paged: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = _native.memory_lock
    monkeypatch.setattr(_native, "memory_lock", lambda *of: (refuse_the_second(*of), lock(*of)))
    before = locked_bytes()
    llm = paged(zoo_model("gemma4"))
    assert state_of(llm).method == "copy" and LOCKED
    assert locked_bytes() - before in (0, -(-llm.pager.arena_bytes // mmap.PAGESIZE) * mmap.PAGESIZE), "but the arena"


@pytest.mark.parametrize("is_direct", (True, False))
def test_copy_holds_the_bytes_of_the_file(tmp_path: Path, is_direct: bool) -> None:
    """Up to a last page that the file does not fill; more than one step; read past the page cache, and from it."""
    path = tmp_path / "file"
    content = np.random.default_rng(1).integers(0, 256, (20 << 20) + 1234, dtype=np.uint8)
    path.write_bytes(content.tobytes())
    mapped = np.memmap(path, dtype=np.uint8, mode="r")
    layout = dataclasses.replace(EMPTY, paths=(path,), dense=(Range(0, 5000, 4000), Range(0, 9 << 20, content.size - (9 << 20))))
    with ModelFiles() as files:
        files.open(path)
        mapping = residency.Mapping(mapped.ctypes.data, 0, content.size)
        kept = residency.keep_dense(layout, files, [[mapping]], "copy", is_direct=is_direct)
    assert [(copy.offset_bytes, copy.n_bytes) for copy in kept.copies] == [(4096, 8192), (9 << 20, (11 << 20) + 4096)]
    with open(path, "r+b") as file:
        file.write(bytes(content.size))
    assert (mapped[9 << 20 :] == content[9 << 20 :]).all() and (mapped[4096:12288] == content[4096:12288]).all()
    assert not mapped[:4096].any() and not mapped[12288 : 9 << 20].any(), "the rest is the file's"


EMPTY = Layout(paths=(), architecture="", name="", values={}, layers=(), shapes=(), dense=(), idle_bytes=0, n_vocab=0)


def test_interrupted_copy_ends_at_once_and_frees_what_it_has_when_its_reads_end(tmp_path: Path) -> None:
    """A disk that fails keeps a read for minutes, and the memory it reads into must stay its own until then."""
    may_end, released = threading.Event(), threading.Event()

    def hang() -> None:
        assert may_end.wait(30)

    crew = residency._Crew([hang, hang], released.set)
    timer = threading.Timer(0.2, signal.raise_signal, (signal.SIGINT,))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        crew.run()
    assert not released.is_set()
    may_end.set()
    assert released.wait(30)


def test_pages_of_experts_are_given_back(zoo_model: Model, stock: Factory) -> None:
    """What a load without the shim has brought in."""
    path = zoo_model("gemma4")
    llm = stock(path)
    llm.eval(some_tokens(30))
    layout = read_layout(path)

    def resident_kb() -> int:
        smaps = Path("/proc/self/smaps").read_text()
        return sum(int(rss) for name, rss in re.findall(r"r--s [^\n]*?(\S+)\nSize:[^\n]*\n(?:[^\n]*\n){2}Rss:\s+(\d+)", smaps)
                   if name == str(path))

    before = resident_kb()
    with ModelFiles() as files:
        residency.release_experts(open_layout([path], files), files)
    assert before - resident_kb() >= layout.expert_bytes // 1024 * 0.9


def test_weights_of_a_budget_that_only_seemed_too_small_are_kept(
    zoo_model: Model, pair: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the model is loaded there may be less room than when its first context is made."""
    monkeypatch.setattr(loading, "may_be_enough", lambda *_: False)
    ours, theirs = pair(zoo_model("gemma4"), logits_all=True)
    kept = state_of(ours)
    assert kept.method in ("lock", "copy") and kept.n_bytes >= ours.pager.layout.dense_bytes
    os.utime(zoo_model("gemma4"))
    assert (evaluate(ours, some_tokens(6)) == evaluate(theirs, some_tokens(6))).all()


def test_mapping_of_an_earlier_model_is_not_touched(zoo_model: Model, stock: Factory, paged: Factory) -> None:
    path = zoo_model("qwen3moe")
    theirs = stock(path)
    before = mappings_of(path)
    ours = paged(path, lock_dense="copy")
    after = mappings_of(path)
    assert set(before) <= set(after)
    assert len(residency.without(after, before)) == len(after) - len(before) > 0
    assert low.llama_n_ctx(ours.ctx) == low.llama_n_ctx(theirs.ctx)
