"""What serving draws: counters that are files here, one that stands still or fails, and the model for where there is none."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import serving

from gguf_pager.energy import hwmon, rapl
from gguf_pager.energy.source import Absent, CounterSource, GaugeSource
from gguf_pager.serve.joules import Joules


@pytest.fixture
def counter(tmp_path: Path) -> Path:
    """A package's counter of microjoules, as powercap shows one."""
    zone = tmp_path / "powercap" / "intel-rapl:0"
    zone.mkdir(parents=True)
    for name, text in (("name", "package-0"), ("max_energy_range_uj", "1000000000"), ("energy_uj", "999000000")):
        (zone / name).write_text(text)
    return zone / "energy_uj"


def found(counter: Path) -> CounterSource:
    source = rapl.find(counter.parent.parent)
    assert isinstance(source, CounterSource)
    return source


def watchers() -> int:
    return sum(thread.name == "gguf_pager-joules" for thread in threading.enumerate())


def none_read() -> int:
    return 0


def test_counter_is_subtracted_across_its_wrap(counter: Path) -> None:
    joules = Joules(none_read, [found(counter)])
    counter.write_text("999500000")
    time.sleep(0.06)  # less says nothing
    drawn = joules.now()
    assert (drawn.status, drawn.method, drawn.joules, drawn.low_j) == ("partial", "rapl", pytest.approx(0.5), None)
    counter.write_text("1000000")
    assert joules.now().joules == pytest.approx(2)
    assert joules.now().joules == pytest.approx(2), "asking takes nothing"


def test_source_that_sees_the_whole_machine_is_measured(tmp_path: Path) -> None:
    device = tmp_path / "hwmon0"
    device.mkdir()
    for name, text in (("name", "ina3221"), ("power1_label", "VDD_IN"), ("power1_input", "4000000")):
        (device / name).write_text(text)
    source = hwmon.find(tmp_path)
    assert isinstance(source, GaugeSource)
    joules = Joules(none_read, [source])
    time.sleep(0.6)
    drawn = joules.now()
    assert drawn.status == "measured" and drawn.joules == pytest.approx(4 * 0.6, rel=0.3)
    time.sleep(0.6)
    assert (joules.now().joules or 0) > (drawn.joules or 0) + 1


def test_too_short_a_time_says_so(counter: Path) -> None:
    source = found(counter)
    source.least_s = 60.0
    drawn = Joules(none_read, [source]).now()
    assert drawn.status == "none" and drawn.joules is None and "needs 60 s" in (drawn.reason or "")


def test_counter_that_stands_still_gives_way_to_the_model(counter: Path) -> None:
    joules = Joules(none_read, [found(counter)])
    assert watchers() == 1
    time.sleep(0.06)
    drawn = joules.now()
    assert drawn.status == "modelled" and (drawn.joules or 0) > 0 and "stood still" in (drawn.reason or "")
    counter.write_text("999900000")
    assert joules.now().status == "modelled", "one source from then on"
    assert _ends()


def test_counter_that_fails_is_taken_up_again(counter: Path) -> None:
    joules = Joules(none_read, [found(counter)])
    counter.write_text("999500000")
    time.sleep(0.06)
    assert joules.now().joules == pytest.approx(0.5)
    counter.write_text("?")
    drawn = joules.now()
    assert drawn.status == "none" and drawn.joules is None and "not a number" in (drawn.reason or "")
    counter.write_text("999600000")  # what it counted meanwhile is not known
    joules.now()
    counter.write_text("999700000")
    drawn = joules.now()
    assert drawn.status == "partial" and drawn.joules == pytest.approx(0.6)


def test_model_counts_time_of_processors_reads_and_memory() -> None:
    n_read = [0]
    joules = Joules(lambda: n_read[0], [Absent("rapl", "there is none")])
    first = joules.now()
    assert first.status == "modelled" and "not measured: rapl: there is none" in (first.reason or "")
    cpu_s = time.process_time()
    while time.process_time() < cpu_s + 0.3:
        pass
    busy = joules.now()
    assert (busy.joules or 0) - (first.joules or 0) > 0.3 * 6.6
    assert (busy.low_j or 0) < (busy.joules or 0) < (busy.high_j or 0)
    n_read[0] = 100 * 10**9
    assert (joules.now().joules or 0) - (busy.joules or 0) == pytest.approx(82, abs=5)
    assert "storage" in (Joules(lambda: None, [Absent("rapl", "there is none")]).now().reason or "")


def _ends() -> bool:
    end = time.monotonic() + 5
    while watchers() and time.monotonic() < end:
        gc.collect()
        time.sleep(0.02)
    return not watchers()


def test_watching_ends_with_who_wants_it_and_the_source_is_closed(counter: Path) -> None:
    closed: list[bool] = []
    source = found(counter)
    close: Callable[[], None] = source.close
    source.close = lambda: (closed.append(True), close())[1]  # type: ignore[method-assign]
    joules = Joules(none_read, [source])
    assert watchers() == 1
    del joules
    assert _ends() and closed == [True]


def test_what_was_found_and_not_chosen_is_closed(counter: Path) -> None:
    closed: list[bool] = []
    second = found(counter)
    second.close = lambda: closed.append(True)  # type: ignore[method-assign]
    joules = Joules(none_read, [found(counter), second])
    assert closed == [True] and joules is not None


def test_counter_is_read_while_nobody_asks(counter: Path) -> None:
    source = found(counter)
    source.period_s = 0.1
    joules = Joules(none_read, [source])
    counter.write_text("999999999")
    time.sleep(1.3)
    counter.write_text("500000")
    time.sleep(1.3)
    assert source.joules == pytest.approx(1.5, abs=0.01), "a second apart, however often it may be"
    assert joules.now().joules == pytest.approx(1.5, abs=0.01)


def test_metrics_tell_joules_and_what_they_are(zoo_model: Callable[..., Path]) -> None:
    with serving(zoo_model("qwen3moe"), "--budget", "min", "-c", "256") as server:
        server.client().completions.create(model="any", prompt="One", max_tokens=8)
        time.sleep(0.1)
        energy = httpx.get(f"{server.url}/pager", timeout=60).json()["energy"]
        families = {family.name: family for family in text_string_to_metric_families(httpx.get(f"{server.url}/metrics", timeout=60).text)}
    if energy["status"] == "none":
        assert energy["reason"] and "gguf_pager_joules" not in families
        return
    sample, = (sample for sample in families["gguf_pager_joules"].samples if sample.name.endswith("_total"))
    assert families["gguf_pager_joules"].type == "counter" and sample.labels["status"] == energy["status"]
    assert sample.value >= energy["joules"] > 0
