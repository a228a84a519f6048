"""Stopping a batch in the middle of its computation."""

from __future__ import annotations

import ctypes
from typing import Any

from llama_cpp import llama_cpp as low

from gguf_pager.errors import EngineError
from gguf_pager.model import engine


class Brake:
    """Lets llama_decode return 2 at the next operation of its graph, for good.

    llama.cpp asks before each of some thousand operations per token, where there is no time to wait for Python. So ggml answers itself: what
    is asked is a flag of a ggml context that serves for nothing else.

    Attributes:
        is_pulled: whether batches are stopped.
    """

    def __init__(self, context: Any) -> None:
        """`context` is llama.cpp's, and must be there until the brake is closed."""
        base = engine.load().base
        base.ggml_set_no_alloc.restype, base.ggml_set_no_alloc.argtypes = None, [ctypes.c_void_p, ctypes.c_bool]
        self._base, self._context = base, context
        self._flag: int | None = base.ggml_init(engine._InitParams(0, None, False))
        if not self._flag:
            raise EngineError("ggml cannot allocate a few bytes: free some memory.")
        self.is_pulled = False
        asked = ctypes.cast(base.ggml_get_no_alloc, low.ggml_abort_callback)
        low.llama_set_abort_callback(context, asked, ctypes.c_void_p(self._flag))

    def pull(self) -> None:
        """Stop what is being computed. Any thread may, and a signal handler."""
        self.is_pulled = True
        if self._flag is not None:
            self._base.ggml_set_no_alloc(self._flag, True)

    def close(self) -> None:
        """Let go of the context, when nobody computes with it; twice is fine."""
        flag, self._flag = self._flag, None
        if flag is not None:
            low.llama_set_abort_callback(self._context, low.ggml_abort_callback(), None)
            self._base.ggml_free(flag)
