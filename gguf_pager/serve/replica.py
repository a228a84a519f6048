"""One server among several that somebody else starts, asks for its health and stops: Ray Serve, say (examples/ray_serve.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gguf_pager.llama import Llama
from gguf_pager.serve.app import Served, make_app
from gguf_pager.serve.batcher import Batcher
from gguf_pager.serve.embeddings import Embedder
from gguf_pager.serve.metrics import Metrics


class Replica:
    """A model that is open, and the application that serves it.

    `n_ctx` is of each of the `n_sequences`; `settings` are those of `Llama`.

    Raises:
        PagerError: the model cannot be opened.
    """

    def __init__(self, path: str, n_sequences: int = 1, *, n_ctx: int = 4096, n_threads: int | None = None, **settings: Any) -> None:
        self._llm = Llama(path, n_ctx=n_ctx * n_sequences, n_seq_max=n_sequences, n_threads=n_threads, n_threads_batch=n_threads,
                          verbose=False, **settings)
        self._batcher = Batcher(self._llm, n_sequences)
        self._embedder = Embedder(self._batcher)
        name = Path(path).name.removesuffix(".gguf")
        self.app = make_app(Served(self._batcher, self._embedder, Metrics(self._batcher, name), name))

    @property
    def failure(self) -> str | None:
        """What the last batch has failed with; None where it has not."""
        return self._batcher.failure

    def close(self) -> None:
        """End what is being answered, and free the model."""
        self._batcher.close()
        self._embedder.close()
        self._llm.close()
