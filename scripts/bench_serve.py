"""What the server costs and gives: `python scripts/bench_serve.py MODEL [--budget 25%] [--rounds 3]`; nothing else should run.

Prints a line of JSON per figure:

- `overhead`: time per token of one client's stream over that of `Llama` in-process, same prompt, same tokens, in turn;
- `parallel`: tokens per second of four clients at once over one client's;
- `second_turn`: time to the first token of a second turn of a conversation of about 2,000 tokens, over that of computing all of it: from
  memory, and after a restart.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import httpx
from serving import Server

IN_PROCESS = """
import json, sys, time
from gguf_pager import Llama
path, budget, tokens, n = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
llm = Llama(path, budget=budget, n_ctx=4096, n_batch=512, verbose=False, n_threads=int(sys.argv[5]), n_threads_batch=int(sys.argv[5]))
for turn in range(2):
    times = []
    for _ in llm.create_completion(tokens, max_tokens=n, temperature=0, stream=True, logit_bias=json.loads(sys.argv[6])):
        times.append(time.monotonic())
print(json.dumps((times[-2] - times[0]) / (len(times) - 2)))
"""


def stream(url: str, body: dict[str, Any]) -> tuple[float, list[float], str]:
    """Return when a completion was asked for, when each of its chunks came, and the text."""
    begun, times, text = time.monotonic(), [], ""
    with httpx.stream("POST", f"{url}/v1/completions", json={**body, "stream": True}, timeout=600) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                found = json.loads(line[6:])
                if found["choices"][0]["finish_reason"] is None:
                    times.append(time.monotonic())
                    text += found["choices"][0]["text"]
    return begun, times, text


def say(name: str, **figures: Any) -> None:
    """Print a figure."""
    print(json.dumps({"figure": name, **figures}), flush=True)


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--budget", default="25%")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", default="2")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--only", help="overhead, parallel or second_turn")
    parser.add_argument("--first-id", type=int, help="of a model of recorded routing: gguf_pager.trace.first_token of its header")
    given = parser.parse_args()
    figures: dict[str, Callable[[argparse.Namespace], None]] = {
        "overhead": overhead, "parallel": parallel, "second_turn": second_turn}
    for name, measure in figures.items():
        if given.only in (None, name):
            measure(given)


def start(given: argparse.Namespace, *arguments: str) -> Server:
    """Start a server."""
    return Server(given.model, "--budget", given.budget, "-t", given.threads, *arguments)


def prompt_of(given: argparse.Namespace, server: Server, n_tokens: int, seed: int = 0) -> list[int]:
    """Return so many tokens that the model knows: text, or of a model of recorded routing its own."""
    if given.first_id is not None:
        return [given.first_id + token for token in random.Random(seed).choices(range(256), k=n_tokens)]
    words = "The river ran slowly past the old mill, and the children counted boats until the evening came. "
    asked = {"input": f"Story {seed}. " + words * (n_tokens // 10)}
    return list(httpx.post(f"{server.url}/extras/tokenize", json=asked, timeout=60).json()["tokens"][:n_tokens])


BIAS = {"2": -100, "0": -100}
"""So that an answer does not end early: the ends of SmolLM2's texts."""


def overhead(given: argparse.Namespace) -> None:
    """One client's stream against Llama in-process."""
    ratios = []
    for _ in range(given.rounds):
        server = start(given)
        try:
            tokens = prompt_of(given, server, 64)
            body = {"prompt": tokens, "max_tokens": given.tokens, "temperature": 0, "logit_bias": BIAS}
            for _ in range(2):
                _, times, _ = stream(server.url, body)
            served = (times[-1] - times[0]) / (len(times) - 1)
        finally:
            server.stop()
        done = subprocess.run([sys.executable, "-c", IN_PROCESS, str(given.model), given.budget, json.dumps(tokens), str(given.tokens),
                               given.threads, json.dumps(BIAS)], capture_output=True, text=True, check=True, timeout=600)
        alone = json.loads(done.stdout.splitlines()[-1])
        ratios.append(served / alone)
        say("overhead", served_ms=served * 1e3, alone_ms=alone * 1e3, ratio=served / alone)
    say("overhead", median=statistics.median(ratios))


def parallel(given: argparse.Namespace) -> None:
    """Four clients at once against one."""
    ratios = []
    server = start(given, "--parallel", "4")
    try:
        prompts = [prompt_of(given, server, 64, seed) for seed in range(4)]
        for _ in range(given.rounds):
            def ask(tokens: list[int]) -> list[float]:
                return stream(server.url, {"prompt": tokens, "max_tokens": given.tokens, "temperature": 0, "logit_bias": BIAS})[1]

            one = ask(prompts[0])
            one_ts = (len(one) - 1) / (one[-1] - one[0])
            with ThreadPoolExecutor(4) as pool:
                several = list(pool.map(ask, prompts))
            begin, end = max(times[0] for times in several), min(times[-1] for times in several)
            several_ts = sum(sum(begin < at <= end for at in times) for times in several) / (end - begin)
            ratios.append(several_ts / one_ts)
            say("parallel", one_ts=one_ts, four_ts=several_ts, ratio=several_ts / one_ts)
    finally:
        server.stop()
    say("parallel", median=statistics.median(ratios))


def second_turn(given: argparse.Namespace) -> None:
    """The first token of a second turn, against computing all of the conversation."""
    ratios: dict[str, list[float]] = {"memory": [], "restart": []}
    for turn in range(given.rounds):
        with tempfile.TemporaryDirectory() as folder:
            arguments = ("-c", "4096", "--state-dir", folder)
            server = start(given, *arguments)
            try:
                tokens = prompt_of(given, server, 2000, turn)
                begun, times, _ = stream(server.url, {"prompt": tokens, "max_tokens": 4, "temperature": 0, "logit_bias": BIAS})
                whole = times[0] - begun
                more = tokens + prompt_of(given, server, 24, turn + 100)
                begun, times, _ = stream(server.url, {"prompt": more, "max_tokens": 4, "temperature": 0, "logit_bias": BIAS})
                memory = times[0] - begun
            finally:
                server.stop()
            server = start(given, *arguments)
            try:
                begun, times, _ = stream(server.url, {"prompt": more + prompt_of(given, server, 24, turn + 200), "max_tokens": 4, "temperature": 0,
                                                      "logit_bias": BIAS})
                restart = times[0] - begun
            finally:
                server.stop()
        ratios["memory"].append(memory / whole)
        ratios["restart"].append(restart / whole)
        say("second_turn", whole_s=whole, memory_s=memory, restart_s=restart, memory=memory / whole, restart=restart / whole)
    say("second_turn", median_memory=statistics.median(ratios["memory"]), median_restart=statistics.median(ratios["restart"]))


if __name__ == "__main__":
    main()
