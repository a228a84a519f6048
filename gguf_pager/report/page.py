"""The page that `bench --report` writes: one HTML file that needs nothing else and loads nothing.

Every sentence and mark comes from the rows. Unknown is a dash, with the reason where one is known.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from gguf_pager.report import boxes, figures, labels, svg
from gguf_pager.report.labels import DASH, Group, Row
from gguf_pager.report.style import STYLE
from gguf_pager.report.svg import escape

MOST_WARNINGS = 6


def page(facts: dict[str, Any]) -> str:
    """Return the page for a benchmark. Of several timelines the first paged and resident ones are drawn, and stock's best beside them."""
    facts = _finite(facts)
    groups = labels.groups_of(facts["rows"])
    title = facts.get("title") or facts["model"].get("name") or "gguf-pager bench"
    sections = (_headline(facts, groups, title), figures.speeds(groups), figures.timelines(facts.get("timelines") or []),
                figures.heat(facts.get("heat") or []), figures.costs(groups), _table(groups), _method(facts))
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; style-src \'unsafe-inline\'">'
            f'<meta name="color-scheme" content="light dark"><title>{escape(title)}</title>'
            f"<style>{STYLE}{svg.STYLE}</style></head>\n<body><main>\n" + "\n".join(sections)
            + "\n</main></body></html>\n")


def _finite(value: Any) -> Any:
    """Return the same without infinities and NaN: they are not known."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value




def _headline(facts: dict[str, Any], groups: Sequence[Group], title: str) -> str:
    model, machine = facts["model"], facts["machine"]
    date = str(facts.get("date") or "").replace("T", " ").replace("Z", " UTC")
    geometry = (f"{model.get('architecture') or 'architecture not known'}, {labels.size(model.get('file_bytes'))}: experts "
                f"{labels.size(model.get('expert_bytes'))} in {labels.count(model.get('n_expert_layers'))} layers of "
                f"{labels.count(model.get('n_experts'))}, {labels.count(model.get('n_used'))} used per token "
                f"({labels.figure(model.get('bytes_per_token'), 1e-6)} MB); dense {labels.size(model.get('dense_bytes'))}")
    place = (f"{machine.get('cpu_info') or 'processor not known'}, {labels.count(machine.get('n_cores'))} cores, "
             f"{labels.size(machine.get('ram_bytes'))} RAM, {machine.get('device') or 'disk not known'} at "
             f"{labels.figure(machine.get('device_bytes_per_s'), 1e-9)} GB/s")
    return (f'<header><p class="eyebrow">gguf-pager bench <span>{escape(date)}</span></p><h1>{escape(title)}</h1>'
            f'<dl class="what"><dt>Model</dt><dd><b>{escape(model.get("name") or "name not known")}</b> '
            f"{escape(geometry)}</dd><dt>Machine</dt><dd>{escape(place)}</dd></dl>"
            f'<p class="lead">{_sentence(groups)}</p>{_cards(groups)}'
            f'<p class="note">{escape(_logits(facts["rows"]))}</p>{_warnings(facts["rows"])}</header>')


def _warnings(rows: Sequence[Row]) -> str:
    """Return a line for what has no valid result, or cannot be as it was measured, of all its phases together."""
    lost: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if not labels.is_ok(row):
            kind = "Disturbed" if labels.is_disturbed(row) else "No valid result"
            words = str(row.get("status_reason") or DASH) if labels.is_disturbed(row) else labels.why(row)
            lost.setdefault((kind, f"{labels.name(row)}: {words}"), []).append(labels.phase(row))
    notes = [(kind, f"{what} ({', '.join(dict.fromkeys(phases))})") for (kind, what), phases in lost.items()]
    if len(notes) > MOST_WARNINGS:
        more = f"and {len(notes) - MOST_WARNINGS + 1} more: the table has them all"
        notes[MOST_WARNINGS - 1:] = [(notes[MOST_WARNINGS - 1][0], more)]
    return "".join(f'<p class="warn"><b>{kind}</b> {escape(note)}</p>' for kind, note in notes)


def _sentence(groups: Sequence[Group]) -> str:
    """Return the result of the first group in one sentence, the smallest memory first."""
    if not groups:
        return "Nothing was measured."
    title, rows = next((group for group in groups if labels.valid(group[1], "paged")), groups[0])
    phase = title.split(",")[0]
    paged = labels.valid(rows, "paged")
    if not paged:
        kind = "only disturbed results" if any(row["mode"] == "paged" and labels.is_disturbed(row) for row in rows) else "no valid result"
        return escape(f"{phase}: {kind} of gguf_pager.")
    parts = []
    for i, row in enumerate(paged[:3]):
        where = labels.budget(row) if "%" in labels.budget(row) else f"--budget {row.get('budget') or DASH}"
        where += " in memory" if not i and "%" in where else ""
        begin = "with" if i else f"{phase} with"
        parts.append(f"{begin} {escape(where)}: <b>{labels.figure(row['median_ts'])} tok/s</b>, "
                     f"{_against_stock(row, rows, is_short=i > 0)}")
    whole = labels.valid(rows, "resident")
    if whole:
        best = max(whole, key=lambda row: float(row["median_ts"]))
        parts.append(f"{escape(labels.name(best))}: {labels.figure(best['median_ts'])} tok/s")
    return "; ".join(parts) + "."


def _has_ratio(row: Row) -> bool:
    """Whether a ratio counts: rows of older versions have one without a cap, too."""
    return row.get("vs_stock") is not None and row.get("cap") not in (None, "none")


def _against_stock(row: Row, rows: Sequence[Row], *, is_short: bool) -> str:
    rivals = [one for one in rows if one.get("mode") == "stock" and one.get("cap_bytes") == row.get("cap_bytes")]
    if _has_ratio(row):
        ratio = f"<b>{labels.times(row['vs_stock'])} times</b>"
        return ratio if is_short else f"{ratio} {escape(labels.rival(row))}, in the same memory"
    if rivals and not any(map(labels.is_ok, rivals)):
        return escape(f"where stock gave no result ({', '.join(sorted({str(r.get('status')) for r in rivals}))})")
    reason = row.get("vs_stock_reason")
    return escape(f"not compared with stock ({reason})") if reason and not is_short else "not compared with stock"


def _cards(groups: Sequence[Group]) -> str:
    """Return a card per budget, and one for the whole model in RAM, with the first group of each phase."""
    cards: dict[str, list[tuple[str, Row]]] = {}
    for title, rows in labels.first_of_each(groups):
        for row in sorted(rows, key=lambda row: (row.get("mode") != "paged", labels.memory_bytes(row) or 0)):
            if row.get("mode") in ("paged", "resident"):
                name = labels.budget(row) if row["mode"] == "paged" else labels.name(row)
                cards.setdefault(name, []).append((title.split(",")[0].lower(), row))
    return '<div class="cards">' + "".join(_card(name, lines) for name, lines in cards.items()) + "</div>"


def _card(name: str, lines: Sequence[tuple[str, Row]]) -> str:
    parts = []
    for phase, row in lines:
        words = escape(labels.why(row))
        if labels.is_ok(row):
            spread = labels.spread(row.get("vs_stock_low"), row.get("vs_stock_high"), labels.times)
            words = f"{labels.times(row['vs_stock'])} times stock <small>{spread}</small>" if _has_ratio(row) else ""
        speed = labels.figure(row["median_ts"]) if labels.is_ok(row) or labels.is_disturbed(row) else DASH
        parts.append(f"<p><b>{speed}</b> tok/s {phase}</p><p>{words}</p>")
    peaks = [row["peak_rss_bytes"] for _, row in lines if row.get("peak_rss_bytes")]
    css = "card" if lines[0][1].get("mode") == "paged" else "card plain"
    return (f'<div class="{css}"><h3>{escape(name)}</h3>{"".join(parts)}'
            f"<p>peak memory {labels.size(max(peaks, default=None))}</p></div>")


def _logits(rows: Sequence[Row]) -> str:
    paged = [row for row in rows if row.get("mode") == "paged"]
    same, other = (sum(row.get("same_logits") is wanted for row in paged) for wanted in (True, False))
    if other:
        return f"The logits of {other} of {len(paged)} paged rows differ from stock llama.cpp's."
    if not same:
        return "Logits were not compared with stock llama.cpp's."
    return f"Logits equal to stock llama.cpp's, bit for bit, in {same} of {len(paged)} paged rows" + (
        "." if same == len(paged) else "; the others were not compared.")


# All rows


def _cell(value: str, small: str = "", reason: str | None = None) -> str:
    title = f' title="{escape(reason)}"' if reason else ""
    return f"<td{title}>{escape(value)}{f'<small>{escape(small)}</small>' if small else ''}</td>"


def _joules(row: Row) -> str:
    value = row.get("j_per_token") if row.get("n_gen") else row.get("j_per_prompt_token")
    return _cell(labels.figure(value), "" if value is None else str(row.get("energy_status") or ""), row.get("energy_reason"))


def _gib(value: float | None) -> str:
    return DASH if value is None else f"{value / 2**30:.2f}"


def _times_stock(row: Row) -> str:
    if not _has_ratio(row):
        return _cell(DASH, reason=row.get("vs_stock_reason"))
    spread = labels.spread(row.get("vs_stock_low"), row.get("vs_stock_high"), labels.times)
    return _cell(labels.times(row["vs_stock"]), spread, labels.rival(row))


COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("tok/s", lambda r: _cell(labels.figure(r.get("median_ts")), labels.spread(r.get("min_ts"), r.get("max_ts")))),
    ("each tok/s", lambda r: _cell(labels.figure(r.get("sequence_ts")))),
    ("times one", lambda r: _cell(labels.times(r.get("over_1")), labels.spread(r.get("over_1_low"), r.get("over_1_high"), labels.times))),
    ("union", lambda r: _cell(labels.times(r.get("expert_union")))),
    ("times stock", _times_stock),
    ("limit tok/s", lambda r: _cell(labels.figure(r.get("limit_ts")))),
    ("% of limit", lambda r: _cell(labels.figure(r.get("efficiency"), 100))),
    ("hits %", lambda r: _cell(labels.figure(r.get("hit_rate"), 100))),
    ("stalled %", lambda r: _cell(labels.figure(r.get("stall_share"), 100))),
    ("paged MB per token", lambda r: _cell(labels.figure(r.get("read_bytes_per_token"), 1e-6))),
    ("disk MB per token", lambda r: _cell(labels.figure(r.get("io_bytes_per_token"), 1e-6))),
    ("major faults", lambda r: _cell(labels.count(r.get("major_faults")))),
    ("peak GiB", lambda r: _cell(_gib(r.get("peak_rss_bytes")))),
    ("arena GiB", lambda r: _cell(_gib(r.get("arena_bytes")))),
    ("cap GiB", lambda r: _cell(_gib(r.get("cap_bytes")), str(r.get("cap") or ""), r.get("cap_reason"))),
    ("CPU s per token", lambda r: _cell(labels.figure(r.get("cpu_s_per_token")))),
    ("J per token", _joules),
    ("load s", lambda r: _cell(labels.figure(r.get("load_s")))),
    ("usable s", lambda r: _cell(labels.figure(r.get("usable_s")))),
    ("first token s", lambda r: _cell(labels.figure(r.get("first_token_s")))),
    ("batch", lambda r: _cell(labels.count(r.get("n_batch")), f"by {labels.count(r.get('n_ubatch'))}")),
    ("same logits", lambda r: _cell(DASH if r.get("same_logits") is None else "yes" if r["same_logits"] else "NO")),
)


OF_SEVERAL = ("each tok/s", "times one", "union")
"""Columns that are shown where a row is of several sequences; tok/s and what stands per token are of all of them together."""


def _table(groups: Sequence[Group]) -> str:
    has_several = any(labels.is_of_several(row) for _, rows in groups for row in rows)
    columns = [(name, show) for name, show in COLUMNS if has_several or name not in OF_SEVERAL]
    head = "<th>case</th>" + "".join(f"<th>{name}</th>" for name, _ in columns)
    body = ""
    for title, rows in groups:
        body += f'<tbody><tr class="group"><th colspan="{len(columns) + 1}">{escape(title)}</th></tr>'
        for row in rows:
            cells = "".join(show(row) for _, show in columns)
            css = "" if labels.is_ok(row) else ' class="lost"'
            body += f"<tr{css}><th>{escape(labels.name(row, is_short=True))}</th>{cells}</tr>"
            if not labels.is_ok(row):
                body += f'<tr class="why"><td colspan="{len(columns) + 1}"><span>{escape(labels.why(row))}</span></td></tr>'
        body += "</tbody>"
    words = "Median, and below it the range. A dash is what is not known."
    if has_several:
        words += (" Of several sequences tok/s, and all that stands per token, is of all of them together; times one: over the tok/s of one in "
                  "the same rounds; union: the experts that a step wants over those that one token wants.")
    return boxes.section("All rows", words,
                    f"<table><thead><tr>{head}</tr></thead>{body}</table>", "wide")


# How it was measured


def _method(facts: dict[str, Any]) -> str:
    machine, rows = facts["machine"], facts["rows"]
    samples = sorted({len(row.get("samples_ts") or ()) for row in rows if labels.is_ok(row)})
    disturbed = [row for row in rows if labels.is_disturbed(row)]
    lost = [row for row in rows if not labels.is_ok(row) and not labels.is_disturbed(row)]
    compared = [row for row in rows if labels.is_ok(row) and _has_ratio(row)]
    alone = [row for row in rows if row.get("mode") == "paged" and not _has_ratio(row)]
    items = [
        ("Command", f"<code>{escape(facts.get('command') or DASH)}</code>"),
        ("Software", escape(f"gguf_pager {facts.get('gguf_pager_version') or DASH}, llama-cpp-python "
                            f"{facts.get('llama_cpp_python_version') or DASH}, "
                            f"{machine.get('system') or 'system not known'}")),
        ("Processor", escape(f"{machine.get('cpu_info') or DASH}, {labels.count(machine.get('n_cores'))} cores; threads "
                             f"{_values(rows, 'n_threads')}, batch {_values(rows, 'n_batch')} by "
                             f"{_values(rows, 'n_ubatch')}")),
        ("Disk", escape(f"{machine.get('device') or 'not known'}, found with read-ahead "
                        f"{labels.read_ahead(machine.get('read_ahead_kb'))}; best read in this bench "
                        f"{labels.figure(machine.get('device_bytes_per_s'), 1e-9)} GB/s")),
        ("Memory cap", _tally(rows, _cap)),
        ("Read-ahead", _tally(rows, lambda row: f"{row.get('mode') or DASH}: {labels.read_ahead(row.get('read_ahead_kb'))}")),
        ("Page cache", escape(facts.get("cache_state") or "its state before each run was not recorded")),
        ("Speed", escape(f"Median of {' or '.join(map(str, samples)) or DASH} samples. Times stock: within rounds, under "
                         "the same cap. Limit: the time to compute with all weights in RAM, and to read the "
                         "bytes missed at the disk's best of this bench; of limit: how near the run came to it.")),
        ("Compared with", _tally(compared, labels.rival) if compared else "nothing"),
        ("Not compared", _tally(alone, lambda row: f"{labels.name(row)}, {labels.phase(row)}: "
                                                   f"{row.get('vs_stock_reason') or 'no reason recorded'}") if alone else "none"),
        ("Energy", _tally([row for row in rows if labels.is_ok(row)], figures.energy_source)),
        ("Disturbed", _tally(disturbed, lambda row: f"{labels.name(row)}, {labels.phase(row)}: "
                                                    f"{row.get('status_reason') or DASH}") if disturbed else "none"),
        ("No valid result", _tally(lost, lambda row: f"{labels.name(row)}, {labels.phase(row)}: {labels.why(row)}") if lost else "none"),
    ]
    body = "".join(f"<dt>{name}</dt><dd>{words}</dd>" for name, words in items)
    return boxes.section("How it was measured", "", body, "what method")


def _values(rows: Sequence[Row], name: str) -> str:
    return ", ".join(f"{value:,}" for value in sorted({row[name] for row in rows if row.get(name)})) or DASH


def _cap(row: Row) -> str:
    size = f"{row.get('cap') or 'not recorded'}, {labels.size(row.get('cap_bytes'))}"
    return f"{size}: {row['cap_reason']}" if row.get("cap_reason") else size


def _tally(rows: Sequence[Row], describe: Callable[[Row], str]) -> str:
    """Return each different description, with the number of rows it holds for."""
    counts = Counter(map(describe, rows))
    lines = (f"{escape(words)} <small>({n} row{'s' if n > 1 else ''})</small>" for words, n in counts.items())
    return "<br>".join(lines) or DASH
