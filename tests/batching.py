"""A batcher on a small model, and what is asked of it, for the tests of all that stands on one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import gguf_pager
from gguf_pager import hooks
from gguf_pager.serve.answers import Answer
from gguf_pager.serve.batcher import Batcher

Zoo = Callable[..., Path]

ATTENTION = ("qwen3moe", "gpt-oss", "deepseek2", "llama4")
RECURRENT = ("granitehybrid", "qwen3next", "lfm2moe", "jamba")
SLIDING = ("gpt-oss",)

OTHER_WIDTHS = 0.1
"""How far logits are apart at most that were computed in batches of other widths: 0.01 to 0.03 on an EPYC without AVX-512, less on others. What
belongs to another text is off by ones."""


@contextmanager
def batching(path: Path, n_sequences: int = 1, n_ctx: int = 256, **given: Any) -> Iterator[Batcher]:
    given = {"budget": "min", "n_batch": 64, "n_ubatch": 64, "n_threads": 1, "n_threads_batch": 1, **given}
    with gguf_pager.Llama(str(path), n_ctx=n_ctx * n_sequences, n_seq_max=n_sequences, verbose=False, profile=False, **given) as llm:
        batcher = Batcher(llm, n_sequences)
        try:
            yield batcher
        finally:
            batcher.close()


def tokens_of(seed: int, n_tokens: int, n_vocab: int = 32) -> list[int]:
    return np.random.default_rng(seed).integers(3, n_vocab, n_tokens).tolist()


def ask(batcher: Batcher, prompt: list[int], n_tokens: int = 6) -> tuple[list[int], np.ndarray, Answer]:
    """Return the tokens of an answer at temperature 0, the logits that each was chosen from, and the answer."""
    answer = begin(batcher, prompt, n_tokens)
    tokens = list(answer.tokens())
    rows = [token.kept for token in tokens]
    return [token.id for token in tokens], np.array(rows), answer


def begin(batcher: Batcher, prompt: list[int], n_tokens: int = 6) -> Answer:
    answer = Answer(np.array(prompt, np.intc), lambda row: 0, n_tokens, keep=lambda row, token: row.copy())
    answer.sample = lambda row: int(np.argmax(np.ctypeslib.as_array(
        hooks.low.llama_get_logits_ith(batcher.llm.ctx, row), shape=(batcher.llm._n_vocab,))))
    batcher.begin(answer)
    return answer
