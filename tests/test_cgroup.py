"""Memory groups: trees of files as kernels write them, and real groups of version 1 where root may make them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gguf_pager.memory import cgroup
from gguf_pager.memory.cap import Cap, memory_cap
from gguf_pager.memory.cgroup import Group, OwnPages

MIB = 1 << 20
NOTHING = OwnPages()

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="groups are Linux's")


def groups(tmp_path: Path, membership: str, files: dict[str, str], own: OwnPages = NOTHING, mounts: str = "") -> list[Group]:
    texts = {"proc/cgroup": membership} | {f"root/{name}": text for name, text in files.items()}
    if mounts:
        texts["proc/mountinfo"] = mounts.replace("ROOT", str(tmp_path / "root"))
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return cgroup.find_groups(own, tmp_path / "proc", tmp_path / "root")


def stat(**mib: int) -> str:
    return "".join(f"{name} {n * MIB}\n" for name, n in mib.items())


def v2_available(tmp_path: Path, own: OwnPages = NOTHING, **mib: int) -> int:
    """Of a group of 1,000 MiB, all of it used."""
    (found,) = groups(tmp_path, "0::/a\n", {"a/memory.max": f"{1000 * MIB}", "a/memory.current": f"{1000 * MIB}",
                                            "a/memory.stat": stat(**mib)}, own)
    return found.available_bytes // MIB


def v1_available(tmp_path: Path, own: OwnPages = NOTHING, **mib: int) -> int:
    (found,) = groups(tmp_path, "4:memory:/a\n", {
        "memory/a/memory.limit_in_bytes": f"{1000 * MIB}", "memory/a/memory.usage_in_bytes": f"{1000 * MIB}",
        "memory/a/memory.stat": stat(**mib)}, own)
    return found.available_bytes // MIB


# ---- limits ----

def test_version_2_limit_is_found(tmp_path: Path) -> None:
    assert groups(tmp_path, "0::/user.slice/app\n", {
        "user.slice/app/memory.max": f"{500 * MIB}\n", "user.slice/app/memory.current": f"{300 * MIB}\n",
    }) == [Group(500 * MIB, 200 * MIB, 2)]


@pytest.mark.parametrize(("most", "high", "limit"), (("500", "400", 400), ("300", "400", 300), ("max", "400", 400), ("500", "max", 500)))
def test_memory_high_is_a_limit_as_memory_max_is(tmp_path: Path, most: str, high: str, limit: int) -> None:
    texts = {"memory.max": most, "memory.high": high, "memory.current": "100"}
    (found,) = groups(tmp_path, "0::/a\n", {f"a/{name}": text if text == "max" else str(int(text) * MIB)
                                            for name, text in texts.items()})
    assert found == Group(limit * MIB, (limit - 100) * MIB, 2)


@pytest.mark.parametrize("tighter", ("a", "a/b", "a/b/c"))
def test_every_group_above_the_process_limits_it(tmp_path: Path, tighter: str) -> None:
    files = {f"{group}/memory.max": f"{(100 if group == tighter else 900) * MIB}" for group in ("a", "a/b", "a/b/c")}
    files |= {f"{group}/memory.current": f"{(40 if group == tighter else 1) * MIB}" for group in ("a", "a/b", "a/b/c")}
    found = groups(tmp_path, "0::/a/b/c\n", files)
    assert len(found) == 3
    assert min(found, key=lambda group: group.limit_bytes) == Group(100 * MIB, 60 * MIB, 2)


def test_group_above_that_siblings_have_filled_gives_less_than_its_tighter_child(tmp_path: Path) -> None:
    found = groups(tmp_path, "0::/a/b\n", {
        "a/memory.max": f"{900 * MIB}", "a/memory.current": f"{880 * MIB}", "a/memory.stat": stat(active_file=10),
        "a/b/memory.max": f"{500 * MIB}", "a/b/memory.current": f"{100 * MIB}",
    })
    assert min(group.available_bytes for group in found) == 30 * MIB


def test_groups_without_a_limit_are_none(tmp_path: Path) -> None:
    files = {"a/memory.max": "max\n", "a/memory.high": "max\n", "a/memory.current": "5"}
    assert groups(tmp_path, "0::/a\n", files) == []
    unlimited = "9223372036854771712"
    files = {"memory/memory.limit_in_bytes": unlimited, "memory/memory.stat": f"hierarchical_memory_limit {unlimited}\n"}
    assert groups(tmp_path, "4:memory:/\n", files) == []


def test_version_1_limit_is_found(tmp_path: Path) -> None:
    assert groups(tmp_path, "5:cpu,cpuacct:/x\n4:memory:/docker/abc\n0::/elsewhere\n", {
        "memory/docker/abc/memory.limit_in_bytes": f"{700 * MIB}\n",
        "memory/docker/abc/memory.usage_in_bytes": f"{600 * MIB}\n",
        "memory/memory.limit_in_bytes": "9223372036854771712\n",
    }) == [Group(700 * MIB, 100 * MIB, 1)]


def test_version_1_limit_of_the_container_itself_is_found(tmp_path: Path) -> None:
    """Inside a container the path of the host does not exist; the limit lies at the root of what is mounted."""
    files = {"memory/memory.limit_in_bytes": f"{64 * MIB}", "memory/memory.usage_in_bytes": f"{10 * MIB}"}
    assert groups(tmp_path, "4:memory:/docker/abc\n", files) == [Group(64 * MIB, 54 * MIB, 1)]


def test_version_1_limit_outside_of_the_container_is_found(tmp_path: Path) -> None:
    assert groups(tmp_path, "4:memory:/\n", {
        "memory/memory.limit_in_bytes": "9223372036854771712", "memory/memory.usage_in_bytes": f"{10 * MIB}",
        "memory/memory.stat": stat(hierarchical_memory_limit=300),
    }) == [Group(300 * MIB, 290 * MIB, 1)]


def test_soft_limit_of_version_1_is_none(tmp_path: Path) -> None:
    assert groups(tmp_path, "4:memory:/a\n", {
        "memory/a/memory.limit_in_bytes": f"{300 * MIB}", "memory/a/memory.soft_limit_in_bytes": f"{10 * MIB}",
    }) == [Group(300 * MIB, 300 * MIB, 1)]


def test_both_hierarchies_are_asked(tmp_path: Path) -> None:
    found = groups(tmp_path, "4:memory:/a\n0::/b\n", {
        "memory/a/memory.limit_in_bytes": f"{300 * MIB}", "b/memory.max": f"{200 * MIB}", "b/memory.current": "2",
    })
    assert found == [Group(300 * MIB, 300 * MIB, 1), Group(200 * MIB, 200 * MIB - 2, 2)]


def test_hierarchies_are_found_where_they_are_mounted(tmp_path: Path) -> None:
    """Also together with another controller, in a folder with a space, and as a container sees the host's names."""
    mounts = ("30 1 0:26 / ROOT/cpu\\040and\\040memory rw,nosuid - cgroup cgroup rw,cpu,memory\n"
              "31 1 0:27 /machine/c1 ROOT/unified rw shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
              "32 1 0:28 / ROOT/elsewhere rw - tmpfs tmpfs rw\n")
    found = groups(tmp_path, "4:cpu,memory:/a\n0::/machine/c1/task\n", {
        "cpu and memory/a/memory.limit_in_bytes": f"{300 * MIB}", "unified/task/memory.max": f"{200 * MIB}",
        "unified/memory.max": f"{250 * MIB}", "unified/machine/c1/task/memory.max": "1",
    }, mounts=mounts)
    assert found == [Group(300 * MIB, 300 * MIB, 1), Group(200 * MIB, 200 * MIB, 2), Group(250 * MIB, 250 * MIB, 2)]


@pytest.mark.parametrize("text", ("", "garbage", "12 MB", "-"))
def test_files_that_make_no_sense_are_no_limit(tmp_path: Path, text: str) -> None:
    assert groups(tmp_path, "0::/a\n", {"a/memory.max": text}) == []


def test_missing_files_are_no_limit(tmp_path: Path) -> None:
    assert cgroup.find_groups(NOTHING, tmp_path / "none", tmp_path) == []
    assert groups(tmp_path, "0::/a\n", {"x": ""}) == []
    assert groups(tmp_path, "0::/a\n", {"a/memory.max": "1000"}) == [Group(1000, 1000, 2)], "usage unknown counts as none"


# ---- what is given back ----

def test_file_cache_is_given_back_active_or_not(tmp_path: Path) -> None:
    assert v2_available(tmp_path, inactive_file=120, active_file=300, anon=500) == 420
    assert v1_available(tmp_path, inactive_file=120, active_file=300, rss=500) == 420


def test_version_1_counts_the_groups_below_as_usage_does(tmp_path: Path) -> None:
    assert v1_available(tmp_path, inactive_file=3, active_file=4, total_inactive_file=100, total_active_file=200) == 300


def test_shared_memory_is_cache_that_is_not_given_back(tmp_path: Path) -> None:
    """It is in `file` and `cache`, in neither list of files."""
    assert v2_available(tmp_path, file=500, shmem=400, inactive_file=60, active_file=40, inactive_anon=400) == 100
    assert v1_available(tmp_path, total_cache=500, total_shmem=400, total_inactive_file=60, total_active_file=40) == 100


def test_pages_that_must_be_written_first_are_not_given_back(tmp_path: Path) -> None:
    assert v2_available(tmp_path, inactive_file=300, active_file=200, file_dirty=50, file_writeback=30) == 420
    assert v1_available(tmp_path, total_inactive_file=300, total_active_file=200, total_dirty=50, total_writeback=30) == 420


def test_pages_that_others_have_mapped_are_not_given_back_and_own_ones_are(tmp_path: Path) -> None:
    assert v2_available(tmp_path, active_file=500, file_mapped=200) == 300
    assert v2_available(tmp_path, OwnPages(mapped_bytes=150 * MIB), active_file=500, file_mapped=200) == 450
    assert v1_available(tmp_path, OwnPages(mapped_bytes=150 * MIB), total_active_file=500, total_mapped_file=200) == 450


def test_locked_pages_are_not_given_back(tmp_path: Path) -> None:
    """They are mapped, too, and in no list: nobody's are taken off twice."""
    assert v2_available(tmp_path, active_file=100, file_mapped=400, unevictable=400) == 100
    own = OwnPages(mapped_bytes=400 * MIB, locked_bytes=400 * MIB)
    assert v2_available(tmp_path, own, active_file=100, file_mapped=400, unevictable=400) == 100
    assert v2_available(tmp_path, own, active_file=100, file_mapped=430, unevictable=400) == 70, "30 are another's"


def test_shared_memory_that_is_mapped_takes_nothing_from_the_files(tmp_path: Path) -> None:
    assert v2_available(tmp_path, active_file=300, file_mapped=250, shmem=250) == 300


def test_half_of_the_kernels_caches_is_given_back(tmp_path: Path) -> None:
    assert v2_available(tmp_path, inactive_file=100, slab_reclaimable=80, slab_unreclaimable=80) == 140


def test_more_cache_than_is_used_is_everything(tmp_path: Path) -> None:
    files = {"a/memory.max": "1000", "a/memory.current": "10", "a/memory.stat": "inactive_file 500\n"}
    assert groups(tmp_path, "0::/a\n", files) == [Group(1000, 1000, 2)]


def test_use_above_the_limit_leaves_nothing(tmp_path: Path) -> None:
    files = {"a/memory.max": "1000", "a/memory.high": "600", "a/memory.current": "900"}
    assert groups(tmp_path, "0::/a\n", files) == [Group(600, 0, 2)]


# ---- a real group ----

LIMIT_BYTES, FILE_BYTES = 400 * MIB, 150 * MIB

LOOK = """
import json, sys
from gguf_pager.memory import probe
if sys.argv[1] == "read":
    for _ in range(2):  # twice: the second time makes pages active
        with open(sys.argv[2], "rb") as file:
            while file.read(1 << 20):
                pass
elif sys.argv[1] == "map":
    import mmap
    with open(sys.argv[2], "rb") as file:
        kept = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    sum(kept[::4096])
elif sys.argv[1] == "use":
    kept = bytearray(150 << 20)
    kept[::4096] = b"x" * len(kept[::4096])
memory = probe.memory()
print(json.dumps([memory.total_bytes, memory.available_bytes, memory.reachable_bytes, memory.limit_bytes]), flush=True)
if sys.argv[3:] == ["stay"]:
    sys.stdin.read()
"""


@pytest.fixture
def group() -> Iterator[Cap]:
    with memory_cap(LIMIT_BYTES) as cap:
        if cap.folder is None:
            pytest.skip(f"no group can be made here: {cap.method} {cap.reason}")
        yield cap


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of which nothing is in the page cache: pages belong to the group that brought them in."""
    from gguf_pager.bench.disk import drop_from_page_cache

    path = tmp_path / "file"
    path.write_bytes(b"x" * FILE_BYTES)
    drop_from_page_cache([path])
    return path


def look(cap: Cap, what: str, file: Path) -> tuple[int, int, int, int]:
    """Return total, available, reachable and limit as a process in the group sees them after doing something."""
    command = cap.command([sys.executable, "-c", LOOK, what, str(file)])
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    total, available, reachable, limit = json.loads(done.stdout)
    return total, available, reachable, limit


def test_machine_is_the_group_and_its_page_cache_is_available(group: Cap, file: Path) -> None:
    total, empty, _, limit = look(group, "nothing", file)
    assert total == limit == LIMIT_BYTES
    assert LIMIT_BYTES - 60 * MIB < empty < LIMIT_BYTES
    read = look(group, "read", file)[1]
    assert group.peak_bytes() is not None and (group.peak_bytes() or 0) > FILE_BYTES, "the cache is the group's"
    assert abs(read - empty) < 12 * MIB
    assert abs(look(group, "nothing", file)[1] - empty) < 12 * MIB, "nor does a later process count it"


def test_own_mapped_file_is_available_and_own_memory_within_reach(group: Cap, file: Path) -> None:
    _, empty, most, _ = look(group, "nothing", file)
    assert abs(look(group, "map", file)[1] - empty) < 12 * MIB
    _, available, reachable, _ = look(group, "use", file)
    assert empty - 165 * MIB < available < empty - 145 * MIB
    assert abs(reachable - most) < 12 * MIB


@pytest.mark.parametrize("what", ("map", "use"))
def test_what_another_process_has_mapped_or_uses_is_not_available(group: Cap, file: Path, what: str) -> None:
    empty = look(group, "nothing", file)[1]
    command = group.command([sys.executable, "-c", LOOK, what, str(file), "stay"])
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent) as other:
        assert other.stdout is not None and other.stdin is not None
        try:
            assert other.stdout.readline()
            time.sleep(0.1)
            beside = look(group, "nothing", file)[1]
        finally:
            other.stdin.close()
    assert beside < empty - 130 * MIB
