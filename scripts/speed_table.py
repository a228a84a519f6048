"""Writes the README's speed tables from the rows that `gguf-pager bench` has recorded; run it after adding rows.

    $ gguf-pager bench MODEL ... -o jsonl > benchmarks/results/MACHINE/MODEL.jsonl
    $ python scripts/speed_table.py

With --check it changes nothing and fails if the README is not what it would write.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from gguf_pager.report import number

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- speed tables: scripts/speed_table.py -->\n", "<!-- end of speed tables -->\n"
SHOWN = (("epyc-2core-24gb", "qwen3-30b-16l", "Qwen3-30B-A3B's shape, 16 of its 48 layers, Q4_K"),
         ("epyc-2core-24gb", "gpt-oss-20b-12l", "gpt-oss-20b's shape, 12 of its 24 layers, MXFP4"))
"""Machine, model, and what it is."""

HEAD = ("| memory | test | gguf_pager, tok/s | stock mmap, tok/s | ratio | hits | MB per token, ours / stock | of limit "
        "| J per token, ours / stock |\n|---|---|---|---|---|---|---|---|---|\n")


def speed(row: dict[str, Any]) -> str:
    """Return median and range; of a row that is not "ok" its status."""
    if row["median_ts"] is None:
        return str(row["status"])
    status = "" if row["status"] == "ok" else f", {row['status']}"
    return f"{row['median_ts']:,.1f} ({row['min_ts']:,.1f} to {row['max_ts']:,.1f}){status}"


def test_name(row: dict[str, Any]) -> str:
    """Return what was measured."""
    return f"prefill of {row['n_prompt']}" if row["n_prompt"] else f"decode of {row['n_gen']}"


def megabytes(row: dict[str, Any]) -> str:
    """Return what the process had the system read."""
    return number(None if row["io_bytes_per_token"] is None else row["io_bytes_per_token"] / 1e6, ",.1f")


def joules(row: dict[str, Any]) -> str:
    """Return joules per token, marked where they are modelled."""
    value = row["j_per_token"] if row["n_gen"] else row["j_per_prompt_token"]
    return ("~" if row["energy_status"] == "modelled" else "") + number(value, ".2g")


def line(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Return ours beside stock at the best of its read-aheads, in the same memory."""
    same = [other for other in rows if other["mode"] == "stock" and other["cap_bytes"] == row["cap_bytes"]
            and (other["n_prompt"], other["n_gen"]) == (row["n_prompt"], row["n_gen"])]
    if not same or row["cap_bytes"] is None:
        raise SystemExit(f"{row['budget']}: the README shows rows with a cap and stock beside them")
    stock = max(same, key=lambda other: other["median_ts"] or 0.0)
    memory = f"{row['cap_bytes'] / 1e9:.2f} GB, {row['budget']}" if row["n_gen"] else ""
    ratio = f"**{number(row['vs_stock'], '.2f')}** ({number(row['vs_stock_low'], '.2f')} to {number(row['vs_stock_high'], '.2f')})"
    cells = [memory, test_name(row), speed(row), f"{speed(stock)} at {stock['read_ahead_kb']:,} KiB", ratio,
             number(row["hit_rate"], ".0%"), f"{megabytes(row)} / {megabytes(stock)}", number(row["efficiency"], ".2f"),
             f"{joules(row)} / {joules(stock)}"]
    return "| " + " | ".join(cells) + " |\n"


def table(name: str, rows: list[dict[str, Any]]) -> str:
    """Return a model's table in Markdown, decode first in each memory."""
    paged = [row for row in rows if row["mode"] == "paged"]
    first = paged[0]
    whole = ", ".join(f"{test_name(row)} {speed(row)}" for row in rows if row["mode"] == "resident" and not row["repack"])
    late = sorted({f"{row['read_ahead_kb']:,} KiB in {row['cap_bytes'] / 1e9:.2f} GB" for row in rows
                   if row["mode"] == "stock" and row["n_gen"] and row["status"] == "timeout"})
    return (
        f"**{name}** ({first['model_size'] / 1e9:.1f} GB), {first['cpu_info']}, {first['n_threads']} threads, "
        f"{first['test_time'][:10]}, "
        f"device at best {first['device_bytes_per_s'] / 1e9:.1f} GB/s, median (range) of {first['n_rounds']}:\n\n" + HEAD
        + "".join(line(row, rows) for budget in dict.fromkeys(row["budget"] for row in paged)
                  for row in sorted((row for row in paged if row["budget"] == budget), key=lambda row: -row["n_gen"]))
        + f"\nThe whole model in RAM with the same kernels: {whole}, tok/s."
        + (f" Stock did not end its decode in time with a read-ahead of {', '.join(late)}." if late else "") + "\n"
    )


def main() -> int:
    """Rewrite or check the README."""
    tables = []
    for machine, model, name in SHOWN:
        path = ROOT / "benchmarks" / "results" / machine / f"{model}.jsonl"
        tables.append(table(name, [json.loads(text) for text in path.read_text().splitlines()]))
    readme = ROOT / "README.md"
    before = readme.read_text()
    head, rest = before.split(BEGIN)
    after = head + BEGIN + "\n".join(tables) + END + rest.split(END)[1]
    if "--check" in sys.argv:
        return int(after != before)
    readme.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
