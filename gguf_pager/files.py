"""The model's files, open from the header to the last slot: what happens to their names meanwhile does not matter.

Everything that reads a model reads what was opened here: the header, llama.cpp, the dense weights, the experts. ggml and
llama.cpp take names only, so they are given one that leads to the open file.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from gguf_pager.errors import LayoutError, PagerIOError

_KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket"}


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What tells whether a file is still what it was. `changed_ns` moves with its content, its name and its rights."""

    device: int
    inode: int
    size_bytes: int
    modified_ns: int
    changed_ns: int


def _identity(status: os.stat_result) -> FileIdentity:
    return FileIdentity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _check_kind(path: Path, status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise LayoutError(f"{path} cannot be read: {os.strerror(errno.EISDIR)}.")
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "of another kind")
        raise LayoutError(f"{path} is {kind}, and a model is read at many places at once: put it into a file.")


class OpenedFile:
    """A file that stays open until `close`. `path` is what the user called it, for messages."""

    def __init__(self, path: Path) -> None:
        """Open a file.

        Raises:
            LayoutError: it is missing, no regular file, or may not be read.
        """
        self.path = path
        self._absolute = os.path.abspath(path)
        try:
            _check_kind(path, os.stat(path))  # opening some devices does something, and sockets cannot be opened
            # Opening a pipe that has come into its place since would wait for somebody who writes to it.
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError as error:
            raise LayoutError(f"{path} cannot be read: {error.strerror}.") from None
        status = os.fstat(self.fd)
        try:
            _check_kind(path, status)
        except LayoutError:
            os.close(self.fd)
            self.fd = -1
            raise
        fcntl.fcntl(self.fd, fcntl.F_SETFL, fcntl.fcntl(self.fd, fcntl.F_GETFL) & ~os.O_NONBLOCK)
        self.identity = _identity(status)

    @property
    def is_known_by_name(self) -> bool:
        """Whether `reopen_path` is a name that may come to mean another file: where the system has no name for open ones."""
        return self.reopen_path == self._absolute

    @property
    def reopen_path(self) -> str:
        """A name that opens this very file again: on Linux through /proc, whatever has become of its own name."""
        name = f"/proc/self/fd/{self.fd}"
        try:
            is_there = os.path.samestat(os.stat(name), os.fstat(self.fd))
        except OSError:
            is_there = False
        return name if is_there else self._absolute

    @property
    def shown_path(self) -> bytes:
        """The name under which the kernel lists mappings of it, where there is /proc."""
        with contextlib.suppress(OSError):
            return os.readlink(os.fsencode(f"/proc/self/fd/{self.fd}"))
        return os.fsencode(os.path.realpath(self._absolute))

    def status(self) -> FileIdentity:
        """Return what the file is now."""
        return _identity(os.fstat(self.fd))

    def is_still_named(self) -> bool:
        """Return whether the user's name means this file."""
        try:
            now = os.stat(self._absolute)
        except OSError:
            return False
        return (now.st_dev, now.st_ino) == (self.identity.device, self.identity.inode)

    def read(self, n_bytes: int, offset_bytes: int) -> bytes:
        """Read so many bytes.

        Raises:
            PagerIOError: they cannot be read, or the file ends before.
        """
        buffer = bytearray(n_bytes)
        self.read_into(memoryview(buffer), offset_bytes)
        return bytes(buffer)

    def read_into(self, into: memoryview, offset_bytes: int) -> None:
        """Read as many bytes as there is room for.

        Raises:
            PagerIOError: they cannot be read, or the file ends before.
        """
        got = 0
        while got < len(into):
            try:
                more = os.preadv(self.fd, [into[got:]], offset_bytes + got)
            except OSError as error:
                raise read_error(self.path, error.errno or 0, offset_bytes + got) from None
            if more == 0:
                raise read_error(self.path, errno.ENODATA, offset_bytes + got)
            got += more

    def forget_cached(self, offset_bytes: int, n_bytes: int) -> None:
        """Ask for these bytes to leave the page cache, where the system takes such wishes."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.fd, offset_bytes, n_bytes, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close it; twice is fine."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        if getattr(self, "fd", -1) >= 0:
            self.close()


class ModelFiles:
    """The files of one copy of a model, in the order of its parts."""

    def __init__(self) -> None:
        self._files: list[OpenedFile] = []
        self._is_lent = False

    def open(self, path: Path) -> OpenedFile:
        """Open the next file.

        Raises:
            LayoutError: see `OpenedFile`.
        """
        self._files.append(OpenedFile(path))
        return self._files[-1]

    def lend(self) -> ModelFiles:
        """Return the same open files for somebody who closes what he was given: that leaves them open."""
        lent = ModelFiles()
        lent._files, lent._is_lent = self._files, True
        return lent

    def close(self) -> None:
        """Close them; twice is fine."""
        if not self._is_lent:
            for file in self._files:
                file.close()

    def __getitem__(self, index: int) -> OpenedFile:
        return self._files[index]

    def __iter__(self) -> Iterator[OpenedFile]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_error(path: Path, number: int, offset_bytes: int) -> PagerIOError:
    """Return the exception for a read that failed while a model was being opened."""
    what = "the file ends there, earlier than it should" if number == errno.ENODATA else os.strerror(number)
    return PagerIOError(f"Reading {path} at byte {offset_bytes:,} failed: {what}.", errno=number, path=str(path),
                        offset_bytes=offset_bytes)


def check_can_be_mapped(file: OpenedFile) -> None:
    """Raise LayoutError where a file cannot be mapped into memory, as llama.cpp does with a model.

    Some file systems refuse: FUSE with direct_io, for one. Mapping a page and unmapping it again reads nothing.
    """
    try:
        mmap.mmap(file.fd, mmap.PAGESIZE if file.identity.size_bytes >= mmap.PAGESIZE else 0, mmap.MAP_SHARED,
                  mmap.PROT_READ).close()
    except OSError as error:
        raise LayoutError(f"{file.path} cannot be mapped into memory: {error.strerror}. Its file system does not allow it "
                          "(FUSE with direct_io does not, for one): mount it otherwise, or copy the model to a local disk."
                          ) from None


_LIBC = ctypes.CDLL(None)
_LIBC.memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


def is_equal(address: int, other: int, n_bytes: int) -> bool:
    """Return whether two places in memory hold the same bytes."""
    return bool(_LIBC.memcmp(address, other, n_bytes) == 0)
