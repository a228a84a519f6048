"""What bench computes from runs, and how it writes it down: no model is loaded here."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from gguf_pager.bench import details, rows, tokens
from gguf_pager.bench.cases import (
    Case,
    Shape,
    budget_bytes,
    cases_of,
    parse_numbers,
    parse_read_aheads,
    rounds_of,
    shapes,
)
from gguf_pager.bench.runner import Run, outcome
from gguf_pager.bench.runner import _reached as reached
from gguf_pager.bench.runner import _take as take_event
from gguf_pager.bench.worker import PhaseResult, Task
from gguf_pager.energy.meter import Reading
from gguf_pager.energy.model import CONSTANTS
from gguf_pager.errors import PagerError
from gguf_pager.report.bench import PRINTERS, SQL_TABLE, bars, table

SHAPE = Shape(512, 128, 0, 2, 2048, 512)
PAGED = Case("paged", SHAPE, 2_100_000_000, "25%", 128)
STOCK = Case("stock", SHAPE, 2_100_000_000, None, 128)
STOCK_AHEAD = dataclasses.replace(STOCK, read_ahead_kb=8192)
RESIDENT = Case("resident", SHAPE, None, None, 128)
REPACKED = dataclasses.replace(RESIDENT, is_repacked=True)

UNMEASURED = Reading(None, 0.0, None, None, None, "no counter here")


# ---- cases ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("text", "numbers"), [
    ("128", (128,)), ("64,128", (64, 128)), ("16-64+16", (16, 32, 48, 64)), ("1-8*2", (1, 2, 4, 8)), ("3-5", (3, 4, 5)),
    ("0", (0,)), ("1-6*2,10", (1, 2, 4, 10)), ("5-5", (5,)), (" 1 , 2 ", (1, 2)),
])
def test_numbers_are_written_as_for_llama_bench(text: str, numbers: tuple[int, ...]) -> None:
    assert parse_numbers(text) == numbers


def test_read_aheads_are_numbers_or_what_the_device_has() -> None:
    assert parse_read_aheads("128,8192") == (128, 8192) and parse_read_aheads("present") == (None,)
    assert parse_read_aheads(" present , 64-256*2") == (None, 64, 128, 256)
    for text in ("0", "nothing", "128,", "0-4"):
        with pytest.raises(ValueError, match=r"understood|least"):
            parse_read_aheads(text)


@pytest.mark.parametrize("text", ["", "x", "1,", "-1", "1.5", "4-1", "1-8*1", "0-8*2", "1-8+0", "1-", "1+1"])
def test_numbers_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"understood|never ends|before it begins"):
        parse_numbers(text)


def test_lists_multiply_and_what_computes_nothing_is_left_out() -> None:
    made = shapes((0, 512), (0, 64), (0,), (2,), (2048,), (512, 64))
    assert [(shape.n_prompt, shape.n_gen, shape.n_ubatch) for shape in made] == [
        (0, 64, 512), (0, 64, 64), (512, 0, 512), (512, 0, 64), (512, 64, 512), (512, 64, 64)]
    assert Shape(512, 64, 100, 1, 1, 1).n_tokens == 676 and Shape(512, 64, 100, 1, 1, 1).n_ctx == 768


def test_shapes_that_differ_in_sequences_alone_share_their_rounds() -> None:
    made = shapes((8, 16), (4,), (0,), (2,), (64,), (64,), (1, 2, 2))
    assert [[(shape.n_prompt, shape.n_parallel) for shape in group] for group in rounds_of(made)] == [[(8, 1), (8, 2)], [(16, 1), (16, 2)]]
    assert [len(group) for group in rounds_of(shapes((8, 16), (4,), (0,), (2,), (64,), (64,)))] == [1, 1]


def test_sequences_share_a_context_that_holds_them_all() -> None:
    shape = Shape(512, 64, 100, 1, 1, 1, 3)
    assert (shape.n_sequence_tokens, shape.n_tokens, shape.n_ctx) == (676, 2028, 2048)
    assert Case("paged", shape, None, "25%").label == "paged 25%, 3 sequences"


def test_stock_runs_under_each_cap_once_at_every_read_ahead() -> None:
    caps = {"25%": 10, "50%": 20, "20": 20}
    made = cases_of(SHAPE, list(caps), ("stock", "resident", "repacked"), (128, 8192), caps.get)
    assert [(case.mode, case.cap_bytes, case.budget, case.read_ahead_kb) for case in made] == [
        ("paged", 10, "25%", 128), ("stock", 10, None, 128), ("stock", 10, None, 8192),
        ("paged", 20, "50%", 128), ("stock", 20, None, 128), ("stock", 20, None, 8192),
        ("paged", 20, "20", 128), ("resident", None, None, 128), ("resident", None, None, 128)]
    assert [case.is_repacked for case in made[-2:]] == [False, True]
    assert [case.mode for case in cases_of(SHAPE, ["min"], (), (), lambda _: None)] == ["paged"]


def test_bare_bytes_are_shown_as_megabytes() -> None:
    labels = [Case("paged", SHAPE, None, budget).label for budget in ("353944288", "25%", "2GiB")]
    assert labels == ["paged 354 MB", "paged 25%", "paged 2GiB"]


def test_what_is_given_twice_is_measured_once() -> None:
    made = cases_of(SHAPE, ["25%", "25%"], ("stock",), (128, 128), lambda _: 10)
    assert [case.mode for case in made] == ["paged", "stock"]
    assert len(shapes((64, 64), (8,), (0, 0), (2,), (2048,), (512,))) == 1


def test_budget_in_bytes_is_known_and_others_are_not() -> None:
    assert budget_bytes("2GiB") == 2 << 30
    assert [budget_bytes(text) for text in ("25%", "auto", "min")] == [None] * 3


def test_task_survives_the_way_to_the_worker() -> None:
    task = Task("a b.gguf", "paged", SHAPE, True, "25%", {"io": "direct"}, False, True, "text:x", 1, 3, None, "rapl",
                None, 7, 9)
    assert Task.from_json(task.to_json()) == task


# ---- tokens ---------------------------------------------------------------------------------------------------------

TRACE = {"gguf_pager.trace.first_token": 257, "gguf_pager.trace.positions": 100, "tokenizer.ggml.model": "rwkv"}


def test_source_is_the_trace_else_a_text_else_random() -> None:
    assert tokens.choose_source(None, TRACE) == "trace"
    assert tokens.choose_source(None, {"tokenizer.ggml.model": "gpt2"}) == f"text:{tokens.TEXT}"
    assert tokens.choose_source(None, {}) == tokens.choose_source(None, {"tokenizer.ggml.model": "no_vocab"}) == "random"
    assert tokens.choose_source("random", TRACE) == "random"
    assert tokens.TEXT.is_file()


@pytest.mark.parametrize(("asked", "values", "message"), [
    ("trace", {}, "not made from a trace"), ("text:x", {}, "no tokenizer"), ("text:", TRACE, "not understood"),
    ("ids:missing", TRACE, "not a file"), ("nonsense", TRACE, "not understood"),
])
def test_source_that_cannot_be_is_refused(asked: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(PagerError, match=message):
        tokens.choose_source(asked, values)


def test_ids_come_from_each_source(tmp_path: Path) -> None:
    def read(source: str, turn: int = 0) -> list[int]:
        return tokens.read_ids(source, TRACE, 1000, lambda raw: list(raw), turn, 5)

    assert read("trace") == list(range(257, 357))
    (tmp_path / "ids").write_text("5, 6\n7 8\n")
    assert read(f"ids:{tmp_path / 'ids'}") == [5, 6, 7, 8]
    (tmp_path / "text").write_text("AB")
    assert read(f"text:{tmp_path / 'text'}") == [65, 66]
    assert len(read("random")) == 5 and read("random") == read("random") != read("random", 1)
    for content, message in (("1 x", "something else"), ("1 1000", "1000, and this model knows 1000"), (" ", "no tokens")):
        (tmp_path / "bad").write_text(content)
        with pytest.raises(PagerError, match=message):
            read(f"ids:{tmp_path / 'bad'}")


def test_rounds_take_tokens_from_places_spread_over_the_sequence() -> None:
    ids = list(range(100))
    assert [tokens.take(ids, 10, turn, 3)[0][0] for turn in range(3)] == [0, 45, 90]
    assert tokens.take(ids, 10, 0, 1) == [ids[:10]]
    assert tokens.take([1, 2, 3], 7, 1, 2) == [[1, 2, 3, 1, 2, 3, 1]], "a short one repeats"


def test_sequences_of_a_round_take_tokens_from_other_places_than_the_one_that_is_alone() -> None:
    ids = list(range(100))
    for turn in range(3):
        several = tokens.take(ids, 10, turn, 3, 4)
        assert several[0] == tokens.take(ids, 10, turn, 3)[0] and all(len(own) == 10 for own in several)
        assert len({token for own in several for token in own}) == 40, "no two have a token in common"
    assert [own[0] for own in tokens.take(ids, 10, 2, 3, 4)] == [90, 15, 40, 65], "behind the end comes the beginning"
    assert tokens.take([1, 2, 3], 4, 0, 1, 3) == [[1, 2, 3, 1], [2, 3, 1, 2], [3, 1, 2, 3]], "too few: at least never in step"


# ---- runs -----------------------------------------------------------------------------------------------------------

def phase(n_tokens: int, seconds: float, **given: Any) -> PhaseResult:
    values: dict[str, Any] = {
        "hits": None, "misses": None, "bytes_read": None, "bytes_wasted": None, "stall_ns": None, "stall_bytes": None, "left_alone": None,
        "ram_read_bytes": None, "expert_bytes": None,
        "io_bytes": 0, "major_faults": 0, "user_s": seconds, "system_s": 0.0, "resident_bytes": 10**9,
        "reading": UNMEASURED,
    } | given
    return PhaseResult(n_tokens, round(seconds * 1e9), **values)


def a_run(case: Case, turn: int, decode_ts: float | None, prefill_ts: float | None = 100.0, **given: Any) -> Run:
    """Return a run at these speeds; of ours a quarter of the decode time is stalled, in which 1.8 GB/s arrive, and 40 MB are
    read per token."""
    ours = {"hits": 96, "misses": 32, "bytes_read": 128 * 40_000_000, "bytes_wasted": 128 * 1_000_000, "stall_ns": 0, "stall_bytes": 0,
            "left_alone": 0, "io_bytes": 128 * 40_000_000}
    gen = prompt = None
    if decode_ts is not None:
        seconds = 128 / decode_ts
        stalled = {"stall_ns": round(seconds * 0.25e9), "stall_bytes": round(seconds * 0.25 * 1.8e9)}
        gen = phase(128, seconds, **(ours | stalled if case.mode == "paged" else {}))
    if prefill_ts is not None:
        prompt = phase(512, 512 / prefill_ts, **(ours if case.mode == "paged" else {}))
    facts = {"io": "direct" if case.mode == "paged" else None, "n_source_tokens": 2048, "load_s": 1.0 + turn, "usable_s": 2.0 + turn, "model_type": "a model", "model_size": 5, "model_n_params": 7,
             "n_ubatch": 512, "digest": f"digest {turn}", "peak_rss_bytes": 2_000_000_000 + turn}
    values: dict[str, Any] = {"cap": "cgroup1", "cap_bytes": case.cap_bytes, "read_ahead_kb": case.read_ahead_kb,
                              "cached_bytes": 0, "facts": facts, "begun_at": 1_800_000_000.0}
    return Run(case, turn, prompt=prompt, gen=gen, **values | given)


def common(**given: Any) -> rows.Common:
    values: dict[str, Any] = {
        "model_filename": "m.gguf", "machine": {"cpu_info": "a CPU"}, "device_bytes_per_s": 2e9, "stream_bytes_per_s": 1e9,
        "idle_w": None,
        "constants": CONSTANTS, "tokens": "trace", "is_warm": False, "n_rounds": 3,
    }
    return rows.Common(**values | given)


def decode_rows(runs: Sequence[Run], **given: Any) -> dict[Case, dict[str, Any]]:
    made = [row for row in rows.rows_of(runs, common(**given)) if row["n_gen"]]
    return dict(zip(dict.fromkeys(run.case for run in runs), made, strict=True))


def test_a_run_makes_a_row_for_the_prompt_and_one_for_what_follows() -> None:
    made = rows.rows_of([a_run(PAGED, 0, 10.0)], common(n_rounds=1))
    assert [(row["n_prompt"], row["n_gen"], row["n_depth"]) for row in made] == [(512, 0, 0), (0, 128, 512)]
    only = dataclasses.replace(PAGED, shape=dataclasses.replace(SHAPE, n_prompt=0))
    assert [row["n_gen"] for row in rows.rows_of([a_run(only, 0, 10.0, None)], common())] == [128]


def test_row_has_llama_benchs_names_first_and_its_figures() -> None:
    row = decode_rows([a_run(PAGED, turn, ts) for turn, ts in enumerate((10.0, 8.0, 16.0))])[PAGED]
    names = list(row)
    assert names.index("samples_ts") < names.index("mode")
    assert row["samples_ts"] == pytest.approx([10, 8, 16]) and row["avg_ts"] == pytest.approx(34 / 3)
    assert row["avg_ns"] == pytest.approx(sum(128e9 / ts for ts in (10, 8, 16)) / 3)
    assert row["stddev_ts"] == pytest.approx(4.163332)  # with n - 1, as llama-bench's
    assert row["test_time"] == "2027-01-15T08:00:00Z"
    assert (row["median_ts"], row["min_ts"], row["max_ts"]) == pytest.approx((10, 8, 16))
    assert (row["load_s"], row["usable_s"]) == (2.0, 3.0)
    assert row["peak_rss_bytes"] == 2_000_000_002, "the most of any run"
    assert row["hit_rate"] == 0.75 and row["read_bytes_per_token"] == 40_000_000 and row["stall_share"] == 0.25
    assert row["wasted_bytes_per_token"] == 1_000_000
    assert row["status"] == "ok"


def test_one_sample_has_no_deviation() -> None:
    row = decode_rows([a_run(PAGED, 0, 10.0)], n_rounds=1)[PAGED]
    assert row["stddev_ts"] is None and row["stddev_ns"] is None


def test_ratio_is_taken_within_rounds_and_against_stock_at_its_best() -> None:
    """The machine halves its speed in round 1: the ratio is 2 all the same. Stock is best at 128."""
    speeds = (10.0, 5.0, 11.0)
    runs = [a_run(PAGED, turn, ts) for turn, ts in enumerate(speeds)]
    runs += [a_run(STOCK, turn, ts / 2) for turn, ts in enumerate(speeds)]
    runs += [a_run(STOCK_AHEAD, turn, ts / 20, 200.0) for turn, ts in enumerate(speeds)]
    runs += [a_run(RESIDENT, turn, ts * 2) for turn, ts in enumerate(speeds)]
    row = decode_rows(runs)[PAGED]
    assert (row["vs_stock"], row["vs_stock_low"], row["vs_stock_high"]) == pytest.approx((2, 2, 2))
    assert row["vs_stock_read_ahead_kb"] == 128 and row["vs_resident"] == pytest.approx(0.5)
    prompt = next(row for row in rows.rows_of(runs, common()) if row["n_prompt"])
    assert prompt["vs_stock_read_ahead_kb"] == 8192 and prompt["vs_stock"] == pytest.approx(0.5)
    assert decode_rows(runs)[STOCK]["vs_stock"] is None


def test_ratio_needs_both_under_the_same_cap_in_force() -> None:
    """The issue's words: no ratio without a cap. What was asked for does not count, nor does what half of the runs had."""
    def paged_row(*runs: Run) -> dict[str, Any]:
        return decode_rows(runs, n_rounds=1)[PAGED]

    def reason(*runs: Run) -> str:
        row = paged_row(*runs)
        assert row["vs_stock"] is row["vs_stock_low"] is row["vs_stock_high"] is row["vs_stock_read_ahead_kb"] is None
        return str(row["vs_stock_reason"])

    ours, stock = a_run(PAGED, 0, 10.0), a_run(STOCK, 0, 5.0)
    assert paged_row(ours, stock)["vs_stock"] == pytest.approx(2) and paged_row(ours, stock)["vs_stock_reason"] is None
    free = {"cap": "none", "cap_bytes": None, "cap_reason": "nobody may"}
    assert reason(a_run(PAGED, 0, 10.0, **free), a_run(STOCK, 0, 5.0, **free)) == "no ratio without a cap: nobody may"
    assert reason(ours, a_run(STOCK, 0, 5.0, **free)) == "stock did not run under the same cap: nobody may"
    assert reason(a_run(PAGED, 0, 10.0, **free), stock) == "no ratio without a cap: nobody may"
    assert "no ratio without a cap: nobody may" in reason(ours, a_run(PAGED, 1, 10.0, **free), stock)
    assert "same cap: its caps were others" in reason(ours, a_run(dataclasses.replace(STOCK, cap_bytes=3), 0, 5.0))
    assert "same cap" in reason(ours, a_run(STOCK, 0, 5.0, cap_bytes=3)), "what is in force decides"
    assert "not the same in all runs" in reason(ours, a_run(PAGED, 1, 10.0, cap_bytes=3), stock)
    assert reason(ours, a_run(STOCK, 1, 5.0)) == "no round has a result of both"
    assert reason(ours) == "stock was not measured"
    assert reason(ours, a_run(STOCK, 0, None, status="timeout", reason="why")) == "stock has no result: timeout"
    assert reason(a_run(PAGED, 0, None, status="failed", reason="why"), stock) == "ours has no result"


def test_row_tells_every_read_ahead_at_which_stock_ran_under_its_cap() -> None:
    late = a_run(STOCK_AHEAD, 0, None, status="timeout", reason="too slow")
    other = a_run(dataclasses.replace(STOCK, cap_bytes=3, read_ahead_kb=64), 0, 50.0)
    row = decode_rows([a_run(PAGED, 0, 10.0), a_run(STOCK, 0, 5.0), late, other], n_rounds=1)[PAGED]
    assert (row["vs_stock_read_ahead_kb"], row["vs_stock_tried_kb"]) == (128, [128, 8192])
    unknown = decode_rows([a_run(PAGED, 0, 10.0), a_run(STOCK, 0, 5.0, read_ahead_kb=None)], n_rounds=1)[PAGED]
    assert (unknown["vs_stock"], unknown["vs_stock_read_ahead_kb"], unknown["vs_stock_tried_kb"]) == (2, None, [None])


# ---- what cannot be ----

def judged(*runs: Run, **given: Any) -> dict[str, tuple[str, str | None]]:
    """Return status and reason of the rows of decode, by the label of the case."""
    return {case.label: (row["status"], row["status_reason"]) for case, row in decode_rows(runs, **given).items()}


def test_whole_model_in_ram_is_not_slower_than_a_part_of_it() -> None:
    runs = [a_run(PAGED, 0, 20.0), a_run(STOCK, 0, 5.0), a_run(RESIDENT, 0, 10.0), a_run(REPACKED, 0, 9.0)]
    told = judged(*runs, n_rounds=1)
    assert told["resident"] == ("disturbed", 'it had more memory than "paged 25%", which was 2.00 times as fast in the same rounds')
    assert told["paged 25%"] == told["stock, read-ahead 128 KiB"] == told["resident, repacked"] == ("ok", None)
    row = decode_rows(runs, n_rounds=1)[PAGED]
    assert row["vs_resident"] is None and row["vs_stock"] == 4 and row["vs_repacked"] == pytest.approx(20 / 9)
    assert decode_rows(runs, n_rounds=1)[RESIDENT]["median_ts"] == 10, "the figure stays"
    runs[2] = a_run(RESIDENT, 0, 16.4)  # 1.22 times was measured on a quiet machine
    assert judged(*runs, n_rounds=1)["resident"] == ("ok", None)
    runs[2] = a_run(RESIDENT, 0, 3.0)
    assert "1.67" in str(judged(runs[1], runs[2], n_rounds=1)["resident"]), "nor than stock in less memory"


def test_stock_is_not_slower_in_more_memory_at_the_same_read_ahead() -> None:
    more = dataclasses.replace(STOCK, cap_bytes=4_000_000_000)
    ours = dataclasses.replace(PAGED, budget="50%", cap_bytes=4_000_000_000)
    runs = [a_run(PAGED, 0, 10.0), a_run(STOCK, 0, 5.0), a_run(ours, 0, 10.0), a_run(more, 0, 2.0)]
    made = decode_rows(runs, n_rounds=1)
    assert made[more]["status"] == "disturbed" and "2.50 times as fast" in made[more]["status_reason"]
    assert 'than "stock, read-ahead 128 KiB" in 2.10 GB' in made[more]["status_reason"]
    assert made[ours]["vs_stock"] is None and made[PAGED]["vs_stock"] == 2, "the false rival makes no ratio of 5"
    assert made[ours]["vs_stock_reason"].startswith("stock, read-ahead 128 KiB was disturbed: it had more memory")
    assert made[ours]["status"] == "ok"
    other = [*runs[:3], a_run(dataclasses.replace(more, read_ahead_kb=8192), 0, 2.0)]
    assert {row["status"] for row in decode_rows(other, n_rounds=1).values()} == {"ok"}, "another read-ahead may be slower"


def test_ours_does_not_decode_slower_with_more_slots_but_its_prompt_may_take_longer() -> None:
    half = dataclasses.replace(PAGED, budget="50%", cap_bytes=4_000_000_000)
    runs = [a_run(PAGED, 0, 10.0, 100.0), a_run(half, 0, 5.0, 50.0)]
    for run, arena_bytes in zip(runs, (1 << 30, 2 << 30), strict=True):
        run.facts["arena_bytes"] = arena_bytes
    assert [(row["budget"], bool(row["n_gen"])) for row in rows.rows_of(runs, common(n_rounds=1))
            if row["status"] == "disturbed"] == [("50%", True)]
    runs[1].facts["arena_bytes"] = runs[0].facts["arena_bytes"]
    assert {row["status"] for row in rows.rows_of(runs, common(n_rounds=1))} == {"ok"}


def test_runs_that_differ_by_more_than_a_machine_drifts_are_no_measurement() -> None:
    told = judged(*(a_run(PAGED, turn, ts) for turn, ts in enumerate((10.0, 9.0, 3.0))))
    assert told["paged 25%"] == ("disturbed", "the fastest run was 3.3 times as fast as the slowest")
    assert judged(*(a_run(PAGED, turn, ts) for turn, ts in enumerate((10.0, 9.0, 5.0))))["paged 25%"] == ("ok", None)


def test_ratio_that_changes_from_round_to_round_is_no_ratio_for_a_headline() -> None:
    runs = [a_run(PAGED, turn, 10.0) for turn in range(3)]
    runs += [a_run(STOCK, turn, ts) for turn, ts in enumerate((5.0, 5.0, 2.2))]
    row = decode_rows(runs)[PAGED]
    assert (row["status"], row["vs_stock"]) == ("disturbed", 2)
    assert row["status_reason"] == "its ratio to stock was between 2.00 and 4.55 in 3 rounds"


def test_slow_rival_that_wavers_does_not_spoil_the_ratio_to_the_best() -> None:
    """Stock that thrashes at 8 MiB wavers; were it at its fastest, and that 2.5 times, it would be the slower one still."""
    runs = [a_run(PAGED, turn, 10.0) for turn in range(3)] + [a_run(STOCK, turn, 5.0) for turn in range(3)]
    thrashing = [a_run(STOCK_AHEAD, turn, ts) for turn, ts in enumerate((0.2, 0.6, 0.3))]
    made = decode_rows(runs + thrashing)
    assert made[STOCK_AHEAD]["status"] == "disturbed" and made[PAGED]["vs_stock"] == 2
    wavering = [a_run(STOCK_AHEAD, turn, ts) for turn, ts in enumerate((1.0, 4.0, 1.0))]
    assert decode_rows(runs + wavering)[PAGED]["vs_stock"] is None, "this one may be the better"


def test_read_ahead_that_somebody_else_has_set_is_told() -> None:
    runs = [a_run(STOCK, 0, 5.0), a_run(STOCK, 1, 5.0, read_ahead_kb=8192)]
    assert judged(*runs, n_rounds=2)["stock, read-ahead 128 KiB"] == (
        "disturbed", "the device's read-ahead was not the same in all runs: somebody else sets it, too")


def test_more_bytes_than_were_wanted_are_invalid() -> None:
    run = a_run(PAGED, 0, 10.0)
    assert run.gen is not None and run.gen.bytes_read is not None
    for factor, status in ((1.4, "ok"), (1.6, "invalid")):
        run.gen = dataclasses.replace(run.gen, expert_bytes=round(run.gen.bytes_read / factor))
        row = decode_rows([run], n_rounds=1)[PAGED]
        assert row["status"] == status
    assert row["status_reason"] == "it read 1.60 times the bytes of the experts it wanted: they were counted twice"


# ---- the limit ----

def test_limit_is_resident_computing_plus_missed_bytes_at_the_best_bandwidth() -> None:
    runs = [a_run(PAGED, 0, 10.0), a_run(RESIDENT, 0, 20.0), a_run(RESIDENT, 1, 25.0)]
    row = decode_rows(runs)[PAGED]
    limit_s = 1 / 25 + 40e6 / 2e9
    assert row["limit_ts"] == pytest.approx(1 / limit_s) and row["limit_compute"] == "resident"
    assert row["efficiency"] == pytest.approx(limit_s / 0.1)


def test_limit_without_resident_takes_the_time_that_was_not_stalled() -> None:
    row = decode_rows([a_run(PAGED, 0, 10.0)])[PAGED]
    assert row["limit_ts"] == pytest.approx(1 / (0.075 + 0.02)) and row["limit_compute"] == "own"


def test_limit_is_unknown_without_bandwidth_but_not_where_nothing_is_read() -> None:
    assert decode_rows([a_run(PAGED, 0, 10.0)], device_bytes_per_s=None)[PAGED]["limit_ts"] is None
    runs = [a_run(STOCK, 0, 10.0), a_run(RESIDENT, 0, 20.0)]
    assert decode_rows(runs, device_bytes_per_s=None)[STOCK]["limit_ts"] == pytest.approx(20)
    assert decode_rows([a_run(REPACKED, 0, 30.0), a_run(STOCK, 0, 10.0)])[STOCK]["limit_ts"] is None, "other kernels"


def test_bandwidth_while_waiting_is_compared_with_the_devices() -> None:
    runs = [a_run(PAGED, turn, 10.0) for turn in range(3)]
    row = decode_rows(runs)[PAGED]
    assert row["stall_bytes_per_s"] == pytest.approx(1.8e9) and row["stall_vs_device"] == pytest.approx(0.9)
    assert row["status"] == "ok"
    unknown = decode_rows(runs, device_bytes_per_s=None)[PAGED]
    assert unknown["stall_bytes_per_s"] == pytest.approx(1.8e9) and unknown["stall_vs_device"] is None
    for run in runs:
        assert run.gen is not None
        run.gen = dataclasses.replace(run.gen, stall_ns=rows.LEAST_STALL_NS - 1, stall_bytes=10**9)
    assert decode_rows(runs)[PAGED]["stall_bytes_per_s"] is None, "it hardly waited"


def test_row_that_counts_more_reads_than_the_system_is_invalid() -> None:
    def told(share: float, io: str = "direct") -> dict[str, Any]:
        runs = [a_run(PAGED, turn, 10.0) for turn in range(3)]
        for run in runs:
            assert run.gen is not None
            run.gen = dataclasses.replace(run.gen, io_bytes=int(run.gen.bytes_read * share))
            run.facts["io"] = io
        return decode_rows(runs)[PAGED]

    twice = told(0.5)
    assert twice["status"] == "invalid" and "the system counted 7,680,000,000: please report this" in twice["status_reason"]
    assert told(0.99)["status"] == told(1.5)["status"] == "ok"
    assert told(0.5, "buffered")["status"] == "ok", "the page cache is not counted"


def test_waits_shorter_than_their_reads_are_no_fault() -> None:
    runs = [a_run(PAGED, turn, 10.0) for turn in range(3)]
    row = decode_rows(runs, device_bytes_per_s=1e9)[PAGED]
    assert row["stall_vs_device"] == pytest.approx(1.8) and row["status"] == "ok"


# ---- what a row is worth ----

def test_timeout_is_told_with_what_was_reached() -> None:
    runs = [a_run(STOCK, 0, None, status="timeout", reason="not done within 9 s: 17 of 128 tokens were decoded"),
            a_run(STOCK, 1, None, status="timeout", reason="not done within 9 s: 17 of 128 tokens were decoded")]
    prompt, gen = rows.rows_of(runs, common(n_rounds=2))
    assert gen["status"] == "timeout" and "17 of 128" in gen["status_reason"]
    assert gen["median_ts"] is None and gen["samples_ts"] == [] and gen["energy_total_j"] is None
    assert prompt["status"] == "ok" and len(prompt["samples_ts"]) == 2, "what it could do was measured"


def test_failure_of_one_run_is_told_beside_the_others() -> None:
    runs = [a_run(PAGED, 0, 10.0), a_run(PAGED, 1, None, None, status="failed", reason="signal 9"), a_run(PAGED, 2, 11.0)]
    row = decode_rows(runs)[PAGED]
    assert row["status"] == "failed" and row["status_reason"] == "signal 9; 2 of 3 runs came to their end"
    assert len(row["samples_ts"]) == 2


def test_fewer_rounds_than_asked_for_are_an_interrupt() -> None:
    row = decode_rows([a_run(PAGED, 0, 10.0)])[PAGED]
    assert (row["status"], row["status_reason"]) == ("interrupted", "1 of 3 rounds")


def test_other_logits_make_a_row_invalid_where_they_should_be_the_same() -> None:
    def paged_row(**changed: Any) -> dict[str, Any]:
        stock = a_run(STOCK, 0, 5.0)
        stock.facts |= changed
        return decode_rows([a_run(PAGED, 0, 10.0), stock], n_rounds=1)[PAGED]

    assert paged_row()["same_logits"] is True and paged_row()["status"] == "ok"
    assert paged_row()["same_logits_rounds"] == 1
    assert paged_row(digest="another")["status"] == "invalid" and paged_row(digest="another")["same_logits"] is False
    assert paged_row(digest="another", n_ubatch=64)["same_logits"] is None, "batches differ, so bits may"
    assert paged_row(digest="another", n_ubatch=2048)["same_logits"] is False, "512 tokens are one batch for both"
    repacked = a_run(REPACKED, 0, 5.0)
    repacked.facts["digest"] = "another"
    assert decode_rows([a_run(PAGED, 0, 10.0), repacked], n_rounds=1)[PAGED]["same_logits"] is None


def test_model_that_was_not_paged_is_no_row_of_ours() -> None:
    run = a_run(PAGED, 0, 10.0)
    run.facts["not_paged_reason"] = "it fits"
    assert decode_rows([run], n_rounds=1)[PAGED]["status_reason"] == "it was not paged: it fits"


def test_cold_is_verified() -> None:
    row = decode_rows([a_run(PAGED, 0, 10.0, cached_bytes=rows.COLD_BYTES + 1)], n_rounds=1)[PAGED]
    assert row["status"] == "invalid" and "page cache" in row["status_reason"]
    warm = decode_rows([a_run(PAGED, 0, 10.0, cached_bytes=10**9)], n_rounds=1, is_warm=True)[PAGED]
    assert (warm["status"], warm["cache"], warm["cached_bytes"]) == ("ok", "warm", 10**9)
    unknown = decode_rows([a_run(PAGED, 0, 10.0, cached_bytes=None)], n_rounds=1)[PAGED]
    assert unknown["cache"] == "cold, not verified" and unknown["cached_bytes"] is None
    kept = a_run(PAGED, 0, 10.0, cached_bytes=10**9, is_cache_controlled=False)
    assert decode_rows([kept], n_rounds=1)[PAGED]["cache"] == "not controlled", "where nothing can be dropped"
    assert decode_rows([kept], n_rounds=1)[PAGED]["status"] == "ok"


def test_run_that_was_never_made_says_nothing_about_the_cache() -> None:
    late = a_run(STOCK, 1, None, None, status="timeout", reason="why", is_made=False, cached_bytes=None, cap="none",
                 cap_bytes=None)
    row = decode_rows([a_run(STOCK, 0, None, status="timeout", reason="why"), late], n_rounds=2)[STOCK]
    assert (row["cache"], row["cap"], row["cap_bytes"]) == ("cold", "cgroup1", STOCK.cap_bytes)


def test_cap_that_was_refused_once_is_none() -> None:
    refused = a_run(PAGED, 1, 10.0, cap="none", cap_bytes=None, cap_reason="gone")
    row = decode_rows([a_run(PAGED, 0, 10.0), refused], n_rounds=2)[PAGED]
    assert (row["cap"], row["cap_bytes"], row["cap_reason"]) == ("none", None, "gone")


def test_run_that_died_after_its_last_phase_is_no_success() -> None:
    runs = [a_run(PAGED, 0, 10.0), a_run(PAGED, 1, 10.0, status="failed", reason="signal 11")]
    prompt, gen = rows.rows_of(runs, common(n_rounds=2))
    assert (gen["status"], gen["status_reason"]) == ("failed", "signal 11; 1 of 2 runs came to their end")
    assert prompt["status"] == "ok", "which was over by then"


def test_hits_of_a_prompt_are_bytes_that_need_not_be_read() -> None:
    """What was read ahead is found in its slot, but it was read."""
    run = a_run(PAGED, 0, 10.0)
    assert run.prompt is not None
    run.prompt = dataclasses.replace(run.prompt, hits=128, misses=0, bytes_read=750, expert_bytes=1000)
    assert rows.rows_of([run], common())[0]["hit_rate"] == 0.25


def test_buffered_reads_count_as_the_kernel_counts_them() -> None:
    run = a_run(PAGED, 0, 10.0)
    assert run.gen is not None
    run.gen = dataclasses.replace(run.gen, io_bytes=0)
    run.facts["io"] = "buffered"
    row = decode_rows([run], n_rounds=1)[PAGED]
    assert row["limit_ts"] == pytest.approx(1 / 0.075), "the page cache had all of it"


def test_tokens_that_repeat_are_told() -> None:
    run = a_run(PAGED, 0, 10.0)
    assert decode_rows([run])[PAGED]["tokens_repeat"] is False
    run.facts["n_source_tokens"] = SHAPE.n_tokens - 1
    row = decode_rows([run])[PAGED]
    assert row["tokens_repeat"] is True and "tokens: trace has fewer than needed" in PRINTERS["md"]().rows([row])


def test_cap_that_was_refused_is_none_with_the_reason() -> None:
    run = a_run(PAGED, 0, 10.0, cap="none", cap_bytes=None, cap_reason="no controller")
    row = decode_rows([run], n_rounds=1)[PAGED]
    assert (row["cap"], row["cap_bytes"], row["cap_reason"]) == ("none", None, "no controller")
    assert "cap: none, no controller" in PRINTERS["md"]().rows([row])


# ---- energy ----

def test_energy_is_joules_of_all_runs_over_their_tokens() -> None:
    runs = [a_run(PAGED, turn, 10.0) for turn in range(2)]
    for run, joules in zip(runs, (64.0, 192.0), strict=True):
        assert run.gen is not None
        run.gen = dataclasses.replace(run.gen, reading=Reading(joules, 12.8, "rapl", "CPU", "part", None))
    row = decode_rows(runs, n_rounds=2, idle_w=2.5)[PAGED]
    assert row["energy_status"] == "partial" and row["energy_method"] == "rapl"
    assert row["energy_total_j"] == 256 and row["j_per_token"] == 1 and row["tokens_per_j"] == 1
    assert row["energy_net_j"] == pytest.approx(256 - 2.5 * 25.6) and row["avg_power_w"] == 10
    assert row["j_per_prompt_token"] is None


def test_energy_of_different_sources_is_not_added() -> None:
    runs = [a_run(PAGED, turn, 10.0) for turn in range(2)]
    for run, method in zip(runs, ("rapl", "command"), strict=True):
        assert run.gen is not None
        run.gen = dataclasses.replace(run.gen, reading=Reading(64.0, 12.8, method, "CPU", "part", None))
    row = decode_rows(runs, n_rounds=2)[PAGED]
    assert row["energy_status"] == "modelled" and "different sources" in row["energy_reason"]


def test_model_says_that_it_does_not_know_reads_of_storage() -> None:
    stock = a_run(STOCK, 0, 10.0)
    assert stock.gen is not None
    stock.gen = dataclasses.replace(stock.gen, io_bytes=None)
    assert "reads of storage are not known" in decode_rows([stock])[STOCK]["energy_reason"]


def test_energy_that_one_run_lacks_is_modelled_for_all() -> None:
    runs = [a_run(PAGED, turn, 10.0) for turn in range(2)]
    assert runs[0].gen is not None
    runs[0].gen = dataclasses.replace(runs[0].gen, reading=Reading(64.0, 12.8, "rapl", "CPU", "part", None))
    row = decode_rows(runs, n_rounds=2)[PAGED]
    assert row["energy_status"] == "modelled" and "no counter here" in row["energy_reason"]
    assert row["energy_low_j"] < row["energy_total_j"] < row["energy_high_j"]
    cpu_j, disk_j = CONSTANTS["cpu_w_per_core"].value * 25.6, CONSTANTS["nvme_read_j_per_gb"].value * 2 * 128 * 0.04
    assert row["energy_total_j"] == pytest.approx(cpu_j + disk_j + CONSTANTS["dram_background_w_per_gb"].value * 25.6)


def test_model_counts_reads_of_ram_for_stock_as_for_ours() -> None:
    ours, stock = a_run(PAGED, 0, None), a_run(STOCK, 0, None)
    assert ours.prompt is not None
    ours.prompt = dataclasses.replace(ours.prompt, ram_read_bytes=10**12)
    both = rows.rows_of([ours, stock], common())
    assert [row["energy_total_j"] > 70 for row in both if row["n_prompt"]] == [True, True]
    alone = rows.rows_of([stock], common())[0]
    assert "reads of RAM are not known" in alone["energy_reason"]


# ---- several sequences ----------------------------------------------------------------------------------------------

OF_SEQUENCES = ["n_parallel", "sequence_ts", "expert_union", "over_1", "over_1_low", "over_1_high"]


def of_four(case: Case, cap_bytes: int | None = None) -> Case:
    return dataclasses.replace(case, shape=dataclasses.replace(case.shape, n_parallel=4), cap_bytes=cap_bytes or case.cap_bytes)


def runs_of_one_and_four() -> list[Run]:
    """Return three rounds of ours and stock: of one sequence, and of four under a cap that is larger by their caches. The machine
    halves its speed in round 1. Four want 2.5 times the experts of one."""
    runs = []
    for turn, speed in enumerate((10.0, 5.0, 10.0)):
        ours = a_run(PAGED, turn, speed)
        four = a_run(of_four(PAGED, 2_200_000_000), turn, speed * (1.5, 2.0, 3.0)[turn])
        four.gen = dataclasses.replace(four.gen, n_tokens=4 * 128, ns=4 * four.gen.ns, hits=24 * 128, misses=16 * 128) if four.gen else None
        for run in (ours, four):
            run.facts["experts_per_token"] = 16
        runs += [ours, a_run(STOCK, turn, speed / 2), four, a_run(of_four(STOCK, 2_200_000_000), turn, speed)]
    return runs


def test_several_sequences_are_compared_with_one_within_rounds() -> None:
    row = decode_rows(runs_of_one_and_four())[of_four(PAGED, 2_200_000_000)]
    assert (row["n_parallel"], row["n_gen"]) == (4, 128)
    assert row["samples_ts"] == pytest.approx([15, 10, 30]), "of all together"
    assert row["sequence_ts"] == pytest.approx(15 / 4) and row["expert_union"] == pytest.approx(2.5)
    assert (row["over_1"], row["over_1_low"], row["over_1_high"]) == pytest.approx((2, 1.5, 3))
    assert row["vs_stock"] == pytest.approx(2), "of four sequences, too"
    assert row["read_bytes_per_token"] == 10_000_000, "of all tokens"


def test_stock_is_compared_with_its_one_sequence_under_the_cap_of_the_same_budget() -> None:
    more = dataclasses.replace(PAGED, budget="50%", cap_bytes=3_000_000_000)
    decoy = [run for turn in range(3) for run in (a_run(more, turn, 12.0), a_run(dataclasses.replace(STOCK, cap_bytes=3_000_000_000), turn, 11.0))]
    made = decode_rows([*decoy, *runs_of_one_and_four()])
    assert made[of_four(STOCK, 2_200_000_000)]["over_1"] == pytest.approx(2)
    assert made[of_four(STOCK, 2_200_000_000)]["expert_union"] is None, "nobody counts them"
    assert made[STOCK]["over_1"] is None


def test_there_is_no_ratio_to_one_sequence_that_was_not_measured_or_was_disturbed() -> None:
    four = of_four(PAGED, 2_200_000_000)
    runs = runs_of_one_and_four()
    assert decode_rows([run for run in runs if run.case.shape.n_parallel == 4])[four]["over_1"] is None
    slow = next(run for run in runs if run.case == PAGED)
    assert slow.gen is not None
    slow.gen = dataclasses.replace(slow.gen, ns=slow.gen.ns * 9)
    assert decode_rows(runs)[four]["over_1"] is None


def test_prompt_of_several_has_a_speed_and_no_union() -> None:
    four = [row for row in rows.rows_of(runs_of_one_and_four(), common()) if row["n_prompt"] and row["n_parallel"] == 4]
    assert all(row["expert_union"] is None and row["over_1"] == pytest.approx(1) for row in four) and len(four) == 2


def test_row_of_one_sequence_is_as_before_with_the_new_names_at_its_end(some_rows: list[dict[str, Any]]) -> None:
    for row in some_rows:
        assert list(row)[-8:] == ["status", "status_reason", *OF_SEQUENCES]
        assert row["n_parallel"] == 1 and row["sequence_ts"] == row["median_ts"] and row["over_1"] is None
    head = table(some_rows).splitlines()[0]
    assert not any(word in head for word in ("parallel", "each", "over 1", "union")) and "sequences" not in printed("md", some_rows)


def test_table_shows_sequences_where_there_are_several() -> None:
    made = rows.rows_of(runs_of_one_and_four(), common())
    head, _, *lines = table(made).splitlines()
    assert [cell.strip() for cell in head.split("|")][3:9] == ["test", "parallel", "t/s", "t/s each", "over 1", "union"]
    ours = next(line for line in lines if "paged" in line and "tg128" in line and "15.00" in line)
    assert [cell.strip() for cell in ours.split("|")][4:9] == ["4", "15.00 (10.00 to 30.00)", "3.75", "2.00", "2.50"]
    only = table([row for row in made if row["n_parallel"] == 4]).splitlines()[0]
    assert "parallel" in only, "also where all rows have as many"
    assert "tg128 @ d512, 4 sequences: vs stock is to" in printed("md", made)
    assert "- paged 25%, 4 sequences: the logits of stock llama.cpp, to the bit" in printed("md", made)
    assert sum("paged 25%, 4 sequences" in line for line in bars(made).splitlines()) == 2


def test_columns_of_sequences_have_types_that_their_numbers_need(some_rows: list[dict[str, Any]]) -> None:
    database = sqlite3.connect(":memory:")
    database.executescript(printed("sql", some_rows))
    types = {name: kind for _, name, kind, *_ in database.execute(f"PRAGMA table_info({SQL_TABLE})")}
    assert [types[name] for name in OF_SEQUENCES] == ["INTEGER", *["REAL"] * 5]


def test_progress_of_several_is_told_in_tokens_of_each() -> None:
    run = Run(of_four(PAGED), 0)
    take_event(run, b'{"event": "loaded", "load_s": 1}')
    take_event(run, b'{"event": "decoding", "n_done": 5}')
    run.prompt = phase(2048, 1.0)
    assert reached(run) == "5 of 128 tokens of each sequence were decoded"
    done = json.dumps({"event": "decoded", "phase": phase(512, 1.0).to_json(), "token_ns": [1] * 128, "token_stall_ns": []})
    take_event(run, done.encode())
    assert run.n_done == 128


# ---- details --------------------------------------------------------------------------------------------------------

def test_timeline_and_heat_are_those_of_the_median_run() -> None:
    runs = [a_run(PAGED, turn, 10.0, token_ns=[n, n], token_stall_ns=[1, 1], layers=[{"block": turn}])
            for turn, n in enumerate((30, 10, 20))]
    runs += [a_run(STOCK, 0, 10.0, token_ns=[40], token_stall_ns=[]), a_run(RESIDENT, 0, None)]
    assert details.timelines(runs) == [
        {"label": "paged 25%, cap 2.10 GB", "mode": "paged", "n_parallel": 1, "is_disturbed": False, "token_ns": [20, 20], "token_stall_ns": [1, 1]},
        {"label": "stock, read-ahead 128 KiB, cap 2.10 GB", "mode": "stock", "n_parallel": 1, "is_disturbed": False, "token_ns": [40],
         "token_stall_ns": None}]
    assert details.heat(runs) == [{"label": "paged 25%", "layers": [{"block": 2}]}]


# ---- formats --------------------------------------------------------------------------------------------------------

@pytest.fixture
def some_rows() -> list[dict[str, Any]]:
    runs = [a_run(PAGED, 0, 10.0), a_run(STOCK, 0, 4.0),
            a_run(STOCK_AHEAD, 0, None, status="timeout", reason="too slow, isn't it")]
    return rows.rows_of(runs, common(n_rounds=1))


def printed(name: str, made: Sequence[dict[str, Any]]) -> str:
    """Print rows in two parts, as they become known."""
    printer = PRINTERS[name]()
    return printer.head() + printer.rows(made[:3]) + printer.rows([]) + printer.rows(made[3:]) + printer.foot()


def test_json_is_an_array_and_lines_are_its_elements(some_rows: list[dict[str, Any]]) -> None:
    assert json.loads(printed("json", some_rows)) == some_rows
    assert [json.loads(line) for line in printed("jsonl", some_rows).splitlines()] == some_rows
    assert json.loads(printed("json", [])) == [] and printed("jsonl", []) == ""


def test_csv_has_one_head_and_leaves_unknown_empty(some_rows: list[dict[str, Any]]) -> None:
    lines = list(csv.DictReader(io.StringIO(printed("csv", some_rows))))
    assert len(lines) == len(some_rows)
    assert [line["mode"] for line in lines] == [row["mode"] for row in some_rows]
    assert lines[-1]["median_ts"] == "" and lines[-1]["status_reason"] == "too slow, isn't it"
    assert float(lines[1]["avg_ts"]) == pytest.approx(10)


def test_sql_fills_a_table(some_rows: list[dict[str, Any]]) -> None:
    database = sqlite3.connect(":memory:")
    database.executescript(printed("sql", some_rows))
    found = database.execute(f"SELECT mode, avg_ts, status_reason, same_logits FROM {SQL_TABLE} WHERE n_gen > 0").fetchall()
    assert found[0] == ("paged", pytest.approx(10), None, 1)
    assert found[2] == ("stock", None, "too slow, isn't it", None)


def test_table_shows_numbers_dashes_and_notes(some_rows: list[dict[str, Any]]) -> None:
    text = printed("md", some_rows)
    lines = table(some_rows).splitlines()
    assert len({len(line) for line in lines}) == 1, "columns line up"
    assert "threads" not in lines[0], "what is the same everywhere is left out"
    ours = next(line for line in lines if "paged" in line and "tg128 @ d512" in line)
    for part in ("10.00", "2.50", "75.0%", "40.00", "25%", "2.10 GB"):
        assert part in ours
    assert "- stock, RA 8,192 KiB, cap 2.10 GB, tg128 @ d512: timeout: too slow, isn't it" in text
    assert "- paged 25%: the logits of stock llama.cpp, to the bit, at the end of 1 of 1 rounds" in text
    assert "energy is modelled: not measured: no counter here" in text
    assert "~" in ours, "modelled joules are marked"
    assert ("- paged 25%, tg128 @ d512: vs stock is to stock llama.cpp at a read-ahead of 128 KiB, the better of 128 KiB and 8 MiB"
            in text)


def test_table_says_why_there_is_no_ratio_and_what_a_cap_lacks() -> None:
    free = {"cap": "none", "cap_bytes": None, "cap_reason": "nobody may"}
    made = rows.rows_of([a_run(PAGED, 0, 10.0, **free), a_run(STOCK, 0, 4.0, **free)], common(n_rounds=1))
    text = printed("md", made)
    assert "- paged 25%, tg128 @ d512: not compared with stock: no ratio without a cap: nobody may" in text
    assert "2.50" not in text
    alone = printed("md", rows.rows_of([a_run(PAGED, 0, 10.0, **free)], common(n_rounds=1)))
    assert "compared" not in alone, "nobody has asked for it"
    less = {"cap_bytes": 900, "cap_reason": "2,000 bytes were asked for"}
    text = printed("md", rows.rows_of([a_run(PAGED, 0, 10.0, **less), a_run(STOCK, 0, 4.0, **less)], common(n_rounds=1)))
    assert "- cap: 0.00 GB, 2,000 bytes were asked for" in text and "2.50" in text


def test_disturbed_row_is_marked_in_table_and_bars() -> None:
    made = rows.rows_of([a_run(PAGED, 0, 20.0), a_run(RESIDENT, 0, 10.0)], common(n_rounds=1))
    text = printed("md", made)
    assert "- resident, tg128 @ d512: disturbed: it had more memory than" in text and "10.00 disturbed" in text


def test_bars_are_as_long_as_speeds(some_rows: list[dict[str, Any]]) -> None:
    lines = bars(some_rows).splitlines()
    at = lines.index("decode, tok/s")
    ours, stock, late = lines[at + 1 : at + 4]
    assert ours.count("█") == 30 and stock.count("█") == 12 and late.count("█") == 0
    assert "timeout" in late and "4.00" in stock


def test_outcome_of_a_run_is_a_short_line() -> None:
    assert outcome(a_run(PAGED, 0, 10.0)) == "prefill 100.0 tok/s, decode 10.00 tok/s"
    assert outcome(a_run(PAGED, 0, None, None, status="failed", reason="why")) == "failed: why"
