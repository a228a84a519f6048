"""How a Llama with a paged context behaves where stock's would give wrong tokens or end the process.

Requests of several threads take turns. A decode that failed or was interrupted leaves an object that evaluates anew what it
has to. A loaded state can be sampled from at once. Everything else is stock's.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator
from typing import Any

import numpy as np
import numpy.typing as npt
from llama_cpp import llama_cpp as low

from gguf_pager.errors import EngineError
from gguf_pager.loading import can_take_tokens_back
from gguf_pager.turns import Doubt, Stream, Turn

Method = Callable[..., Any]


def turn_of(llm: Any) -> Turn:
    """Return the turn of a Llama, which it gets when it is first asked for."""
    found: Turn = llm.__dict__.get("_turn") or llm.__dict__.setdefault("_turn", Turn())
    return found


def check_open(llm: Any) -> None:
    """Raise EngineError if this Llama was closed: stock methods reach for freed memory then."""
    if llm.__dict__.get("_is_closed"):
        raise EngineError("This Llama is closed: make a new one.")


def check_draft(llm: Any) -> None:
    """Raise EngineError if a Llama has a draft model that it cannot use; stock would answer llama_decode returned -1."""
    if getattr(llm, "draft_model", None) is not None and not can_take_tokens_back(llm._model.model):
        raise EngineError("A draft model cannot be used with this model: tokens that were guessed wrongly have to be "
                          "taken back, and its recurrent state cannot. Leave out draft_model.")


def while_open(method: Method) -> Method:
    """Return a method that raises EngineError once its Llama is closed."""

    @functools.wraps(method)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        check_open(self)
        return method(self, *args, **kwargs)

    return checked


# ---- what an interrupt has left -------------------------------------------------------------------------------------

def _settle(llm: Any, doubt: Doubt, evaluate: Method | None) -> None:
    """Make the context's memory and `n_tokens` agree again, keeping what is surely right.

    What cannot be kept is evaluated again by `evaluate`, if the caller is going to continue from it.
    """
    turn = turn_of(llm)
    memory = low.llama_get_memory(llm._ctx.ctx)
    llm._requires_eval, turn.has_outputs = True, False
    n_wanted = int(llm.n_tokens)
    n_kept = 0 if memory is None or doubt is Doubt.ALL else _keep(llm, memory)
    if n_kept == 0 and memory is not None:
        low.llama_memory_clear(memory, True)
    llm.n_tokens = n_kept
    if evaluate is not None and doubt is not Doubt.ALL and n_kept < n_wanted:
        evaluate(llm, llm.input_ids[n_kept:n_wanted].tolist())


def _keep(llm: Any, memory: Any) -> int:
    """Return how many tokens can be kept, without anything behind them; 0 where that cannot be told.

    A recurrent state has moved on within the batch that failed, and positions that images share are no count of tokens.
    """
    if llm._is_recurrent or llm._is_hybrid or low.llama_model_rope_type(llm._model.model) in (
            low.LLAMA_ROPE_TYPE_MROPE, low.LLAMA_ROPE_TYPE_IMROPE):
        return 0
    n_kept = min(int(llm.n_tokens), int(low.llama_memory_seq_pos_max(memory, 0)) + 1)
    return n_kept if n_kept > 0 and low.llama_memory_seq_rm(memory, 0, n_kept, -1) else 0


def _refresh(llm: Any) -> None:
    """Evaluate the last token again, so that there is a row of results for it; all of them, where none can be taken back."""
    n_tokens = int(llm.n_tokens)
    tokens = llm.input_ids[:n_tokens].tolist()
    memory = low.llama_get_memory(llm._ctx.ctx)
    can_take_back = memory is not None and not (llm._is_recurrent or llm._is_hybrid)
    if n_tokens > 1 and can_take_back and low.llama_memory_seq_rm(memory, 0, n_tokens - 1, -1):
        llm.n_tokens, tokens = n_tokens - 1, tokens[-1:]
    else:
        _clear(llm)
    llm.eval(tokens)


def _clear(llm: Any) -> None:
    llm.reset()
    memory = low.llama_get_memory(llm._ctx.ctx)
    if memory is not None:
        low.llama_memory_clear(memory, True)


# ---- methods --------------------------------------------------------------------------------------------------------

def _eval(method: Method, llm: Any, tokens: Any) -> None:
    method(llm, tokens)
    check_open(llm)  # a signal handler may have closed it meanwhile
    if len(tokens) > 0:
        turn_of(llm).has_outputs = True


def _sample(method: Method, llm: Any, *args: Any, **kwargs: Any) -> Any:
    if llm._requires_eval and llm.n_tokens > 0:
        _refresh(llm)
    return method(llm, *args, **kwargs)


def _save_state(method: Method, llm: Any, *args: Any, **kwargs: Any) -> Any:
    """Save the last row of results, too; and no scores where none are kept, which are n_batch rows of a vocabulary."""
    scores = llm.scores
    try:
        if not llm._logits_all:
            llm.scores = scores[:0]
        state = method(llm, *args, **kwargs)
    finally:
        llm.scores = scores
    if not llm._logits_all:
        shape = (min(state.n_tokens, len(scores)), scores.shape[1])
        state.scores = np.broadcast_to(np.zeros(1, np.single), shape)  # what stock's load_state can take
    row = _last_row(llm) if turn_of(llm).has_outputs and not llm._requires_eval else None
    state.last_logits = None if row is None else row.copy()
    return state


def _load_state(method: Method, llm: Any, state: Any, *args: Any, **kwargs: Any) -> None:
    """Load a state that can be sampled from at once: with its last row of results, if it has one.

    llama.cpp keeps no results in a state. There is a row to write them to once something was evaluated. A state without the
    row, as stock saves it, has its last token evaluated again when somebody samples.
    """
    last_logits, turn = getattr(state, "last_logits", None), turn_of(llm)
    if last_logits is not None and not turn.has_outputs and state.n_tokens > 0:
        _clear(llm)
        llm.eval(state.input_ids[:1].tolist())
    scores = llm.scores
    try:
        if not llm._logits_all:
            llm.scores, state = scores[:0], _without_scores(state)
        method(llm, state, *args, **kwargs)
    finally:
        llm.scores = scores
    if last_logits is not None and turn.has_outputs:
        row = _last_row(llm)
        if row is not None and row.shape == last_logits.shape:
            row[:] = last_logits
            llm._requires_eval = False


def _without_scores(state: Any) -> Any:
    lean = object.__new__(type(state))
    lean.__dict__.update(state.__dict__, scores=np.empty((0, state.scores.shape[1]), np.single))
    return lean


def _last_row(llm: Any) -> npt.NDArray[np.single] | None:
    """Return the context's own last row of results; None where it has none."""
    row = low.llama_get_logits_ith(llm._ctx.ctx, -1)
    return np.ctypeslib.as_array(row, shape=(llm._n_vocab,)) if row else None


def _plain(method: Method, llm: Any, *args: Any, **kwargs: Any) -> Any:
    return method(llm, *args, **kwargs)


_BODIES: dict[str, tuple[Method, Doubt, bool]] = {
    # what is done, what is in doubt if it is not done to the end, whether it continues from where the Llama is
    "eval": (_eval, Doubt.TAIL, True),
    "sample": (_sample, Doubt.NONE, True),
    "save_state": (_save_state, Doubt.NONE, True),
    "load_state": (_load_state, Doubt.ALL, False),
    "reset": (_plain, Doubt.TAIL, False),
    "embed": (_plain, Doubt.ALL, False),
    "create_embedding": (_plain, Doubt.NONE, False),
    "create_completion": (_plain, Doubt.NONE, False),
    "create_chat_completion": (_plain, Doubt.NONE, False),
    "__call__": (_plain, Doubt.NONE, False),
}

_RANKS = {"create_chat_completion": 5, "__call__": 4, "create_completion": 3, "create_embedding": 3, "_create_completion": 2,
          "embed": 2, "generate": 1}
"""Stock's requests call others of a lower rank. One of the same or a higher rank comes from a callback of the user's."""

_MAY_STREAM = ("create_completion", "create_chat_completion", "__call__")

_STREAMS = {"generate": Doubt.TAIL, "_create_completion": Doubt.NONE}

NAMES = (*_BODIES, *_STREAMS, "close")
"""Methods of llama_cpp.Llama that are guarded."""


def guarded(name: str, method: Method, is_guarded: Callable[[Any], bool]) -> Method:
    """Return what takes the place of a method of llama_cpp.Llama; of objects that are not guarded it is the method."""
    if name == "close":
        return _closing(method, is_guarded)
    if name in _STREAMS:
        return _streaming(method, _STREAMS[name], is_guarded, _RANKS[name])
    body, doubt, continues = _BODIES[name]
    parameters = inspect.signature(method)

    @functools.wraps(method)
    def whole(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_guarded(self):
            return method(self, *args, **kwargs)
        check_open(self)
        if name in _MAY_STREAM and parameters.bind(self, *args, **kwargs).arguments.get("stream"):
            # A generator, whose steps take turns. To wait here would stop an event loop, and the streams that it reads.
            return method(self, *args, **kwargs)

        def settle(doubt: Doubt) -> None:
            check_open(self)
            _settle(self, doubt, _evaluate if continues else None)

        def work() -> Any:
            check_open(self)  # somebody may have closed it while this thread was waiting
            return body(method, self, *args, **kwargs)

        return turn_of(self).run(work, doubt, settle, is_aside=continues, rank=_RANKS.get(name))

    return whole


def _evaluate(llm: Any, tokens: list[int]) -> None:
    llm.eval(tokens)


def _streaming(method: Method, doubt: Doubt, is_guarded: Callable[[Any], bool], rank: int) -> Method:
    @functools.wraps(method)
    def steps(self: Any, *args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        if not is_guarded(self):
            return (yield from method(self, *args, **kwargs))
        turn, inner, stream = turn_of(self), method(self, *args, **kwargs), Stream()

        def settle(doubt: Doubt) -> None:
            check_open(self)
            continues = not inspect.signature(method).bind(self, *args, **kwargs).arguments.get("reset", True)
            _settle(self, doubt, _evaluate if continues else None)

        def step() -> tuple[bool, Any]:
            check_open(self)
            try:
                return False, inner.send(sent)
            except StopIteration as end:
                return True, end.value

        sent, is_first = None, True
        try:
            while True:
                is_over, value = turn.run(step, doubt, settle, stream, is_first=is_first, rank=rank)
                if is_over:
                    return value
                is_first = False
                sent = yield value
        finally:
            turn.end(stream)
            inner.close()

    return steps


def _closing(method: Method, is_guarded: Callable[[Any], bool]) -> Method:
    @functools.wraps(method)
    def close(self: Any) -> None:
        if not is_guarded(self):
            method(self)
            return
        self._is_closed = True
        turn_of(self).close(functools.partial(method, self))

    return close
