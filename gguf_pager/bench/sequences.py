"""How a run's sequences are computed: one by the Llama's own `eval`, several in batches of `llama_decode`.

Several as llama-batched-bench computes them: their prompts one after the other, in as few calls as `n_batch` allows, then steps
of one token of each. The Llama gives its context and has no other part in it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from gguf_pager.errors import EngineError

Tokens = Sequence[Sequence[int]]
"""Of each sequence, those to go on with."""


class One:
    """The only sequence of a context."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    def extend(self, tokens: Tokens) -> int:
        """Compute more tokens at once; return in how many batches of `n_ubatch`."""
        self._llm.eval(tokens[0])
        return -(-len(tokens[0]) // _n_ubatch(self._llm))

    def step(self, tokens: Sequence[int]) -> None:
        """Compute one more token."""
        self._llm.eval(tokens)

    def logits(self) -> list[bytes]:
        """Return the last token's, as they lie in memory."""
        return [_row(self._llm, -1)]


class Several:
    """The sequences of a context that holds as many."""

    def __init__(self, llm: Any, n_sequences: int) -> None:
        from llama_cpp import _internals
        from llama_cpp import llama_cpp as low

        self._llm, self._low = llm, low
        self._n_batch = int(low.llama_n_batch(llm.ctx))
        self._n_past = [0] * n_sequences
        self._logits: list[bytes] | None = [b""] * n_sequences
        """Of the last token of what has been extended; None after a step, when the context has all of them."""
        self._batch = _internals.LlamaBatch(n_tokens=self._n_batch, embd=0, n_seq_max=1, verbose=False)

    def extend(self, tokens: Tokens) -> int:
        """Compute more tokens of all sequences; return in how many batches of `n_ubatch`.

        Raises:
            EngineError: llama.cpp has not computed them.
        """
        self._logits = [b""] * len(self._n_past)
        flat = [(number, token, at == len(own)) for number, own in enumerate(tokens) for at, token in enumerate(own, 1)]
        n_ubatches = 0
        for begin in range(0, len(flat), self._n_batch):
            some = flat[begin : begin + self._n_batch]
            self._compute(some)
            for row, (number, _, is_last) in enumerate(some):
                if is_last:  # now: the next call's take their place
                    self._logits[number] = _row(self._llm, row)
            n_ubatches += -(-len(some) // _n_ubatch(self._llm))
        return n_ubatches

    def step(self, tokens: Sequence[int]) -> None:
        """Compute one more token of each sequence.

        Raises:
            EngineError: llama.cpp has not computed them.
        """
        self._compute([(number, token, True) for number, token in enumerate(tokens)])
        self._logits = None

    def logits(self) -> list[bytes]:
        """Return those of each sequence's last token, as they lie in memory."""
        return [_row(self._llm, row) for row in range(len(self._n_past))] if self._logits is None else self._logits

    def _compute(self, tokens: Sequence[tuple[int, int, bool]]) -> None:
        """Compute tokens, each with the number of its sequence before it, and behind it whether it has logits."""
        batch, n_past = self._batch.batch, self._n_past
        for at, (number, token, has_logits) in enumerate(tokens):
            batch.token[at] = token
            batch.pos[at] = n_past[number]
            batch.seq_id[at][0] = number
            batch.n_seq_id[at] = 1
            batch.logits[at] = has_logits
            n_past[number] += 1
        batch.n_tokens = len(tokens)
        result = int(self._low.llama_decode(self._llm.ctx, batch))
        if result != 0:
            raise EngineError(f"llama_decode returned {result} for a batch of {len(n_past)} sequences: report this.")


def sequences_of(llm: Any, n_sequences: int) -> One | Several:
    """Return the sequences of a Llama's context that was opened for so many, empty."""
    return One(llm) if n_sequences == 1 else Several(llm, n_sequences)


def _n_ubatch(llm: Any) -> int:
    from llama_cpp import llama_cpp as low

    return int(low.llama_n_ubatch(llm.ctx))


def _row(llm: Any, row: int) -> bytes:
    from llama_cpp import llama_cpp as low

    return ctypes.string_at(low.llama_get_logits_ith(llm.ctx, row), 4 * llm.n_vocab())
