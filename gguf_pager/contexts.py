"""A paged model and its contexts as llama_cpp's functions meet them: by address, several openings of one, one at a time."""

from __future__ import annotations

import ctypes
import errno
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from llama_cpp import llama_cpp as low

from gguf_pager import _native
from gguf_pager.contention import FLASH_ATTENTION_DISABLED, Adaptation
from gguf_pager.errors import BudgetError, EngineError
from gguf_pager.fingerprint import Watch
from gguf_pager.memory import budget
from gguf_pager.memory.residency import Residency
from gguf_pager.memory.sizing import Request, Untouched, untouched_dense_bytes
from gguf_pager.model import engine
from gguf_pager.model.layout import Layout
from gguf_pager.pager import Pager
from gguf_pager.threads import Threads


@dataclass(slots=True, eq=False)
class Model:
    """A paged model. `contexts` by address; `requests` are of all who have opened it, and there are
    as many `openings` as have not freed it."""

    address: int
    request: Request
    pager: Pager
    watch: Watch
    residency: Residency
    keep_dense: Callable[[], Residency]
    key: tuple[Any, ...]
    openings: list[Request] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    contexts: dict[int, Context] = field(default_factory=dict)
    taps: list[_native.Tap] = field(default_factory=list)
    is_leaving: bool = False
    """Its last owner frees it: nobody can share it any more."""
    has_computed: bool = False

    def promised_bytes(self) -> int:
        """Return how much this model and its contexts will make resident that is not yet."""
        contexts = list(self.contexts.values())
        n_most = max((context.untouched.n_ubatch for context in contexts), default=0)
        work_bytes = budget.shared_work_bytes(n_most)  # free between two batches, and given back where memory is measured
        if self.pager.is_open and not self.has_computed:
            work_bytes = budget.WORK_BYTES + untouched_dense_bytes(self.pager, self.residency)
        return work_bytes + sum(context.untouched.count_bytes() for context in contexts)


@dataclass(slots=True, eq=False)
class Context:
    """A context of a paged model, its tap, and what must live as long as it does."""

    model: Model
    address: int
    memory: int
    tap: _native.Tap
    pid: int
    is_cut: bool
    threads: Threads
    keep: tuple[Any, ...]
    """The user's own callbacks, which must live as long as the context."""
    adaptation: Adaptation | None
    untouched: Untouched
    mutex: _native.Mutex = field(default_factory=_native.Mutex)
    """Held while it computes: llama.cpp's contexts know no threads."""
    afterwards: deque[Callable[[], None]] = field(default_factory=deque)
    """What a signal handler wants freed in the middle of a decode: it is, at the decode's end."""

    def note_use(self, n_tokens: int) -> None:
        """Take note that a batch of so many tokens was computed."""
        self.untouched.note(n_tokens, lambda: int(low.llama_memory_seq_pos_max(self.memory, 0)) + 1)
        self.model.has_computed = True
        self.model.pager.note_use()

    def close(self) -> None:
        """End what belongs to a context that is gone."""
        self.tap.close()
        self.model.taps[:] = [tap for tap in self.model.taps if tap is not self.tap]
        if self.pid == os.getpid():
            self.threads.close()

    def refuse_fork(self) -> None:
        """Raise EngineError in a child: the threads and the lock's owner are the parent's."""
        if self.pid != os.getpid():
            raise EngineError("This model was opened before a fork and cannot be used in the child: "
                              "open it again there.")

    def is_in_a_handler(self) -> bool:
        """Return whether this thread runs a signal handler in the middle of a decode with the context."""
        return self.tap.is_handling() and self.mutex.is_mine()

    def refuse_callback(self, what: str) -> None:
        """Raise EngineError if this thread is computing with the context right now, in a callback of its own."""
        if self.mutex.is_mine():
            raise EngineError(f"A context cannot {what} from inside a callback of its own llama_decode: do it afterwards.")


def count_cells(params: Any, n_ctx: int) -> int:
    """Return how many tokens a token of a context of these llama_context_params looks at, at most."""
    return n_ctx if params.kv_unified else n_ctx // max(1, int(params.n_seq_max))


def count_scores(layout: Layout, params: Any, n_ctx: int, n_ubatch: int) -> int:
    """Return how many scores of attention such a context has at once, where it keeps them."""
    if int(params.flash_attn_type) != FLASH_ATTENTION_DISABLED:
        return 0
    return budget.count_scores(layout, count_cells(params, n_ctx), n_ubatch)


# ---- models that may be shared ----

_PLAIN_FIELDS = ("n_gpu_layers", "split_mode", "main_gpu", "check_tensors", "no_host", "load_mtp")


def key_of(path: bytes | list[bytes], params: Any, request: Request) -> tuple[Any, ...] | None:
    """Return what tells whether two openings may share a model: the file, what changes what is loaded from it, the slots.

    None where that cannot be told: the file is gone, or somebody else decides which memory tensors lie in.
    """
    if params.devices or params.tensor_buft_overrides:
        return None
    paths = path if isinstance(path, list) else [path]
    try:
        files = tuple((status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns) for status in map(os.stat, paths))
    except OSError:
        return None
    shares = tuple(params.tensor_split[: int(low.llama_max_devices())]) if params.tensor_split else ()
    return (files, shares, request.budget, request.options, *_overrides(params),
            *(getattr(params, name) for name in _PLAIN_FIELDS))


def _overrides(params: Any) -> list[bytes]:
    """Return the overridden metadata, entry by entry."""
    found: list[bytes] = []
    while params.kv_overrides and params.kv_overrides[len(found)].key:
        found.append(bytes(params.kv_overrides[len(found)]))
    return found


# ---- contexts ----

def handle_of(pointer: Any) -> int:
    """Return the address behind a model or context, which llama_cpp hands out as int and takes as c_void_p, too."""
    return int((pointer.value if isinstance(pointer, ctypes.c_void_p) else pointer) or 0)


def attach(tap: _native.Tap, pager: Pager) -> None:
    """Let a tap serve its context from a pager's slots."""
    try:
        tap.attach(pager.native())
    except OSError as error:
        if error.errno == errno.EMFILE:
            raise EngineError("This model has as many contexts as a paged model can have: free one.") from None
        raise no_tables(error) from None


def no_tables(error: OSError) -> BudgetError:
    """Return the exception for a tap that has got no memory."""
    return BudgetError(f"The tables of a context cannot be allocated: {error.strerror}. Lower the budget or n_ubatch.")


def address_of(function: Any) -> int:
    """Return the address of a ctypes callback, 0 for none."""
    return (ctypes.cast(function, ctypes.c_void_p).value or 0) if function else 0


def number_bytes(ggml_type: int) -> float:
    """Return the bytes of one number of a type, on average over its blocks."""
    base = engine.load().base
    return float(base.ggml_type_size(ggml_type) / base.ggml_blck_size(ggml_type))
