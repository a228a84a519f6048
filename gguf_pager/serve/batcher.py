"""Several answers at once from one context: their next tokens in one batch, so that one read of an expert serves them all."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from llama_cpp import _internals
from llama_cpp import llama_cpp as low

from gguf_pager.errors import EngineError, PagerError
from gguf_pager.llama import Llama
from gguf_pager.pieces import Pieces
from gguf_pager.serve.answers import Answer, Token
from gguf_pager.serve.brake import Brake
from gguf_pager.serve.sequences import LEAST_MARKED, Memory, Sequence, choose, common_prefix

log = logging.getLogger("gguf_pager")

IDLE_S = 1.0
"""Nobody has asked for anything for so long: it is time to keep what would be lost with the process."""


_STOPPED = 2
"""What llama_decode returns of a batch that was stopped."""


class ServerClosing(PagerError):
    """The server ends, and begins no answer any more."""


@dataclass(frozen=True, slots=True)
class Load:
    """How much there is to do now: answers that are computed, and that wait for a sequence; and all that there can be at once."""

    n_running: int
    n_waiting: int
    n_sequences: int


@dataclass(slots=True)
class Totals:
    """What was done since the start. Tokens of prompts that were in memory or on disk already are `cached`, not `prompt`."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    batches: int = 0
    batch_tokens: int = 0
    answers: int = 0
    failures: int = 0
    given_up: int = 0
    computing_s: float = 0.0


Hook = Callable[["Answer"], None]


class Batcher:
    """A thread that computes the answers of one model, up to `n_sequences` at a time, and lets others wait in order.

    Each step is one batch: the next token of every answer, and as much of the prompts as fits into `n_ubatch` tokens; so a long
    prompt holds the others up for one batch at a time. One client alone gets the batches, and the bits, that `Llama` computes.

    Attributes:
        totals: counters since the start.
        pieces: the text of each token.
        failure: what the last batch has failed with; None where it has not.
        on_end: called in the batcher's thread when an answer has ended, with whatever it is asked for by then.
    """

    def __init__(self, llm: Llama, n_sequences: int) -> None:
        self.llm = llm
        self.n_ctx = int(llm.n_ctx()) // n_sequences
        self.totals = Totals()
        self.failure: str | None = None
        self.on_end: list[Hook] = []
        self.keeper: Keeper = Keeper()
        self.pieces = Pieces(llm._model.vocab)
        self.sequences = tuple(Sequence(number, self.n_ctx) for number in range(n_sequences))
        self.memory = Memory(llm.ctx, bool(llm._is_recurrent or llm._is_hybrid))
        self._n_ubatch = int(low.llama_n_ubatch(llm.ctx))
        self._batch = _internals.LlamaBatch(n_tokens=max(self._n_ubatch, n_sequences), embd=0, n_seq_max=1, verbose=False)
        self._brake = Brake(llm.ctx)
        self._waiting = deque[Answer]()
        self._asides = deque[Callable[[], None]]()
        self._changed = threading.Condition()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="gguf_pager-batcher", daemon=True)
        self._thread.start()

    # ---- for those who ask ----

    def begin(self, answer: Answer) -> None:
        """Have an answer computed as soon as there is a sequence for it; its `tokens()` come meanwhile.

        Raises:
            ServerClosing: no answer is begun any more.
        """
        with self._changed:
            if self._is_closing:
                raise ServerClosing("The server is shutting down: ask again when it is back.")
            self._waiting.append(answer)
            self._changed.notify()

    def give_up(self, answer: Answer) -> None:
        """End an answer that nobody waits for any more: its sequence is free after the batch that is being computed."""
        with self._changed:
            answer.is_given_up = True
            self._changed.notify()

    def call(self, function: Callable[[], None]) -> None:
        """Call a function between two batches, when nobody else uses the context, and return afterwards.

        Raises:
            ServerClosing: there are no more batches.
        """
        done = threading.Event()
        failure: list[BaseException] = []

        def aside() -> None:
            try:
                function()
            except BaseException as error:  # noqa: BLE001  raised where it is waited for
                failure.append(error)
            finally:
                done.set()

        with self._changed:
            if self._is_closing or not self._thread.is_alive():  # what is asked for once it ends would never be called
                raise ServerClosing("The server is shutting down: ask again when it is back.")
            self._asides.append(aside)
            self._changed.notify()
        done.wait()
        if failure:
            raise failure[0]

    def load(self) -> Load:
        """Return how much there is to do."""
        with self._changed:
            n_running = sum(sequence.answer is not None for sequence in self.sequences)
            return Load(n_running, len(self._waiting), len(self.sequences))

    def close(self, patience_s: float | None = None) -> None:
        """End running answers with the token they have, refuse those that wait or have none, keep conversations, free the context.

        The batch that is being computed has `patience_s` to come to its end, or as long as it takes.
        """
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join(patience_s)
        if self._thread.is_alive():
            self.stop()
            self._thread.join()
        self._brake.close()
        self._batch.close()  # twice is fine

    def stop(self) -> None:
        """Let the batch that is being computed end at once, and begin no other: for who closes, or is about to. May be called in a signal handler."""
        self._is_closing = True
        self._brake.pull()

    # ---- the thread ----

    def _run(self) -> None:
        while self._wait():
            self._call_asides()
            self._drop_given_up()
            self._begin_waiting()
            try:
                self._step()
            except BaseException as error:  # noqa: BLE001  told to everybody whose answer it has ended
                self._fail(error)
        closing = ServerClosing("The server is shutting down: ask again when it is back.")
        for sequence in self.sequences:
            if sequence.answer is not None:
                self._end(sequence, closing if sequence.answer.n_generated == 0 else None)
        for answer in self._waiting:
            answer.end(closing)
        self._call_asides()
        self._quietly(self.keeper.close)

    def _quietly(self, function: Callable[[], None]) -> None:
        """Do what no answer depends on: what goes wrong is logged, and the thread that everybody waits for goes on."""
        try:
            function()
        except Exception:
            log.exception("this is no fault of an answer, but should not be")

    def _wait(self) -> bool:
        """Wait for something to do; return False when it is over."""
        is_kept = False
        while True:
            with self._changed:
                def has_work() -> bool:
                    return bool(self._is_closing or self._waiting or self._asides or self._busy())

                if self._changed.wait_for(has_work, None if is_kept else IDLE_S):
                    return not self._is_closing
            self._quietly(self.keeper.note_idle)
            is_kept = True

    def _busy(self) -> list[Sequence]:
        return [sequence for sequence in self.sequences if sequence.answer is not None]

    def _call_asides(self) -> None:
        while True:
            with self._changed:
                aside = self._asides.popleft() if self._asides else None
            if aside is None:
                return
            aside()

    def _drop_given_up(self) -> None:
        with self._changed:
            for answer in [answer for answer in self._waiting if answer.is_given_up]:
                self._waiting.remove(answer)
                answer.end()
                self.totals.given_up += 1
        for sequence in self._busy():
            if sequence.answer is not None and sequence.answer.is_given_up:
                self.totals.given_up += 1
                self._end(sequence)

    def _begin_waiting(self) -> None:
        while True:
            with self._changed:
                answer = self._waiting[0] if self._waiting else None
                chosen = (None if answer is None else
                          choose(self.sequences, answer.prompt, can_share=not self.memory.is_recurrent, usable=self.memory.usable))
                if answer is None or chosen is None:
                    return
                self._waiting.popleft()
            try:
                self._place(answer, *chosen)
            except BaseException as error:  # noqa: BLE001  told to who has asked
                self.totals.failures += 1
                answer.end(error)

    def _place(self, answer: Answer, sequence: Sequence, source: Sequence | None) -> None:
        """Give an answer its sequence, with as much of the prompt in it as is known; the last token has to be computed anew."""
        most = len(answer.prompt) - 1
        self.keeper.note_loss(sequence, common_prefix(sequence.held, answer.prompt))
        if source is not None:
            self.memory.copy(source, sequence, min(most, common_prefix(source.held, answer.prompt)))
        self.keeper.bring_back(sequence, answer.prompt)
        answer.n_cached = self.memory.cut(sequence, min(most, common_prefix(sequence.held, answer.prompt)))
        answer.sequence, sequence.answer = sequence, answer
        answer.begun_s = time.monotonic()
        self.totals.cached_tokens += answer.n_cached

    def _step(self) -> None:
        """Compute one batch, and choose a token for everybody whose prompt is computed."""
        batch = self._batch.batch
        batch.n_tokens = 0
        added: list[tuple[Sequence, list[int], int | None]] = []
        busy = sorted(self._busy(), key=lambda sequence: sequence.answer.begun_s or 0.0 if sequence.answer else 0.0)
        for sequence in busy:
            answer = sequence.answer
            if answer is not None and answer.next_token is not None:
                added.append((sequence, [answer.next_token], self._add(sequence, [answer.next_token], has_row=True)))
        for sequence in busy:
            answer, room = sequence.answer, self._n_ubatch - int(batch.n_tokens)
            if answer is None or answer.next_token is not None or room <= 0:
                continue
            n_taken = self._piece(answer, room)
            tokens = answer.prompt[sequence.n_ids: sequence.n_ids + n_taken].tolist()
            row = self._add(sequence, tokens, has_row=n_taken == answer.n_left)
            added.append((sequence, tokens, row))
            self.totals.prompt_tokens += n_taken
        if not added:
            return
        begun = time.monotonic()
        result = int(low.llama_decode(self.llm.ctx, batch))
        self.totals.computing_s += time.monotonic() - begun
        if result == _STOPPED and self._brake.is_pulled:
            for sequence, _, _ in added:
                self.memory.trim(sequence)
            return
        if result != 0:
            raise EngineError(f"llama_decode returned {result}: report this.")
        self.failure = None
        self.totals.batches += 1
        self.totals.batch_tokens += int(batch.n_tokens)
        for sequence, tokens, _ in added:
            sequence.note(tokens)
        for sequence, _, row in added:
            if row is not None:
                self._choose_token(sequence, row)
            elif sequence.answer is not None and sequence.answer.n_left == 1:
                self.memory.mark(sequence)

    def _piece(self, answer: Answer, room: int) -> int:
        """Return how many of a prompt's tokens to compute now. A recurrent model's last one comes alone, after a mark: who asks the same
        again, or goes on from a shortened answer, comes back to there."""
        n_left = answer.n_left
        if self.memory.is_recurrent and 1 < n_left <= room and len(answer.prompt) > LEAST_MARKED:
            return n_left - 1
        return min(room, n_left)

    def _add(self, sequence: Sequence, tokens: list[int], *, has_row: bool) -> int | None:
        """Add tokens to the batch; return which of its rows the last one has, if it has one."""
        batch = self._batch.batch
        begin = int(batch.n_tokens)
        for i, token in enumerate(tokens):
            at = begin + i
            batch.token[at] = token
            batch.pos[at] = sequence.n_ids + i
            batch.seq_id[at][0] = sequence.number
            batch.n_seq_id[at] = 1
            batch.logits[at] = False
        batch.n_tokens = begin + len(tokens)
        if not has_row:
            return None
        batch.logits[batch.n_tokens - 1] = True
        return int(batch.n_tokens) - 1

    def _choose_token(self, sequence: Sequence, row: int) -> None:
        answer = sequence.answer
        assert answer is not None
        try:
            token, kept = answer.sample(row), None
            if answer.keep is not None:
                address = low.llama_get_logits_ith(self.llm.ctx, row)
                kept = answer.keep(np.ctypeslib.as_array(address, shape=(self.llm._n_vocab,)), token)
        except BaseException as error:  # noqa: BLE001  told to who has asked
            self._end(sequence, error)
            return
        answer.put(Token(token, kept))
        self.totals.generated_tokens += 1
        is_over = low.llama_vocab_is_eog(self.llm._model.vocab, token) or answer.n_generated >= answer.most_tokens
        if is_over or sequence.n_ids >= self.n_ctx:
            self._end(sequence)

    def _end(self, sequence: Sequence, error: BaseException | None = None) -> None:
        answer, sequence.answer = sequence.answer, None
        if answer is None:
            return
        if error is None:
            self.totals.answers += 1
        else:
            self.totals.failures += 1
        answer.end(error)
        for hook in self.on_end:
            self._quietly(functools.partial(hook, answer))

    def _fail(self, error: BaseException) -> None:
        """End everybody's answer whose tokens were in the batch that failed; what the context holds of them is in doubt."""
        log.warning("a batch failed: %s", error)
        self.failure = str(error)
        for sequence in self._busy():
            with contextlib.suppress(PagerError):
                self.memory.clear(sequence)
            self._end(sequence, error)


class Keeper:
    """Keeps nothing: conversations live as long as their sequence's memory. See `states` for one that keeps them on disk."""

    def bring_back(self, sequence: Sequence, prompt: Any) -> None:
        """Load what is kept of a prompt into a sequence, where that is more than it holds."""

    def note_loss(self, sequence: Sequence, n_kept: int) -> None:
        """A sequence is about to go on from its first tokens, with another text."""

    def note_idle(self) -> None:
        """Nobody waits for anything."""

    def close(self) -> None:
        """Keep what is not kept yet."""
