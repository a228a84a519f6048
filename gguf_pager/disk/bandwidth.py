"""Which way of reading suits a device: what is chosen from which measurements, and how they are made."""

from __future__ import annotations

import datetime
import mmap
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import cycle, zip_longest
from typing import Literal, Self

from gguf_pager.errors import PagerError
from gguf_pager.files import ModelFiles
from gguf_pager.memory.probe import page_cache_bytes
from gguf_pager.model.layout import Layer, Layout, Range
from gguf_pager.pager import DEFAULT_PIECE_BYTES, DEFAULT_READERS, Options, Pager

Io = Literal["direct", "buffered"]

# ---- what is chosen -------------------------------------------------------------------------------------------------

@dataclass(frozen=True, slots=True)
class Way:
    """A way to read."""

    io: Io
    n_readers: int
    piece_bytes: int

    @property
    def in_flight_bytes(self) -> int:
        """Bytes that are on their way at a time."""
        return self.n_readers * self.piece_bytes


_ENOUGH = 2 / 3
"""Of the best bandwidth. The rest is worth less than what is paid for it: with more in flight the expert that is computed
with first comes later. On a disk where 4 x 512 KiB reach 0.84 to 0.94 of the best, 8 and 16 of them take 16 and 10 % longer
per token (benchmarks/LOG.md, 2026-11-24). Nearer to that, noise would decide."""

_CLEARLY = 1.2
"""Times as fast as the usual: buffered reads, which fill a page cache that counts against caps, than direct ones; pieces
of another size than the usual."""

_LADDER = (DEFAULT_READERS, 8, 16, 32)
"""Readers of DEFAULT_PIECE_BYTES that are tried: 2 to 16 MiB in flight. Fewer have only been seen to lose: a device slow
enough for fewer bytes to fill it brings 2 MiB in a few milliseconds, and an expert is larger than that. More than 16 MiB
no device is known to want: 12 GB/s at 1 ms are 12 MB."""

_BACKGROUND_LADDER, _BACKGROUND_PIECE_BYTES = (8, 16), 1 << 20
"""The same where the system reads in the background. There each request costs system time, and so does each return to the
queue: 8 x 1 MiB cost half of what 8 x 256 KiB do (0.033 and 0.061 s per GB), 4 x 1 MiB as much as those, and a token takes
no longer (benchmarks/LOG.md, 2026-11-26)."""

_PIECES = (128 << 10, DEFAULT_PIECE_BYTES, 1 << 20)
"""Sizes of which the others are tried, with as many bytes in flight."""

MOST_READERS, MOST_PIECE_BYTES = 32, max(_PIECES)


def ladder(io: Io, *, in_background: bool = False) -> list[Way]:
    """Return ways with more and more in flight."""
    if in_background:
        return [Way(io, n_readers, _BACKGROUND_PIECE_BYTES) for n_readers in _BACKGROUND_LADDER]
    return [Way(io, n_readers, DEFAULT_PIECE_BYTES) for n_readers in _LADDER]


def other_pieces(way: Way) -> list[Way]:
    """Return ways with as much in flight, in pieces of other sizes."""
    ways = [Way(way.io, way.in_flight_bytes // piece_bytes, piece_bytes) for piece_bytes in _PIECES
            if piece_bytes != way.piece_bytes]
    return [other for other in ways if 1 <= other.n_readers <= MOST_READERS]


def least_in_flight(rates: Mapping[Way, float]) -> Way:
    """Return the way with the least in flight that comes near enough to the best of these bytes per second."""
    best = max(rates.values())
    return min((way for way, rate in rates.items() if rate >= _ENOUGH * best), key=lambda way: way.in_flight_bytes)


def best_pieces(usual: Way, rates: Mapping[Way, float]) -> Way:
    """Return the fastest way, if it is clearly faster than the usual one."""
    best = max(rates, key=lambda way: rates[way])
    return best if rates[best] >= _CLEARLY * rates[usual] else usual


@dataclass(frozen=True, slots=True)
class Findings:
    """What was measured, and when: the best way of either kind with its bytes per second; None where there is none."""

    date: str
    direct: tuple[Way, float] | None
    buffered: tuple[Way, float] | None

    @property
    def io(self) -> Io:
        """The kind to take."""
        if self.direct is None:
            return "buffered"
        return "buffered" if self.buffered is not None and self.buffered[1] >= _CLEARLY * self.direct[1] else "direct"

    def best(self, io: Io) -> Way | None:
        """Return the best way of this kind."""
        found = self.direct if io == "direct" else self.buffered
        return found[0] if found else None

    def __str__(self) -> str:
        found = [each for each in (self.direct, self.buffered) if each is not None]
        return ", not ".join(f"{way.io} {way.n_readers} x {way.piece_bytes >> 10} KiB at {rate / 1e9:.2f} GB/s"
                             for way, rate in sorted(found, key=lambda each: each[0].io != self.io))


# ---- measuring ------------------------------------------------------------------------------------------------------

_MOST_SECONDS = 2.4
"""Nothing is begun that would end later, if it took as long as the longest before; what a slow device has not been asked by
then is not chosen."""

_SLICE_SECONDS = 0.025
"""One measurement: 75 MB, 9 batches where it was tried; longer on slow devices, which are asked for two batches at least."""

_LONG_SECONDS = 0.2
"""A measurement that decides against the usual: limits on a disk's speed, of cgroups and of virtual machines, let what was
saved up during 0.1 s pass at once, so that a short measurement may see no limit at all. Under one of 550 MB/s buffered reads
seemed to give 1.6 GB/s."""

_ROUNDS = 2
"""The better one counts: others' reads and a device's moods only take away."""

_BATCH_BYTES, _MOST_EXPERTS = 8 << 20, 4
"""What is read and waited for at a time: as many experts as a token misses in a layer, 1 to 4."""


def measure(layout: Layout, files: ModelFiles | None = None) -> Findings:
    """Read experts of a model that are not in the page cache, as decoding does, in different ways, for 1 to 2.4 s.

    `files` are the model's, where it is open already.

    The page cache is left without what was read. Takes a few tens of MB meanwhile.

    Raises:
        PagerError: they cannot be read.
    """
    with _Trial(layout, time.monotonic() + _MOST_SECONDS, files) as trial:
        kinds = trial.kinds()
        if not kinds:
            raise PagerError("the page cache would be measured instead of it")
        ladders = {io: ladder(io, in_background=io == "direct" and trial.reads_in_background()) for io in kinds}
        trial.rates([ladders[kinds[0]][0]], n_rounds=1)  # wakes disk and processor up
        # Both kinds of a rung are neighbours, and the lowest comes first: of a slow device there may be no others.
        rates = trial.rates([way for rung in zip_longest(*ladders.values()) for way in rung if way is not None])
        found: dict[Io, tuple[Way, float]] = {}
        for io in kinds:
            of_kind = {way: rate for way, rate in rates.items() if way.io == io}
            usual = ladders[io][0]
            if usual in of_kind:
                found[io] = trial.clearly_better((usual, of_kind[usual]), least_in_flight(of_kind))
        if not found:
            raise PagerError("none of the model's experts could be read from the device: others hold all in the page cache")
        date, direct, buffered = datetime.date.today().isoformat(), found.get("direct"), found.get("buffered")
        if (direct and buffered and Findings(date, direct, buffered).io == "buffered"
                and trial.clearly_better(direct, buffered[0])[0] == direct[0]):
            buffered = None  # what was seen was not what it can
        findings = Findings(date, direct, buffered)
        chosen = direct if findings.io == "direct" else buffered
        assert chosen is not None
        rates = trial.rates([chosen[0], *other_pieces(chosen[0])])
        if chosen[0] in rates:
            chosen = trial.clearly_better((chosen[0], rates[chosen[0]]), best_pieces(chosen[0], rates))
        return replace(findings, **{findings.io: chosen})  # type: ignore[arg-type]


class _Trial:
    """The experts of a model, each handed out once before any is a second time: what was just read comes too fast."""

    def __init__(self, layout: Layout, deadline_s: float, files: ModelFiles | None = None) -> None:
        like = layout.layers[0]
        whole = like.expert_bytes <= 2 * _BATCH_BYTES  # of larger ones a slice will do, to keep the memory small
        layers = tuple(replace(layer, n_used=1, slices=layer.slices if whole else layer.slices[:1])
                       for layer in layout.layers if layer.shape == like.shape)
        self._layout = replace(layout, layers=layers, shapes=(layers[0].shape,))
        self._n_experts = min(max(1, _BATCH_BYTES // layers[0].expert_bytes), _MOST_EXPERTS, layers[0].n_experts - 1)
        if self._n_experts < 1:
            raise PagerError("the model has too few experts to measure with")
        self._deadline_s, self._longest_s = deadline_s, 0.0
        batches = [(layer, experts) for layer in range(len(layers)) for experts in self._groups(layers[layer])]
        random.shuffle(batches)
        self._batches = cycle(batches)
        self._files = files.lend() if files else ModelFiles()
        for path in layout.paths if files is None else ():
            self._files.open(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def kinds(self) -> list[Io]:
        """Return what can be measured here; buffered reads only where the page cache can be asked to forget."""
        kinds: list[Io] = ["direct"] if Pager(self._layout, Options(), files=self._files.lend()).is_direct else []
        return [*kinds, "buffered"] if hasattr(os, "posix_fadvise") else kinds

    def reads_in_background(self) -> bool:
        """Return whether direct reads go to the system's queue here."""
        with self._opened(ladder("direct")[0]) as pager:
            return pager.native().reads_in_background()

    def _groups(self, layer: Layer) -> Iterator[Sequence[int]]:
        experts = random.sample(range(layer.n_experts), layer.n_experts)
        for at in range(0, layer.n_experts - self._n_experts + 1, self._n_experts):
            yield experts[at : at + self._n_experts]

    def rates(self, ways: Sequence[Way], n_rounds: int = _ROUNDS,
              seconds: float = _SLICE_SECONDS) -> dict[Way, float]:
        """Return the bytes per second of each, the best of all rounds; without those that there was no time for."""
        best: dict[Way, float] = {}
        for i in range(n_rounds):
            for way in ways if i % 2 == 0 else reversed(ways):  # what falls off with time is even then
                begun = time.monotonic()
                if begun + max(self._longest_s, seconds) > self._deadline_s:
                    return best
                rate = self._rate(way, seconds)
                if rate is not None:
                    best[way] = max(best.get(way, 0.0), rate)
                self._longest_s = max(self._longest_s, time.monotonic() - begun)
        return best

    def clearly_better(self, usual: tuple[Way, float], other: Way) -> tuple[Way, float]:
        """Return the other way only if it is still faster when both are measured for longer; without time it is not."""
        if other == usual[0]:
            return usual
        again = self.rates([usual[0], other], n_rounds=1, seconds=_LONG_SECONDS)
        if other in again and again[other] >= _CLEARLY * again.get(usual[0], 0.0):
            return other, again[other]
        return usual[0], again.get(usual[0], usual[1])

    def _rate(self, way: Way, least_s: float) -> float | None:
        with self._opened(way) as pager:
            pager.wait_present()
            self._read_batch(pager, way)  # the first wakes threads and opens what is opened late
            n_bytes, seconds = 0, 0.0
            until = time.monotonic() + least_s
            while not seconds or time.monotonic() < until:
                took_s = self._read_batch(pager, way)
                if took_s is None:
                    return None
                n_bytes += self._n_experts * self._layout.layers[0].expert_bytes
                seconds += took_s
            return n_bytes / seconds

    @contextmanager
    def _opened(self, way: Way) -> Iterator[Pager]:
        pager = Pager(self._layout, Options(io=way.io, n_readers=way.n_readers, piece_bytes=way.piece_bytes,
                                            read_ahead=False, profile=False), files=self._files.lend())
        pager.open([self._n_experts + 1])  # one is to stay free for computing
        try:
            yield pager
        finally:
            pager.close()

    def _read_batch(self, pager: Pager, way: Way) -> float | None:
        """Return the seconds that the next batch takes; None if the page cache has, and keeps, all that was tried."""
        tries = 16 if way.io == "buffered" else 1
        for _ in range(tries):
            layer, experts = next(self._batches)
            ranges = [Range(piece.file, piece.offset_bytes + expert * piece.slice_bytes, piece.slice_bytes)
                      for piece in self._layout.layers[layer].slices for expert in experts]
            if way.io == "buffered":
                self._forget(ranges)
                if any(_is_cached(self._files[piece.file].fd, piece) for piece in ranges):
                    continue  # another process has it mapped
            begun = time.perf_counter()
            pager.pin({layer: experts})
            took_s = time.perf_counter() - begun
            pager.unpin_all()
            if way.io == "buffered":
                self._forget(ranges)
            return took_s
        return None

    def _forget(self, ranges: Sequence[Range]) -> None:
        """Drop whole pages; those at the ends of a range belong to its neighbours, too, whom nobody needs either."""
        page = mmap.PAGESIZE
        for piece in ranges:
            first = piece.offset_bytes // page * page
            end = -(-(piece.offset_bytes + piece.n_bytes) // page) * page
            self._files[piece.file].forget_cached(first, end - first)


def _is_cached(file: int, piece: Range) -> bool:
    """Return whether more than the ends of a range are in the page cache; False where the kernel does not tell this user."""
    status = os.fstat(file)
    if status.st_uid != os.geteuid() and os.geteuid() != 0:
        return False  # everything is called cached then
    first = -(-piece.offset_bytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
    n_bytes = (piece.offset_bytes + piece.n_bytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
    if n_bytes <= 0:
        return False
    return bool(page_cache_bytes(file, first, n_bytes))
