"""Writes the speed tables and the README's picture from the rows that `gguf-pager bench` has recorded; run it after adding rows.

    $ gguf-pager bench MODEL ... -o jsonl > benchmarks/results/MACHINE/MODEL.jsonl
    $ python scripts/speed_table.py

The README gets a short table and docs/speed.svg, benchmarks/README.md all columns. With --check it changes nothing and fails if
something is not what it would write.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from gguf_pager.report import number

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- speed tables: scripts/speed_table.py -->\n", "<!-- end of speed tables -->\n"
SHOWN = (("xeon-2core-24gb", "qwen3-30b-16l", "Qwen3-30B-A3B's shape, 16 of its 48 layers, Q4_K"),
         ("xeon-2core-24gb", "gpt-oss-20b-12l", "gpt-oss-20b's shape, 12 of its 24 layers, MXFP4"))
"""Machine, model, and what it is."""

SHORT_HEAD = ("| model | memory | answer, tok/s | plain llama.cpp | prompt, tok/s | plain llama.cpp |\n"
              "|---|---|---|---|---|---|\n")

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
    stock = stock_of(row, rows)
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


def stock_of(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return stock's row in the same memory, at the best of its read-aheads."""
    same = [other for other in rows if other["mode"] == "stock" and other["cap_bytes"] == row["cap_bytes"]
            and (other["n_prompt"], other["n_gen"]) == (row["n_prompt"], row["n_gen"])]
    if not same or row["cap_bytes"] is None:
        raise SystemExit(f"{row['budget']}: the README shows rows with a cap and stock beside them")
    return max(same, key=lambda other: other["median_ts"] or 0.0)


def short_lines(name: str, rows: list[dict[str, Any]]) -> str:
    """Return a model's rows of the README's table, below the model's size."""
    lines = []
    paged = [row for row in rows if row["mode"] == "paged" and row["budget"] != "100%"]
    for budget in dict.fromkeys(row["budget"] for row in paged):
        prompt, answer = sorted((row for row in paged if row["budget"] == budget), key=lambda row: int(row["n_gen"]))
        cells = [f"{name}, {answer['model_size'] / 1e9:.1f} GB", f"{answer['cap_bytes'] / 1e9:.1f} GB"]
        for row in (answer, prompt):
            stock = stock_of(row, rows)
            cells += [f"**{row['median_ts']:,.1f}**", f"{stock['median_ts']:,.1f}"]
        lines.append("| " + " | ".join(cells) + " |\n")
    return "".join(lines)


def picture(rows: list[dict[str, Any]]) -> str:
    """Return bars of decode speed: plain llama.cpp and ours in the same memory, and the whole model in RAM."""
    decode = [row for row in rows if row["mode"] == "paged" and row["n_gen"] and row["budget"] in ("25%", "50%")]
    whole = next(row for row in rows if row["mode"] == "resident" and row["n_gen"] and not row["repack"])
    bars = []
    for row in decode:
        gigabytes = f"{row['cap_bytes'] / 1e9:.1f} GB of memory"
        bars += [(f"plain llama.cpp, {gigabytes}", stock_of(row, rows)["median_ts"], "plain"),
                 (f"gguf_pager, {gigabytes}", row["median_ts"], "ours")]
    bars.append(("all of it in memory", whole["median_ts"], "whole"))
    longest, lines = max(speed for _, speed, _ in bars), []
    for i, (label, value, kind) in enumerate(bars):
        y = 62 + 34 * i + 12 * (i // 2)
        width = 330 * value / longest
        lines.append(f'<text x="268" y="{y + 16}" text-anchor="end">{label}</text>\n'
                     f'<rect class="{kind}" x="280" y="{y}" width="{width:.0f}" height="22" rx="3"/>\n'
                     f'<text class="value" x="{288 + width:.0f}" y="{y + 16}">{value:.1f}</text>')
    height = 62 + 34 * len(bars) + 12 * ((len(bars) - 1) // 2) + 26
    size = f"{decode[0]['model_size'] / 1e9:.1f} GB"
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 680 {height}" role="img" aria-label="tokens per second">
<style>
text {{ font: 14px system-ui, sans-serif; fill: #24292f }} .value {{ font-weight: 600 }} .title {{ font-size: 16px; font-weight: 600 }}
.small {{ font-size: 12px; fill: #57606a }} .plain {{ fill: #8c959f }} .ours {{ fill: #0969da }} .whole {{ fill: #afb8c1 }}
@media (prefers-color-scheme: dark) {{ text {{ fill: #e6edf3 }} .small {{ fill: #9198a1 }} .plain {{ fill: #6e7681 }}
.ours {{ fill: #4493f8 }} .whole {{ fill: #484f58 }} }}
</style>
<text class="title" x="20" y="28">Tokens per second, a model of {size} in less memory</text>
<text class="small" x="20" y="48">Qwen3-30B-A3B's shape, 16 of 48 layers, Q4_K, 2 CPU cores, {decode[0]['test_time'][:10]}</text>
{chr(10).join(lines)}
<text class="small" x="20" y="{height - 10}">gguf-pager bench MODEL --budget 25%,50% --baseline stock,resident --read-ahead 128,8192</text>
</svg>
"""


def replaced(path: Path, text: str) -> str:
    """Return a file with a text between the marks."""
    head, rest = path.read_text().split(BEGIN)
    return head + BEGIN + text + END + rest.split(END)[1]


def main() -> int:
    """Write everything, or check it."""
    found = {name: [json.loads(text) for text in
                    (ROOT / "benchmarks" / "results" / machine / f"{model}.jsonl").read_text().splitlines()]
             for machine, model, name in SHOWN}
    readme, details, svg = ROOT / "README.md", ROOT / "benchmarks" / "README.md", ROOT / "docs" / "speed.svg"
    short = SHORT_HEAD + "".join(short_lines(name, rows) for name, rows in found.items())
    wanted = {readme: replaced(readme, short), svg: picture(next(iter(found.values()))),
              details: replaced(details, "\n".join(table(name, rows) for name, rows in found.items()))}
    if "--check" in sys.argv:
        return int(any(not path.exists() or path.read_text() != text for path, text in wanted.items()))
    for path, text in wanted.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
