"""The arithmetic of memory, over all small cases."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gguf_pager import BudgetError, read_layout
from gguf_pager.memory import probe, sizing
from gguf_pager.memory.budget import (
    AUTO_RESERVE_BYTES,
    Budget,
    ClassNeed,
    auto_budget_bytes,
    class_needs,
    format_bytes,
    full_arena_bytes,
    least_arena_bytes,
    look_ahead_bytes,
    parse_budget,
    share_slots,
    slice_rooms,
    stride_bytes,
    useful_arena_bytes,
)
from gguf_pager.model.layout import Layer, Layout, Slice
from gguf_pager.pager import Options, Pager

Model = Callable[..., Path]


def layer_of(*slices: tuple[int, int], n_experts: int = 8, n_used: int = 2, block: int = 0) -> Layer:
    """A layer from the (offset, bytes) of its slices."""
    return Layer(block, "exps", tuple(
        Slice(f"{i}", 0, "f32", (1, 1, n_experts), 0, offset, n_bytes) for i, (offset, n_bytes) in enumerate(slices)
    ), n_experts, n_used)


def layout_of(*layers: Layer) -> Layout:
    return Layout((Path("x"),), "a", "n", {}, layers, tuple(dict.fromkeys(layer.shape for layer in layers)), (), 0, 0)


# ---- what the user says ----

@pytest.mark.parametrize(("text", "budget"), (
    (101, Budget("bytes", 101)), (10**12, Budget("bytes", 10**12)), (101.9, Budget("bytes", 101)),
    (4e9, Budget("bytes", 4 * 10**9)), ("1000", Budget("bytes", 1000)), ("1000b", Budget("bytes", 1000)), ("2k", Budget("bytes", 2000)),
    ("2KB", Budget("bytes", 2000)), ("2KiB", Budget("bytes", 2048)), ("2ki", Budget("bytes", 2048)),
    ("3500MB", Budget("bytes", 3500 * 10**6)), ("4GiB", Budget("bytes", 4 << 30)), ("4 gib", Budget("bytes", 4 << 30)),
    (" 0.5GiB ", Budget("bytes", 1 << 29)), ("1.5T", Budget("bytes", 15 * 10**11)), ("1TiB", Budget("bytes", 1 << 40)),
    ("25%", Budget("share", 0.25)), ("100%", Budget("share", 1.0)), ("0.5 %", Budget("share", 0.005)),
    ("min", Budget("min")), (" MIN ", Budget("min")), ("auto", Budget("auto")), ("Auto", Budget("auto")),
), ids=repr)
def test_budget_is_understood(text: Any, budget: Budget) -> None:
    assert parse_budget(text) == budget


@pytest.mark.parametrize(("text", "share"), (
    ("0.25", "25%"), (0.25, "25%"), ("25", "25%"), (25, "25%"), (" 12.5 ", "12.5%"), (100.0, "100%"), ("0.005", "0.5%"), (1, "1%"),
), ids=repr)
def test_bare_number_that_must_be_a_share_is_asked_about(text: Any, share: str) -> None:
    with pytest.raises(BudgetError, match=rf"did you mean {re.escape(share)}\?"):
        parse_budget(text)


def test_small_sizes_with_a_unit_are_taken_at_their_word() -> None:
    assert parse_budget("25B") == Budget("bytes", 25) and parse_budget("0.25k") == Budget("bytes", 250)


# Malformed ones: test_errors.py, where a model is opened with each.


# ---- slots ----

def rounded_up(value: int, step: int) -> int:
    return -(-value // step) * step


def check_rooms(layer: Layer, offset_align: int, memory_align: int) -> None:
    """Every expert's read, placed as native/reads/fetch.c places it, stays in its own region of the slot."""
    align = max(offset_align, memory_align)
    rooms, stride = slice_rooms(layer, align), stride_bytes(layer, align)
    assert stride % align == 0 and stride % memory_align == 0
    end = 0
    for piece, room in zip(layer.slices, rooms, strict=True):
        assert room.region_at >= end and room.region_at % align == 0
        end = room.region_at + room.region_bytes
        assert end <= stride
        assert room.region_at <= room.data_at and room.data_at + piece.slice_bytes <= end
        for expert in range(layer.n_experts):
            offset = piece.offset_bytes + expert * piece.slice_bytes
            if align == 1:  # buffered: exactly the slice
                continue
            head = offset % offset_align
            cover_bytes = rounded_up(head + piece.slice_bytes, offset_align)
            in_place = room.data_at - head
            at = in_place if in_place % memory_align == 0 else rounded_up(room.region_at, memory_align)
            assert room.region_at <= at and at + cover_bytes <= end
            if piece.slice_bytes % align == 0 and memory_align <= offset_align:
                assert at == in_place, "whole sectors are read in place"
    assert end == stride


@pytest.mark.parametrize(("offset_align", "memory_align"), ((1, 1), (512, 4), (512, 512), (4096, 4), (4096, 4096), (512, 4096)))
def test_regions_hold_every_aligned_cover_and_never_overlap(offset_align: int, memory_align: int) -> None:
    rng = random.Random(offset_align * 7 + memory_align)
    for _ in range(400):
        sizes = [rng.choice((1, 31, 511, 512, 513, 4096, 4400, 6144, 8192, rng.randrange(1, 20_000))) for _ in range(3)]
        slices = [(rng.randrange(0, 100_000) * rng.choice((1, 32, 512)), size) for size in sizes[: rng.randrange(1, 4)]]
        check_rooms(layer_of(*slices, n_experts=rng.randrange(1, 9)), offset_align, memory_align)


def test_buffered_slots_waste_less_than_a_cache_line_per_slice() -> None:
    for n_bytes in range(1, 300):
        assert n_bytes * 3 <= stride_bytes(layer_of((0, n_bytes), (7, n_bytes), (9, n_bytes)), 1) < 3 * (n_bytes + 64)


def test_class_takes_the_widest_layers_least_and_all_layers_experts() -> None:
    layers = (layer_of((0, 512), n_used=2), layer_of((4096, 512), n_used=3), layer_of((0, 1024), n_experts=5, n_used=1))
    needs = class_needs(layout_of(*layers), 512)
    assert [(need.n_least, need.n_all, need.expert_bytes) for need in needs] == [(3, 16, 16 * 512), (1, 5, 5 * 1024)]
    assert [need.stride_bytes for need in needs] == [512 * 3, 512 * 4]


def test_arena_sizes_are_ordered(zoo_model: Model) -> None:
    for arch in ("qwen3moe", "gpt-oss", "nemotron_h_moe"):
        layout = read_layout(zoo_model(arch))
        needs = class_needs(layout, 512)
        assert 0 < least_arena_bytes(needs) <= useful_arena_bytes(layout, 512) < full_arena_bytes(needs)
        assert full_arena_bytes(needs) >= layout.expert_bytes


def all_needs() -> list[tuple[ClassNeed, ...]]:
    """Every combination of one to three small shape classes."""
    shapes = [ClassNeed(stride, least, least + more, (least + more) * (stride - 1))
              for stride in (2, 3, 7) for least in (1, 2) for more in (0, 1, 4)]
    return [needs for n in (1, 2, 3) for needs in itertools.product(shapes, repeat=n) if n < 3 or needs[0].n_least == 1]


def test_shares_never_exceed_the_arena_and_use_what_they_can() -> None:
    rng = random.Random(1)
    for needs in rng.sample(all_needs(), 1200):
        least, full = least_arena_bytes(needs), full_arena_bytes(needs)
        with pytest.raises(BudgetError):
            share_slots(needs, least - 1)
        for arena in range(least, full + 5):
            slots = share_slots(needs, arena)
            used = sum(n * need.stride_bytes for n, need in zip(slots, needs, strict=True))
            assert used <= arena
            assert all(need.n_least <= n <= need.n_all for n, need in zip(slots, needs, strict=True))
            left = arena - used
            unfilled = [need.stride_bytes for n, need in zip(slots, needs, strict=True) if n < need.n_all]
            assert not unfilled or left < min(unfilled), "no slot that fits is left out"
        assert share_slots(needs, full) == tuple(need.n_all for need in needs)


def test_shares_are_in_proportion_to_the_experts_bytes() -> None:
    needs = (ClassNeed(1000, 4, 1000, 900_000), ClassNeed(3000, 4, 1000, 2_900_000))
    for arena in range(100_000, 3_000_000, 100_000):
        small, large = share_slots(needs, arena)
        assert abs(small / large - 1) < 0.15


# ---- the machine ----

def test_auto_leaves_a_reserve_and_is_never_negative() -> None:
    assert auto_budget_bytes(0, 16 << 30) == 0
    assert auto_budget_bytes(AUTO_RESERVE_BYTES // 2, 16 << 30) == 0
    assert auto_budget_bytes(400 << 20, 400 << 20) == 350 << 20, "a small container keeps an eighth back"
    assert auto_budget_bytes(8 << 30, 8 << 30) == (8 << 30) - AUTO_RESERVE_BYTES
    assert auto_budget_bytes(200 << 30, 256 << 30) == (200 << 30) - int((256 << 30) * 0.08)


@pytest.mark.parametrize(("n_bytes", "text"), (
    (0, "0 B"), (1023, "1,023 B"), (1024, "1.00 KiB"), (1536, "1.50 KiB"), (5 << 20, "5.00 MiB"), (3 << 30, "3.00 GiB"),
    (5000 << 30, "5,000.00 GiB"), (-2048, "-2.00 KiB"),
))
def test_sizes_read_well(n_bytes: int, text: str) -> None:
    assert format_bytes(n_bytes) == text


@pytest.mark.parametrize("arch", ("qwen3moe", "kimi-k3"))
def test_what_look_ahead_learns_is_counted(zoo_model: Model, arch: str) -> None:
    """Four floats per number of a router's input; of Qwen3-235B 6 MB, which were in nobody's account."""
    layout = read_layout(zoo_model(arch))
    pager, before = Pager(layout, Options()), probe.process_memory()

    def counted(look_ahead: bool | str) -> sizing.Taken:
        options = Options(look_ahead=look_ahead)  # type: ignore[arg-type]
        return sizing.measure_context(pager, sizing.Request(parse_budget("50%"), options), before)

    off, on, auto = counted(False), counted(True), counted("auto")
    n_numbers = len(layout.layers) * layout.values[f"{arch}.embedding_length"]
    assert arch != "kimi-k3" or n_numbers > sum(layer.slices[0].ne[0] for layer in layout.layers)
    assert look_ahead_bytes(layout) > 16 * n_numbers
    assert on.context_bytes - off.context_bytes == pytest.approx(look_ahead_bytes(layout), abs=1 << 18)
    assert auto.untouched_bytes > off.untouched_bytes
