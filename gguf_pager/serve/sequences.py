"""What a context's memory holds of each sequence, and which one goes on with a prompt at the least cost."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from llama_cpp import llama_cpp as low

from gguf_pager.windows import is_whole

if TYPE_CHECKING:
    from gguf_pager.serve.answers import Answer

Ids = npt.NDArray[np.intc]


def common_prefix(first: Ids, second: Ids) -> int:
    """Return how many tokens two texts have in common at their beginning."""
    n = min(len(first), len(second))
    different = np.flatnonzero(first[:n] != second[:n])
    return int(different[0]) if len(different) else n


class Sequence:
    """One of the sequences of a context: its number there, its tokens, and whose answer is being computed with it.

    Attributes:
        ids: all tokens that the context's memory holds of it, in an array as long as a conversation may become.
        n_ids: how many they are.
        used_s: when it was last computed with, by time.monotonic; 0 of one that holds nothing.
        n_saved: how many of its tokens lie in a state on disk.
    """

    __slots__ = ("answer", "ids", "n_ids", "n_saved", "number", "used_s")

    def __init__(self, number: int, n_ctx: int) -> None:
        self.number = number
        self.ids: Ids = np.zeros(n_ctx, np.intc)
        self.n_ids = self.n_saved = 0
        self.used_s = 0.0
        self.answer: Answer | None = None

    @property
    def held(self) -> Ids:
        """The tokens that the context's memory holds."""
        return self.ids[: self.n_ids]

    def note(self, tokens: Tokens[int]) -> None:
        """Note tokens that were computed."""
        self.ids[self.n_ids: self.n_ids + len(tokens)] = tokens
        self.n_ids += len(tokens)
        self.used_s = time.monotonic()


@dataclass(frozen=True, slots=True)
class _Mark:
    """What a recurrent model's state was after so many tokens."""

    n_ids: int
    state: Any


LEAST_MARKED, MOST_MARKS, MARKS_BYTES = 64, 8, 16 << 20
"""Tokens from which on a place to come back to is worth its memory; how many are kept per sequence, and in how much memory, but one
always: Qwen3-Next's state has 75 MB."""


class Memory:
    """The context's memory, by sequence. Tokens can be taken back from the end; of recurrent and hybrid models only to where the state
    was marked."""

    def __init__(self, context: int, is_recurrent: bool) -> None:
        self._context, self._memory = context, low.llama_get_memory(context)
        self.is_recurrent = is_recurrent
        self._n_window = int(low.llama_model_n_swa(low.llama_get_model(context)))
        self._marks: dict[int, list[_Mark]] = {}

    def cut(self, sequence: Sequence, n_kept: int) -> int:
        """Keep the first tokens of a sequence, as many as can be kept; return how many are."""
        if n_kept < sequence.n_ids:
            n_kept = self._take_back(sequence, n_kept)
            if n_kept == 0:
                self.clear(sequence)
            self._marks[sequence.number] = [mark for mark in self._marks.get(sequence.number, []) if mark.n_ids <= n_kept]
            sequence.n_ids, sequence.n_saved = n_kept, min(sequence.n_saved, n_kept)
        return n_kept

    def trim(self, sequence: Sequence) -> None:
        """Forget what a batch that was stopped in the middle has left behind a sequence's tokens."""
        is_trimmed = not self.is_recurrent and low.llama_memory_seq_rm(self._memory, sequence.number, sequence.n_ids, -1)
        if sequence.n_ids == 0 or not is_trimmed or not self._is_whole(sequence, sequence.n_ids):
            self.clear(sequence)

    def clear(self, sequence: Sequence) -> None:
        """Forget a sequence, also what a batch that has failed has left of it."""
        low.llama_memory_seq_rm(self._memory, sequence.number, -1, -1)
        self._marks.pop(sequence.number, None)
        sequence.n_ids, sequence.n_saved, sequence.used_s = 0, 0, 0.0

    def _take_back(self, sequence: Sequence, n_kept: int) -> int:
        """Remove tokens from the end; return how many are left, 0 where nothing is right any more."""
        if self.is_recurrent:
            mark = max((mark for mark in self._marks.get(sequence.number, []) if mark.n_ids <= n_kept), default=None,
                       key=lambda mark: mark.n_ids)
            if mark is None or not low.llama_state_seq_set_data_ext(self._context, mark.state, len(mark.state), sequence.number,
                                                                    low.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY):
                return 0
            n_kept = mark.n_ids
        elif not self._is_whole(sequence, n_kept):
            return 0
        return n_kept if n_kept and low.llama_memory_seq_rm(self._memory, sequence.number, n_kept, -1) else 0

    def _is_whole(self, sequence: Sequence, n_tokens: int) -> bool:
        return is_whole(self._memory, sequence.number, n_tokens, self._n_window)

    def mark(self, sequence: Sequence) -> None:
        """Keep the state of a recurrent model as it is now, to come back to; nothing where tokens can simply be taken back."""
        n_bytes = int(low.llama_state_seq_get_size_ext(self._context, sequence.number, low.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY))
        if not self.is_recurrent or sequence.n_ids < LEAST_MARKED or n_bytes == 0:
            return
        state = (ctypes.c_uint8 * n_bytes)()
        if low.llama_state_seq_get_data_ext(self._context, state, n_bytes, sequence.number, low.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY):
            kept = max(1, min(MOST_MARKS, MARKS_BYTES // n_bytes))
            self._marks[sequence.number] = [*self._marks.get(sequence.number, []), _Mark(sequence.n_ids, state)][-kept:]

    def usable(self, sequence: Sequence, prompt: Ids) -> int:
        """Return how many of a prompt's first tokens need not be computed again where a sequence holds them."""
        n_common = common_prefix(sequence.held, prompt)
        n_kept = min(n_common, len(prompt) - 1)
        return n_common if self.is_recurrent or n_kept == sequence.n_ids or self._is_whole(sequence, n_kept) else 0

    def copy(self, source: Sequence, target: Sequence, n_tokens: int) -> None:
        """Let a sequence begin with another one's first tokens, which are `usable`: they are shared, not copied. Not of recurrent models."""
        self.cut(target, 0)
        low.llama_memory_seq_cp(self._memory, source.number, target.number, 0, n_tokens)
        target.note(source.ids[:n_tokens].tolist())


def _in_common(sequence: Sequence, prompt: Ids) -> int:
    return common_prefix(sequence.held, prompt)


def choose(sequences: Tokens[Sequence], prompt: Ids, *, can_share: bool = True,
           usable: Callable[[Sequence, Ids], int] = _in_common) -> tuple[Sequence, Sequence | None] | None:
    """Return the idle sequence that shall answer a prompt, and the one whose first tokens it begins with, if that is another.

    A conversation that goes on, or whose last answer is wanted again, keeps its sequence. One that begins like another takes an empty one and shares the beginning, where
    that `can_share`; where none is empty, the other's place if it is more than half the same, or else the place that nobody has used
    for longest. `usable` tells how many of a prompt's tokens need not be computed in a sequence's place. None where all are busy.
    """
    idle = [sequence for sequence in sequences if sequence.answer is None]
    if not idle:
        return None
    common = {id(sequence): usable(sequence, prompt) for sequence in sequences}
    nearest = max(idle, key=lambda sequence: (common[id(sequence)], -sequence.n_ids))
    oldest = min(idle, key=lambda sequence: sequence.used_s)
    n_common = common[id(nearest)]
    goes_on = 0 < n_common in (nearest.n_ids, len(prompt)) or (n_common * 2 > nearest.n_ids and not (can_share and oldest.n_ids == 0))
    target = nearest if goes_on else oldest
    source = max(sequences, key=lambda sequence: common[id(sequence)])
    return target, source if can_share and common[id(source)] > common[id(target)] else None
