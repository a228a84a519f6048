"""A kept conversation's file: what llama.cpp writes of a sequence, then the tokens, then a description and where that begins."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from gguf_pager.serve.sequences import Ids

VERSION = 1
_END = struct.Struct("<QI8s")
"""Where the tokens begin, how long the description is, and a mark: the last bytes of a file."""
_MARK = b"gpstate1"
_MOST_DESCRIPTION = 1 << 16
_PIECE_BYTES = 1 << 20

FOREIGN = "it is of another model, or of other settings"
"""Why a state cannot be used that another one may use."""


Stamp = tuple[int, int, int]
"""A file's inode, size and time: inodes are given to the next file as soon as they are free."""


@dataclass(slots=True)
class State:
    """A state on disk. `digest` tells whether at its path there is another one by now, `stamp` whether that is to be looked at."""

    path: Path
    ids: Ids
    digest: str
    stamp: Stamp

    @property
    def n_bytes(self) -> int:
        """How large its file is."""
        return self.stamp[1]


def stamp_of(status: os.stat_result) -> Stamp:
    """Return what changes when somebody writes to a file, or puts another one in its place."""
    return status.st_ino, status.st_size, status.st_mtime_ns


def is_locked(descriptor: int) -> bool:
    """Lock a file or a folder until it is closed; return False if another process has it. Where there are no locks, nobody has."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def digest_of(file: IO[bytes], n_bytes: int) -> str:
    """Return the digest of a file's first bytes."""
    digest, left = hashlib.blake2b(digest_size=16), n_bytes
    file.seek(0)
    while left > 0:
        piece = file.read(min(left, _PIECE_BYTES))
        if not piece:
            break
        digest.update(piece)
        left -= len(piece)
    return digest.hexdigest()


def finish(path: Path, ids: Ids, key: str) -> str:
    """Put tokens and description behind what llama.cpp has written; return the digest of all but the description."""
    with open(path, "r+b") as file:
        at = file.seek(0, os.SEEK_END)
        file.write(ids.astype("<i4").tobytes())
        end = file.tell()
        digest = digest_of(file, end)
        described = json.dumps({"version": VERSION, "key": key, "n_tokens": len(ids), "digest": digest}).encode()
        file.seek(end)
        file.write(described)
        file.write(_END.pack(at, len(described), _MARK))
        file.flush()
        os.fsync(file.fileno())
    return digest


def read_end(file: IO[bytes]) -> tuple[int, int, dict[str, Any]]:
    """Return where a state's tokens begin, where they end, and its description. ValueError where it is damaged."""
    size = file.seek(0, os.SEEK_END)
    if size < _END.size:
        raise ValueError
    file.seek(size - _END.size)
    at, n_described, mark = _END.unpack(file.read(_END.size))
    end = size - _END.size - n_described
    if mark != _MARK or n_described > _MOST_DESCRIPTION or not 0 < at <= end:
        raise ValueError
    file.seek(end)
    described = json.loads(file.read(n_described))
    return at, end, described if isinstance(described, dict) else {}


def read_state(path: Path, key: str) -> State | str:
    """Return a state, as its description has it, or why it cannot be used; its digest is compared when it is loaded."""
    try:
        with open(path, "rb") as file:
            at, end, described = read_end(file)
            file.seek(at)
            tokens, stamp = file.read(end - at), stamp_of(os.fstat(file.fileno()))
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    except (ValueError, RecursionError):
        return "it is damaged"
    if described.get("version") != VERSION:
        return "it is of another version"
    if described.get("key") != key:
        return FOREIGN
    if described.get("n_tokens") != len(tokens) // 4 or len(tokens) % 4:
        return "it is damaged"
    return State(path, np.frombuffer(tokens, "<i4").astype(np.intc), str(described.get("digest")), stamp)


def is_there(state: State) -> bool:
    """Return whether the file at a state's path says that it is this one."""
    try:
        with open(state.path, "rb") as file:
            return bool(read_end(file)[2].get("digest") == state.digest)
    except (OSError, ValueError, RecursionError):
        return False


def touch(state: State, now_ns: int) -> None:
    """Note in a state's file that it was used."""
    with contextlib.suppress(OSError):
        os.utime(state.path, ns=(now_ns, now_ns))
        state.stamp = (*state.stamp[:2], state.path.stat().st_mtime_ns)
