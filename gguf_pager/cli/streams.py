"""Standard output and standard error that may be closed, full, or a pipe nobody reads: one line where it can be said, and an
exit code, instead of a traceback."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn, TextIO

BROKEN_PIPE = 141
"""128 + SIGPIPE, as a shell has it for programs that end when nobody reads them any more."""


class OutputError(Exception):
    """Standard output cannot be written to: nobody will see what the command has to say."""

    def __init__(self, number: int) -> None:
        super().__init__(f"Standard output cannot be written to: {os.strerror(number)}.")
        self.exit_code = BROKEN_PIPE if number == errno.EPIPE else 1


class _Raw(io.FileIO):
    """A descriptor that is written to until it fails once: `complain` is called then, and nothing is written any more."""

    def __init__(self, fd: int, complain: Callable[[int], None]) -> None:
        super().__init__(fd, "wb", closefd=False)
        self.has_failed = False
        self._complain = complain

    def write(self, data: bytes, /) -> int:  # type: ignore[override]  # any buffer
        if not self.has_failed:
            try:
                return super().write(data)
            except OSError as error:
                self.has_failed = True
                self._complain(error.errno or errno.EIO)
        return memoryview(data).nbytes


def _raise(number: int) -> NoReturn:
    raise OutputError(number)


def _ignore(_: int) -> None:
    """What goes to standard error is no result: the work goes on, and the exit code tells."""


@contextmanager
def guarded() -> Iterator[Callable[[], bool]]:
    """Guard both streams for the time of the block; yields what tells whether something could not be shown on stderr.

    Names of files need not be text in the terminal's encoding: what it lacks is shown by its number. Streams that
    somebody has put in place of the process's own are left alone.
    """
    before = (sys.stdin, sys.stdout, sys.stderr)
    if sys.stdin is None:
        _dead_end()  # or the first file that is opened would be taken for standard input by whoever comes next
    raw_err = _Raw(_descriptor(sys.stderr), _ignore) if sys.stderr is sys.__stderr__ else None
    if raw_err is not None:
        sys.stderr = _text(raw_err, sys.stderr)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _text(_Raw(_descriptor(sys.stdout), _raise), sys.stdout)
    try:
        yield lambda: raw_err is not None and raw_err.has_failed
    finally:
        sys.stdin, sys.stdout, sys.stderr = before


def _descriptor(stream: TextIO | None) -> int:
    return _dead_end() if stream is None else stream.fileno()


def _text(raw: _Raw, like: TextIO | None) -> io.TextIOWrapper:
    buffered = io.BufferedWriter(raw)  # type: ignore[type-var]  # whose write takes any buffer, too
    return io.TextIOWrapper(buffered, encoding=like.encoding if like else "utf-8", errors="backslashreplace",
                            line_buffering=True)


def _dead_end() -> int:
    """Return a descriptor for a stream that was closed: reads of it find nothing, writes fail. It takes the stream's number, as
    the lowest that is free; otherwise a file that is opened later would, and would be taken for the stream."""
    return os.open(os.devnull, os.O_RDONLY)

