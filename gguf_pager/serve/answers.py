"""An answer being computed: what is asked, how far it is, and the tokens on their way from the batcher to who asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue

import numpy as np
import numpy.typing as npt

from gguf_pager.serve.sequences import Ids, Sequence


@dataclass(frozen=True, slots=True)
class Token:
    """A token that was chosen, and the row of logits that it was chosen from, where that was asked for."""

    id: int
    logits: npt.NDArray[np.single] | None


def _nothing() -> None:
    """Free nothing."""


@dataclass(slots=True, eq=False)
class Answer:
    """A prompt, how tokens are chosen, how many there may be; and the answer as it comes.

    `sample` returns a token from a row of the batch that was computed last, `release` frees what it needs. `wants_logits` has each token bring its row. Times are of
    time.monotonic. `n_cached` tokens of the prompt need not have been computed.
    """

    prompt: Ids
    sample: Callable[[int], int]
    most_tokens: int
    wants_logits: bool = False
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
