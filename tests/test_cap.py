"""A cap on memory holds where the machine allows one, says why where not, and leaves nothing behind."""

from __future__ import annotations

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


@pytest.mark.parametrize(("method", "name"), (("cgroup1", "memory.oom_control"), ("cgroup2", "memory.events")))
def test_kills_are_read_from_the_group_or_unknown(tmp_path: Path, method: str, name: str) -> None:
    limit = cap.Cap(method, 5, None, tmp_path)
    assert limit.oom_kills() is None
    (tmp_path / name).write_text("under_oom 0\noom_kill 2\n")
    assert limit.oom_kills() == 2
    assert cap.Cap("systemd", 5).oom_kills() is None


def test_process_ended_by_the_cap_is_counted(real_cap: cap.Cap) -> None:
    if real_cap.folder is None:
        pytest.skip("systemd does not tell")
    assert real_cap.oom_kills() == 0
    allocate(real_cap, 300)
    assert real_cap.oom_kills() == 1
