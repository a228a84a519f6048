"""How a device is read best: what is chosen from what was measured, what is remembered, and one that is really measured."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from gguf_pager import _native
from gguf_pager.bench import disk
from gguf_pager.cli import main
from gguf_pager.disk import bandwidth, device
from gguf_pager.disk.bandwidth import Findings, Way
from gguf_pager.errors import PagerError, PagerIOError
from gguf_pager.model.layout import Layout, Range, read_layout
from gguf_pager.pager import Options, Pager

KIB, MIB = 1 << 10, 1 << 20
USUAL = Way("direct", 4, 512 * KIB)
DEVICE = device.Device("sda, Disk (ext4)", "ext4 Disk 1000 serial")
FOUND = Findings("2026-11-24", (Way("direct", 8, 512 * KIB), 5e9), (Way("buffered", 16, 128 * KIB), 2e9))

Mount = namedtuple("Mount", "device mountpoint fstype opts")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's process and its children remember."""
    monkeypatch.setenv("GGUF_PAGER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# ---- what is chosen ----

PROFILES = {  # GB/s with 2, 4, 8 and 16 MiB in flight, and how many readers are right
    "SATA": ((0.54, 0.55, 0.55, 0.55), 4),
    "spinning": ((0.09, 0.10, 0.11, 0.11), 4),
    "virtual disk here": ((3.17, 3.39, 3.47, 3.78), 4),
    "virtual disk here, at its worst": ((2.78, 3.26, 3.47, 3.83), 4),
    "PCIe 4": ((6.0, 6.9, 7.0, 7.0), 4),
    "PCIe 5, wants more": ((7.5, 10.8, 12.0, 12.1), 8),
    "network, 5 ms away": ((0.3, 0.6, 1.1, 1.25), 16),
    "network, 20 ms away": ((0.1, 0.2, 0.4, 0.8), 32),
    "chokes on many": ((2.0, 1.9, 0.7, 0.4), 4),
}


@pytest.mark.parametrize("name", PROFILES)
def test_least_in_flight_that_is_near_enough_to_the_best_is_chosen(name: str) -> None:
    rates, right = PROFILES[name]
    measured = dict(zip(bandwidth.ladder("direct"), rates, strict=True))
    assert bandwidth.least_in_flight(measured) == Way("direct", right, 512 * KIB)


def test_in_the_background_larger_pieces_are_tried_and_more_of_them() -> None:
    usual, more = bandwidth.ladder("direct", in_background=True)
    assert usual == Way("direct", 8, MIB) and more == Way("direct", 16, MIB)
    assert bandwidth.least_in_flight({usual: 2.7, more: 2.9}) == usual
    assert bandwidth.least_in_flight({usual: 0.4, more: 0.8}) == more, "network"
    assert bandwidth.other_pieces(usual) == [Way("direct", 16, 512 * KIB)]


def test_what_there_was_no_time_for_is_not_chosen() -> None:
    assert bandwidth.least_in_flight({USUAL: 0.1}) == USUAL


def test_other_pieces_have_as_much_in_flight_and_bounded_readers() -> None:
    assert bandwidth.other_pieces(USUAL) == [Way("direct", 16, 128 * KIB), Way("direct", 2, MIB)]
    for way in bandwidth.ladder("buffered"):
        for other in bandwidth.other_pieces(way):
            assert other.in_flight_bytes == way.in_flight_bytes and 1 <= other.n_readers <= 32
            assert 128 * KIB <= other.piece_bytes <= MIB


def test_other_pieces_are_taken_only_where_clearly_faster() -> None:
    small, large = bandwidth.other_pieces(USUAL)
    assert bandwidth.best_pieces(USUAL, {USUAL: 3.0, small: 3.5, large: 3.4}) == USUAL
    assert bandwidth.best_pieces(USUAL, {USUAL: 3.0, small: 3.7, large: 3.8}) == large
    assert bandwidth.best_pieces(USUAL, {USUAL: 3.0}) == USUAL


@pytest.mark.parametrize(("direct", "buffered", "io"), [
    (3.0, 3.5, "direct"), (3.0, 3.6, "buffered"), (3.0, 1.5, "direct"), (None, 0.1, "buffered"), (0.1, None, "direct"),
])
def test_buffered_reads_are_taken_only_where_clearly_faster(direct: float | None, buffered: float | None, io: str) -> None:
    found = Findings("2026-11-24", (USUAL, direct) if direct else None,
                     (Way("buffered", 4, 512 * KIB), buffered) if buffered else None)
    assert found.io == io
    assert str(found).startswith(io)


# ---- which device ----

def blocks(root: Path, number: int, partition: str | None = None, **numbers: str) -> Path:
    """Make a tree like /sys/dev/block with one disk, and a partition of it if one is named."""
    disk_folder = root / "devices" / "sdx"
    (disk_folder / "queue").mkdir(parents=True)
    (disk_folder / "device").mkdir()
    for name, text in {"size": "1000\n", "device/model": "Fast Disk  \n"}.items() | numbers.items():
        (disk_folder / name.replace("__", "/")).write_text(text)
    node = disk_folder / partition if partition else disk_folder
    node.mkdir(exist_ok=True)
    table = root / "table"
    table.mkdir()
    (table / f"{os.major(number)}:{os.minor(number)}").symlink_to(node)
    return table


def mounted(monkeypatch: pytest.MonkeyPatch, *mounts: Mount) -> None:
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: [Mount("none", "/", "rootfs", ""), *mounts])


@pytest.mark.skipif(sys.platform != "linux", reason="as in /sys")
def test_disk_is_known_by_its_number_whatever_it_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    number = tmp_path.stat().st_dev
    mounted(monkeypatch, Mount("/dev/sdx1", str(tmp_path), "ext4", ""))
    first = device.identify(tmp_path, blocks(tmp_path / "a", number, "sdx1", wwid="naa.5\n"))
    mounted(monkeypatch, Mount("/dev/sdy1", str(tmp_path), "ext4", ""))
    again = device.identify(tmp_path, blocks(tmp_path / "b", number, "sdy1", wwid="naa.5\n"))
    other = device.identify(tmp_path, blocks(tmp_path / "c", number, "sdx1", wwid="naa.6\n"))
    assert first and again and other
    assert first.name == "sdx, Fast Disk (ext4)" and first.identity == again.identity != other.identity
    mounted(monkeypatch, Mount("/dev/sdx1", str(tmp_path), "xfs", ""))
    assert device.identify(tmp_path, tmp_path / "a/table").identity != first.identity, "the file system has a part in it"


@pytest.mark.skipif(sys.platform != "linux", reason="as in /sys")
def test_disk_without_a_number_is_known_by_where_it_is_mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = blocks(tmp_path / "a", tmp_path.stat().st_dev)
    mounted(monkeypatch, Mount("/dev/sdx", str(tmp_path), "ext4", ""))
    assert device.identify(tmp_path, table).identity == f"ext4 Fast Disk 1000 /dev/sdx {tmp_path}"


def test_what_is_no_disk_is_known_by_its_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "export" / "models").mkdir(parents=True)
    mounted(monkeypatch, Mount("elsewhere", str(tmp_path), "nfs4", ""),
            Mount("server:/x", str(tmp_path / "export"), "nfs4", ""))
    found = device.identify(tmp_path / "export" / "models", tmp_path / "none")
    assert found == device.Device("server:/x (nfs4)", f"nfs4 server:/x {tmp_path / 'export'}")


def test_missing_file_has_no_device(tmp_path: Path) -> None:
    assert device.identify(tmp_path / "missing") is None


def test_this_device_is_known_the_same_way_twice(tmp_path: Path) -> None:
    found = device.identify(tmp_path)
    assert found is not None and found == device.identify(tmp_path)


# ---- what is remembered ----

def kept(folder: Path) -> Path:
    return folder / DEVICE.cache_name


def test_what_is_remembered_is_recalled(folder: Path) -> None:
    assert device.recall(DEVICE) is None
    assert device.remember(DEVICE, FOUND)
    assert device.recall(DEVICE) == FOUND
    only = Findings("2026-11-25", None, FOUND.buffered)
    assert device.remember(DEVICE, only) and device.recall(DEVICE) == only
    assert [path.name for path in (folder / "devices").iterdir()] == [kept(folder).name], "no half-written file stays"


def test_device_that_was_met_but_not_measured_is_not_known() -> None:
    assert device.remember(DEVICE, None) and device.recall(DEVICE) is None


@pytest.mark.parametrize("change", [
    {"version": device._VERSION + 1}, {"identity": "another"}, {"date": 7}, {"date": "yesterday"}, {"direct": 5}, {"direct": {}},
    {"direct": {"n_readers": 0, "piece_bytes": 4096, "bytes_per_s": 1}},
    {"direct": {"n_readers": 4, "piece_bytes": 1000, "bytes_per_s": 1}},
    {"direct": {"n_readers": "4", "piece_bytes": 4096, "bytes_per_s": 1}},
    {"direct": {"n_readers": True, "piece_bytes": 4096, "bytes_per_s": 1}},
    {"direct": {"n_readers": 4, "piece_bytes": 4096, "bytes_per_s": "fast"}},
    {"direct": {"n_readers": 4, "piece_bytes": 4096, "bytes_per_s": -1}}, {"direct": None, "buffered": None},
    {"direct": {"n_readers": 10**9, "piece_bytes": 4096, "bytes_per_s": 1}},
    {"direct": {"n_readers": 33, "piece_bytes": 4096, "bytes_per_s": 1}},
    {"direct": {"n_readers": 4, "piece_bytes": 1 << 40, "bytes_per_s": 1}},
    {"direct": {"n_readers": 4, "piece_bytes": 4096 * 10**400, "bytes_per_s": 1}},
    *({"direct": {"n_readers": 4, "piece_bytes": 4096, "bytes_per_s": rate}}
      for rate in (float("nan"), float("inf"), 10**400, 1e300, 0, None, [1], "inf", True, "9")),
])
def test_what_makes_no_sense_is_not_recalled(folder: Path, change: dict[str, Any]) -> None:
    device.remember(DEVICE, FOUND)
    value = json.loads(kept(folder).read_text())
    kept(folder).write_text(json.dumps(value | change))
    assert device.recall(DEVICE) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "7", '"x"', "\0" * 100, "[" * 100_000])
def test_damaged_file_is_ignored_and_written_anew(folder: Path, text: str) -> None:
    device.remember(DEVICE, FOUND)
    kept(folder).write_text(text)
    assert device.recall(DEVICE) is None
    assert device.remember(DEVICE, FOUND) and device.recall(DEVICE) == FOUND


def test_what_cannot_be_remembered_is_not_measured(folder: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch,
                                                   caplog: pytest.LogCaptureFixture) -> None:
    folder.write_text("a file where the folder should be")
    assert not device.remember(DEVICE, FOUND)
    monkeypatch.setattr(bandwidth, "measure", lambda _: pytest.fail("measured in vain"))
    with caplog.at_level(logging.INFO, "gguf_pager"):
        assert device.meet(DEVICE, layout) is None
    assert "GGUF_PAGER_CACHE" in caplog.text


BOTH = """
import sys
from gguf_pager.disk import device
from gguf_pager.disk.bandwidth import Findings, Way
from gguf_pager.disk.device import Device
here = Device("d", "same")
own = Findings("2026-11-24", (Way("direct", int(sys.argv[1]), 4096), 1e9), None)
for _ in range(300):
    device.remember(here, own)
    assert device.recall(here) is not None, "half a file was seen"
"""


def test_two_processes_at_once_leave_what_one_of_them_has_written(folder: Path) -> None:
    running = [subprocess.Popen([sys.executable, "-c", BOTH, n], cwd=Path(__file__).parent.parent) for n in ("4", "8")]
    assert [process.wait(60) for process in running] == [0, 0]
    found = device.recall(device.Device("d", "same"))
    assert found is not None and found.direct is not None and found.direct[0].n_readers in (4, 8)
    assert len(list((folder / "devices").iterdir())) == 1


# ---- what a model is opened with ----

@pytest.fixture
def layout(trace_model: Path) -> Layout:
    return read_layout(trace_model)


@pytest.fixture
def here(layout: Layout) -> device.Device:
    found = device.identify(layout.paths[0])
    assert found is not None
    return found


@pytest.mark.parametrize(("given", "io", "n_readers", "piece_bytes"), [
    ({}, "auto", 8, 512 * KIB),
    ({"io": "direct"}, "direct", 8, 512 * KIB),
    ({"io": "buffered"}, "buffered", 16, 128 * KIB),
    ({"n_readers": 3}, "auto", 3, 512 * KIB),
    ({"piece_bytes": MIB}, "auto", 4, MIB),
    ({"io": "direct", "n_readers": 2, "piece_bytes": 4096}, "direct", 2, 4096),
])
def test_what_is_left_open_is_as_measured(layout: Layout, here: device.Device, given: dict[str, Any], io: str,
                                          n_readers: int, piece_bytes: int) -> None:
    device.remember(here, FOUND)
    filled = device.fill(layout, Options(policy="lru", **given))
    assert filled == Options(policy="lru", io=io, n_readers=n_readers, piece_bytes=piece_bytes)  # type: ignore[arg-type]


def test_device_that_is_faster_buffered_is_read_so(layout: Layout, here: device.Device) -> None:
    device.remember(here, Findings("2026-11-24", (USUAL, 1e9), (Way("buffered", 8, MIB), 2e9)))
    assert device.fill(layout, Options()) == Options(io="buffered", n_readers=8, piece_bytes=MIB)
    assert device.fill(layout, Options(n_readers=2)) == Options(io="buffered", n_readers=2, piece_bytes=512 * KIB)
    assert device.fill(layout, Options(io="direct")).n_readers == 4


def test_only_large_models_opened_with_the_defaults_are_measured_with(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "measure", lambda *_: pytest.fail("measured"))
    assert device.fill(layout, Options()) == Options(n_readers=4, piece_bytes=512 * KIB), "a small one"
    monkeypatch.setattr(device, "LEAST_EXPERT_BYTES", 0)
    for given in (Options(io="direct"), Options(io="buffered"), Options(n_readers=4), Options(piece_bytes=4096)):
        device.fill(layout, given)
    monkeypatch.setattr(bandwidth, "measure", lambda *_: FOUND)
    assert device.fill(layout, Options()).n_readers == 8
    monkeypatch.setattr(bandwidth, "measure", lambda *_: pytest.fail("measured twice"))
    assert device.fill(layout, Options()).n_readers == 8


def test_device_that_cannot_be_read_is_read_as_by_default(layout: Layout, here: device.Device, caplog: pytest.LogCaptureFixture,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Findings:
        raise PagerIOError("broken", errno=5, path="x", offset_bytes=0)

    monkeypatch.setattr(device, "LEAST_EXPERT_BYTES", 0)
    monkeypatch.setattr(bandwidth, "measure", fail)
    with caplog.at_level(logging.INFO, "gguf_pager"):
        assert device.fill(layout, Options()) == Options(n_readers=4, piece_bytes=512 * KIB)
    assert "broken" in caplog.text and device.recall(here) is None


def test_model_is_opened_with_what_was_measured_once(paged: Callable[..., Any], trace_model: Path, here: device.Device,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "LEAST_EXPERT_BYTES", 0)
    first = paged(trace_model)
    options, found = first.pager.options, device.recall(here)
    assert found is not None
    assert Way(found.io, options.n_readers, options.piece_bytes) == found.best(found.io)
    first.close()  # or the next would share its slots, and its readers
    other = replace(FOUND, direct=(Way("direct", 5, 512 * KIB), 5e9))  # no measurement finds 5
    assert device.remember(here, other) and device.recall(here) == other
    assert paged(trace_model).pager.options.n_readers == 5
    assert paged(trace_model, n_readers=3).pager.options.n_readers == 3


def test_doctor_measures_when_asked_and_tells_what_is_remembered(trace_model: Path, here: device.Device,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    def ask(*arguments: str) -> dict[str, Any]:
        done = CliRunner().invoke(main, ["doctor", str(trace_model), "--json", *arguments])
        return dict(json.loads(done.output)["checks"]["device"])

    assert ask()["status"] == "note" and "--probe" in ask()["remedy"]
    monkeypatch.setattr(bandwidth, "measure", lambda *_: FOUND)
    assert ask("--probe")["facts"] == {
        "device": here.name, "date": "2026-11-24", "io": "direct",
        "direct": {"n_readers": 8, "piece_bytes": 512 * KIB, "bytes_per_s": 5e9},
        "buffered": {"n_readers": 16, "piece_bytes": 128 * KIB, "bytes_per_s": 2e9}}
    monkeypatch.setattr(bandwidth, "measure", lambda _: pytest.fail("nobody has asked"))
    assert ask()["status"] == "ok" and device.recall(here) == FOUND
    assert CliRunner().invoke(main, ["doctor", "--probe"]).exit_code == 2


# ---- measuring ----

def test_measuring_is_quick_and_leaves_page_cache_and_process_as_they_were(
        trace_model: Path, layout: Layout, footprint: Callable[[Path], Any]) -> None:
    if not hasattr(os, "posix_fadvise"):
        pytest.skip("this system cannot be asked to forget a file")
    disk.drop_from_page_cache([trace_model])
    before = disk.cached_bytes([trace_model])
    if before is None or before > trace_model.stat().st_size // 2:
        pytest.skip("this file system does not tell what is cached, or keeps it")
    held, begun = footprint(trace_model.parent), time.monotonic()
    found = bandwidth.measure(layout)
    assert time.monotonic() - begun < 3
    assert footprint(trace_model.parent) == held
    assert found.buffered is not None and found.buffered[1] > 1e6
    assert (found.direct is not None) == Pager(layout, Options()).is_direct
    after = disk.cached_bytes([trace_model])
    assert after is not None and after <= before + MIB


def test_slow_device_is_measured_in_bounded_time(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch takes 0.2 s: the first rung of both kinds and little more is tried."""
    tried = set()

    def read_slowly(trial: Any, pager: Pager, way: Way) -> float:
        tried.add(way)
        time.sleep(0.2)
        return 0.2

    monkeypatch.setattr(bandwidth._Trial, "_read_batch", read_slowly)
    begun = time.monotonic()
    found = bandwidth.measure(layout)
    assert time.monotonic() - begun < 2.5
    assert Way("buffered", 4, 512 * KIB) in tried and len(tried) <= 5
    assert found.best(found.io) in tried


Rates = Callable[[Way, float], float]


def rates_of(monkeypatch: pytest.MonkeyPatch, layout: Layout, rate: Rates, *, in_background: bool = False) -> Findings:
    """Measure a device that gives these bytes per second, which may depend on how long it is asked."""
    if not Pager(layout, Options()).is_direct or not hasattr(os, "posix_fadvise"):
        pytest.skip("there is no choice here")
    monkeypatch.setattr(bandwidth._Trial, "_rate", lambda _, way, least_s: rate(way, least_s))
    monkeypatch.setattr(bandwidth._Trial, "reads_in_background", lambda _: in_background)
    return bandwidth.measure(layout)


def test_device_that_wants_more_in_flight_gets_it(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    found = rates_of(monkeypatch, layout, lambda way, _: min(way.n_readers, 16) * (2e8 if way.io == "direct" else 1e8))
    assert found.io == "direct" and found.direct == (Way("direct", 16, 512 * KIB), 3.2e9)
    assert found.buffered == (Way("buffered", 16, 512 * KIB), 1.6e9)


def test_device_that_reads_in_the_background_is_asked_for_more_at_once(layout: Layout,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    found = rates_of(monkeypatch, layout, lambda way, _: 3e9 if way.io == "direct" else 1e9, in_background=True)
    assert found.direct == (Way("direct", 8, MIB), 3e9) and found.buffered == (Way("buffered", 4, 512 * KIB), 1e9)
    found = rates_of(monkeypatch, layout, lambda way, _: min(way.in_flight_bytes, 16 * MIB) * 1e2, in_background=True)
    assert found.direct == (Way("direct", 16, MIB), 16 * MIB * 1e2)


@pytest.mark.skipif(sys.platform != "linux", reason="io_submit is Linux's")
def test_trial_tells_whether_reads_are_in_the_background(layout: Layout) -> None:
    if not Pager(layout, Options()).is_direct:
        pytest.skip("this file system does not read directly")
    before = len(os.listdir("/proc/self/task"))
    pager = Pager(layout, Options(io="direct", n_readers=8, profile=False))
    pager.open([layout.layers[0].n_used] * len(layout.shapes))
    threads = len(os.listdir("/proc/self/task")) - before
    is_alone = pager.native().reads_in_background()
    pager.close()
    assert threads < 8 if is_alone else threads >= 8
    with bandwidth._Trial(layout, time.monotonic() + 1) as trial:
        assert trial.reads_in_background() == is_alone


def test_device_that_wants_small_pieces_gets_them(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    found = rates_of(monkeypatch, layout, lambda way, _: 3e9 if way.piece_bytes == 128 * KIB else 1e9)
    assert found.direct == (Way("direct", 16, 128 * KIB), 3e9)


def test_device_that_is_better_through_the_page_cache_is_found(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    found = rates_of(monkeypatch, layout, lambda way, _: 2e9 if way.io == "buffered" else 1e9)
    assert found.io == "buffered" and found.buffered == (Way("buffered", 4, 512 * KIB), 2e9)


@pytest.mark.parametrize("lucky", [Way("buffered", 4, 512 * KIB), Way("direct", 8, 512 * KIB), Way("direct", 16, 128 * KIB)])
def test_what_is_only_faster_for_a_moment_is_not_taken(layout: Layout, monkeypatch: pytest.MonkeyPatch, lucky: Way) -> None:
    """As under a limit that lets saved-up reads pass at once."""
    found = rates_of(monkeypatch, layout, lambda way, least_s: 9e9 if way == lucky and least_s < 0.1 else 1e9)
    assert found.io == "direct" and found.direct == (USUAL, 1e9)


def test_reads_from_the_page_cache_are_not_taken_for_the_devices(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "_is_cached", lambda *_: True)
    if Pager(layout, Options()).is_direct:
        assert bandwidth.measure(layout).buffered is None
    monkeypatch.setattr(_native, "file_alignment", lambda _: (_ for _ in ()).throw(OSError(95, "not supported")))
    with pytest.raises(PagerError, match="page cache"):
        bandwidth.measure(layout)


def test_cached_experts_are_seen(trace_model: Path) -> None:
    file = os.open(trace_model, os.O_RDONLY)
    try:
        piece = Range(0, 5000, 100_000)
        os.pread(file, 200_000, 0)
        assert bandwidth._is_cached(file, piece)
        if disk.drop_from_page_cache([trace_model]) and disk.cached_bytes([trace_model]) == 0:
            assert not bandwidth._is_cached(file, piece)
        assert not bandwidth._is_cached(file, Range(0, 5000, 100)), "of its pages only the ends"
    finally:
        os.close(file)


def test_experts_are_not_read_twice_before_all_are_read_once(layout: Layout) -> None:
    with bandwidth._Trial(layout, time.monotonic() + 1) as trial:
        n_batches = sum(len(list(trial._groups(layer))) for layer in trial._layout.layers)
        seen = [next(trial._batches) for _ in range(n_batches)]
        pairs = [(layer, expert) for layer, experts in seen for expert in experts]
        assert len(set(pairs)) == len(pairs) >= n_batches
        assert next(trial._batches) == seen[0]


def test_memory_for_measuring_is_small_whatever_an_expert_is(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    like = layout.layers[0]
    whole = len(like.slices)
    for batch_bytes, n_slices, n_experts in ((like.expert_bytes * 2, whole, 2), (like.expert_bytes, whole, 1),
                                             (like.expert_bytes // 2 - 1, 1, 1)):
        monkeypatch.setattr(bandwidth, "_BATCH_BYTES", batch_bytes)
        with bandwidth._Trial(layout, time.monotonic() + 1) as trial:
            assert {len(layer.slices) for layer in trial._layout.layers} == {n_slices}
            assert trial._n_experts == n_experts
