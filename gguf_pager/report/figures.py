"""The drawings of the page: speed against memory, token by token, the experts, reads and energy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from statistics import fmean, median
from typing import Any

from gguf_pager.report import boxes, labels, svg
from gguf_pager.report.labels import DASH, Group, Row
from gguf_pager.report.svg import Level, Point, Series, escape

Bars = list[tuple[tuple[float, ...], str]]  # the parts of a bar, and its tip

MOST_BARS = 200  # of a timeline: more would be thinner than a pixel on a small screen
MOST_CELLS = 100_000  # of all heat maps together: each takes about 5 bytes of the page
HEAT = tuple(f"h{i}" for i in range(1, 9))


# Speed against memory


def speeds(groups: Sequence[Group]) -> str:
    """Return the section of speed against memory, a chart per group."""
    is_uncapped = any(row.get("mode") == "stock" and not row.get("cap_bytes") for _, rows in groups for row in rows)
    words = ("Peak memory of the process for gguf_pager, the cap for stock llama.cpp, whose page cache fills what it "
             f"is given{', or the peak of its process where it had no cap' if is_uncapped else ''}. "
             "Median; whiskers are the slowest and fastest sample.")
    return boxes.section("Speed against memory", words, "".join(_speed(title, rows) for title, rows in groups))


def _speed(title: str, rows: Sequence[Row]) -> str:
    placed = [row for row in rows if row.get("mode") in ("paged", "stock") and labels.memory_bytes(row)]
    if not any(map(labels.is_ok, placed)):
        return boxes.figure_box(title, "", f'<p class="empty">{DASH} no row with a speed and a known memory</p>')
    unit, name = (2**30, "GiB") if max(labels.memory_bytes(row) or 0 for row in placed) >= 2**30 else (2**20, "MiB")
    series = _all_series(placed, unit)
    levels = {labels.name(row): Level(f"{labels.name(row)}: {labels.figure(row['median_ts'])}", "resident",
                                "dots" if row.get("repack") else "dash", row["median_ts"])
              for row in labels.valid(rows, "resident")}
    drawing = svg.chart(series, list(levels.values()), x_title=f"memory, {name}", y_title="tok/s",
                        label=f"{title}: tokens per second against memory; the table of all rows has the numbers")
    return boxes.figure_box(title, boxes.legend((svg.series_key(one), one.name) for one in series), drawing)


def _all_series(rows: Sequence[Row], unit: int) -> list[Series]:
    """Return what is drawn of paged and stock rows, the most important first."""
    paged, stock = labels.valid(rows, "paged"), labels.valid(rows, "stock")
    series = [Series("gguf_pager", "ours", "diamond", [_point(row, unit, is_told=True) for row in paged], "rule")]
    for i, ahead in enumerate(sorted({row.get("read_ahead_kb") for row in stock}, key=lambda ahead: ahead or 0)):
        points = [_point(row, unit) for row in stock if row.get("read_ahead_kb") == ahead]
        shape = svg.STOCK_SHAPES[i % len(svg.STOCK_SHAPES)]
        series.append(Series(f"stock, read-ahead {labels.read_ahead(ahead)}", "stock", shape, points, is_hollow=True))
    for mode, name, css in (("paged", "gguf_pager", "ours"), ("stock", "stock", "stock")):
        crosses = [Point((labels.memory_bytes(row) or 0) / unit, 0, f"{labels.name(row)}\n{labels.why(row)}") for row in rows
                   if row["mode"] == mode and not labels.is_ok(row) and not labels.is_disturbed(row)]
        series.append(Series(f"{name}: no valid result", css, "cross", crosses))
        odd = [Point((labels.memory_bytes(row) or 0) / unit, row["median_ts"], f"{labels.name(row)}\n{labels.why(row)}")
               for row in rows if row["mode"] == mode and labels.is_disturbed(row)]
        series.append(Series(f"{name}: disturbed, not counted", css, "cross", odd))
    limits = [Point((labels.memory_bytes(row) or 0) / unit, row["limit_ts"], "") for row in paged if row.get("limit_ts")]
    series.append(Series("limit: computing in RAM, and missed bytes at the disk's best", "limit", "", limits, "thin"))
    return [one for one in series if one.points]


def _point(row: Row, unit: int, *, is_told: bool = False) -> Point:
    speed = f"{labels.figure(row['median_ts'])} tok/s, median of {len(row.get('samples_ts') or ())}"
    spread = labels.spread(row.get("min_ts"), row.get("max_ts"))
    tip = (f"{labels.name(row)}\n{speed}{f' ({spread})' if spread else ''}\npeak memory {labels.size(row.get('peak_rss_bytes'))}, "
           f"cap {labels.size(row.get('cap_bytes'))}\nhits {labels.percent(row.get('hit_rate'))}, "
           f"stalled {labels.percent(row.get('stall_share'))}, limit {labels.figure(row.get('limit_ts'))} tok/s")
    return Point((labels.memory_bytes(row) or 0) / unit, row["median_ts"], tip, row.get("min_ts"), row.get("max_ts"),
                 labels.figure(row["median_ts"]) if is_told else "")


# Token by token


def timelines(timelines: Sequence[dict[str, Any]]) -> str:
    """Return the section of the tokens of one run, one by one, or step by step of several sequences."""
    n_parallel = _n_parallel(next((line for line in timelines if line["token_ns"] and line["mode"] == "paged"), {}))
    timelines = [line for line in timelines if _n_parallel(line) == n_parallel]
    first = {line["mode"]: line for line in reversed(timelines) if line["token_ns"]}
    if "paged" in first and "stock" in first:
        first["stock"] = _best_rival(first["paged"], timelines)
    drawn = {mode: first[mode] for mode in ("paged", "stock") if mode in first}
    if not drawn:
        return boxes.section("Token by token", f"{DASH} no run recorded the time of each token.", "")
    bars = {mode: _bars(line) for mode, line in drawn.items()}
    top = {mode: _top([sum(values) for values, _ in found]) for mode, found in bars.items()}
    is_one_scale = len(top) == 2 and top["stock"] < 5 * top["paged"]
    if is_one_scale:
        top = dict.fromkeys(top, max(top.values()))
    whole = None if first.get("resident", {}).get("is_disturbed") else first.get("resident")
    level = Level("whole model in RAM, median", "pinned", "dash", median(whole["token_ns"]) / 1e6) if whole else None
    words = {"stock": "Same scale as above. " if is_one_scale else "A scale of its own. "} if len(drawn) == 2 else {}
    each = -(-max(len(line["token_ns"]) for line in drawn.values()) // MOST_BARS)
    what = "token" if n_parallel == 1 else "step"
    said = f"Decode, a bar per {what}." if each == 1 else f"Decode, a bar per {each} {what}s: their mean."
    if n_parallel > 1:
        said += f" A step computes a token of each of {n_parallel} sequences."
    return boxes.section("Token by token", said,
                    "".join(_timeline(line, bars[mode], top[mode], level, words.get(mode, ""))
                            for mode, line in drawn.items()), "column")


def _n_parallel(timeline: dict[str, Any]) -> int:
    """Return the sequences of a run; those of older versions do not say."""
    return timeline.get("n_parallel") or 1


def _top(heights: Sequence[float]) -> float:
    """Return where the axis may end: a few outliers do not flatten all others."""
    ordered = sorted(heights)
    return min(ordered[-1], 1.25 * ordered[int(0.97 * (len(ordered) - 1))]) or 1.0


def _best_rival(ours: dict[str, Any], timelines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return stock's fastest run in the same memory as ours, or in any where that was not measured: read-aheads differ."""
    stock = [line for line in timelines if line["mode"] == "stock" and line["token_ns"]]
    memory = str(ours.get("label")).rpartition(", cap ")[2]
    same = [line for line in stock if str(line.get("label")).rpartition(", cap ")[2] == memory]
    return min(same or stock, key=lambda line: median(line["token_ns"]))


def _timeline(line: dict[str, Any], bars: Bars, top: float, level: Level | None, words: str) -> str:
    css = ("ours", "stall") if len(bars[0][0]) == 2 else ("ours" if line["mode"] == "paged" else "stock",)
    names = ("computing", "waiting for experts") if len(css) == 2 else ("time per token",)
    keys = [(svg.box_key([color]), name) for color, name in zip(css, names, strict=True)]
    if level and level.y <= top:
        keys.append((svg.series_key(level), f"{level.name}: {labels.figure(level.y)} ms"))
    heights = [sum(values) for values, _ in bars]
    over = sum(height > top * 1.0001 for height in heights)
    if over:
        words += f"{over} of {len(bars)} bars go on above the axis (arrows), up to {labels.figure(max(heights))} ms."
    disturbed = ", disturbed" if line.get("is_disturbed") else ""
    title = f"{line['label']}{disturbed}: median {labels.figure(median(line['token_ns']), 1e-6)} ms"
    drawing = svg.stack(bars, css, top=top, last=len(line["token_ns"]), height=170, level=level, x_title="token",
                        y_title="ms per token", label=f"{title}; a bar is the time of a token")
    return boxes.figure_box(title, boxes.legend(keys), drawing, words.strip())


def _bars(timeline: dict[str, Any]) -> Bars:
    """Return the milliseconds of each token, or of as many neighbours as a page can tell apart, with a tip."""
    tokens, stalls = timeline["token_ns"], timeline.get("token_stall_ns")
    each = -(-len(tokens) // MOST_BARS)
    found: Bars = []
    for i in range(0, len(tokens), each):
        total = fmean(tokens[i:i + each]) / 1e6
        which = f"token {i + 1}" if each == 1 else f"tokens {i + 1} to {min(i + each, len(tokens))}, mean"
        if stalls is None or len(stalls) != len(tokens):
            found.append(((total,), f"{which}: {labels.figure(total)} ms"))
        else:
            stall = min(total, fmean(stalls[i:i + each]) / 1e6)
            found.append(((total - stall, stall), f"{which}: {labels.figure(total)} ms, {labels.figure(stall)} of them waiting"))
    return found


# Use and residency of experts


def heat(heat: Sequence[dict[str, Any]]) -> str:
    """Return the section of which experts were used and were in memory."""
    if not heat:
        return boxes.section("Which experts", f"{DASH} no run recorded which experts were chosen.", "")
    drawn, n_cells, before = "", 0, None
    left_out = []
    for one in heat:
        layers = [layer for layer in one["layers"] if layer["chosen"]]
        if not layers:
            continue
        chosen = [layer["chosen"] for layer in layers]
        n_cells += sum(map(len, chosen))
        if drawn and n_cells > MOST_CELLS // 2:
            left_out.append(one["label"])
            continue
        if chosen != before:
            drawn += _use(one["label"], layers)
        drawn += _residency(one["label"], layers)
        before = chosen
    words = ("A row per layer, a column per expert, in the order of the file; choices of prompt and decode together, and "
             "what was in memory at the end.")
    if left_out:
        words += f" Not drawn, to keep the page small: {escape(', '.join(left_out))}."
    return boxes.section("Which experts", words, drawn)


def _use(label: str, layers: Sequence[dict[str, Any]]) -> str:
    counts = sorted((n for layer in layers for n in layer["chosen"]), reverse=True)
    total, most = sum(counts), max([1, *counts])
    reached = list(accumulate(counts))
    half, most_of_all = (1 + sum(n < total * share for n in reached) for share in (0.5, 0.9))
    words = (f"Half of the choices fell on {half:,} of {len(counts):,} experts ({labels.percent(half / len(counts))}), "
             f"nine tenths on {most_of_all:,} ({labels.percent(most_of_all / len(counts))}).")
    rows = [[_heat_level(n, most) for n in layer["chosen"]] for layer in layers]
    tips = [f"block {layer['block']}: {sum(layer['chosen']):,} choices, {sum(map(bool, layer['chosen']))} of "
            f"{len(layer['chosen'])} experts used" for layer in layers]
    return _map(f"Use: {label}", layers, rows, HEAT, tips, [
        (svg.box_key(["ground"]), "never chosen"), (svg.box_key(HEAT, 9), f"once to {most:,} times, logarithmic")],
        words if total else "No choices were recorded.")


def _heat_level(count: int, most: int) -> int:
    if count <= 0:
        return 0
    return len(HEAT) if most == 1 else 1 + round((len(HEAT) - 1) * math.log(count) / math.log(most))


def _residency(label: str, layers: Sequence[dict[str, Any]]) -> str:
    pairs = [(n, state) for layer in layers for n, state in zip(layer["chosen"], layer["resident"], strict=False)]
    total, held = sum(n for n, _ in pairs), sum(n for n, state in pairs if state)
    tips = [f"block {layer['block']}: {sum(map(bool, layer['resident']))} of {len(layer['resident'])} experts "
            f"resident, {sum(state == 2 for state in layer['resident'])} pinned" for layer in layers]
    share = f", which took {labels.percent(held / total)} of the choices" if total else ""
    return _map(f"In memory: {label}", layers, [layer["resident"] for layer in layers], ("held", "pinned"), tips,
                [(svg.box_key(["held"]), "resident"), (svg.box_key(["pinned"]), "pinned"),
                 (svg.box_key(["ground"]), "on disk only")],
                f"{sum(bool(state) for _, state in pairs):,} of {len(pairs):,} experts{share}.")


def _map(title: str, layers: Sequence[dict[str, Any]], rows: Sequence[Sequence[int]], css: Sequence[str],
         tips: Sequence[str], keys: Sequence[tuple[str, str]], words: str) -> str:
    drawing = svg.heat(rows, css, names=[str(layer["block"]) for layer in layers], tips=tips, x_title="expert",
                       y_title="block", label=f"{title}. {words}")
    return boxes.figure_box(title, boxes.legend(keys), drawing, words)


# Reads and energy


def costs(groups: Sequence[Group]) -> str:
    """Return the section of bytes read and joules, per token."""
    drawn = ""
    for title, rows in labels.first_of_each(groups):
        per, joules = ("token", "j_per_token") if title.startswith("Decode") else ("prompt token", "j_per_prompt_token")
        done = [row for row in rows if row.get("status") == "ok"]
        reads = [(row, _read_bytes(row), None, "reads not counted") for row in done]
        energy = [(row, row.get(joules), _joule_bounds(row, joules), energy_source(row)) for row in done]
        drawn += _cost(f"MB read per {per}", title, reads, 1e-6) + _cost(f"J per {per}", title, energy, 1.0)
    return boxes.section("Reads and energy", "Bytes that the process read from the disk, as the system counted "
                    "them; joules with their source. Whiskers are the bounds of a modelled figure.", drawn)


def _read_bytes(row: Row) -> float | None:
    """Return what the process read, as the system counted it, else what the pager counted."""
    counted: float | None = row.get("io_bytes_per_token")
    return row.get("read_bytes_per_token") if counted is None else counted


def _joule_bounds(row: Row, name: str) -> tuple[float, float] | None:
    """Return the bounds per token: they are recorded for all of the tokens."""
    value, total, low, high = (row.get(key) for key in (name, "energy_total_j", "energy_low_j", "energy_high_j"))
    if not value or not total or low is None or high is None or low == high:
        return None
    return value * low / total, value * high / total


def energy_source(row: Row) -> str:
    """Return where a figure of energy comes from, or why there is none."""
    status = str(row.get("energy_status") or "none")
    words = row.get("energy_reason") or "no reason recorded" if status == "none" else row.get("energy_method")
    return f"{status}: {words}" if words else status


def _cost(title: str, of: str, costs: Sequence[tuple[Row, float | None, tuple[float, float] | None, str]],
          factor: float) -> str:
    """Return a flat bar per row: what it cost, its bounds, and where the figure comes from."""
    top = max((max(value, bounds[1] if bounds else 0) for _, value, bounds, _ in costs if value is not None), default=0)
    items = ""
    if all(value is None for _, value, _, _ in costs):
        reasons = " / ".join(dict.fromkeys(words for *_, words in costs)) or "no row is valid"
        return boxes.figure_box(f"{title}: {of.lower()}", "", f'<p class="empty">{DASH} {escape(reasons)}</p>')
    for row, value, bounds, words in costs:
        status = words.split(":")[0] if value is not None else words
        spread = f", {labels.spread(bounds[0] * factor, bounds[1] * factor)}" if bounds else ""
        said = f"<em>{escape(status)}{spread}</em>" if value is None or factor == 1 else ""
        css = {"paged": "ours", "resident": "resident"}.get(str(row.get("mode")), "stock")
        drawing = "" if value is None else svg.bar(value, top, css, bounds, f"{labels.name(row)}: {labels.figure(value, factor)}")
        items += f"<li><span>{escape(labels.name(row))}</span><b>{labels.figure(value, factor)}</b> {said}{drawing}</li>"
    return boxes.figure_box(f"{title}: {of.lower()}", "", f'<ul class="costs">{items}</ul>')
