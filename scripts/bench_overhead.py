"""Measures what `gguf-pager bench` itself costs: its loop over tokens against a bare one, block by block in turn.

    $ python scripts/bench_overhead.py models/qwen3-30b-16l.gguf --budget 50%
    bench 57.21 ms per token, bare 57.19 ms: ratio 1.0003 (median of 40 pairs of blocks; quartiles 0.9961 to 1.0052)
    bookkeeping alone: 21 us per token, 0.04 % of a token

The first line compares two loops on a noisy machine; the second times only what bench adds to a token, without a model's.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

from gguf_pager.bench import worker
from gguf_pager.bench.cases import Shape
from gguf_pager.model.layout import read_layout


def main() -> None:
    """Load once, then take turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--budget", default="50%")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--block", type=int, default=16, help="tokens")
    arguments = parser.parse_args()
    layout = read_layout(arguments.model)
    shape = Shape(0, arguments.block, 0, arguments.threads, 512, 512)
    task = worker.Task(str(arguments.model), "paged", shape, False, arguments.budget, {}, False, False, "trace", 0, 1, None,
                       None, "not asked for", os.getppid(), time.monotonic_ns())
    llm = worker.open_model(task)
    run = worker.Run(task, llm, layout)
    tokens = list(range(first := int(layout.values["gguf_pager.trace.first_token"]), first + arguments.block))

    def bare() -> None:
        for token in tokens:
            llm.eval([token])

    for loop in (bare, run.decode):  # the experts of these tokens come
        llm.reset()
        loop()
    times: dict[str, list[float]] = {"bench": [], "bare": []}
    for turn in range(arguments.pairs):
        for name, loop in (("bench", run.decode), ("bare", bare))[:: 1 if turn % 2 else -1]:
            llm.reset()
            begun = time.perf_counter()
            loop()
            times[name].append((time.perf_counter() - begun) / arguments.block)
    ratios = [ours / theirs for ours, theirs in zip(times["bench"], times["bare"], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    bench_s, bare_s = (statistics.median(times[name]) for name in ("bench", "bare"))
    print(f"bench {bench_s * 1e3:.2f} ms per token, bare {bare_s * 1e3:.2f} ms: ratio {statistics.median(ratios):.4f} "
          f"(median of {len(ratios)} pairs of blocks; quartiles {low:.4f} to {high:.4f})")

    llm.eval = lambda _: None  # what is left is the bookkeeping
    many = run.decode()
    begun = time.perf_counter()
    for _ in range(200):
        run.decode()
    extra_s = (time.perf_counter() - begun) / 200 / many.n_tokens
    print(f"bookkeeping alone: {extra_s * 1e6:.0f} us per token, {extra_s / bare_s:.2%} of a token")


if __name__ == "__main__":
    main()
