"""Draw the time line of a layer: when its reads begin, when the last of them has come, when the layer ends.

usage: sudo python scripts/layer_timeline.py MODEL --budget 25% --look-ahead on

Linux, as root, with tracefs mounted: the kernel notes when a read begins and has come, and
when a wave begins (the router has chosen) and ends (the layer's experts are computed).
Prints medians over all layers that had to wait for at least one read, in microseconds from
the moment the router had chosen, and how busy the disk was.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

from gguf_pager import Llama, _native
from gguf_pager.bench import tokens
from gguf_pager.doctor import physical_cores

TRACING = Path("/sys/kernel/tracing")
PROBES = {"wave_begin": "gp_wave_begin", "wave_end": "gp_wave_end", "foretold": "gp_look_ahead_begin"}
EVENTS = ("block/block_rq_issue", "block/block_rq_complete", *(f"gguf_pager/{name}" for name in PROBES))
READ = re.compile(r" RA?S? .*\(\) (\d+ \+ \d+) ")
LINE = re.compile(r"-(\d+)\s+\[\d+\].*?\s(\d+\.\d+): (\w+): (.*)")


def main() -> None:
    """Parse the command line, trace, and print."""
    parser = argparse.ArgumentParser(description="Draw the time line of a layer.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--budget", default="25%")
    parser.add_argument("--look-ahead", choices=("on", "off"), default="off")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--warm", type=int, default=64)
    parser.add_argument("--threads", type=int, default=physical_cores())
    options = parser.parse_args()
    if not (TRACING / "uprobe_events").exists():
        sys.exit(f"layer_timeline: mount tracefs at {TRACING} first, as root")
    with Llama(str(options.model), budget=options.budget, look_ahead=options.look_ahead == "on", n_ctx=1024, verbose=False,
               profile=False, adapt_threads=False, n_threads=options.threads) as llm:
        source = tokens.choose_source(None, llm.metadata)
        ids = tokens.read_ids(source, llm.metadata, llm.n_vocab(), llm.tokenize, 0, options.warm + options.tokens)
        for token in ids[: options.warm]:
            llm.eval([token])
        begin_tracing()
        try:
            for token in ids[options.warm : options.warm + options.tokens]:
                llm.eval([token])
        finally:
            noted = end_tracing()
        n_layers = len(llm.pager.layout.layers)
    print(json.dumps({"look_ahead": options.look_ahead, "budget": options.budget, **summary(noted, n_layers)}))


def begin_tracing() -> None:
    """Place the probes and begin to note."""
    (TRACING / "tracing_on").write_text("0")
    (TRACING / "trace_clock").write_text("mono")
    (TRACING / "buffer_size_kb").write_text("65536")
    (TRACING / "trace").write_text("")
    library = Path(_native.__file__).resolve()
    symbols = subprocess.run(["nm", str(library)], capture_output=True, text=True, check=True).stdout
    probes = []
    for name, function in PROBES.items():
        address = int(next(line.split()[0] for line in symbols.splitlines() if line.endswith(f" {function}")), 16)
        probes.append(f"p:gguf_pager/{name} {library}:{address:#x}\n")
    (TRACING / "uprobe_events").write_text("".join(probes))
    for event in EVENTS:
        (TRACING / "events" / event / "enable").write_text("1")
    (TRACING / "tracing_on").write_text("1")


def end_tracing() -> list[tuple[float, str, str]]:
    """Take the probes away; return what was noted of this process and the disk: seconds, event, its words."""
    (TRACING / "tracing_on").write_text("0")
    for event in EVENTS:
        (TRACING / "events" / event / "enable").write_text("0")
    noted: list[tuple[float, str, str]] = []
    for line in (TRACING / "trace").read_text().splitlines():
        found = LINE.search(line)
        if found:
            noted.append((float(found[2]), found[3], found[4]))
    (TRACING / "uprobe_events").write_text("")
    return noted


def summary(noted: list[tuple[float, str, str]], n_layers: int) -> dict[str, Any]:
    """Return the medians. A layer goes from its router's choice to the next one's."""
    begins = [at for at, event, _ in noted if event == "wave_begin"]
    ends = [at for at, event, _ in noted if event == "wave_end"]
    busy, issued, come = requests(noted)
    foretold = [at for at, event, _ in noted if event == "foretold"]
    first, asked, last, ended, nexts, before, during, between = [], [], [], [], [], [], [], []
    for at, (begin, after) in enumerate(pairwise(begins)):
        if at % n_layers == n_layers - 1:
            continue  # the next layer is the next token's first
        end = next((moment for moment in ends if begin < moment < after), None)
        if end is None:
            continue
        arrived = [moment for moment in come if begin < moment < end]
        if not arrived:
            continue
        first += [moment - begin for moment in issued if begin < moment < end][:1]
        asked += [moment - begin for moment in foretold if begin < moment < after][:1]
        last.append(arrived[-1] - begin)
        ended.append(end - begin)
        nexts.append(after - begin)
        before.append(overlap(busy, begin - 300e-6, begin) / 300e-6)
        during.append(overlap(busy, begin, end) / (end - begin))
        between.append(overlap(busy, end, after) / (after - end))
    whole = begins[-1] - begins[0]

    def micros(values: list[float]) -> int | None:
        return round(1e6 * statistics.median(values)) if values else None

    return {
        "layers": len(last), "own_reads_begin_us": micros(first), "next_is_foretold_us": micros(asked), "last_read_has_come_us": micros(last),
        "layer_ends_us": micros(ended), "next_router_us": micros(nexts),
        "disk_busy_before_router": round(statistics.mean(before), 2), "disk_busy_router_to_end": round(statistics.mean(during), 2),
        "disk_busy_end_to_next_router": round(statistics.mean(between), 2),
        "disk_busy": round(sum(end - begin for begin, end in busy) / whole, 2),
        "ms_per_token": round(1e3 * whole / (len(begins) - 1) * n_layers, 2),
    }


def requests(noted: list[tuple[float, str, str]]) -> tuple[list[tuple[float, float]], list[float], list[float]]:
    """Return when any read was on its way, and when each began and had come.

    A request that the device has no room for is issued again; what counts is the first time.
    """
    on_its_way: set[str] = set()
    busy, issued, come, since = [], [], [], 0.0
    for at, event, words in noted:
        found = READ.search(words)
        if found is None:
            continue
        if event == "block_rq_issue" and found[1] not in on_its_way:
            since = since if on_its_way else at
            on_its_way.add(found[1])
            issued.append(at)
        elif event == "block_rq_complete" and found[1] in on_its_way:
            on_its_way.discard(found[1])
            come.append(at)
            if not on_its_way:
                busy.append((since, at))
    return busy, issued, come


def overlap(busy: list[tuple[float, float]], begin: float, end: float) -> float:
    """Return how much of a time anything was on its way."""
    return sum(max(0.0, min(end, b) - max(begin, a)) for a, b in busy)


if __name__ == "__main__":
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    main()
