"""Copies of a model on other disks: whether they are the same model, as far as that can be told in little time."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gguf_pager.errors import LayoutError, printable
from gguf_pager.files import ModelFiles, OpenedFile
from gguf_pager.model.layout import Layout
from gguf_pager.model.metadata import split_paths

log = logging.getLogger("gguf_pager")

SAMPLES_PER_TENSOR, SAMPLE_BYTES = 6, 4096
"""The first and the last 4 KiB of each expert tensor and four places between, evenly spread. 288 samples of a model of
5.6 GB with 48 expert tensors: one in 19 MB. A copy in which fewer bytes than that are wrong may pass."""

_READERS = 8
"""Samples are read at the same time: what takes long is the way to the disk, not the bytes."""

_CHUNK_BYTES = 1 << 20


def find_mirrors(layout: Layout, files: ModelFiles, given: Sequence[str | Path], *, is_any_model: bool
                 ) -> tuple[ModelFiles, ...]:
    """Open the files of each mirror: the one given and, of a split model, those beside it. `files` are the model's.

    Compared are the whole headers, the sizes, and `SAMPLES_PER_TENSOR` samples of each expert tensor: not every byte.
    With `is_any_model` a mirror of another model, or the model itself, is left out instead of refused.

    Raises:
        LayoutError: a mirror cannot be opened, or is not the same model.
        PagerIOError: a file cannot be read.
    """
    known = [_number(file) for file in files]
    with contextlib.ExitStack() as stack:
        mirrors: list[ModelFiles] = []
        for first in map(Path, given):
            mirror = stack.enter_context(ModelFiles())
            opened = _open(mirror, first)
            if is_any_model and (_number(opened) == known[0] or not _has_same_header(layout, files, 0, opened)):
                log.info("%s is no mirror of %s and is not read for it", printable(first), printable(layout.paths[0]))
                mirror.close()
                continue
            for path in split_paths(first, len(files))[1:] if len(files) > 1 else ():
                _open(mirror, path)
            for index, file in enumerate(mirror):
                _check_whole(layout, files, index, file)
                if _number(file) in known:
                    raise LayoutError(f"{file.path} is {layout.paths[index]} itself, or was given twice: "
                                      "a mirror is a copy on another disk.")
                known.append(_number(file))
            _check_samples(layout, files, mirror)
            mirrors.append(mirror)
        stack.pop_all()
    return tuple(mirrors)


def _number(file: OpenedFile) -> tuple[int, int]:
    return file.identity.device, file.identity.inode


def _open(mirror: ModelFiles, path: Path) -> OpenedFile:
    try:
        file = mirror.open(path)
    except LayoutError as error:
        raise LayoutError(f"The mirror {error}") from None
    if hasattr(os, "posix_fadvise"):  # samples lie scattered: read-ahead would bring megabytes with each
        os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_RANDOM)
    return file


def _no_mirror(layout: Layout, file: int, path: Path, why: str) -> LayoutError:
    return LayoutError(f"{path} is no mirror of {layout.paths[file]}: {why}. Copy the model anew, or leave the mirror out.")


def _read(file: OpenedFile, n_bytes: int, offset_bytes: int) -> bytes:
    """Read so many bytes; fewer only where the file ends."""
    return file.read(max(0, min(n_bytes, file.identity.size_bytes - offset_bytes)), offset_bytes)


def _has_same_header(layout: Layout, files: ModelFiles, index: int, other: OpenedFile) -> bool:
    whole = layout.header_bytes[index]
    for at in range(0, whole, _CHUNK_BYTES):
        n_bytes = min(_CHUNK_BYTES, whole - at)
        if _read(files[index], n_bytes, at) != _read(other, n_bytes, at):
            return False
    return True


def _check_whole(layout: Layout, files: ModelFiles, index: int, other: OpenedFile) -> None:
    if not _has_same_header(layout, files, index, other):
        raise _no_mirror(layout, index, other.path, "their headers differ")
    own_bytes, other_bytes = files[index].identity.size_bytes, other.identity.size_bytes
    if own_bytes != other_bytes:
        raise _no_mirror(layout, index, other.path, f"it has {other_bytes:,} bytes instead of {own_bytes:,}")


def samples(layout: Layout) -> Iterator[tuple[str, int, int, int]]:
    """Yield (tensor, file, offset, bytes) of every sample; of a tensor that is smaller than all of them, the whole."""
    for piece in (piece for layer in layout.layers for piece in layer.slices):
        n_bytes = piece.slice_bytes * piece.ne[2]
        for at, sample_bytes in spread(piece.offset_bytes, n_bytes):
            yield piece.name, piece.file, at, sample_bytes


def spread(offset_bytes: int, n_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield (offset, bytes) of the samples of a range."""
    if n_bytes <= SAMPLES_PER_TENSOR * SAMPLE_BYTES:
        yield offset_bytes, n_bytes
        return
    for i in range(SAMPLES_PER_TENSOR):
        yield offset_bytes + (n_bytes - SAMPLE_BYTES) * i // (SAMPLES_PER_TENSOR - 1), SAMPLE_BYTES


def _check_samples(layout: Layout, files: ModelFiles, mirror: ModelFiles) -> None:
    def check(sample: tuple[str, int, int, int]) -> None:
        name, file, offset_bytes, n_bytes = sample
        if _read(mirror[file], n_bytes, offset_bytes) != _read(files[file], n_bytes, offset_bytes):
            raise _no_mirror(layout, file, mirror[file].path,
                             f"the data of {name} differ within {n_bytes:,} bytes from byte {offset_bytes:,}")

    with ThreadPoolExecutor(_READERS) as pool:
        for _ in pool.map(check, samples(layout)):
            pass
