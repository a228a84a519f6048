"""Dense weights stay in RAM, by lock or by copy, and only those of the model that was just loaded."""

from __future__ import annotations

import errno
import mmap
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Factory, evaluate, footprint_of, some_tokens
from llama_cpp import llama_cpp as low

from gguf_pager import BudgetError, _native, hooks, residency
from gguf_pager.layout import read_layout

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
    return [(mapping.offset_bytes, mapping.offset_bytes + mapping.n_bytes) for mapping in residency.find_mappings(path)]


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


def test_copied_weights_are_no_longer_mapped_from_the_file(zoo_model: Model, paged: Factory) -> None:
    path = zoo_model("gemma4")
    llm = paged(path, lock_dense="copy")
    assert state_of(llm).method == "copy"
    mapped = mapped_offsets(path)
    assert mapped, "the experts are, for nodes that are left alone"
    for piece in llm.pager.layout.dense:
        for first, end in mapped:
            assert end <= piece.offset_bytes or first >= piece.offset_bytes + piece.n_bytes


def test_weights_left_off_are_left_alone(zoo_model: Model, paged: Factory) -> None:
    before = locked_bytes()
    llm = paged(zoo_model("gemma4"), lock_dense="off")
    assert state_of(llm) == residency.Residency("off", 0)
    assert locked_bytes() - before in (0, -(-llm.pager.arena_bytes // mmap.PAGESIZE) * mmap.PAGESIZE), "but the arena"
    assert len(mapped_offsets(zoo_model("gemma4"))) == 1


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


def test_copy_holds_the_bytes_of_the_file(tmp_path: Path) -> None:
    """Up to a last page that the file does not fill; more than one step."""
    path = tmp_path / "file"
    content = np.random.default_rng(1).integers(0, 256, (20 << 20) + 1234, dtype=np.uint8)
    path.write_bytes(content.tobytes())
    mapped = np.memmap(path, dtype=np.uint8, mode="r")
    n_pages_bytes = -(-content.size // 4096) * 4096
    residency._replace_by_copy(path, mapped.ctypes.data, 0, n_pages_bytes)
    with open(path, "r+b") as file:
        file.write(bytes(content.size))
    assert (mapped == content).all()


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
    residency.release_experts(layout)
    assert before - resident_kb() >= layout.expert_bytes // 1024 * 0.9


def test_change_of_a_file_is_found_and_named(zoo_model: Model, tmp_path: Path) -> None:
    import make_zoo

    layout = read_layout(make_zoo.make_split(zoo_model("qwen3moe"), tmp_path, 3))
    identities = [residency.identify(path) for path in layout.paths]
    assert residency.find_change(layout.paths, identities) is None
    os.truncate(layout.paths[2], 5000)
    assert residency.find_change(layout.paths, identities) == (errno.ENODATA, 2, 5000)
    os.utime(layout.paths[1], ns=(1, 1))
    assert residency.find_change(layout.paths, identities) == (errno.ESTALE, 1, 0)
    for path in layout.paths:
        path.unlink()
    assert residency.find_change(layout.paths, identities) is None, "what is mapped lives on"


def test_mapping_of_an_earlier_model_is_not_touched(zoo_model: Model, stock: Factory, paged: Factory) -> None:
    path = zoo_model("qwen3moe")
    theirs = stock(path)
    before = residency.find_mappings(path)
    ours = paged(path, lock_dense="copy")
    after = residency.find_mappings(path)
    assert set(before) <= set(after)
    assert len(residency._without(after, before)) == len(after) - len(before) > 0
    assert low.llama_n_ctx(ours.ctx) == low.llama_n_ctx(theirs.ctx)
