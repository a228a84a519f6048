"""What the machine has, read from trees of files as kernels write them, and compared with this one where it can be."""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from gguf_pager import probe

MIB = 1 << 20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and /sys")


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def limits(tmp_path: Path, membership: str, files: dict[str, str]) -> tuple[int, int] | None:
    write(tmp_path, {"membership": membership} | {f"root/{name}": text for name, text in files.items()})
    return probe._cgroup_memory(tmp_path / "membership", tmp_path / "root")


def test_cgroup_v2_limit_is_found_and_cache_does_not_count(tmp_path: Path) -> None:
    found = limits(tmp_path, "0::/user.slice/app\n", {
        "user.slice/app/memory.max": f"{500 * MIB}\n",
        "user.slice/app/memory.current": f"{300 * MIB}\n",
        "user.slice/app/memory.stat": f"anon 1\ninactive_file {120 * MIB}\nactive_file 7\n",
    })
    assert found == (500 * MIB, 180 * MIB)


@pytest.mark.parametrize("tighter", ("a", "a/b", "a/b/c"))
def test_tightest_limit_above_the_process_counts(tmp_path: Path, tighter: str) -> None:
    files = {f"{group}/memory.max": f"{(100 if group == tighter else 900) * MIB}" for group in ("a", "a/b", "a/b/c")}
    files |= {f"{group}/memory.current": f"{(40 if group == tighter else 1) * MIB}" for group in ("a", "a/b", "a/b/c")}
    assert limits(tmp_path, "0::/a/b/c\n", files) == (100 * MIB, 40 * MIB)


def test_groups_without_a_limit_are_none(tmp_path: Path) -> None:
    assert limits(tmp_path, "0::/a\n", {"a/memory.max": "max\n", "a/memory.current": "5"}) is None


def test_cgroup_v1_limit_is_found_and_cache_does_not_count(tmp_path: Path) -> None:
    found = limits(tmp_path, "5:cpu,cpuacct:/x\n4:memory:/docker/abc\n0::/elsewhere\n", {
        "memory/docker/abc/memory.limit_in_bytes": f"{700 * MIB}\n",
        "memory/docker/abc/memory.usage_in_bytes": f"{600 * MIB}\n",
        "memory/docker/abc/memory.stat": f"inactive_file 3\ntotal_inactive_file {100 * MIB}\n",
        "memory/memory.limit_in_bytes": "9223372036854771712\n",
    })
    assert found == (700 * MIB, 500 * MIB)


def test_cgroup_v1_limit_of_the_container_itself_is_found(tmp_path: Path) -> None:
    """Inside a container the path of the host does not exist; the limit lies at the root of what is mounted."""
    found = limits(tmp_path, "4:memory:/docker/abc\n", {
        "memory/memory.limit_in_bytes": f"{64 * MIB}", "memory/memory.usage_in_bytes": f"{10 * MIB}",
    })
    assert found == (64 * MIB, 10 * MIB)


def test_cgroup_v1_without_limit_is_none(tmp_path: Path) -> None:
    assert limits(tmp_path, "4:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712"}) is None


def test_mixed_hierarchies_take_the_tightest(tmp_path: Path) -> None:
    found = limits(tmp_path, "4:memory:/a\n0::/b\n", {
        "memory/a/memory.limit_in_bytes": f"{300 * MIB}", "memory/a/memory.usage_in_bytes": "1",
        "b/memory.max": f"{200 * MIB}", "b/memory.current": "2",
    })
    assert found == (200 * MIB, 2)


@pytest.mark.parametrize("text", ("", "garbage", "12 MB", "-"))
def test_files_that_make_no_sense_are_no_limit(tmp_path: Path, text: str) -> None:
    assert limits(tmp_path, "0::/a\n", {"a/memory.max": text}) is None


def test_usage_below_the_cache_is_none_used(tmp_path: Path) -> None:
    files = {"a/memory.max": "1000", "a/memory.current": "10", "a/memory.stat": "inactive_file 500"}
    assert limits(tmp_path, "0::/a\n", files) == (1000, 0)


def test_missing_files_are_no_limit(tmp_path: Path) -> None:
    assert probe._cgroup_memory(tmp_path / "none", tmp_path) is None
    assert limits(tmp_path, "0::/a\n", {"x": ""}) is None
    assert limits(tmp_path, "0::/a\n", {"a/memory.max": "1000"}) == (1000, 0), "usage unknown counts as none"


def test_memory_of_this_machine_is_plausible() -> None:
    memory = probe.memory()
    assert 0 < memory.available_bytes <= memory.total_bytes == psutil.virtual_memory().total
    assert memory.limit_bytes is None or memory.limit_bytes > 0
    assert memory.swap_bytes == psutil.swap_memory().total


def test_available_memory_respects_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_cgroup_memory", lambda membership, root: (300 * MIB, 100 * MIB))
    assert probe.memory().available_bytes == 200 * MIB and probe.memory().limit_bytes == 300 * MIB
    monkeypatch.setattr(probe, "_cgroup_memory", lambda membership, root: (300 * MIB, 400 * MIB))
    assert probe.memory().available_bytes == 0


ALLOCATE = """
from gguf_pager import probe
seen = [probe.process_memory()]
block = bytearray(64 << 20)
block[::4096] = b"x" * len(block[::4096])
seen.append(probe.process_memory())
del block
seen.append(probe.process_memory())
for memory in seen:
    print(memory.resident_bytes, memory.peak_bytes, memory.allocated_bytes)
"""


def test_process_memory_follows_what_is_allocated_and_touched() -> None:
    """In a fresh process, whose heap has no room to give out again."""
    done = subprocess.run([sys.executable, "-c", ALLOCATE], capture_output=True, text=True, timeout=30, check=True,
                          cwd=Path(__file__).parent.parent)
    before, during, after = ([int(word) for word in line.split()] for line in done.stdout.splitlines())
    resident, peak, allocated = range(3)
    assert 63 * MIB <= during[resident] - before[resident] <= 80 * MIB
    assert 63 * MIB <= during[allocated] - before[allocated] <= 66 * MIB
    assert during[resident] - after[resident] >= 60 * MIB
    # The kernel's counters lag by some pages.
    assert min(during[peak], after[peak]) >= during[resident] - MIB


REUSE = """
import ctypes
from gguf_pager import probe
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD: from the heap
blocks = [libc.malloc(20 << 20), libc.malloc(1 << 20)]  # the second keeps the heap from shrinking
ctypes.memset(blocks[0], 1, 20 << 20)
libc.free(blocks[0])
seen = [probe.process_memory()]
probe.give_back_free_memory()
seen.append(probe.process_memory())
libc.malloc(20 << 20)
seen.append(probe.process_memory())
for memory in seen:
    print(memory.resident_bytes, memory.allocated_bytes)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33")
def test_memory_given_out_again_counts_although_no_address_is_new() -> None:
    done = subprocess.run([sys.executable, "-c", REUSE], capture_output=True, text=True, timeout=30, check=True,
                          cwd=Path(__file__).parent.parent)
    freed, given_back, again = ([int(word) for word in line.split()] for line in done.stdout.splitlines())
    resident, allocated = range(2)
    assert freed[resident] - given_back[resident] >= 19 * MIB, "what was freed is not resident any more"
    assert 19 * MIB <= again[allocated] - given_back[allocated] <= 21 * MIB
    assert again[resident] - given_back[resident] <= MIB, "not touched yet"


def test_lock_limit_is_none_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (8 * MIB, 64 * MIB))
    assert probe.lock_limit_bytes() == 8 * MIB
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY,) * 2)
    assert probe.lock_limit_bytes() is None
    monkeypatch.setattr(resource, "getrlimit", lambda which: (8 * MIB, 64 * MIB))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert probe.lock_limit_bytes() is None, "root may lock all"


def test_read_ahead_is_the_devices_or_unknown(tmp_path: Path) -> None:
    setting = probe.read_ahead_setting(tmp_path)
    if setting is None:
        assert probe.read_ahead_kb(tmp_path) is None
    else:
        assert probe.read_ahead_kb(tmp_path) == int(setting.read_text())
    assert probe.read_ahead_setting("/proc/self/status") is None, "no device"
    assert probe.read_ahead_setting(tmp_path / "missing") is None and probe.read_ahead_kb(tmp_path / "missing") is None
