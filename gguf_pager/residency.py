"""The dense weights: needed by every token, so kept in RAM; and the experts' mapped pages, which are not wanted there."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from gguf_pager import _native
from gguf_pager.errors import PagerIOError
from gguf_pager.layout import Layout, Range

_COPY_CHUNK_BYTES = 8 << 20
_MAP_FIXED = 0x10
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
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(None, 5)
        if len(fields) < 6 or int(fields[4]) != wanted.st_ino or not fields[1].startswith("r--s"):
            continue
        major, minor = (int(part, 16) for part in fields[3].split(":"))
        if os.makedev(major, minor) != wanted.st_dev:
            continue
        start, end = (int(part, 16) for part in fields[0].split("-"))
        found.append(Mapping(start, int(fields[2], 16), end - start))
    return found


def _pages(mappings: list[Mapping], piece: Range, *, inner: bool) -> tuple[int, int, int] | None:
    """Return (address, file offset, bytes) of the whole pages around a range, or within it, where it is mapped."""
    page = mmap.PAGESIZE
    first, end = piece.offset_bytes, piece.offset_bytes + piece.n_bytes
    if inner:
        first, end = -(-first // page) * page, end // page * page
    else:
        first, end = first // page * page, -(-end // page) * page
    for mapping in reversed(mappings):  # the newest, when one file is loaded twice
        begin, stop = max(first, mapping.offset_bytes), min(end, mapping.offset_bytes + mapping.n_bytes)
        if begin < stop and mapping.offset_bytes <= piece.offset_bytes < mapping.offset_bytes + mapping.n_bytes:
            return mapping.address + begin - mapping.offset_bytes, begin, stop - begin
    return None


def keep_dense(layout: Layout, method: str) -> Residency:
    """Keep the dense weights of a loaded model in RAM: lock them, or replace their pages by anonymous copies.

    Without swap the kernel cannot drop an anonymous page; a page of the file it drops as soon as memory is short, and
    every token then waits for the disk.

    Raises:
        PagerIOError: the file cannot be read.
    """
    if method == "off":
        return Residency("off", 0)
    done = 0
    used = "lock"
    for file, path in enumerate(layout.paths):
        mappings = find_mappings(path)
        if not mappings:
            return Residency("unknown", 0)
        for piece in (piece for piece in layout.dense if piece.file == file):
            if method != "copy" and used == "lock":
                around = _pages(mappings, piece, inner=False)
                try:
                    if around:
                        _native.memory_lock(around[0], around[2])
                        done += around[2]
                        continue
                except OSError:
                    if method == "lock":
                        raise
                    used = "copy"
            used = "copy"
            within = _pages(mappings, piece, inner=True)
            if within:
                _replace_by_copy(path, *within)
                done += within[2]
    return Residency(used, done)


def _replace_by_copy(path: Path, address: int, offset_bytes: int, n_bytes: int) -> None:
    """Put an anonymous copy of the same bytes in the place of mapped pages. Nobody may be computing with them."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    with open(path, "rb", buffering=0) as file:
        anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
        for at in range(0, n_bytes, _COPY_CHUNK_BYTES):
            length = min(_COPY_CHUNK_BYTES, n_bytes - at)
            # Read first, replace after: a failed read leaves the file's own page in place.
            data = os.pread(file.fileno(), length, offset_bytes + at)
            if len(data) != length:
                raise PagerIOError(f"{path} ends early at byte {offset_bytes + at + len(data):,}: download it again.",
                                   errno=0, path=str(path), offset_bytes=offset_bytes + at + len(data))
            got = libc.mmap(address + at, length, mmap.PROT_READ | mmap.PROT_WRITE, anonymous, -1, 0)
            if got != address + at:
                raise PagerIOError(f"The dense weights of {path} cannot be copied: {os.strerror(ctypes.get_errno())}.",
                                   errno=ctypes.get_errno(), path=str(path), offset_bytes=offset_bytes + at)
            ctypes.memmove(address + at, data, length)
            libc.mprotect(address + at, length, mmap.PROT_READ)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), offset_bytes, n_bytes, os.POSIX_FADV_DONTNEED)


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
