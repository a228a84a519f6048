"""What a model's bytes were when it was opened, to tell a file that was touched from one that was changed."""

from __future__ import annotations

import ctypes
import errno
import functools
import hashlib
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from gguf_pager import _native
from gguf_pager.errors import PagerIOError
from gguf_pager.files import FileIdentity, ModelFiles, OpenedFile, is_equal
from gguf_pager.memory.residency import Copy, Job
from gguf_pager.model.layout import Layout, Range
from gguf_pager.model.mirror import SAMPLE_BYTES, samples, spread
from gguf_pager.pager import Pager

Failure = tuple[int, int, int]
"""errno, index of the file among those of all copies, offset."""

_CHUNK_BYTES = 4 << 20
_MOST_TRIES = 5
"""A file whose times change even while it is compared is compared again, but not for ever."""
_SAMPLES_PER_JOB = 32


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _other_ranges(layout: Layout, file: int, file_bytes: int) -> Iterator[Range]:
    """Yield what is neither header, dense weights nor experts: embedding tables, blocks that are not loaded."""
    known = [(piece.offset_bytes, piece.offset_bytes + piece.n_bytes) for piece in layout.dense if piece.file == file]
    known += [(piece.offset_bytes, piece.offset_bytes + piece.slice_bytes * piece.ne[2])
              for layer in layout.layers for piece in layer.slices if piece.file == file]
    at = layout.header_bytes[file]
    for begin, end in [*sorted(known), (file_bytes, file_bytes)]:
        if begin - at > SAMPLE_BYTES:  # smaller ones are gaps that align tensors
            yield Range(file, at, begin - at)
        at = max(at, end)


@dataclass(slots=True)
class Fingerprint:
    """Digests of a model's headers and of samples of what is not in memory: experts and embedding tables."""

    header_bytes: tuple[int, ...]
    places: list[Range]
    headers: list[bytes] = field(default_factory=list)
    samples: dict[int, bytes] = field(default_factory=dict)

    @classmethod
    def of(cls, layout: Layout, files: ModelFiles) -> Fingerprint:
        """Return one with the headers' digests; the samples' are still to be taken, by `jobs`."""
        places = [Range(file, offset_bytes, n_bytes) for _, file, offset_bytes, n_bytes in samples(layout)]
        for file, opened in enumerate(files):
            for piece in _other_ranges(layout, file, opened.identity.size_bytes):
                places += [Range(file, at, n_bytes) for at, n_bytes in spread(piece.offset_bytes, piece.n_bytes)]
        taken = cls(layout.header_bytes, places)
        taken.headers = [taken._header(opened, file) for file, opened in enumerate(files)]
        return taken

    def jobs(self, files: ModelFiles) -> list[Job]:
        """Return what takes the samples, in any order and any thread."""

        def take(first: int) -> None:
            for index in range(first, min(first + _SAMPLES_PER_JOB, len(self.places))):
                place = self.places[index]
                self.samples[index] = _digest(files[place.file].read(place.n_bytes, place.offset_bytes))

        return [functools.partial(take, first) for first in range(0, len(self.places), _SAMPLES_PER_JOB)]

    def _header(self, opened: OpenedFile, file: int) -> bytes:
        whole = hashlib.blake2b(digest_size=16)
        for at in range(0, self.header_bytes[file], _CHUNK_BYTES):
            whole.update(opened.read(min(_CHUNK_BYTES, self.header_bytes[file] - at), at))
        return whole.digest()

    def matches(self, opened: OpenedFile, file: int) -> bool:
        """Return whether a file, or a mirror of it, is what the model's was, as far as the digests tell."""
        if self._header(opened, file) != self.headers[file]:
            return False
        return all(_digest(opened.read(place.n_bytes, place.offset_bytes)) == self.samples[index]
                   for index, place in enumerate(self.places) if place.file == file)


class Watch:
    """Tells whether a model's files, in every copy, still hold what was opened."""

    def __init__(self, pager: Pager, copies: Sequence[ModelFiles], fingerprint: Fingerprint, dense: Sequence[Copy]) -> None:
        self._pager = pager
        self._n_files = len(copies[0])
        self._files = [file for copy in copies for file in copy]
        self._fingerprint = fingerprint
        self._dense = list(dense)
        self._mutex = _native.Mutex()
        self._refused: dict[int, FileIdentity] = {}
        pager.find_change = self.find_change
        pager.compare_read = functools.partial(_compare_read, weakref.ref(self))

    def compare_also(self, dense: Sequence[Copy]) -> None:
        """Compare these copies, too, from now on."""
        self._dense += dense

    def find_change(self) -> Failure | None:
        """Return what is wrong with the first file that is not what was opened; None if all are.

        A file of the same size with other times is compared: its header, the dense weights with those in memory, samples of
        the experts. If they are the same, its new times are those of the opened file from now on.
        """
        if all(file.status() == file.identity for file in self._files):
            return None
        return self._mutex.call(self._find_change)

    def _find_change(self) -> Failure | None:
        touched: dict[int, FileIdentity] = {}
        for index, file in enumerate(self._files):
            now, then = file.status(), file.identity
            if now == then:
                continue
            if now.size_bytes < then.size_bytes:
                return errno.ENODATA, index, now.size_bytes
            if now.size_bytes > then.size_bytes or now == self._refused.get(index):
                return errno.ESTALE, index, 0
            touched[index] = now
        return self._compare(touched) if touched else None

    def _compare(self, touched: dict[int, FileIdentity]) -> Failure | None:
        first = next(iter(touched))
        for _ in range(_MOST_TRIES):
            for index in touched:
                failure = self._compare_file(index)
                if failure is not None:
                    return failure
            now = [file.status() for file in self._files]
            if any(now[index] != then for index, then in touched.items()):  # touched again meanwhile
                touched = {index: now[index] for index in touched}
                continue
            compared = [touched.get(index, file.identity) for index, file in enumerate(self._files)]
            try:
                self._pager.accept([(each.modified_ns, each.changed_ns) for each in compared])
            except OSError as error:
                if error.errno == errno.ESTALE:
                    continue
                return error.errno or errno.EIO, first, 0
            for index, then in touched.items():
                self._files[index].identity = then
            return None
        return errno.ESTALE, first, 0

    def _compare_file(self, index: int) -> Failure | None:
        now = self._files[index].status()
        try:
            is_same = self._is_same(index)
        except PagerIOError as error:
            return error.errno, index, error.offset_bytes
        if is_same:
            return None
        self._refused[index] = now
        return errno.ESTALE, index, 0

    def compare_read(self, copy: Copy) -> int:
        """Return 0 if that was read of the model that was opened, else an errno."""
        try:
            failure = self.find_change()
            if failure is None and not _is_copy(self._files[copy.file], copy):
                return errno.ESTALE
            failure = failure or self.find_change()
        except PagerIOError as error:
            return error.errno
        return 0 if failure is None else failure[0]

    def _is_same(self, index: int) -> bool:
        opened = self._files[index]
        if not self._fingerprint.matches(opened, index % self._n_files):
            return False
        return all(_is_copy(opened, copy) for copy in self._dense if copy.file == index)


def _compare_read(watch: weakref.ref[Watch], *place: int) -> int:
    """The core's gp_compare, in the middle of a graph. The core must not keep alive who keeps it alive."""
    found = watch()
    return errno.ESTALE if found is None else found.compare_read(Copy(*place))


def _is_copy(opened: OpenedFile, copy: Copy) -> bool:
    buffer = bytearray(min(_CHUNK_BYTES, copy.n_bytes))
    address = ctypes.addressof((ctypes.c_char * len(buffer)).from_buffer(buffer))
    whole = min(copy.n_bytes, opened.identity.size_bytes - copy.offset_bytes)
    for at in range(0, whole, _CHUNK_BYTES):
        n_bytes = min(_CHUNK_BYTES, whole - at)
        opened.read_into(memoryview(buffer)[:n_bytes], copy.offset_bytes + at)
        if not is_equal(address, copy.address + at, n_bytes):
            return False
    opened.forget_cached(copy.offset_bytes, copy.n_bytes)
    return True
