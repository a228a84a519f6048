"""What `run` shows: phases of a generation, the last line, and progress meanwhile."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from gguf_pager.budget import format_bytes
from gguf_pager.pager import Stats
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
        names = ("hits", "misses", "bytes_read", "stall_ns", "stall_bytes", "evictions", "left_alone")
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
    parts = [f"decode {number(decode['tokens_per_s'], '.1f')} tok/s ({decode['tokens']:,} tokens)"]
    if prompt["tokens"] > 1:
        parts.append(f"prompt {number(prompt['tokens_per_s'], '.1f')} tok/s ({prompt['tokens']:,} tokens)")
    if facts["is_paged"]:
        read = decode["bytes_read_per_token"]
        parts += [
            f"hits {number(decode['hit_rate'], '.1%')}",
            f"read {number(None if read is None else read / 1e6, '.2f')} MB per token",
            f"stalled {number(decode['stall_share'], '.0%')}",
        ]
        if decode["left_alone"]:
            parts.append(f"{decode['left_alone']:,} graph nodes left to llama.cpp")
    else:
        parts.append("not paged")
    peak = facts["peak_memory_bytes"]
    parts.append(f"peak memory {format_bytes(peak) if peak is not None else '-'}")
    return ", ".join(parts)


class Progress:
    """One line on stderr, written again and again while something takes longer than a second."""

    def __init__(self, is_wanted: bool | None) -> None:
        self._is_terminal = os.isatty(2)
        is_shown = self._is_terminal if is_wanted is None else is_wanted
        # A descriptor of our own, because llama_cpp points 2 at /dev/null while it loads.
        self._fd = os.dup(2) if is_shown else None

    @contextmanager
    def during(self, describe: Callable[[], str]) -> Iterator[None]:
        """Show what `describe` returns, from another thread, for the time of the block."""
        if self._fd is None:
            yield
            return
        done = threading.Event()
        thread = threading.Thread(target=self._show, args=(self._fd, describe, done), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _show(self, fd: int, describe: Callable[[], str], done: threading.Event) -> None:
        before, after, period_s = ("\r", "\x1b[K", 0.25) if self._is_terminal else ("", "\n", 1.0)
        wait_s, erase = 1.0, b""
        with suppress(OSError):  # nobody reads it any more
            while not done.wait(wait_s):
                os.write(fd, f"{before}{describe()}{after}".encode(errors="replace"))
                wait_s, erase = period_s, b"\r\x1b[K" if self._is_terminal else b""
            os.write(fd, erase)
