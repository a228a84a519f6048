"""The Python face of the C core: a model's slots, and what they have counted."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gguf_pager import _native, profile
from gguf_pager.errors import BudgetError, EngineError, PagerError, PagerIOError, printable
from gguf_pager.files import ModelFiles
from gguf_pager.memory import budget
from gguf_pager.model.layout import Layout

log = logging.getLogger("gguf_pager")

IoMode = Literal["auto", "direct", "buffered"]

DEFAULT_READERS, DEFAULT_PIECE_BYTES = 4, 512 << 10
"""What decoded fastest where it was measured, on a disk of 3 to 4 GB/s (benchmarks/LOG.md, 2026-11-24)."""
_SHRINK_S = 2.0
"""How long slots may be in use, by a token or a read in the background, before a context that needs their memory is refused."""

_SIGHTS = ("on", "off", "no layer before it", "too few tokens yet", "a router of another kind", "too little came true", "no faster")
"""By number, gp_sight in native/gguf_pager.h."""

_LOOK_AHEAD = {False: 0, "auto": 1, True: 2}
"""gp_look_ahead in native/gguf_pager.h."""

MAX_MIRRORS = 7
"""GP_MAX_COPIES - 1 in native/gguf_pager.h."""


@dataclass(frozen=True, slots=True)
class Options:
    """How to page; the defaults are good.

    Attributes:
        policy: who leaves when a slot is needed: "lfru" (uses per age) or "lru".
        io: "direct" reads past the page cache, "buffered" through it; "auto" takes direct where the file system can,
            unless buffered was measured to be clearly faster on this device.
        n_readers: how many reads of `piece_bytes` are in flight at a time. More bring more bandwidth, fewer bring what is
            needed first sooner, so that computing with it can begin. Where Linux reads directly in the background
            (io_submit), one thread serves them all; elsewhere each has its own.
        piece_bytes: the largest single read; smaller pieces keep the device busy when few experts are missing. Neither
            this nor `n_readers`, None: as measured for the device that holds the model. The first model of 1 GiB of
            experts or more that is opened there with these defaults takes 1 to 2.4 s more for it (device.py); what
            was found is kept in $GGUF_PAGER_CACHE, or where the system keeps caches. Until then, and where only one of
            the two is given, the other is 4 or 512 KiB. `Pager.options` tells what is used.
        read_ahead: while a batch computes one layer, read what the next will probably want.
        look_ahead: while a token passes one layer, ask the next layer's router what it will probably choose, and begin to read
            it; the model's own router decides as ever, so results are the same. "auto" measures whether that is faster, and leaves
            it where it is not: of layers where too little comes true, or altogether. Also for a few sequences at once.
        lock_dense: the weights that every token needs are read into ordinary memory. "auto" locks it in RAM where that is
            allowed, "lock" fails where it is not, "copy" and "off" do not lock.
        mirror: further copies of the model, byte for byte, on other disks; of a split model the first files, the others
            beside them. All copies are read at the same time, each with `n_readers` reads in flight, a fast disk more than
            a slow one; each directly where its file system can. Opening compares headers, sizes and samples of the data
            (`gguf_pager.model.mirror`), not every byte. A mirror that cannot be read, or changes, makes decoding fail as
            the model itself does.
        overcommit: take the budget's word even where the machine, or its cgroup, seems to have less. Without it such a budget
            is refused when a model is opened; with it the kernel may end the process.
        profile: keep, from one process to the next, how often each expert of this model was chosen (in the cache folder,
            numbers and nothing else), and read the most used ones while nobody waits for reads. It is written every
            minute, ten seconds after the last token, and when the model is closed.
        adapt_threads: compute single tokens with fewer threads than the context has while other programs take the
            processors and that is faster; not with flash attention, where results depend on the number of threads.
    """

    policy: str = "lfru"
    io: IoMode = "auto"
    n_readers: int | None = None
    piece_bytes: int | None = None
    read_ahead: bool = True
    look_ahead: Literal["auto"] | bool = "auto"
    lock_dense: Literal["auto", "lock", "copy", "off"] = "auto"
    mirror: Sequence[str | Path] = ()
    profile: bool = True
    adapt_threads: bool = True
    overcommit: bool = False

    def __post_init__(self) -> None:
        if not _native.policy_exists(self.policy):
            raise PagerError(f"policy {self.policy!r} does not exist: choose 'lfru' or 'lru'.")
        if self.io not in ("auto", "direct", "buffered"):
            raise PagerError(f"io {self.io!r} does not exist: choose 'auto', 'direct' or 'buffered'.")
        if self.lock_dense not in ("auto", "lock", "copy", "off"):
            raise PagerError(f"lock_dense {self.lock_dense!r} does not exist: choose 'auto', 'lock', 'copy' or 'off'.")
        if self.look_ahead != "auto" and not isinstance(self.look_ahead, bool):
            raise PagerError(f"look_ahead {self.look_ahead!r} does not exist: choose 'auto', True or False.")
        for name in ("read_ahead", "profile", "adapt_threads", "overcommit"):
            if not isinstance(getattr(self, name), bool):
                raise PagerError(f"{name} must be True or False, not {getattr(self, name)!r}.")
        if self.n_readers is not None and not (type(self.n_readers) is int and 1 <= self.n_readers <= 256):
            raise PagerError(f"n_readers must lie between 1 and 256, not {self.n_readers!r}.")
        if self.piece_bytes is not None and not (
                type(self.piece_bytes) is int and 4096 <= self.piece_bytes <= 1 << 30 and self.piece_bytes % 4096 == 0):
            raise PagerError(f"piece_bytes must be a multiple of 4096, at most 1 GiB, not {self.piece_bytes!r}.")
        object.__setattr__(self, "mirror", _mirror_paths(self.mirror))


def _mirror_paths(given: object) -> tuple[Path, ...]:
    several = (given,) if isinstance(given, str | os.PathLike) else given
    if not isinstance(several, Sequence) or not all(isinstance(path, str | os.PathLike) for path in several):
        raise PagerError(f"mirror must be a list of paths, not {given!r}.")
    if len(several) > MAX_MIRRORS:
        raise PagerError(f"mirror may hold {MAX_MIRRORS} paths at most, not {len(several)}.")
    return tuple(Path(path) for path in several)


@dataclass(frozen=True, slots=True)
class LayerStats:
    """What one layer has counted. A hit or miss is one distinct expert of one batch.

    `look_ahead` says whether its experts are foretold now: "on", or why not.
    """

    block: int
    hits: int
    misses: int
    bytes_read: int
    bytes_wasted: int
    stall_ns: int
    stall_bytes: int
    evictions: int
    left_alone: int
    visits: int
    tokens: int
    foreseen: int
    in_vain: int
    look_ahead: str
    resident_experts: int
    resident_bytes: int


@dataclass(frozen=True, slots=True)
class Stats:
    """What a pager has counted since it was opened.

    `bytes_wasted` are those of `bytes_read` that were read ahead and given up before anybody wanted them, `stall_ns` is the time that
    decoding waited for reads, `stall_bytes` what arrived meanwhile, of whole sectors;
    `foreseen` are those of the misses that had begun to be read before their layer's router chose them, `in_vain` the experts that were read
    so and not chosen; `look_ahead` says in how many layers experts are foretold now, and why not in the others.
    `left_alone` the graph nodes that llama.cpp computed from its own mapping because they could not be served: right, but
    slow. `copies` are the bytes read from the model's own files and from each mirror, of experts; `rows_read` and
    `row_bytes_read` the rows of embedding tables, which come through the page cache. `n_threads` computed the last single
    token; None where their number is not adapted, and before the first one. `n_ubatch` is the batch that the newest context
    computes at once, `n_ubatch_asked` what it was asked for: more, where llama.cpp needs a multiple of n_seq_max; both None before
    there is one. `hit_rate` is None before the first token.
    """

    hits: int
    misses: int
    bytes_read: int
    bytes_wasted: int
    stall_ns: int
    stall_bytes: int
    evictions: int
    left_alone: int
    resident_bytes: int
    arena_bytes: int
    layers: tuple[LayerStats, ...]
    copies: tuple[int, ...] = ()
    n_threads: int | None = None
    rows_read: int = 0
    row_bytes_read: int = 0
    n_ubatch: int | None = None
    n_ubatch_asked: int | None = None
    foreseen: int = 0
    in_vain: int = 0

    @property
    def hit_rate(self) -> float | None:
        """Hits over all experts wanted."""
        wanted = self.hits + self.misses
        return self.hits / wanted if wanted else None

    @property
    def look_ahead(self) -> str:
        """In how many layers experts are foretold: "29 of 30 layers; 1: no layer before it"."""
        said = Counter(layer.look_ahead for layer in self.layers)
        whole = f"{said.pop('on', 0)} of {len(self.layers)} layers"
        return "; ".join([whole, *(f"{n}: {why}" for why, n in said.most_common())])

    @property
    def tokens(self) -> int:
        """Tokens that passed the first layer."""
        return max((layer.tokens for layer in self.layers), default=0)

    def __repr__(self) -> str:
        """Say the most important of it; `layers` and the other fields tell the rest."""
        hits = "no token yet" if self.hit_rate is None else f"{self.tokens:,} tokens, {self.hit_rate:.1%} hits"
        vain = f" ({self.bytes_wasted / 1e9:.2f} in vain)" if self.bytes_wasted else ""
        return (f"<Stats: {hits}, {self.bytes_read / 1e9:.2f} GB read{vain}, {self.stall_ns / 1e9:.1f} s waited for reads, "
                f"{budget.format_bytes(self.resident_bytes)} of experts in {budget.format_bytes(self.arena_bytes)}>")


def _alignment(paths: Sequence[Path], names: Sequence[str], io: IoMode) -> tuple[bool, int, int]:
    """Return whether reads of a copy can be direct, and the alignments in the file and in memory that serve all its files."""
    if io == "buffered":
        return False, 1, 1
    offset_align = memory_align = 1
    for path, name in zip(paths, names, strict=True):
        try:
            at, memory = _native.file_alignment(name)
        except OSError as error:
            if io == "direct":
                raise PagerIOError(
                    f"{path} cannot be read directly: {error.strerror}. Use io='buffered'.",
                    errno=error.errno or 0, path=str(path), offset_bytes=0,
                ) from None
            log.info("%s is read through the page cache, because it cannot be read directly: %s", path, error.strerror)
            return False, 1, 1  # where that fails, too, it says why
        offset_align, memory_align = max(offset_align, at), max(memory_align, memory)
    return True, offset_align, memory_align


class Pager:
    """The slots of one model. Made by `Llama` and `install`; read its `stats()`.

    `n_slots` and `align` are per shape class and for the file systems at hand. `paths` are all files of all copies.
    """

    def __init__(self, layout: Layout, options: Options, mirrors: Sequence[ModelFiles] = (),
                 files: ModelFiles | None = None) -> None:
        """`files` are the model's, `mirrors` those of further copies, which the caller has compared with the model. They stay
        open until `close`. Without `files` the model is opened by its names."""
        self.layout = layout
        self.options = options
        self._files = (*([files] if files else []), *mirrors)
        copies = [layout.paths, *([file.path for file in mirror] for mirror in mirrors)]
        self._names = [[str(path) for path in layout.paths] if files is None else [file.reopen_path for file in files],
                       *([file.reopen_path for file in mirror] for mirror in mirrors)]
        self.paths = tuple(path for copy in copies for path in copy)
        self.find_change: Callable[[], tuple[int, int, int] | None] = lambda: None
        self.compare_read: Callable[[int, int, int, int], int] | None = None
        """What tells a touched file from a changed one, as `_native.Pager.compare_with` takes it."""
        ways = [_alignment(copy, names, options.io) for copy, names in zip(copies, self._names, strict=True)]
        self._are_direct = [is_direct for is_direct, _, _ in ways]
        # One slot serves all copies; those that are not read directly need nothing of it.
        self._offset_align, self._memory_align = max(way[1] for way in ways), max(way[2] for way in ways)
        self.needs = budget.class_needs(layout, self.align)
        self.n_slots: tuple[int, ...] = ()
        self._native: _native.Pager | None = None
        self._last_stats: Stats | None = None
        self.n_threads: int | None = None
        """The threads that have computed the last single token, where they are adapted."""
        self._n_ubatch: int | None = None
        self._n_ubatch_asked: int | None = None
        """The largest batch that any of its contexts computes at once."""
        self._pid = os.getpid()
        self._in_use = _native.Mutex()
        """Held by what takes long without Python's lock, so that closing waits for it."""
        self._is_warmed = False
        self._keeper: profile.Keeper | None = None

    def __repr__(self) -> str:
        full = budget.full_arena_bytes(self.needs)
        if not self.is_open:
            return f"<Pager: {'closed' if self._last_stats is not None else 'not open yet'}>"
        return f"<Pager: {budget.format_bytes(self.arena_bytes)} for experts, {min(1.0, self.arena_bytes / full):.0%} of them>"

    @property
    def is_direct(self) -> bool:
        """Whether the model's own files are read past the page cache."""
        return self._are_direct[0]

    @property
    def align(self) -> int:
        """The alignment, in bytes, that reads and slots keep."""
        return max(self._offset_align, self._memory_align)

    @property
    def arena_bytes(self) -> int:
        """The size of the arena; 0 before it is opened."""
        return sum(n * need.stride_bytes for n, need in zip(self.n_slots, self.needs, strict=True)) if self.n_slots else 0

    @property
    def is_open(self) -> bool:
        """Whether the slots exist."""
        return self._native is not None

    def is_usable(self) -> bool:
        """Return whether this process may share it: it was not closed, and not opened before a fork."""
        return self._last_stats is None and os.getpid() == self._pid

    def open(self, n_slots: Sequence[int]) -> None:
        """Allocate the arena, with this many slots per shape class.

        Raises:
            PagerIOError: a file cannot be opened.
            BudgetError: the system does not give that much memory.
            EngineError: it gives no further thread, or no further descriptor.
        """
        layers = []
        for layer in self.layout.layers:
            rooms = budget.slice_rooms(layer, self.align)
            slices = [
                (piece.name, piece.type, piece.ne, piece.file, piece.offset_bytes, piece.slice_bytes,
                 room.data_at, room.region_at, room.region_bytes)
                for piece, room in zip(layer.slices, rooms, strict=True)
            ]
            layers.append((layer.n_experts, layer.n_used, self.layout.class_of(layer), slices))
        tables = [(table.name, table.type, table.ne, table.file, table.offset_bytes, table.row_bytes)
                  for table in self.layout.tables]
        classes = [(need.stride_bytes, n) for need, n in zip(self.needs, n_slots, strict=True)]
        try:
            self._native = _native.Pager(
                paths=self._names[0],
                mirrors=list(zip(self._names[1:], self._are_direct[1:], strict=True)),
                layers=layers,
                classes=classes,
                tables=tables,
                policy=self.options.policy,
                direct=self.is_direct,
                read_ahead=self.options.read_ahead,
                look_ahead=_LOOK_AHEAD[self.options.look_ahead],
                offset_align=self._offset_align,
                memory_align=self._memory_align,
                n_readers=self.options.n_readers or DEFAULT_READERS,
                piece_bytes=self.options.piece_bytes or DEFAULT_PIECE_BYTES,
            )
        except (_native.OpenError, MemoryError) as error:
            raise self._open_error(error, sum(stride * n for stride, n in classes)) from None
        if self.compare_read is not None:
            self._native.compare_with(self.compare_read)
        self._check_names()
        self.n_slots = tuple(n_slots)
        log.info("%s is paged: %s of %s experts in %s", printable(self.layout.paths[0].name), f"{sum(n_slots):,}",
                 f"{sum(need.n_all for need in self.needs):,}", budget.format_bytes(self.arena_bytes))
        if self.options.profile:
            with contextlib.suppress(OSError):  # a file is gone that has just been opened: it would have no name
                self._keeper = profile.Keeper(self.layout, self._count_choices)

    def note_batches(self, n_ubatch_asked: int, n_ubatch: int) -> None:
        """Remember what a context was asked for, and what it has got."""
        self._n_ubatch_asked, self._n_ubatch = n_ubatch_asked, n_ubatch

    def shrink(self, n_slots: Sequence[int]) -> None:
        """Keep this many slots per shape class and give back the memory of the others; the arena must be present.

        Raises:
            BudgetError: those that would go are in use, or pinned.
        """
        with self._at_work() as native:
            for shape_class, (n_now, n_then) in enumerate(zip(self.n_slots, n_slots, strict=True)):
                if n_then == n_now:
                    continue
                self._shrink_class(native, shape_class, n_then)
                self.n_slots = (*self.n_slots[:shape_class], n_then, *self.n_slots[shape_class + 1 :])

    def _open_error(self, error: _native.OpenError | MemoryError, arena_bytes: int) -> PagerError:
        """Return the exception for what the system did not give."""
        if isinstance(error, MemoryError) or error.lack == "memory":
            return BudgetError(f"The system does not give {arena_bytes:,} bytes for experts: lower the budget. Or raise the "
                               "limit on memory (ulimit -v) if there is one.")
        if error.lack == "thread":
            return EngineError(f"A thread that reads cannot be started: {error.strerror}. Raise the limit on processes "
                               "(ulimit -u, or pids.max of the cgroup) or on memory (ulimit -v), or lower n_readers.")
        if error.lack == "sense":
            return EngineError(f"{self.layout.paths[0]} cannot be paged with these options: {error.strerror}. "
                               "Leave n_readers, piece_bytes and io as they are by default.")
        path = str(self.paths[error.file])
        if error.errno in (errno.EMFILE, errno.ENFILE):
            return EngineError(f"{path} cannot be opened: {error.strerror}. Raise the limit on open files (ulimit -n), or "
                               "close some.")
        return PagerIOError(f"{path} cannot be opened: {error.strerror}.", errno=error.errno or 0, path=path, offset_bytes=0)

    def _check_names(self) -> None:
        """Refuse what was opened by a name that means another file by now: only where open files have no name."""
        for index, file in enumerate(file for copy in self._files for file in copy):
            if file.is_known_by_name and not file.is_still_named():
                native, self._native = self.native(), None
                native.close()
                raise self.failure_error((errno.ESTALE, index, 0))

    def accept(self, times: Sequence[tuple[int, int]]) -> None:
        """Go on with files whose times are others and whose bytes are not; (modified, changed) of each, in ns.

        Raises:
            OSError: they have changed again.
        """
        if self._native is not None:
            self._native.accept(times)

    def _shrink_class(self, native: _native.Pager, shape_class: int, n_slots: int) -> None:
        until = time.monotonic() + _SHRINK_S
        while True:
            try:
                native.shrink(shape_class, n_slots)
                return
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                if time.monotonic() > until:
                    raise BudgetError("Another context of this model is computing with the slots whose memory this one needs, or "
                                      "they are pinned: try again later, or unpin them.") from None
            time.sleep(0.005)

    def wait_present(self) -> None:
        """Wait until all of the arena is resident; a thread sees to it since `open`."""
        if os.getpid() == self._pid:
            self._in_use.call(self._wait_present)

    def _wait_present(self) -> None:
        with contextlib.suppress(EngineError), self._at_work() as native:
            native.wait_present()

    def warm_up(self) -> None:
        """Begin to read, in the background, what the model's profile says is used most; once, and without a profile not."""
        if self._is_warmed or not self.options.profile:
            return
        self._is_warmed = True
        known = profile.read(self.layout)
        if known is not None:
            with contextlib.suppress(OSError):  # no memory for a list: the model works as well without
                self.native().warm_up(profile.most_used(self.layout, known, self.n_slots))

    def note_use(self) -> None:
        """Take note that tokens were computed just now: what they chose will be added to the model's profile."""
        if self._keeper is not None:
            self._keeper.note_use()

    def keep_profile(self) -> None:
        """Add to the model's profile what was chosen since it was last added; the last time, when the program ends."""
        if self._keeper is not None and self._native is not None:
            with contextlib.suppress(EngineError):  # another thread has closed it meanwhile, and kept it
                self._keeper.close()

    def _count_choices(self) -> list[list[int]]:
        return [self.times_chosen(i) for i in range(len(self.layout.layers))]

    def native(self) -> _native.Pager:
        """Return the C side, for hooks.py.

        Raises:
            EngineError: the pager is not open.
        """
        native = self._native
        if native is None:
            raise EngineError("The pager is closed: open the model again.")
        return native

    @contextlib.contextmanager
    def _at_work(self) -> Iterator[_native.Pager]:
        """Yield the C side; that another thread has closed it is said as in `native`."""
        native = self.native()
        try:
            yield native
        except ValueError:
            self.native()
            raise

    def stats(self) -> Stats:
        """Return the counters, in total and per layer; after close the last ones."""
        native = self._native  # another thread may close it meanwhile
        if native is None:
            return self._last_stats or Stats(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, ())
        try:
            return self._count(native)
        except ValueError:  # it was closed
            return self._last_stats or Stats(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, ())

    def _count(self, native: _native.Pager) -> Stats:
        layers = tuple(
            LayerStats(layer.block, *row[:-2], look_ahead=_SIGHTS[row[-2]], resident_experts=row[-1],
                       resident_bytes=row[-1] * layer.expert_bytes)
            for layer, row in zip(self.layout.layers, native.counters(), strict=True)
        )
        rows_read, row_bytes_read, rows_left_alone = native.rows()
        return Stats(
            hits=sum(layer.hits for layer in layers),
            misses=sum(layer.misses for layer in layers),
            bytes_read=sum(layer.bytes_read for layer in layers),
            bytes_wasted=sum(layer.bytes_wasted for layer in layers),
            stall_ns=sum(layer.stall_ns for layer in layers),
            stall_bytes=sum(layer.stall_bytes for layer in layers),
            evictions=sum(layer.evictions for layer in layers),
            left_alone=sum(layer.left_alone for layer in layers) + rows_left_alone,
            resident_bytes=sum(layer.resident_bytes for layer in layers),
            arena_bytes=self.arena_bytes,
            layers=layers,
            copies=tuple(native.copies()),
            n_threads=self.n_threads,
            rows_read=rows_read,
            row_bytes_read=row_bytes_read,
            n_ubatch=self._n_ubatch,
            n_ubatch_asked=self._n_ubatch_asked,
            foreseen=sum(layer.foreseen for layer in layers),
            in_vain=sum(layer.in_vain for layer in layers),
        )

    def stall_ns(self) -> int:
        """Return for how long decoding has waited for reads; cheap enough to be asked for each token."""
        with self._at_work() as native:
            return sum(row[4] for row in native.counters())

    def resident_experts(self, layer: int) -> list[int]:
        """Return the experts of a layer (an index into `layout.layers`) that are in slots now."""
        with self._at_work() as native:
            return [expert for expert, state in enumerate(native.resident(layer)) if state]

    def times_chosen(self, layer: int) -> list[int]:
        """Return how many tokens have chosen each expert of a layer (an index into `layout.layers`) since the start."""
        with self._at_work() as native:
            return native.chosen(layer)

    def pin(self, experts: Mapping[int, Sequence[int]]) -> None:
        """Read experts and keep them until `unpin_all`: {layer index: experts}.

        Raises:
            BudgetError: too few slots would be left to compute with.
            PagerIOError: a read failed, or a file was changed.
        """
        try:
            change = self.find_change()
        except OSError:
            self.native()  # says so where it was closed, and its files with it
            raise
        if change is not None:
            raise self.failure_error(change)
        for layer, chosen in experts.items():
            try:
                failure = self._in_use.call(self._pin, layer, list(chosen))
            except OSError as error:
                if error.errno == errno.ENOSPC:
                    raise BudgetError(
                        f"Pinning {len(chosen)} experts of layer {layer} leaves too few slots to compute with: "
                        "pin fewer or raise the budget."
                    ) from None
                if error.errno == errno.EINVAL:
                    raise PagerError(f"There is no such expert in layer {layer}: {list(chosen)}.") from None
                if error.errno == errno.ECHILD:
                    raise self.failure_error((errno.ECHILD, 0, 0)) from None
                raise PagerError(f"Experts of layer {layer} cannot be pinned now: {error.strerror}. Try again when no "
                                 "context is computing.") from None
            if failure is not None:
                raise self.failure_error(failure)

    def _pin(self, layer: int, experts: list[int]) -> tuple[int, int, int] | None:
        with self._at_work() as native:
            return native.pin(layer, experts)

    def unpin_all(self) -> None:
        """Let the policy decide about all experts again."""
        with self._at_work() as native:
            native.unpin_all()

    def failure_error(self, failure: tuple[int, int, int]) -> PagerError:
        """Return the exception for what the C side reports as (errno, file, offset)."""
        number, file, offset_bytes = failure
        if number == errno.ECHILD:
            return EngineError("This model was opened before a fork and cannot be used in the child: open it again there.")
        if number == errno.ENOTRECOVERABLE:
            return EngineError("llama.cpp reused a graph that gguf_pager no longer knows: make a new context.")
        path = str(self.paths[file])
        if number == errno.ENODATA:
            what, then = "the file ends there; it was truncated while in use", " Open it again."
        elif number == errno.ESTALE:
            what, then = "the file was changed while in use", " Open it again."
        else:
            what, then = os.strerror(number), ""
        return PagerIOError(
            f"Reading {path} at byte {offset_bytes:,} failed: {what}. The tokens computed from it were thrown away.{then}",
            errno=number, path=path, offset_bytes=offset_bytes,
        )

    def close(self) -> None:
        """Free the arena, end the readers and close the files; twice is fine. Contexts must be freed before.

        Raises:
            EngineError: one is not; everything is left as it was.
        """
        native = self._native
        if native is not None and os.getpid() != self._pid:  # the parent's lock and threads mean nothing here
            self._native = None
            native.close()
        elif native is not None:
            self._last_stats = self.stats()
            self.keep_profile()
            self._native = None  # nobody begins anything with it any more
            try:
                self._in_use.call(native.close)
            except ValueError:  # it has refused, and goes on
                self._native = native
                raise EngineError("This pager is in use by a context: close the Llama, or free its contexts, before.") from None
        for copy in self._files:
            copy.close()
