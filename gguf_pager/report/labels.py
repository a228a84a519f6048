"""How the page names rows and writes numbers; and which rows belong together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gguf_pager.bench.cases import budget_label
from gguf_pager.memory.budget import format_bytes
from gguf_pager.report.words import as_options

Row = dict[str, Any]
Group = tuple[str, list[Row]]
"""A title, and rows that may be compared."""

DASH = "\N{EN DASH}"
PERCENT = "\N{NO-BREAK SPACE}%"


def figure(value: float | None, factor: float = 1.0) -> str:
    """Return a number with two or three digits that count."""
    if value is None:
        return DASH
    value *= factor
    styles = ((100, ",.0f"), (1, ".1f"), (0.1, ".2f"), (0.01, ".3f"), (0, ".2g"))
    return format(value, next(style for least, style in styles if abs(value) >= least))


def percent(value: float | None) -> str:
    """Return a share as a percentage."""
    return DASH if value is None else f"{figure(value, 100)}{PERCENT}"


def size(value: float | None) -> str:
    """Return bytes for people."""
    return DASH if value is None else format_bytes(value)


def read_ahead(value: int | None) -> str:
    """Return a read-ahead, which is known in KiB."""
    return "not known" if value is None else f"{value} KiB" if value < 1024 else f"{value / 1024:g} MiB"


def rival(row: Row) -> str:
    """Return which stock a row's ratio is to: no more than was measured."""
    best, tried = row.get("vs_stock_read_ahead_kb"), row.get("vs_stock_tried_kb") or []
    if len(tried) > 1:
        others = [read_ahead(kb) for kb in tried]
        return (f"stock llama.cpp at a read-ahead of {read_ahead(best)}, the {'better' if len(tried) == 2 else 'best'} of "
                f"{', '.join(others[:-1])} and {others[-1]}")
    if best is None:
        return "stock llama.cpp at the device's read-ahead, which is not known"
    only = ", the only one measured" if tried else ""  # rows of older versions do not say
    return f"stock llama.cpp at the device's read-ahead of {read_ahead(best)}{only}"


def times(value: float | None) -> str:
    """Return how many times; near 1, the second decimal decides."""
    return DASH if value is None else f"{value:.2f}" if value < 2 else figure(value)


def count(value: float | None) -> str:
    """Return a whole number."""
    return DASH if value is None else f"{value:,.0f}"


def spread(low: float | None, high: float | None, show: Callable[[float | None], str] = figure) -> str:
    """Return a range, nothing where there is none."""
    return "" if low is None or high is None or low == high else f"{show(low)} to {show(high)}"


def budget(row: Row) -> str:
    """Return what a row of ours was given."""
    budget = budget_label(str(row.get("budget") or "not stated"))
    return f"{budget[:-1]}{PERCENT} of the experts" if budget.endswith("%") else f"budget {budget}"


def name(row: Row, *, is_short: bool = False) -> str:
    """Return what was run; in short without what the columns of a table tell."""
    mode = row.get("mode")
    if mode == "paged":
        return f"gguf_pager, {budget(row).removesuffix(' of the experts') if is_short else budget(row)}"
    if mode == "resident":
        return "whole model in RAM" + (", repacked" if row.get("repack") else "")
    cap = f" in {size(row['cap_bytes'])}" if not is_short and row.get("cap_bytes") else ""
    return f"{mode or 'mode not recorded'}{cap}, read-ahead {read_ahead(row.get('read_ahead_kb'))}"


def phase(row: Row) -> str:
    """Return "decode" or "prefill", and of how many sequences."""
    name = "decode" if row.get("n_gen") else "prefill" if row.get("n_prompt") else "phase not recorded"
    return f"{name} of {row['n_parallel']} sequences" if is_of_several(row) else name


def is_of_several(row: Row) -> bool:
    """Return whether a row is of more sequences than one; rows of older versions do not say."""
    return (row.get("n_parallel") or 1) > 1


def is_ok(row: Row) -> bool:
    """Return whether a row has a result that counts."""
    return row.get("status") == "ok" and row.get("median_ts") is not None


def is_disturbed(row: Row) -> bool:
    """Return whether a row has figures that cannot be right: they are shown, and compared with nothing."""
    return row.get("status") == "disturbed" and row.get("median_ts") is not None


def valid(rows: Iterable[Row], mode: str) -> list[Row]:
    """Return the rows of a mode that have a result, the smallest memory first."""
    return sorted((row for row in rows if row.get("mode") == mode and is_ok(row)), key=lambda row: memory_bytes(row) or 0)


def why(row: Row) -> str:
    """Return why a row has none that counts."""
    status = row.get("status") or "status not recorded"
    reason = row.get("status_reason") or ("no speed was recorded" if status == "ok" else "")
    return f"{status}: {as_options(reason)}" if reason else str(status)


def memory_bytes(row: Row) -> int | None:
    """Return what a row needed: the peak of ours, the cap of the kernel's cache, which fills whatever it is given."""
    first, second = ("cap_bytes", "peak_rss_bytes") if row.get("mode") == "stock" else ("peak_rss_bytes", "cap_bytes")
    return row.get(first) or row.get(second)


def groups_of(rows: Sequence[Row]) -> list[Group]:
    """Return rows that may be compared: of one phase, length, depth, number of sequences and of threads; decode first."""
    are_threads_told = len({row.get("n_threads") for row in rows}) > 1
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (not row.get("n_gen"), not row.get("n_prompt"))):
        n_tokens = row.get("n_gen") or row.get("n_prompt")
        title = phase(row).capitalize() + (f", {n_tokens:,} tokens{' each' if is_of_several(row) else ''}" if n_tokens else "")
        title += f" after {row['n_depth']:,}" if row.get("n_depth") else ""
        title += f", {row.get('n_threads') or DASH} threads" if are_threads_told else ""
        found.setdefault(title, []).append(row)
    return list(found.items())


def first_of_each(groups: Sequence[Group]) -> list[Group]:
    """Return the first group of each phase, the one that headlines speak of."""
    return list({title.split(",")[0]: (title, rows) for title, rows in reversed(groups)}.values())[::-1]
