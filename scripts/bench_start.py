"""Measures a cold start: from the start of a process to the first token after a short prompt, against what the disk allows.

    $ python scripts/bench_start.py models/qwen3-30b-16l.gguf --budget 25%
    python 0.06 s, imports 0.55, model open 0.83, first token 1.90 (of 3 starts the middle one; 1.81 to 2.05)
    1.11 GB of experts for 6 tokens; the disk gives 2.71 GB/s to a stream: 0.41 s, 4.6 times less

The file is dropped from the page cache before each start. --checkout DIR starts another checkout's gguf_pager, for comparisons in
turn; its extension must be built.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gguf_pager.bench.disk import drop_from_page_cache, read_through
from gguf_pager.model.layout import read_layout

CHILD = """
import json, sys, time
begun, model, budget, n_tokens = float(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
marks = {"python": time.time() - begun}
from gguf_pager import Llama, read_layout
marks["imports"] = time.time() - begun
llm = Llama(model, budget=budget, n_ctx=512, verbose=False, profile=False)
marks["model open"] = time.time() - begun
llm.eval(list(range(1, n_tokens + 1)))
llm.sample(temp=0)
marks["first token"] = time.time() - begun
print(json.dumps(marks | {"bytes_read": llm.pager.stats().bytes_read}))
"""


def start(arguments: argparse.Namespace, files: list[Path]) -> dict[str, Any]:
    """Start a process, and return what it measured: seconds since its start, bytes."""
    drop_from_page_cache(files)
    environment = os.environ | ({"PYTHONPATH": str(arguments.checkout)} if arguments.checkout else {})
    command = [sys.executable, "-c", CHILD, str(time.time()), str(arguments.model), arguments.budget, str(arguments.tokens)]
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, check=False, timeout=600)
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Start a few times, and say what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--budget", default="25%")
    parser.add_argument("--tokens", type=int, default=6)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--checkout", type=Path)
    arguments = parser.parse_args()
    files = list(read_layout(arguments.model).paths)
    starts = sorted((start(arguments, files) for _ in range(arguments.repeat)), key=lambda one: one["first token"])
    middle = starts[len(starts) // 2]
    steps = ", ".join(f"{name} {middle[name]:.2f}{' s' if name == 'python' else ''}"
                      for name in ("python", "imports", "model open", "first token"))
    print(f"{steps} (of {len(starts)} starts the middle one; {starts[0]['first token']:.2f} to {starts[-1]['first token']:.2f})")
    drop_from_page_cache(files)
    rate = read_through(files, 2.0)
    read = statistics.median(one["bytes_read"] for one in starts)
    if rate is not None:
        print(f"{read / 1e9:.2f} GB of experts for {arguments.tokens} tokens; the disk gives {rate / 1e9:.2f} GB/s to a stream: "
              f"{read / rate:.2f} s, {middle['first token'] / (read / rate):.1f} times less")


if __name__ == "__main__":
    main()
