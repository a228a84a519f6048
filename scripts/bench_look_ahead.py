"""Measure look-ahead: the same tokens by models that differ in nothing else, token by token in turn.

usage: python scripts/bench_look_ahead.py MODEL [--budget 25%] [--tokens 128] [--text FILE]

Each token is computed with every setting before the next one is, the order changing from
token to token: whatever else the machine does, it does to all of them. Prints a JSON line
per setting: the median and the mean time of a token, the median of its ratio to the first
setting's time for the same token, what was foreseen and what was read in vain per miss,
megabytes and milliseconds waited per token, and whether all logits were the first's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from gguf_pager import Llama
from gguf_pager.bench import tokens
from gguf_pager.doctor import physical_cores

SETTINGS: dict[str, Any] = {"off": False, "on": True, "auto": "auto"}


def logits_of(llm: Llama) -> bytes:
    """Return the logits of the token that was computed last."""
    return np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(llm.n_vocab(),)).tobytes()


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description="Measure look-ahead.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--budget", default="25%")
    parser.add_argument("--tokens", type=int, default=128, help="to be measured")
    parser.add_argument("--warm", type=int, default=64, help="tokens before them")
    parser.add_argument("--start", type=int, default=0, help="where in the text to begin")
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--text", type=Path)
    parser.add_argument("--settings", default="off,on,auto")
    options = parser.parse_args()
    names = options.settings.split(",")
    with contextlib.ExitStack() as stack:
        models = {name: stack.enter_context(Llama(
            str(options.model), budget=options.budget, look_ahead=SETTINGS[name], n_ctx=1024, verbose=False, profile=False,
            adapt_threads=False, n_threads=options.threads, n_threads_batch=options.threads)) for name in names}
        for name, figures in measure(models, options).items():
            print(json.dumps({"look_ahead": name, **figures}))


def measure(models: dict[str, Llama], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return the figures of each setting."""
    first = next(iter(models.values()))
    n_needed = options.start + options.warm + options.tokens
    source = tokens.choose_source(f"text:{options.text}" if options.text else None, first.metadata)
    ids = tokens.read_ids(source, first.metadata, first.n_vocab(), first.tokenize, 0, n_needed)[options.start : n_needed]
    if len(ids) < options.warm + options.tokens:
        sys.exit("bench_look_ahead: the text is too short")
    spent: dict[str, list[float]] = {name: [] for name in models}
    equal = dict.fromkeys(models, True)
    before = {}
    for at, token in enumerate(ids):
        if at == options.warm:
            before = {name: llm.pager.stats() for name, llm in models.items()}
        logits = {}
        order = list(models)
        for name in order[at % len(order) :] + order[: at % len(order)]:
            begun = time.perf_counter()
            models[name].eval([token])
            if at >= options.warm:
                spent[name].append(time.perf_counter() - begun)
            logits[name] = logits_of(models[name])
        for name in models:
            equal[name] &= logits[name] == logits[order[0]]
    return {name: figures_of(llm, before[name], spent[name], spent[order[0]]) | {"same_logits": equal[name]}
            for name, llm in models.items()}


def figures_of(llm: Llama, before: Any, spent: list[float], firsts: list[float]) -> dict[str, Any]:
    """Return one setting's figures."""
    now, n = llm.pager.stats(), len(spent)
    misses = max(1, now.misses - before.misses)
    return {
        "median_ms": round(1e3 * statistics.median(spent), 2),
        "mean_ms": round(1e3 * statistics.mean(spent), 2),
        "speed_ratio": round(statistics.median(first / own for first, own in zip(firsts, spent, strict=True)), 3),
        "speed_ratio_of_means": round(sum(firsts) / sum(spent), 3),
        "misses_per_token": round(misses / n, 1),
        "foreseen_per_miss": round((now.foreseen - before.foreseen) / misses, 3),
        "in_vain_per_miss": round((now.in_vain - before.in_vain) / misses, 3),
        "mb_per_token": round((now.bytes_read - before.bytes_read) / n / 1e6, 1),
        "stall_ms": round((now.stall_ns - before.stall_ns) / n / 1e6, 2),
        "layers": now.look_ahead,
    }


if __name__ == "__main__":
    main()
