"""Which experts of a model have been used, kept from one process to the next: numbers of choices and nothing else."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gguf_pager import cache
from gguf_pager.layout import Layout

FORMAT = 1
N_KEPT = 64
"""Profiles in the folder; those of models that were not closed for longest go. One of 60 x 384 experts has 0.1 MB."""

HALF_LIFE_TOKENS = 8192
"""Tokens after which what was counted before counts half. By tokens, not by sessions: a short one must not wipe out a long
one, and a long past must not outweigh the present use."""

_FOLDER = "profiles"
_LONG_LIST = 1000

Profile = list[npt.NDArray[np.float64]]
"""Per layer of a layout, the number of choices of each expert, older ones for less."""


def name_of(layout: Layout) -> str:
    """Return the name of a model's profile, made of what its header says and of its files' sizes; not of where they lie.

    Raises:
        OSError: a file is gone.
    """
    header = [[key, len(value) if isinstance(value, list) and len(value) > _LONG_LIST else value]
              for key, value in sorted(layout.values.items())]
    slices = [[layer.block, layer.kind, piece.name, piece.type, piece.ne, piece.file, piece.offset_bytes]
              for layer in layout.layers for piece in layer.slices]
    sizes = [os.stat(path).st_size for path in layout.paths]
    text = json.dumps([header, slices, sizes], default=repr)
    return f"{_FOLDER}/{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def read(layout: Layout) -> Profile | None:
    """Return what is known of a model's experts; None if nothing is, or if it is damaged."""
    try:
        return _read(name_of(layout), layout)
    except OSError:
        return None


def _read(name: str, layout: Layout) -> Profile | None:
    kept = cache.read_json(name)
    if not isinstance(kept, dict) or kept.get("format") != FORMAT:
        return None
    return _check(kept.get("chosen"), layout)


def _check(rows: Any, layout: Layout) -> Profile | None:
    """Return a profile of numbers that fit the model, or None."""
    if not isinstance(rows, list) or len(rows) != len(layout.layers):
        return None
    found = []
    for row, layer in zip(rows, layout.layers, strict=True):
        try:
            counts = np.array(row, dtype=np.float64)
        except (ValueError, TypeError, OverflowError):
            return None
        if counts.shape != (layer.n_experts,) or not np.isfinite(counts).all() or (counts < 0).any():
            return None
        found.append(counts)
    return found


def write(layout: Layout, chosen: Sequence[Sequence[int]]) -> None:
    """Add what a process has counted, per layer, to what was known before; a process that chose nothing adds nothing."""
    n_tokens = max((sum(row) / layer.n_used for row, layer in zip(chosen, layout.layers, strict=True)), default=0)
    if n_tokens == 0:
        return
    try:
        name = name_of(layout)
    except OSError:
        return
    former = _read(name, layout)
    now: Profile = [np.array(row, dtype=np.float64) for row in chosen]
    if former is not None:
        weight = 0.5 ** (n_tokens / HALF_LIFE_TOKENS)
        now = [row + weight * old for row, old in zip(now, former, strict=True)]
    cache.write_json(name, {"format": FORMAT, "chosen": [np.round(row, 1).tolist() for row in now]})
    folder = cache.cache_folder()
    if folder is not None:
        _forget_oldest(folder / _FOLDER)


def _forget_oldest(folder: Path) -> None:
    with contextlib.suppress(OSError):  # others may do the same at this moment
        newest_first = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
        for path in newest_first[N_KEPT:]:
            path.unlink()


def shares(layout: Layout, profile: Profile) -> Profile:
    """Return how many tokens in one choose each expert, per layer; zeros where a layer was not used."""
    return [row / max(row.sum() / layer.n_used, 1e-9) for row, layer in zip(profile, layout.layers, strict=True)]


def most_used(layout: Layout, profile: Profile, n_slots: Sequence[int]) -> list[tuple[int, int, float]]:
    """Return (layer, expert, share of tokens that chose it), the largest first; of a shape class no more than its slots."""
    value = shares(layout, profile)
    layers = np.repeat(np.arange(len(value)), [len(row) for row in value])
    experts = np.concatenate([np.arange(len(row)) for row in value])
    worth = np.concatenate(value)
    order = np.argsort(-worth, kind="stable")
    order = order[worth[order] > 0]
    classes = np.array([layout.class_of(layer) for layer in layout.layers])[layers[order]]
    is_within = np.zeros(len(order), dtype=bool)
    for index, n in enumerate(n_slots):
        is_within[np.flatnonzero(classes == index)[:n]] = True
    order = order[is_within]
    return list(zip(layers[order].tolist(), experts[order].tolist(), worth[order].tolist(), strict=True))
