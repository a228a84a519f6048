"""What can go wrong, one exception per kind of remedy; all are PagerError."""

from __future__ import annotations

import unicodedata

_UNPRINTABLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode's categories of what steers a terminal or a line instead of being seen: control characters, marks of direction,
bytes that were no UTF-8, separators of lines."""

_JOINERS = "\u200c\u200d"
"""Of category Cf, too, but part of the spelling of many languages and of emoji."""


def printable(text: object) -> str:
    """Return a text that came from a file, or a file's name, as it can be shown: what would steer the terminal is replaced."""
    return "".join("\ufffd" if unicodedata.category(letter) in _UNPRINTABLE and letter not in _JOINERS else letter
                   for letter in str(text))


class PagerError(Exception):
    """Any failure of gguf_pager; its message says what to do, and can be shown as it is."""

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message))


class LayoutError(PagerError, ValueError):
    """The file is not a model whose experts can be paged: choose or repair the file.

    Stock llama-cpp-python raises ValueError there, and programs catch that.
    """


class BudgetError(PagerError):
    """The budget is malformed or too small: the message names the smallest one that works."""


class EngineError(PagerError):
    """llama-cpp-python is missing, unfamiliar, or was used in a way it cannot be: install or call it differently."""


class PagerIOError(PagerError):
    """A read from the model file failed; the tokens computed from it were thrown away.

    Attributes:
        errno: the operating system's error number.
        path: the file.
        offset_bytes: where in the file.
    """

    def __init__(self, message: str, *, errno: int, path: str, offset_bytes: int) -> None:
        super().__init__(message)
        self.errno = errno
        self.path = path
        self.offset_bytes = offset_bytes
