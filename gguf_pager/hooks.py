"""Where gguf_pager meets llama_cpp: its load, context, decode and free functions, wrapped while someone needs them.

llama_cpp calls these through its module `llama_cpp.llama_cpp`, and offers no other way to set a context's eval callback
or to turn weight repacking off. The wrappers pass every model and context that is not paged straight on.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import llama_cpp
from llama_cpp import llama_cpp as low

from gguf_pager import _native, budget, engine, probe, residency
from gguf_pager.errors import BudgetError, EngineError
from gguf_pager.fingerprint import Watch
from gguf_pager.layout import Layout
from gguf_pager.loading import Loader
from gguf_pager.pager import Pager
from gguf_pager.residency import Residency
from gguf_pager.sizing import Request, open_or_shrink
from gguf_pager.threads import Threads

log = logging.getLogger("gguf_pager")

_WRAPPED = (
    "llama_model_load_from_file",
    "llama_model_free",
    "llama_init_from_model",
    "llama_free",
    "llama_decode",
    "llama_encode",
    "llama_set_abort_callback",
    "llama_set_causal_attn",
    "llama_set_n_threads",
)


@dataclass(slots=True)
class _Model:
    """A paged model. `contexts` by address."""

    address: int
    request: Request
    pager: Pager
    watch: Watch
    residency: Residency
    keep_dense: Callable[[], Residency]
    contexts: dict[int, _Context] = field(default_factory=dict)


@dataclass(slots=True)
class _Context:
    model: _Model
    tap: _native.Tap
    pid: int
    is_cut: bool
    threads: Threads
    keep: tuple[Any, ...]
    """The user's own callbacks, which must live as long as the context."""

    def close(self) -> None:
        """End what belongs to a context that is gone."""
        self.tap.close()
        if self.pid == os.getpid():
            self.threads.close()


class _Hooks:
    """The wrappers and what they know. There is one, because there is one module to wrap."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._loader = Loader(self._call)
        self._n_holders = 0
        self._original: dict[str, Callable[..., Any]] = {}
        self._in_package: set[str] = set()
        self._by_thread: dict[int, Request] = {}
        self._installed: list[Request] = []
        self.models: dict[int, _Model] = {}
        self.contexts: dict[int, _Context] = {}

    def keep_profiles(self) -> None:
        """Keep what models that nobody has closed have learned: when the program ends, it is too late to write files
        by the time they are."""
        for model in list(self.models.values()):
            model.pager.keep_profile()

    # ---- wrapping ----

    def hold(self) -> None:
        """Wrap the functions, if nobody has yet."""
        with self._lock:
            self._n_holders += 1
            if self._n_holders > 1:
                return
            for name in _WRAPPED:
                self._original[name] = getattr(low, name)
                setattr(low, name, getattr(self, name))
                if getattr(llama_cpp, name, None) is self._original[name]:
                    self._in_package.add(name)
                    setattr(llama_cpp, name, getattr(self, name))

    def drop(self) -> None:
        """Unwrap them with the last holder."""
        with self._lock:
            self._n_holders -= 1
            if self._n_holders == 0:
                for name, original in self._original.items():
                    setattr(low, name, original)
                    if name in self._in_package:
                        setattr(llama_cpp, name, original)
                self._in_package.clear()

    @contextmanager
    def constructing(self, request: Request) -> Iterator[None]:
        """Page what this thread opens meanwhile."""
        thread = threading.get_ident()
        self.hold()
        outer = self._by_thread.get(thread)
        self._by_thread[thread] = request
        try:
            yield
        finally:
            if outer is None:
                del self._by_thread[thread]
            else:
                self._by_thread[thread] = outer
            self.drop()

    def install(self, request: Request) -> None:
        """Page what any thread opens from now on."""
        self.hold()
        self._installed.append(request)

    def uninstall(self, request: Request) -> None:
        """Stop that. Models that are open stay paged."""
        self._installed.remove(request)
        self.drop()

    def _request(self) -> Request | None:
        own = self._by_thread.get(threading.get_ident())
        return own or (self._installed[-1] if self._installed else None)

    def _call(self, name: str, *args: Any) -> Any:
        original = self._original.get(name) or getattr(low, name)
        return original(*args)

    # ---- models ----

    def llama_model_load_from_file(self, path_model: bytes, params: Any, /) -> Any:
        """Load a model; without reading its experts, when it is to be paged."""
        request = self._request()
        if request is None or params.vocab_only:
            return self._call("llama_model_load_from_file", path_model, params)
        opened = self._loader.load(path_model, params, request)
        if opened.pager is None:
            return opened.address
        assert opened.watch is not None and opened.residency is not None
        with self._lock:
            self.models[opened.address] = _Model(
                opened.address, request, opened.pager, opened.watch, opened.residency, opened.keep_dense)
            self.hold()
        request.opened.append(opened.pager)
        return opened.address

    def llama_model_free(self, model: Any, /) -> None:
        """Free a model, its contexts' taps and its pager."""
        with self._lock:  # before the address can be given to another model
            paged = self.models.pop(_handle(model), None)
            forgotten = [self._forget_context(address) for address in list(paged.contexts)] if paged else []
        self._call("llama_model_free", model)
        if paged is None:
            return
        for entry in forgotten:
            if entry is not None:
                entry.close()
        paged.pager.close()
        with self._lock:
            paged.request.opened.remove(paged.pager)
            self.drop()

    # ---- contexts ----

    def llama_init_from_model(self, model: Any, params: Any, /) -> Any:
        """Make a context; of a paged model one whose graph passes through a tap."""
        paged = self.models.get(_handle(model))
        if paged is None:
            return self._call("llama_init_from_model", model, params)
        params = type(params).from_buffer_copy(params)
        is_cut = False
        self._wait_for_other_arenas(paged)
        was_open = paged.pager.is_open
        params.op_offload = False  # a GPU build would copy host experts to the device for large batches
        while True:
            probe.give_back_free_memory()  # of the attempt before, or of a closed model
            before = probe.process_memory()
            tap, context = self._make_context(paged, params)
            if not context:
                return context
            try:
                wanted = int(low.llama_n_ubatch(context))  # not params.n_ubatch: 0 means n_batch there
                is_uncut = _is_uncut(params, context, paged.pager.layout)
                n_ubatch = open_or_shrink(paged.pager, paged.request, paged.residency, wanted, is_uncut, before)
                if n_ubatch == wanted:
                    if not was_open:
                        _check_opened(paged)
                    _attach(tap, paged.pager)
                    break
            except BaseException:
                self._call("llama_free", context)
                raise
            self._call("llama_free", context)
            log.info("n_ubatch is %d instead of %d: the budget has no slots for more", n_ubatch, wanted)
            params.n_ubatch, is_cut = n_ubatch, True
        keep = (params, params.cb_eval, params.abort_callback)
        kept = Threads(int(context))
        kept.provide()
        with self._lock:
            self.contexts[int(context)] = paged.contexts[int(context)] = _Context(
                paged, tap, os.getpid(), is_cut, kept, keep)
        paged.pager.warm_up()
        return context

    def _wait_for_other_arenas(self, paged: _Model) -> None:
        """What this process uses is measured to size an arena: others that are still being made present would be missed."""
        if not paged.pager.is_open:
            with self._lock:
                for other in self.models.values():
                    other.pager.wait_present()

    def _make_context(self, paged: _Model, params: Any) -> tuple[_native.Tap, Any]:
        ours = type(params).from_buffer_copy(params)
        n_used = max(layer.n_used for layer in paged.pager.layout.layers)
        n_ubatch = params.n_ubatch or params.n_batch
        tap = _native.Tap(
            ggml=engine.ggml_numbers(), max_ids=n_ubatch * n_used,
            batch_bytes=budget.batch_bytes(paged.pager.layout, n_ubatch),
            next_eval=_address(params.cb_eval), next_eval_data=params.cb_eval_user_data or 0,
            next_abort=_address(params.abort_callback), next_abort_data=params.abort_callback_data or 0,
        )
        eval_address, abort_address, data = tap.addresses()
        ours.cb_eval = ctypes.cast(eval_address, type(params.cb_eval))
        ours.cb_eval_user_data = data
        ours.abort_callback = ctypes.cast(abort_address, type(params.abort_callback))
        ours.abort_callback_data = data
        return tap, self._call("llama_init_from_model", paged.address, ours)

    def _forget_context(self, address: int) -> _Context | None:
        entry = self.contexts.pop(address, None)
        if entry is not None:
            entry.model.contexts.pop(address, None)
        return entry

    def llama_free(self, ctx: Any, /) -> None:
        """Free a context and its tap."""
        with self._lock:  # before the address can be given to another context
            entry = self._forget_context(_handle(ctx))
        self._call("llama_free", ctx)
        if entry is not None:
            entry.close()

    def llama_decode(self, ctx: Any, batch: Any, /) -> int:
        """Decode; raise what went wrong while experts were brought in."""
        return self._compute("llama_decode", ctx, batch)

    def llama_encode(self, ctx: Any, batch: Any, /) -> int:
        """Encode; raise what went wrong while experts were brought in."""
        return self._compute("llama_encode", ctx, batch)

    def _compute(self, name: str, ctx: Any, batch: Any) -> int:
        entry = self.contexts.get(_handle(ctx))
        if entry is None:
            return int(self._call(name, ctx, batch))
        if entry.pid != os.getpid():
            raise EngineError("This model was opened before a fork and cannot be used in the child: "
                              "open it again there.")
        pager, watch = entry.model.pager, entry.model.watch
        failure = watch.find_change()
        if failure is not None:
            raise pager.failure_error(failure)
        result = int(self._call(name, ctx, batch))
        entry.tap.idle()
        failure = entry.tap.take_failure() or watch.find_change()
        if failure is not None:
            watch.raise_caught()
            raise pager.failure_error(failure)
        return result

    def llama_set_causal_attn(self, ctx: Any, causal_attn: bool, /) -> None:
        """Refuse to let tokens see all others where batches were cut: llama.cpp would end the process."""
        entry = self.contexts.get(_handle(ctx))
        if entry is not None and entry.is_cut and not causal_attn:
            raise EngineError("Non-causal attention needs whole batches, and this budget has made n_ubatch smaller: "
                              "raise the budget or lower n_ubatch.")
        self._call("llama_set_causal_attn", ctx, causal_attn)

    def llama_set_abort_callback(self, ctx: Any, abort_callback: Any, abort_callback_data: Any, /) -> None:
        """Set the user's abort callback behind ours, which must stay."""
        entry = self.contexts.get(_handle(ctx))
        if entry is None:
            self._call("llama_set_abort_callback", ctx, abort_callback, abort_callback_data)
            return
        data = ctypes.cast(abort_callback_data, ctypes.c_void_p).value if abort_callback_data else 0
        entry.tap.chain_abort(_address(abort_callback), data or 0)
        entry.keep = (*entry.keep[:2], abort_callback)

    def llama_set_n_threads(self, ctx: Any, n_threads: int, n_threads_batch: int, /) -> None:
        """Set them, and have them."""
        self._call("llama_set_n_threads", ctx, n_threads, n_threads_batch)
        entry = self.contexts.get(_handle(ctx))
        if entry is not None and entry.pid == os.getpid():
            entry.threads.provide()


hooks = _Hooks()
atexit.register(hooks.keep_profiles)


def _handle(pointer: Any) -> int:
    """Return the address behind a model or context, which llama_cpp hands out as int and takes as c_void_p, too."""
    return int((pointer.value if isinstance(pointer, ctypes.c_void_p) else pointer) or 0)


def _check_opened(paged: _Model) -> None:
    """Keep the dense weights of a model whose budget seemed too small for them, now that it is not."""
    if paged.residency.method == residency.LEFT.method:
        paged.residency = paged.keep_dense()
        paged.watch.compare_also(paged.residency.copies)


def _attach(tap: _native.Tap, pager: Pager) -> None:
    try:
        tap.attach(pager.native())
    except OSError as error:
        if error.errno == errno.EMFILE:
            raise EngineError("This model has as many contexts as a paged model can have: free one.") from None
        raise BudgetError(f"The tables of a context cannot be allocated: {error.strerror}. Lower the budget.") from None


def _address(function: Any) -> int:
    """Return the address of a ctypes callback, 0 for none."""
    return (ctypes.cast(function, ctypes.c_void_p).value or 0) if function else 0


def _is_uncut(params: Any, context: Any, layout: Layout) -> bool:
    """Return whether a batch must be computed in one piece: its tokens see all others, or are pooled into one result.

    Smaller pieces would give other results, or end the process: llama.cpp asserts that there are none.
    """
    is_causal = layout.values.get(f"{layout.architecture}.attention.causal", True)
    has_memory = bool(low.llama_get_memory(context))  # without a KV cache llama_decode encodes, all at once
    is_pooled = params.embeddings and low.llama_pooling_type(context) > low.LLAMA_POOLING_TYPE_NONE
    return (params.attention_type == low.LLAMA_ATTENTION_TYPE_NON_CAUSAL or not is_causal or not has_memory
            or is_pooled)
