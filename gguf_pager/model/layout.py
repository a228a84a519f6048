"""Which bytes of which file are which expert."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf_pager.errors import LayoutError, printable
from gguf_pager.files import ModelFiles
from gguf_pager.model import engine, metadata
from gguf_pager.model.engine import GgufHeader, TensorInfo
from gguf_pager.model.metadata import Counts, Override, Said
from gguf_pager.model.names import local_path

MAX_SLICES = 4
"""GP_MAX_SLICES in native/gguf_pager.h."""

_EXPERT_TENSOR = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down|gate_up)_(exps|chexps)\.weight")
_ROLE_ORDER = {"gate_up": 0, "gate": 1, "up": 2, "down": 3}
_FEED_FORWARD_TENSOR = re.compile(r"blk\.(\d+)\.(?:ffn|exp)_")
_LOOKED_UP = re.compile(r"(token_embd|per_layer_token_embd)\.weight")
"""Tables of which a token needs one row; keeping them in RAM would waste the budget."""


_MOST_ROWS_PER_TOKEN = 64
"""LLAMA_MAX_PLE_HEADS of llama-hparams.h: llama.cpp loads no model with more."""


@dataclass(frozen=True, slots=True)
class Slice:
    """One expert tensor: the slices of all its experts, one after the other in one file."""

    name: str
    type: int
    type_name: str
    ne: tuple[int, int, int]
    file: int
    offset_bytes: int
    slice_bytes: int


@dataclass(frozen=True, slots=True)
class Layer:
    """The experts of one block that are routed together. `n_used` of `n_experts` work on a token."""

    block: int
    kind: str
    slices: tuple[Slice, ...]
    n_experts: int
    n_used: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The slices' sizes in bytes: layers of equal shape share slots."""
        return tuple(piece.slice_bytes for piece in self.slices)

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert."""
        return sum(self.shape)


@dataclass(frozen=True, slots=True)
class Table:
    """A tensor that is looked up: a token needs `rows_per_token` of its ne[1] rows of `row_bytes` each."""

    name: str
    type: int
    ne: tuple[int, int]
    file: int
    offset_bytes: int
    row_bytes: int
    rows_per_token: int = 1


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes of one file."""

    file: int
    offset_bytes: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Layout:
    """A model on disk.

    `layers` leaves out blocks for multi-token prediction, which llama.cpp does not load by default. `shapes` lists the distinct shapes of layers, in order of first appearance: the shape classes. `dense` are the bytes
    that every token needs, `idle_bytes` those of embedding tables, of which a token needs a row, and of blocks that are
    not loaded. `tables` are the former. `header_bytes` is what each file has before the data of its first tensor.
    """

    paths: tuple[Path, ...]
    architecture: str
    name: str
    values: dict[str, Any]
    layers: tuple[Layer, ...]
    shapes: tuple[tuple[int, ...], ...]
    dense: tuple[Range, ...]
    idle_bytes: int
    n_vocab: int
    n_blocks: int | None = None
    header_bytes: tuple[int, ...] = ()
    tables: tuple[Table, ...] = ()

    @property
    def expert_bytes(self) -> int:
        """Bytes of all experts."""
        return sum(layer.expert_bytes * layer.n_experts for layer in self.layers)

    @property
    def dense_bytes(self) -> int:
        """Bytes that every token needs."""
        return sum(piece.n_bytes for piece in self.dense)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors."""
        return self.expert_bytes + self.dense_bytes + self.idle_bytes

    @property
    def bytes_per_token(self) -> int:
        """Expert bytes that one token reads when nothing is resident."""
        return sum(layer.expert_bytes * layer.n_used for layer in self.layers)

    def class_of(self, layer: Layer) -> int:
        """Return the index in `shapes` of a layer's shape."""
        return self.shapes.index(layer.shape)


def read_layout(path: str | Path, overrides: Mapping[str, Override] | None = None) -> Layout:
    """Read where a model's experts lie. All files of a split model are read; open the first. `path` may be a name, as for `Llama`.

    A model without experts has no `layers`. `overrides` are what the caller sets over the metadata (llama.cpp's kv_overrides).

    Raises:
        LayoutError: not a GGUF model, damaged, truncated, contradicting itself, or with experts that cannot be multiplied.
        PagerIOError: a file cannot be read.
        EngineError: llama-cpp-python is not usable.
    """
    with ModelFiles() as files:
        return open_layout([local_path(path)], files, overrides)


def open_layout(paths: Sequence[Path], files: ModelFiles, overrides: Mapping[str, Override] | None = None) -> Layout:
    """Do the same and leave the model's files open in `files`, which is empty before.

    `paths` is the first file, beside which the others lie, or all of them.
    """
    first = engine.read_header(files.open(paths[0]))
    metadata.check_file(first)
    paths = paths if len(paths) > 1 else metadata.find_parts(first)
    headers = [first, *(engine.read_header(files.open(other)) for other in paths[1:])]
    metadata.check_parts(headers)
    for header in headers:
        metadata.check_tensors(header)
    said = Said(first.path, first.values, first.kinds, overrides or {})
    values = said.in_force()
    architecture = str(values["general.architecture"])
    tensors = [tensor for header in headers for tensor in header.tensors]
    if not tensors:
        raise LayoutError(f"{first.path} holds no model weights: it has a header but no tensors.")
    found = _find_experts(headers)
    counts = metadata.check_counts(said, architecture, tensors, {
        block: slices[0].ne[2] for (block, kind), slices in found.items() if kind == "exps"})
    layers = _make_layers(found, counts)
    _check_types(layers)
    expert_names = {piece.name for layer in layers for piece in layer.slices}
    dense, idle_bytes = _find_dense(headers, expert_names, counts.n_blocks)
    return Layout(
        paths=tuple(paths),
        architecture=architecture,
        name=printable(values.get("general.name") or first.path.stem),
        values=values,
        layers=layers,
        shapes=tuple(dict.fromkeys(layer.shape for layer in layers)),
        dense=dense,
        idle_bytes=idle_bytes,
        n_vocab=_count_vocabulary(values, architecture),
        n_blocks=counts.n_all,
        header_bytes=tuple(header.data_offset_bytes for header in headers),
        tables=_find_tables(headers, architecture),
    )


def explain_refusal(layout: Layout, reason: str) -> LayoutError | None:
    """Return why llama.cpp has refused a model, if its reason names a feed-forward tensor that is only missing, or of another
    shape, because some architectures take a key at its word which others ignore."""
    said = _FEED_FORWARD_TENSOR.search(reason)
    if said is None:
        return None
    block = int(said[1])
    for layer in layout.layers:
        if layer.block == block and layer.kind == "exps":
            down = next(piece for piece in layer.slices if _role(piece) == "down")
            key = f"{layout.architecture}.expert_feed_forward_length"
            value = layout.values.get(key)
            width = value[block] if isinstance(value, list) and block < len(value) else value
            if type(width) is int and width not in (0, down.ne[0]):
                return _contradiction(layout, f"the experts of block {block} are to be {width} wide ({key}), and their "
                                              f"tensors are {down.ne[0]} wide", reason)
    first = min((layer.block for layer in layout.layers), default=block)
    n_dense = layout.values.get(f"{layout.architecture}.leading_dense_block_count")
    if type(n_dense) is int and min(n_dense, first) <= block < max(n_dense, first):
        return _contradiction(layout, f"its first {n_dense} blocks are to be without experts ({layout.architecture}."
                                      f"leading_dense_block_count), but the first with experts is block {first}, "
                                      "counted from 0", reason)
    return None


def _contradiction(layout: Layout, why: str, reason: str) -> LayoutError:
    return LayoutError(f"{layout.paths[0]} contradicts itself: {why} (llama.cpp: {reason.rstrip('.')}). Download it again, or "
                       "ask who made it.")


def _find_experts(headers: Sequence[GgufHeader]) -> dict[tuple[int, str], list[Slice]]:
    """Return the expert tensors of each block and kind, in the order of their roles."""
    found: dict[tuple[int, str], list[Slice]] = {}
    for file, header in enumerate(headers):
        for tensor in header.tensors:
            match = _EXPERT_TENSOR.fullmatch(tensor.name)
            if match and tensor.ne[2] > 1:
                if tensor.ne[3] != 1 or not tensor.n_bytes:
                    raise LayoutError(f"{header.path} is damaged: {tensor.name} is {' x '.join(map(str, tensor.ne))}, and no "
                                      "matrix for each expert.")
                found.setdefault((int(match[1]), match[3]), []).append(_slice(tensor, file))
    for (block, _), slices in found.items():
        slices.sort(key=lambda piece: _ROLE_ORDER[_role(piece)])
        n_experts = {piece.ne[2] for piece in slices}
        if len(n_experts) > 1 or len(slices) > MAX_SLICES:
            raise LayoutError(f"The expert tensors of block {block} do not belong together: they hold "
                              f"{', '.join(map(str, sorted(n_experts)))} experts. The file is damaged.")
        metadata.check_shapes(headers[0].path, block, {_role(piece): piece.ne for piece in slices})
    return found


def _make_layers(found: Mapping[tuple[int, str], Sequence[Slice]], counts: Counts) -> tuple[Layer, ...]:
    layers = []
    for (block, kind), slices in sorted(found.items()):
        if block < counts.n_blocks:
            n_experts, n_used = slices[0].ne[2], counts.n_used[block] if counts.n_used else 1
            layers.append(Layer(block, kind, tuple(slices), n_experts, max(1, min(n_used, n_experts))))
    return tuple(layers)


def _role(piece: Slice) -> str:
    match = _EXPERT_TENSOR.fullmatch(piece.name)
    assert match is not None
    return match[2]


def _slice(tensor: TensorInfo, file: int) -> Slice:
    return Slice(tensor.name, tensor.type, tensor.type_name, tensor.ne[:3], file, tensor.offset_bytes,
                 tensor.n_bytes // tensor.ne[2])


def _check_types(layers: Iterable[Layer]) -> None:
    loaded = engine.load()
    for layer in layers:
        for piece in layer.slices:
            if not engine.can_multiply(loaded, piece.type):
                raise LayoutError(
                    f"Tensor {piece.name} is of type {piece.type_name}, which ggml cannot multiply: "
                    "quantise the model to another type."
                )


def _has_output(headers: Sequence[GgufHeader]) -> bool:
    """Return whether the output matrix is a tensor of its own; else it is the table of embeddings, needed whole."""
    return any(tensor.name == "output.weight" for header in headers for tensor in header.tensors)


def _is_looked_up(tensor: TensorInfo, has_output: bool) -> bool:
    return bool(_LOOKED_UP.fullmatch(tensor.name)) and (has_output or tensor.name != "token_embd.weight")


def _find_tables(headers: list[GgufHeader], architecture: str) -> tuple[Table, ...]:
    has_output = _has_output(headers)
    return tuple(
        Table(tensor.name, tensor.type, tensor.ne[:2], file, tensor.offset_bytes, tensor.n_bytes // tensor.ne[1],
              _rows_per_token(headers[0], architecture) if tensor.name.startswith("per_layer") else 1)
        for file, header in enumerate(headers) for tensor in header.tensors
        if _is_looked_up(tensor, has_output) and tensor.n_bytes and tensor.ne[2:] == (1, 1)
    )


def _rows_per_token(header: GgufHeader, architecture: str) -> int:
    """Return how many rows a token looks up in the table of what each layer adds: one, or one per hash of the tokens
    before it (qwen4exp.cpp: ple_n_heads)."""
    longest, per_length = (header.values.get(f"{architecture}.ple.{key}") for key in ("ngram_size", "heads_per_ngram"))
    if not isinstance(longest, int) or not isinstance(per_length, int):
        return 1
    return min(max(1, (longest - 1) * per_length), _MOST_ROWS_PER_TOKEN)


def _find_dense(
    headers: Sequence[GgufHeader], expert_names: set[str], n_blocks: int
) -> tuple[tuple[Range, ...], int]:
    """Return the ranges that every token needs, neighbours joined, and the bytes that no token needs whole."""
    has_output = _has_output(headers)
    ranges: list[Range] = []
    idle_bytes = 0
    for file, header in enumerate(headers):
        for tensor in sorted(header.tensors, key=lambda item: item.offset_bytes):
            if tensor.name in expert_names or not tensor.n_bytes:
                continue
            block = re.match(r"blk\.(\d+)\.", tensor.name)
            is_unused = block is not None and int(block[1]) >= n_blocks
            if is_unused or _is_looked_up(tensor, has_output):
                idle_bytes += tensor.n_bytes
                continue
            last = ranges[-1] if ranges else None
            gap = tensor.offset_bytes - (last.offset_bytes + last.n_bytes) if last and last.file == file else None
            if last and gap is not None and 0 <= gap < 4096:
                ranges[-1] = Range(file, last.offset_bytes, last.n_bytes + gap + tensor.n_bytes)
            else:
                ranges.append(Range(file, tensor.offset_bytes, tensor.n_bytes))
    return tuple(ranges), idle_bytes


def _count_vocabulary(values: Mapping[str, Any], architecture: str) -> int:
    tokens = values.get("tokenizer.ggml.tokens")
    n_vocab = len(tokens) if isinstance(tokens, list) else tokens or values.get(f"{architecture}.vocab_size")
    return n_vocab if type(n_vocab) is int else 0
