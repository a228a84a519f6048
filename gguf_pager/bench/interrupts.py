"""Ctrl-C for a benchmark: noticed where a run can be ended, and nowhere else."""

from __future__ import annotations

import signal
import socket
import time
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """Takes SIGINT, SIGTERM and SIGHUP for the time of the block, in the main thread; those ignored before stay so.

    A handler that raises wherever the program is at that moment is no use here: what is raised in a callback of the garbage
    collector, such as that of a thread's end, is dropped by the interpreter, and the benchmark would go on for hours.
    """

    def __init__(self) -> None:
        self._is_asked = False
        self._previous: dict[signal.Signals, Any] = {}
        self._previous_fd = -1
        self._receiver, self._sender = socket.socketpair()
        self._receiver.setblocking(False)
        self._sender.setblocking(False)

    def __enter__(self) -> Self:
        taken = [number for number in _NUMBERS if signal.getsignal(number) is not signal.SIG_IGN]  # nohup ignores one
        self._previous = {number: signal.signal(number, self._ask) for number in taken}
        self._previous_fd = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        signal.set_wakeup_fd(self._previous_fd)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._sender.close()
        self._receiver.close()

    def fileno(self) -> int:
        """Return a descriptor that becomes readable with a signal: for `selectors`, whose wait it ends. Then `check`."""
        return self._receiver.fileno()

    def check(self) -> None:
        """Raise KeyboardInterrupt if any of the signals has come."""
        with suppress(BlockingIOError):
            self._receiver.recv(64)
        if self._is_asked:
            raise KeyboardInterrupt

    def sleep(self, seconds: float) -> None:
        """Sleep, or raise KeyboardInterrupt as soon as one of the signals comes."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self.check()
            time.sleep(min(left, 0.1))

    def _ask(self, *_: Any) -> None:
        self._is_asked = True
