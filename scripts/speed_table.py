"""Writes the README's speed table from the rows that scripts/compare.py printed; run it after adding rows.

    $ python scripts/compare.py models/qwen3-30b-16l.gguf --cap 2.1GB ... | grep '^{' >> benchmarks/results/MACHINE/compare.jsonl
    $ python scripts/speed_table.py

With --check it changes nothing and fails if the README is not what it would write.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- speed table: scripts/speed_table.py -->\n", "<!-- end of speed table -->\n"
FIGURES = (("decode_ts", "decode, tok/s", 1), ("prefill_ts", "prefill of 512 tokens, tok/s", 1),
           ("mb_per_token", "read while decoding, MB per token", 1),
           ("peak_rss_bytes", "peak RSS, MB", 1e-6), ("cap_peak_bytes", "peak of the capped group, MB", 1e-6))


def cell(result: dict[str, Any], key: str, mode: str, scale: float) -> str:
    """Return median and range of one figure."""
    values = [row[key] * scale for row in result["rows"] if row["mode"] == mode and row.get(key) is not None]
    return f"{statistics.median(values):,.1f} ({min(values):,.1f} to {max(values):,.1f})"


def table(results: list[dict[str, Any]]) -> str:
    """Return the table in Markdown: a line per figure and cap."""
    lines = ["| memory cap, read-ahead | | gguf_pager | stock, mmap | ratio |", "|---|---|---|---|---|"]
    for result in results:
        cap = f"{result['rows'][0]['cap_bytes'] / 1e9:.1f} GB, {result['read_ahead_kb']:,} KiB"
        for key, label, scale in FIGURES:
            if key in result["summary"]:
                ratio = result["summary"][key]["ratio"]
                cells = [cell(result, key, mode, scale) for mode in ("paged", "stock")]
                lines.append(f"| {cap} | {label} | {cells[0]} | {cells[1]} | {ratio:.2f} |")
                cap = ""
    return "\n".join(lines) + "\n"


def main() -> int:
    """Rewrite or check the README."""
    results = [json.loads(line) for path in sorted((ROOT / "benchmarks" / "results").glob("*/compare.jsonl"))
               for line in path.read_text().splitlines()]
    readme = ROOT / "README.md"
    before = readme.read_text()
    head, rest = before.split(BEGIN)
    after = head + BEGIN + table(results) + END + rest.split(END)[1]
    if "--check" in sys.argv:
        return int(after != before)
    readme.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
