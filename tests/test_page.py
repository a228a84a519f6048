"""The page of a benchmark: whole, harmless, and never silent about what is not known."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator
from html import unescape
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

import pytest

from gguf_pager.report import svg
from gguf_pager.report.labels import DASH
from gguf_pager.report.page import page

GIB = 2**30
HOSTILE = "<b>&\"'</title><script>alert(1)</script>\x00\udcff"


def row(mode: str, **known: Any) -> dict[str, Any]:
    """Return a row where only what is named is known."""
    names = ("status_reason", "budget", "cap_bytes", "cap_reason", "read_ahead_kb", "median_ts", "min_ts", "max_ts",
             "load_s", "usable_s", "first_token_s", "hit_rate", "stall_share", "read_bytes_per_token",
             "io_bytes_per_token", "major_faults", "peak_rss_bytes", "arena_bytes", "cpu_s_per_token", "limit_ts",
             "efficiency", "vs_stock", "vs_stock_low", "vs_stock_high", "vs_stock_read_ahead_kb", "vs_stock_tried_kb",
             "vs_stock_reason", "same_logits", "energy_method", "energy_reason",
             "j_per_token", "j_per_prompt_token", "energy_low_j", "energy_high_j", "energy_total_j")
    fixed = {"mode": mode, "repack": False, "status": "ok", "cap": "cgroup1", "n_prompt": 0, "n_gen": 0, "n_depth": 0,
             "n_threads": 2, "n_batch": 512, "n_ubatch": 512, "samples_ts": [], "energy_status": "none"}
    return dict.fromkeys(names) | fixed | known


def measured(mode: str, speeds: list[float], **known: Any) -> dict[str, Any]:
    """Return a row with samples, of which there are its median and range, and a modelled energy."""
    ordered = sorted(speeds)
    middle = ordered[len(ordered) // 2]
    joules = 9.0 / middle
    name = "j_per_token" if known.get("n_gen") else "j_per_prompt_token"
    energy = {"energy_status": "modelled", "energy_method": "CPU seconds, bytes read, resident bytes", name: joules,
              "energy_total_j": 128 * joules, "energy_low_j": 77 * joules, "energy_high_j": 201 * joules}
    return row(mode, **({"samples_ts": speeds, "median_ts": middle, "min_ts": ordered[0], "max_ts": ordered[-1],
                         "load_s": 4.9, "usable_s": 5.3, "first_token_s": 0.21, "cpu_s_per_token": 1.6 / middle,
                         "major_faults": 0.0} | energy | known))


def spread(speed: float) -> list[float]:
    return [speed * part for part in (0.97, 1.0, 1.04)]


def bench_rows() -> list[dict[str, Any]]:
    """Return what a bench of three budgets gives: stock at two read-aheads, one of which never finished."""
    rows = []
    cases = (("12.5%", 1.35, 9.1, 98.0, 0.61, 112.0), ("25%", 2.02, 15.6, 181.0, 0.848, 52.0),
             ("50%", 3.31, 22.3, 204.0, 0.943, 19.0))
    for phase, whole, packed in ((0, 41.2, 47.9), (1, 254.0, 391.0)):
        tokens = {"n_prompt": 512} if phase else {"n_gen": 128}
        for budget, gib, decode, prefill, hits, mb in cases:
            speed, cap = (decode, prefill)[phase], int(gib * 1.03 * GIB)
            stock = {"12.5%": (2.1, 61.0), "25%": (4.1, 106.0), "50%": (13.9, 151.0)}[budget][phase]
            rows.append(measured(
                "paged", spread(speed), budget=budget, cap_bytes=cap, hit_rate=hits, stall_share=1 - hits ** 0.5 * 0.7,
                read_bytes_per_token=mb * 1e6, io_bytes_per_token=mb * 1.01e6, peak_rss_bytes=int(gib * GIB),
                arena_bytes=int((gib - 0.4) * GIB), limit_ts=speed * 1.22, efficiency=1 / 1.22, vs_stock=speed / stock,
                vs_stock_low=speed / stock * 0.93, vs_stock_high=speed / stock * 1.08, same_logits=True,
                vs_stock_read_ahead_kb=128, vs_stock_tried_kb=[128, 8192], read_ahead_kb=128, **tokens))
            rows.append(measured("stock", spread(stock), cap_bytes=cap, peak_rss_bytes=cap, read_ahead_kb=128,
                                 io_bytes_per_token=mb * 1.3e6, major_faults=9210.0, **tokens))
            if budget == "12.5%":
                rows.append(row("stock", status="timeout", status_reason="no end of the run within 600 s",
                                cap_bytes=cap, read_ahead_kb=8192, **tokens))
            else:
                rows.append(measured("stock", spread(stock * (1.4 if phase else 0.12)), cap_bytes=cap,
                                     read_ahead_kb=8192, peak_rss_bytes=cap,
                                     io_bytes_per_token=mb * (1.4e6 if phase else 14e6), **tokens))
        rows += [measured("resident", spread(speed), repack=speed == packed, cap="none", peak_rss_bytes=int(5.6 * GIB),
                          cap_reason="the whole model is to fit", io_bytes_per_token=0.0, read_ahead_kb=128, **tokens)
                 for speed in (whole, packed)]
    return rows


def heat(label: str, n_layers: int, n_experts: int, n_tokens: int, share: float, seed: int = 1) -> dict[str, Any]:
    """Return skewed use of experts, and the most used of each layer in memory."""
    rng = random.Random(seed)
    layers = []
    for block in range(n_layers):
        weights = [rng.random() ** 6 + 0.004 for _ in range(n_experts)]
        chosen = [0] * n_experts
        for expert in rng.choices(range(n_experts), weights, k=n_tokens * 8):
            chosen[expert] += 1
        first = sorted(range(n_experts), key=lambda e: -chosen[e] - rng.random() * 9)[:int(n_experts * share)]
        layers.append({"block": block, "chosen": chosen,
                       "resident": [2 if e in first[:3] else int(e in first) for e in range(n_experts)]})
    return {"label": label, "layers": layers}


def timeline(label: str, mode: str, base_ms: float, stall_ms: float | None, n: int = 128) -> dict[str, Any]:
    """Return the times of n tokens, the first of a paged run far slower than all others."""
    rng = random.Random(label)
    stall = [int(1e6 * rng.expovariate(1 / stall_ms)) for _ in range(n)] if stall_ms else None
    if stall:
        stall[0] = int(20e6 * base_ms)
    swing = (0.5, 1.6) if mode == "stock" else (0.95, 1.2)
    own = [int(1e6 * base_ms * rng.uniform(*swing)) for _ in range(n)]
    return {"label": label, "mode": mode, "token_stall_ns": stall,
            "token_ns": [a + b for a, b in zip(own, stall or [0] * n, strict=True)]}


def bench_facts() -> dict[str, Any]:
    """Return facts as a bench hands them to the page."""
    use = [heat("25 % of the experts", 48, 128, 128, 0.25)]
    use.append({"label": "50 % of the experts", "layers": [
        layer | {"resident": [int(n > 4) for n in layer["chosen"]]} for layer in use[0]["layers"]]})
    return {
        "title": "Qwen3-30B-A3B in a quarter of its memory", "date": "2026-11-24T06:00:00Z",
        "command": "gguf-pager bench models/qwen3-30b-a3b-q4_k.gguf --budget 12.5% --budget 25% --budget 50% "
                   "--stock --resident --read-ahead 128 --read-ahead 8192 -p 512 -n 128 -r 3 --report out.html",
        "gguf_pager_version": "0.1.0", "llama_cpp_python_version": "0.3.36",
        "machine": {"cpu_info": "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "n_cores": 2, "ram_bytes": 24 * GIB,
                    "system": "Linux 6.1.0-23-cloud-amd64", "device": "nvme0n1", "read_ahead_kb": 8192,
                    "device_bytes_per_s": 3.6e9},
        "model": {"name": "Qwen3-30B-A3B", "architecture": "qwen3moe", "file_bytes": 18556686912,
                  "expert_bytes": 17448304640, "dense_bytes": 900e6, "n_expert_layers": 48, "n_experts": 128,
                  "n_used": 8, "bytes_per_token": 1090519040},
        "rows": bench_rows(), "heat": use,
        "timelines": [timeline("gguf_pager, 25 % of the experts", "paged", 24, 22),
                      timeline("stock in 2.08 GiB, read-ahead 128 KiB", "stock", 130, None),
                      timeline("whole model in RAM", "resident", 24, None)],
    }


def drawings(html: str) -> list[ElementTree.Element]:
    """Return the outermost drawings of a page, parsed as XML."""
    found, depth, begin = [], 0, 0
    for tag in re.finditer(r"<svg\b|</svg>", html):
        if tag.group() == "<svg":
            begin, depth = (begin if depth else tag.start()), depth + 1
        else:
            depth -= 1
            if not depth:
                found.append(ElementTree.fromstring(html[begin:tag.end()]))
    assert depth == 0
    return found


def words(html: str) -> str:
    """Return what a reader sees."""
    body = re.sub(r"<title>.*?</title>", "", html.split("<main>")[-1], flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", body)).split())


def section(html: str, title: str) -> str:
    return html[html.index(f"<h2>{title}</h2>"):].split("</section>")[0]


def numbers(element: ElementTree.Element) -> Iterator[float]:
    """Yield every coordinate and size of a drawing."""
    for part in element.iter():
        for name in ("x", "y", "x1", "x2", "y1", "y2", "width", "height"):
            if name in part.attrib:
                yield float(part.attrib[name].removesuffix("%"))


@pytest.fixture(scope="module")
def html() -> str:
    return page(bench_facts())


def test_drawings_are_xml_with_finite_places(html: str) -> None:
    found = drawings(html)
    assert len(found) > 20
    assert all(math.isfinite(number) for drawing in found for number in numbers(drawing))
    for drawing in found:
        for bar in drawing.iter("rect"):
            assert float(bar.attrib["width"].removesuffix("%")) >= 0
            assert float(bar.attrib.get("height", "0").removesuffix("%")) >= 0


def test_page_loads_nothing_and_runs_nothing(html: str) -> None:
    assert not re.search(r"https?:|<script|<link|<img|<iframe|<image|@import|url\(|\bsrc=|\bhref=|\bon\w+=", html)
    assert "default-src 'none'" in html


def test_hostile_names_stay_text() -> None:
    facts = bench_facts()
    facts |= {"title": HOSTILE, "command": HOSTILE, "date": HOSTILE}
    facts["model"] |= {"name": HOSTILE, "architecture": HOSTILE}
    facts["machine"] |= {"cpu_info": HOSTILE, "device": HOSTILE, "system": HOSTILE}
    for one in (*facts["timelines"], *facts["heat"]):
        one["label"] = HOSTILE
    for one in facts["rows"]:
        one |= {"budget": HOSTILE, "cap_reason": HOSTILE, "energy_reason": HOSTILE, "energy_method": HOSTILE,
                "cap": HOSTILE}
        one["status_reason"] = HOSTILE
    html = page(facts)
    assert "<script" not in html and "<b>&\"" not in html
    assert html.count("</title>") == html.count("<title>")
    html.encode()
    drawings(html)


@pytest.mark.parametrize("mode", ["paged", "stock", "resident", None])
@pytest.mark.parametrize("status", ["ok", "timeout", "failed", "interrupted", "invalid", None])
def test_row_that_knows_nothing_shows_dashes_and_its_reason(mode: str | None, status: str | None) -> None:
    nothing = dict.fromkeys(row("paged"))
    facts = dict.fromkeys(bench_facts()) | {"machine": {}, "model": {}, "timelines": [], "heat": []}
    facts["rows"] = [nothing | {"mode": mode, "status": status, "status_reason": "the drive was pulled"}]
    html = page(facts)
    table = words(section(html, "All rows"))
    assert "the drive was pulled" in table and (status or "status not recorded") in table
    assert table.count(DASH) >= 17
    assert not re.search(r"(?<![\d.])0(?![\d.])|None|nan", words(html).replace("in 0 of", ""))
    drawings(html)


@pytest.mark.parametrize("name", sorted(row("paged").keys() - {"mode", "samples_ts"}))
def test_any_one_value_may_be_unknown(name: str) -> None:
    facts = bench_facts()
    facts["rows"] = [one | {name: None} for one in facts["rows"]]
    facts["timelines"], facts["heat"] = [], []
    html = page(facts)
    assert "None" not in words(html)
    drawings(html)


def test_infinity_is_not_known() -> None:
    facts = bench_facts()
    facts["rows"][0] |= {"vs_stock": math.inf, "limit_ts": math.nan, "max_ts": math.inf}
    html = page(facts)
    assert not re.search(r"\b(inf|nan)\b", html)
    assert "not compared with stock" in words(html)


def test_nothing_measured_is_said() -> None:
    facts = bench_facts() | {"rows": [], "timelines": [], "heat": []}
    said = words(page(facts))
    assert "Nothing was measured." in said
    assert "no run recorded the time of each token" in said and "no run recorded which experts" in said


def test_headline_says_what_the_rows_say(html: str) -> None:
    lead = words(re.findall(r'<p class="lead">.*?</p>', html)[0]).replace("\N{NO-BREAK SPACE}", " ")
    assert ("Decode with 12.5 % of the experts in memory: 9.1 tok/s , 4.3 times stock llama.cpp at a read-ahead of 128 KiB, the "
            "better of 128 KiB and 8 MiB, in the same memory") in lead
    assert "with 25 % of the experts: 15.6 tok/s , 3.8 times" in lead
    assert lead.endswith("whole model in RAM, repacked: 47.9 tok/s.")


@pytest.mark.parametrize(("best", "tried", "said"), [
    (8192, [8192], "4.3 times stock llama.cpp at the device's read-ahead of 8 MiB, the only one measured, in the same memory"),
    (None, [None], "4.3 times stock llama.cpp at the device's read-ahead, which is not known, in the same memory"),
    (256, [128, 256, 8192], "at a read-ahead of 256 KiB, the best of 128 KiB, 256 KiB and 8 MiB, in the same memory"),
])
def test_words_about_stock_follow_what_was_measured(best: int | None, tried: list[int | None], said: str) -> None:
    facts = bench_facts()
    for one in facts["rows"]:
        if one["mode"] == "paged":
            one |= {"vs_stock_read_ahead_kb": best, "vs_stock_tried_kb": tried}
    html = page(facts)
    assert said in words(html.split("</header>")[0]).replace(" , ", ", ")
    assert "at its best" not in html
    assert said.split("times ")[-1].removesuffix(", in the same memory") in words(section(html, "How it was measured"))


def test_no_ratio_is_shown_without_a_cap() -> None:
    """Not even one that a row of an older version has."""
    facts = bench_facts()
    for one in facts["rows"]:
        one |= {"cap": "none", "cap_bytes": None, "cap_reason": "nobody may"}
        if one["mode"] == "paged":
            one["vs_stock_reason"] = "no ratio without a cap: nobody may"
    html = page(facts)
    header = words(html.split("</header>")[0])
    assert "not compared with stock (no ratio without a cap: nobody may)" in header
    assert "times" not in header and "4.0 to 4.7" not in words(section(html, "All rows"))
    assert "no ratio without a cap: nobody may" in words(section(html, "How it was measured"))
    assert "the peak of its process where it had no cap" in section(html, "Speed against memory")


def test_disturbed_rows_keep_their_figures_and_are_in_no_headline() -> None:
    facts = bench_facts()
    for one in facts["rows"]:
        if one.get("budget") == "25%" or one["mode"] == "resident":
            one |= {"status": "disturbed", "status_reason": "it cannot be"}
    html = page(facts)
    lead = words(re.findall(r'<p class="lead">.*?</p>', html)[0])
    assert "15.6" not in lead and "whole model in RAM" not in lead and "9.1 tok/s" in lead
    header = words(html.split("</header>")[0])
    assert "Disturbed gguf_pager, 25 % of the experts: it cannot be (decode, prefill)" in header
    assert "15.6 tok/s decode disturbed: it cannot be" in header and "3.8 times stock" not in header
    assert "15.6" in words(section(html, "All rows"))
    assert "gguf_pager: disturbed, not counted" in section(html, "Speed against memory")
    assert "it cannot be" in words(section(html, "How it was measured"))
    for one in facts["rows"]:
        if one["mode"] == "paged":
            one["status"] = "disturbed"
    assert "Decode: only disturbed results of gguf_pager." in words(page(facts))


def test_headline_does_not_use_invalid_rows() -> None:
    facts = bench_facts()
    for one in facts["rows"]:
        if one["mode"] == "paged":
            one |= {"status": "invalid", "status_reason": "the cap did not hold"}
    html = page(facts)
    header = words(html.split("</header>")[0])
    assert "Decode: no valid result of gguf_pager." in header and "15.6" not in header
    assert "invalid: the cap did not hold" in header
    assert "gguf_pager: no valid result" in section(html, "Speed against memory")


def test_missing_rival_is_named_not_passed_over() -> None:
    facts = bench_facts()
    for one in facts["rows"]:
        one["vs_stock"] = None
        if one["mode"] == "stock":
            one |= {"status": "timeout", "median_ts": None, "samples_ts": []}
    assert "where stock gave no result (timeout)" in words(page(facts))
    facts["rows"] = [one for one in facts["rows"] if one["mode"] != "stock"]
    assert "not compared with stock" in words(page(facts))


def test_timeouts_are_named_everywhere(html: str) -> None:
    reason = "timeout: no end of the run within 600 s"
    header = words(html.split("</header>")[0])
    assert f"stock in 1.39 GiB, read-ahead 8 MiB: {reason} (decode, prefill)" in header
    assert reason in words(section(html, "All rows"))
    assert reason in words(section(html, "How it was measured"))
    assert "stock: no valid result" in section(html, "Speed against memory")


def test_many_warnings_are_cut_short() -> None:
    facts = bench_facts()
    facts["rows"] += [row("paged", status="failed", status_reason=f"reason {i}", n_gen=8) for i in range(20)]
    header = words(page(facts).split("</header>")[0])
    assert header.count("No valid result") == 6 and "and 16 more" in header


def test_different_logits_are_said(html: str) -> None:
    assert "bit for bit, in 6 of 6 paged rows." in words(html)
    facts = bench_facts()
    facts["rows"][0]["same_logits"] = False
    said = words(page(facts))
    assert "The logits of 1 of 6 paged rows differ" in said and "NO" in said


def test_numbers_stand_in_the_table(html: str) -> None:
    table = words(section(html, "All rows"))
    assert "15.6 15.1 to 16.2 3.8 3.5 to 4.1 19.0 82.0 84.8" in table
    assert "9,210" in table


def test_depth_and_threads_are_apart() -> None:
    facts = bench_facts()
    facts["rows"] += [one | {"n_depth": 4096} for one in facts["rows"]]
    assert "Decode, 128 tokens after 4,096" in section(page(facts), "Speed against memory")
    facts["rows"][0]["n_threads"] = 4
    assert "Decode, 128 tokens, 4 threads" in section(page(facts), "Speed against memory")


def test_modelled_energy_says_so_and_has_bounds(html: str) -> None:
    costs = words(section(html, "Reads and energy"))
    assert "0.58 modelled, 0.35 to 0.91" in costs
    facts = bench_facts()
    for one in facts["rows"]:
        one |= {"energy_status": "none", "energy_reason": "powercap: root alone reads it", "j_per_token": None,
                "j_per_prompt_token": None}
    costs = words(section(page(facts), "Reads and energy"))
    assert "none: powercap: root alone reads it" in costs and "modelled," not in costs


def test_clipped_tokens_are_counted(html: str) -> None:
    timeline_section = section(html, "Token by token")
    assert "1 of 128 bars go on above the axis (arrows), up to" in words(timeline_section)
    assert timeline_section.count('d="M0-8L3-2H-3z"') == 1


def test_disturbed_timeline_says_so_and_is_no_measure_for_others() -> None:
    facts = bench_facts()
    facts["timelines"].append(timeline("whole", "resident", 20, None))
    assert "whole model in RAM, median" in section(page(facts), "Token by token")
    for one in facts["timelines"]:
        one["is_disturbed"] = one["mode"] != "stock"
    found = section(page(facts), "Token by token")
    assert "whole model in RAM" not in found and ", disturbed: median" in found


def test_long_timelines_are_grouped() -> None:
    facts = bench_facts()
    facts["timelines"] = [timeline("long", "paged", 24, 22, 4000)]
    html = section(page(facts), "Token by token")
    assert "a bar per 20 tokens" in html and html.count("<rect") < 2 * 200 + 10


def test_timelines_without_stalls_have_one_part() -> None:
    facts = bench_facts()
    facts["timelines"][0]["token_stall_ns"] = None
    assert "waiting for experts" not in page(facts)


def test_heat_says_how_many_experts_take_how_much() -> None:
    facts = bench_facts()
    facts["heat"] = [{"label": "one layer", "layers": [
        {"block": 3, "chosen": [80, 10, 6, 4, 0, 0, 0, 0], "resident": [2, 1, 0, 0, 0, 0, 0, 0]}]}]
    said = words(section(page(facts), "Which experts")).replace("\N{NO-BREAK SPACE}", " ")
    assert "Half of the choices fell on 1 of 8 experts (12.5 %), nine tenths on 2 (25.0 %)." in said
    assert "2 of 8 experts, which took 90.0 % of the choices." in said


def test_heat_of_equal_use_is_drawn_once() -> None:
    assert section(page(bench_facts()), "Which experts").count("Use: ") == 2  # its heading, its description


def test_cells_draw_each_cell_once() -> None:
    rows = [[0, 1, 1, 2, 0, 2, 1], [], [2] * 7, [1, 2, 1, 2, 1, 2, 0]]
    seen: dict[tuple[int, int], int] = {}
    for level, path in enumerate(re.findall(r'd="([^"]*)"', svg.cells(rows, ("a", "b"))), 1):
        x = y = 0
        for move, first, second, run in re.findall(r"(?:([Mm])(\d+) ([\d.]+))?h(\d+)", path):
            x, y = (int(first), int(float(second))) if move == "M" else (x + int(first or 0), y)
            for _ in range(int(run)):
                assert (x, y) not in seen
                seen[x, y] = level
                x += 1
    assert seen == {(x, y): level for y, row_ in enumerate(rows) for x, level in enumerate(row_) if level}


def test_largest_models_make_small_pages() -> None:
    facts = bench_facts()
    facts["heat"] = [heat(f"budget {i}", 94, 512, 1000, 0.25, i) for i in range(2)]
    html = page(facts)
    assert len(html.encode()) < 600_000
    assert "Not drawn, to keep the page small: budget 1" in html


@pytest.mark.parametrize(("low", "high"), [(0, 47.9), (0, 0.3), (20, 24.5), (0, 4100), (0, 1e-7), (5, 5), (0, 0)])
def test_ticks_are_round_even_and_cover(low: float, high: float) -> None:
    found = svg.ticks(low, high)
    assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 8
    steps = {round((b - a) / (found[1] - found[0]), 6) for a, b in pairwise(found)}
    assert steps == {1.0}
    assert len(set(svg.tick_texts(found))) == len(found)


# ---- several sequences ----------------------------------------------------------------------------------------------

def facts_of_sequences() -> dict[str, Any]:
    """Return facts of a bench of one sequence and of four, which are twice as fast together."""
    facts = bench_facts()
    one = [row | {"n_parallel": 1, "sequence_ts": row["median_ts"], "expert_union": 1.0, "over_1": None} for row in facts["rows"]]
    four = [row | {"n_parallel": 4, "over_1": 2.0, "over_1_low": 1.5, "over_1_high": 2.25, "expert_union": 2.43}
            | ({"median_ts": 2 * row["median_ts"], "sequence_ts": row["median_ts"] / 2} if row["median_ts"] else {}) for row in one]
    steps = [line | {"n_parallel": 4, "label": f"{line['label']}, 4 sequences"} for line in facts["timelines"]]
    return facts | {"rows": one + four, "timelines": [line | {"n_parallel": 1} for line in facts["timelines"]] + steps}


def test_sequences_are_groups_of_their_own_with_their_columns() -> None:
    html = page(facts_of_sequences())
    table = words(section(html, "All rows"))
    for head in ("each tok/s", "times one", "union"):
        assert f"<th>{head}</th>" in html
    for title in ("Decode, 128 tokens", "Decode of 4 sequences, 128 tokens each", "Prefill of 4 sequences, 512 tokens each"):
        assert title in table and title in words(section(html, "Speed against memory"))
    assert "2.0 1.50 to 2.2" in table and "2.4" in table
    said = words(html.split("</header>")[0])
    assert "18.2 tok/s decode of 4 sequences" in said and "9.1 tok/s decode 4.3" in said
    assert said.index("Decode with 12.5") < said.index("decode of 4 sequences"), "headlines are of one where that was measured"
    assert "(decode, prefill, decode of 4 sequences, prefill of 4 sequences)" in said


def test_page_of_one_sequence_says_nothing_of_several(html: str) -> None:
    facts = bench_facts()
    facts["rows"] = [row | {"n_parallel": 1, "sequence_ts": row["median_ts"], "over_1": None, "expert_union": 1.0} for row in facts["rows"]]
    facts["timelines"] = [line | {"n_parallel": 1} for line in facts["timelines"]]
    assert page(facts) == html and "sequences" not in words(html)


def test_timelines_drawn_beside_each_other_are_of_as_many_sequences() -> None:
    facts = facts_of_sequences()
    drawn = words(section(page(facts), "Token by token"))
    assert "a bar per token" in drawn and "4 sequences" not in drawn
    facts["timelines"] = facts["timelines"][1:]  # no run of ours with one sequence came so far
    drawn = words(section(page(facts), "Token by token"))
    assert "a bar per step. A step computes a token of each of 4 sequences." in drawn
    assert drawn.count("4 sequences: median") == 2 and "stock in 2.08 GiB, read-ahead 128 KiB: median" not in drawn
