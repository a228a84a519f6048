"""The drop-in Llama, and install() for code that makes its own."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any, Self, TypeVar

import llama_cpp

from gguf_pager.budget import parse_budget
from gguf_pager.errors import EngineError, PagerError
from gguf_pager.hooks import hooks
from gguf_pager.pager import Options, Pager
from gguf_pager.sizing import Request

_OPTION_NAMES = tuple(Options.__dataclass_fields__)

_STOCK_NAMES = tuple(
    name for name, parameter in inspect.signature(llama_cpp.Llama.__init__).parameters.items()
    if name != "self" and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
)

_NEED_THE_MODEL = (
    "tokenize", "detokenize", "reset", "eval", "sample", "generate", "create_embedding", "embed", "create_completion",
    "create_chat_completion", "save_state", "load_state", "n_ctx", "n_embd", "n_vocab", "token_eos", "token_bos",
    "token_nl", "set_seed", "pooling_type", "tokenizer",
)

_Method = TypeVar("_Method", bound=Callable[..., Any])


def _while_open(method: _Method) -> _Method:
    """Stock methods reach for freed memory after close(); ours say so instead."""

    @functools.wraps(method)
    def guarded(self: Llama, *args: Any, **kwargs: Any) -> Any:
        if self._is_closed:
            raise EngineError("This Llama is closed: make a new one.")
        return method(self, *args, **kwargs)

    return guarded  # type: ignore[return-value]


class Llama(llama_cpp.Llama):  # type: ignore[misc]  # llama_cpp is not typed
    """llama_cpp.Llama, with the experts of a mixture-of-experts model kept within a memory budget.

    Takes every argument of llama_cpp.Llama, and:

    Args:
        model_path: the GGUF file; of a split model the first.
        budget: how much memory to use. Bytes as a number or "4GiB": a limit on the whole process (experts get what
            dense weights, KV cache and buffers leave). "25%": a share of the experts, everything else on top. "min": as
            few experts as can compute one token. "auto": what the machine can spare; if the model fits, it runs as stock
            llama.cpp.
        policy, io, n_readers, piece_bytes, read_ahead, lock_dense, mirror, profile, overcommit: see
            `gguf_pager.Options`.

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
        _check_names(kwargs)
        self._pager_options = {name: kwargs.pop(name) for name in _OPTION_NAMES if name in kwargs}
        rows = int(kwargs.get("n_batch", 512)) + int(kwargs.get("n_ctx", 512)) if kwargs.get("logits_all") else 1
        request = Request(parse_budget(budget), Options(**self._pager_options), output_rows=rows)
        try:
            with hooks.constructing(request):
                super().__init__(model_path=model_path, **kwargs)
        except BaseException:
            self.close()
            raise
        self.pager = request.opened[-1] if request.opened else None
        self.not_paged_reason = request.reason

    def close(self) -> None:
        """Free the context, the model and the slots; twice is fine. Everything else raises EngineError afterwards."""
        self._is_closed = True
        self._free()

    def _free(self) -> None:
        stack = getattr(self, "_stack", None)
        if stack is not None:
            stack.close()

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "budget": self._budget, **self._pager_options}


for _name in _NEED_THE_MODEL:
    setattr(Llama, _name, _while_open(getattr(llama_cpp.Llama, _name)))


def _check_names(kwargs: dict[str, Any]) -> None:
    """Refuse what llama_cpp.Llama would swallow in silence."""
    known = {*_STOCK_NAMES, *_OPTION_NAMES, "budget"}
    for name in kwargs:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise TypeError(f"Llama() got an unknown argument {name!r}.{hint}")


class Installation:
    """What `install` returns; `uninstall()` it, or use it as a context manager."""

    def __init__(self, request: Request) -> None:
        self._request: Request | None = request
        self._pagers = request.opened

    @property
    def pagers(self) -> list[Pager]:
        """The pagers of models that are open."""
        return [pager for pager in self._pagers if pager.is_open]

    def uninstall(self) -> None:
        """Page no more models; those that are open stay paged. Twice is fine."""
        request, self._request = self._request, None
        if request is not None:
            hooks.uninstall(request)
            _installations.remove(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.uninstall()


_installations: list[Installation] = []


def install(budget: float | str = "auto", **options: Any) -> Installation:
    """Page every mixture-of-experts model that llama_cpp opens from now on, by its high or its low-level functions.

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
        if name not in _OPTION_NAMES:
            raise TypeError(f"install() got an unknown argument {name!r}: it knows budget, {', '.join(_OPTION_NAMES)}.")
    request = Request(parse_budget(budget), Options(**options), is_any_model=True)
    installation = Installation(request)
    hooks.install(request)
    _installations.append(installation)
    return installation


def uninstall() -> None:
    """End the last `install`.

    Raises:
        PagerError: there is none.
    """
    if not _installations:
        raise PagerError("gguf_pager is not installed: call install() first.")
    _installations[-1].uninstall()
