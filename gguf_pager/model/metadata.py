"""What a model's header says of itself, checked against its tensors before llama.cpp believes it.

llama.cpp refuses much of what contradicts itself, but ends the process (GGML_ASSERT) or divides by zero over the rest:
`llama_model_base::load_hparams`, `llm_graph_context::build_moe_ffn` and the asserts in `src/models/`, read as of
llama-cpp-python 0.3.36. What an architecture of its own makes of a key is left to llama.cpp, unless it would end the process.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf_pager.errors import LayoutError
from gguf_pager.model.engine import GgufHeader, TensorInfo

MOST_BLOCKS, MOST_EXPERTS = 512, 1024
"""LLAMA_MAX_LAYERS and LLAMA_MAX_EXPERTS of llama-hparams.h: more end the process."""

MOST_WIDE = 1 << 16
"""Values of a head, and heads: no model has nearly as many. With some such numbers llama.cpp computes for minutes."""

_WIDTHS = ("attention.key_length", "attention.value_length", "attention.head_count", "rope.dimension_count")
"""How the names of keys begin that say so, of all layers or of some."""

_GATING_FUNCTIONS = (0, 1, 2, 3, 4)
"""llama_expert_gating_func_type of llama-hparams.h; 0 lets an architecture take its own."""

_NEED_GATING = ("bailingmoe2", "bailingmoe3", "deepseek32", "dots1", "dots3note", "exaone-moe", "kimi-k3", "kimi-linear",
                "lfm2moe", "minimax-m2", "minimax-m3", "smallthinker")
"""Architectures without one of their own: with 0 their graph ends the process."""

_MAY_HAVE_ONE_EXPERT = ("hunyuan-dense", "hunyuan_vl")
"""Architectures whose files may say that there is one expert, and mean none."""

_OVERRIDES = {int: ("u8", "i8", "u16", "i16", "u32", "i32", "u64", "i64"), bool: ("bool",), float: ("f32", "f64"),
              str: ("string",)}
"""Which kinds of value llama.cpp overrides with an `int`, a `bool`, a `float` and a `str`; others it leaves in silence."""

Override = int | bool | float | str


@dataclass(frozen=True, slots=True)
class Counts:
    """What a header says, and nothing contradicts: blocks that compute a token, experts of a block and those that a token uses.

    `n_all` are all blocks of the file, those for multi-token prediction among them; `n_used` is per block of these. None
    where the header does not say.
    """

    n_all: int | None
    n_blocks: int
    n_experts: int
    n_used: tuple[int, ...]


# ---- what kind of file it is ----------------------------------------------------------------------------------------

_OTHER_FILES = {
    "adapter": "an adapter (LoRA): open the model it was made for, and give this file as lora_path",
    "controlvector": "a control vector: open the model it was made for",
    "imatrix": "an importance matrix, which llama-quantize reads: it holds no model",
    "mmproj": "a projector (mmproj), which turns images or sound into a model's input: open the model it belongs to",
    "vocab": "a vocabulary without a model: open the model's own file",
}


def check_file(header: GgufHeader) -> None:
    """Refuse a GGUF file that is something else than a model, by what it is.

    Raises:
        LayoutError: it is.
    """
    values = header.values
    architecture, said = values.get("general.architecture"), values.get("general.type")
    kind = {"adapter": "adapter", "imatrix": "imatrix", "mmproj": "mmproj", "projector": "mmproj"}.get(str(said))
    if architecture == "clip" or architecture is None and any(key.startswith("clip.") for key in values):
        kind = "mmproj"
    elif kind is None and any(key.startswith("adapter.") for key in values):
        kind = "adapter"
    elif kind is None and architecture == "controlvector":
        kind = "controlvector"
    elif kind is None and architecture is None and any(key.startswith("imatrix.") for key in values):
        kind = "imatrix"
    elif kind is None and not header.tensors and "tokenizer.ggml.tokens" in values and "split.count" not in values:
        kind = "vocab"
    if kind is not None:
        raise LayoutError(f"{header.path} is {_OTHER_FILES[kind]}.")
    if "split.count" in values and values.get("split.no"):
        return  # check_split tells which part is to be opened
    if not isinstance(architecture, str) or not architecture:
        raise LayoutError(f"{header.path} holds no model: its header names no architecture (general.architecture).")


# ---- the parts of a split model -------------------------------------------------------------------------------------

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


def find_parts(first: GgufHeader) -> list[Path]:
    """Return the files of a model, the one given first; all of them exist.

    Raises:
        LayoutError: the file is another part than the first, its header says nonsense of parts, or one is missing.
    """
    n_files = _split_number(first, "split.count", "u16", 0)
    if n_files <= 1:
        return [first.path]
    number = _split_number(first, "split.no", "u16")
    if number > 0:
        suffix = f"-{number + 1:05d}-of-{n_files:05d}.gguf"
        start = first.path.name.removesuffix(suffix) + f"-00001-of-{n_files:05d}.gguf"
        name = start if first.path.name.endswith(suffix) else f"the file that ends with -00001-of-{n_files:05d}.gguf"
        raise LayoutError(f"{first.path} is part {number + 1} of {n_files} of a split model: open part 1, {name}.")
    paths = split_paths(first.path, n_files)
    for part, path in enumerate(paths):
        if not os.path.exists(path):
            raise LayoutError(f"Part {part + 1} of {n_files} is missing: {path.name} does not lie beside {first.path.name}. "
                              "Download it, too.")
    return paths


def check_parts(headers: Sequence[GgufHeader]) -> None:
    """Refuse parts that are not those of one model, in their order.

    Raises:
        LayoutError: they are not.
    """
    if len(headers) == 1:
        return
    for part, header in enumerate(headers):
        if _split_number(header, "split.no", "u16") != part:
            raise LayoutError(f"{header.path} says that it is part {header.values['split.no'] + 1}, but its name says "
                              f"{part + 1}: the files are mixed up. Download them again.")
    n_tensors = sum(len(header.tensors) for header in headers)
    wanted = _split_number(headers[0], "split.tensors.count", "i32")
    if wanted != n_tensors:
        raise LayoutError(f"{headers[0].path} speaks of {wanted:,} tensors (split.tensors.count), but its {len(headers)} "
                          f"parts hold {n_tensors:,}: they are not parts of one model.")
    names: dict[str, Path] = {}
    for header in headers:
        for tensor in header.tensors:
            if tensor.name in names:
                raise LayoutError(f"{header.path} and {names[tensor.name].name} both hold the tensor {tensor.name}: they are "
                                  "not parts of one model.")
            names[tensor.name] = header.path


def _split_number(header: GgufHeader, key: str, kind: str, default: int | None = None) -> int:
    if key not in header.kinds and default is not None:
        return default
    if header.kinds.get(key) != kind:
        raise LayoutError(f"{header.path} is damaged: {key} is {_shown(header, key)}, but llama.cpp takes a {kind}.")
    return int(header.values[key])


def _shown(header: GgufHeader, key: str) -> str:
    if key not in header.kinds:
        return "missing"
    return f"{header.values[key]!r:.40}, of type {header.kinds[key]}"


# ---- numbers --------------------------------------------------------------------------------------------------------

@dataclass(frozen=True, slots=True)
class Said:
    """What the header says, with what the caller has set over it (llama.cpp's kv_overrides), read as llama.cpp reads it."""

    path: Path
    values: Mapping[str, Any]
    kinds: Mapping[str, str]
    overrides: Mapping[str, Override] = field(default_factory=dict)

    def in_force(self) -> dict[str, Any]:
        """Return all values, those of the caller in place of the file's where llama.cpp takes them."""
        taken = {key: value for key, value in self.overrides.items()
                 if key not in self.kinds or self.kinds[key] in _OVERRIDES[type(value)]}
        return {**self.values, **taken}

    def number(self, key: str, default: int = 0) -> int:
        """Return a number that llama.cpp keeps in 32 bits without a sign.

        Raises:
            LayoutError: it is none.
        """
        if key in self.overrides:
            value = self.overrides[key]
            if type(value) is not int or not 0 <= value < 1 << 32:
                raise LayoutError(f"kv_overrides sets {key} to {value!r}: it is a number from 0 to 4294967295.")
            return value
        if key not in self.kinds:
            return default
        if self.kinds[key] != "u32":
            raise self.refuse(f"{key} is {self.values[key]!r:.40}, of type {self.kinds[key]}, but llama.cpp takes a u32")
        return int(self.values[key])

    def numbers(self, key: str, n: int) -> tuple[int, ...]:
        """Return a number for each of n blocks; the file may hold one for all. A missing key cannot be overridden.

        Raises:
            LayoutError: they are none, or not n.
        """
        if key not in self.kinds:
            return (0,) * n
        kind = self.kinds[key]
        if not kind.startswith("array"):
            return (self.number(key),) * n
        values = self.values[key]
        length = len(values) if isinstance(values, list) else values
        if kind not in ("array of u32", "array of i32") or length != n:
            raise self.refuse(f"{key} is an {kind} with {length} elements, but there are {n} blocks, each with a number")
        if min(values, default=0) < 0:
            raise self.refuse(f"{key} holds {min(values)}")
        return tuple(values)

    def refuse(self, why: str) -> LayoutError:
        """Return the error that says why."""
        remedy = "Change kv_overrides." if self.overrides else "Download it again, or ask who made it."
        return LayoutError(f"{self.path} contradicts itself: {why}. {remedy}")


def check_counts(said: Said, architecture: str, tensors: Sequence[TensorInfo], expert_blocks: Mapping[int, int]) -> Counts:
    """Return how many blocks and experts there are, as the header says and the tensors confirm.

    `expert_blocks` are the blocks with expert tensors, and the number of experts that these hold.

    Raises:
        LayoutError: something contradicts something.
    """
    key = f"{architecture}.%s"
    if key % "block_count" not in said.kinds and not (
            expert_blocks and any(name.startswith(f"{architecture}.") for name in said.kinds)):
        return Counts(None, 1 << 30, 0, ())  # an architecture of something else than llama.cpp, which will refuse it
    n_all = said.number(key % "block_count")
    if not 1 <= n_all <= MOST_BLOCKS:
        raise said.refuse(f"it has {n_all} blocks ({key % 'block_count'}), but llama.cpp computes 1 to {MOST_BLOCKS}")
    n_extra = said.number(key % "nextn_predict_layers")
    if n_extra > n_all or expert_blocks and n_extra == n_all:
        raise said.refuse(f"{n_extra} of its {n_all} blocks are for multi-token prediction ({key % 'nextn_predict_layers'})")
    n_experts = _check_experts(said, key, architecture)
    used = said.numbers(key % "expert_used_count", n_all)
    if architecture in _MAY_HAVE_ONE_EXPERT and n_experts <= 1:
        n_experts, used = 0, (0,) * n_all
    if max(used) > n_experts:
        raise said.refuse(f"a token uses {max(used)} experts of {n_experts} ({key % 'expert_used_count'}, "
                          f"{key % 'expert_count'})")
    if n_experts and not max(used):
        raise said.refuse(f"it has {n_experts} experts, and a token uses none of them ({key % 'expert_used_count'})")
    _check_groups(said, key, n_experts)
    counts = Counts(n_all, n_all - n_extra, n_experts, used)
    if expert_blocks:
        _check_blocks(said, key, tensors, n_all)
        _check_expert_blocks(said, key, counts, expert_blocks)
        _check_routing(said, key, architecture, n_experts)
        _check_widths(said, key)
    return counts


def _check_experts(said: Said, key: str, architecture: str) -> int:
    n_experts = said.number(key % "expert_count")
    if n_experts > MOST_EXPERTS:
        raise said.refuse(f"it has {n_experts} experts ({key % 'expert_count'}), but llama.cpp takes {MOST_EXPERTS} at most")
    return n_experts


def _check_groups(said: Said, key: str, n_experts: int) -> None:
    """Of more than one group llama.cpp adds the two best experts each, and takes the best groups but never all."""
    n_groups, n_used = said.number(key % "expert_group_count"), said.number(key % "expert_group_used_count")
    names = f"({key % 'expert_group_count'}, {key % 'expert_group_used_count'})"
    if n_groups and n_groups >= n_experts:
        raise said.refuse(f"it has {n_groups} groups of experts, but {n_experts} experts {names}")
    if n_groups > 1 and n_experts % n_groups:
        raise said.refuse(f"its {n_experts} experts do not divide into {n_groups} groups {names}")
    if n_groups > 1 and not 0 < n_used < n_groups:
        raise said.refuse(f"a token uses {n_used} of {n_groups} groups of experts {names}: fewer than all, and one at least")


def _check_blocks(said: Said, key: str, tensors: Sequence[TensorInfo], n_all: int) -> None:
    blocks = set()
    for tensor in tensors:
        parts = tensor.name.split(".", 2)
        if parts[0] == "blk" and len(parts) == 3 and parts[1].isascii() and parts[1].isdigit():
            blocks.add(int(parts[1]))
    for block in range(n_all):
        if block not in blocks:
            raise said.refuse(f"it has {n_all} blocks ({key % 'block_count'}), but no tensor of block {block}")
    if max(blocks) >= n_all:
        raise said.refuse(f"it has {n_all} blocks ({key % 'block_count'}), and tensors of block {max(blocks)}, counted from 0")
    width = said.number(key % "embedding_length")
    table = next((tensor for tensor in tensors if tensor.name == "token_embd.weight"), None)
    if table is not None and table.ne[0] != width:
        raise said.refuse(f"its tokens have {width} values ({key % 'embedding_length'}), but {table.ne[0]} in "
                          f"{table.name}")


def _check_expert_blocks(said: Said, key: str, counts: Counts, expert_blocks: Mapping[int, int]) -> None:
    for block, n_there in sorted(expert_blocks.items()):
        if n_there != counts.n_experts:
            raise said.refuse(f"it has {counts.n_experts} experts ({key % 'expert_count'}), but the tensors of block {block} "
                              f"hold {n_there}")
        if block < counts.n_blocks and not counts.n_used[block]:
            raise said.refuse(f"a token uses none of the {n_there} experts of block {block} ({key % 'expert_used_count'})")


def _check_routing(said: Said, key: str, architecture: str, n_experts: int) -> None:
    gating = key % "expert_gating_func"
    value = said.in_force().get(gating, 0)
    if type(value) is int and (value not in _GATING_FUNCTIONS or not value and architecture in _NEED_GATING):
        raise said.refuse(f"llama.cpp knows no way {value} to choose experts ({gating})")
    if architecture == "ernie4_5-moe" and not said.number(key % "interleave_moe_layer_step", 1):
        raise said.refuse(f"every 0th block has experts ({key % 'interleave_moe_layer_step'})")
    if architecture == "grovemoe":
        n_together = said.number(key % "experts_per_group")
        if not n_together or n_experts % n_together:
            raise said.refuse(f"its {n_experts} experts do not divide into groups of {n_together} "
                              f"({key % 'experts_per_group'})")


def _check_widths(said: Said, key: str) -> None:
    beginnings = tuple(key % width for width in _WIDTHS)
    for name, value in said.in_force().items():
        if name.startswith(beginnings) and type(value) is int and value > MOST_WIDE:
            raise said.refuse(f"{name} is {value}, and {MOST_WIDE} would be too much for any model")


# ---- tensors --------------------------------------------------------------------------------------------------------

_MAPPED_ALIGN_BYTES = 32
"""TENSOR_ALIGNMENT of ggml-impl.h: where a mapping's tensors begin elsewhere, ggml_backend_cpu_buffer_from_ptr ends the process."""


def check_tensors(header: GgufHeader) -> None:
    """Refuse a file that ends before its tensors do, and one whose tensors llama.cpp cannot map.

    Names that occur twice, and tensors that lie over each other or in another order, ggml's reader does not let through.

    Raises:
        LayoutError: it is one.
    """
    for tensor in header.tensors:
        missing = tensor.offset_bytes + tensor.n_bytes - header.file_bytes
        if missing > 0:
            raise LayoutError(
                f"{header.path} is truncated: tensor {tensor.name} ends {missing:,} bytes behind the end of the file. "
                "Download it again."
            )
    if header.tensors and header.data_offset_bytes % _MAPPED_ALIGN_BYTES:
        raise LayoutError(f"{header.path} cannot be mapped: its tensors begin at byte {header.data_offset_bytes:,}, no multiple of "
                          f"{_MAPPED_ALIGN_BYTES}. Have it made anew, with a general.alignment of 32.")


def check_shapes(path: Path, block: int, shapes: Mapping[str, tuple[int, int, int]]) -> None:
    """Refuse matrices of one block's experts that cannot be multiplied one after the other; `shapes` by role.

    Raises:
        LayoutError: they cannot.
    """
    down = shapes.get("down")
    first = {role: shape for role, shape in shapes.items() if role != "down"}
    if down is None or not first:
        there = " and ".join(sorted(shapes))
        raise LayoutError(f"{path} is damaged: of the experts of block {block} there are only the {there} tensors.")
    for role, (n_in, n_out, _) in first.items():
        width = n_out // 2 if role == "gate_up" and n_out % 2 == 0 else n_out
        if (n_in, width) != (down[1], down[0]):
            raise LayoutError(f"{path} is damaged: the experts of block {block} do not fit together: {role} is {n_in} x {n_out}, "
                              f"down {down[0]} x {down[1]}.")
