"""A cap on memory holds where the machine allows one, says why where not, and leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gguf_pager import cap

MIB = 1 << 20

ALLOCATE = "import sys; block = b'x' * (int(sys.argv[1]) << 20); print(len(block))"


def allocate(limit: cap.Cap, mib: int) -> subprocess.CompletedProcess[str]:
    command = limit.command([sys.executable, "-c", ALLOCATE, str(mib)])
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


# ---- the machine's own groups ----

@pytest.fixture
def real_cap() -> object:
    with cap.memory_cap(100 * MIB) as limit:
        if limit.method == "none":
            pytest.skip(f"no cap can be imposed here: {limit.reason}")
        yield limit


def test_process_within_the_cap_lives_and_one_above_it_dies(real_cap: cap.Cap) -> None:
    assert real_cap.limit_bytes == 100 * MIB
    assert allocate(real_cap, 20).stdout == f"{20 * MIB}\n"
    if real_cap.folder is not None:
        peak = real_cap.peak_bytes()
        assert peak is None or 20 * MIB < peak <= 100 * MIB
    assert allocate(real_cap, 300).returncode != 0


def test_group_is_removed_at_the_end_even_of_a_body_that_raises() -> None:
    folder = None
    with pytest.raises(KeyError), cap.memory_cap(100 * MIB) as limit:
        folder = limit.folder
        if folder is None:
            pytest.skip(f"no group can be made here: {limit.method} {limit.reason}")
        assert folder.exists()
        raise KeyError
    assert folder is not None and not folder.exists()


def test_no_cap_runs_commands_as_they_are() -> None:
    with cap.memory_cap(None) as limit:
        assert (limit.method, limit.limit_bytes, limit.peak_bytes()) == ("none", None, None)
        assert limit.reason == "no cap was asked for"
        assert limit.command(["a", "b"]) == ["a", "b"]
        assert allocate(limit, 1).returncode == 0


# ---- groups made of files ----

@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cap, "_ROOT", tmp_path)
    monkeypatch.setattr(cap, "_systemd_allows", lambda: False)
    return tmp_path


def test_machine_without_groups_says_why(root: Path) -> None:
    with cap.memory_cap(5) as limit:
        assert limit.method == "none" and limit.limit_bytes is None
        assert limit.reason is not None
        for part in ("cgroup2: not mounted", "cgroup1: no such controller here", "systemd-run --user"):
            assert part in limit.reason


def test_version_2_without_the_memory_controller_is_left_as_it_was(root: Path) -> None:
    (root / "cgroup.controllers").write_text("cpu memory")
    with cap.memory_cap(5) as limit:
        assert limit.reason is not None and "not delegated" in limit.reason
    assert [path.name for path in root.rglob("gguf_pager-*")] == []


def test_version_1_group_that_refuses_the_limit_is_removed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "memory").mkdir()
    (root / "memory" / "memory.limit_in_bytes").write_text("1")

    def refuse(path: Path, text: str) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_text", refuse)
    with cap.memory_cap(5) as limit:
        assert limit.reason is not None and "cgroup1: Permission denied" in limit.reason
    assert list((root / "memory").glob("gguf_pager-*")) == []


def test_systemd_is_asked_last(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cap, "_systemd_allows", lambda: True)
    with cap.memory_cap(5 * MIB) as limit:
        assert limit.method == "systemd"
        command = limit.command(["prog", "arg"])
        assert command[:2] == ["systemd-run", "--user"] and command[-3:] == ["--", "prog", "arg"]
        assert f"MemoryMax={5 * MIB}" in command and "MemorySwapMax=0" in command
        assert limit.peak_bytes() is None


def test_command_moves_itself_into_the_group_first(tmp_path: Path) -> None:
    """The group is a folder of plain files: what is written there is the number of the process that runs."""
    limit = cap.Cap("cgroup2", 5, None, tmp_path)
    (tmp_path / "cgroup.procs").touch()
    program = "import os, sys; print(os.getpid(), *sys.argv[1:])"
    done = subprocess.run(limit.command([sys.executable, "-c", program, "an argument", "$HOME"]), capture_output=True,
                          text=True, timeout=30, check=False)
    number, rest = done.stdout.split(maxsplit=1)
    assert (tmp_path / "cgroup.procs").read_text().strip() == number
    assert rest == "an argument $HOME\n"


@pytest.mark.parametrize(("method", "name"), (("cgroup1", "memory.max_usage_in_bytes"), ("cgroup2", "memory.peak")))
def test_peak_is_read_from_the_group_or_unknown(tmp_path: Path, method: str, name: str) -> None:
    limit = cap.Cap(method, 5, None, tmp_path)
    assert limit.peak_bytes() is None
    (tmp_path / name).write_text("123\n")
    assert limit.peak_bytes() == 123
    (tmp_path / name).write_text("max\n")
    assert limit.peak_bytes() is None


# ---- read-ahead and the page cache ----

def test_read_ahead_is_set_for_the_block_and_restored_always(tmp_path: Path) -> None:
    setting = tmp_path / "read_ahead_kb"
    setting.write_text("8192\n")
    with cap.read_ahead(setting, 128) as kb:
        assert kb == 128 and setting.read_text() == "128"
    assert setting.read_text() == "8192"
    with pytest.raises(KeyError), cap.read_ahead(setting, 0):
        assert setting.read_text() == "0"
        raise KeyError
    assert setting.read_text() == "8192"


def test_read_ahead_that_cannot_be_set_is_told_as_it_is(tmp_path: Path) -> None:
    with cap.read_ahead(None, 128) as kb:
        assert kb is None
    with cap.read_ahead(tmp_path / "missing", 128) as kb:
        assert kb is None
    setting = tmp_path / "read_ahead_kb"
    setting.write_text("8192")
    for wanted in (None, 8192):
        with cap.read_ahead(setting, wanted) as kb:
            assert kb == 8192
    setting.write_text("nonsense")
    with cap.read_ahead(setting, 128) as kb:
        assert kb is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_ahead_without_permission_stays(tmp_path: Path) -> None:
    setting = tmp_path / "read_ahead_kb"
    setting.write_text("8192")
    setting.chmod(0o444)
    with cap.read_ahead(setting, 128) as kb:
        assert kb == 8192


def resident_pages(path: Path) -> int:
    """Return how many pages of a file are in the page cache, by mincore()."""
    import ctypes

    import numpy as np

    mapped = np.memmap(path, dtype=np.uint8, mode="r")
    n_pages = -(-mapped.size // 4096)
    seen = (ctypes.c_ubyte * n_pages)()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mincore(ctypes.c_void_p(mapped.ctypes.data), ctypes.c_size_t(mapped.size), seen) == 0
    return sum(byte & 1 for byte in seen)


@pytest.mark.skipif(sys.platform != "linux", reason="macOS cannot be asked to forget a file")
def test_files_are_dropped_from_the_page_cache(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(4 * MIB))
    if resident_pages(path) < 1024:
        pytest.skip("this file system does not tell what is cached")
    cap.drop_from_page_cache([path])
    assert resident_pages(path) < 1024 // 4
