"""Small files kept between processes. Nothing here fails: what cannot be read is absent, what cannot be kept is not."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MOST_BYTES = 8 << 20
"""No file of ours is larger: the largest, the profile of a model with 512 blocks of 1,024 experts, has 5 MB."""

PARTIAL_PREFIX = ".new-"
"""How the names of files begin that are being written. A process that is killed meanwhile leaves one."""

_LOCK_NAME = ".lock"
_LOCK_STEP_S = 0.02


def cache_folder() -> Path | None:
    """Return $GGUF_PAGER_CACHE, or else where the system keeps caches; None where this user has no home."""
    own = os.environ.get("GGUF_PAGER_CACHE")
    if own:
        return Path(own)
    try:
        home = Path.home()
    except RuntimeError:
        return None
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "gguf_pager"
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "gguf_pager"


def read_start(path: Path, n_bytes: int) -> bytes | None:
    """Return a file's first bytes; None where it is not a file of ours to read: a link, a device, a pipe, too large.

    None of these makes the caller wait. A link is none of ours: `write_json` replaces it by a file.
    """
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):  # opening some devices does something
            return None
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except (OSError, ValueError):
        return None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_BYTES:
            return None
        got = b""
        while len(got) < n_bytes and (more := os.read(fd, n_bytes - len(got))):
            got += more
        return got
    except OSError:
        return None
    finally:
        os.close(fd)


def read_json(name: str) -> Any:
    """Return what `write_json` has kept under this name; None if nothing, or if it is damaged or no file of ours."""
    folder = cache_folder()
    text = read_start(folder / name, MOST_BYTES) if folder else None
    if text is None:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def write_json(name: str, value: Any) -> bool:
    """Keep a value under a name, which may begin with a folder's; readers see the old one or the new one.

    Return whether it is kept.
    """
    folder = cache_folder()
    if folder is None:
        return False
    path = folder / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=PARTIAL_PREFIX)
    except OSError:
        return False
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(value, file, separators=(",", ":"))
        os.replace(partial, path)
    except BaseException as error:  # a Ctrl-C, too, leaves nothing behind
        with contextlib.suppress(OSError):
            os.unlink(partial)
        if not isinstance(error, OSError):
            raise
        return False
    return True


@contextlib.contextmanager
def locked(patience_s: float) -> Iterator[bool]:
    """Keep out, meanwhile, other processes that ask the same way; yield False where one of them held on for all this time.

    Where there is no lock to be had, as on some remote file systems, nobody is kept out: the last writer counts.
    """
    folder = cache_folder()
    fd = None
    try:
        if folder is not None:
            with contextlib.suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
                fd = os.open(folder / _LOCK_NAME,
                             os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW, 0o600)
        yield fd is None or _lock(fd, time.monotonic() + patience_s)
    finally:
        if fd is not None:
            os.close(fd)


def _lock(fd: int, until: float) -> bool:
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            time.sleep(_LOCK_STEP_S)
        except OSError:
            return True
