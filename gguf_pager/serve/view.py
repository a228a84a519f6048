"""What the page draws: which experts are in memory and how often each was chosen, with what the server is doing."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import asdict
from importlib import resources
from typing import Any

import numpy as np

from gguf_pager.errors import EngineError
from gguf_pager.memory import probe
from gguf_pager.serve.batcher import Batcher
from gguf_pager.serve.joules import Joules


def page() -> bytes:
    """Return the page, which holds all that it needs."""
    return (resources.files("gguf_pager.serve") / "page.html").read_bytes()


def headers(html: bytes) -> dict[str, str]:
    """Return the headers that go with the page: it may run its own script and style, and talk to its own server, nothing else."""
    def hashes(element: bytes) -> str:
        texts = re.findall(rb"<%b>(.*?)</%b>" % (element, element), html, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'" for text in texts)

    policy = {"default-src": "'none'", "script-src": hashes(b"script"), "style-src": hashes(b"style"), "img-src": "data:",
              "connect-src": "'self'", "base-uri": "'none'", "form-action": "'none'", "frame-ancestors": "'none'"}
    return {"Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
            "Cache-Control": "no-cache", "Referrer-Policy": "no-referrer", "X-Content-Type-Options": "nosniff"}


def snapshot(batcher: Batcher, model: str, joules: Joules) -> dict[str, Any]:
    """Return the state of the server. The page compares two of them to tell hits, misses and what was read ahead.

    Of each layer `resident` is base64 of a byte per expert (0 on disk, 1 in memory, 2 pinned), `chosen` base64 of a 32-bit little-endian
    count per expert.
    """
    totals, load = batcher.totals, batcher.load()
    found: dict[str, Any] = {
        "model": model, "running": load.n_running, "waiting": load.n_waiting, "sequences": load.n_sequences, "n_ctx": batcher.n_ctx,
        "prompt_tokens": totals.prompt_tokens, "cached_tokens": totals.cached_tokens, "generated_tokens": totals.generated_tokens,
        "computing_s": totals.computing_s, "process_bytes": probe.process_memory().resident_bytes, "paging": None,
        "not_paged_reason": batcher.llm.not_paged_reason, "energy": asdict(joules.now()),
    }
    pager = batcher.llm.pager
    if pager is None:
        return found
    try:
        native = pager.native()
        layers = [{"block": layer.block, "resident": base64.b64encode(native.resident(i)).decode(),
                   "chosen": base64.b64encode(np.array(native.chosen(i), "<u4").tobytes()).decode()}
                  for i, layer in enumerate(pager.layout.layers)]
    except (EngineError, ValueError):  # it is being closed
        return found
    stats = pager.stats()
    found["paging"] = {
        "budget": str(batcher.llm._budget), "arena_bytes": stats.arena_bytes, "resident_bytes": stats.resident_bytes,
        "hits": stats.hits, "misses": stats.misses, "bytes_read": stats.bytes_read, "stall_s": stats.stall_ns / 1e9, "layers": layers,
    }
    return found
