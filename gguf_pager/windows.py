"""Sliding windows: llama.cpp gives the places of tokens away that no later token will see, and who goes back does not find them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from llama_cpp import llama_cpp as low


def is_whole(memory: int, sequence: int, n_tokens: int, n_window: int) -> bool:
    """Return whether all is there that a token looks at which comes after a sequence's first ones.

    Behind a window llama.cpp gives a token's place to whoever needs one, another sequence included, also in a cache that is as large as the
    context. What it has kept has no gaps: it is all from one position on.

    Args:
        memory: llama_memory_t.
        sequence: its number.
        n_tokens: how many come before.
        n_window: llama_model_n_swa; 0: there is no window.
    """
    return 0 <= int(low.llama_memory_seq_pos_min(memory, sequence)) <= max(0, n_tokens - n_window)


def with_whole_window(method: Callable[..., None], is_guarded: Callable[[Any], bool]) -> Callable[..., None]:
    """Return llama_cpp.Llama.eval, which first computes the text again where a sliding window has lost tokens that come into view.

    Who takes back the last tokens, as generate() does for a prompt that begins like the last one, sees older ones again. After
    load_state() llama.cpp has given their places away (findings/window-forgets-after-load.sh).
    """

    @functools.wraps(method)
    def evaluate(llm: Any, tokens: Any) -> None:
        n_tokens = int(llm.n_tokens)
        n_window = int(low.llama_model_n_swa(llm._model.model)) if is_guarded(llm) and n_tokens > 0 and len(tokens) > 0 else 0
        has_window = n_window > 0 and not (llm._is_recurrent or llm._is_hybrid)
        # Whoever only goes on never comes here.
        if has_window and not is_whole(low.llama_get_memory(llm._ctx.ctx), 0, n_tokens, n_window):
            try:
                llm.n_tokens = 0
                method(llm, llm.input_ids[:n_tokens].tolist())
            finally:
                llm.n_tokens = n_tokens  # of a call that fails: what is missing is known to whoever goes on
        method(llm, tokens)

    return evaluate
