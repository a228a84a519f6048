"""What a disk must be asked, told and measured for an honest comparison: its page cache, read-ahead and bandwidth."""

from __future__ import annotations

import fcntl
import mmap
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

from gguf_pager import kernel
from gguf_pager.aftermath import undone_when_killed
from gguf_pager.bench.memory import huge_buffer
from gguf_pager.memory.probe import page_cache_bytes

_WINDOW_BYTES = 1 << 30
"""Of a file, mapped at once to be asked about; a multiple of any page."""

_F_NOCACHE = 48
"""fcntl.h of macOS: reads past the page cache."""

# ---- the page cache -------------------------------------------------------------------------------------------------

def drop_from_page_cache(paths: Sequence[Path]) -> bool:
    """Ask the kernel to forget files that nobody has mapped; no root needed. Return whether it can be asked."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in paths:
        with open(path, "rb") as file:
            with suppress(OSError):  # a file system that cannot be written to
                os.fsync(file.fileno())  # dirty pages, of a model just written, would stay
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def fill_page_cache(paths: Sequence[Path]) -> None:
    """Read files through the page cache, which keeps of them what it has room for."""
    buffer = bytearray(8 << 20)
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def cached_bytes(paths: Sequence[Path]) -> int | None:
    """Return how much of the files is in the page cache; None where that cannot be known, or this user is not told."""
    if any(not os.access(path, os.W_OK) and path.stat().st_uid != os.geteuid() for path in paths):
        return None
    total = 0
    for path in paths:
        size = path.stat().st_size
        with open(path, "rb") as file:
            for start in range(0, size, _WINDOW_BYTES):
                length = min(_WINDOW_BYTES, size - start)
                cached = page_cache_bytes(file.fileno(), start, length)
                if cached is None:
                    return None
                total += cached
    return total


# ---- read-ahead -----------------------------------------------------------------------------------------------------

_RESTORE = 'echo "$2" > "$1"'


@contextmanager
def read_ahead(setting: Path | None, kb: int | None) -> Iterator[int | None]:
    """Set a device's read-ahead for the time of the block and restore it always, be it after a kill -9.

    Yields the value in force, in KiB: what it was where setting it is not permitted, or where another benchmark has set it
    and wants it so; None where unknown.
    """
    before = _number_in(setting)
    if setting is None or kb is None or before is None or kb == before:
        yield before
        return
    with open(setting, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of two that restore, the second would keep the first one's
            before = int(file.read())
        except (OSError, ValueError):
            yield _number_in(setting)
            return
        with undone_when_killed(_RESTORE, [str(setting), str(before)]):
            try:
                with suppress(OSError):
                    setting.write_text(str(kb))
                yield _number_in(setting)  # the kernel rounds to whole pages
            finally:
                with suppress(OSError):  # where it could not be set, either
                    setting.write_text(str(before))


def _number_in(setting: Path | None) -> int | None:
    try:
        return None if setting is None else int(kernel.read_text(setting))
    except (OSError, ValueError):
        return None


# ---- bandwidth ------------------------------------------------------------------------------------------------------

@dataclass(frozen=True, slots=True)
class Pattern:
    """A way to read: how many readers, and how many bytes each asks for at once."""

    n_readers: int
    read_bytes: int


_PATTERNS = (Pattern(16, 1 << 20), Pattern(8, 1 << 20), Pattern(32, 256 << 10), Pattern(16, 512 << 10))
"""What is tried: which of them a device likes best differs."""

N_PATTERNS = len(_PATTERNS)


class Device:
    """The raw bandwidth of the device that holds a model: direct reads at random places of its files.

    `best_bytes_per_s` is the best of all that was measured so far; None where direct reads are not possible, because
    reading through the page cache would measure the cache.
    """

    def __init__(self, paths: Sequence[Path], align_bytes: int | None) -> None:
        self._paths = paths
        self._align_bytes = align_bytes
        self._patterns = cycle(_PATTERNS)
        self.best_bytes_per_s: float | None = None

    def sample(self, n_patterns: int = 2, seconds: float = 0.25) -> None:
        """Measure with the next patterns, each for so long. What a shared or a hot device gives changes: ask often."""
        if self._align_bytes is None:
            return
        for pattern in islice(self._patterns, n_patterns):
            try:
                bandwidth = read_at_random(self._paths, pattern, self._align_bytes, seconds)
            except OSError:
                self._align_bytes = None
                return
            if bandwidth is not None:
                self.best_bytes_per_s = max(self.best_bytes_per_s or 0.0, bandwidth)


def _open_direct(path: Path) -> int:
    file = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    if sys.platform == "darwin":
        fcntl.fcntl(file, _F_NOCACHE, 1)
    return file


class _Reader(threading.Thread):
    """Reads at random places for some seconds, from the moment that all readers are ready."""

    def __init__(self, files: Sequence[tuple[int, int]], buffer: memoryview, align_bytes: int, seconds: float,
                 all_ready: threading.Barrier) -> None:
        super().__init__()
        self.done_bytes, self.begun_s, self.ended_s = 0, 0.0, 0.0
        self.error: OSError | None = None
        self._files, self._sizes = files, [size for _, size in files]
        self._align_bytes, self._seconds, self._all_ready = align_bytes, seconds, all_ready
        self._buffer = buffer

    def run(self) -> None:
        """Read; what goes wrong is kept."""
        places = random.Random()
        try:
            self._all_ready.wait()
            self.begun_s = self.ended_s = time.monotonic()
            while self.ended_s - self.begun_s < self._seconds:
                file, size = places.choices(self._files, self._sizes)[0]
                at = places.randrange(0, (size - len(self._buffer)) // self._align_bytes + 1) * self._align_bytes
                self.done_bytes += os.preadv(file, [self._buffer], at)
                self.ended_s = time.monotonic()
        except OSError as error:
            self.error = error
        except threading.BrokenBarrierError:
            pass  # somebody interrupts


def read_at_random(paths: Sequence[Path], pattern: Pattern, align_bytes: int, seconds: float) -> float | None:
    """Return the bytes per second of direct reads at random places; None if the files are smaller than one read.

    Raises:
        OSError: the device refuses direct reads.
    """
    files = [(_open_direct(path), path.stat().st_size) for path in paths]
    try:
        large = [(file, size) for file, size in files if size > pattern.read_bytes]
        if not large:
            return None
        all_ready = threading.Barrier(pattern.n_readers)
        buffer = huge_buffer(pattern.n_readers * pattern.read_bytes)
        readers = [_Reader(large, buffer[i * pattern.read_bytes : (i + 1) * pattern.read_bytes], align_bytes, seconds,
                           all_ready) for i in range(pattern.n_readers)]
        try:
            for reader in readers:
                reader.start()
            for reader in readers:
                reader.join()
        finally:
            all_ready.abort()
            for reader in readers:  # an interrupt must not close the files under them
                if reader.ident is not None:
                    reader.join()
        for reader in readers:
            if reader.error is not None:
                raise reader.error
        seconds = max(reader.ended_s for reader in readers) - min(reader.begun_s for reader in readers)
        return sum(reader.done_bytes for reader in readers) / seconds
    finally:
        for file, _ in files:
            os.close(file)


def read_through(paths: Sequence[Path], most_s: float, check: Callable[[], None] = lambda: None) -> float | None:
    """Read files once from front to back, past the page cache, for at most so long; return bytes per second.

    Disks of virtual machines keep at their host what was read lately: without this whoever runs first loses. None
    where direct reads are not possible. `check` is called after every few milliseconds; what it raises ends the reading.
    """
    done, begun = 0, time.monotonic()
    try:
        with mmap.mmap(-1, 8 << 20) as buffer:
            for path in paths:
                file = _open_direct(path)
                try:
                    at = 0
                    while time.monotonic() - begun < most_s and (got := os.preadv(file, [buffer], at)):
                        check()
                        at += got
                        done += got
                        if got % mmap.PAGESIZE:  # the end; the next offset would not be aligned
                            break
                finally:
                    os.close(file)
    except OSError:
        return None
    return done / (time.monotonic() - begun)
