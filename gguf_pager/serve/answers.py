"""An answer being computed: what is asked, how far it is, and the tokens on their way from the batcher to who asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from gguf_pager.serve.sequences import Ids, Sequence

Logits = npt.NDArray[np.single]


@dataclass(frozen=True, slots=True)
class Token:
    """A token that was chosen, and what is kept of the row of logits that it was chosen from."""

    id: int
    kept: Any


class _Logprobs(np.ndarray):
    """Logarithms of probabilities, as logits: stock's formula, which subtracts the logarithm of their sum, gives them back as they are."""

    def max(self, *_: Any, **__: Any) -> Logits:  # type: ignore[override]
        return np.zeros(1, np.single)

    def sum(self, *_: Any, **__: Any) -> Logits:  # type: ignore[override]
        return np.ones(1, np.single)


@dataclass(frozen=True, slots=True)
class Likeliest:
    """The logarithms of a few tokens' probabilities. A row of logits has as many numbers as the vocabulary, and who reads may be slow."""

    n_vocab: int
    ids: Ids
    logprobs: Logits

    def row(self) -> Logits:
        """Return a row that stock takes for logits, with nothing in it but these. To sort it takes a tenth of the time."""
        row = np.full(self.n_vocab, -np.inf, np.single)
        row[self.ids] = self.logprobs
        return row.view(_Logprobs)


def likeliest(logits: Logits, token: int, n_tokens: int) -> Likeliest:
    """Return the `n_tokens` likeliest tokens, those that are as likely as the last of them, and the one that was chosen."""
    logprobs: Logits = llama_cpp.Llama.logits_to_logprobs(logits)
    n_tokens = min(n_tokens, len(logprobs))
    is_kept = logprobs >= np.partition(logprobs, -n_tokens)[-n_tokens] if n_tokens else np.zeros(len(logprobs), bool)
    is_kept[token] = True
    ids = np.flatnonzero(is_kept).astype(np.intc)
    return Likeliest(len(logprobs), ids, logprobs[ids])


def _nothing() -> None:
    """Free nothing."""


@dataclass(slots=True, eq=False)
class Answer:
    """A prompt, how tokens are chosen, how many there may be; and the answer as it comes.

    `sample` returns a token from a row of the batch that was computed last, `release` frees what it needs. `keep` returns what a token
    brings of its row of logits, which is there no longer than that. Times are of time.monotonic. `n_cached` tokens of the prompt need not
    have been computed.
    """

    prompt: Ids
    sample: Callable[[int], int]
    most_tokens: int
    keep: Callable[[Logits, int], Any] | None = None
    release: Callable[[], None] = _nothing
    sequence: Sequence | None = None
    n_cached: int = 0
    n_generated: int = 0
    next_token: int | None = None
    is_given_up: bool = False
    asked_s: float = field(default_factory=time.monotonic)
    begun_s: float | None = None
    first_s: float | None = None
    last_s: float | None = None
    _arrived: SimpleQueue[Token | BaseException | None] = field(default_factory=SimpleQueue)

    @property
    def seen(self) -> Ids:
        """The tokens that were computed: of the prompt and, but for the newest, of the answer. What samplers look at."""
        assert self.sequence is not None
        return self.sequence.held

    @property
    def n_left(self) -> int:
        """How many tokens of the prompt are still to be computed."""
        assert self.sequence is not None
        return 0 if self.next_token is not None else len(self.prompt) - self.sequence.n_ids

    def put(self, token: Token) -> None:
        """Hand a token over."""
        now = time.monotonic()
        self.first_s, self.last_s = self.first_s or now, now
        self.n_generated += 1
        self.next_token = token.id
        self._arrived.put(token)

    def end(self, error: BaseException | None = None) -> None:
        """Say that no more tokens come. A sampler holds a list of the whole vocabulary, and is not left to the garbage collector."""
        self._arrived.put(error)
        release, self.release = self.release, _nothing
        release()

    def tokens(self) -> Iterator[Token]:
        """Yield tokens as they come; raise what has ended the answer before its end."""
        while (item := self._arrived.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
