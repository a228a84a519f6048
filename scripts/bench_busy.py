"""Decode beside programs that spin: threads adapted, not adapted, and one thread, each in a process of its own, in turn.

    $ python scripts/make_trace_model.py models/qwen3-30b-16l.gguf --preset qwen3-30b-16l
    $ python scripts/bench_busy.py models/qwen3-30b-16l.gguf --before ../before/.venv/bin/python

One JSON line per run, then one per number of spinners with medians, and ratios to `fixed` (today's threads, not adapted) or,
with `--before` (the Python of another checkout's environment), to that. `settling_tokens_per_s` is of the tokens right after
the spinners have come, with what it takes to notice them; `tokens_per_s` of those that follow.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

N_WARM = 64  # tokens until the cache holds what it will
ARMS = ("adapted", "fixed", "one")


SPINNER = """import os
parent = os.getppid()
while os.getppid() == parent:
    for _ in range(1_000_000): pass
"""
"""A program that never waits; it ends with who has started it, were that killed."""


@contextmanager
def spinning(n: int) -> Iterator[None]:
    """Programs that never wait, meanwhile."""
    programs = [subprocess.Popen([sys.executable, "-c", SPINNER]) for _ in range(n)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Open, warm up, let the spinners come, decode. Of gguf_pager it uses what every commit has."""
    from gguf_pager import Llama

    n_threads = 1 if given.worker == "one" else given.threads
    options: dict[str, Any] = {"adapt_threads": False} if given.worker == "fixed" else {}
    llm = Llama(str(given.model), budget=given.budget, n_ctx=1024, n_threads=n_threads, n_threads_batch=n_threads,
                verbose=False, profile=False, **options)
    pager = llm.pager
    if pager is None:
        raise SystemExit(f"The model is not paged: {llm.not_paged_reason}.")
    pager.wait_present()
    at = int(llm.metadata["gguf_pager.trace.first_token"])
    used: Counter[int] = Counter()

    def decode(n_tokens: int) -> list[float]:
        nonlocal at
        times = []
        for _ in range(n_tokens):
            begun = time.perf_counter()
            llm.eval([at])
            times.append(time.perf_counter() - begun)
            used[getattr(pager, "n_threads", None) or n_threads] += 1
            at += 1
        return times

    decode(N_WARM)
    with spinning(given.spinners[0]):
        time.sleep(0.5)
        settling = decode(given.settle)
        before, _ = pager.stats(), used.clear()
        times = decode(given.tokens)
    after = pager.stats()
    return {
        "arm": given.worker, "spinners": given.spinners[0], "threads": n_threads, "tokens": given.tokens,
        "tokens_per_s": given.tokens / sum(times), "settling_tokens_per_s": given.settle / sum(settling),
        "median_ms": statistics.median(times) * 1e3, "tokens_by_threads": dict(used),
        "bytes_read_per_token": (after.bytes_read - before.bytes_read) / given.tokens,
        "stall_share": (after.stall_ns - before.stall_ns) / 1e9 / sum(times),
    }


def run(given: argparse.Namespace, arm: str, n_spinners: int) -> dict[str, Any]:
    """Return what a process of its own has measured."""
    python = given.before if arm == "before" else sys.executable
    command = [python, __file__, str(given.model), "--worker", arm, "--spinners", str(n_spinners), "--budget", given.budget,
               "--threads", str(given.threads), "--tokens", str(given.tokens), "--settle", str(given.settle)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout))


def main() -> None:
    """Take turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--before", metavar="PYTHON", help="of the environment of a checkout to compare with")
    parser.add_argument("--budget", default="50%")
    parser.add_argument("--processors", type=int, help="use so many; default: all")
    parser.add_argument("--threads", type=int, help="default: one per processor")
    parser.add_argument("--spinners", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--settle", type=int, default=32, help="tokens")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.processors:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given.processors])
    given.threads = given.threads or len(os.sched_getaffinity(0))
    if given.worker:
        print(json.dumps(measure(given)))
        return
    arms = (*(("before",) if given.before else ()), *ARMS)
    rows = []
    for turn in range(given.rounds):
        for n_spinners in given.spinners:
            for arm in arms[:: -1 if turn % 2 else 1]:
                rows.append(run(given, arm, n_spinners))
                print(json.dumps(rows[-1]), flush=True)
    for n_spinners in given.spinners:
        medians = {key: {arm: statistics.median(row[key] for row in rows if (row["arm"], row["spinners"]) == (arm, n_spinners))
                         for arm in arms} for key in ("tokens_per_s", "settling_tokens_per_s")}
        base = medians["tokens_per_s"]["before" if given.before else "fixed"]
        print(json.dumps({"spinners": n_spinners, **medians,
                          "ratios": {arm: value / base for arm, value in medians["tokens_per_s"].items()}}))


if __name__ == "__main__":
    main()
