"""What is to be measured: lists of numbers as llama-bench writes them, and the cases that follow from all settings."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, product
from typing import Literal

from gguf_pager.memory.budget import parse_budget

Mode = Literal["paged", "stock", "resident"]
Baseline = Literal["stock", "resident", "repacked"]

_RANGE = re.compile(r"(\d+)(?:-(\d+)(?:([+*])(\d+))?)?")


def parse_numbers(text: str) -> tuple[int, ...]:
    """Return the numbers of a list such as "64,128", "16-64+16" or "1-8*2", in llama-bench's notation.

    Raises:
        ValueError: it is none.
    """
    numbers: list[int] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            raise ValueError(f"{text!r} is not understood: write numbers such as 64,128 or ranges such as 16-64+16 or 1-8*2")
        first, last, step = int(match[1]), int(match[2] or match[1]), int(match[4] or 1)
        if step == 0 or (match[3] == "*" and (step == 1 or first == 0)):
            raise ValueError(f"{part!r} never ends")
        if last < first:
            raise ValueError(f"{part!r} ends before it begins")
        while first <= last:
            numbers.append(first)
            first = first * step if match[3] == "*" else first + step
    return tuple(numbers)


@dataclass(frozen=True, slots=True)
class Shape:
    """What one run computes: `n_depth` tokens before the clock starts, then a prompt, then tokens one by one.

    Of `n_parallel` sequences each has so many. Their prompts share batches, and a step computes a token of each.
    """

    n_prompt: int
    n_gen: int
    n_depth: int
    n_threads: int
    n_batch: int
    n_ubatch: int
    n_parallel: int = 1

    @property
    def n_sequence_tokens(self) -> int:
        """Tokens of each sequence at the end."""
        return self.n_depth + self.n_prompt + self.n_gen

    @property
    def n_tokens(self) -> int:
        """Tokens in the context at the end."""
        return self.n_parallel * self.n_sequence_tokens

    @property
    def n_ctx(self) -> int:
        """The context to ask for, which all sequences share, in the steps that llama.cpp rounds it up to."""
        return -(-self.n_tokens // 256) * 256


@dataclass(frozen=True, slots=True)
class Case:
    """One way to run a shape. `budget` is ours only; `read_ahead_kb` None leaves the device as it is.

    `is_repacked` lets stock llama.cpp copy weights into the layout its fastest kernels want, which takes anonymous memory.
    """

    mode: Mode
    shape: Shape
    cap_bytes: int | None
    budget: str | None = None
    read_ahead_kb: int | None = None
    is_repacked: bool = False

    @property
    def label(self) -> str:
        """A name for people: "paged 25%", "stock, read-ahead 128 KiB"."""
        parts = [f"{self.mode} {budget_label(self.budget)}" if self.budget else self.mode]
        if self.shape.n_parallel > 1:
            parts.append(f"{self.shape.n_parallel} sequences")
        if self.is_repacked:
            parts.append("repacked")
        if self.read_ahead_kb is not None and self.mode == "stock":
            parts.append(f"read-ahead {self.read_ahead_kb} KiB")
        return ", ".join(parts)


def parse_read_aheads(text: str) -> tuple[int | None, ...]:
    """Return the read-aheads of a list such as "128,8192" or "present,128" in KiB; None stands for the device's own.

    Raises:
        ValueError: it is none.
    """
    found: list[int | None] = []
    for part in text.split(","):
        found += [None] if part.strip() == "present" else parse_numbers(part)
    if any(kb == 0 for kb in found):
        raise ValueError("the least read-ahead is 1 KiB")
    return tuple(found)


def shapes(n_prompt: Sequence[int], n_gen: Sequence[int], n_depth: Sequence[int], n_threads: Sequence[int],
           n_batch: Sequence[int], n_ubatch: Sequence[int], n_parallel: Sequence[int] = (1,)) -> list[Shape]:
    """Return every combination, but those that compute nothing; the last list changes fastest."""
    lists = map(dict.fromkeys, (n_prompt, n_gen, n_depth, n_threads, n_batch, n_ubatch, n_parallel))
    return [shape for numbers in product(*lists)
            if (shape := Shape(*numbers)).n_prompt + shape.n_gen > 0]


def rounds_of(made: Sequence[Shape]) -> list[list[Shape]]:
    """Return shapes in groups whose cases take turns in the same rounds: those that differ in `n_parallel` alone."""
    return [list(group) for _, group in groupby(made, key=lambda shape: replace(shape, n_parallel=1))]


def cases_of(shape: Shape, budgets: Sequence[str], baselines: Sequence[Baseline], read_ahead: Sequence[int | None],
             cap_of: Callable[[str], int | None]) -> list[Case]:
    """Return the cases of a shape in the order in which they take turns.

    Each budget is followed by stock under the same cap, at every read-ahead; a cap that two budgets share is measured
    with stock once. What is resident needs the whole model in RAM, so no cap.
    """
    cases: list[Case] = []
    read_ahead = tuple(dict.fromkeys(read_ahead))
    first = read_ahead[0] if read_ahead else None
    capped: set[int | None] = set()
    for budget in dict.fromkeys(budgets):
        cap_bytes = cap_of(budget)
        cases.append(Case("paged", shape, cap_bytes, budget, first))
        if "stock" in baselines and cap_bytes not in capped:
            capped.add(cap_bytes)
            cases += [Case("stock", shape, cap_bytes, None, kb) for kb in read_ahead or (None,)]
    cases += [Case("resident", shape, None, None, first, is_repacked)
              for name, is_repacked in (("resident", False), ("repacked", True)) if name in baselines]
    return cases


def budget_label(budget: str) -> str:
    """Return a budget as it was given, but a bare number of bytes in megabytes."""
    return f"{int(budget) / 1e6:,.0f} MB" if budget.isdecimal() else budget


def budget_bytes(budget: str) -> int | None:
    """Return a budget in bytes; None for shares, "min" and "auto".

    Raises:
        BudgetError: it is no budget.
    """
    parsed = parse_budget(budget)
    return int(parsed.value or 0) if parsed.kind == "bytes" else None
