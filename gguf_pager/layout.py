"""Which bytes of which file are which expert."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gguf_pager import engine
from gguf_pager.engine import GgufHeader, TensorInfo
from gguf_pager.errors import LayoutError
from gguf_pager.files import ModelFiles

MAX_SLICES = 4
"""GP_MAX_SLICES in native/gguf_pager.h."""

_EXPERT_TENSOR = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down|gate_up)_(exps|chexps)\.weight")
_ROLE_ORDER = {"gate_up": 0, "gate": 1, "up": 2, "down": 3}
_LOOKED_UP = re.compile(r"(token_embd|per_layer_token_embd)\.weight")
"""Tables of which a token needs one row; keeping them in RAM would waste the budget."""


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
    not loaded. `header_bytes` is what each file has before the data of its first tensor.
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
    header_bytes: tuple[int, ...] = ()

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


def split_paths(first: Path, n_files: int) -> list[Path]:
    """Return the files of a split model from the first one's name, as llama.cpp forms them.

    Raises:
        LayoutError: the name is not that of a first file.
    """
    suffix = f"-00001-of-{n_files:05d}.gguf"
    if not first.name.endswith(suffix):
        raise LayoutError(f"{first} is part of a split model: open the file that ends with {suffix}.")
    stem = first.name[: -len(suffix)]
    return [first.with_name(f"{stem}-{i + 1:05d}-of-{n_files:05d}.gguf") for i in range(n_files)]


def read_layout(path: str | Path) -> Layout:
    """Read where a model's experts lie. All files of a split model are read; open the first.

    A model without experts has no `layers`.

    Raises:
        LayoutError: not a GGUF model, damaged, truncated, or with experts that cannot be multiplied.
        PagerIOError: a file cannot be read.
        EngineError: llama-cpp-python is not usable.
    """
    with ModelFiles() as files:
        return open_layout(Path(path), files)


def open_layout(path: Path, files: ModelFiles) -> Layout:
    """Do the same and leave the model's files open in `files`, which is empty before."""
    first = engine.read_header(files.open(path))
    n_files = int(first.values.get("split.count", 1) or 1)
    paths = [first.path] if n_files == 1 else split_paths(first.path, n_files)
    headers = [first, *(engine.read_header(files.open(other)) for other in paths[1:])]
    for header in headers:
        _check_complete(header)
    architecture = str(first.values.get("general.architecture", ""))
    if not architecture or not any(header.tensors for header in headers):
        raise LayoutError(f"{path} holds no model weights: it has a header but no tensors.")
    layers = _find_layers(headers, architecture)
    _check_types(layers)
    expert_names = {piece.name for layer in layers for piece in layer.slices}
    dense, idle_bytes = _find_dense(headers, expert_names, _n_blocks(first, architecture))
    return Layout(
        paths=tuple(paths),
        architecture=architecture,
        name=str(first.values.get("general.name", Path(path).stem)),
        values=first.values,
        layers=layers,
        shapes=tuple(dict.fromkeys(layer.shape for layer in layers)),
        dense=dense,
        idle_bytes=idle_bytes,
        n_vocab=_count_vocabulary(first, architecture),
        header_bytes=tuple(header.data_offset_bytes for header in headers),
    )


def override_n_used(layout: Layout, n_used: int) -> Layout:
    """Return a layout whose layers use `n_used` experts per token, instead of what the file says."""
    layers = tuple(replace(layer, n_used=max(1, min(n_used, layer.n_experts))) for layer in layout.layers)
    return replace(layout, layers=layers)


def _check_complete(header: GgufHeader) -> None:
    for tensor in header.tensors:
        missing = tensor.offset_bytes + tensor.n_bytes - header.file_bytes
        if missing > 0:
            raise LayoutError(
                f"{header.path} is truncated: tensor {tensor.name} ends {missing:,} bytes behind the end of the file. "
                "Download it again."
            )


def _find_layers(headers: list[GgufHeader], architecture: str) -> tuple[Layer, ...]:
    found: dict[tuple[int, str], list[Slice]] = {}
    for file, header in enumerate(headers):
        for tensor in header.tensors:
            match = _EXPERT_TENSOR.fullmatch(tensor.name)
            if match and tensor.ne[2] > 1:
                found.setdefault((int(match[1]), match[3]), []).append(_slice(tensor, file))
    layers = []
    for (block, kind), slices in sorted(found.items()):
        if block >= _n_blocks(headers[0], architecture):
            continue
        slices.sort(key=lambda piece: _ROLE_ORDER[_EXPERT_TENSOR.fullmatch(piece.name)[2]])  # type: ignore[index]
        n_experts = {piece.ne[2] for piece in slices}
        if len(n_experts) > 1 or len(slices) > MAX_SLICES:
            raise LayoutError(f"The expert tensors of block {block} do not belong together: they hold "
                              f"{', '.join(map(str, sorted(n_experts)))} experts. The file is damaged.")
        count = n_experts.pop()
        layers.append(Layer(block, kind, tuple(slices), count, min(_n_used(headers[0], architecture, block), count)))
    return tuple(layers)


def _n_blocks(header: GgufHeader, architecture: str) -> int:
    """Return the number of blocks that compute a token: the file may end with more, for multi-token prediction."""
    n_blocks = int(header.values.get(f"{architecture}.block_count", 1 << 30))
    return n_blocks - int(header.values.get(f"{architecture}.nextn_predict_layers", 0) or 0)


def _slice(tensor: TensorInfo, file: int) -> Slice:
    return Slice(tensor.name, tensor.type, tensor.type_name, tensor.ne[:3], file, tensor.offset_bytes,
                 tensor.n_bytes // tensor.ne[2])


def _n_used(header: GgufHeader, architecture: str, block: int) -> int:
    """Return how many experts of a block a token uses; some architectures store one number per block."""
    value = header.values.get(f"{architecture}.expert_used_count", 1)
    if isinstance(value, list):
        value = value[block] if block < len(value) else max(value, default=1)
    return max(1, int(value))


def _check_types(layers: Iterable[Layer]) -> None:
    loaded = engine.load()
    for layer in layers:
        for piece in layer.slices:
            if not engine.can_multiply(loaded, piece.type):
                raise LayoutError(
                    f"Tensor {piece.name} is of type {piece.type_name}, which ggml cannot multiply: "
                    "quantise the model to another type."
                )


def _find_dense(
    headers: list[GgufHeader], expert_names: set[str], n_blocks: int
) -> tuple[tuple[Range, ...], int]:
    """Return the ranges that every token needs, neighbours joined, and the bytes that no token needs whole."""
    has_output = any(tensor.name == "output.weight" for header in headers for tensor in header.tensors)
    ranges: list[Range] = []
    idle_bytes = 0
    for file, header in enumerate(headers):
        for tensor in sorted(header.tensors, key=lambda item: item.offset_bytes):
            if tensor.name in expert_names or not tensor.n_bytes:
                continue
            is_tied = tensor.name == "token_embd.weight" and not has_output  # then it is the output matrix, too
            block = re.match(r"blk\.(\d+)\.", tensor.name)
            is_unused = block is not None and int(block[1]) >= n_blocks
            if is_unused or (_LOOKED_UP.fullmatch(tensor.name) and not is_tied):
                idle_bytes += tensor.n_bytes
                continue
            last = ranges[-1] if ranges else None
            gap = tensor.offset_bytes - (last.offset_bytes + last.n_bytes) if last and last.file == file else None
            if last and gap is not None and 0 <= gap < 4096:
                ranges[-1] = Range(file, last.offset_bytes, last.n_bytes + gap + tensor.n_bytes)
            else:
                ranges.append(Range(file, tensor.offset_bytes, tensor.n_bytes))
    return tuple(ranges), idle_bytes


def _count_vocabulary(header: GgufHeader, architecture: str) -> int:
    tokens = header.values.get("tokenizer.ggml.tokens")
    n_vocab = len(tokens) if isinstance(tokens, list) else tokens
    return int(n_vocab or header.values.get(f"{architecture}.vocab_size", 0) or 0)
