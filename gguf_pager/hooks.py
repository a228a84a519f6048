"""Where gguf_pager meets llama_cpp: what opens, computes with or frees a model or a context, wrapped while someone needs it.

llama_cpp calls these through its module `llama_cpp.llama_cpp`, and offers no other way to set a context's eval callback
or to turn weight repacking off. The wrappers pass every model and context that is not paged straight on.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import logging
import operator
import os
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from contextvars import ContextVar, copy_context
from functools import partial
from typing import Any, TypeVar

import llama_cpp
from llama_cpp import llama_cpp as low

from gguf_pager import _native, guard
from gguf_pager.arguments import take_request
from gguf_pager.contention import Adaptation, depends_on_threads
from gguf_pager.contexts import (
    Context,
    Model,
    address_of,
    attach,
    count_cells,
    count_scores,
    handle_of,
    key_of,
    no_tables,
    number_bytes,
)
from gguf_pager.deferral import Deferral
from gguf_pager.errors import EngineError
from gguf_pager.loading import Loader
from gguf_pager.memory import budget, probe, residency
from gguf_pager.memory.residency import are_in_place
from gguf_pager.memory.sizing import (
    Request,
    Untouched,
    check_cache,
    make_room_for_cache,
    measure_context,
    open_or_shrink,
    suitable_ubatch,
)
from gguf_pager.model import engine
from gguf_pager.threads import Threads
from gguf_pager.turns import take_all
from gguf_pager.windows import with_whole_window
from gguf_pager.wrapping import Wrapping

log = logging.getLogger("gguf_pager")

_Result = TypeVar("_Result")

_OF_A_CONTEXT = {
    "llama_state_get_data": 0, "llama_copy_state_data": 0, "llama_state_set_data": 0, "llama_set_state_data": 0,
    "llama_state_load_file": 0, "llama_load_session_file": 0, "llama_state_save_file": 0, "llama_save_session_file": 0,
    "llama_state_seq_get_data": 0, "llama_state_seq_set_data": 0, "llama_state_seq_get_data_ext": 0,
    "llama_state_seq_set_data_ext": 0, "llama_state_seq_save_file": 0, "llama_state_seq_load_file": 0,
    "llama_sampler_sample": 1,
}
"""Functions that end the process when the context decodes at the same time in another thread, and which argument it is."""

_OF_A_MEMORY = ("llama_memory_clear", "llama_memory_seq_rm", "llama_memory_seq_cp", "llama_memory_seq_keep",
                "llama_memory_seq_add", "llama_memory_seq_div")
"""The same for a context's memory, their first argument."""


class _Scope:
    """Somebody is constructing a Llama. Known weakly: whoever is interrupted leaves none behind."""

    __slots__ = ("__weakref__",)


_constructing: ContextVar[Request | None] = ContextVar("gguf_pager_request", default=None)
"""For what opens a model here: a context variable ends with the call that it was set for, whatever interrupts that."""


_closing: ContextVar[Request | None] = ContextVar("gguf_pager_closing", default=None)
"""Whose models and contexts are being freed here."""


class _Hooks:
    """The wrappers and what they know. There is one, because there is one module to wrap."""

    def __init__(self) -> None:
        self._opening = _native.Mutex()
        """Held while memory is measured and taken: two at a time would take the same bytes."""
        self._syncing = _native.Mutex()
        self._counting = _native.Mutex()
        """Held for a moment, by who begins to share a model and by who finds that nobody does."""
        self._wrapping = Wrapping()
        self._loader = Loader(self._call)
        self._scopes: weakref.WeakSet[_Scope] = weakref.WeakSet()
        self.installed: list[Request] = []
        self.models: dict[int, Model] = {}
        self.contexts: dict[int, Context] = {}
        self._add_places()

    def _add_places(self) -> None:
        for name in (
            "llama_model_load_from_file", "llama_load_model_from_file", "llama_model_load_from_splits",
            "llama_model_load_from_file_ptr", "llama_model_init_from_user", "llama_model_free", "llama_free_model",
            "llama_init_from_model", "llama_new_context_with_model", "llama_free", "llama_decode", "llama_encode",
            "llama_process", "llama_set_abort_callback", "llama_set_causal_attn", "llama_set_n_threads",
        ):
            self._wrapping.add((low, llama_cpp), name, getattr(self, name))
        for name, index in _OF_A_CONTEXT.items():
            self._wrapping.add((low, llama_cpp), name, self._taking_turns(name, index, self._find_context))
        for name in _OF_A_MEMORY:
            self._wrapping.add((low, llama_cpp), name, self._taking_turns(name, 0, self._find_memory))
        for name in guard.NAMES:
            method = getattr(llama_cpp.Llama, name)
            if name == "eval":
                method = with_whole_window(method, self.is_paged)
            self._wrapping.add((llama_cpp.Llama,), name, guard.guarded(name, method, self.is_paged))
        self._wrapping.add((llama_cpp.Llama,), "__init__", self._taking_options(llama_cpp.Llama.__init__))

    def keep_profiles(self) -> None:
        """Keep what models that nobody has closed have learned: when the program ends, it is too late to write files
        by the time they are."""
        for model in list(self.models.values()):
            model.pager.keep_profile()

    # ---- wrapping ----

    def sync(self) -> None:
        """Wrap if somebody needs it, else unwrap. Whether somebody does is never counted, always looked at."""
        self._syncing.call(self._sync)

    def _sync(self) -> None:
        if self._scopes or self.installed or self.models:
            self._wrapping.put_on()
        else:
            self._wrapping.take_off()

    def construct(self, request: Request, function: Callable[..., _Result], *args: Any, **kwargs: Any) -> _Result:
        """Call a function; page what it opens meanwhile in this thread."""
        scope = _Scope()
        try:
            self._scopes.add(scope)
            self.sync()
            context = copy_context()
            context.run(_constructing.set, request)
            return context.run(function, *args, **kwargs)
        finally:
            self._scopes.discard(scope)
            self.sync()

    def close(self, request: Request, function: Callable[[], None], llm: Any) -> None:
        """Close a Llama by a function; then free what an interrupt of an earlier attempt has kept from being freed.

        llama_cpp has crossed off a model or context before it calls us, and would not call again.
        """
        context = copy_context()
        context.run(_closing.set, request)
        context.run(function)
        for owner, name in ((llm.__dict__.get("_ctx"), "ctx"), (llm.__dict__.get("_model"), "model")):
            handle = getattr(owner, name, None)
            if handle is None:
                continue
            entry, model = self.contexts.get(handle_of(handle)), self.models.get(handle_of(handle))
            if name == "ctx" and entry is not None:
                setattr(owner, name, None)
                self.llama_free(handle)
            elif name == "model" and model is not None and request in model.openings:
                setattr(owner, name, None)
                context.run(self.llama_model_free, handle)

    def install(self, request: Request) -> None:
        """Page what any thread opens from now on."""
        try:
            self.installed.append(request)
            self.sync()
            return
        except BaseException:
            self.uninstall(request)
            raise

    def uninstall(self, request: Request) -> None:
        """Stop that. Models that are open stay paged."""
        self.installed[:] = [other for other in self.installed if other is not request]
        self.sync()

    def _request(self) -> Request | None:
        return _constructing.get() or (self.installed[-1] if self.installed else None)

    def _call(self, name: str, *args: Any) -> Any:
        return self._wrapping.call(name, *args)

    # ---- models ----

    def llama_model_load_from_file(self, path_model: bytes, params: Any, /) -> Any:
        """Load a model; without reading its experts, when it is to be paged."""
        return self._load("llama_model_load_from_file", (path_model, params), path_model, params)

    def llama_load_model_from_file(self, path_model: bytes, params: Any, /) -> Any:
        """Load a model, by the older name of the same function."""
        return self._load("llama_load_model_from_file", (path_model, params), path_model, params)

    def llama_model_load_from_splits(self, paths: Any, n_paths: int, params: Any, /) -> Any:
        """Load a model whose files are named one by one."""
        named = [paths[i] for i in range(n_paths)]
        return self._load("llama_model_load_from_splits", (paths, n_paths, params), named, params)

    def llama_model_load_from_file_ptr(self, file: Any, params: Any, /) -> Any:
        """Load a model from an open C file, as stock: who hands that over has reasons of his own. Said in the log."""
        if self._request() is not None:
            log.warning("A model read from an open FILE is not paged: load it by its path.")
        return self._forgetting(self._call("llama_model_load_from_file_ptr", file, params))

    def llama_model_init_from_user(self, *args: Any) -> Any:
        """Make a model of the caller's own tensors: there is no file to page."""
        return self._forgetting(self._call("llama_model_init_from_user", *args))

    def _forgetting(self, address: Any) -> Any:
        """Forget who had the address of a model or context that llama.cpp has just made: he was freed behind our back."""
        model, context = self.models.get(int(address or 0)), self._forget_context(int(address or 0))
        if context is not None:
            context.close()
        if model is not None:
            self._forget_model(model)
        return address

    def forget_freed(self) -> None:
        """Forget models whose memory is gone: somebody has freed them by a function that he had before it was wrapped."""
        for model in list(self.models.values()):
            if not model.is_leaving and not are_in_place(model.residency.copies):
                log.warning("%s was freed by a function that was not wrapped", model.pager.layout.name)
                self._forget_model(model)

    def _load(self, name: str, args: tuple[Any, ...], path: bytes | list[bytes], params: Any) -> Any:
        request = self._request()
        if request is None or params.vocab_only or params.no_alloc:
            if request is not None:
                request.reason = "none of its weights were asked for"
            return self._forgetting(self._call(name, *args))
        return self._opening.call(self._open, path, params, request)

    def _open(self, path: bytes | list[bytes], params: Any, request: Request) -> int | None:
        self.forget_freed()
        key = key_of(path, params, request)
        known = next((model for model in list(self.models.values())
                      if key is not None and model.key == key and not model.is_leaving), None)
        if known is not None and known.pager.is_usable() and self._counting.call(self._open_again, known, request):
            return known.address
        opened = self._loader.load(path, params, request)
        try:
            self._forgetting(opened.address)
            if opened.pager is None:
                return opened.address
            assert opened.watch is not None and opened.residency is not None
            model = Model(opened.address, request, opened.pager, opened.watch, opened.residency, opened.keep_dense, key or ())
            self.models[opened.address] = model
            self._add_opening(model, request)
            self.sync()
            return opened.address
        except BaseException:
            self.llama_model_free(opened.address)
            raise

    def _open_again(self, known: Model, request: Request) -> bool:
        """Share a model that is open, its slots included, with somebody who opens the same file in the same way.

        Return False if another thread is freeing it.
        """
        if known.is_leaving:
            return False
        log.info("%s is open already: its slots are shared", known.pager.paths[0])
        request.reason = None
        self._add_opening(known, request)
        return True

    def _add_opening(self, model: Model, request: Request) -> None:
        model.openings.append(request)
        model.requests.append(request)
        if model.pager not in request.opened:
            request.opened.append(model.pager)

    def llama_model_free(self, model: Any, /) -> None:
        """Free a model, its contexts' taps and its pager, with the last of those who have opened it."""
        self._free_model("llama_model_free", model)

    def llama_free_model(self, model: Any, /) -> None:
        """Free a model, by the older name of the same function."""
        self._free_model("llama_free_model", model)

    def _free_model(self, name: str, model: Any) -> None:
        known = self.models.get(handle_of(model))
        if known is None:
            self._call(name, model)
            return
        if self._counting.call(self._end_opening, known):
            return
        for context in list(known.contexts.values()):
            if context.is_in_a_handler():
                context.afterwards.append(partial(self._free_model, name, model))
                return
        for context in list(known.contexts.values()):
            context.refuse_callback("free its model")
            self._locked(context, self._close_context, context)  # whoever decodes comes to the end of it
        # Forgotten before the address can be given to another model.
        _at_once(partial(self.models.pop, known.address, None), partial(self._wrapping.pristine(name), model))
        self._forget_model(known)

    def _end_opening(self, model: Model) -> bool:
        """Return whether others go on with a model that somebody frees."""
        if len(model.openings) > 1:
            request = _closing.get()
            model.openings.remove(request if request in model.openings else model.openings[-1])
            return True
        model.is_leaving = True
        return False

    def _forget_model(self, model: Model) -> None:
        if self.models.get(model.address) is model:
            del self.models[model.address]
        for context in list(model.contexts.values()):
            self._close_context(context)
        for tap in model.taps:  # also of a context that was lost to an interrupt
            tap.close()
        model.pager.close()
        for request in model.requests:
            request.opened[:] = [pager for pager in request.opened if pager is not model.pager]
        self.sync()

    # ---- contexts ----

    def llama_init_from_model(self, model: Any, params: Any, /) -> Any:
        """Make a context; of a paged model one whose graph passes through a tap."""
        return self._make("llama_init_from_model", model, params)

    def llama_new_context_with_model(self, model: Any, params: Any, /) -> Any:
        """Make a context, by the older name of the same function."""
        return self._make("llama_new_context_with_model", model, params)

    def _make(self, name: str, model: Any, params: Any) -> Any:
        if handle_of(model) in self.models:
            self.forget_freed()
        params = _with_sequences(params, _constructing.get())
        paged = self.models.get(handle_of(model))
        if paged is None:
            if self._request() is None:
                return self._forgetting(self._call(name, model, params))
            return self._forgetting(Deferral().call(self._call, name, model, params, undo=self._undo_context))
        return self._opening.call(self._make_paged, paged, type(params).from_buffer_copy(params))

    def _make_paged(self, paged: Model, params: Any) -> Any:
        request = _constructing.get() or paged.request
        asked = _most_tokens(params)
        suitable = suitable_ubatch(paged.pager.layout, asked, 1 if params.kv_unified else max(1, params.n_seq_max))
        is_cut, was_open = suitable != asked, paged.pager.is_open
        if is_cut:
            params.n_ubatch = suitable
        is_sized = not was_open or request.budget.kind == "bytes"
        if is_sized:
            self._wait_for_arenas()
        params.op_offload = False  # a GPU build would copy host experts to the device for large batches
        probe.give_back_free_memory()  # of a closed model
        self._check_cache(paged, params, request)
        before = probe.process_memory()
        tap, context = self._make_context(paged, params)
        if not context:
            return context
        try:
            n_ubatch = int(low.llama_n_ubatch(context))  # not params.n_ubatch: 0 means n_batch there, and n_ctx is the most
            n_ctx = int(low.llama_n_ctx(context))
            request.count_outputs(n_ctx, int(low.llama_n_batch(context)))
            taken = measure_context(paged.pager, request, before, n_ubatch, count_scores(paged.pager.layout, params, n_ctx, n_ubatch))
            open_or_shrink(paged.pager, request, paged.residency, taken, self._promised_bytes())
            if not was_open:
                _check_opened(paged)
            # Beside an arena that becomes present it is not known how much of a context was touched.
            buffer_bytes = (taken.untouched_bytes if is_sized else taken.context_bytes) - taken.score_bytes - taken.output_bytes
            untouched = Untouched(buffer_bytes, taken.score_bytes, taken.output_bytes, n_ubatch, count_cells(params, n_ctx))
            self._add_context(paged, params, tap, int(context), is_cut, untouched)
            paged.pager.note_batches(asked if is_cut else n_ubatch, n_ubatch)
        except BaseException:
            self._drop_context(paged, tap, int(context))
            raise
        return context

    def _add_context(self, paged: Model, params: Any, tap: _native.Tap, address: int, is_cut: bool,
                     untouched: Untouched) -> None:
        self._forgetting(address)
        paged.taps.append(tap)
        attach(tap, paged.pager)
        kept = Threads(address)
        kept.provide()
        keep = (params, params.cb_eval, params.abort_callback)
        memory = int(low.llama_get_memory(address) or 0)
        entry = Context(paged, address, memory, tap, os.getpid(), is_cut, kept, keep, self._adaptation(paged, params, address),
                        untouched)
        paged.contexts[address] = self.contexts[address] = entry
        paged.pager.warm_up()

    def _drop_context(self, paged: Model, tap: _native.Tap, address: int) -> None:
        """Free a context that nobody else has seen yet."""
        _at_once(partial(self.contexts.pop, address, None), partial(paged.contexts.pop, address, None),
                 partial(self._wrapping.pristine("llama_free"), address), tap.close)

    def _check_cache(self, paged: Model, params: Any, request: Request) -> None:
        """Refuse, or make room for, a context's cache before llama.cpp fills it."""
        pager, n_cells = paged.pager, int(params.n_ctx or low.llama_model_n_ctx_train(paged.address))
        cache_bytes = budget.least_cache_bytes(pager.layout, n_cells, number_bytes(params.type_k), number_bytes(params.type_v))
        check_cache(pager, request, n_cells, cache_bytes, paged.residency)
        make_room_for_cache(pager, request, cache_bytes, paged.residency, self._promised_bytes())

    def _promised_bytes(self) -> int:
        return sum(model.promised_bytes() for model in list(self.models.values()))

    def _wait_for_arenas(self) -> None:
        """What this process uses is measured around a new context: an arena that becomes present meanwhile would be taken for it."""
        for model in list(self.models.values()):
            model.pager.wait_present()

    def _make_context(self, paged: Model, params: Any) -> tuple[_native.Tap, Any]:
        ours = type(params).from_buffer_copy(params)
        n_used = max(layer.n_used for layer in paged.pager.layout.layers)
        n_ubatch = _most_tokens(params)
        try:
            tap = _native.Tap(
                ggml=engine.ggml_numbers(), max_ids=n_ubatch * n_used,
                batch_bytes=budget.batch_bytes(paged.pager.layout, n_ubatch),
                row_bytes=budget.row_bytes(paged.pager.layout, n_ubatch),
                next_eval=address_of(params.cb_eval), next_eval_data=params.cb_eval_user_data or 0,
                next_abort=address_of(params.abort_callback), next_abort_data=params.abort_callback_data or 0,
            )
        except OSError as error:
            raise no_tables(error) from None
        eval_address, abort_address, data = tap.addresses()
        ours.cb_eval = ctypes.cast(eval_address, type(params.cb_eval))
        ours.cb_eval_user_data = data
        ours.abort_callback = ctypes.cast(abort_address, type(params.abort_callback))
        ours.abort_callback_data = data
        return tap, Deferral().call(self._call, "llama_init_from_model", paged.address, ours, undo=self._undo_context)

    def _undo_context(self, made: Any) -> None:
        """Free a context that nobody else has seen, and that is None where llama.cpp has made none."""
        if made:
            self._call("llama_free", made)

    def _adaptation(self, paged: Model, params: Any, context: Any) -> Adaptation | None:
        if not paged.pager.options.adapt_threads or depends_on_threads(params):
            return None
        return Adaptation(
            paged.pager, lambda: int(low.llama_n_threads(context)),
            lambda n: self._call("llama_set_n_threads", context, n, low.llama_n_threads_batch(context)))

    def _forget_context(self, address: int) -> Context | None:
        entry = self.contexts.pop(address, None)
        if entry is not None:
            entry.model.contexts.pop(address, None)
        return entry

    def _close_context(self, entry: Context) -> None:
        if self.contexts.get(entry.address) is entry:
            self._forget_context(entry.address)
        entry.model.contexts.pop(entry.address, None)
        entry.close()

    def _locked(self, entry: Context, function: Callable[..., _Result], *args: Any) -> _Result:
        """Call a function while nobody else computes with a context; in a fork nobody does."""
        return function(*args) if entry.pid != os.getpid() else entry.mutex.call(function, *args)

    def llama_free(self, ctx: Any, /) -> None:
        """Free a context and its tap; while another thread decodes with it, once that has come to the end."""
        entry = self.contexts.get(handle_of(ctx))
        if entry is None:
            self._call("llama_free", ctx)
            return
        if entry.is_in_a_handler():
            entry.afterwards.append(partial(self.llama_free, ctx))
            return
        entry.refuse_callback("be freed")
        self._locked(entry, self._free, entry, ctx)

    def _free(self, entry: Context, ctx: Any) -> None:
        if self.contexts.get(entry.address) is not entry:
            return  # another thread has done it
        # Forgotten before the address can be given to another context.
        _at_once(partial(self.contexts.pop, entry.address, None), partial(entry.model.contexts.pop, entry.address, None),
                 partial(self._wrapping.pristine("llama_free"), ctx), entry.tap.close)
        entry.close()

    def llama_decode(self, ctx: Any, batch: Any, /) -> int:
        """Decode; raise what went wrong while experts were brought in."""
        return self._compute("llama_decode", ctx, batch)

    def llama_encode(self, ctx: Any, batch: Any, /) -> int:
        """Encode; raise what went wrong while experts were brought in."""
        return self._compute("llama_encode", ctx, batch)

    def llama_process(self, ctx: Any, kind: int, batch: Any, /) -> int:
        """Decode or encode a batch of the extended kind; raise what went wrong while experts were brought in."""
        return self._compute("llama_process", ctx, kind, batch)

    def _compute(self, name: str, ctx: Any, *args: Any) -> int:
        entry = self.contexts.get(handle_of(ctx))
        if entry is None:
            return int(self._call(name, ctx, *args))
        entry.refuse_fork()
        entry.refuse_callback("compute")
        try:
            return entry.mutex.call(self._compute_alone, entry, name, ctx, *args)
        finally:
            for put_off in take_all(entry.afterwards):
                put_off()

    def _compute_alone(self, entry: Context, name: str, ctx: Any, *args: Any) -> int:
        if self.contexts.get(entry.address) is not entry:
            raise EngineError("This context was freed by another thread: make a new one.")
        pager, watch = entry.model.pager, entry.model.watch
        failure = watch.find_change()
        if failure is not None:
            raise pager.failure_error(failure)
        # More tokens than one are computed with a number of threads of their own, which is left alone.
        n_tokens = getattr(args[-1], "n_tokens", None)
        adaptation = entry.adaptation if n_tokens == 1 else None
        compute = partial(self._call, name, ctx, *args)
        entry.tap.watch()
        result = int(adaptation.compute(compute) if adaptation else compute())
        entry.tap.idle()
        interruption, failure = entry.tap.take_exception(), entry.tap.take_failure()
        if interruption is not None:
            raise interruption
        if entry.afterwards:
            raise EngineError("This model was closed by a signal handler while it computed.")
        entry.note_use(n_tokens or 1)
        failure = failure or watch.find_change()
        if failure is not None:
            raise pager.failure_error(failure)
        return result

    def _find_context(self, handle: int) -> Context | None:
        return self.contexts.get(handle)

    def _find_memory(self, handle: int) -> Context | None:
        return next((entry for entry in list(self.contexts.values()) if entry.memory == handle), None)

    def _taking_turns(self, name: str, index: int, find: Callable[[int], Context | None]) -> Callable[..., Any]:
        """Return a function that waits until nobody computes with the context it is about."""

        @functools.wraps(getattr(low, name))
        def waiting(*args: Any) -> Any:
            entry = find(handle_of(args[index])) if len(args) > index else None
            return self._call(name, *args) if entry is None else self._locked(entry, self._call, name, *args)

        return waiting

    def llama_set_causal_attn(self, ctx: Any, causal_attn: bool, /) -> None:
        """Refuse to let tokens see all others where batches are smaller than was asked for: llama.cpp would end the process."""
        entry = self.contexts.get(handle_of(ctx))
        if entry is not None and entry.is_cut and not causal_attn:
            raise EngineError("Non-causal attention needs whole batches, and n_ubatch is smaller here, a multiple of n_seq_max: "
                              "ask for such an n_ubatch.")
        self._call("llama_set_causal_attn", ctx, causal_attn)

    def llama_set_abort_callback(self, ctx: Any, abort_callback: Any, abort_callback_data: Any, /) -> None:
        """Set the user's abort callback behind ours, which must stay."""
        entry = self.contexts.get(handle_of(ctx))
        if entry is None:
            self._call("llama_set_abort_callback", ctx, abort_callback, abort_callback_data)
            return
        data = ctypes.cast(abort_callback_data, ctypes.c_void_p).value if abort_callback_data else 0
        entry.tap.chain_abort(address_of(abort_callback), data or 0)
        entry.keep = (*entry.keep[:2], abort_callback)

    def llama_set_n_threads(self, ctx: Any, n_threads: int, n_threads_batch: int, /) -> None:
        """Set them, and have them."""
        self._call("llama_set_n_threads", ctx, n_threads, n_threads_batch)
        entry = self.contexts.get(handle_of(ctx))
        if entry is not None and entry.pid == os.getpid():
            entry.threads.provide()

    # ---- llama_cpp.Llama ----

    def _taking_options(self, init: Callable[..., None]) -> Callable[..., None]:
        """Return a constructor that takes our arguments as well, while we are installed: stock's would swallow them."""

        @functools.wraps(init)
        def construct(llm: Any, *args: Any, **kwargs: Any) -> None:
            if _constructing.get() is not None or not self.installed:
                return init(llm, *args, **kwargs)
            llm._stack = ExitStack()  # stock's destructor closes it, also where this is as far as it comes
            request = take_request(kwargs, self.installed[-1])
            self.construct(request, init, llm, *args, **kwargs)
            try:
                guard.check_draft(llm)
            except EngineError:
                llm.close()
                raise

        return construct

    def is_paged(self, llm: Any) -> bool:
        """Return whether a Llama's context is one of ours."""
        context = getattr(llm.__dict__.get("_ctx"), "ctx", None)
        return context is not None and handle_of(context) in self.contexts


hooks = _Hooks()
atexit.register(hooks.keep_profiles)


def _at_once(*functions: Callable[[], Any]) -> None:
    """Call functions one after the other. If all are written in C, no interrupt comes between them."""
    deque(map(operator.call, functions), maxlen=0)


def _most_tokens(params: Any) -> int:
    """Return the tokens that a context of these settings computes at once, or a few more: n_ctx limits them as well."""
    return int(min(params.n_ubatch or params.n_batch, params.n_batch or params.n_ubatch))


def _with_sequences(params: Any, request: Request | None) -> Any:
    """Return a context's settings, with as many sequences as somebody wants who constructs a Llama."""
    if request is None or request.n_sequences == 1:
        return params
    ours = type(params).from_buffer_copy(params)
    ours.n_seq_max, ours.kv_unified = request.n_sequences, True
    return ours


def _check_opened(paged: Model) -> None:
    """Keep the dense weights of a model whose budget seemed too small for them, now that it is not."""
    if paged.residency.method == residency.LEFT.method:
        paged.residency = paged.keep_dense()
        paged.watch.compare_also(paged.residency.copies)
