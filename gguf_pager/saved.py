"""States of a Llama that are kept: whose they are, whether they are whole, and the caches that hold them."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import llama_cpp as low
from llama_cpp.llama_cache import BaseLlamaCache, LlamaDiskCache, LlamaRAMCache

from gguf_pager import guard
from gguf_pager.errors import EngineError, PagerError
from gguf_pager.loading import can_take_tokens_back
from gguf_pager.model import engine, metadata

log = logging.getLogger("gguf_pager")

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


def _fitting(llm: llama_cpp.Llama, state: Any) -> Any:
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


class KeptCache(BaseLlamaCache):  # type: ignore[misc]  # llama_cpp is not typed
    """A cache as the user has made it, asked in a way that loses nothing; what is damaged, or another model's, is not in it.

    Stock's LlamaDiskCache takes out what it is asked for, if only one token is the same, and so keeps one conversation of
    several; past 1 GiB diskcache throws out ten at once, whatever `capacity_bytes` says (findings/disk-cache-forgets.sh).
    """

    def __init__(self, cache: BaseLlamaCache, llm: llama_cpp.Llama) -> None:
        super().__init__(getattr(cache, "capacity_bytes", 0))
        self._cache, self._llm = cache, weakref.ref(llm)  # it is the Llama's
        self._unfit, self._own = set[tuple[int, ...]](), set[tuple[int, ...]]()
        self._is_on_disk = type(cache) is LlamaDiskCache
        if self._is_on_disk:
            cache.cache.reset("cull_limit", 0, update=False)  # for this object; it looks after its size itself

    @property
    def cache_size(self) -> int:
        """How many bytes the user's cache holds."""
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


def saving(method: Callable[[Any], Any]) -> Callable[[Any], SavedState]:
    """Return stock's `save_state` as ours has it: see SavedState."""
    @functools.wraps(method)
    def save_state(self: Any) -> SavedState:
        state, saved = method(self), object.__new__(SavedState)
        saved.__dict__.update(state.__dict__, key=state_key(self), has_scores=bool(self._logits_all))
        saved.input_ids[saved.n_tokens:] = 0  # of texts before, or whatever lay in that memory
        return saved

    return save_state


def loading(method: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    """Return stock's `load_state` as ours has it: what does not fit is refused, and changes nothing."""
    @functools.wraps(method)
    def load_state(self: Any, state: Any) -> None:
        guard.check_open(self)
        fitting = _fitting(self, state)  # looked at first: what is refused leaves everything as it is
        try:
            method(self, fitting)
        except RuntimeError as error:
            raise EngineError(f"llama.cpp refuses this state, which a context with other settings has saved: {_REMEDY}.") from error

    return load_state
