"""Embeddings, from a context of their own that is made when the first are asked for."""

from __future__ import annotations

import functools
import threading
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import _internals
from llama_cpp import llama_cpp as low

from gguf_pager.llama import Llama
from gguf_pager.serve.batcher import Batcher
from gguf_pager.serve.seat import RequestError

_BATCH = 512
"""Tokens of a text at most: the mean over a text needs all of it in one batch."""

_UNREADABLE = ("deepseek4", "qwen4exp")
"""Architectures of whose embeddings llama.cpp (llama-cpp-python 0.3.36) reads more than there is, which ends the process (ggml-backend.cpp,
"tensor read out of bounds")."""


class Embedder:
    """Computes embeddings between the batches of answers; `llama_cpp.Llama.embed` does, with the model that is open already."""

    def __init__(self, batcher: Batcher) -> None:
        self._batcher = batcher
        self._embedding: Any = None
        self._lock = threading.Lock()

    def embed(self, given: str | list[str] | list[int] | list[list[int]]) -> tuple[list[list[float]], int]:
        """Return a vector of length 1 for each text, `[n_texts][n_embd]`, and the number of tokens.

        Raises:
            RequestError: a text is empty or too long, or the model gives none.
            BudgetError: there is no memory for a context.
        """
        architecture = self._batcher.llm.metadata.get("general.architecture")
        if architecture in _UNREADABLE:
            raise RequestError(f"llama.cpp cannot give embeddings of {architecture} models: ask another model.", "model")
        texts = self._tokens(given)
        found: list[list[float]] = []
        with self._lock:
            for tokens in texts:  # answers get their next token between two of them
                self._batcher.call(functools.partial(self._compute, tokens, found))
        return found, sum(map(len, texts))

    def close(self) -> None:
        """Free the context."""
        with self._lock:
            if self._embedding is not None:
                self._embedding.close()

    def _tokens(self, given: Any) -> list[list[int]]:
        texts = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given
        found = [self._batcher.llm.tokenize(text.encode(), special=True) if isinstance(text, str) else list(text) for text in texts]
        if not found or not all(found):
            raise RequestError("There is nothing to embed.", "input")
        if any(len(tokens) > _BATCH for tokens in found):
            raise RequestError(f"A text has {max(map(len, found)):,} tokens, and may have {_BATCH}: cut it.", "input",
                               "context_length_exceeded")
        if not all(0 <= token < self._batcher.llm._n_vocab for tokens in found for token in tokens):
            raise RequestError("A token lies outside the vocabulary.", "input")
        return found

    def _compute(self, tokens: list[int], found: list[list[float]]) -> None:
        if self._embedding is None:
            self._embedding = _Embedding(self._batcher.llm)
        found.append(self._embedding.vector(tokens))


class _Embedding:
    """A context that gives embeddings, of a model that is open."""

    def __init__(self, llm: Llama) -> None:
        params = llama_cpp.llama_context_default_params()
        theirs = llm.context_params
        for name in ("n_threads", "n_threads_batch", "flash_attn_type", "type_k", "type_v", "rope_scaling_type", "rope_freq_base",
                     "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow", "yarn_orig_ctx"):
            setattr(params, name, getattr(theirs, name))
        params.n_ctx = params.n_batch = params.n_ubatch = _BATCH
        params.embeddings = True
        self._context = _internals.LlamaContext(model=llm._model, params=params, verbose=False)
        if low.llama_pooling_type(self._context.ctx) == low.LLAMA_POOLING_TYPE_NONE:
            self._is_pooled = False
        else:
            self._is_pooled = True
        self._batch = _internals.LlamaBatch(n_tokens=_BATCH, embd=0, n_seq_max=1, verbose=False)
        self._n_embd = llm.n_embd()

    def vector(self, tokens: list[int]) -> list[float]:
        context = self._context.ctx
        low.llama_memory_clear(low.llama_get_memory(context), True)
        self._batch.reset()
        self._batch.add_sequence(tokens, 0, True)
        self._context.decode(self._batch)
        if self._is_pooled:
            vector = np.ctypeslib.as_array(low.llama_get_embeddings_seq(context, 0), shape=(self._n_embd,))
        else:
            rows = np.ctypeslib.as_array(low.llama_get_embeddings(context), shape=(len(tokens), self._n_embd))
            vector = rows.mean(axis=0)
        length = float(np.linalg.norm(vector))
        return [float(x) for x in (vector / length if length else vector)]

    def close(self) -> None:
        self._batch.close()
        self._context.close()
