"""The dense weights: needed by every token, so kept in RAM; and the experts' mapped pages, which are not wanted there."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gguf_pager import _native, kernel
from gguf_pager.errors import BudgetError, PagerIOError
from gguf_pager.layout import Layout, Range

_COPY_CHUNK_BYTES = 8 << 20
_MREMAP_MAYMOVE, _MREMAP_FIXED = 1, 2
_MADV_DONTNEED = 4


@dataclass(frozen=True, slots=True)
class Mapping:
    """A part of a model file as llama.cpp has mapped it."""

    address: int
    offset_bytes: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Residency:
    """What was done to keep the dense weights in RAM: `method` is "lock", "copy", "off" or "unknown"."""

    method: str
    n_bytes: int


def find_mappings(path: Path) -> list[Mapping]:
    """Return where this process has mapped a file, from /proc/self/maps; empty where there is none (macOS).

    llama.cpp unmaps the head of the file after loading, so the first mapping begins at an offset above 0.
    """
    if sys.platform != "linux":
        return []
    wanted = os.stat(path)
    found = []
    for line in kernel.read_lines(Path("/proc/self/maps")):
        fields = line.split(None, 5)
        if len(fields) < 6 or int(fields[4]) != wanted.st_ino or not fields[1].startswith("r--s"):
            continue
        major, minor = (int(part, 16) for part in fields[3].split(":"))
        if os.makedev(major, minor) != wanted.st_dev:
            continue
        start, end = (int(part, 16) for part in fields[0].split("-"))
        found.append(Mapping(start, int(fields[2], 16), end - start))
    return found


def files_mappings(layout: Layout) -> list[list[Mapping]]:
    """Return `find_mappings` of each of a model's files."""
    return [find_mappings(path) for path in layout.paths]


def _without(mappings: list[Mapping], known: list[Mapping]) -> list[Mapping]:
    """Leave out what lies in a known mapping, or in the part of one that was locked meanwhile."""
    return [
        mapping for mapping in mappings
        if not any(old.address <= mapping.address < old.address + old.n_bytes for old in known)
    ]


def _pages(mappings: list[Mapping], piece: Range, *, inner: bool) -> tuple[int, int, int] | None:
    """Return (address, file offset, bytes) of the whole pages around a range, or within it, where it is mapped."""
    page = mmap.PAGESIZE
    first, end = piece.offset_bytes, piece.offset_bytes + piece.n_bytes
    if inner:
        first, end = -(-first // page) * page, end // page * page
    else:
        first, end = first // page * page, -(-end // page) * page
    for mapping in mappings:
        begin, stop = max(first, mapping.offset_bytes), min(end, mapping.offset_bytes + mapping.n_bytes)
        if begin < stop and mapping.offset_bytes <= piece.offset_bytes < mapping.offset_bytes + mapping.n_bytes:
            return mapping.address + begin - mapping.offset_bytes, begin, stop - begin
    return None


def keep_dense(layout: Layout, method: str, others: list[list[Mapping]]) -> Residency:
    """Keep the dense weights of a loaded model in RAM: lock them, or replace their pages by anonymous copies.

    Without swap the kernel cannot drop an anonymous page; a page of the file it drops as soon as memory is short, and
    every token then waits for the disk. `others` are the files' mappings from before the model was loaded: those of
    other models, which are theirs to keep.

    Raises:
        PagerIOError: the file cannot be read.
        BudgetError: they must be locked, but this process may not lock so much.
    """
    if method == "off":
        return Residency("off", 0)
    done = 0
    used = "lock"
    for file, path in enumerate(layout.paths):
        mappings = _without(find_mappings(path), others[file])
        if not mappings:
            return Residency("unknown", 0)
        pieces = [piece for piece in layout.dense if piece.file == file]
        if method != "copy":
            _begin_reading(path, pieces)
        for piece in pieces:
            around = _pages(mappings, piece, inner=False)
            if method != "copy" and used == "lock":
                try:
                    if around:
                        _native.memory_lock(around[0], around[2])
                        done += around[2]
                        continue
                except OSError as error:
                    if method == "lock":
                        raise BudgetError(
                            f"The {layout.dense_bytes:,} bytes of dense weights cannot be locked: {error.strerror}. "
                            "Raise the limit (ulimit -l), or say lock_dense='auto'."
                        ) from None
                    used = "copy"
            used = "copy"
            if around:
                _replace_by_copy(path, *around)
                done += around[2]
    return Residency(used, done)


def _begin_reading(path: Path, pieces: Sequence[Range]) -> None:
    """Have the kernel read all of these ranges at once, and nothing beside them.

    Locking alone reads one window of the mapping's read-ahead after the other; a large window brings experts in as well. With
    8 MiB of read-ahead, 192 MB were locked in 0.16 s instead of 0.41; with 128 KiB in 0.11 s either way
    (benchmarks/LOG.md, 2026-11-24).
    """
    with open(path, "rb", buffering=0) as file:
        for piece in pieces:
            os.posix_fadvise(file.fileno(), piece.offset_bytes, piece.n_bytes, os.POSIX_FADV_WILLNEED)


def _replace_by_copy(path: Path, address: int, offset_bytes: int, n_bytes: int) -> None:
    """Put an anonymous copy of the same bytes in the place of mapped pages, in steps that nobody can see half done."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    with open(path, "rb", buffering=0) as file:
        file_bytes = os.fstat(file.fileno()).st_size
        for at in range(0, n_bytes, _COPY_CHUNK_BYTES):
            length = min(_COPY_CHUNK_BYTES, n_bytes - at)
            copy = libc.mmap(None, length, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS,
                             -1, 0)
            if copy == ctypes.c_void_p(-1).value:
                raise _copy_error(path, ctypes.get_errno(), offset_bytes + at)
            wanted = min(length, file_bytes - offset_bytes - at)  # behind the end of the file a page is zero
            try:
                buffer = (ctypes.c_char * length).from_address(copy)
                got = os.preadv(file.fileno(), [memoryview(buffer)[:wanted]], offset_bytes + at)
            except OSError as error:
                libc.munmap(copy, length)
                raise _copy_error(path, error.errno or 0, offset_bytes + at) from None
            if got != wanted:
                libc.munmap(copy, length)
                raise _copy_error(path, errno.ENODATA, offset_bytes + at + got)
            libc.mprotect(copy, length, mmap.PROT_READ)
            flags = _MREMAP_MAYMOVE | _MREMAP_FIXED
            if libc.mremap(copy, length, length, flags, address + at) != address + at:
                number = ctypes.get_errno()
                libc.munmap(copy, length)
                raise _copy_error(path, number, offset_bytes + at)
        os.posix_fadvise(file.fileno(), offset_bytes, n_bytes, os.POSIX_FADV_DONTNEED)


def _copy_error(path: Path, number: int, offset_bytes: int) -> PagerIOError:
    what = "the file ends there: download it again" if number == errno.ENODATA else os.strerror(number)
    return PagerIOError(f"The dense weights of {path} cannot be copied at byte {offset_bytes:,}: {what}.",
                        errno=number, path=str(path), offset_bytes=offset_bytes)


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What tells whether a file is still what it was."""

    device: int
    inode: int
    size_bytes: int
    modified_ns: int


def identify(path: Path) -> FileIdentity | None:
    """Return a file's identity; None when it has gone."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return FileIdentity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def find_change(paths: Sequence[Path], identities: Sequence[FileIdentity | None]) -> tuple[int, int, int] | None:
    """Return (errno, file, offset) of the first of a model's files that was changed in place since it was identified.

    llama.cpp computes with mapped pages of it: those of a truncated file end the process, those of an overwritten one
    give other tokens. A file that was removed or replaced by another lives on under the mapping.
    """
    for file, (path, then) in enumerate(zip(paths, identities, strict=True)):
        now = identify(path)
        if now == then or now is None or then is None or (now.device, now.inode) != (then.device, then.inode):
            continue
        if now.size_bytes < then.size_bytes:
            return errno.ENODATA, file, now.size_bytes
        return errno.ESTALE, file, 0
    return None


def release_experts(layout: Layout) -> None:
    """Give back the pages of expert tensors that loading has brought into this process and into the page cache."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for file, path in enumerate(layout.paths):
        mappings = find_mappings(path)
        with open(path, "rb", buffering=0) as opened:
            for piece in (piece for layer in layout.layers for piece in layer.slices if piece.file == file):
                n_bytes = piece.slice_bytes * piece.ne[2]
                within = _pages(mappings, Range(file, piece.offset_bytes, n_bytes), inner=True)
                if within:
                    libc.madvise(within[0], within[2], _MADV_DONTNEED)
                os.posix_fadvise(opened.fileno(), piece.offset_bytes, n_bytes, os.POSIX_FADV_DONTNEED)
