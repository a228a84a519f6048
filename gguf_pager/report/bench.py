"""What `bench` shows in a terminal and writes for machines: a table with bars, CSV, JSON, JSON lines, SQL."""

from __future__ import annotations

import csv
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gguf_pager.bench.cases import budget_label
from gguf_pager.bench.comparisons import UNASKED
from gguf_pager.errors import printable
from gguf_pager.report import labels, number
from gguf_pager.report.words import as_options

Row = dict[str, Any]

SQL_TABLE = "gguf_pager_bench"

_BLOCKS = " ▏▎▍▌▋▊▉█"
_BAR_CELLS = 30
_NOTE_CHARS = 100


class Printer(ABC):
    """Turns rows into text as they become known."""

    def __init__(self) -> None:
        self.is_first = True
        """Whether no row has been printed yet."""

    def head(self) -> str:
        """Return what stands before all rows, without knowing one."""
        return ""

    @abstractmethod
    def rows(self, rows: Sequence[Row]) -> str:
        """Return the text of some more rows."""

    def foot(self) -> str:
        """Return what stands after all rows."""
        return ""


# ---- for people -----------------------------------------------------------------------------------------------------

def test_name(row: Row) -> str:
    """Return llama-bench's name of a test, and of how many sequences: "pp512", "tg128 @ d512", "tg128 @ d512, 4 sequences"."""
    return _test_of_each(row) + _sequences(row)


def _sequences(row: Row) -> str:
    return f", {row['n_parallel']} sequences" if labels.is_of_several(row) else ""


def _test_of_each(row: Row) -> str:
    name = f"pp{row['n_prompt']}" if row["n_prompt"] else f"tg{row['n_gen']}"
    return f"{name} @ d{row['n_depth']}" if row["n_depth"] else name


def mode_name(row: Row) -> str:
    """Return who computes, with what tells two rows of one mode apart."""
    if row["mode"] == "paged":
        return f"paged {budget_label(row['budget'])}"
    if row["mode"] == "resident":
        return "resident, repacked" if row["repack"] else "resident"
    return f"stock, RA {number(row['read_ahead_kb'], ',')} KiB"


def _full_name(row: Row) -> str:
    """Return the same with the cap, where rows do not stand beside each other."""
    return mode_name(row) + (f", cap {_cap(row)}" if row["mode"] == "stock" else "")


def _speed(row: Row) -> str:
    if row["median_ts"] is None:
        return "-"
    text = f"{row['median_ts']:,.2f}"
    return text if len(row["samples_ts"]) < 2 else f"{text} ({row['min_ts']:,.2f} to {row['max_ts']:,.2f})"


def _joules(row: Row) -> str:
    joules = row["j_per_token"] if row["n_gen"] else row["j_per_prompt_token"]
    sign = "~" if row["energy_status"] == "modelled" else ""
    return "-" if joules is None else f"{sign}{joules:.3g}"


def _cap(row: Row) -> str:
    return "none" if row["cap_bytes"] is None else f"{row['cap_bytes'] / 1e9:.2f} GB"


def _megabytes(row: Row) -> str:
    n_bytes = row["read_bytes_per_token"] if row["read_bytes_per_token"] is not None else row["io_bytes_per_token"]
    return number(None if n_bytes is None else n_bytes / 1e6, ",.2f")


_COLUMNS: tuple[tuple[str, Callable[[Row], str], bool], ...] = (
    ("mode", mode_name, True),
    ("threads", lambda row: str(row["n_threads"]), False),
    ("batch", lambda row: str(row["n_batch"]), False),
    ("ubatch", lambda row: str(row["n_ubatch"]), False),
    ("cap", _cap, True),
    ("test", _test_of_each, True),
    ("parallel", lambda row: str(row["n_parallel"]), True),
    ("t/s", _speed, True),
    ("t/s each", lambda row: number(row["sequence_ts"], ",.2f"), True),
    ("over 1", lambda row: number(row["over_1"], ".2f"), True),
    ("union", lambda row: number(row["expert_union"], ".2f"), True),
    ("vs stock", lambda row: number(row["vs_stock"], ".2f"), True),
    ("limit", lambda row: number(row["limit_ts"], ",.2f"), True),
    ("eff.", lambda row: number(row["efficiency"], ".2f"), True),
    ("hits", lambda row: number(row["hit_rate"], ".1%"), True),
    ("MB/token", _megabytes, True),
    ("stalled", lambda row: number(row["stall_share"], ".0%"), True),
    ("RSS MB", lambda row: number(None if row["peak_rss_bytes"] is None else row["peak_rss_bytes"] / 1e6, ",.0f"), True),
    ("J/token", _joules, True),
    ("load s", lambda row: number(row["load_s"], ".1f"), True),
)
"""Head, cell, and whether it is shown even where all rows are alike."""

_OF_SEVERAL = ("parallel", "t/s each", "over 1", "union")
"""Not shown where all rows are of one sequence."""


class Table(Printer):
    """A table in Markdown, what must be known beside its numbers, and bars."""

    def rows(self, rows: Sequence[Row]) -> str:
        """Return a table of these rows with its bars."""
        if not rows:
            return ""
        return "\n".join([_heading(rows[0]), "", table(rows), "", *_notes(rows), "```", bars(rows), "```", ""])


def _heading(row: Row) -> str:
    size = row["model_size"]
    parts = [printable(row["model_type"] or row["model_filename"])]
    if size is not None:
        parts.append(f"{size / 1e9:.2f} GB, {row['model_n_params'] / 1e9:.2f} B parameters")
    bandwidth = row["device_bytes_per_s"]
    parts += [f"{row['n_threads']} threads", f"tokens: {printable(row['tokens'])}", f"page cache: {row['cache']}",
              f"device {bandwidth / 1e9:.2f} GB/s at best" if bandwidth is not None else "device not measured",
              f"median of {row['n_rounds']}" + (" with its range" if row["n_rounds"] > 1 else "")]
    return "; ".join(parts)


def table(rows: Sequence[Row]) -> str:
    """Return rows as a table in Markdown, numbers to the right; columns that say the same everywhere are left out."""
    columns = []
    has_several = any(map(labels.is_of_several, rows))
    for head, cell, is_always in _COLUMNS:
        if head in _OF_SEVERAL and not has_several:
            continue
        cells = [cell(row) for row in rows]
        if (is_always and any(text != "-" for text in cells)) or len(set(cells)) > 1:
            width = max(len(head), *(len(text) for text in cells))
            is_text = head in ("mode", "test")
            pad = str.ljust if is_text else str.rjust
            columns.append((pad(head, width), "-" * (width + 1) + ("-" if is_text else ":"),
                            [pad(text, width) for text in cells]))
    lines = ["| " + " | ".join(head for head, _, _ in columns) + " |", "|" + "|".join(rule for _, rule, _ in columns) + "|"]
    lines += ["| " + " | ".join(cells[i] for _, _, cells in columns) + " |" for i in range(len(rows))]
    return "\n".join(lines)


def _notes(rows: Sequence[Row]) -> list[str]:
    """Return what must be said beside the numbers, each thing once."""
    notes = [f"{_full_name(row)}, {test_name(row)}: {row['status']}: {as_options(row['status_reason'] or '')}"
             for row in rows if row["status"] != "ok"]
    notes += [f"cap: {'none' if row['cap'] == 'none' else _cap(row)}, {row['cap_reason']}" for row in rows
              if row["cap_reason"] and row["mode"] != "resident"]
    notes += [f"{mode_name(row)}, {test_name(row)}: vs stock is to {labels.rival(row)}" if row["vs_stock"] is not None
              else f"{mode_name(row)}, {test_name(row)}: not compared with stock: {row['vs_stock_reason']}"
              for row in rows if row["mode"] == "paged" and row["samples_ts"] and row["vs_stock_reason"] != UNASKED]
    notes += [f"{mode_name(row)}{_sequences(row)}: the logits of stock llama.cpp, to the bit, at the end of "
              f"{row['same_logits_rounds']} of {row['n_rounds']} rounds" for row in rows if row["same_logits"]]
    notes += [f"tokens: {row['tokens']} has fewer than needed and repeats" for row in rows if row["tokens_repeat"]]
    notes += [f"energy is {row['energy_status']}: {_short(row['energy_reason'] or row['energy_scope'])}" for row in rows
              if row["energy_status"] != "measured" and row["samples_ts"]]
    return [f"- {printable(note)}" for note in dict.fromkeys(notes)] + ([""] if notes else [])


def _short(text: str) -> str:
    return text if len(text) <= _NOTE_CHARS else f"{text[:_NOTE_CHARS].rstrip()} ... (all of it: gguf-pager energy)"


def bars(rows: Sequence[Row]) -> str:
    """Return a bar per row, those of one test at one scale."""
    lines = []
    names = [_full_name(row) + _sequences(row) for row in rows]
    width = max(map(len, names))
    for kind in ("n_prompt", "n_gen"):
        chosen = [(name, row) for name, row in zip(names, rows, strict=True) if row[kind]]
        most = max((row["median_ts"] or 0.0 for _, row in chosen), default=0.0)
        if chosen:
            lines.append("prefill, tok/s" if kind == "n_prompt" else "decode, tok/s")
        for name, row in chosen:
            speed = row["median_ts"]
            status = "" if row["status"] == "ok" else row["status"]
            value = f"{number(speed, ',.2f') if speed is not None else ''} {status}".strip()
            lines.append(f"  {name:{width}} {_bar(speed / most if speed is not None and most else 0.0)} {value}")
    return "\n".join(lines)


def _bar(share: float) -> str:
    eighths = round(share * _BAR_CELLS * 8)
    text = "█" * (eighths // 8) + (_BLOCKS[eighths % 8] if eighths % 8 else "")
    return text.ljust(_BAR_CELLS)


# ---- for machines ---------------------------------------------------------------------------------------------------

class Json(Printer):
    """An array of objects."""

    def head(self) -> str:
        """Return the bracket."""
        return "["

    def rows(self, rows: Sequence[Row]) -> str:
        """Return some more of its elements."""
        text = ",\n".join(json.dumps(row, indent=2) for row in rows)
        before = "" if self.is_first else ",\n"
        self.is_first = self.is_first and not rows
        return before + text if rows else ""

    def foot(self) -> str:
        """Return the other bracket."""
        return "]\n"


class JsonLines(Printer):
    """One object per line."""

    def rows(self, rows: Sequence[Row]) -> str:
        """Return a line per row."""
        return "".join(json.dumps(row) + "\n" for row in rows)


def _flat(row: Row) -> dict[str, Any]:
    """Return what fits into a table: as llama-bench does it without samples, and nested values as JSON.

    It may be shown in a terminal; JSON alone can hold what would steer one.
    """
    return {name: _cell(value) for name, value in row.items() if not name.startswith("samples_")}


def _cell(value: Any) -> Any:
    if isinstance(value, dict | list):
        return json.dumps(value)
    return printable(value) if isinstance(value, str) else value


class Csv(Printer):
    """A line of names before the first row; unknown is empty."""

    def rows(self, rows: Sequence[Row]) -> str:
        """Return a line per row."""
        out = io.StringIO()
        for row in map(_flat, rows):
            writer = csv.DictWriter(out, list(row))
            if self.is_first:
                writer.writeheader()
                self.is_first = False
            writer.writerow(row)
        return out.getvalue()


class Sql(Printer):
    """A table and its rows, for sqlite3."""

    def rows(self, rows: Sequence[Row]) -> str:
        """Return a statement per row, before the first one that makes the table."""
        lines = []
        for row in map(_flat, rows):
            if self.is_first:
                columns = ", ".join(f"{_name(name)} {_type(name, value)}" for name, value in row.items())
                lines.append(f"CREATE TABLE IF NOT EXISTS {SQL_TABLE} ({columns});")
                self.is_first = False
            lines.append(f"INSERT INTO {SQL_TABLE} ({', '.join(map(_name, row))}) "
                         f"VALUES ({', '.join(map(_literal, row.values()))});")
        return "".join(line + "\n" for line in lines)


def _name(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


_REAL = ("_ts", "_s", "_w", "_j", "_share", "_rate", "_low", "_high", "_per_token", "efficiency", "vs_", "_token", "over_1",
         "expert_union")


def _type(name: str, value: Any) -> str:
    """Return a column's type; by its name where the first row does not know the value."""
    if value is None:
        return "REAL" if any(part in name for part in _REAL) else "TEXT"
    return {bool: "INTEGER", int: "INTEGER", float: "REAL"}.get(type(value), "TEXT")


def _literal(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, int | float):
        return repr(value)
    return "'" + str(value).replace("'", "''") + "'"


PRINTERS: Mapping[str, Callable[[], Printer]] = {
    "md": Table, "csv": Csv, "json": Json, "jsonl": JsonLines, "sql": Sql,
}
