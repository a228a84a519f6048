"""Make a trace-driven test model: real geometry, random weights, recorded routing.

usage: python scripts/make_trace_model.py OUT.gguf --preset qwen3-30b-16l
       python scripts/make_trace_model.py --help

Every position of a recording of expert choices (scripts/traces/) gets a token of its
own. Attention and experts add little to the hidden state, so in every layer it stays
near that token's embedding, and the router of layer l can be solved for: it sends
token i to the experts recorded for position i. So one layer's input tells all of the
next one's choice, unlike in a trained model; with `--parts 2` it tells nothing. Embeddings are orthogonal, so there is
room for n_embd positions. The output head answers token i with
token i+1, so greedy decoding walks the recording by itself, and the tokens are pieces
of a text, so it prints that text. A page cache or a pager sees what it would see with
the recorded model; what the experts compute is noise. `check_trace_model.py` measures
how true to the recording a model is.

In the file's metadata: `gguf_pager.trace.first_token`, `.positions`, `.first_layer`
and `.name`.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Q
from gguf import GGUFWriter
from gguf.quants import quantize
from quant_blocks import nbytes, random_weights
from trace_routing import (
    RECORDINGS,
    Experts,
    Floats,
    Parts,
    recorded_experts,
    vocabulary_rows,
)
from trace_text import TEXT, Vocabulary, cut_pieces, vocabulary

LABEL = "trace-driven test model: random weights, recorded routing"

# What one layer's attention and experts add to a hidden state of unit scale, roughly.
# Enough that a wrong expert shows in the logits, too little to change the routing.
ATTENTION_SHARE = 0.02
EXPERT_SHARE = 0.05
ALIGNMENT_BYTES = 32  # GGUF's default


@dataclass(frozen=True, slots=True)
class Spec:
    """Geometry of a test model and the recording that drives it."""

    arch: str  # qwen3moe or gpt-oss
    trace: str  # a key of RECORDINGS or the path of an .npz file
    layers: int
    experts: int
    top_k: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head_dim: int
    type: str  # a key of EXPERT_TYPES
    positions: int = 2048
    first_layer: int = 0  # of the recording
    parts: int = 1  # above 1: of the embedding, see `Parts`
    seed: int = 1


QWEN3_30B = Spec("qwen3moe", "code", 48, 128, 8, 2048, 768, 32, 4, 128, "q4_k")
GPT_OSS_20B = Spec("gpt-oss", "gpt-oss", 24, 32, 4, 2880, 2880, 64, 8, 64, "mxfp4")
PRESETS = {
    "qwen3-30b": QWEN3_30B,
    "gpt-oss-20b": GPT_OSS_20B,
    # The first layers have little locality; these four are near the mean of all.
    "demo": replace(QWEN3_30B, layers=4, first_layer=8),
    "tiny": Spec("qwen3moe", "code", 4, 16, 4, 256, 256, 4, 2, 64, "q4_k", 256),
}

ARCHITECTURES = ("qwen3moe", "gpt-oss")
# Types of (gate and up, down, down in the layers llama.cpp gives more bits).
EXPERT_TYPES = {
    "q4_k": (Q.Q4_K, Q.Q4_K, Q.Q4_K),
    "q4_k_m": (Q.Q4_K, Q.Q4_K, Q.Q6_K),
    "mxfp4": (Q.MXFP4, Q.MXFP4, Q.MXFP4),
    "q8_0": (Q.Q8_0, Q.Q8_0, Q.Q8_0),
    "f16": (Q.F16, Q.F16, Q.F16),
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor to be written: random weights of a given spread, or given values."""

    name: str
    shape: tuple[int, ...]  # slowest first, as in numpy
    qtype: Q
    content: float | Callable[[], Floats]  # standard deviation, or what returns values

    @property
    def nbytes(self) -> int:
        """Return the size in the file; raises ValueError when rows split a block."""
        return math.prod(self.shape[:-1]) * nbytes(self.qtype, self.shape[-1])


def preset_spec(preset: str, **overrides: Any) -> Spec:
    """Return a preset, `-16l` after its name meaning 16 layers, with fields replaced.

    Raises ValueError for an unknown preset, architecture or type.
    """
    named = re.fullmatch(r"(.+?)(?:-(\d+)l)?", preset)
    if named is None or named[1] not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}, there are: {', '.join(PRESETS)}")
    spec = PRESETS[named[1]]
    if named[2]:
        spec = replace(spec, layers=int(named[2]))
    spec = replace(spec, **overrides)
    if spec.arch not in ARCHITECTURES or spec.type not in EXPERT_TYPES:
        raise ValueError(f"cannot make {spec.arch} with experts of {spec.type}")
    return spec


def trace_tokens(metadata: Mapping[str, str]) -> range:
    """Return the token ids of the recording in order, given `Llama.metadata`."""
    first = int(metadata["gguf_pager.trace.first_token"])
    return range(first, first + int(metadata["gguf_pager.trace.positions"]))


def make(path: Path, preset: str = "tiny", **overrides: Any) -> None:
    """Write the model of a preset, with fields of its `Spec` replaced, to `path`.

    The file appears under its name when complete. The same arguments give the same
    bytes. Raises ValueError when the recording or a block size does not fit.
    """
    spec = preset_spec(preset, **overrides)
    layers = range(spec.first_layer, spec.first_layer + spec.layers)
    experts = recorded_experts(spec.trace, layers, spec.positions, spec.top_k, spec.experts)
    text = TEXT.read_text("ascii")
    words = vocabulary(cut_pieces(text, spec.positions))
    tensors = list(_tensors(spec, experts, words.first_piece))
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        _write_header(partial, spec, words, tensors)
        _write_tensors(partial, spec.seed, tensors)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _tensors(spec: Spec, experts: Experts, n_other: int) -> Iterator[Tensor]:
    """Yield the tensors of the model in file order."""
    parts = Parts(spec.parts, spec.n_embd)
    embedded = parts.embeddings(spec.positions, spec.seed)
    rows, head = vocabulary_rows(embedded, n_other, spec.seed)
    yield Tensor("token_embd.weight", rows.shape, Q.Q8_0, lambda: rows)
    for layer in range(spec.layers):
        for tensor in _layer_tensors(spec, layer, experts[layer], embedded, parts):
            yield replace(tensor, name=f"blk.{layer}.{tensor.name}")
    yield _ones("output_norm.weight", spec.n_embd)
    yield Tensor("output.weight", head.shape, Q.Q8_0, lambda: head)


def _layer_tensors(
    spec: Spec, layer: int, chosen: Experts, embedded: Floats, parts: Parts
) -> Iterator[Tensor]:
    """Yield the tensors of one layer, named without their `blk.N.`."""
    embd, ff, n_expert = spec.n_embd, spec.n_ff, spec.experts
    q_rows, kv_rows = spec.n_head * spec.head_dim, spec.n_head_kv * spec.head_dim
    into = 1 / math.sqrt(embd)  # keeps unit scale
    out = ATTENTION_SHARE / math.sqrt(q_rows)
    # As in the files people run: Q4_K beside Q4_K experts (a good deal faster than Q8_0
    # as well), Q8_0 beside gpt-oss's MXFP4.
    is_q4 = spec.type.startswith("q4_k") and q_rows % 256 == 0
    dense = Q.Q4_K if is_q4 else Q.Q8_0
    yield _ones("attn_norm.weight", embd)
    yield Tensor("attn_q.weight", (q_rows, embd), dense, into)
    yield Tensor("attn_k.weight", (kv_rows, embd), dense, into)
    yield Tensor("attn_v.weight", (kv_rows, embd), dense, into)
    yield Tensor("attn_output.weight", (embd, q_rows), dense, out)
    if spec.arch == "gpt-oss":
        yield Tensor("attn_q.bias", (q_rows,), Q.F32, 0.01)
        yield Tensor("attn_k.bias", (kv_rows,), Q.F32, 0.01)
        yield Tensor("attn_v.bias", (kv_rows,), Q.F32, 0.01)
        yield Tensor("attn_output.bias", (embd,), Q.F32, 0.001)
        yield Tensor("attn_sinks.weight", (spec.n_head,), Q.F32, 1.0)
        yield _norm("post_attention_norm.weight", parts.norm(layer))
        yield Tensor("ffn_gate_inp.bias", (n_expert,), Q.F32, 0.01)
        yield Tensor("ffn_gate_exps.bias", (n_expert, ff), Q.F32, 0.01)
        yield Tensor("ffn_up_exps.bias", (n_expert, ff), Q.F32, 0.01)
        yield Tensor("ffn_down_exps.bias", (n_expert, embd), Q.F32, 0.001)
    else:
        yield _ones("attn_q_norm.weight", spec.head_dim)
        yield _ones("attn_k_norm.weight", spec.head_dim)
        yield _norm("ffn_norm.weight", parts.norm(layer))
    yield Tensor(
        "ffn_gate_inp.weight",
        (n_expert, embd),
        Q.F32,
        lambda: parts.router(layer, chosen, n_expert, embedded, spec.seed),
    )
    gate_up, down, down_more = EXPERT_TYPES[spec.type]
    if _has_more_bits(layer, spec.layers):
        down = down_more
    yield Tensor("ffn_gate_exps.weight", (n_expert, ff, embd), gate_up, into)
    yield Tensor("ffn_up_exps.weight", (n_expert, ff, embd), gate_up, into)
    # 0.6: root mean square of silu(x) * y for normal x and y.
    spread = EXPERT_SHARE / (0.6 * math.sqrt(ff))
    yield Tensor("ffn_down_exps.weight", (n_expert, embd, ff), down, spread)


def _ones(name: str, length: int) -> Tensor:
    """Return a norm's weight that changes nothing."""
    return _norm(name, np.ones(length, dtype=np.float32))


def _norm(name: str, weight: Floats) -> Tensor:
    return Tensor(name, weight.shape, Q.F32, lambda: weight)


def _has_more_bits(layer: int, layers: int) -> bool:
    """Say which layers' down tensors are Q6_K in Q4_K_M, as llama.cpp has it."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _write_header(path: Path, spec: Spec, words: Vocabulary, tensors: list[Tensor]) -> None:
    """Write all that comes before the tensors' data."""
    writer = GGUFWriter(None, spec.arch)
    writer.add_name(f"synthetic {spec.arch} {spec.layers}l, routing of {spec.trace}")
    writer.add_description(LABEL)
    writer.add_quantization_version(2)
    writer.add_context_length(32768)
    writer.add_block_count(spec.layers)
    writer.add_embedding_length(spec.n_embd)
    writer.add_feed_forward_length(spec.n_ff)
    writer.add_expert_feed_forward_length(spec.n_ff)
    writer.add_expert_count(spec.experts)
    writer.add_expert_used_count(spec.top_k)
    writer.add_head_count(spec.n_head)
    writer.add_head_count_kv(spec.n_head_kv)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    if spec.arch == "gpt-oss":
        writer.add_sliding_window(128)
    writer.add_tokenizer_model("rwkv")
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_uint32("gguf_pager.trace.first_token", words.first_piece)
    writer.add_uint32("gguf_pager.trace.positions", spec.positions)
    writer.add_uint32("gguf_pager.trace.first_layer", spec.first_layer)
    writer.add_string("gguf_pager.trace.name", spec.trace)
    for tensor in tensors:
        writer.add_tensor_info(
            tensor.name,
            tensor.shape,
            np.dtype(np.float32),
            tensor.nbytes,
            raw_dtype=tensor.qtype,
        )
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def _write_tensors(path: Path, seed: int, tensors: list[Tensor]) -> None:
    """Append the tensors' data, a few megabytes at a time, with progress on stderr."""
    total_bytes = sum(tensor.nbytes for tensor in tensors)
    started, shown = time.monotonic(), 0
    with path.open("ab") as file:
        for index, tensor in enumerate(tensors):
            file.write(bytes(-file.tell() % ALIGNMENT_BYTES))
            if callable(tensor.content):
                file.write(quantize(tensor.content(), tensor.qtype).tobytes())
            else:
                n_weights = math.prod(tensor.shape)
                for chunk in random_weights(tensor.qtype, n_weights, tensor.content, (seed, 3, index)):
                    file.write(chunk.data)
            # In steps of a tenth, so that a log stays readable too.
            percent = 10 * (10 * file.tell() // total_bytes)
            if percent > shown:
                shown = percent
                print(f"\r{percent} %", end="", file=sys.stderr, flush=True)
        file.write(bytes(-file.tell() % ALIGNMENT_BYTES))
    seconds = time.monotonic() - started
    print(f"\r{total_bytes / 1e6:,.0f} MB in {seconds:.1f} s", file=sys.stderr)


def main() -> None:
    """Parse the command line and make the model."""
    parser = argparse.ArgumentParser(description=LABEL)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument(
        "--preset",
        default="tiny",
        help=f"{', '.join(PRESETS)}; append -16l for 16 layers (default: tiny)",
    )
    choices = {"arch": ARCHITECTURES, "type": tuple(EXPERT_TYPES)}
    notes = {"trace": f"{', '.join(RECORDINGS)} or an .npz file of your own"}
    for field in fields(Spec):
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            type=int if field.type == "int" else str,
            choices=choices.get(field.name),
            help=notes.get(field.name, "replaces the preset's"),
        )
    options = vars(parser.parse_args())
    given = {name: value for name, value in options.items() if value is not None}
    try:
        make(given.pop("out"), given.pop("preset"), **given)
    except (ValueError, OSError) as error:
        sys.exit(f"make_trace_model: {error}")


if __name__ == "__main__":
    main()
