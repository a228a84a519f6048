"""Who computes with a Llama: one at a time, and what an interrupt leaves half done is known to the next one."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from enum import IntEnum
from typing import TypeVar

from gguf_pager import _native
from gguf_pager.errors import EngineError

_Result = TypeVar("_Result")

PATIENCE_S = 10.0
"""A stream that nobody has asked for its next token for so long gives way to a request of somebody else. Shorter would take
it from a slow reader; a stream that was abandoned without being closed must not stop the others for good."""

_LOOK_S = 0.02


class Doubt(IntEnum):
    """What is not known to be right, because somebody did not come to the end."""

    NONE = 0
    TAIL = 1
    """The last tokens: the context's memory and `n_tokens` may disagree."""
    ALL = 2
    """All of the context's memory: it was being replaced."""


class Stream:
    """A generator that is not exhausted. Between two steps it rests, and others may have their turn."""

    __slots__ = ("is_passed_on", "rested_s", "thread")

    def __init__(self) -> None:
        self.thread: int | None = None
        self.is_passed_on = False
        self.rested_s = time.monotonic()

    def rest(self) -> None:
        """Note who has made the last step, and when."""
        thread = threading.get_ident()
        self.is_passed_on |= self.thread not in (None, thread)
        self.thread, self.rested_s = thread, time.monotonic()
        _last_stepped.set(self)

    def is_own(self) -> bool:
        """Return whether who asks is its reader, and so does not wait for it.

        Only the main thread is taken at its word, if it has made all the steps: a server hands those of several streams to
        the threads of a pool, and there the thread that has made one stream's last step is another's reader. In the main thread a
        context tells its readers apart, except where it runs the event loop of them all.
        """
        me = threading.get_ident()
        if self.is_passed_on or self.thread != me or me != threading.main_thread().ident:
            return False
        return _last_stepped.get() is self or _runs_event_loop()

    def is_kept_for_another(self) -> bool:
        """Return whether its reader, somebody else, is still likely to go on."""
        return not self.is_own() and time.monotonic() - self.rested_s < PATIENCE_S


_last_stepped: ContextVar[Stream | None] = ContextVar("gguf_pager_stream", default=None)


def _runs_event_loop() -> bool:
    asyncio = sys.modules.get("asyncio")  # which nobody uses who has not imported it
    if asyncio is None:
        return False
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def take_all(works: deque[Callable[[], None]]) -> Iterator[Callable[[], None]]:
    """Yield what was put off, each once: several threads may come to it at the same time."""
    while works:
        try:
            work = works.popleft()
        except IndexError:
            return
        yield work


class _Ticket:
    """Somebody's place in the queue, for as long as he keeps asking."""

    __slots__ = ("asked_s",)

    def __init__(self) -> None:
        self.ask()

    def ask(self) -> None:
        """Note that he still waits. Whoever was interrupted does not, and loses his place."""
        self.asked_s = time.monotonic()

    def is_good(self) -> bool:
        """Return whether he has asked lately, or since a step of somebody else's began that is not long yet."""
        return time.monotonic() - self.asked_s < PATIENCE_S


class Turn:
    """The right to compute with one Llama.

    A request holds it from beginning to end, a stream during each step. While a stream rests, other requests wait for its end,
    or until it has been resting for PATIENCE_S, in the order in which they came; its own reader need not wait. A stream that
    was overtaken raises EngineError at its next step: to go on would give another text.

    Attributes:
        doubt: what has to be looked at before the next step. Set before a step and taken back after it, so that no
            interrupt can come between a change and its note.
        has_outputs: whether the context has a row of results to sample from.
    """

    def __init__(self) -> None:
        self._mutex = _native.Mutex()
        self._pid = os.getpid()
        self._stream: Stream | None = None
        self._afterwards = deque[Callable[[], None]]()
        self._queue = deque[_Ticket]()
        self._rank: int | None = None
        self.doubt = Doubt.NONE
        self.has_outputs = False

    def run(self, work: Callable[[], _Result], doubt: Doubt, settle: Callable[[Doubt], None], stream: Stream | None = None, *,
            is_first: bool = True, is_aside: bool = False, rank: int | None = None) -> _Result:
        """Compute: a whole request, or one step of a stream. A step within a step is part of the outer one.

        Args:
            work: what to do.
            doubt: what is not known to be right any more if the work does not come to its end.
            settle: called with what an earlier step has left in doubt.
            stream: what the step belongs to, and with `is_first` begins.
            is_aside: a resting stream of this thread is not disturbed by it.
            rank: what a request calls in its course has a lower one than itself. None for what is no request.

        Raises:
            EngineError: the stream was overtaken, or it is a request from inside another one's callback.
        """
        if self._mutex.is_mine():
            if rank is not None and self._rank is not None and rank >= self._rank:
                raise EngineError("A request cannot be made from inside another one, in a stopping criterion or logits processor: "
                                  "both would go wrong. Make it afterwards.")
            before, self.doubt = (self.doubt, self._rank), max(self.doubt, doubt)
            self._rank = self._rank if rank is None else rank
            try:
                result = work()
            finally:
                self._rank = before[1]
            self.doubt = before[0]
            return result

        ticket = _Ticket()

        def step() -> tuple[_Result] | None:
            resting = self._stream
            goes_on = stream is not None and resting is stream
            if not is_first and not goes_on:
                raise EngineError("Another request has used this model while this stream was waiting: begin the stream again.")
            if not goes_on and not (resting is not None and resting.is_own()):
                is_my_turn = self._is_first_in_queue(ticket)
                if not is_my_turn or (resting is not None and resting.is_kept_for_another()):
                    return None
            if self.doubt is not Doubt.NONE:
                settle(self.doubt)
                self.doubt = Doubt.NONE
            if not (is_aside and resting is not None and resting.is_own()):
                self._stream = stream
            self.doubt, self._rank = doubt, rank
            result = work()
            self.doubt = Doubt.NONE
            if stream is not None:
                stream.rest()
            return (result,)

        if os.getpid() != self._pid:  # nobody lives in a fork who could give the turn back
            self._mutex, self._stream, self._queue, self._pid = _native.Mutex(), None, deque(), os.getpid()
        try:
            while (done := self._mutex.call(step)) is None:
                time.sleep(_LOOK_S)
                ticket.ask()
        finally:
            self._leave_queue(ticket)
            for put_off in take_all(self._afterwards):
                self._mutex.call(put_off)
        return done[0]

    def _is_first_in_queue(self, ticket: _Ticket) -> bool:
        """Return whether nobody who still waits came before; who asks for the first time joins.

        Others leave meanwhile: so it is a copy that is looked at.
        """
        queue, first = list(self._queue), ticket
        for other in queue:
            if other is ticket or other.is_good():
                first = other
                break
            self._leave_queue(other)
        if not any(other is ticket for other in queue):
            self._queue.append(ticket)
        return first is ticket

    def _leave_queue(self, ticket: _Ticket) -> None:
        with contextlib.suppress(ValueError):
            self._queue.remove(ticket)

    def end(self, stream: Stream) -> None:
        """Note that a stream is exhausted, closed or failed."""
        if self._stream is stream:
            self._stream = None

    def close(self, work: Callable[[], None]) -> None:
        """Do the last thing: after the step that is being computed, not after streams that rest.

        From within that step, in a callback or a signal handler, it is done at the step's end: nothing that is being used is
        freed.
        """
        if self._mutex.is_mine():
            self._afterwards.append(work)
        elif os.getpid() != self._pid:
            work()
        else:
            self._mutex.call(work)
