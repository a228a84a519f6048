"""A Ctrl-C while llama.cpp loads a model or makes a context, which call back into Python, where an exception is lost."""

from __future__ import annotations

import ctypes
import signal
import threading
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

_Result = TypeVar("_Result")

_Progress = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_float, ctypes.c_void_p)
"""llama_progress_callback of llama.h: false ends the loading."""


class _Call:
    """A call that goes on. Known weakly: whoever is interrupted leaves none behind."""

    __slots__ = ("__weakref__",)


class Deferral:
    """Keeps a Ctrl-C until C code has returned, and raises then what the program's own handler raises.

    Only the main thread runs handlers: elsewhere, and where a program has a handler in C or none, there is nothing to do.
    A load ends early if it is handed `progress`. Nothing is kept once the call is over, even where another signal's handler has raised
    before ours could be taken back; and a second Ctrl-C is the handler's again.
    """

    def __init__(self) -> None:
        self._handler: Callable[[int, FrameType | None], object] | None = None
        self._kept: tuple[int, FrameType | None] | None = None
        self._call: weakref.ref[_Call] | None = None
        self.progress = _Progress(lambda share, data: self._kept is None)

    def _keep(self, number: int, frame: FrameType | None) -> None:
        if self._kept is None and self._call is not None and self._call() is not None:
            self._kept = number, frame
        elif self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            self._handler(number, frame)

    def call(self, function: Callable[..., _Result], *args: Any, undo: Callable[[_Result], object]) -> _Result:
        """Call a function; `undo` what it returns if there was a Ctrl-C meanwhile, and let the handler raise.

        A handler that raises nothing has had its say, and the result is returned.
        """
        if threading.current_thread() is not threading.main_thread():
            return function(*args)
        handler = signal.getsignal(signal.SIGINT)
        if not callable(handler):
            return function(*args)
        going_on = _Call()
        self._handler, self._call = handler, weakref.ref(going_on)
        try:
            try:
                signal.signal(signal.SIGINT, self._keep)
                result = function(*args)
            finally:
                signal.signal(signal.SIGINT, handler)
                del going_on
        except BaseException:
            if self._kept is not None:
                handler(*self._kept)
            raise
        if self._kept is not None:
            try:
                handler(*self._kept)
            except BaseException:
                undo(result)
                raise
        return result
