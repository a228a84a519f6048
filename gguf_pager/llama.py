"""The drop-in Llama, and install() for code that makes its own."""

from __future__ import annotations

import dataclasses
import inspect
import os
from pathlib import Path
from typing import Any, Self

import llama_cpp
from llama_cpp.llama_cache import BaseLlamaCache

from gguf_pager import guard
from gguf_pager.arguments import OPTION_NAMES, take_request
from gguf_pager.errors import EngineError, LayoutError, PagerError
from gguf_pager.hooks import hooks
from gguf_pager.memory.budget import parse_budget
from gguf_pager.memory.sizing import Request
from gguf_pager.model.names import local_path
from gguf_pager.pager import Options, Pager
from gguf_pager.pieces import Pieces
from gguf_pager.saved import KeptCache, loading, saving
from gguf_pager.windows import with_whole_window

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
        policy, io, n_readers, piece_bytes, read_ahead, look_ahead, lock_dense, mirror, adapt_threads, overcommit: see
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
        self._cache = given if given is None or isinstance(given, KeptCache) else KeptCache(given, self)

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


def _is_ours(llm: Any) -> bool:
    return True


for _name in guard.NAMES:
    if _name != "close":
        _stock = getattr(llama_cpp.Llama, _name)
        setattr(Llama, _name, guard.guarded(_name, with_whole_window(_stock, _is_ours) if _name == "eval" else _stock, _is_ours))
for _name, _around in (("save_state", saving), ("load_state", loading)):
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
