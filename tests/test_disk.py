"""What is asked of a disk is measured as said: page cache, read-ahead, bandwidth."""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from gguf_pager.bench import disk
from gguf_pager.bench.memory import huge_buffer, touch
from gguf_pager.model.layout import read_layout
from gguf_pager.pager import Options, Pager

MIB = 1 << 20


# ---- read-ahead ----

def test_read_ahead_is_set_for_the_block_and_restored_always(tmp_path: Path) -> None:
    setting = tmp_path / "read_ahead_kb"
    setting.write_text("8192\n")
    with disk.read_ahead(setting, 128) as kb:
        assert kb == 128 and setting.read_text() == "128"
    assert setting.read_text() == "8192"
    with pytest.raises(KeyError), disk.read_ahead(setting, 0):
        assert setting.read_text() == "0"
        raise KeyError
    assert setting.read_text() == "8192"


def test_read_ahead_of_one_benchmark_is_not_restored_by_another(tmp_path: Path) -> None:
    """The second would take the first one's value for the device's own."""
    setting = tmp_path / "read_ahead_kb"
    setting.write_text("8192")
    with disk.read_ahead(setting, 128):
        with disk.read_ahead(setting, 64) as kb:
            assert kb == 128 and setting.read_text() == "128", "what is in force is told"
        assert setting.read_text() == "128"
    assert setting.read_text() == "8192"


def test_read_ahead_is_restored_after_a_kill(tmp_path: Path) -> None:
    setting = tmp_path / "read_ahead_kb"
    setting.write_text("8192\n")
    program = ("import sys; from pathlib import Path; from gguf_pager.bench import disk\n"
               "with disk.read_ahead(Path(sys.argv[1]), 128): print('set', flush=True); sys.stdin.readline()")
    with subprocess.Popen([sys.executable, "-c", program, str(setting)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "set\n"
        assert setting.read_text() == "128"
        child.kill()
    until = time.monotonic() + 20
    while setting.read_text() != "8192\n":
        assert time.monotonic() < until, "it stays"
        time.sleep(0.02)


def test_read_ahead_that_cannot_be_set_is_told_as_it_is(tmp_path: Path) -> None:
    with disk.read_ahead(None, 128) as kb:
        assert kb is None
    with disk.read_ahead(tmp_path / "missing", 128) as kb:
        assert kb is None
    setting = tmp_path / "read_ahead_kb"
    setting.write_text("8192")
    for wanted in (None, 8192):
        with disk.read_ahead(setting, wanted) as kb:
            assert kb == 8192
    setting.write_text("nonsense")
    with disk.read_ahead(setting, 128) as kb:
        assert kb is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_ahead_without_permission_stays(tmp_path: Path) -> None:
    setting = tmp_path / "read_ahead_kb"
    setting.write_text("8192")
    setting.chmod(0o444)
    with disk.read_ahead(setting, 128) as kb:
        assert kb == 8192


# ---- the page cache ----

@pytest.mark.skipif(sys.platform != "linux", reason="macOS cannot be asked to forget a file")
def test_files_are_dropped_from_the_page_cache(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(4 * MIB))
    if disk.cached_bytes([path]) < 4 * MIB:
        pytest.skip("this file system does not tell what is cached")
    disk.drop_from_page_cache([path])
    assert disk.cached_bytes([path]) < MIB


@pytest.mark.skipif(sys.platform != "linux", reason="macOS cannot be asked to forget a file")
def test_files_are_read_into_the_page_cache_and_counted_together(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_bytes(bytes(2 * MIB + 5))
    disk.drop_from_page_cache(paths)
    if disk.cached_bytes(paths):
        pytest.skip("this file system keeps what it is told to drop")
    disk.fill_page_cache(paths[:1])
    assert disk.cached_bytes(paths[:1]) == 2 * MIB + mmap.PAGESIZE
    disk.fill_page_cache(paths[1:])
    assert disk.cached_bytes(paths) == 2 * (2 * MIB + mmap.PAGESIZE)


def test_cache_of_a_file_that_is_not_ours_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel calls all of it cached then, which must not be believed."""
    path = tmp_path / "file"
    path.write_bytes(b"x")
    assert disk.cached_bytes([path]) is not None
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert disk.cached_bytes([path]) is not None, "its owner may know"
    monkeypatch.setattr(os, "geteuid", lambda: 1234567)
    assert disk.cached_bytes([path]) is None


# ---- bandwidth ----

@pytest.fixture
def model_align(trace_model: Path) -> int:
    pager = Pager(read_layout(trace_model), Options())
    if not pager.is_direct:
        pytest.skip("this file system has no direct reads")
    return pager.align


def huge_bytes() -> int:
    """Return how much of this process' private memory is in huge pages."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("this kernel has no huge pages for private memory")
    gc.collect()  # what other tests have left goes now, not between two counts
    line = next(line for line in Path("/proc/self/smaps_rollup").read_text().splitlines() if line.startswith("AnonHugePages"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_bandwidth_is_measured_into_huge_pages_as_the_arena_has_them() -> None:
    """Into small ones a device that takes few pieces per request gives half of what it can, or a quarter."""
    before = huge_bytes()
    buffer = huge_buffer(8 * MIB)
    assert len(buffer) == 8 * MIB
    assert huge_bytes() - before >= 8 * MIB


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_arena_has_huge_pages_whatever_they_cost(trace_model: Path) -> None:
    """Where they were dearer to get small ones were taken once, and then every read took longer."""
    before = huge_bytes()
    with contextlib.closing(Pager(read_layout(trace_model), Options())) as pager:
        pager.open([4000] * len(pager.needs))
        pager.wait_present()
        assert huge_bytes() - before >= pager.stats().arena_bytes // (2 * MIB) * 2 * MIB >= 8 * MIB


def test_best_bandwidth_is_the_largest_that_was_seen(trace_model: Path, model_align: int,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    device = disk.Device([trace_model], model_align)
    assert device.best_bytes_per_s is None, "nothing is known before"
    device.sample(1, seconds=0.05)
    assert device.best_bytes_per_s is not None and device.best_bytes_per_s > 1e6
    given = iter([3e9, 5e9, 4e9])
    tried = []
    monkeypatch.setattr(disk, "read_at_random", lambda _, pattern, *__: tried.append(pattern) or next(given))
    device.sample(3)
    assert device.best_bytes_per_s == 5e9
    assert len(set(tried)) == 3, "patterns take turns"


def test_bandwidth_is_bytes_over_time(trace_model: Path, model_align: int, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    def preadv(file: int, buffers: list[mmap.mmap], at: int) -> int:
        assert at % model_align == 0 and at + len(buffers[0]) <= trace_model.stat().st_size
        read.append(len(buffers[0]))
        threading.Event().wait(0.01)
        return len(buffers[0])

    monkeypatch.setattr(os, "preadv", preadv)
    bandwidth = disk.read_at_random([trace_model], disk.Pattern(2, 1 << 16), model_align, 0.2)
    assert bandwidth == pytest.approx(sum(read) / 0.2, rel=0.25)
    assert len(read) > 10


def test_bandwidth_is_unknown_where_it_cannot_be_measured(trace_model: Path, tmp_path: Path, model_align: int,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    small = tmp_path / "small"
    small.write_bytes(b"x")
    assert disk.read_at_random([small], disk.Pattern(1, 1 << 20), model_align, 0.01) is None
    buffered = disk.Device([trace_model], None)
    buffered.sample()
    assert buffered.best_bytes_per_s is None, "the page cache is not the device"

    def refuse(*_: object) -> int:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "preadv", refuse)
    device = disk.Device([trace_model], model_align)
    device.sample()
    assert device.best_bytes_per_s is None
    assert disk.read_through([trace_model], 1) is None


def test_reading_through_ends_in_time_or_with_the_file(trace_model: Path, model_align: int) -> None:
    bandwidth = disk.read_through([trace_model], 30)
    assert bandwidth is not None and bandwidth > 1e6
    assert disk.read_through([trace_model], 0) == 0


# ---- memory ----

def test_touched_memory_was_there_at_once_and_is_free_again() -> None:
    script = ("import psutil, resource; from gguf_pager.bench.memory import touch; looks = [];"
              "touch(300 << 20, lambda: looks.append(1));"
              "peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
              "print(len(looks), peak >> 10, psutil.Process().memory_info().rss >> 20)")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    n_looks, peak_mib, left_mib = map(int, done.stdout.split())
    assert n_looks == 3 and peak_mib >= 300 and left_mib < 100


def test_touching_ends_when_somebody_wants_it() -> None:
    def end() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        touch(1 << 50, end)
