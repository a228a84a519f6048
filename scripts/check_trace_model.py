"""Measure how true a trace-driven test model is to the recording behind it.

usage: python scripts/check_trace_model.py MODEL.gguf [--positions 400] [--batch 200]

Runs the first positions through stock llama.cpp, the first `--batch` of them as one
batch and the rest token by token, and reads what every router chose. Prints one line
of JSON: the share of selections as recorded, the share of those in their recorded
rank, the reuse by the next token (chosen and recorded), and how many positions were
answered with the next token.
"""

from __future__ import annotations

import argparse
import ctypes
import json
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import llama_cpp as api
from make_trace_model import trace_tokens
from trace_routing import Experts, recorded_experts


class GgmlTensor(ctypes.Structure):
    """The head of ggml's tensor, as of llama-cpp-python 0.3.36."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    )


def router_tap(chosen: list[list[Experts]]) -> Any:
    """Return a callback that adds what the router of layer l chooses to `chosen[l]`."""

    def on_node(address: int, ask: bool, _user_data: int | None) -> bool:
        tensor = GgmlTensor.from_address(address)
        name, _, layer = tensor.name.decode().rpartition("-")
        if name != "ffn_moe_topk":
            return not ask
        if not ask:
            # A view of the full ranking: rows lie n_expert apart, not top_k.
            shape = (tensor.ne[1], tensor.nb[1] // 4)
            n_ids = (shape[0] - 1) * shape[1] + tensor.ne[0]
            ids = np.zeros(shape, dtype=np.int32)
            ctypes.memmove(ids.ctypes.data, tensor.data, n_ids * 4)
            chosen[int(layer)].append(ids[:, : tensor.ne[0]].astype(np.int64))
        return True

    return api.ggml_backend_sched_eval_callback(on_node)


def run(path: Path, n_positions: int, n_batch: int) -> tuple[Experts, int, Any]:
    """Return the chosen experts, the count of right answers, and the metadata."""
    llama = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    tokens, metadata = trace_tokens(llama.metadata), llama.metadata
    llama.close()
    layers = int(metadata[f"{metadata['general.architecture']}.block_count"])
    chosen: list[list[Experts]] = [[] for _ in range(layers)]
    callback = router_tap(chosen)  # kept until the context is gone
    model = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
    params = api.llama_context_default_params()
    params.n_ctx = n_positions
    params.n_batch = params.n_ubatch = n_batch
    params.n_threads = params.n_threads_batch = 2
    params.cb_eval = callback
    context = api.llama_init_from_model(model, params)
    n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    batch = api.llama_batch_init(n_batch, 0, 1)
    right = start = 0
    while start < n_positions:
        batch.n_tokens = min(n_batch, n_positions) if start == 0 else 1
        for i in range(batch.n_tokens):
            batch.token[i], batch.pos[i] = tokens[start + i], start + i
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, 1
        if api.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode failed at position {start}")
        for i in range(batch.n_tokens):
            logits = np.ctypeslib.as_array(api.llama_get_logits_ith(context, i), (n_vocab,))
            right += int(logits.argmax()) == tokens[(start + i + 1) % len(tokens)]
        start += batch.n_tokens
    api.llama_batch_free(batch)
    api.llama_free(context)
    api.llama_model_free(model)
    return np.stack([np.concatenate(rows) for rows in chosen]), right, metadata


def reuse(experts: Experts) -> float:
    """Return the share of experts that the position before chose as well."""
    now, before = experts[:, 1:, :, None], experts[:, :-1, None, :]
    return float((now == before).any(-1).mean())


def main() -> None:
    """Parse the command line, run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--positions", type=int, default=400)
    parser.add_argument("--batch", type=int, default=200)
    options = parser.parse_args()
    chosen, right, metadata = run(options.model, options.positions, options.batch)
    layers, positions, top_k = chosen.shape
    first_layer = int(metadata["gguf_pager.trace.first_layer"])
    recorded = recorded_experts(
        metadata["gguf_pager.trace.name"],
        range(first_layer, first_layer + layers),
        positions,
        top_k,
        int(metadata[f"{metadata['general.architecture']}.expert_count"]),
    )
    same = (chosen[:, :, :, None] == recorded[:, :, None, :]).any(-1)
    result = {
        "model": options.model.name,
        "positions": positions,
        "as_recorded": round(float(same.mean()), 4),
        "in_recorded_rank": round(float((chosen == recorded).mean()), 4),
        "reuse": round(reuse(chosen), 4),
        "reuse_recorded": round(reuse(recorded), 4),
        "next_token_right": right,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
