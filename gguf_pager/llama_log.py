"""What llama.cpp says while it loads a model, to tell the caller why it refused one."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from gguf_pager import _native
from gguf_pager.model import engine

_ERROR = 4
"""GGML_LOG_LEVEL_ERROR of ggml.h."""

_KINDS = ("llama", "ggml")
"""In the order to set them: llama.cpp's function sets both."""

_REASON = re.compile(r"error loading model: (.*)")

_Callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


class Listener:
    """A load that goes on: its thread, the lines of level error, what the user calls the files.

    `caught`: what a signal handler has raised while ours was called: nothing can be raised through C.
    """

    __slots__ = ("caught", "lines", "names", "thread")

    def __init__(self, names: Mapping[str, str]) -> None:
        self.thread = threading.get_ident()
        self.lines: list[str] = []
        self.caught: BaseException | None = None
        longest_first = sorted(names.items(), key=lambda item: -len(item[0]))
        self.names = [(name.encode(), shown.encode("utf-8", "replace")) for name, shown in longest_first]


class LlamaLog:
    """Listens while somebody does, and hands everything on to whom it went before.

    llama.cpp has one callback for all threads, and ggml another. Every load puts ours in their places, whatever an interrupt has
    left there; the last puts the old ones back, unless somebody has set others meanwhile.

    Invariant: whom to hand on to (`_before`) is known before ours are put in place. `_listeners` is replaced, never changed:
    who hears takes no lock. One that an interrupt has left there gives way to the next of its thread.
    """

    def __init__(self) -> None:
        self._mutex = _native.Mutex()
        self._before: dict[str, tuple[int, int | None]] = {}
        self._listeners: dict[int, Listener] = {}
        self._pid = os.getpid()
        self._ours = {kind: _Callback(functools.partial(self._hear, kind)) for kind in _KINDS}

    def _functions(self) -> dict[str, tuple[Any, Any]] | None:
        libraries = {"llama": ctypes.CDLL(str(engine.load().llama_library)), "ggml": engine.load().base}
        found = {}
        for kind in _KINDS:
            if not hasattr(libraries[kind], f"{kind}_log_get"):
                return None
            found[kind] = getattr(libraries[kind], f"{kind}_log_get"), getattr(libraries[kind], f"{kind}_log_set")
            found[kind][0].argtypes, found[kind][0].restype = [ctypes.c_void_p, ctypes.c_void_p], None
        return found

    @contextmanager
    def listening(self, names: Mapping[str, str]) -> Iterator[Listener]:
        """Yield who hears what this thread's load says. In all of it `names` are replaced by what the user calls the files."""
        listener = Listener(names)
        try:
            self._mutex.call(self._begin, listener)
            yield listener
        finally:
            self._mutex.call(self._end, listener)

    def _begin(self, listener: Listener) -> None:
        others = self._listeners if os.getpid() == self._pid else {}  # those of a parent do not go on in its child
        self._listeners, self._pid = {**others, listener.thread: listener}, os.getpid()
        functions = self._functions()
        if functions is None:
            return
        for kind, (get, _) in functions.items():
            current = _current(get)
            if not self._is_ours(current[0]):
                self._before[kind] = current
        for kind, (_, put) in functions.items():
            put(self._ours[kind], None)

    def _end(self, listener: Listener) -> None:
        self._listeners = {thread: other for thread, other in self._listeners.items() if other is not listener}
        functions = self._functions()
        if functions is None or self._listeners:
            return
        current = {kind: _current(get) for kind, (get, _) in functions.items()}
        if any(self._is_ours(address) for address, _ in current.values()):
            for kind, (_, put) in functions.items():
                address, data = self._before[kind] if self._is_ours(current[kind][0]) else current[kind]
                put(ctypes.cast(address, _Callback), data)

    def _is_ours(self, address: int) -> bool:
        return any(address == ctypes.cast(callback, ctypes.c_void_p).value for callback in self._ours.values())

    def _hear(self, kind: str, level: int, text: bytes, _: int | None) -> None:
        listener = self._listeners.get(threading.get_ident())
        try:
            if listener is not None:
                for name, shown in listener.names:
                    text = text.replace(name, shown)
                if level == _ERROR:
                    listener.lines.append(text.decode("utf-8", "replace").strip())
            address, data = self._before[kind]
            ctypes.cast(address, _Callback)(level, text, data)
        except BaseException as error:
            if listener is None:
                raise  # told as unraisable
            listener.caught = error


def _current(get: Any) -> tuple[int, int | None]:
    callback, data = ctypes.c_void_p(), ctypes.c_void_p()
    get(ctypes.byref(callback), ctypes.byref(data))
    return callback.value or 0, data.value


def reason_of(lines: list[str]) -> str | None:
    """Return the reason among such lines; None where there is none."""
    for line in reversed(lines):
        found = _REASON.search(line)
        if found:
            return found[1]
    return lines[0] if lines else None


llama_log = LlamaLog()
