"""Small files kept between processes: found again, or absent; nothing ever fails for their sake."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from gguf_pager import cache


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GGUF_PAGER_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept"


def test_what_was_written_is_read(folder: Path) -> None:
    assert cache.read_json("a.json") is None
    cache.write_json("a.json", {"x": [1, 2.5, None]})
    cache.write_json("deeper/b.json", [3])
    assert cache.read_json("a.json") == {"x": [1, 2.5, None]} and cache.read_json("deeper/b.json") == [3]
    cache.write_json("a.json", 4)
    assert cache.read_json("a.json") == 4
    assert sorted(path.name for path in folder.rglob("*")) == ["a.json", "b.json", "deeper"], "nothing else is left"


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"{'x': 1}"])
def test_damaged_is_absent(folder: Path, damage: bytes) -> None:
    cache.write_json("a.json", 1)
    (folder / "a.json").write_bytes(damage)
    assert cache.read_json("a.json") is None
    cache.write_json("a.json", 2)
    assert cache.read_json("a.json") == 2


def test_folder_that_cannot_be_written_is_no_failure(folder: Path) -> None:
    folder.write_text("a file is in its place")
    cache.write_json("a.json", 1)
    assert cache.read_json("a.json") is None and folder.read_text() == "a file is in its place"


def test_full_disk_leaves_what_there_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write_json("a.json", 1)

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        cache.write_json("a.json", 2)
    assert cache.read_json("a.json") == 1
    assert [path.name for path in folder.iterdir()] == ["a.json"]


def test_folder_is_where_the_system_keeps_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("GGUF_PAGER_CACHE", str(tmp_path / "own"))
    assert cache.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("GGUF_PAGER_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache.cache_folder() == tmp_path / "xdg" / "gguf_pager"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_folder() == tmp_path / ".cache" / "gguf_pager"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache.cache_folder() == tmp_path / "Library" / "Caches" / "gguf_pager"


def test_user_without_a_home_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("GGUF_PAGER_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", none)
    assert cache.cache_folder() is None
    cache.write_json("a.json", 1)
    assert cache.read_json("a.json") is None


# ---- what is no file of ours ----

MAKERS = {
    "link to a device": lambda path: path.symlink_to("/dev/zero"),
    "link to a full device": lambda path: path.symlink_to("/dev/full"),
    "link to a file": lambda path: path.symlink_to(path.parent.parent / "target.json"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "pipe": lambda path: os.mkfifo(path),
    "folder": lambda path: path.mkdir(),
    "huge": lambda path: (path.touch(), os.truncate(path, 1 << 40)),
    "a little too large": lambda path: path.write_text("[" + " " * cache.MOST_BYTES + "]"),
}


@pytest.mark.parametrize("what", MAKERS)
def test_what_is_no_small_file_is_absent_at_once_and_its_target_is_left_alone(folder: Path, what: str) -> None:
    folder.mkdir()
    target = folder.parent / "target.json"
    target.write_text("[1]")
    path = folder / "a.json"
    MAKERS[what](path)
    begun = time.monotonic()
    assert cache.read_json("a.json") is None
    is_kept = cache.write_json("a.json", 2)
    assert time.monotonic() - begun < 2
    assert is_kept == (what != "folder") and cache.read_json("a.json") == (None if what == "folder" else 2)
    assert target.read_text() == "[1]"
    assert [path.name for path in folder.iterdir()] == ["a.json"]


def test_interrupt_while_writing_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write_json("a.json", 1)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            cache.write_json("a.json", 2)
    assert [path.name for path in folder.iterdir()] == ["a.json"] and cache.read_json("a.json") == 1


def test_lock_keeps_others_out_and_nobody_waits_for_long(folder: Path) -> None:
    begun = time.monotonic()
    with cache.locked(0) as first, cache.locked(0.1) as second:
        assert first and not second
    assert 0.05 < time.monotonic() - begun < 5
    with cache.locked(0) as again:
        assert again


def test_where_there_is_no_lock_nobody_is_kept_out(folder: Path) -> None:
    (folder / ".lock").mkdir(parents=True)
    with cache.locked(0) as first, cache.locked(0) as second:
        assert first and second
