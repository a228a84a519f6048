"""bench, run for real on a small model: what it measures, and that nothing is left behind however it ends."""

from __future__ import annotations

import dataclasses
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import make_zoo
import psutil
import pytest
import zoo_metadata
from click.testing import CliRunner

from gguf_pager.bench import runner as running
from gguf_pager.bench.cases import Case, Shape
from gguf_pager.bench.disk import Device
from gguf_pager.bench.interrupts import Interrupts
from gguf_pager.bench.runner import Runner, Settings
from gguf_pager.cli import bench as command
from gguf_pager.cli import main
from gguf_pager.errors import PagerError
from gguf_pager.memory import probe
from gguf_pager.memory.cap import Cap, memory_cap
from gguf_pager.model.layout import read_layout

COMMAND = [sys.executable, "-m", "gguf_pager", "bench"]
QUICK = ("-t", "1", "-r", "1", "--idle", "0")
GROUPS = Path("/sys/fs/cgroup")


def bench(model: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    as_it_is = () if "--read-ahead" in arguments else ("--read-ahead", "present")  # other tests use the device, too
    line = [*COMMAND, str(model), *QUICK, *as_it_is, *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)


def bench_rows(model: Path, *arguments: str) -> list[dict[str, Any]]:
    done = bench(model, "-o", "jsonl", *arguments)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def groups() -> set[Path]:
    return set(GROUPS.rglob("gguf_pager-*"))


def workers_of(model: Path) -> list[psutil.Process]:
    return [process for process in psutil.process_iter(["cmdline"])
            if "gguf_pager.bench.worker" in (process.info["cmdline"] or ()) and str(model) in process.info["cmdline"][-1]]


# ---- what is measured -----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def rows(trace_model: Path) -> list[dict[str, Any]]:
    return bench_rows(trace_model, "-p", "64", "-n", "32", "--budget", "50%", "--baseline", "stock,resident")


def test_rows_are_ours_then_stocks_then_the_residents(rows: list[dict[str, Any]]) -> None:
    assert [(row["mode"], row["n_prompt"], row["n_gen"], row["n_depth"]) for row in rows] == [
        (mode, *numbers) for mode in ("paged", "stock", "resident") for numbers in ((64, 0, 0), (0, 32, 64))]
    assert all(row["median_ts"] > 1 and len(row["samples_ts"]) == 1 for row in rows)
    assert all(row["tokens"] == "trace" and row["n_threads"] == 1 for row in rows)


def test_every_name_of_a_row_is_documented(rows: list[dict[str, Any]]) -> None:
    documented = (Path(__file__).parent.parent / "docs" / "cli.md").read_text()
    missing = [name for name in rows[0] if f"`{name}`" not in documented and not name.startswith("energy_")]
    assert missing == [] and "`energy_*`" in documented


def test_ours_ends_with_stocks_logits(rows: list[dict[str, Any]]) -> None:
    assert [row["same_logits"] for row in rows] == [True, True, None, None, None, None]
    assert rows[1]["vs_stock"] == pytest.approx(rows[1]["median_ts"] / rows[3]["median_ts"])


def test_bytes_are_counted_by_us_and_by_the_kernel(rows: list[dict[str, Any]]) -> None:
    ours = rows[1]
    assert 0 < ours["hit_rate"] < 1 and 0 < ours["stall_share"] < 1 and ours["left_alone"] == 0
    assert ours["read_bytes_per_token"] > 0
    if ours["io"] == "direct" and ours["io_bytes_per_token"]:  # a file system in memory reads nothing
        # The kernel counts whole sectors, and what else the process reads.
        assert ours["io_bytes_per_token"] >= ours["read_bytes_per_token"]
        assert ours["io_bytes_per_token"] < 1.2 * ours["read_bytes_per_token"] + 50_000
    assert rows[3]["read_bytes_per_token"] is None, "nobody counts for stock but the kernel"
    assert rows[5]["major_faults"] == 0, "what is resident is not read"


def test_times_and_memory_are_plausible(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert 0 < row["load_s"] < row["usable_s"] < 60
        assert 0 < row["first_token_s"] < 60
        assert 10e6 < row["peak_rss_bytes"] < 500e6
        assert row["user_s"] + row["system_s"] > 0
        assert row["cached_bytes"] == 0 and row["cache"] == "cold"
    assert rows[1]["limit_compute"] in ("own", "resident") and rows[1]["limit_ts"] > 0


def test_energy_is_modelled_or_measured_but_never_zero(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        joules = row["j_per_token"] if row["n_gen"] else row["j_per_prompt_token"]
        assert row["energy_status"] in ("measured", "partial", "modelled")
        assert joules > 0 and row["energy_total_j"] > 0
        assert row["j_per_prompt_token" if row["n_gen"] else "j_per_token"] is None


def test_cap_is_that_of_the_budget_for_ours_and_for_stock(rows: list[dict[str, Any]]) -> None:
    if rows[0]["cap"] == "none":
        pytest.skip(rows[0]["cap_reason"])
    assert rows[0]["cap_bytes"] == rows[2]["cap_bytes"] > rows[0]["peak_rss_bytes"]
    assert rows[4]["cap"] == "none" and rows[4]["cap_bytes"] is None, "what is resident needs all of it"


@pytest.mark.alone  # it sets the device's read-ahead
def test_cap_is_a_budget_in_bytes_itself(trace_model: Path) -> None:
    made = bench_rows(trace_model, "-p", "0", "-n", "8", "--budget", "120MB", "--read-ahead", "128")
    if made[0]["cap"] == "none":
        pytest.skip(made[0]["cap_reason"])
    assert [row["cap_bytes"] for row in made] == [120_000_000] * 2
    assert all(row["cap_peak_bytes"] <= 120_000_000 for row in made if row["cap_peak_bytes"] is not None)


def test_a_meter_is_read_in_both_phases(trace_model: Path) -> None:
    made = bench_rows(trace_model, "-p", "64", "-n", "1500", "--budget", "50%", "--baseline", "none", "--power-command",
                      "echo 30", "--idle", "1")
    prompt, gen = made
    assert gen["energy_status"] == "measured" and gen["energy_method"] == "command"
    assert gen["energy_idle_w"] == pytest.approx(30) and gen["avg_power_w"] == pytest.approx(30)
    assert gen["energy_total_j"] == pytest.approx(30 * gen["avg_ns"] / 1e9, rel=0.1)
    assert prompt["energy_status"] == "modelled" and "0.5 s or more" in prompt["energy_reason"], "too short for it"


def test_warm_is_read_into_the_cache_within_the_cap(trace_model: Path) -> None:
    size = trace_model.stat().st_size
    row = bench_rows(trace_model, "-p", "0", "-n", "8", "--budget", "120MB", "--baseline", "none", "--warm")[0]
    assert row["cache"] == "warm"
    if row["cap"] != "none":
        assert 0.9 * size < row["cached_bytes"] < 1.1 * size


def test_tokens_come_from_where_they_are_told(zoo_model: Callable[..., Path], tmp_path: Path) -> None:
    model = zoo_model("qwen3moe")
    (tmp_path / "ids").write_text(" ".join(map(str, range(5, 50))))
    arguments = ("-p", "0", "-n", "20", "--budget", "min", "--baseline", "stock", "--cap", "none")
    for source, name in ((f"ids:{tmp_path / 'ids'}", "ids"), ("random", "random")):
        row = bench_rows(model, *arguments, "--tokens", source)[0]
        assert (row["tokens"], row["same_logits"], row["status"]) == (name, True, "ok")
    row = bench_rows(model, *arguments, "--tokens", f"text:{__file__}")[0]
    assert (row["tokens"], row["same_logits"]) == ("text", True)


def test_model_without_a_tokenizer_is_measured(tmp_path: Path) -> None:
    row = zoo_metadata.Arch({})
    metadata = make_zoo.model_keys("qwen3moe", row, 32)
    shapes = make_zoo.tidy(make_zoo.tensor_shapes(metadata), row)
    metadata = {name: value for name, value in metadata.items() if not name.startswith("tokenizer.")}
    metadata |= {"tokenizer.ggml.model": "no_vocab", "qwen3moe.vocab_size": shapes["token_embd.weight"][1]}
    writer = make_zoo.new_writer(tmp_path / "model.gguf", metadata)
    for name, shape in shapes.items():
        writer.add_tensor(name, make_zoo.random_values(name, shape, row, 1))
    make_zoo.finish(writer)
    arguments = ("-p", "16", "-n", "8", "--budget", "60%", "--cap", "none")
    made = bench_rows(tmp_path / "model.gguf", *arguments)
    assert [(row["tokens"], row["same_logits"]) for row in made[:2]] == [("random", True)] * 2
    (tmp_path / "ids").write_text("1,2,3\n")
    made = bench_rows(tmp_path / "model.gguf", *arguments, "--tokens", f"ids:{tmp_path / 'ids'}")
    assert [(row["tokens"], row["tokens_repeat"], row["same_logits"]) for row in made[:2]] == [("ids", True, True)] * 2


def test_table_and_page_are_written(trace_model: Path, tmp_path: Path) -> None:
    done = bench(trace_model, "-p", "16", "-n", "8", "--budget", "50%,100%", "--cap", "none", "--report",
                 str(tmp_path / "out.html"))
    assert done.returncode == 0, done.stderr
    assert "| paged 50%" in done.stdout and "| stock, RA" in done.stdout and "█" in done.stdout
    assert "cap: none, no cap was asked for" in done.stdout
    assert "[1/3] paged 50%" in done.stderr, "who waits sees what goes on"
    page = (tmp_path / "out.html").read_text()
    assert "<svg" in page and "paged" in page and "<script" not in page


# ---- what goes wrong ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("arguments", "message"), [
    (("--budget", "auto"), "fits into RAM"), (("-p", "0", "-n", "0", "--budget", "min"), "nothing to measure"),
    (("--budget", "nonsense"), "not understood"), (("--budget", "4GB", "--cap", "2GB"), "above --cap"),
    (("--budget", "min", "--cap", "25%"), "--cap '25%' is not understood"),
    (("--budget", "min", "--cap", "5"), "--cap '5' is not understood"), (("--budget", "min", "--cap", "abc"), "--cap 'abc' is not understood"),
    (("--budget", "min", "--tokens", "text:missing"), "not a file"),
    (("--budget", "min", "--constant", "speed=1"), "no constant"),
    (("--budget", "min", "--report", "missing/out.html"), "no folder"),
])
def test_what_cannot_be_measured_is_refused_at_once(trace_model: Path, arguments: tuple[str, ...], message: str) -> None:
    result = CliRunner().invoke(main, ["bench", str(trace_model), *arguments])
    assert result.exit_code == 1 and result.stdout == ""
    assert message in result.stderr and result.stderr.startswith("Error: ")


@pytest.mark.parametrize("arguments", [("-p", "x"), ("-t", "0"), ("--baseline", "others"), ("-r", "0"), ("-o", "xml")])
def test_misuse_is_exit_code_2(trace_model: Path, arguments: tuple[str, ...]) -> None:
    assert CliRunner().invoke(main, ["bench", str(trace_model), *arguments]).exit_code == 2


def test_dense_model_has_nothing_to_compare(dense_model: Path) -> None:
    result = CliRunner().invoke(main, ["bench", str(dense_model), "--budget", "min"])
    assert result.exit_code == 1 and "no experts" in result.stderr


def test_budget_that_is_too_small_fails_in_its_row(trace_model: Path) -> None:
    made = bench_rows(trace_model, "-p", "0", "-n", "8", "--budget", "1MB", "--cap", "none")
    assert made[0]["status"] == "failed" and "1 MB" not in made[0]["status_reason"]
    assert "too small" in made[0]["status_reason"] and made[0]["median_ts"] is None
    assert made[1]["status"] == "ok", "stock has its row all the same"
    done = bench(trace_model, "-p", "0", "-n", "8", "--budget", "1MB", "--cap", "none")
    assert done.returncode == 0, "there is a result"
    assert "Warning: 1 of 2 rows have no valid result: paged 1MB, tg8: failed: " in done.stderr


def test_bench_whose_rows_all_failed_is_an_error_in_one_line(trace_model: Path) -> None:
    done = bench(trace_model, "-o", "jsonl", "-p", "0", "-n", "8", "--budget", "1MB", "--cap", "none", "--baseline", "none")
    assert done.returncode == 1 and json.loads(done.stdout)["status"] == "failed", "the row is there all the same"
    assert done.stderr.splitlines()[-1].startswith("Error: No row has a result: paged 1MB, tg8: failed: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("changed", "message"), [
    ({"same_logits": False, "status": "invalid"}, "The logits of 1 of 2 rows differ"),
    ({}, None), ({"status": "disturbed"}, None), ({"status": "interrupted"}, None)])
def test_logits_that_differ_are_an_error_and_noise_is_none(changed: dict[str, Any], message: str | None) -> None:
    row: dict[str, Any] = {"status": "ok", "status_reason": "why", "same_logits": None, "median_ts": 1.0, "mode": "stock",
                           "read_ahead_kb": 128, "n_prompt": 0, "n_gen": 8, "n_depth": 0}
    if message is None:
        command._judge([row, row | changed])
        return
    with pytest.raises(PagerError, match=message):
        command._judge([row, row | changed])


def test_run_that_is_not_done_in_time_yields_a_row_that_says_so(trace_model: Path) -> None:
    made = bench_rows(trace_model, "-p", "64", "-n", "200000", "--budget", "50%", "--baseline", "none", "--cap", "none",
                      "--timeout", "4", "-r", "2")
    prompt, gen = made
    assert gen["status"] == "timeout" and "of 200000 tokens were decoded" in gen["status_reason"]
    assert gen["median_ts"] is None
    assert prompt["status"] in ("ok", "disturbed") and len(prompt["samples_ts"]) == 2, "the prompt was tried again, and only that"
    assert not workers_of(trace_model)


def test_run_that_does_not_even_load_is_not_tried_again(trace_model: Path) -> None:
    done = bench(trace_model, "-o", "jsonl", "-p", "8", "-n", "8", "--budget", "50%", "--cap", "none", "--timeout", "0.01",
                 "-r", "2", "--baseline", "none")
    assert done.returncode == 1, "nothing was measured"
    made = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["status"] for row in made] == ["timeout"] * 2
    assert "still loading" in made[0]["status_reason"] and done.stderr.count("/2] paged 50%: timeout: ") == 2


@pytest.mark.alone
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupt_leaves_the_rows_that_were_finished_and_nothing_else(trace_model: Path, number: signal.Signals) -> None:
    before = groups()
    line = [*COMMAND, str(trace_model), *QUICK, "-o", "json", "-p", "32", "-n", "64", "-r", "500", "--budget", "120MB",
            "--read-ahead", "present"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None and child.stdout is not None
        while "[3/" not in child.stderr.readline():
            assert child.poll() is None
        time.sleep(0.3)  # in the middle of a run
        child.send_signal(number)
        child.send_signal(number)  # impatience changes nothing
        told, _ = child.communicate(timeout=60)
        assert child.returncode == 130
    made = json.loads(told)
    assert [(row["mode"], row["status"]) for row in made] == [(mode, "interrupted") for mode in ("paged", "stock")
                                                              for _ in range(2)]
    assert all("of 500 rounds" in row["status_reason"] and row["median_ts"] for row in made)
    assert not workers_of(trace_model)
    assert groups() == before


class InterruptedAtItsEnd:
    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)


def test_interrupt_is_not_lost_in_a_destructor() -> None:
    with Interrupts() as interrupts, selectors.DefaultSelector() as selector:
        selector.register(interrupts, selectors.EVENT_READ)
        interrupts.check()
        InterruptedAtItsEnd()  # the interpreter drops what a handler raises here
        assert selector.select(10), "it ends the wait of whoever listens"
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                interrupts.check()


def test_interrupt_ends_a_sleep() -> None:
    with Interrupts() as interrupts:
        before = signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        begun = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            interrupts.sleep(30)
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - begun < 10


def test_interrupts_are_given_back_and_what_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        with Interrupts() as interrupts:
            os.kill(os.getpid(), signal.SIGHUP)
            interrupts.check()
            assert signal.getsignal(signal.SIGINT) is not handlers[0]
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
        assert signal.set_wakeup_fd(-1) == -1
    finally:
        signal.signal(signal.SIGHUP, before)


def test_worker_ends_with_a_parent_that_was_killed(trace_model: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("only Linux can be asked for that")
    line = [*COMMAND, str(trace_model), *QUICK, "-p", "0", "-n", "500000", "--budget", "50%", "--cap", "none"]
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        until = time.monotonic() + 60
        while not workers_of(trace_model):
            assert time.monotonic() < until and child.poll() is None
            time.sleep(0.05)
        time.sleep(0.5)
        os.kill(child.pid, signal.SIGKILL)
    until = time.monotonic() + 20
    while workers_of(trace_model):
        assert time.monotonic() < until, "it still runs"
        time.sleep(0.05)


def a_request(read_ahead: tuple[int | None, ...], baselines: tuple[str, ...] = ("stock",)) -> Any:
    return SimpleNamespace(read_ahead=read_ahead, baselines=baselines)


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "read_ahead_kb"
    path.write_text("8192\n")
    monkeypatch.setattr(probe, "read_ahead_setting", lambda _: path)
    return path


def test_stock_runs_at_the_present_read_ahead_and_at_linuxs_own(trace_model: Path, setting: Path) -> None:
    """The issue's case: 30.6 times at the 8 MiB that a machine came with, where 128 KiB gives about 4."""
    layout = read_layout(trace_model)
    assert command._settable(a_request(()), layout) == (8192, 128)
    assert command._settable(a_request((), ("resident",)), layout) == (), "it is nobody's business but stock's"
    assert command._settable(a_request((None,)), layout) == (), "left as it is"
    assert command._settable(a_request((128, None)), layout) == (128, 8192)
    setting.write_text("128")
    assert command._settable(a_request(()), layout) == ()


def test_read_ahead_that_cannot_be_set_is_not_pretended(trace_model: Path, setting: Path, monkeypatch: pytest.MonkeyPatch,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    layout = read_layout(trace_model)
    monkeypatch.setattr(os, "access", lambda *_: False)
    for asked in ((128, 8192), ()):
        assert command._settable(a_request(asked), layout) == ()
        assert "cannot be set here: it stays at 8,192 KiB, and stock runs once." in capsys.readouterr().err
    monkeypatch.setattr(probe, "read_ahead_setting", lambda _: None)
    assert command._settable(a_request(()), layout) == () and "an unknown size" in capsys.readouterr().err
    assert command._settable(a_request((), ()), layout) == () and capsys.readouterr().err == "", "nobody would run with it"


# ---- the runner -----------------------------------------------------------------------------------------------------

def a_runner(model: Path) -> Runner:
    layout = read_layout(model)
    settings = Settings(model, 1, 60.0, False, "trace", {}, None, None, "not asked for", False)
    return Runner(settings, layout, Device(layout.paths, None), Interrupts(), lambda _: None)


def test_model_that_does_not_fit_is_not_made_resident(trace_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = a_runner(trace_model)
    free = dataclasses.replace(probe.memory(), available_bytes=runner.layout.tensor_bytes - 1)
    monkeypatch.setattr(probe, "memory", lambda: free)
    run = runner.run(Case("resident", Shape(8, 8, 0, 1, 64, 64), None), 0)
    assert run.status == "failed" and "do not fit" in (run.reason or "")


def test_memory_of_the_cap_is_touched_before_the_run(trace_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touched: list[int] = []
    monkeypatch.setattr(running.memory, "touch", lambda n_bytes, check: touched.append(n_bytes))
    runner = a_runner(trace_model)
    for mode, cap_bytes in (("paged", 700 << 20), ("stock", 700 << 20), ("resident", None)):
        case = Case(mode, Shape(8, 4, 0, 1, 64, 64), cap_bytes, "50%" if mode == "paged" else None)
        assert runner.run(case, 0).status == "ok"
    assert touched == [700 << 20, 700 << 20, runner.layout.tensor_bytes]


def test_process_that_outgrows_its_cap_is_told_as_such(trace_model: Path) -> None:
    with memory_cap(30_000_000) as cap:
        if cap.folder is None:
            pytest.skip(f"no group can be made here: {cap.reason}")
    run = a_runner(trace_model).run(Case("stock", Shape(8, 8, 0, 1, 64, 64), 30_000_000), 0)
    assert run.status == "failed"
    assert (run.reason or "").startswith("it needs more memory than the cap of 30,000,000 bytes: the kernel ended it")


def test_cap_that_cannot_be_made_is_never_pretended(trace_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import contextmanager

    @contextmanager
    def refused(_: int | None) -> Any:
        yield Cap("none", None, "nobody may")

    monkeypatch.setattr(running, "memory_cap", refused)
    run = a_runner(trace_model).run(Case("stock", Shape(8, 8, 0, 1, 64, 64), 30_000_000), 0)
    assert run.status == "ok" and (run.cap, run.cap_bytes, run.cap_reason) == ("none", None, "nobody may")


def test_worker_that_dies_leaves_its_last_words(trace_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    run = a_runner(trace_model).run(Case("stock", Shape(8, 8, 0, 1, 64, 64), None), 0)
    assert (run.status, run.reason) == ("failed", "the run ended with exit code 1")


def test_run_that_ends_without_a_result_has_failed(trace_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/true")
    run = a_runner(trace_model).run(Case("stock", Shape(8, 8, 0, 1, 64, 64), None), 0)
    assert (run.status, run.reason) == ("failed", "the run ended without a result")


def test_model_that_vanished_is_a_failed_run(trace_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(trace_model.read_bytes())
    runner = a_runner(model)
    model.unlink()
    run = runner.run(Case("stock", Shape(8, 8, 0, 1, 64, 64), None), 0)
    assert run.status == "failed" and "No such file" in (run.reason or "")


def test_calibration_finds_a_cap_or_estimates_one(trace_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = a_runner(trace_model)
    shape = Shape(8, 2, 0, 1, 64, 64)
    estimate = running.estimate_cap_bytes(runner.layout, "50%")
    assert running.estimate_cap_bytes(runner.layout, "min") < estimate < running.estimate_cap_bytes(runner.layout, "100%")
    with memory_cap(1 << 30) as cap:
        can_cap = cap.method != "none"
    found = runner.calibrate(shape, "50%")
    assert (30_000_000 < found < estimate) if can_cap else found == estimate
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert runner.calibrate(shape, "50%") == estimate, "a run that failed tells nothing"
    assert not runner._given_up, "and does not count"


@pytest.mark.alone  # what spins beside other tests is told to spin less
def test_stock_spins_as_it_does_by_itself_and_as_the_user_has_said(trace_model: Path) -> None:
    runner = a_runner(trace_model)
    paged, stock = (Case(mode, Shape(0, 2, 0, 1, 64, 64), None, budget)
                    for mode, budget in (("paged", "50%"), ("stock", None)))
    assert runner.run(stock, 0).facts["gomp_spincount"] == running.STOCK_SPIN_COUNT
    assert runner.run(paged, 0).facts["gomp_spincount"] == "20000"
    runner.settings = dataclasses.replace(runner.settings, is_spin_chosen=True)
    assert runner.run(stock, 0).facts["gomp_spincount"] == os.environ.get("GOMP_SPINCOUNT")


@pytest.mark.alone  # it sets the device's read-ahead
def test_read_ahead_is_set_for_the_run_and_restored(trace_model: Path) -> None:
    runner = a_runner(trace_model)
    setting = runner._setting
    if setting is None or not os.access(setting, os.W_OK):
        pytest.skip("the read-ahead of this device cannot be set")
    before = int(setting.read_text())
    run = runner.run(Case("stock", Shape(8, 8, 0, 1, 64, 64), None, read_ahead_kb=before + 64), 0)
    assert run.read_ahead_kb == before + 64 and int(setting.read_text()) == before


def test_read_ahead_that_changes_during_a_run_is_unknown(trace_model: Path, monkeypatch: pytest.MonkeyPatch, setting: Path) -> None:
    runner = a_runner(trace_model)
    spawn = runner._spawn

    def spawn_and_set(*arguments: Any, **named: Any) -> None:
        spawn(*arguments, **named)
        setting.write_text("64")  # as another benchmark does

    monkeypatch.setattr(runner, "_spawn", spawn_and_set)
    run = runner.run(Case("stock", Shape(8, 8, 0, 1, 64, 64), None), 0)
    assert run.status == "ok" and run.read_ahead_kb is None
