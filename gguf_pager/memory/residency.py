"""The dense weights: needed by every token, so kept in RAM; and the experts' mapped pages, which are not wanted there.

A page of a file's mapping is lost when the file is truncated, shows what is written over the file, and ends the process when
the disk fails, locked or not. So the dense weights are read into memory of our own, which then takes the mapping's place.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gguf_pager import _native, kernel
from gguf_pager.errors import BudgetError, EngineError
from gguf_pager.files import ModelFiles, OpenedFile, read_error
from gguf_pager.model.layout import Layout, Range

Job = Callable[[], None]

_READERS, _PIECE_BYTES = 4, 4 << 20
"""Reads in flight, and how large each is. 418 MB of dense weights took 0.38 to 0.54 s so, and 0.35 to 0.67 s with 8 pieces of
1 MiB, on a disk of 3 GB/s and a busy machine (benchmarks/LOG.md, 2026-11-28)."""

_MREMAP_MAYMOVE, _MREMAP_FIXED = 1, 2
_MADV_DONTNEED = 4


@dataclass(frozen=True, slots=True)
class Mapping:
    """A part of a model file as llama.cpp has mapped it."""

    address: int
    offset_bytes: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Copy:
    """A part of a file whose bytes are in memory of ours, at the address where llama.cpp had mapped it."""

    file: int
    offset_bytes: int
    address: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Residency:
    """What was done to keep the dense weights in RAM.

    `method` is "lock" (copied and locked), "copy" (copied), "left" (not done, because the budget is too small anyway) or
    "unknown" (where llama.cpp has mapped them is not known here).
    """

    method: str
    n_bytes: int
    copies: tuple[Copy, ...] = ()


LEFT = Residency("left", 0)


# ---- where they are -------------------------------------------------------------------------------------------------

def find_mappings(file: OpenedFile) -> list[Mapping]:
    """Return where this process has mapped a file, from /proc/self/maps; empty where there is none (macOS).

    For a libllama whose calls are not seen (`_native.lazy_load_end`). The kernel names a mapping's file by a device number
    that is not stat's on btrfs and overlayfs; then its name decides. Names are bytes.
    """
    if sys.platform != "linux":
        return []
    name = file.shown_path.replace(b"\n", b"\\012")
    found = []
    for line in kernel.read_bytes(Path("/proc/self/maps")).split(b"\n"):
        fields = line.split(None, 5)
        if len(fields) < 6 or not fields[1].startswith(b"r--s"):
            continue
        major, minor = (int(part, 16) for part in fields[3].split(b":"))
        is_same = (int(fields[4]), os.makedev(major, minor)) == (file.identity.inode, file.identity.device)
        if is_same or fields[5] == name:
            start, end = (int(part, 16) for part in fields[0].split(b"-"))
            found.append(Mapping(start, int(fields[2], 16), end - start))
    return found


def sort_mappings(files: ModelFiles, seen: Sequence[tuple[int, int, int, int, int]]) -> list[list[Mapping]]:
    """Return the mappings of each file, of those that libllama was seen to make (`_native.lazy_load_end`)."""
    return [
        [Mapping(address, offset_bytes, n_bytes) for address, n_bytes, device, inode, offset_bytes in seen
         if (device, inode) == (file.identity.device, file.identity.inode)]
        for file in files
    ]


def without(mappings: list[Mapping], known: list[Mapping]) -> list[Mapping]:
    """Leave out what lies in a known mapping: that is another model's to keep."""
    return [
        mapping for mapping in mappings
        if not any(old.address <= mapping.address < old.address + old.n_bytes for old in known)
    ]


def _pages(mappings: list[Mapping], piece: Range, *, inner: bool) -> list[tuple[int, int, int]]:
    """Return (address, file offset, bytes) of the whole pages around a range, or within it, where they are mapped."""
    page = mmap.PAGESIZE
    first, end = piece.offset_bytes, piece.offset_bytes + piece.n_bytes
    if inner:
        first, end = -(-first // page) * page, end // page * page
    else:
        first, end = first // page * page, -(-end // page) * page
    found = []
    for mapping in mappings:
        stop = mapping.offset_bytes + -(-mapping.n_bytes // page) * page
        begin, stop = max(first, mapping.offset_bytes), min(end, stop)
        if begin < stop:
            found.append((mapping.address + begin - mapping.offset_bytes, begin, stop - begin))
    return found


def _ranges(mappings: list[Mapping], pieces: Sequence[Range]) -> list[tuple[int, int, int]]:
    """Return the pages around all of these, those that touch joined."""
    joined: list[tuple[int, int, int]] = []
    for address, offset_bytes, n_bytes in sorted(place for piece in pieces for place in _pages(mappings, piece, inner=False)):
        if joined and address <= joined[-1][0] + joined[-1][2]:
            first, at, _ = joined[-1]
            joined[-1] = (first, at, max(joined[-1][2], address + n_bytes - first))
        else:
            joined.append((address, offset_bytes, n_bytes))
    return joined


# ---- reading in several threads -------------------------------------------------------------------------------------

class _Crew:
    """Threads that do jobs. Whoever waits for them can be interrupted: a read that hangs in the kernel ends on its own."""

    def __init__(self, jobs: Sequence[Job], release: Callable[[], None]) -> None:
        """`release` is called by the last who leaves, if not all was done: until then jobs use what they were given."""
        self._jobs = iter(jobs)
        self._release = release
        self._lock = threading.Lock()
        self._n_left = 1 + _READERS  # and the one who waits
        self._is_stopped = False
        self._error: BaseException | None = None
        self._changed = threading.Event()

    def run(self) -> None:
        """Do all jobs; raise what the first that failed has raised."""
        threads: list[threading.Thread] = []
        try:
            for _ in range(_READERS):
                thread = threading.Thread(target=self._work, name="gguf_pager-dense", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # no more threads are allowed
                    self._work()
                else:
                    threads.append(thread)
            for thread in threads:
                while thread.is_alive():
                    thread.join(1.0)
        except BaseException as error:  # noqa: BLE001  raised where it is waited for
            self._stop(error)
        self._leave()
        if self._error is not None:
            raise self._error

    def _next(self) -> Job | None:
        with self._lock:
            return None if self._is_stopped else next(self._jobs, None)

    def _stop(self, error: BaseException) -> None:
        with self._lock:
            self._error = self._error or error
            self._is_stopped = True

    def _work(self) -> None:
        try:
            while (job := self._next()) is not None:
                job()
        except BaseException as error:  # noqa: BLE001  raised where it is waited for
            self._stop(error)
        finally:
            self._leave()

    def _leave(self) -> None:
        with self._lock:
            self._n_left -= 1
            is_last = self._n_left == 0
        if is_last and self._is_stopped:
            self._release()


# ---- copying --------------------------------------------------------------------------------------------------------

@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    libc.mmap.restype = libc.mremap.restype = pointer
    libc.mmap.argtypes = [pointer, size, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.mremap.argtypes = [pointer, size, size, ctypes.c_int, pointer]
    libc.munmap.argtypes = libc.munlock.argtypes = [pointer, size]
    libc.mprotect.argtypes = libc.madvise.argtypes = [pointer, size, ctypes.c_int]
    libc.mincore.argtypes = [pointer, size, ctypes.c_char_p]
    return libc


def _new_memory(n_bytes: int) -> int:
    """Return fresh memory, of ordinary pages: finding huge ones took 0.8 to 2.7 s for 400 MB where the page cache was full of a
    model, and 0.4 to 0.5 without (benchmarks/LOG.md, 2026-11-28)."""
    address = _libc().mmap(None, n_bytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if address == ctypes.c_void_p(-1).value:
        raise BudgetError(f"The system does not give {n_bytes:,} bytes for dense weights: free some memory.")
    return int(address)


class _Source:
    """One file to read from, past the page cache where it can be: descriptors of its own, which outlive the model's."""

    def __init__(self, file: OpenedFile, is_direct: bool) -> None:
        self._path, self._size_bytes = file.path, file.identity.size_bytes
        self._buffered = os.dup(file.fd)
        self._direct = -1
        if is_direct and hasattr(os, "O_DIRECT"):
            try:
                self._direct = os.open(file.reopen_path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
            except OSError:
                self._direct = -1

    def read(self, into: int, mapped: int, offset_bytes: int, n_bytes: int) -> None:
        """Read a piece; `mapped` is where llama.cpp has it. Behind the end of the file a page is zero."""
        wanted = min(n_bytes, self._size_bytes - offset_bytes)
        buffer = memoryview((ctypes.c_char * n_bytes).from_address(into)).cast("B")
        fd = self._direct if self._direct >= 0 and not _is_cached(mapped, n_bytes) else self._buffered
        if fd == self._buffered and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, offset_bytes, n_bytes, os.POSIX_FADV_WILLNEED)
        got = 0
        while got < wanted:
            try:
                # A direct read may ask for what lies behind the end, and must ask for whole sectors.
                end = n_bytes if fd == self._direct else wanted
                more = os.preadv(fd, [buffer[got:end]], offset_bytes + got)
            except OSError as error:
                if fd == self._direct and error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
                    fd = self._buffered
                    continue
                raise read_error(self._path, error.errno or 0, offset_bytes + got) from None
            if more == 0:
                raise read_error(self._path, errno.ENODATA, offset_bytes + got)
            got += more
            if got % mmap.PAGESIZE and got < wanted:
                fd = self._buffered
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._buffered, offset_bytes, n_bytes, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        os.close(self._buffered)
        if self._direct >= 0:
            os.close(self._direct)


def _is_cached(address: int, n_bytes: int) -> bool:
    """Return whether most of a mapped range is in the page cache, or the kernel does not tell this user."""
    n_pages = -(-n_bytes // mmap.PAGESIZE)
    pages = ctypes.create_string_buffer(n_pages)
    if _libc().mincore(address, n_bytes, pages) != 0:
        return False
    return sum(byte & 1 for byte in pages.raw[:n_pages]) > n_pages // 2


def _release(sources: Sequence[_Source], memory: Sequence[tuple[int, int]]) -> None:
    for source in sources:
        source.close()
    for address, n_bytes in memory:
        _libc().munmap(address, n_bytes)


def are_in_place(copies: Sequence[Copy]) -> bool:
    """Return whether the memory that was put in the place of mapped pages is still there: it goes with the model.

    True where that cannot be told.
    """
    if sys.platform != "linux" or not copies:
        return True
    address = max(copies, key=lambda copy: copy.n_bytes).address
    for line in kernel.read_lines(Path("/proc/self/maps")):
        span, access, _, _, inode, *_ = line.split(None, 5)
        begin, end = (int(part, 16) for part in span.split("-"))
        if begin <= address < end:
            return access == "r--p" and inode == "0"
    return False


def keep_dense(layout: Layout, files: ModelFiles, mappings: list[list[Mapping]], method: str, *, is_direct: bool = True,
               others: Sequence[Job] = ()) -> Residency:
    """Put copies of a loaded model's dense weights in the place of their mapped pages, and lock them where it is allowed.

    `method` is "auto", "lock" (or else an error), "copy" or "off" (both: not locked). `others` are jobs that are done beside
    the reading.

    Raises:
        PagerIOError: the file cannot be read.
        BudgetError: they must be locked, but this process may not lock so much; or there is no memory.
        EngineError: they must be kept, but where llama.cpp has mapped them is not known.
    """
    is_known = all(mappings[file] for file in {piece.file for piece in layout.dense})
    if not is_known and method in ("lock", "copy"):
        raise EngineError(f"lock_dense={method!r} cannot be kept here: where llama.cpp has mapped the model is not known. "
                          "Say lock_dense='auto'.")
    places = [
        Copy(file, offset_bytes, address, n_bytes)
        for file in range(len(files) if is_known else 0)
        for address, offset_bytes, n_bytes in _ranges(mappings[file], [piece for piece in layout.dense if piece.file == file])
    ]
    sources: list[_Source] = []
    memory: list[tuple[int, int]] = []
    try:
        for opened in files:
            sources.append(_Source(opened, is_direct))
        for place in places:
            memory.append((_new_memory(place.n_bytes), place.n_bytes))
        is_locked = method in ("auto", "lock") and _lock(layout, memory, method)
    except BaseException:
        _release(sources, memory)
        raise
    jobs = [
        functools.partial(sources[place.file].read, fresh + at, place.address + at, place.offset_bytes + at,
                          min(_PIECE_BYTES, place.n_bytes - at))
        for place, (fresh, _) in zip(places, memory, strict=True)
        for at in range(0, place.n_bytes, _PIECE_BYTES)
    ]
    _Crew([*others, *jobs], functools.partial(_release, sources, memory)).run()
    _release(sources, ())
    _put_in_place(files, places, memory)
    if not is_known:
        return Residency("unknown", 0)
    return Residency("lock" if is_locked else "copy", sum(place.n_bytes for place in places), tuple(places))


def _lock(layout: Layout, memory: Sequence[tuple[int, int]], method: str) -> bool:
    """Lock it before anything is read into it: afterwards every page would be visited once more, 0.2 s for 400 MB."""
    for index, (address, n_bytes) in enumerate(memory):
        try:
            _native.memory_lock(address, n_bytes)
        except OSError as error:
            if method == "lock":
                raise BudgetError(
                    f"The {layout.dense_bytes:,} bytes of dense weights cannot be locked: {error.strerror}. "
                    "Raise the limit (ulimit -l), or say lock_dense='auto'."
                ) from None
            for locked in memory[:index]:
                _libc().munlock(*locked)
            return False
    return True


def try_lock(n_bytes: int) -> str | None:
    """Return why this process may not lock so much in RAM; None if it may. It takes no memory: no page comes."""
    address = _new_memory(n_bytes)
    try:
        _native.memory_lock(address, n_bytes)
    except OSError as error:
        return error.strerror
    finally:
        _libc().munmap(address, n_bytes)
    return None


def _put_in_place(files: ModelFiles, places: Sequence[Copy], memory: list[tuple[int, int]]) -> None:
    """Move each copy over the mapping of the same bytes: a step that nobody can see half done."""
    libc = _libc()
    while memory:
        fresh, n_bytes = memory[0]
        place = places[len(places) - len(memory)]
        libc.mprotect(fresh, n_bytes, mmap.PROT_READ)
        flags = _MREMAP_MAYMOVE | _MREMAP_FIXED
        if libc.mremap(fresh, n_bytes, n_bytes, flags, place.address) != place.address:
            number = ctypes.get_errno()
            _release((), memory)
            raise read_error(files[place.file].path, number, place.offset_bytes)
        del memory[0]


def release_experts(layout: Layout, files: ModelFiles) -> None:
    """Give back the pages of expert tensors that loading has brought into this process and into the page cache."""
    if sys.platform != "linux":
        return
    for file, opened in enumerate(files):
        mappings = find_mappings(opened)
        for piece in (piece for layer in layout.layers for piece in layer.slices if piece.file == file):
            n_bytes = piece.slice_bytes * piece.ne[2]
            for address, _, within_bytes in _pages(mappings, Range(file, piece.offset_bytes, n_bytes), inner=True):
                _libc().madvise(address, within_bytes, _MADV_DONTNEED)
            opened.forget_cached(piece.offset_bytes, n_bytes)
