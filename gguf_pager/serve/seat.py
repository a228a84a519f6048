"""What a request sees as its Llama: llama_cpp's own completions and chat formats, with tokens that come from the batcher."""

from __future__ import annotations

import codecs
import contextlib
import ctypes
import math
import re
import secrets
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import jinja2
import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp import _internals
from llama_cpp import llama_cpp as low

from gguf_pager.errors import PagerError
from gguf_pager.pieces import Pieces
from gguf_pager.serve.answers import Answer, likeliest
from gguf_pager.serve.batcher import Batcher

_SHARED = ("model_path", "verbose", "metadata", "tokenizer_", "spm_infill", "_model", "_n_vocab", "last_n_tokens_size", "chat_format",
           "chat_handler", "_chat_handlers", "_token_nl", "_token_eos")
"""What all seats have of the Llama that was opened."""


MOST_GRAMMAR, MOST_DEPTH = 256 << 10, 5000
"""Characters, and brackets within brackets: llama.cpp reads a grammar by recursion, and ends the process where the stack does."""


class RequestError(PagerError):
    """A request that cannot be answered as it is.

    `parameter` and `code` are what OpenAI's errors call them.
    """

    def __init__(self, message: str, parameter: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.parameter, self.code = parameter, code


def checked(ask: Callable[[], Any]) -> Any:
    """Ask something of a seat; what stock says of a request in its own exceptions is raised as a RequestError."""
    try:
        return ask()
    except jinja2.TemplateError as error:
        raise RequestError(f"The model's chat template refuses these messages: {error}", "messages") from error
    except ValueError as error:
        raise RequestError(f"The request cannot be answered: {error}") from error
    except RecursionError as error:  # some look into a schema until it ends, and take one without a type for endless
        raise RequestError("The model's chat template cannot make a prompt of these tools: give each schema in them a type.", "tools") from error
    except TypeError as error:  # a template's, of something that is not there: anybody else's is a mistake of ours
        if not any(frame.f_globals.get("__name__") == "jinja2.environment" for frame, _ in traceback.walk_tb(error.__traceback__)):
            raise
        raise RequestError(f"The model's chat template cannot make a prompt of these messages: {error}", "messages") from error


class _Rows:
    """Rows of logits by position, of which stock reads each once, for its logprobs."""

    def __init__(self, n_prompt: int) -> None:
        self._first, self._rows = n_prompt - 1, dict[int, npt.NDArray[np.single]]()
        self._newest = np.empty(0, np.single)

    def put(self, row: npt.NDArray[np.single]) -> None:
        self._rows[self._first] = self._newest = row
        self._first += 1

    def __getitem__(self, index: tuple[int, slice]) -> npt.NDArray[np.single]:
        return self._newest if index[0] < 0 else self._rows.pop(index[0])


class Seat(llama_cpp.Llama):  # type: ignore[misc]  # llama_cpp is not typed
    """A Llama for one request. It shares the model with others, and holds no context: `generate` is the batcher's.

    `create_completion` and `create_chat_completion` are stock's, and give what stock gives, also token by token.

    Attributes:
        answers: what was asked of the batcher, in order.
        n_tokens_given: tokens of text that were handed out.
    """

    def __init__(self, batcher: Batcher) -> None:
        self.answers: list[Answer] = []  # first, because a Llama is closed when it is forgotten
        self._is_given_up = self._is_cut = False
        self._batcher = batcher
        self._stack = contextlib.ExitStack()
        for name in _SHARED:
            setattr(self, name, getattr(batcher.llm, name))
        self.verbose = False
        self._ctx = None
        self._n_ctx = batcher.n_ctx
        self._logits_all = True  # to stock, what it means is that there are logits
        self._seed = secrets.randbits(31)  # stock makes the seed of an answer from it, and would give all the same
        self.cache = self.draft_model = None
        self.n_tokens = 0
        self.n_tokens_given = 0
        self._ids_given: list[int] = []
        self._n_most = 0
        self._rows: Any = None
        self._n_likeliest: int | None = None
        self._shown = dict[int, bytes]()

    @property
    def _scores(self) -> Any:
        return self._rows

    def close(self) -> None:
        """Give up what is being computed for this request, or is going to be."""
        self._is_given_up = True
        for answer in list(self.answers):
            self._batcher.give_up(answer)

    def detokenize(self, tokens: list[int], prev_tokens: list[int] | None = None, special: bool = False) -> bytes:
        """Return the text of tokens; stock asks for all of an answer's after each of them."""
        if self._shown and not special and not self._shown.keys().isdisjoint(tokens):
            return b"".join(self._shown.get(token) or self._batcher.pieces[token] for token in tokens)
        text = None if special else self._batcher.pieces.text_of(self, tokens)
        return bytes(super().detokenize(tokens, prev_tokens=prev_tokens, special=special)) if text is None else text

    def show(self, marks: Sequence[str]) -> None:
        """Have these marks in the text of answers, where they are control tokens, which have none otherwise."""
        for mark in marks:
            tokens = self.tokenize(mark.encode(), add_bos=False, special=True)
            if len(tokens) == 1 and not self._batcher.pieces[tokens[0]]:
                self._shown[tokens[0]] = mark.encode()

    def prompt_end(self) -> str:
        """Return the last of the prompt that was asked with first, control tokens included: 16 tokens of it."""
        pieces = Pieces(self._model.vocab, has_controls=True)
        return b"".join(pieces[int(token)] for token in self.answers[0].prompt[-16:]).decode(errors="replace")

    def create_completion(self, prompt: str | list[int], **given: Any) -> Any:
        """Complete a text as llama_cpp.Llama does, but with no more and no fewer tokens than the context allows.

        Raises:
            RequestError: it is too long, or something is asked for that is not there.
        """
        tokens = self.tokenize(prompt.encode(), special=True) if isinstance(prompt, str) else prompt
        n_tokens = len(tokens)
        if n_tokens == 0:
            raise RequestError("The prompt is empty, and this model needs at least one token.", "prompt")
        if n_tokens >= self._n_ctx:
            raise RequestError(f"The prompt has {n_tokens:,} tokens, and the context of a conversation is {self._n_ctx:,}: shorten it, "
                               "or start the server with a larger --ctx-size.", "messages", "context_length_exceeded")
        if not all(0 <= token < self._n_vocab for token in tokens):
            raise RequestError(f"A token lies outside the vocabulary of {self._n_vocab:,}.", "prompt")
        self._check_grammar(given.get("grammar"))
        self._n_likeliest = given.get("logprobs")
        self._n_most = given.get("max_tokens") or 0
        if self._n_likeliest is not None and given.get("echo"):
            raise RequestError("echo and logprobs cannot be had together.", "echo")
        if not given.get("stream"):
            return self._in_one_piece(prompt, given)
        found = super().create_completion(prompt, **given)
        return found if self._n_likeliest is None else self._with_whole_characters(found)

    def _in_one_piece(self, prompt: str | list[int], given: dict[str, Any]) -> dict[str, Any]:
        if self._n_likeliest is not None:
            return _join(self, self.create_completion(prompt, **{**given, "stream": True}))
        # Of an answer that ends before its end stock gives the text only where a criterion has stopped it.
        criteria = llama_cpp.StoppingCriteriaList([*(given.get("stopping_criteria") or ()), lambda ids, row: self._is_cut])
        found: dict[str, Any] = super().create_completion(prompt, **{**given, "stopping_criteria": criteria})
        if self._is_cut:
            found["choices"][0]["finish_reason"] = "length"
        return found

    def _with_whole_characters(self, chunks: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Put characters together whose bytes come in several tokens: for logprobs stock decodes each token alone, and drops them."""
        decoder = codecs.getincrementaldecoder("utf-8")("ignore")
        n_tokens = 0
        for chunk in chunks:
            choice = chunk["choices"][0]
            if choice["logprobs"] is not None:
                piece = self.detokenize([self._ids_given[n_tokens]])
                n_tokens += 1
                if decoder.getstate()[0] or piece.decode(errors="ignore").encode() != piece:
                    choice["text"] = decoder.decode(piece)
            yield chunk

    def _check_grammar(self, grammar: Any) -> None:
        """Refuse a grammar that llama.cpp cannot read: it would end the process later."""
        if grammar is None:
            return
        depth = deepest = 0
        for bracket in re.findall(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|[()]', grammar._grammar):
            depth += (bracket == "(") - (bracket == ")")
            deepest = max(deepest, depth)
        if deepest > MOST_DEPTH or len(grammar._grammar) > MOST_GRAMMAR:
            raise RequestError(f"The grammar is longer than {MOST_GRAMMAR >> 10} KiB, or deeper than {MOST_DEPTH:,} brackets: simplify it.", "grammar")
        sampler = low.llama_sampler_init_grammar(self._model.vocab, grammar._grammar.encode(), grammar._root.encode())
        if not sampler:
            raise RequestError("The grammar is not understood, or repeats something more often than llama.cpp takes: write it in GBNF, with a rule "
                               "called root.", "grammar")
        low.llama_sampler_free(sampler)

    def generate(self, tokens: Sequence[int], *, reset: bool = True, stopping_criteria: Any = None,
                 **sampling: Any) -> Iterator[int]:
        """Yield the tokens of an answer, which the batcher computes ahead of who reads them."""
        prompt = np.array(tokens, np.intc)
        answer = self._ask(prompt, sampling)
        self._rows = _Rows(len(prompt))
        ids = np.concatenate([prompt, np.zeros(self._n_ctx, np.intc)])
        self.input_ids, self.n_tokens = ids, len(prompt)
        try:
            for token in answer.tokens():
                if token.kept is not None:
                    self._rows.put(token.kept.row())
                if stopping_criteria is not None and stopping_criteria(ids[: self.n_tokens], None):
                    return
                self.n_tokens_given += not low.llama_vocab_is_eog(self._model.vocab, token.id)
                self._ids_given.append(token.id)
                yield token.id
                ids[self.n_tokens] = token.id
                self.n_tokens += 1
            self._is_cut = True  # who reads stops at an answer's own end: the batcher has ended this one
        finally:
            self._batcher.give_up(answer)

    def _ask(self, prompt: npt.NDArray[np.intc], sampling: dict[str, Any]) -> Answer:
        n_room = self._n_ctx - len(prompt)
        n_most = min(self._n_most, n_room) if self._n_most > 0 else n_room
        n_likeliest = self._n_likeliest
        answer = Answer(prompt, lambda row: 0, n_most,
                        None if n_likeliest is None else lambda row, token: likeliest(row, token, n_likeliest))
        # What stock's sampler looks at of a Llama: its text so far is what the batcher has computed.
        looked_at = _Looked(answer, SimpleNamespace(
            _model=self._model, _n_vocab=self._n_vocab, _seed=self._seed, last_n_tokens_size=self.last_n_tokens_size))
        sampler = llama_cpp.Llama._init_sampler(looked_at, **sampling)
        context = self._batcher.llm._ctx
        answer.release = sampler.close
        if sampling.get("grammar") is None:
            answer.sample = lambda row: int(sampler.sample(context, row))
        else:
            candidates = _internals.LlamaTokenDataArray(n_vocab=self._n_vocab)
            answer.sample = lambda row: _sample_allowed(sampler, context, row, candidates)
        self.answers.append(answer)
        self._batcher.begin(answer)
        if self._is_given_up:  # who asks may have gone before it was begun
            self._batcher.give_up(answer)
        return answer

    def usage(self) -> dict[str, Any]:
        """Return what OpenAI's `usage` says of all that was asked at this seat."""
        n_prompt = sum(len(answer.prompt) for answer in self.answers)
        return {"prompt_tokens": n_prompt, "completion_tokens": self.n_tokens_given,
                "total_tokens": n_prompt + self.n_tokens_given,
                "prompt_tokens_details": {"cached_tokens": sum(answer.n_cached for answer in self.answers)}}


def _sample_allowed(sampler: Any, context: Any, row: int, candidates: Any) -> int:
    """Return a token as llama_sampler_sample does, which ends the process where a grammar allows none.

    Raises:
        RequestError: none is allowed.
    """
    n_vocab = candidates.n_vocab
    candidates.copy_logits(np.ctypeslib.as_array(low.llama_get_logits_ith(context.ctx, row), shape=(n_vocab,)))
    array = candidates.candidates
    array.selected = -1
    low.llama_sampler_apply(sampler.sampler, ctypes.byref(array))
    if not 0 <= array.selected < array.size or not math.isfinite(array.data[array.selected].logit):
        raise RequestError("The grammar allows no token after what was written: change it.", "grammar")
    token = int(array.data[array.selected].id)
    sampler.accept(token)
    return token


class _Looked:
    def __init__(self, answer: Answer, constants: SimpleNamespace) -> None:
        self._answer = answer
        self.__dict__.update(vars(constants))

    @property
    def _input_ids(self) -> npt.NDArray[np.intc]:
        return self._answer.seen


def _join(seat: Seat, chunks: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """Return a completion in one piece, of its chunks: stock has logprobs of those alone where it keeps no scores."""
    text, reason, last = "", None, dict[str, Any]()
    logprobs: dict[str, list[Any]] | None = None
    for last in chunks:
        choice = last["choices"][0]
        text += choice["text"]
        reason = choice["finish_reason"] or reason
        if choice["logprobs"] is not None:
            logprobs = logprobs or {name: [] for name in choice["logprobs"]}
            for name, values in choice["logprobs"].items():
                logprobs[name] += values
    usage = seat.usage()
    return {**last, "usage": {name: usage[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")},
            "choices": [{"text": text, "index": 0, "logprobs": logprobs, "finish_reason": reason}]}
