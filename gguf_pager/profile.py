"""Which experts of a model have been used, kept from one process to the next: numbers of choices and nothing else."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gguf_pager import _native, cache
from gguf_pager.errors import EngineError
from gguf_pager.model.layout import Layout

FORMAT = 1
N_KEPT = 64
"""Profiles in the folder; those of models that were not closed for longest go. One of 60 x 384 experts has 0.1 MB."""

HALF_LIFE_TOKENS = 8192
"""Tokens after which what was counted before counts half. By tokens, not by sessions: a short one must not wipe out a long
one, and a long past must not outweigh the present use."""

_FOLDER = "profiles"
_PATIENCE_S = 0.2
_LONG_LIST = 1000
_MOST_CHOICES = 1e15
"""No process lives to count more; sums of absurd numbers overflow, which is a warning, or an error where warnings are."""

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
        if counts.shape != (layer.n_experts,) or not ((counts >= 0) & (counts <= _MOST_CHOICES)).all():
            return None
        found.append(counts)
    return found


def write(layout: Layout, chosen: Sequence[Sequence[int]], *, name: str | None = None, is_last: bool = True) -> bool:
    """Add what a process has counted, per layer, to what was known before; a process that chose nothing adds nothing.

    Return whether it is kept. Other processes may write the same profile: where their turn does not end soon, nothing is
    written; with `is_last` it is all the same, and theirs may be lost. `name` is what `name_of` returns, where that is known.
    """
    n_tokens = max((sum(row) / layer.n_used for row, layer in zip(chosen, layout.layers, strict=True)), default=0)
    if n_tokens == 0:
        return True
    try:
        name = name or name_of(layout)
    except OSError:
        return False
    with cache.locked(_PATIENCE_S) as is_alone:
        if not is_alone and not is_last:
            return False
        former = _read(name, layout)
        now: Profile = [np.array(row, dtype=np.float64) for row in chosen]
        if former is not None:
            weight = 0.5 ** (n_tokens / HALF_LIFE_TOKENS)
            now = [row + weight * old for row, old in zip(now, former, strict=True)]
        is_kept = cache.write_json(name, {"format": FORMAT, "chosen": [np.round(row, 3).tolist() for row in now]})
    folder = cache.cache_folder()
    if folder is not None:
        _forget_oldest(folder / _FOLDER)
    return is_kept


_OWN_NAME = re.compile(r"[0-9a-f]{32}\.json")
_OWN_START = re.compile(rb'\{"format":[0-9]+,"chosen":\[')
"""How `write` begins a file, whatever the format."""

_STALE_S = 24 * 3600
"""Older files that were being written belong to nobody any more."""


def _forget_oldest(folder: Path) -> None:
    """Delete the oldest profiles beyond N_KEPT: files of ours, by name and by content, and nothing else."""
    own, partial = [], []
    with contextlib.suppress(OSError):  # others may do the same at this moment
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.is_file(follow_symlinks=False):
                    continue
                if _OWN_NAME.fullmatch(entry.name):
                    own.append((entry.stat(follow_symlinks=False).st_mtime, entry.path))
                elif entry.name.startswith(cache.PARTIAL_PREFIX):
                    partial.append((entry.stat(follow_symlinks=False).st_mtime, entry.path))
        own.sort(reverse=True)
        for _, path in own[N_KEPT:]:
            if _OWN_START.match(cache.read_start(Path(path), 64) or b""):
                os.unlink(path)
        for written, path in partial:
            if written < time.time() - _STALE_S:
                os.unlink(path)


# ---- when it is kept ------------------------------------------------------------------------------------------------

_MOST_WAIT_S = 10.0
"""For the thread to come to its end: it writes a small file at most."""


class Keeper:
    """Adds what an open model learns to its profile: from time to time, when nobody computes any more, and at the end.

    A process that is ended by a signal has no end of its own to do it at. A thread does it that lives while there is
    something to be kept; what was kept once is not counted again.
    """

    every_s = 60.0
    """The most that is lost while a model computes without a pause."""

    idle_s = 10.0
    """After so long without a token all is kept."""

    def __init__(self, layout: Layout, count: Callable[[], list[list[int]]]) -> None:
        self._layout = layout
        self._count = count
        self._name = name_of(layout)
        self._pid = os.getpid()
        self._state = _native.Mutex()  # held for a moment, also by those who compute
        self._writing = _native.Mutex()  # the collection of garbage may close a model, and that is a write, within a write
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._is_watching = False
        self._used_at = self._kept_at = 0.0
        self._kept = [np.zeros(layer.n_experts, dtype=np.int64) for layer in layout.layers]

    def note_use(self) -> None:
        """Take note that tokens were computed just now."""
        if os.getpid() == self._pid:
            self._state.call(self._note_use)

    def _note_use(self) -> None:
        self._used_at = time.monotonic()
        if not self._is_watching and not self._ended.is_set():
            self._is_watching, self._kept_at = True, self._used_at
            self._thread = threading.Thread(target=self._watch, name="gguf_pager profile", daemon=True)
            try:
                self._thread.start()
            except RuntimeError:  # no more threads are allowed, or the program ends: `close` keeps it all the same
                self._thread, self._is_watching = None, False

    def keep(self, *, is_last: bool = True) -> None:
        """Add to the profile what was chosen since it was last added; not in a child of the process that has opened it."""
        if os.getpid() == self._pid:
            self._writing.call(self._keep, is_last)

    def _keep(self, is_last: bool) -> None:
        before, now = self._kept, [np.array(row, dtype=np.int64) for row in self._count()]
        self._kept = now
        new = [(row - old).tolist() for row, old in zip(now, before, strict=True)]
        if not write(self._layout, new, name=self._name, is_last=is_last):
            self._kept = before

    def close(self) -> None:
        """Keep the rest, and end the thread; twice is fine.

        Once the interpreter is being taken down there is no thread any more, and nobody who could be waited for.
        """
        if os.getpid() != self._pid:
            return
        self._ended.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread() and not sys.is_finalizing():
            thread.join(_MOST_WAIT_S)
            _wait_gone(thread)
        self.keep()

    def _watch(self) -> None:
        while True:
            used_at = self._used_at
            pause_s = min(used_at + self.idle_s, self._kept_at + self.every_s) - time.monotonic()
            if pause_s > 0:
                if self._ended.wait(pause_s):
                    return
                continue
            try:
                self.keep(is_last=False)
            except EngineError:  # the collection of garbage has closed the model in this thread, which has kept it all
                return
            if self._state.call(self._is_done, used_at):
                return

    def _is_done(self, used_at: float) -> bool:
        self._kept_at = time.monotonic()
        if self._used_at == used_at and self._kept_at - used_at >= self.idle_s:
            self._is_watching = False  # the next use starts another
        return not self._is_watching


def _wait_gone(thread: threading.Thread) -> None:
    """Before Python 3.13 `join` returns a moment before the system's thread is gone: who forks then is warned, who counts
    threads counts it.
    """
    task = Path(f"/proc/self/task/{thread.native_id}")
    for _ in range(100):
        if not task.exists():
            return
        time.sleep(0.001)


# ---- what is done with it -------------------------------------------------------------------------------------------

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
