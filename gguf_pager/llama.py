"""The drop-in Llama, and install() for code that makes its own."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
import logging
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import llama_cpp
import numpy as np
from llama_cpp import llama_cpp as low
from llama_cpp.llama_cache import BaseLlamaCache, LlamaDiskCache, LlamaRAMCache

from gguf_pager import guard
from gguf_pager.arguments import OPTION_NAMES, take_request
from gguf_pager.errors import EngineError, LayoutError, PagerError
from gguf_pager.hooks import hooks, with_whole_window
from gguf_pager.loading import can_take_tokens_back
from gguf_pager.memory.budget import parse_budget
from gguf_pager.memory.sizing import Request
from gguf_pager.model import engine, metadata
from gguf_pager.model.names import local_path
from gguf_pager.pager import Options, Pager
from gguf_pager.pieces import Pieces

log = logging.getLogger("gguf_pager")

_NEED_THE_MODEL = (
    "tokenize", "n_ctx", "n_embd", "n_vocab", "token_eos", "token_bos", "token_nl", "set_seed", "pooling_type",
    "tokenizer",
)
"""Methods that change nothing, and need no turn; but a model that is open."""


class Llama(llama_cpp.Llama):  # type: ignore[misc]  # llama_cpp is not typed
    """llama_cpp.Llama, with the experts of a mixture-of-experts model kept within a memory budget.

    Takes every argument of llama_cpp.Llama, and:

    Args:
        model_path: the GGUF file, of a split model the first; a folder that holds one model; or a name such as
            "hf:OWNER/REPO:Q4_K_M", "ollama:NAME" or "lmstudio:NAME" (docs/models.md).
        budget: how much memory to use. Bytes as a number or "4GiB": a limit on the whole process (experts get what
            dense weights, KV cache and buffers leave). "25%": a share of the experts, everything else on top. "min": as
            few experts as can compute one token. "auto": what the machine can spare; if the model fits, it runs as stock
            llama.cpp.
        profile: keep, from one process to the next, how often each expert was chosen, and begin with the most used ones.
        policy, io, n_readers, piece_bytes, read_ahead, lock_dense, mirror, adapt_threads, overcommit: see
            `gguf_pager.Options`.
        n_seq_max: sequences that the context can hold, in one cache of `n_ctx` tokens for all, for who calls llama_decode himself.

    Use it in a `with` block, or `close()` it: its memory is free at once.

    May be used by several threads: one request after the other. A stream that another request has overtaken, because nobody has
    asked it for a token for `gguf_pager.turns.PATIENCE_S` seconds, raises EngineError when it is asked again.

    Raises:
        TypeError: an argument that neither knows.
        PagerError: see its subclasses.

    Attributes:
        pager: the `Pager`, whose `stats()` counts hits, misses, bytes and stalls; None when the model is not paged.
        not_paged_reason: why it is not; None when it is.
    """

    def __init__(self, model_path: str, *, budget: float | str = "auto", **kwargs: Any) -> None:
        self._is_closed = False
        self.pager: Pager | None = None
        self.not_paged_reason: str | None = None
        self._budget = budget
        self._pager_options = {name: value for name, value in kwargs.items() if name in OPTION_NAMES}
        kwargs["budget"] = budget
        request = self._request = take_request(kwargs)
        try:
            hooks.construct(request, super().__init__, model_path=_found(model_path), **kwargs)
            if not request.opened and request.reason is None:
                raise EngineError("This model was opened past gguf_pager: some other package has replaced llama_cpp's functions "
                                  "for good. Import gguf_pager before it, or do without it.")
            guard.check_draft(self)
        except BaseException:
            self.close()
            raise
        self.pager = request.opened[-1] if request.opened else None
        self.not_paged_reason = request.reason

    def detokenize(self, tokens: list[int], prev_tokens: list[int] | None = None, special: bool = False) -> bytes:
        """Return the text of tokens as stock does, and also of those that it leaves out because they are longer than 32 bytes."""
        guard.check_open(self)
        pieces: Pieces = self.__dict__.get("_pieces") or self.__dict__.setdefault("_pieces", Pieces(self._model.vocab))
        text = None if special else pieces.text_of(self, tokens)
        return bytes(super().detokenize(tokens, prev_tokens=prev_tokens, special=special)) if text is None else text

    @property
    def cache(self) -> BaseLlamaCache | None:
        """What keeps conversations, see `set_cache`: as it was given, but for what comes out of it."""
        return self.__dict__.get("_cache")

    @cache.setter
    def cache(self, given: BaseLlamaCache | None) -> None:
        self._cache = given if given is None or isinstance(given, _Cache) else _Cache(given, self)

    def close(self) -> None:
        """Free the context, the model and the slots; twice is fine. Everything else raises EngineError afterwards.

        While another thread computes with it, it waits for the token being computed; that thread gets the EngineError.
        """
        self._is_closed = True
        guard.turn_of(self).close(self._free)

    def _free(self) -> None:
        stack = getattr(self, "_stack", None)
        if stack is not None:
            hooks.close(self._request, stack.close, self)

    def __del__(self) -> None:
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        name = os.path.basename(str(getattr(self, "model_path", "")))
        if self._is_closed:
            return f"<gguf_pager.Llama {name!r}, closed>"
        return f"<gguf_pager.Llama {name!r}, {self.not_paged_reason or f'budget={self._budget!r}, {self.pager!r}'}>"

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "budget": self._budget, **self._pager_options}


def _signature() -> inspect.Signature:
    """Return what a notebook completes: stock's arguments and ours, without the **kwargs that swallow them."""
    found = inspect.signature(llama_cpp.Llama.__init__).parameters.values()
    theirs = [parameter for parameter in found if parameter.kind is not inspect.Parameter.VAR_KEYWORD][1:]
    keyword = inspect.Parameter.KEYWORD_ONLY
    ours = [inspect.Parameter("budget", keyword, default="auto", annotation=float | str)]
    ours += [inspect.Parameter(field.name, keyword, default=field.default, annotation=field.type)
             for field in dataclasses.fields(Options)]
    return inspect.Signature([*theirs, *ours])


Llama.__signature__ = _signature()


def _found(name: str | os.PathLike[str]) -> str:
    found = local_path(name)
    path = os.fspath(name) if found == Path(name) else str(found)  # as it was written: it is in every answer
    try:
        path.encode()
    except UnicodeEncodeError:
        raise LayoutError(f"{path} has a name that is no UTF-8, which llama-cpp-python cannot open: rename it, or "
                          "make a link to it.") from None
    return path


# ---- saved states ---------------------------------------------------------------------------------------------------

_SAMPLE_BYTES = 1024
_REMEDY = "evaluate the text again instead of loading its state"


def state_key(llm: llama_cpp.Llama) -> str | None:
    """Return what a state depends on: the model's header and samples of its tensors, the engine, what its context was given.

    llama.cpp does not tell models of the same shape apart. None where the model's file cannot be read any more.
    """
    if "_state_key" not in llm.__dict__:
        try:
            llm._state_key = _state_key(llm)
        except (OSError, PagerError):
            return None
    return str(llm._state_key)


def _state_key(llm: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path in metadata.find_parts(engine.read_header(Path(llm.model_path))):
        with open(path, "rb") as file:
            for tensor in engine.read_header(path).tensors:
                digest.update(f"{tensor.name} {tensor.type} {tensor.ne}".encode())
                digest.update(os.pread(file.fileno(), min(_SAMPLE_BYTES, tensor.n_bytes), tensor.offset_bytes + tensor.n_bytes // 2))
    params = llm.context_params
    settings: dict[str, Any] = {name: getattr(params, name) for name in (
        "type_k", "type_v", "flash_attn_type", "swa_full", "rope_scaling_type", "rope_freq_base", "rope_freq_scale", "yarn_ext_factor",
        "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow", "yarn_orig_ctx")}
    is_stretched = any(".rope.scaling." in name for name in llm.metadata)
    settings |= {"engine": llama_cpp.__version__, "lora": (llm.lora_path, llm.lora_scale),
                 "metadata": sorted(llm.metadata.items()), "n_ctx": int(llm.n_ctx()) if is_stretched else None}
    digest.update(json.dumps(settings, default=repr).encode())
    return digest.hexdigest()


class SavedState(llama_cpp.LlamaState):  # type: ignore[misc]  # llama_cpp is not typed
    """What `Llama.save_state` returns: stock's, with the last row of results, and whose it is.

    May be pickled. A copy in which bytes have changed raises EngineError when it is unpickled.

    Attributes:
        key: see `state_key`.
        has_scores: whether there are the logits of each token, as with logits_all=True.
        last_logits: those of the last token; None where nothing was evaluated.
    """

    scores: Any

    def __getstate__(self) -> dict[str, Any]:
        # Scores that are not there have a shape, and would be written as that many zeros: 300 MB of a large vocabulary.
        kept = self.__dict__ if self.has_scores else {**self.__dict__, "scores": self.scores.shape}
        return {**kept, "digest": _digest(kept)}

    def __setstate__(self, kept: dict[str, Any]) -> None:
        digest = kept.pop("digest", None)
        if digest != _digest(kept):
            raise EngineError("This saved state is damaged: evaluate the text again instead of loading it.")
        self.__dict__.update(kept)
        if not self.has_scores:
            self.scores = np.broadcast_to(np.zeros(1, np.single), self.scores)


def _digest(kept: dict[str, Any]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(kept.items()):
        digest.update(f"{name} {getattr(value, 'shape', '')}".encode())
        digest.update(value if isinstance(value, bytes) else value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
    return digest.digest()


def _fitting(llm: Llama, state: Any) -> Any:
    """Return a state as this Llama can load it: with room for as many tokens as its own context has.

    Raises:
        EngineError: it is another model's, or its context was another one.
    """
    if not isinstance(state, llama_cpp.LlamaState):
        raise EngineError(f"load_state() takes what save_state() has returned, and this is of type {type(state).__name__}.")
    key, own = getattr(state, "key", None), state_key(llm)
    if None not in (key, own) and key != own:
        raise EngineError(f"This state was saved by another model or version, or with other settings of the context: {_REMEDY}.")
    n_tokens, n_room = int(state.n_tokens), len(llm.input_ids)
    if n_tokens > n_room:
        raise EngineError(f"This state has {n_tokens:,} tokens, and this context has room for {n_room:,}: open the model with a larger "
                          "n_ctx.")
    if llm._logits_all and not getattr(state, "has_scores", True):
        raise EngineError(f"This state was saved without logits_all=True, and has no logits of its tokens: {_REMEDY}, or open the model "
                          "without logits_all.")
    if not 0 <= n_tokens <= len(state.input_ids) or len(state.llama_state) != state.llama_state_size:
        raise EngineError(f"This saved state is damaged: {_REMEDY}.")
    fitting = object.__new__(type(state))  # copy.copy() would take what is pickled
    fitting.__dict__.update(state.__dict__)
    fitting.input_ids = np.zeros(n_room, np.intc)
    fitting.input_ids[:n_tokens] = state.input_ids[:n_tokens]
    return fitting


class _Cache(BaseLlamaCache):  # type: ignore[misc]  # llama_cpp is not typed
    """A cache as the user has made it, asked in a way that loses nothing; what is damaged, or another model's, is not in it.

    Stock's LlamaDiskCache takes out what it is asked for, if only one token is the same, and so keeps one conversation of
    several; past 1 GiB diskcache throws out ten at once, whatever `capacity_bytes` says (findings/disk-cache-forgets.sh).
    """

    def __init__(self, cache: BaseLlamaCache, llm: Llama) -> None:
        super().__init__(getattr(cache, "capacity_bytes", 0))
        self._cache, self._llm = cache, weakref.ref(llm)  # it is the Llama's
        self._unfit, self._own = set[tuple[int, ...]](), set[tuple[int, ...]]()
        self._is_on_disk = type(cache) is LlamaDiskCache
        if self._is_on_disk:
            cache.cache.reset("cull_limit", 0, update=False)  # for this object; it looks after its size itself

    @property
    def cache_size(self) -> int:
        return int(self._cache.cache_size)

    def __contains__(self, key: Sequence[int]) -> bool:
        return key in self._cache

    def __getitem__(self, key: Sequence[int]) -> Any:
        """Return the state that has most of a text's beginning.

        Raises:
            KeyError: there is none; so stock evaluates all of it.
        """
        llm: Any = self._llm()
        for kept, state in self._states(llm, tuple(key)):
            try:
                found = state()
                if not isinstance(found, SavedState):
                    raise EngineError("It does not say whose it is, as plain llama-cpp-python saves it.")
                fitting = _fitting(llm, found)
            except KeyError:  # another process has removed it meanwhile
                continue
            except Exception as error:  # noqa: BLE001  unpickling raises nearly anything where bytes have changed
                log.warning("a conversation that was kept is not used: %s", error)
                self._unfit.add(kept)
                continue
            self._own.add(kept)
            fitting.input_ids = fitting.input_ids[: fitting.n_tokens]  # stock compares all of them with the text
            return fitting
        raise KeyError(key)

    def __setitem__(self, key: Sequence[int], state: Any) -> None:
        """Keep a state. An answer that is complete is not lost because that fails."""
        try:
            self._cache[key] = state
        except Exception as error:  # noqa: BLE001  of a disk, of sqlite, of pickle
            log.warning("a conversation cannot be kept: %s", error)
            return
        key = tuple(key)
        self._unfit.discard(key)
        llm: Any = self._llm()
        if self._is_on_disk and can_take_tokens_back(llm.model) and low.llama_model_n_swa(llm.model) == 0:
            for kept in [kept for kept in self._own if kept != key and _has_all(key, kept)]:  # the new one serves in their place
                self._cache.cache.delete(kept)
                self._own.discard(kept)
        self._own.add(key)

    def _states(self, llm: Any, text: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], Callable[[], Any]]]:
        """Yield where states lie that have more of a text's beginning than is in memory, and how to get them; the best first."""
        if not (self._is_on_disk or type(self._cache) is LlamaRAMCache):
            yield text, lambda: self._cache[text]
            return
        common = llama_cpp.Llama.longest_token_prefix
        n_held = common(llm._input_ids.tolist(), text)
        found = [(common(kept, text), kept) for kept in self._keys() if kept not in self._unfit]
        for n_common, kept in sorted(found, key=lambda each: (-each[0], len(each[1]))):
            if n_common > n_held and (_has_all(text, kept) or can_take_tokens_back(llm.model)):
                yield kept, functools.partial(self._get, kept)

    def _keys(self) -> list[tuple[int, ...]]:
        keys = self._cache.cache.iterkeys() if self._is_on_disk else list(self._cache.cache_state)
        return [key for key in keys if isinstance(key, tuple)]

    def _get(self, key: tuple[int, ...]) -> Any:
        if self._is_on_disk:
            return self._cache.cache[key]
        self._cache.cache_state.move_to_end(key)
        return self._cache.cache_state[key]


def _has_all(text: tuple[int, ...], key: tuple[int, ...]) -> bool:
    """Return whether a text begins with all that a state holds: its key has the answer's last token, which was not evaluated."""
    return bool(llama_cpp.Llama.longest_token_prefix(text, key) >= len(key) - 1)


# ---- methods --------------------------------------------------------------------------------------------------------

def _saving(method: Callable[[Any], Any]) -> Callable[[Any], SavedState]:
    @functools.wraps(method)
    def save_state(self: Any) -> SavedState:
        state, saved = method(self), object.__new__(SavedState)
        saved.__dict__.update(state.__dict__, key=state_key(self), has_scores=bool(self._logits_all))
        saved.input_ids[saved.n_tokens:] = 0  # of texts before, or whatever lay in that memory
        return saved

    return save_state


def _loading(method: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    @functools.wraps(method)
    def load_state(self: Any, state: Any) -> None:
        guard.check_open(self)
        fitting = _fitting(self, state)  # looked at first: what is refused leaves everything as it is
        try:
            method(self, fitting)
        except RuntimeError as error:
            raise EngineError(f"llama.cpp refuses this state, which a context with other settings has saved: {_REMEDY}.") from error

    return load_state


def _is_ours(llm: Any) -> bool:
    return True


for _name in guard.NAMES:
    if _name != "close":
        _stock = getattr(llama_cpp.Llama, _name)
        setattr(Llama, _name, guard.guarded(_name, with_whole_window(_stock, _is_ours) if _name == "eval" else _stock, _is_ours))
for _name, _around in (("save_state", _saving), ("load_state", _loading)):
    setattr(Llama, _name, _around(getattr(Llama, _name)))
for _name in _NEED_THE_MODEL:
    setattr(Llama, _name, guard.while_open(getattr(llama_cpp.Llama, _name)))


class Installation:
    """What `install` returns; `uninstall()` it, or use it as a context manager."""

    def __init__(self, request: Request) -> None:
        self._request = request

    @property
    def pagers(self) -> list[Pager]:
        """The pagers of models that are open."""
        return [pager for pager in self._request.opened if pager.is_open]

    def __repr__(self) -> str:
        return f"<gguf_pager.Installation: {self.pagers or 'no model open'}>"

    def uninstall(self) -> None:
        """Page no more models; those that are open stay paged. Twice is fine."""
        hooks.uninstall(self._request)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.uninstall()


def install(budget: float | str = "auto", **options: Any) -> Installation:
    """Page every mixture-of-experts model that llama_cpp opens from now on, by its high or its low-level functions.

    Meanwhile llama_cpp.Llama takes `budget` and the options as well, for the one model, refuses names that it does not know
    instead of swallowing them, and threads that share one take turns, as with `gguf_pager.Llama`.

    Code that has bound the low-level functions earlier (`from llama_cpp import llama_decode`) keeps the unwrapped ones:
    models are then paged all the same if loading and context creation were bound later, and a failed read makes
    llama_decode return 2 instead of raising.

    Args:
        budget: as for `Llama`, for each model.
        options: the fields of `Options`. Of the mirrors each model takes those that are copies of it; one whose header is
            another model's is left alone.

    Raises:
        PagerError: a value that does not exist.
        TypeError: an unknown option.
    """
    for name in options:
        if name not in OPTION_NAMES:
            raise TypeError(f"install() got an unknown argument {name!r}: it knows budget, {', '.join(OPTION_NAMES)}.")
    installation = Installation(Request(parse_budget(budget), Options(**options), is_any_model=True))
    hooks.install(installation._request)
    return installation


def uninstall() -> None:
    """End the last `install`.

    Raises:
        PagerError: there is none.
    """
    if not hooks.installed:
        raise PagerError("gguf_pager is not installed: call install() first.")
    hooks.uninstall(hooks.installed[-1])
