"""What a Llama is told on top of stock's arguments: whichever class takes them, a name that nobody knows is refused."""

from __future__ import annotations

import difflib
import inspect
from dataclasses import replace
from typing import Any

import llama_cpp

from gguf_pager.memory.budget import parse_budget
from gguf_pager.memory.sizing import Request
from gguf_pager.pager import Options

OPTION_NAMES = tuple(Options.__dataclass_fields__)

STOCK_NAMES = tuple(
    name for name, parameter in inspect.signature(llama_cpp.Llama.__init__).parameters.items()
    if name != "self" and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
)

OBSOLETE_NAMES = ("n_parts", "f16_kv", "low_vram", "mul_mat_q", "n_gqa", "rms_norm_eps", "rpc_servers")
"""Arguments of earlier versions of llama_cpp.Llama, without effect today. LangChain's LlamaCpp and ChatLlamaCpp
(langchain-community) hand over the first two always, llama_cpp.server the last one."""

_KNOWN = {*STOCK_NAMES, *OPTION_NAMES, "budget", "n_seq_max"}


def check_names(kwargs: dict[str, Any]) -> None:
    """Refuse what llama_cpp.Llama would swallow in silence.

    Raises:
        TypeError: an argument that neither knows.
    """
    for name in kwargs:
        if name not in _KNOWN and name not in OBSOLETE_NAMES:
            near = difflib.get_close_matches(name, _KNOWN, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise TypeError(f"Llama() got an unknown argument {name!r}.{hint}")


def take_request(kwargs: dict[str, Any], installed: Request | None = None) -> Request:
    """Take our arguments out of a Llama's; what is not given is as installed, or as by default.

    Raises:
        TypeError: an argument that neither knows.
        PagerError: a value that does not exist.
    """
    check_names(kwargs)
    request = installed or Request(parse_budget("auto"), Options())
    if "budget" in kwargs:
        request = replace(request, budget=parse_budget(kwargs.pop("budget")))
    given = {name: kwargs.pop(name) for name in OPTION_NAMES if name in kwargs}
    return replace(
        request,
        n_sequences=kwargs.pop("n_seq_max", 1),
        options=replace(request.options, **given) if given else request.options,
        has_all_outputs=bool(kwargs.get("logits_all")) or kwargs.get("draft_model") is not None,
        keeps_all_outputs=bool(kwargs.get("logits_all")),
    )
