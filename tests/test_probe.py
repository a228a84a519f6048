"""What the machine has, read from trees of files as kernels write them, and compared with this one where it can be."""

from __future__ import annotations

import ctypes
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from gguf_pager.memory import cgroup, probe

MIB = 1 << 20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and /sys")


def test_memory_of_this_machine_is_plausible() -> None:
    memory = probe.memory()
    assert 0 < memory.available_bytes <= memory.reachable_bytes <= memory.total_bytes
    assert memory.total_bytes <= memory.ram_bytes == psutil.virtual_memory().total
    assert memory.total_bytes == min(psutil.virtual_memory().total, memory.limit_bytes or 1 << 60)
    assert (memory.limit_bytes is None) == (memory.cgroup_version is None)
    assert memory.swap_bytes == psutil.swap_memory().total


def test_machine_is_what_the_groups_leave_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [cgroup.Group(900 * MIB, 100 * MIB, 2), cgroup.Group(300 * MIB, 200 * MIB, 1), cgroup.Group(1 << 60, 5 << 40, 2)]
    monkeypatch.setattr(cgroup, "find_groups", lambda own: groups)
    memory = probe.memory()
    assert (memory.total_bytes, memory.limit_bytes, memory.cgroup_version) == (300 * MIB, 300 * MIB, 1), "the tightest limit"
    assert memory.available_bytes == 100 * MIB, "what the fullest group can give"
    assert 100 * MIB < memory.reachable_bytes <= 300 * MIB


ALLOCATE = """
from gguf_pager.memory import cgroup, probe
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
from gguf_pager.memory import cgroup, probe
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


LOCK = """
import resource, sys
from gguf_pager.memory import cgroup, probe
soft = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft, resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]))
print(probe.lock_limit_bytes())
"""


def lock_limit(soft_bytes: int, *before: str) -> str:
    done = subprocess.run([*before, sys.executable, "-c", LOCK, str(soft_bytes)], capture_output=True, text=True, timeout=30,
                          check=True, cwd=Path(__file__).parent.parent)
    return done.stdout.strip()


def capabilities() -> int:
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff")).split()[1],
               16)


may_lock = pytest.mark.skipif(not capabilities() >> 14 & 1, reason="needs CAP_IPC_LOCK, as root has it")


def test_limit_on_locking_is_the_processs_own() -> None:
    before = () if not capabilities() >> 14 & 1 else WITHOUT_IPC_LOCK
    if before and shutil.which(before[0]) is None:
        pytest.skip("needs setpriv, of util-linux")
    assert lock_limit(8 * MIB, *before) == str(8 * MIB)
    assert lock_limit(0, *before) == "0"


WITHOUT_IPC_LOCK = ("setpriv", "--inh-caps=-ipc_lock", "--bounding-set=-ipc_lock")


@may_lock
def test_whoever_may_lock_everything_has_no_limit() -> None:
    assert lock_limit(8 * MIB) == "None"
    assert lock_limit(0) == "None"


@may_lock
def test_root_of_a_container_without_the_capability_has_a_limit() -> None:
    if shutil.which("setpriv") is None:
        pytest.skip("needs setpriv, of util-linux")
    assert lock_limit(8 * MIB, *WITHOUT_IPC_LOCK) == str(8 * MIB)


@may_lock
def test_root_of_a_user_namespace_has_a_limit_although_its_capabilities_say_otherwise() -> None:
    """As in a container without root: the kernel asks for the capability outside of it."""
    before = ("unshare", "--user", "--map-root-user")
    tried = subprocess.run([*before, "true"], capture_output=True, check=False) if shutil.which("unshare") else None
    if tried is None or tried.returncode:
        pytest.skip("no user namespace can be made here")
    assert lock_limit(8 * MIB, *before) == str(8 * MIB)


def test_no_limit_on_locking_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY,) * 2)
    assert probe.lock_limit_bytes() is None


def test_read_ahead_is_the_devices_or_unknown(tmp_path: Path) -> None:
    setting = probe.read_ahead_setting(tmp_path)
    if setting is None:
        assert probe.read_ahead_kb(tmp_path) is None
    else:
        assert probe.read_ahead_kb(tmp_path) == int(setting.read_text())
    assert probe.read_ahead_setting("/proc/self/status") is None, "no device"
    assert probe.read_ahead_setting(tmp_path / "missing") is None and probe.read_ahead_kb(tmp_path / "missing") is None
