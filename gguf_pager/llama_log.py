"""What llama.cpp says while it loads a model, to tell the caller why it refused one."""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from gguf_pager import engine

_ERROR = 4
"""GGML_LOG_LEVEL_ERROR of ggml.h."""

_REASON = re.compile(r"error loading model: (.*)")

_Callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


class LlamaLog:
    """Listens while somebody does, and hands everything on to whom it went before.

    llama.cpp has one callback for all threads. While several listen, the first has put ours in place and the last puts the
    old one back, unless somebody has set another meanwhile.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_listening = 0
        self._before: dict[str, tuple[int, int | None]] = {}
        self._names: dict[bytes, bytes] = {}
        self._heard: list[tuple[int, list[str]]] = []
        self._ours = _Callback(self._hear)

    def _functions(self) -> dict[str, tuple[Any, Any]] | None:
        libraries = {"ggml": engine.load().base, "llama": ctypes.CDLL(str(engine.load().llama_library))}
        found = {}
        for name, library in libraries.items():
            if not hasattr(library, f"{name}_log_get"):
                return None
            found[name] = getattr(library, f"{name}_log_get"), getattr(library, f"{name}_log_set")
            found[name][0].argtypes, found[name][0].restype = [ctypes.c_void_p, ctypes.c_void_p], None
        return found

    @contextmanager
    def listening(self, names: Mapping[str, str]) -> Iterator[list[str]]:
        """Yield what this thread's load says of level error. In all that is said `names` are replaced by what the user calls
        the files."""
        lines: list[str] = []
        heard = (threading.get_ident(), lines)
        with self._lock:
            functions = self._functions()
            if functions is not None and self._n_listening == 0:
                for kind, (get, _) in functions.items():
                    found = _current(get)
                    if found[0] != ctypes.cast(self._ours, ctypes.c_void_p).value:  # an interrupt has left ours there
                        self._before[kind] = found
                for _, put in functions.values():
                    put(self._ours, None)
            self._n_listening += 1
            self._heard.append(heard)
            self._names |= {name.encode(): shown.encode("utf-8", "replace") for name, shown in names.items()}
        try:
            yield lines
        finally:
            with self._lock:
                self._n_listening -= 1
                self._heard = [other for other in self._heard if other is not heard]
                for name in names:
                    self._names.pop(name.encode(), None)
                if functions is not None and self._n_listening == 0:
                    own = ctypes.cast(self._ours, ctypes.c_void_p).value
                    are_ours = {kind: _current(get)[0] == own for kind, (get, _) in functions.items()}
                    for kind in ("llama", "ggml"):  # the first sets both
                        address, data = self._before[kind]
                        if are_ours[kind]:
                            functions[kind][1](ctypes.cast(address, _Callback), data)

    def _hear(self, level: int, text: bytes, _: int | None) -> None:
        for name, shown in list(self._names.items()):
            text = text.replace(name, shown)
        for thread, lines in self._heard if level == _ERROR else ():
            if thread == threading.get_ident():
                lines.append(text.decode("utf-8", "replace").strip())
        address, data = self._before["llama"]
        ctypes.cast(address, _Callback)(level, text, data)


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
