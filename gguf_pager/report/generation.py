"""What `run` shows: phases of a generation, the last line, and progress meanwhile."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from gguf_pager.memory.budget import auto_budget_bytes, format_bytes, full_arena_bytes
from gguf_pager.memory.probe import Memory
from gguf_pager.pager import Pager, Stats
from gguf_pager.report import number


@dataclass(frozen=True, slots=True)
class Mark:
    """A moment: the clock, the tokens computed so far, and the pager's counters, if there is one."""

    seconds: float
    n_tokens: int
    stats: Stats | None


@dataclass(frozen=True, slots=True)
class Phase:
    """What was computed between two moments."""

    begin: Mark
    end: Mark

    def figures(self) -> dict[str, Any]:
        """Return speed, and what the pager counted: None without one."""
        n_tokens, seconds = self.end.n_tokens - self.begin.n_tokens, self.end.seconds - self.begin.seconds
        before, after = self.begin.stats, self.end.stats
        facts: dict[str, Any] = {"tokens": n_tokens, "seconds": seconds,
                                 "tokens_per_s": n_tokens / seconds if n_tokens and seconds else None}
        names = ("hits", "misses", "bytes_read", "bytes_wasted", "stall_ns", "stall_bytes", "evictions", "left_alone", "foreseen",
                 "in_vain")
        if before is None or after is None:
            return facts | dict.fromkeys((*names, "hit_rate", "bytes_read_per_token", "stall_share"))
        facts |= {name: getattr(after, name) - getattr(before, name) for name in names}
        wanted = facts["hits"] + facts["misses"]
        facts["hit_rate"] = facts["hits"] / wanted if wanted else None
        facts["bytes_read_per_token"] = facts["bytes_read"] / n_tokens if n_tokens else None
        facts["stall_share"] = facts["stall_ns"] / 1e9 / seconds if seconds else None
        return facts


def run_facts(settings: dict[str, Any], prompt: Phase, decode: Phase, peak_bytes: int | None) -> dict[str, Any]:
    """Return the statistics of a run; `settings` go in as they are."""
    after = decode.end.stats
    return settings | {
        "prompt": prompt.figures(),
        "decode": decode.figures(),
        "arena_bytes": after.arena_bytes if after else None,
        "resident_expert_bytes": after.resident_bytes if after else None,
        "peak_memory_bytes": peak_bytes,
    }


def run_line(facts: dict[str, Any]) -> str:
    """Return the last line of `run`: speed, hits, reads, stalls, memory."""
    prompt, decode = facts["prompt"], facts["decode"]
    peak = facts["peak_memory_bytes"]
    memory = f"peak memory {format_bytes(peak) if peak is not None else '-'}"
    if not prompt["tokens"]:
        return f"Stopped before the first token, {memory}"
    n_tokens = decode["tokens"] + 1  # the first one comes of the prompt
    parts = [f"answer {number(decode['tokens_per_s'], '.1f')} tok/s ({n_tokens:,} token{'s' * (n_tokens > 1)})"]
    if prompt["tokens"] > 1:
        parts.append(f"prompt {number(prompt['tokens_per_s'], '.1f')} tok/s ({prompt['tokens']:,} tokens)")
    if facts["is_paged"]:
        read = decode["bytes_read_per_token"]
        parts += [
            f"{number(decode['hit_rate'], '.1%')} of the experts were in memory",
            f"{number(None if read is None else read / 1e6, '.2f')} MB read per token",
            f"{number(decode['stall_share'], '.0%')} of the time waiting for the disk",
        ]
        if decode["left_alone"]:
            parts.append(f"{decode['left_alone']:,} graph nodes left to llama.cpp")
    else:
        parts.append("not paged")
    return ", ".join([*parts, memory])


_LONG_WAIT = 0.3
"""The share of the time spent waiting for reads from which on more memory is worth a word."""

_FREE_BYTES = 256 << 20
"""So much has to be free for it."""

_TELLING_S = 2.0
"""A shorter run has measured nothing worth a word."""


def run_hint(facts: dict[str, Any], pager: Pager | None, memory: Memory) -> str | None:
    """Return the one setting that would have helped most, where this run has measured that it would; None where none would."""
    waited = facts["decode"]["stall_share"]
    if pager is None or waited is None or facts["decode"]["seconds"] < _TELLING_S:
        return None
    spare, full = auto_budget_bytes(memory.available_bytes, memory.total_bytes), full_arena_bytes(pager.needs)
    if waited >= _LONG_WAIT and spare >= _FREE_BYTES and pager.arena_bytes < full:
        more = min(1.0, (pager.arena_bytes + spare) / full)
        return (f"Hint: {waited:.0%} of the time went into waiting for the disk, and {format_bytes(spare)} of memory are free: "
                f"--budget {math.floor(more * 100)}% would keep more in it.")
    last = facts["n_threads_last"]
    if last is not None and last < facts["n_threads"]:
        were = "thread was" if last == 1 else "threads were"
        return f"Hint: other programs are busy, so that {last} {were} faster than {facts['n_threads']}. Close them for more speed."
    return None


class Progress:
    """What takes longer than a second, on stderr: a bar, or one line written again and again."""

    def __init__(self, is_wanted: bool | None) -> None:
        self._is_terminal = os.isatty(2)
        is_shown = self._is_terminal if is_wanted is None else is_wanted
        # A descriptor of our own, because llama_cpp points 2 at /dev/null while it loads.
        self._fd = os.dup(2) if is_shown else None

    @contextmanager
    def during(self, describe: Callable[[], str]) -> Iterator[None]:
        """Show what `describe` returns, from another thread, for the time of the block."""
        with self._meanwhile(lambda fd, done: self._show(fd, describe, done)):
            yield

    @contextmanager
    def bar(self, name: str, total: Callable[[], int | None], count: Callable[[], int]) -> Iterator[None]:
        """Show a bar of the bytes that `count` returns, of about `total`, from another thread, for the time of the block."""
        with self._meanwhile(lambda fd, done: self._fill(fd, name, total, count, done)):
            yield

    @contextmanager
    def _meanwhile(self, show: Callable[[int, threading.Event], None]) -> Iterator[None]:
        """Let another thread show something until it is told that the block is over; nothing where nobody wants it."""
        if self._fd is None:
            yield
            return
        done = threading.Event()
        thread = threading.Thread(target=show, args=(self._fd, done), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _fill(self, fd: int, name: str, total: Callable[[], int | None], count: Callable[[], int], done: threading.Event) -> None:
        if done.wait(1.0):
            return
        with suppress(OSError), os.fdopen(os.dup(fd), "w") as file, tqdm(  # nobody reads it any more
                desc=name, total=total(), unit="B", unit_scale=True, file=file, leave=False, dynamic_ncols=True) as bar:
            while True:
                bar.n = count()
                bar.total = bar.total and max(bar.total, bar.n)
                bar.refresh()
                if done.wait(0.25 if self._is_terminal else 1.0):
                    return

    def _show(self, fd: int, describe: Callable[[], str], done: threading.Event) -> None:
        before, after, period_s = ("\r", "\x1b[K", 0.25) if self._is_terminal else ("", "\n", 1.0)
        wait_s, erase = 1.0, b""
        with suppress(OSError):  # nobody reads it any more
            while not done.wait(wait_s):
                os.write(fd, f"{before}{describe()}{after}".encode(errors="replace"))
                wait_s, erase = period_s, b"\r\x1b[K" if self._is_terminal else b""
            os.write(fd, erase)
