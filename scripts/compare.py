"""Times gguf_pager against stock llama-cpp-python: same model, same memory cap, in turn, each run in its own process.

    $ python scripts/compare.py models/qwen3-30b-16l.gguf --cap 2.1GB --read-ahead 128 --rounds 3

Stock is given its best: weights are left in the file's mapping (its default repacking would copy them into memory that
the cap does not have), and `--read-ahead 128` sets the device's read-ahead to the Linux default where that is permitted.
The model is read once before, past the page cache,
and every run starts with it dropped from there. The last line is JSON with all samples.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import resource
import signal
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from gguf_pager import engine, probe
from gguf_pager.budget import format_bytes, parse_budget
from gguf_pager.cap import drop_from_page_cache, memory_cap, read_ahead
from gguf_pager.layout import read_layout


def trace_tokens(values: dict[str, Any], n_tokens: int, start: int) -> list[int]:
    """Return ids of a trace-driven model's own sequence; of another model, ids that any vocabulary has."""
    first = values.get("gguf_pager.trace.first_token")
    if first is None:
        return [5 + (start + i) * 7919 % 200 for i in range(n_tokens)]
    positions = int(values["gguf_pager.trace.positions"])
    return [int(first) + (start + i) % positions for i in range(n_tokens)]


def read_io_bytes() -> int | None:
    """Return what this process has caused to be read from storage."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def peak_rss_bytes() -> int:
    """Return the most memory this process ever had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def recite(llm: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Continue a prompt greedily; return the text and what it took."""
    pieces, first_token_s = [], None
    begun = time.monotonic()
    for chunk in llm.create_completion(arguments.prompt, max_tokens=arguments.n_gen, temperature=0, stream=True):
        if first_token_s is None:
            first_token_s = time.monotonic() - begun
            stats = llm.pager.stats() if getattr(llm, "pager", None) else None
        pieces.append(chunk["choices"][0]["text"])
    seconds = time.monotonic() - begun - (first_token_s or 0)
    result: dict[str, Any] = {
        "text": "".join(pieces), "first_token_s": first_token_s, "decode_ts": (len(pieces) - 1) / seconds,
    }
    if stats is not None:
        now = llm.pager.stats()
        wanted = now.hits + now.misses - stats.hits - stats.misses
        result["hit_rate"] = (now.hits - stats.hits) / wanted if wanted else None
        result["stall_share"] = (now.stall_ns - stats.stall_ns) / 1e9 / seconds
    result["peak_rss_bytes"] = peak_rss_bytes()
    llm.close()
    return result


def run_once(arguments: argparse.Namespace) -> dict[str, Any]:
    """Load, prefill and decode in this process; return what was measured."""
    started = time.monotonic()
    engine.load()  # libgomp's spin limit holds for both
    from llama_cpp import Llama as Stock
    from llama_cpp import llama_cpp as low

    from gguf_pager import Llama

    values = read_layout(arguments.model).values
    common = {
        "model_path": str(arguments.model), "n_ctx": arguments.n_prompt + arguments.n_skip + arguments.n_gen + 64,
        "n_batch": 512, "n_ubatch": arguments.ubatch, "n_threads": arguments.threads,
        "n_threads_batch": arguments.threads, "verbose": False,
    }
    if arguments.mode == "paged":
        llm = Llama(**common, budget=arguments.budget)
    else:
        load = low.llama_model_load_from_file

        def load_unpacked(path: bytes, params: Any, /) -> Any:
            params.use_extra_bufts = False
            return load(path, params)

        low.llama_model_load_from_file = load_unpacked
        llm = Stock(**common)
        low.llama_model_load_from_file = load
    load_s = time.monotonic() - started

    if arguments.prompt:
        return {"mode": arguments.mode, "load_s": load_s, **recite(llm, arguments)}
    tokens = trace_tokens(values, arguments.n_prompt + arguments.n_skip + arguments.n_gen, arguments.start)
    result: dict[str, Any] = {"mode": arguments.mode, "load_s": load_s}
    if arguments.n_prompt:
        begun = time.monotonic()
        llm.eval(tokens[: arguments.n_prompt])
        result["prefill_ts"] = arguments.n_prompt / (time.monotonic() - begun)
    for token in tokens[arguments.n_prompt : arguments.n_prompt + arguments.n_skip]:
        llm.eval([token])
    pager = getattr(llm, "pager", None)
    stats = pager.stats() if pager else None
    io_before, cpu_before, begun = read_io_bytes(), resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
    for token in tokens[arguments.n_prompt + arguments.n_skip :]:
        llm.eval([token])
    seconds = time.monotonic() - begun
    cpu = resource.getrusage(resource.RUSAGE_SELF)
    if arguments.n_gen:
        n = arguments.n_gen
        result["decode_ts"] = n / seconds
        io_after = read_io_bytes()
        result["mb_per_token"] = (io_after - io_before) / n / 1e6 if io_before is not None and io_after else None
        result["cpu_s_per_token"] = (cpu.ru_utime + cpu.ru_stime - cpu_before.ru_utime - cpu_before.ru_stime) / n
        if pager is not None and stats is not None:
            now = pager.stats()
            wanted = now.hits + now.misses - stats.hits - stats.misses
            result["hit_rate"] = (now.hits - stats.hits) / wanted if wanted else None
            result["stall_share"] = (now.stall_ns - stats.stall_ns) / 1e9 / seconds
            result["left_alone"] = now.left_alone
            result["arena_bytes"] = now.arena_bytes
    result["peak_rss_bytes"] = peak_rss_bytes()
    llm.close()
    return result


def read_through(path: Path) -> float | None:
    """Read a file once, past the page cache; return the bandwidth in bytes per second, None where it cannot be done.

    Some disks, those of virtual machines above all, keep what was read lately: without this whoever runs first loses.
    """
    direct = getattr(os, "O_DIRECT", 0)
    try:
        file = os.open(path, os.O_RDONLY | direct)
    except OSError:
        return None
    try:
        buffer = mmap.mmap(-1, 8 << 20)
        at, begun = 0, time.monotonic()
        while got := os.preadv(file, [buffer], at):
            at += got
            if got % mmap.PAGESIZE:
                break
        return at / (time.monotonic() - begun)
    except OSError:
        return None
    finally:
        os.close(file)


def run_child(arguments: argparse.Namespace, mode: str, start: int) -> dict[str, Any]:
    """Run one mode in a process of its own under the cap."""
    cap_bytes = int(parse_budget(arguments.cap).value or 0) if arguments.cap else None
    drop_from_page_cache(read_layout(arguments.model).paths)
    command = [sys.executable, str(Path(__file__).resolve()), str(arguments.model), "--mode", mode]
    for name in ("budget", "n_prompt", "n_skip", "n_gen", "threads", "ubatch"):
        command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    command += ["--start", str(start)] + (["--prompt", arguments.prompt] if arguments.prompt else [])
    with memory_cap(cap_bytes) as cap:
        done = subprocess.run(cap.command(command), capture_output=True, text=True, timeout=arguments.timeout,
                              check=False)
        peak = cap.peak_bytes()
    if done.returncode != 0:
        return {"mode": mode, "error": f"exit {done.returncode}: {done.stderr.strip()[-300:]}"}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return {**result, "cap": cap.method, "cap_bytes": cap.limit_bytes, "cap_reason": cap.reason, "cap_peak_bytes": peak}


def show(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Print one line per figure, paged beside stock, and return the medians and ratios."""
    ok = {mode: [row for row in rows if row["mode"] == mode and "error" not in row] for mode in ("paged", "stock")}
    summary: dict[str, Any] = {}
    figures = (("load_s", "load, s", 1), ("first_token_s", "prompt to first token, s", 1), ("prefill_ts", "prefill, tok/s", 1), ("decode_ts", "decode, tok/s", 1),
               ("mb_per_token", "read, MB per token", 1), ("cpu_s_per_token", "CPU, ms per token", 1e3),
               ("hit_rate", "hits, %", 100), ("stall_share", "stalled, %", 100),
               ("peak_rss_bytes", "peak RSS, MB", 1e-6), ("cap_peak_bytes", "peak of the capped group, MB", 1e-6))
    print(f"{'':30}{'gguf_pager':>26}{'stock mmap':>26}{'ratio':>8}")
    for key, label, scale in figures:
        cells, medians = [], {}
        for mode in ("paged", "stock"):
            values = [row[key] * scale for row in ok[mode] if row.get(key) is not None]
            if values:
                medians[mode] = statistics.median(values)
                span = f" ({min(values):,.2f}-{max(values):,.2f})" if len(values) > 1 else ""
                cells.append(f"{medians[mode]:,.2f}{span}")
            else:
                cells.append("-")
        if not medians:
            continue
        ratio = medians["paged"] / medians["stock"] if len(medians) == 2 and medians["stock"] else None
        print(f"{label:30}{cells[0]:>26}{cells[1]:>26}{f'{ratio:.2f}' if ratio is not None else '':>8}")
        summary[key] = {**medians, "ratio": ratio}
    for row in rows:
        if "error" in row:
            print(f"{row['mode']}: {row['error']}", file=sys.stderr)
    return summary


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--cap", help="memory cap for both, such as 2.1GB; none without it")
    parser.add_argument("--budget", help="gguf_pager's budget; the cap without it, or 25%%")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--n-prompt", type=int, default=0, help="tokens of prompt, in batches of 512")
    parser.add_argument("--n-skip", type=int, default=64, help="tokens decoded before the clock starts")
    parser.add_argument("--n-gen", type=int, default=192, help="tokens decoded and timed")
    parser.add_argument("--prompt", help="continue this text greedily instead, and compare the texts")
    parser.add_argument("--ubatch", type=int, default=512)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    parser.add_argument("--read-ahead", type=int, help="KiB of the device's read-ahead, restored afterwards")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one run")
    parser.add_argument("--start", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--mode", choices=("paged", "stock"), help="run one in this process and print JSON")
    arguments = parser.parse_args()
    arguments.budget = arguments.budget or arguments.cap or "25%"
    if arguments.mode:
        print(json.dumps(run_once(arguments)))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that read-ahead and cgroup are restored then, too
    print("reading the model once, for both ...", file=sys.stderr)
    bandwidths = [read_through(path) for path in read_layout(arguments.model).paths]
    setting = probe.read_ahead_setting(arguments.model)
    rows = []
    with read_ahead(setting, arguments.read_ahead) if arguments.read_ahead else nullcontext(probe.read_ahead_kb(arguments.model)) as kb:
        for turn in range(arguments.rounds):
            for mode in ("paged", "stock"):
                print(f"round {turn + 1} of {arguments.rounds}: {mode} ...", file=sys.stderr)
                rows.append(run_child(arguments, mode, turn * 100))
    disk = f"disk {bandwidths[0] / 1e9:.2f} GB/s in one stream" if bandwidths[0] else "disk unknown"
    first = next((row for row in rows if "error" not in row), {})
    cap = f"{format_bytes(first['cap_bytes'])} by {first['cap']}" if first.get("cap_bytes") else f"none ({first.get('cap_reason')})"
    texts = {row["text"] for row in rows if "text" in row}
    if texts:
        print(f"{arguments.prompt}{next(iter(texts))}\n")
        print("Both wrote this text." if len(texts) == 1 else "THE TEXTS DIFFER: please report this.")
        print()
    print(f"{arguments.model.name}: cap {cap}, read-ahead {kb} KiB, {arguments.threads} threads, "
          f"{disk}, "
          f"{f'median (range) of {arguments.rounds}' if arguments.rounds > 1 else 'one run'}")
    summary = show(rows)
    print(json.dumps({"model": arguments.model.name, "read_ahead_kb": kb, "stream_bytes_per_s": bandwidths[0], "rows": rows, "summary": summary}))


if __name__ == "__main__":
    main()
