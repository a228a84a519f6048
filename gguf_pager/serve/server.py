"""The server's life: a model is served until it is told to stop, and what is being answered then ends cleanly."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import uvicorn

from gguf_pager.llama import Llama
from gguf_pager.serve.app import Served, make_app
from gguf_pager.serve.batcher import Batcher
from gguf_pager.serve.embeddings import Embedder
from gguf_pager.serve.metrics import Metrics
from gguf_pager.serve.states import States

LAST_BATCH_S = 5.0
"""For the batch that is being computed when it is to end: a long prompt's may take minutes, and Docker kills after ten seconds."""

GRACE_S = 10
"""For answers that were ended to reach those who read them."""


SWITCH_S = 0.0005
"""After a batch its thread waits so long at most for another one's Python, and a token with it; Python's own figure is ten times that."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How a model is served."""

    model: str
    n_sequences: int = 1
    api_key: str | None = None
    state_dir: Path | None = None
    state_bytes: int = 10 << 30
    cors_origins: list[str] = field(default_factory=list)
    root_path: str = ""


class _Server(uvicorn.Server):
    """Ends running answers when it is told to stop, instead of waiting for them."""

    def __init__(self, config: uvicorn.Config, batcher: Batcher) -> None:
        super().__init__(config)
        self._batcher, self._n_told = batcher, 0

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take the signals that end a server, and do not raise them again when it has ended: there is more to be put away."""
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Let what is being computed end when it is told for the second time; do not wait for who reads the third time."""
        if self._n_told == 1:
            self._batcher.stop()
        else:
            super().handle_exit(sig, frame)
        self._n_told += 1

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await asyncio.get_running_loop().run_in_executor(None, self._batcher.close, LAST_BATCH_S)
        await super().shutdown(sockets)


def run(llm: Llama, settings: Settings, listening: socket.socket) -> None:
    """Serve a model until SIGINT or SIGTERM. `llm` was opened with as many sequences as `settings` says.

    Raises:
        PagerError: conversations cannot be kept where they are to be.
    """
    sys.setswitchinterval(SWITCH_S)
    batcher = Batcher(llm, settings.n_sequences)
    embedder = Embedder(batcher)
    try:
        if settings.state_dir is not None:
            batcher.keeper = States(batcher, settings.state_dir, settings.state_bytes)
        served = Served(batcher, embedder, Metrics(batcher, settings.model), settings.model, settings.api_key, settings.cors_origins)
        config = uvicorn.Config(make_app(served), root_path=settings.root_path, timeout_graceful_shutdown=GRACE_S, log_level="warning",
                                lifespan="off")  # there is none, and a second Ctrl-C would end it with a traceback
        _Server(config, batcher).run(sockets=[listening])
    finally:
        batcher.close()
        embedder.close()
