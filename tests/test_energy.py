"""Joules, from a fake sysfs: every counter is read as it is meant, and what is not known stays unknown."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import struct
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from gguf_pager.cli import main
from gguf_pager.energy import apple, battery, command, hwmon, meter, perf, rapl
from gguf_pager.energy.meter import Energy, Meter, Reading, choose, find_all, watch
from gguf_pager.energy.model import CONSTANTS, Usage, estimate, override
from gguf_pager.energy.source import Absent, Counter, CounterSource, GaugeSource, NoReading, Source
from gguf_pager.errors import PagerError

RANGE_UJ = 262_143_328_850  # max_energy_range_uj of a Core i7-8700K
USAGE = Usage(seconds=10, cpu_s=20, bytes_read=5_000_000_000, resident_bytes=4_000_000_000)


def write(root: Path, files: dict[str, object]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n")


def zone(root: Path, folder: str, name: str, energy_uj: int, range_uj: int = RANGE_UJ) -> None:
    write(root / folder, {"name": name, "energy_uj": energy_uj, "max_energy_range_uj": range_uj})


def deny(monkeypatch: pytest.MonkeyPatch, *parts: str) -> None:
    """Make files unreadable whose path holds one of these parts; root may read everything otherwise."""
    read = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if any(part in str(path) for part in parts):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)


def counters(found: CounterSource | GaugeSource | Absent) -> CounterSource:
    assert isinstance(found, CounterSource), found
    return found


def gauge(found: CounterSource | GaugeSource | Absent) -> GaugeSource:
    assert isinstance(found, GaugeSource), found
    return found


def absent(found: CounterSource | GaugeSource | Absent) -> str:
    assert isinstance(found, Absent), found
    return found.reason


def names(found: CounterSource | Absent) -> list[str]:
    return [counter.name for counter in counters(found).counters]


# ---- counters and gauges --------------------------------------------------------------------------------------------

def fake_clock(moments: Sequence[float]) -> Callable[[], float]:
    left = list(moments)
    return lambda: left.pop(0)


def fake_counter(values: Sequence[float], range_j: float | None = None) -> Counter:
    left = list(values)
    return Counter("fake", lambda: left.pop(0), range_j)


def test_counter_is_subtracted_and_wraps_between_polls() -> None:
    source = CounterSource("fake", "", "part", [fake_counter([95, 99, 3, 10], 100)], clock=fake_clock([0, 1, 2, 3]))
    source.begin()
    for joules in (4, 8, 15):
        source.poll()
        assert source.joules == joules
    assert source.polled_s - source.begun_s == 3


@pytest.mark.parametrize(("values", "range_j", "reason"), [
    ([50, 40], None, "backwards"), ([50_000, 10], 65_000, "reset"), ([50, 40], 5, "reset"),
])
def test_counter_that_was_reset_is_no_wrap(values: list[float], range_j: float | None, reason: str) -> None:
    source = CounterSource("fake", "", "part", [fake_counter(values, range_j)], clock=fake_clock([0, 1]))
    source.begin()
    with pytest.raises(NoReading, match=reason):
        source.poll()


def test_gauge_is_summed_as_trapezoids_over_uneven_times() -> None:
    watts = [10.0, 20.0, 20.0]
    source = GaugeSource("fake", "", "machine", lambda: watts.pop(0), clock=fake_clock([0, 2, 5]))
    source.begin()
    source.poll()
    source.poll()
    assert source.joules == 30 + 60


# ---- RAPL -----------------------------------------------------------------------------------------------------------

def test_rapl_adds_packages_and_dram_and_nothing_within_or_around_them(tmp_path: Path) -> None:
    for folder, name in (("intel-rapl:0", "package-0"), ("intel-rapl:0:0", "core"), ("intel-rapl:0:1", "uncore"),
                         ("intel-rapl:0:2", "dram"), ("intel-rapl:1", "package-1"), ("intel-rapl:1:0", "dram"),
                         ("intel-rapl:2", "psys")):
        zone(tmp_path, folder, name, 1_000_000)
    source = counters(rapl.find(tmp_path))
    assert names(source) == ["package-0", "package-0 dram", "package-1", "package-1 dram"]
    source.begin()
    zone(tmp_path, "intel-rapl:0", "package-0", 31_000_000)
    zone(tmp_path, "intel-rapl:0:0", "core", 26_000_000)
    zone(tmp_path, "intel-rapl:1:0", "dram", 3_000_000)
    zone(tmp_path, "intel-rapl:2", "psys", 90_000_000)
    source.poll()
    assert source.joules == pytest.approx(32) and source.covers == "part"


def test_rapl_wraps_at_its_range(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", RANGE_UJ - 2_000_000)
    source = counters(rapl.find(tmp_path))
    source.begin()
    zone(tmp_path, "intel-rapl:0", "package-0", 3_000_000)
    source.poll()
    assert source.joules == pytest.approx(5) and "no DRAM counter" in source.scope


def test_rapl_zone_seen_at_two_places_counts_once(tmp_path: Path) -> None:
    zone(tmp_path, "devices/intel-rapl:0", "package-0", 1)
    zone(tmp_path, "devices/intel-rapl:0/intel-rapl:0:0", "dram", 1)
    powercap = tmp_path / "class"
    (powercap / "intel-rapl").mkdir(parents=True)
    for link in ("intel-rapl:0", "intel-rapl/intel-rapl:0"):
        (powercap / link).symlink_to(tmp_path / "devices/intel-rapl:0")
    (powercap / "intel-rapl:0:0").symlink_to(tmp_path / "devices/intel-rapl:0/intel-rapl:0:0")
    assert names(rapl.find(powercap)) == ["package-0", "package-0 dram"]
    (powercap / "intel-rapl:0:0").unlink()  # nested only
    assert names(rapl.find(powercap)) == ["package-0", "package-0 dram"]
    zone(powercap, "intel-rapl:7", "package-0", 1)
    assert names(rapl.find(powercap)) == ["package-0", "package-0 dram"]


def test_rapl_by_mmio_is_the_same_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", 7_000_000)
    assert [counter.read_j() for counter in counters(rapl.find(tmp_path)).counters] == [1]
    deny(monkeypatch, "intel-rapl:0/energy_uj")
    assert [counter.read_j() for counter in counters(rapl.find(tmp_path)).counters] == [7]


def test_rapl_says_what_this_user_may_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 1)
    zone(tmp_path, "intel-rapl:0:0", "dram", 1)
    with monkeypatch.context() as patch:
        deny(patch, "energy_uj")
        reason = absent(rapl.find(tmp_path))
    assert "Permission denied" in reason and "chmod" in reason
    deny(monkeypatch, "intel-rapl:0:0/energy_uj")
    source = counters(rapl.find(tmp_path))
    assert names(source) == ["package-0"] and "without package-0 dram" in source.scope


def test_rapl_absent_is_said(tmp_path: Path) -> None:
    assert "no package zones" in absent(rapl.find(tmp_path / "missing"))
    write(tmp_path, {"intel-rapl:0/name": "package-0", "intel-rapl:0/energy_uj": "garbage"})
    assert "not a number" in absent(rapl.find(tmp_path))


# ---- perf -----------------------------------------------------------------------------------------------------------

SCALE = 2.3283064365386962890625e-10


def power_events(root: Path, *events: str, unit: str = "Joules") -> None:
    write(root, {"type": 9, "cpumask": "0,18-19"})
    for number, event in enumerate(events, 2):
        write(root / "events", {event: f"event=0x{number:02x}", f"{event}.scale": SCALE, f"{event}.unit": unit})


def test_perf_reads_packages_and_dram_of_every_socket(tmp_path: Path) -> None:
    power_events(tmp_path, "energy-pkg", "energy-ram", "energy-psys", "energy-cores")
    opened, writers = [], []

    def open_event(event_type: int, config: int, cpu: int) -> int:
        reader, writer = os.pipe()
        opened.append((event_type, config, cpu))
        writers.append(writer)
        return reader

    source = counters(perf.find(tmp_path, open_event=open_event))
    assert opened == [(9, config, cpu) for config in (2, 3) for cpu in (0, 18, 19)]
    for writer in writers:
        os.write(writer, struct.pack("<QQ", 1 << 32, 3 << 32))
        os.close(writer)
    source.begin()
    source.poll()
    assert source.joules == pytest.approx(len(opened) * 2)
    source.close()
    source.close()
    with pytest.raises(NoReading):
        source.poll()


def test_perf_says_why_it_may_not(tmp_path: Path) -> None:
    power_events(tmp_path / "power", "energy-pkg")
    write(tmp_path, {"paranoid": 2})

    def refuse(event_type: int, config: int, cpu: int) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    reason = absent(perf.find(tmp_path / "power", tmp_path / "paranoid", refuse))
    assert "Permission denied" in reason and "perf_event_paranoid is 2" in reason
    assert "no power events" in absent(perf.find(tmp_path / "missing"))


def test_perf_refuses_what_it_does_not_understand(tmp_path: Path) -> None:
    power_events(tmp_path, "energy-pkg", unit="Furlongs")
    assert "Furlongs" in absent(perf.find(tmp_path, open_event=lambda *_: 0))
    write(tmp_path, {"cpumask": "all"})
    assert "cpumask" in absent(perf.find(tmp_path, open_event=lambda *_: 0))


@pytest.mark.skipif(sys.platform != "linux", reason="perf is Linux's")
def test_perf_event_open_reports_the_systems_error() -> None:
    with pytest.raises(OSError):
        perf.perf_event_open(0xFFFF, 0, 0)


# ---- hwmon ----------------------------------------------------------------------------------------------------------

def test_hwmon_takes_the_boards_input_and_adds_no_rails(tmp_path: Path) -> None:
    write(tmp_path / "hwmon0", {"name": "ina3221", "power1_label": "VDD_IN", "power1_input": 9_500_000,
                                "power2_label": "VDD_CPU", "power2_input": 4_000_000})
    write(tmp_path / "hwmon1", {"name": "coretemp", "power1_input": 1_000_000})
    source = gauge(hwmon.find(tmp_path))
    source.begin()
    assert source.covers == "machine" and "VDD_IN" in source.scope
    assert source._last_w == 9.5
    write(tmp_path / "hwmon0", {"power1_label": "VDD_SOC"})
    assert "cannot tell which rail" in absent(hwmon.find(tmp_path))
    assert gauge(hwmon.find(tmp_path, "VDD_CPU")).covers == "part"


def test_hwmon_counts_energy_where_the_sensor_does(tmp_path: Path) -> None:
    write(tmp_path / "hwmon0", {"name": "ina228", "power1_input": 5_000_000, "energy1_input": 1_000_000})
    source = counters(hwmon.find(tmp_path))
    source.begin()
    write(tmp_path / "hwmon0", {"energy1_input": 4_500_000})
    source.poll()
    assert source.joules == 3.5 and source.covers == "part"


def test_hwmon_absent_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no ina sensors" in absent(hwmon.find(tmp_path))
    write(tmp_path / "hwmon0", {"name": "ina219", "power1_input": 1})
    deny(monkeypatch, "power1_input")
    assert "Permission denied" in absent(hwmon.find(tmp_path))


# ---- battery --------------------------------------------------------------------------------------------------------

def test_battery_tells_power_while_it_discharges(tmp_path: Path) -> None:
    write(tmp_path / "BAT0", {"type": "Battery", "status": "Discharging", "power_now": 12_500_000})
    write(tmp_path / "BAT1", {"type": "Battery", "status": "Discharging", "current_now": -500_000,
                              "voltage_now": 11_000_000})
    write(tmp_path / "BAT2", {"type": "Battery", "status": "Not charging", "power_now": 0})
    write(tmp_path / "AC", {"type": "Mains", "online": 0})
    write(tmp_path / "mouse", {"type": "Battery", "scope": "Device", "status": "Charging"})
    source = gauge(battery.find(tmp_path))
    source.begin()
    assert source._last_w == 12.5 + 5.5 and source.covers == "machine"


@pytest.mark.parametrize(("status", "reason"), [("Charging", "is charging"), ("Full", "not discharging")])
def test_battery_on_mains_tells_nothing(tmp_path: Path, status: str, reason: str) -> None:
    write(tmp_path / "BAT0", {"type": "Battery", "status": status, "power_now": 12_500_000})
    assert reason in absent(battery.find(tmp_path))


def test_battery_put_on_mains_meanwhile_loses_the_interval(tmp_path: Path) -> None:
    write(tmp_path / "BAT0", {"type": "Battery", "status": "Discharging", "power_now": 12_500_000})
    measuring = Meter(battery.find(tmp_path))
    measuring.start()
    write(tmp_path / "BAT0", {"status": "Charging"})
    energy = measuring.stop(n_tokens=3)
    assert energy.energy_status == "none" and energy.energy_total_j is None
    assert energy.energy_reason == "BAT0 is charging: the machine runs on mains"


def test_battery_absent_is_said(tmp_path: Path) -> None:
    assert "no battery" in absent(battery.find(tmp_path))
    write(tmp_path / "BAT0", {"type": "Battery", "status": "Discharging", "power_now": 0})
    assert "tells no power" in absent(battery.find(tmp_path))


# ---- a command ------------------------------------------------------------------------------------------------------

def test_command_prints_watts(tmp_path: Path) -> None:
    source = gauge(command.find("echo 42.5 | cat"))
    source.begin()
    assert source._last_w == 42.5


@pytest.mark.parametrize(("text", "reason"), [
    ("echo many", "did not print watts"), ("echo nan", "cannot be watts"), ("echo -3", "cannot be watts"),
    ("true", "did not print watts"), ("echo no meter >&2; exit 3", "failed with 3: no meter"),
])
def test_command_that_prints_no_watts_is_refused(text: str, reason: str) -> None:
    assert reason in absent(command.find(text))
    assert "no --power-command" in absent(command.find(None))


def test_command_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "TIMEOUT_S", 0.1)
    assert "longer than 0.1 s" in absent(command.find("exec sleep 5"))


# ---- Apple ----------------------------------------------------------------------------------------------------------

def test_apple_adds_what_the_chip_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    now = SimpleNamespace(cpu_total_mj=1000, gpu_mj=500, gpu_sram_mj=None, dram_mj=250, ane_mj=None,
                          performance_cores_mj=[900])
    module = SimpleNamespace(AppleEnergyMonitor=lambda: SimpleNamespace(get_cumulative_energy=lambda: now))
    monkeypatch.setitem(sys.modules, "zeus_apple_silicon", module)
    source = counters(apple.find("darwin"))
    source.begin()
    now.cpu_total_mj, now.dram_mj, now.performance_cores_mj = 3000, 750, [2800]
    source.poll()
    assert source.joules == pytest.approx(2.5) and "untested" in source.scope
    now.gpu_mj = None
    with pytest.raises(NoReading, match="gpu_mj"):
        source.poll()


def test_apple_absent_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zeus_apple_silicon", None)
    assert "gguf-pager[mac]" in absent(apple.find("darwin"))
    assert absent(apple.find("linux")) == "macOS only"


# ---- the model ------------------------------------------------------------------------------------------------------

def test_model_is_the_sum_of_its_terms() -> None:
    result = estimate(USAGE)
    assert result.low_j == pytest.approx(20 * 2 + 5 * 0.82 + 40 * 0.22)
    assert result.value_j == pytest.approx(20 * 6.6 + 5 * 0.82 + 40 * 0.305)
    assert result.high_j == pytest.approx(20 * 22 + 5 * 0.82 + 40 * 0.39)
    more = estimate(dataclasses.replace(USAGE, ram_read_bytes=10**10))
    assert more.value_j - result.value_j == pytest.approx(0.74)


def test_constants_agree_with_the_papers_picojoules() -> None:
    for name, pj_per_bit in (("nvme_read_j_per_gb", 102.4), ("ddr5_read_j_per_gb", 9.2), ("hbm3_read_j_per_gb", 4.2)):
        assert CONSTANTS[name].value == pytest.approx(pj_per_bit * 8e9 / 1e12, rel=0.02)
    for constant in CONSTANTS.values():
        assert 0 < constant.low <= constant.value <= constant.high and constant.source and constant.unit


def test_constants_can_be_set() -> None:
    constants = override({"nvme_read_j_per_gb": 2.0})
    assert constants["nvme_read_j_per_gb"].high == 2.0 and constants["nvme_read_j_per_gb"].source == "given by the user"
    assert estimate(USAGE, constants).low_j == pytest.approx(20 * 2 + 5 * 2 + 40 * 0.22)
    assert CONSTANTS["nvme_read_j_per_gb"].value == 0.82
    for wrong in ({"nonesuch": 1.0}, {"nvme_read_j_per_gb": -1.0}, {"nvme_read_j_per_gb": float("nan")}):
        with pytest.raises(PagerError):
            override(wrong)


# ---- the meter ------------------------------------------------------------------------------------------------------

def steady(watts: float, range_j: float | None = None) -> CounterSource:
    """A counter of a machine that draws this much from now on; its clock stands at the last reading."""
    begun = now = time.monotonic()

    def read_j() -> float:
        nonlocal now
        now = time.monotonic()
        joules = (now - begun) * watts
        return joules % range_j if range_j else joules

    return CounterSource("steady", "a test", "machine", [Counter("steady", read_j, range_j)], period_s=0.01,
                         clock=lambda: now)


def test_interval_gives_gross_and_net_per_token() -> None:
    measuring = Meter(steady(50))
    measuring.idle_w = 20.0
    measuring.start()
    time.sleep(0.1)
    energy = measuring.stop(n_tokens=4)
    assert energy.energy_status == "measured" and energy.energy_method == "steady" and energy.energy_reason is None
    assert energy.avg_power_w == pytest.approx(50)
    assert energy.energy_total_j and energy.energy_net_j and energy.j_per_token and energy.j_per_token_net
    assert energy.energy_net_j == pytest.approx(energy.energy_total_j * 0.6)
    assert energy.j_per_token == energy.energy_total_j / 4 and energy.tokens_per_j == 4 / energy.energy_total_j
    assert energy.j_per_token_net == energy.energy_net_j / 4
    assert energy.j_per_prompt_token is None and energy.energy_low_j is None and energy.energy_constants is None


def test_prompt_is_an_interval_of_its_own() -> None:
    measuring = Meter(steady(50))
    measuring.start()
    time.sleep(0.1)
    energy = measuring.stop(n_prompt_tokens=100)
    assert energy.energy_total_j and energy.j_per_prompt_token == energy.energy_total_j / 100
    assert energy.j_per_token is None and "idle power was not measured" in str(energy.energy_reason)
    with pytest.raises(ValueError, match="one after the other"):
        measuring.stop(n_tokens=1, n_prompt_tokens=1)


def test_idle_that_was_not_idle_gives_no_net() -> None:
    measuring = Meter(steady(50))
    measuring.measure_idle(0.1)
    assert measuring.idle_w == pytest.approx(50)
    measuring.idle_w = 80.0
    measuring.start()
    time.sleep(0.1)
    energy = measuring.stop(n_tokens=1)
    assert energy.energy_net_j is None and "less than idle" in str(energy.energy_reason)


def test_counter_that_stands_still_is_not_zero_joules() -> None:
    measuring = Meter(CounterSource("vm", "a guest", "part", [Counter("vm", lambda: 7.0, None)]))
    measuring.start()
    time.sleep(0.1)
    energy = measuring.stop(n_tokens=5)
    assert energy.energy_status == "none" and energy.energy_total_j is None
    assert "counted nothing" in str(energy.energy_reason)


def test_interval_too_short_for_its_source_is_unknown() -> None:
    source = steady(50)
    source.least_s = 10
    measuring = Meter(source)
    measuring.start()
    assert "needs 10 s" in str(measuring.stop(n_tokens=0).energy_reason)
    source.least_s = 0
    measuring.start()
    time.sleep(0.01)
    energy = measuring.stop(n_tokens=0)
    assert energy.energy_total_j and energy.j_per_token is None and "there was none" in str(energy.energy_reason)


def test_part_of_the_machine_is_partial() -> None:
    source = steady(50)
    source.covers = "part"
    measuring = Meter(source)
    measuring.start()
    time.sleep(0.1)
    assert measuring.stop().energy_status == "partial"


def test_meter_polls_so_that_no_wrap_is_missed() -> None:
    measuring = Meter(steady(100, range_j=50))  # wraps twice a second
    measuring.start()
    time.sleep(1.2)
    assert measuring.stop().avg_power_w == pytest.approx(100)


def test_failure_in_the_middle_is_told_and_the_next_interval_is_good() -> None:
    is_broken = True

    def read_w() -> float:
        if is_broken and source.begun_s:
            raise NoReading("the meter fell off")
        return 5.0

    source = GaugeSource("fragile", "", "machine", read_w, period_s=0.01, least_s=0)
    measuring = Meter(source)
    measuring.start()
    time.sleep(0.1)
    assert measuring.stop().energy_reason == "the meter fell off"
    is_broken = False
    measuring.start()
    time.sleep(0.05)
    assert measuring.stop().avg_power_w == pytest.approx(5)


def test_model_answers_where_nothing_is_measured_and_says_so() -> None:
    measuring = Meter(Absent("none", "no counters"))
    measuring.measure_idle(60)  # does not wait for nothing
    measuring.start()
    energy = measuring.stop(n_tokens=10, usage=USAGE)
    assert energy.energy_status == "modelled" and energy.energy_method == "model"
    assert energy.energy_low_j and energy.energy_total_j and energy.energy_high_j
    assert energy.energy_low_j < energy.energy_total_j < energy.energy_high_j
    assert energy.j_per_token == energy.energy_total_j / 10 and energy.energy_net_j is None
    assert energy.energy_constants and energy.energy_constants["nvme_read_j_per_gb"]["value"] == 0.82
    for said in ("not measured: no counters", "reads of RAM are not known", "idle power was not measured"):
        assert said in str(energy.energy_reason)


def test_reading_that_came_late_counts_for_the_work_alone() -> None:
    """A wall meter that takes a second to answer is read a second after the work."""
    late = Reading(40.0, 4.0, "command", "wall", "machine", None)
    assert late.within(3.0) == Reading(30.0, 3.0, "command", "wall", "machine", None)
    assert late.within(5.0) is late
    unknown = Reading(None, 4.0, None, None, None, "why")
    assert unknown.within(3.0) is unknown


def test_unknown_is_null() -> None:
    measuring = Meter(Absent("none", "no counters"))
    measuring.start()
    facts = json.loads(json.dumps(measuring.stop(n_tokens=10).as_json()))
    assert facts.pop("energy_status") == "none" and facts.pop("energy_reason") == "no counters"
    assert len(facts) == 13 and set(facts.values()) == {None}
    assert set(facts) < {field.name for field in dataclasses.fields(Energy)}


def test_whole_machine_is_chosen_before_its_parts(tmp_path: Path) -> None:
    zone(tmp_path, "class/powercap/intel-rapl:0", "package-0", 1)
    write(tmp_path / "class/hwmon/hwmon0", {"name": "ina219", "power1_input": 5_000_000})
    found = find_all("echo 9", tmp_path)
    assert {source.name for source in found} == {"command", "battery", "hwmon", "rapl", "perf", "ioreport"}
    assert choose(found).name == "command"
    assert choose(find_all(None, tmp_path)).name == "hwmon"
    assert choose([GaugeSource("slow", "", "machine", lambda: 1.0, least_s=10), steady(1)], 2.0).name == "steady"
    nothing = choose(find_all(None, tmp_path / "missing"))
    assert isinstance(nothing, Absent) and "rapl: no package zones" in nothing.reason


def test_watching_shows_each_source_or_its_reason() -> None:
    def fail() -> float:
        raise NoReading("unplugged")

    broken = GaugeSource("broken", "", "machine", fail)
    good, bad = watch([steady(30), broken], 0.2)
    assert len(good.watts) == 4 and good.avg_power_w == pytest.approx(30) and good.reason is None
    assert bad.watts == () and bad.avg_power_w is None and bad.reason == "unplugged"


# ---- the command ----------------------------------------------------------------------------------------------------

def test_energy_command_shows_a_meter() -> None:
    done = CliRunner().invoke(main, ["energy", "--seconds", "0.6", "--power-command", "echo 40", "--json"])
    facts = json.loads(done.output)
    assert done.exit_code == 0 and facts["energy_status"] == "measured" and facts["energy_method"] == "command"
    assert facts["avg_power_w"] == pytest.approx(40) and facts["energy_reason"] is None
    assert facts["sources"][0]["watts"] == pytest.approx([40] * 4)
    assert set(facts["model_constants"]) == set(CONSTANTS)


def test_energy_command_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def find_nothing(power_command: str | None) -> list[Source | Absent]:
        return find_all(power_command, tmp_path)

    monkeypatch.setattr(meter, "find_all", find_nothing)
    monkeypatch.setattr(apple, "find", lambda: Absent("ioreport", "not here"))
    facts = json.loads(CliRunner().invoke(main, ["energy", "--seconds", "0.01", "--json"]).output)
    assert facts["energy_status"] == "none" and facts["avg_power_w"] is None and "no battery" in facts["energy_reason"]
    assert all(row["watts"] is None and row["reason"] for row in facts["sources"])
    text = CliRunner().invoke(main, ["energy", "--seconds", "0.01", "--constant", "cpu_w_per_core=5"]).output
    assert "Energy: none" in text and "given by the user" in text and "102.4 pJ/bit" in text


def test_energy_command_refuses_wrong_constants() -> None:
    assert CliRunner().invoke(main, ["energy", "--constant", "cpu_w_per_core"]).exit_code == 2
    done = CliRunner().invoke(main, ["energy", "--constant", "nonesuch=1"])
    assert done.exit_code == 1 and done.output.startswith("Error: There is no constant 'nonesuch'")
