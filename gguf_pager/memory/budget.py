"""The arithmetic of memory: how a budget becomes slots. Pure functions; what a machine has is asked in probe.py."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gguf_pager.errors import BudgetError
from gguf_pager.model.layout import Layer, Layout

WORK_BYTES = 24 << 20
"""What a decoding process needs besides weights, KV cache and the context's buffers: ggml's work buffer, stacks,
Python objects of a completion. With 24 MiB a process of 2.1 GB ended 42 MB below its budget
after a prompt of 512 tokens (benchmarks/LOG.md, 2026-11-22); with 48 MiB one of 0.3 GB 64 MB below (tests/test_memory.py's script)."""

WORK_BUFFER_BYTES = 16 << 20
"""How much of WORK_BYTES is for ggml's work buffer of the first context."""

_WORK_TOKENS = 512


def shared_work_bytes(n_ubatch: int) -> int:
    """Return what a process takes again, of WORK_BYTES, whenever it computes batches of so many tokens; nobody has it between two.

    10 to 11 MB were seen with 512 tokens, none with 256 or fewer (benchmarks/LOG.md, 2026-11-30).
    """
    return WORK_BYTES * min(n_ubatch, _WORK_TOKENS) // _WORK_TOKENS


AUTO_RESERVE_SHARE, AUTO_RESERVE_BYTES, AUTO_RESERVE_SMALL_SHARE = 0.08, 768 << 20, 0.125
"""What `auto` leaves to the rest of the machine, or of the container that is the machine: the larger of the first two; but of a small
one no more than an eighth, or there would be nothing left of a container of 512 MiB."""

OVER_SHARE = 0.03
"""What a budget in bytes may lie above what this process can come to hold, beside WORK_BYTES: that is known no better,
because pages of programs that many processes share are charged to the first, and the kernel's own to whoever caused them."""

_MOST_PERCENT = 100
"""Nobody means a number up to this, without a unit, as bytes."""

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]i?)?b?\s*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Budget:
    """What the user asked for.

    kind `bytes`: a limit on the whole process; `share`: a part of the experts' bytes, 0 < value <= 1; `min`: as little
    as works; `auto`: as much as the machine can spare. `value` is None for the last two.
    """

    kind: Literal["bytes", "share", "min", "auto"]
    value: float | None = None


def parse_budget(text: float | str) -> Budget:
    """Read a budget: bytes as a number, or "4GiB", "3500MB", "25%", "min", "auto".

    Raises:
        BudgetError: it is none of these, or a bare number so small that a share must be meant.
    """
    if isinstance(text, bool) or not isinstance(text, int | float | str):
        raise BudgetError(f"budget must be a number of bytes or a text such as '4GiB' or '25%', not {text!r}.")
    if isinstance(text, int | float):
        if not math.isfinite(text) or text <= 0:
            raise BudgetError(f"budget must be a positive number of bytes, not {text!r}.")
        _refuse_bare_share(text, text)
        return Budget("bytes", int(text))
    word = text.strip().lower()
    if word == "auto":
        return Budget("auto")
    if word == "min":
        return Budget("min")
    if word.endswith("%"):
        try:
            share = float(word[:-1]) / 100
        except ValueError:
            share = 0.0
        if not 0 < share <= 1:
            raise BudgetError(f"budget {text!r}: a share of the experts lies above 0% and not above 100%.")
        return Budget("share", share)
    match = _SIZE.fullmatch(word)
    if not match or float(match[1]) <= 0:
        raise BudgetError(f"budget {text!r} is not understood: write bytes, '4GiB', '3500MB', '25%', 'min' or 'auto'.")
    if word == match[1]:
        _refuse_bare_share(text, float(match[1]))
    return Budget("bytes", int(float(match[1]) * _UNITS[(match[2] or "").lower()]))


def _refuse_bare_share(text: float | str, number: float) -> None:
    if number <= _MOST_PERCENT:
        percent = number * 100 if number < 1 else number
        raise BudgetError(f"budget {text!r} is too small, {number:g} bytes: did you mean {percent:g}%? A share of the experts is "
                          "written '25%', a size '4GiB'.")


@dataclass(frozen=True, slots=True)
class SliceRoom:
    """Where a slice lies in a slot: its first byte, and the region that a read of it may touch."""

    data_at: int
    region_at: int
    region_bytes: int


def slice_rooms(layer: Layer, align: int) -> tuple[SliceRoom, ...]:
    """Place a layer's slices side by side in a slot, so that aligned reads can fill them.

    `align` is the larger of the file system's two alignments for direct reads; 1 for buffered ones. A direct read covers
    whole sectors, so every region has one sector to spare at either end. When a slice is a whole number of sectors, all
    experts of the tensor begin at the same distance from a sector's start, and the data can lie at that distance from
    the region's: the read then goes in place.
    """
    rooms, at = [], 0
    for piece in layer.slices:
        spare = 0 if align == 1 else 2 * align
        region_bytes = -(-(piece.slice_bytes + spare) // max(align, 64)) * max(align, 64)
        if align == 1:
            head = 0
        elif piece.slice_bytes % align == 0:
            head = piece.offset_bytes % align
        else:
            head = align
        rooms.append(SliceRoom(at + head, at, region_bytes))
        at += region_bytes
    return tuple(rooms)


def stride_bytes(layer: Layer, align: int) -> int:
    """Return the size of a slot for this layer's class."""
    last = slice_rooms(layer, align)[-1]
    return last.region_at + last.region_bytes


@dataclass(frozen=True, slots=True)
class ClassNeed:
    """What a shape class takes: a slot's size, the fewest slots that can be computed with, and all experts."""

    stride_bytes: int
    n_least: int
    n_all: int
    expert_bytes: int


def class_needs(layout: Layout, align: int) -> tuple[ClassNeed, ...]:
    """Return one ClassNeed per shape class of the model; the least is what one token wants of a layer.

    Any batch passes through as many slots, and through fewer: with these, a token's reads are all on their way at once.
    """
    needs = []
    for shape in layout.shapes:
        layers = [layer for layer in layout.layers if layer.shape == shape]
        needs.append(
            ClassNeed(
                stride_bytes=stride_bytes(layers[0], align),
                n_least=max(layer.n_used for layer in layers),
                n_all=sum(layer.n_experts for layer in layers),
                expert_bytes=sum(layer.n_experts * layer.expert_bytes for layer in layers),
            )
        )
    return tuple(needs)


def least_arena_bytes(needs: Sequence[ClassNeed]) -> int:
    """Return the smallest arena that can compute one token at a time."""
    return sum(need.n_least * need.stride_bytes for need in needs)


def full_arena_bytes(needs: Sequence[ClassNeed]) -> int:
    """Return the arena that holds every expert."""
    return sum(need.n_all * need.stride_bytes for need in needs)


def useful_arena_bytes(layout: Layout, align: int) -> int:
    """Return the arena that holds one token's experts of all layers: below it even a repeated token misses."""
    return sum(layer.n_used * stride_bytes(layer, align) for layer in layout.layers)


def share_slots(needs: Sequence[ClassNeed], arena_bytes: int) -> tuple[int, ...]:
    """Divide an arena among the shape classes in proportion to their experts' bytes.

    Returns the number of slots per class, each between its least and all of its experts; the sum of their bytes does
    not exceed `arena_bytes`.

    Raises:
        BudgetError: the arena is below `least_arena_bytes`.
    """
    least = least_arena_bytes(needs)
    if arena_bytes < least:
        raise BudgetError(f"{arena_bytes:,} bytes for experts are too few: the smallest arena is {least:,} bytes.")
    slots = [need.n_least for need in needs]
    left = arena_bytes - least
    open_classes = [i for i, need in enumerate(needs) if need.n_all > need.n_least]
    while open_classes:
        weight = sum(needs[i].expert_bytes for i in open_classes)
        gained = 0
        for i in list(open_classes):
            need = needs[i]
            part = int(left * (need.expert_bytes / weight)) // need.stride_bytes
            part = min(part, need.n_all - slots[i])
            slots[i] += part
            gained += part * need.stride_bytes
            if slots[i] == need.n_all:
                open_classes.remove(i)
        left -= gained
        if not gained:
            break
    for i in open_classes:  # what rounding left over
        extra = min(left // needs[i].stride_bytes, needs[i].n_all - slots[i])
        slots[i] += extra
        left -= extra * needs[i].stride_bytes
    return tuple(slots)


def auto_budget_bytes(available_bytes: int, total_bytes: int) -> int:
    """Return what a process may take of `available_bytes` so that the rest of a machine of `total_bytes` can breathe.

    Both are those of `probe.memory()`: of the container, where there is one.
    """
    least = min(AUTO_RESERVE_BYTES, int(total_bytes * AUTO_RESERVE_SMALL_SHARE))
    reserve = max(least, int(total_bytes * AUTO_RESERVE_SHARE))
    return max(0, available_bytes - reserve)


def least_cache_bytes(layout: Layout, n_cells: int, key_bytes: float, value_bytes: float) -> int:
    """Return what the KV cache of `n_cells` tokens takes at least; 0 where an architecture keeps it in ways of its own.

    `key_bytes` and `value_bytes` are those of a number in it. A layer with a sliding window holds that many tokens or more;
    one of latent attention (key_length_mla) no values.
    """
    def known(name: str) -> Any:
        return layout.values.get(f"{layout.architecture}.{name}")

    heads, n_heads, n_blocks = known("attention.head_count_kv"), known("attention.head_count"), known("block_count")
    if any(known(name) is not None for name in _OTHER_CACHES) or not isinstance(n_blocks, int) or not isinstance(n_heads, int):
        return 0
    head = (known("embedding_length") or 0) // n_heads
    lengths = known("attention.key_length") or head, known("attention.value_length") or head
    heads = heads if isinstance(heads, list) else [n_heads if heads is None else heads] * n_blocks
    heads = heads[: n_blocks - (known("nextn_predict_layers") or 0)]  # those of drafts are in another context
    window = known("attention.sliding_window")
    if not all(isinstance(number, int) for number in (*lengths, *heads, window or 0)):
        return 0
    per_head = lengths[0] * key_bytes + (0 if known("attention.key_length_mla") else lengths[1] * value_bytes)
    return int(sum(heads) * per_head) * (min(n_cells, window) if window else n_cells)


def count_scores(layout: Layout, n_cells: int, n_ubatch: int) -> int:
    """Return how many scores of attention llama.cpp has at once of a batch of `n_ubatch` tokens, without flash attention, of which each
    looks at `n_cells`; 0 where the file does not say how many heads there are."""
    heads = layout.values.get(f"{layout.architecture}.attention.head_count")
    heads = max(heads, default=0) if isinstance(heads, list) else heads
    return heads * n_cells * n_ubatch if isinstance(heads, int) else 0


SCORE_BYTES, CONVERTED_BYTES = 4, 2
"""Of a score in a context's buffers, and once more in 16 bits where it is multiplied with the values: in ggml's work buffer
(ggml_graph_plan of llama-cpp-python 0.3.36), which a context keeps and allocates with its first batch only."""


def converted_bytes(layout: Layout, n_ubatch: int) -> int:
    """Return what ggml's work buffer takes for the inputs of a layer's other matrices, converted to the type they are multiplied in."""
    numbers = [layout.values.get(f"{layout.architecture}.{name}") for name in ("embedding_length", "feed_forward_length")]
    widths = [max(number, default=0) if isinstance(number, list) else number for number in numbers]
    return max((width for width in widths if isinstance(width, int)), default=0) * n_ubatch * CONVERTED_BYTES


_OTHER_CACHES = ("ssm.state_size", "ssm.conv_kernel", "wkv.head_size", "kda.head_dim", "shortconv.l_cache", "full_attention_interval",
                 "attention.shared_kv_layers", "attention.indexer.key_length")
"""Keys of architectures that have states instead of a cache in some layers, or share one."""


def most_bytes(reachable_bytes: int) -> int:
    """Return the largest budget in bytes to believe in where a process can come to hold `reachable_bytes`."""
    return int(reachable_bytes * (1 + OVER_SHARE)) + WORK_BYTES


def whole_spare_bytes(available_bytes: int, total_bytes: int) -> int:
    """Return what a model may take that runs as stock llama.cpp: of small machines less than `auto` takes for one that is paged,
    because stock is held by no budget, and keeps repacked weights beside those in the mapping."""
    return max(0, available_bytes - max(AUTO_RESERVE_BYTES, int(total_bytes * AUTO_RESERVE_SHARE)))


def fits_whole(tensor_bytes: int, available_bytes: int, total_bytes: int) -> bool:
    """Return whether a model fits into what can be spared, so that `auto` leaves it to stock llama.cpp.

    The figures are those of `probe.memory()`.
    """
    return tensor_bytes + WORK_BYTES <= whole_spare_bytes(available_bytes, total_bytes)


def format_bytes(n_bytes: float) -> str:
    """Return a size for people: '3.5 GiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n_bytes) < 1024 or unit == "GiB":
            return f"{n_bytes:,.0f} {unit}" if unit == "B" else f"{n_bytes:,.2f} {unit}"
        n_bytes /= 1024
    raise AssertionError


_ROW_ALIGN_BYTES, _ROW_PARTS, _ID_BYTES = 64, 3, 8
"""native/graph/rows.c: what it takes of its memory begins at such an address: the rows, and two numbers per id."""


def row_bytes(layout: Layout, n_ubatch: int) -> int:
    """Return the memory for the rows that a batch of up to n_ubatch tokens looks up in the model's tables."""
    total = 0
    for table in layout.tables:
        n_ids = n_ubatch * table.rows_per_token
        total += n_ids * _ID_BYTES + min(n_ids, table.ne[1]) * table.row_bytes + _ROW_PARTS * _ROW_ALIGN_BYTES
    return total


_LOOK_ROWS, _ROUTER_BYTES, _ROUTER_COPY_BYTES = 17, 1 << 20, 24 << 10
"""Of look-ahead: rows that are kept (native/compute/foretell.c), what routers compute in, and what the copy of one takes, its graph
included (native/compute/router.c)."""


def look_ahead_bytes(layout: Layout) -> int:
    """Return what a context keeps to foretell what each layer's router will choose: a line of four floats per number of its input,
    which is wider than that of experts that get a projection of it."""
    width = layout.values.get(f"{layout.architecture}.embedding_length")
    widths = [max(layer.slices[0].ne[0], width if isinstance(width, int) else 0) for layer in layout.layers]
    per_layer = sum(width * 4 * _FLOAT_BYTES + _ROUTER_COPY_BYTES for width in widths)
    return _ROUTER_BYTES + _LOOK_ROWS * max(widths) * _FLOAT_BYTES + per_layer


_LEAST_BATCH_ROWS, _STEPS, _FLOAT_BYTES = 64, 3, 4
"""Rows that are computed at a time at least: a single token's of several experts. Results between the first matrices and the last,
which most architectures do not exceed."""


def batch_bytes(layout: Layout, n_ubatch: int) -> int:
    """Return the memory for the rows of batches of up to n_ubatch tokens while they are computed (native/compute/crew.c).

    Per token the input of a layer's experts, and per row of the experts that are at hand, of which the largest may have a row
    of each token: the input, what each matrix but the last gives, what lies between, the last one's input; all taken for floats,
    though most are multiplied in smaller types.
    """
    most = 0
    for layer in layout.layers:
        n_in, n_between = layer.slices[0].ne[0], layer.slices[-1].ne[0]
        per_row = n_in + sum(piece.ne[1] for piece in layer.slices[:-1]) + (_STEPS + 1) * n_between
        most = max(most, n_ubatch * n_in + (n_ubatch + _LEAST_BATCH_ROWS) * per_row)
    return most * _FLOAT_BYTES
