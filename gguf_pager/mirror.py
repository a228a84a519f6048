"""Copies of a model on other disks: whether they are the same model, as far as that can be told in little time."""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gguf_pager.errors import LayoutError, PagerIOError, printable
from gguf_pager.layout import Layout
from gguf_pager.metadata import split_paths

log = logging.getLogger("gguf_pager")

SAMPLES_PER_TENSOR, SAMPLE_BYTES = 6, 4096
"""The first and the last 4 KiB of each expert tensor and four places between, evenly spread. 288 samples of a model of
5.6 GB with 48 expert tensors: one in 19 MB. A copy in which fewer bytes than that are wrong may pass."""

_READERS = 8
"""Samples are read at the same time: what takes long is the way to the disk, not the bytes."""

_CHUNK_BYTES = 1 << 20


def find_mirrors(layout: Layout, given: Sequence[str | Path], *, is_any_model: bool) -> tuple[tuple[Path, ...], ...]:
    """Return the files of each mirror: the one given and, of a split model, those beside it.

    Compared are the whole headers, the sizes, and `SAMPLES_PER_TENSOR` samples of each expert tensor: not every byte.
    With `is_any_model` a mirror of another model, or the model itself, is left out instead of refused.

    Raises:
        LayoutError: a mirror cannot be opened, or is not the same model.
        PagerIOError: a file cannot be read.
    """
    mirrors: list[tuple[Path, ...]] = []
    known = [_identity(path) for path in layout.paths]
    for first in map(Path, given):
        if is_any_model and (_identity(first) == known[0] or not _has_same_header(layout, 0, first)):
            log.info("%s is no mirror of %s and is not read for it", printable(first), printable(layout.paths[0]))
            continue
        paths = (first,) if len(layout.paths) == 1 else tuple(split_paths(first, len(layout.paths)))
        for file, path in enumerate(paths):
            _check_whole(layout, file, path)
            if _identity(path) in known:
                raise LayoutError(f"{path} is {layout.paths[file]} itself, or was given twice: "
                                  "a mirror is a copy on another disk.")
            known.append(_identity(path))
        _check_samples(layout, paths)
        mirrors.append(paths)
    return tuple(mirrors)


def _identity(path: Path) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError as error:
        raise LayoutError(f"The mirror {path} cannot be read: {error.strerror}.") from None
    return status.st_dev, status.st_ino


def _no_mirror(layout: Layout, file: int, path: Path, why: str) -> LayoutError:
    return LayoutError(f"{path} is no mirror of {layout.paths[file]}: {why}. Copy the model anew, or leave the mirror out.")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe must not make it wait
    except OSError as error:
        raise LayoutError(f"The mirror {path} cannot be read: {error.strerror}.") from None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise LayoutError(f"The mirror {path} is no file: give a copy of the model.")
        if hasattr(os, "posix_fadvise"):  # samples lie scattered: read-ahead would bring megabytes with each
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        yield fd
    finally:
        os.close(fd)


def _read(fd: int, path: Path, n_bytes: int, offset_bytes: int) -> bytes:
    """Read so many bytes; fewer only where the file ends."""
    got = b""
    try:
        while len(got) < n_bytes and (more := os.pread(fd, n_bytes - len(got), offset_bytes + len(got))):
            got += more
    except OSError as error:
        raise PagerIOError(f"Reading {path} at byte {offset_bytes:,} failed: {error.strerror}.", errno=error.errno or 0,
                           path=str(path), offset_bytes=offset_bytes) from None
    return got


def _has_same_header(layout: Layout, file: int, path: Path) -> bool:
    whole = layout.header_bytes[file]
    with _opened(layout.paths[file]) as own, _opened(path) as other:
        for at in range(0, whole, _CHUNK_BYTES):
            n_bytes = min(_CHUNK_BYTES, whole - at)
            if _read(own, layout.paths[file], n_bytes, at) != _read(other, path, n_bytes, at):
                return False
    return True


def _check_whole(layout: Layout, file: int, path: Path) -> None:
    if not _has_same_header(layout, file, path):
        raise _no_mirror(layout, file, path, "their headers differ")
    own_bytes, other_bytes = layout.paths[file].stat().st_size, path.stat().st_size
    if own_bytes != other_bytes:
        raise _no_mirror(layout, file, path, f"it has {other_bytes:,} bytes instead of {own_bytes:,}")


def samples(layout: Layout) -> Iterator[tuple[str, int, int, int]]:
    """Yield (tensor, file, offset, bytes) of every sample; of a tensor that is smaller than all of them, the whole."""
    for piece in (piece for layer in layout.layers for piece in layer.slices):
        n_bytes = piece.slice_bytes * piece.ne[2]
        if n_bytes <= SAMPLES_PER_TENSOR * SAMPLE_BYTES:
            yield piece.name, piece.file, piece.offset_bytes, n_bytes
            continue
        for i in range(SAMPLES_PER_TENSOR):
            at = (n_bytes - SAMPLE_BYTES) * i // (SAMPLES_PER_TENSOR - 1)
            yield piece.name, piece.file, piece.offset_bytes + at, SAMPLE_BYTES


def _check_samples(layout: Layout, paths: Sequence[Path]) -> None:
    with contextlib.ExitStack() as stack:
        own = [stack.enter_context(_opened(path)) for path in layout.paths]
        other = [stack.enter_context(_opened(path)) for path in paths]

        def check(sample: tuple[str, int, int, int]) -> None:
            name, file, offset_bytes, n_bytes = sample
            wanted = _read(own[file], layout.paths[file], n_bytes, offset_bytes)
            if _read(other[file], paths[file], n_bytes, offset_bytes) != wanted:
                raise _no_mirror(layout, file, paths[file],
                                 f"the data of {name} differ within {n_bytes:,} bytes from byte {offset_bytes:,}")

        with ThreadPoolExecutor(_READERS) as pool:
            for _ in pool.map(check, samples(layout)):
                pass
