"""A cap on memory holds where the machine allows one, says why where not, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gguf_pager.memory import cap

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


# ---- below a group that has a limit already: version 1, for real ----

TELL = """
import json, sys
from gguf_pager.memory import cap
with cap.memory_cap(int(sys.argv[1])) as limit:
    print(json.dumps([limit.method, limit.limit_bytes, limit.reason, str(limit.folder)]), flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def nested() -> Iterator[Path]:
    """A group of 200 MiB below that of this process."""
    own = cap._own_folder(Path("/sys/fs/cgroup/memory"), is_v1=True)
    folder = own / f"test_cap-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / "memory.limit_in_bytes").write_text(str(200 * MIB))
    except OSError as error:
        with contextlib.suppress(OSError):
            folder.rmdir()
        pytest.skip(f"needs root and cgroup v1: {error}")
    try:
        yield folder
    finally:
        for child in folder.glob("*/"):  # of a test that failed
            with contextlib.suppress(OSError):
                child.rmdir()
        cap._remove(folder)
        assert not folder.exists()


def start_in(folder: Path, *command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(cap.Cap("cgroup1", None, None, folder).command(command), stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, text=True)


def told(child: subprocess.Popen[str]) -> list[Any]:
    assert child.stdout is not None
    found: list[Any] = json.loads(child.stdout.readline())
    return found


def test_group_lies_below_our_own_and_states_the_limit_in_force(nested: Path) -> None:
    for asked, reason in ((100 * MIB, None),
                          (400 * MIB, "419,430,400 bytes were asked for, and the group that this runs in has only 209,715,200")):
        with start_in(nested, sys.executable, "-c", TELL, str(asked)) as child:
            method, limit_bytes, told_reason, folder = told(child)
            assert (method, limit_bytes, Path(folder).parent) == ("cgroup1", min(asked, 200 * MIB), nested)
            assert told_reason is None or told_reason.replace("; swap is not limited", "") in (reason, "swap is not limited")
            assert reason is None or reason in told_reason
            assert int((Path(folder) / "memory.limit_in_bytes").read_text()) == limit_bytes
            child.communicate("\n")
        assert not Path(folder).exists()


def test_container_that_sees_only_its_own_groups_makes_one_there(nested: Path) -> None:
    """Without a cgroup namespace /proc/self/cgroup names paths that the container's mount does not have."""
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare (util-linux)")
    view = f"mount --bind {nested} /sys/fs/cgroup/memory && exec {sys.executable} -c \"$0\" {100 * MIB}"
    with start_in(nested, "unshare", "--mount", "sh", "-c", view, TELL) as child:
        line = child.communicate("\n")[0]
        if child.returncode and not line:
            pytest.skip("no mount namespace can be made here")
    method, limit_bytes, _, folder = json.loads(line)
    assert (method, limit_bytes) == ("cgroup1", 100 * MIB)
    assert Path(folder).parent == Path("/sys/fs/cgroup/memory"), "of the view, which is the group of 200 MiB"


def test_group_is_removed_after_its_maker_was_killed(nested: Path) -> None:
    with start_in(nested, sys.executable, "-c", TELL, str(100 * MIB)) as child:
        folder = Path(told(child)[3])
        assert folder.is_dir()
        child.kill()
    until = time.monotonic() + 30
    while folder.exists():
        assert time.monotonic() < until, "it is still there"
        time.sleep(0.02)


# ---- groups made of files ----

@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cap, "_ROOT", tmp_path)
    monkeypatch.setattr(cap, "_systemd_folder", lambda: None)
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


@pytest.fixture
def own_v2(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A process in a scope below a slice, as systemd arranges them; new groups have the files that the kernel would make."""
    scope = root / "app.slice" / "run.scope"
    scope.mkdir(parents=True)
    (root / "cgroup.controllers").write_text("memory")
    (root / "proc").mkdir()
    (root / "proc" / "cgroup").write_text("1:cpu:/elsewhere\n0::/app.slice/run.scope\n")
    monkeypatch.setattr(cap, "_PROC", root / "proc")
    make = Path.mkdir

    def make_as_the_kernel_does(path: Path, *arguments: Any, **named: Any) -> None:
        make(path, *arguments, **named)
        (path / "memory.max").write_text("max")
        (path / "cgroup.procs").write_text("")

    def remove(folder: Path) -> None:
        shutil.rmtree(folder)

    monkeypatch.setattr(Path, "mkdir", make_as_the_kernel_does)
    monkeypatch.setattr(cap, "_remove", remove)
    return scope


def test_version_2_group_stands_beside_the_scope_of_this_process(root: Path, own_v2: Path) -> None:
    """A scope with processes cannot hand its controllers to a child."""
    with cap.memory_cap(100 * MIB) as limit:
        assert limit.folder is not None and limit.folder.parent == own_v2.parent
        assert (limit.method, limit.limit_bytes) == ("cgroup2", 100 * MIB)
        assert (limit.folder / "memory.max").read_text() == str(100 * MIB)
        assert (limit.folder / "cgroup.procs").read_text().strip().isdecimal(), "whether a process may move was tried"


@pytest.mark.parametrize(("group", "name"), (("app.slice/run.scope", "memory.max"), ("app.slice/run.scope", "memory.high"),
                                             ("app.slice", "memory.max"), ("app.slice", "memory.high")))
def test_version_2_group_is_never_above_our_own_limit(root: Path, own_v2: Path, group: str, name: str) -> None:
    """What limits a scope does not limit the group beside it, unless that is told."""
    (root / group / name).write_text(f"{60 * MIB}\n")
    with cap.memory_cap(100 * MIB) as limit:
        assert limit.limit_bytes == 60 * MIB
        assert limit.reason is not None and "104,857,600 bytes were asked for" in limit.reason and "62,914,560" in limit.reason
        assert limit.folder is not None and int((limit.folder / "memory.max").read_text()) == 60 * MIB


def test_group_that_no_process_may_enter_is_none(root: Path, own_v2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cap, "_SHELL", "exit 2")
    with cap.memory_cap(100 * MIB) as limit:
        assert limit.method == "none" and "cgroup2: no process may be moved" in (limit.reason or "")
    assert list(root.rglob("gguf_pager-*")) == []


@pytest.mark.parametrize(("name", "mounted", "expected"), (
    ("/a/b", "/", "a/b"), ("/docker/x", "/docker/x", ""), ("/docker/x/b", "/docker/x", "b"), ("/docker/xy", "/docker/x", ""),
    ("/gone", "/", ""), ("/../other", "/", ""), ("/", "/", ""), ("/c d", "/", "c d")))
def test_own_group_is_found_in_a_view_that_may_be_cut(root: Path, monkeypatch: pytest.MonkeyPatch, name: str, mounted: str,
                                                      expected: str) -> None:
    base = root / "memory"
    for folder in ("a/b", "b", "c d"):
        (base / folder).mkdir(parents=True)
    (root / "cgroup").write_text(f"2:cpu,memory:{name}\n0::/elsewhere\n")
    (root / "mountinfo").write_text(f"35 31 0:32 {mounted} {base} rw - cgroup cgroup rw,memory\n")
    monkeypatch.setattr(cap, "_PROC", root)
    assert cap._own_folder(base, is_v1=True) == base / expected


def test_groups_that_do_not_count_their_children_are_no_way_out(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Linux 5.11 version 1 had groups with use_hierarchy 0, which do not limit what lies below them."""
    own = root / "memory" / "own"
    own.mkdir(parents=True)
    for folder, limit in ((root / "memory", 1 << 62), (own, 60 * MIB)):
        (folder / "memory.limit_in_bytes").write_text(str(limit))
        (folder / "memory.use_hierarchy").write_text("0")
    (root / "cgroup").write_text("2:memory:/own\n")
    monkeypatch.setattr(cap, "_PROC", root)
    monkeypatch.setattr(cap, "_remove", shutil.rmtree)
    with cap.memory_cap(100 * MIB) as limit:
        assert limit.folder is not None and limit.folder.parent == own
        assert (limit.folder / "memory.limit_in_bytes").read_text() == str(60 * MIB)
        assert limit.limit_bytes == 60 * MIB
        assert limit.reason is not None and "the groups above do not count what this one takes" in limit.reason


def test_systemds_groups_are_below_limits_too(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "user.slice").mkdir()
    (root / "user.slice" / "memory.max").write_text(str(3 * MIB))
    monkeypatch.setattr(cap, "_systemd_folder", lambda: root / "user.slice")
    with cap.memory_cap(5 * MIB) as limit:
        assert (limit.method, limit.limit_bytes) == ("systemd", 3 * MIB)
        assert "5,242,880 bytes were asked for" in (limit.reason or "")
        assert f"MemoryMax={3 * MIB}" in limit.command(["prog"])


def test_systemd_is_asked_last(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cap, "_systemd_folder", lambda: root)
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
