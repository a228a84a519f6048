"""Conversations on disk: a file each, so that a restart, or another conversation in between, costs no prompt a second time.

A file is what llama.cpp writes of a sequence, then the tokens, then a description and where that begins. It is written beside its
place and renamed, so it is whole or not there. What is damaged, or of another model or other settings, is left alone and said in the log.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import logging
import os
import struct
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import llama_cpp as low

from gguf_pager.cache import PARTIAL_PREFIX
from gguf_pager.errors import PagerError
from gguf_pager.llama import Llama
from gguf_pager.model import engine, metadata
from gguf_pager.serve.batcher import Batcher, Keeper
from gguf_pager.serve.sequences import Ids, Sequence, common_prefix

log = logging.getLogger("gguf_pager")

VERSION = 1
SUFFIX = ".state"
_END = struct.Struct("<QI8s")
"""Where the tokens begin, how long the description is, and a mark: the last bytes of a file."""
_MARK = b"gpstate1"
_MOST_DESCRIPTION = 1 << 16

LEAST_GAIN = 32
"""Tokens that a state on disk must save over what is in memory: to load one takes as long as to compute a few."""

LEAST_KEPT = 32
"""Tokens of a conversation that are worth a file."""

_SAMPLE_BYTES = 1024
_PIECE_BYTES = 1 << 20


@dataclass(slots=True)
class State:
    """A state on disk."""

    path: Path
    ids: Ids
    n_bytes: int


# ---- files ----------------------------------------------------------------------------------------------------------

def _digest(path: Path, n_bytes: int) -> str:
    digest, left = hashlib.blake2b(digest_size=16), n_bytes
    with open(path, "rb") as file:
        while left > 0:
            piece = file.read(min(left, _PIECE_BYTES))
            if not piece:
                break
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest()


def _finish(path: Path, ids: Ids, key: str) -> None:
    """Put tokens and description behind what llama.cpp has written."""
    with open(path, "r+b") as file:
        at = file.seek(0, os.SEEK_END)
        file.write(ids.astype("<i4").tobytes())
        end = file.tell()
        file.flush()
        described = json.dumps({"version": VERSION, "key": key, "n_tokens": len(ids), "digest": _digest(path, end)}).encode()
        file.write(described)
        file.write(_END.pack(at, len(described), _MARK))
        file.flush()
        os.fsync(file.fileno())


def read_state(path: Path, key: str) -> State | str:
    """Return a state, as its description has it, or why it cannot be used; its digest is compared when it is loaded."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _END.size))
            at, n_described, mark = _END.unpack(file.read(_END.size))
            end = size - _END.size - n_described
            if mark != _MARK or n_described > _MOST_DESCRIPTION or not 0 < at <= end:
                return "it is damaged"
            file.seek(at)
            tokens, described = file.read(end - at), json.loads(file.read(n_described))
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    except (ValueError, struct.error, RecursionError):
        return "it is damaged"
    if not isinstance(described, dict) or described.get("version") != VERSION:
        return "it is of another version"
    if described.get("key") != key:
        return "it is of another model, or of other settings"
    if described.get("n_tokens") != len(tokens) // 4 or len(tokens) % 4:
        return "it is damaged"
    return State(path, np.frombuffer(tokens, "<i4").astype(np.intc), size)


def is_whole(path: Path) -> bool:
    """Return whether a state is, byte by byte, what was written."""
    try:
        with open(path, "rb") as file:
            size = file.seek(-_END.size, os.SEEK_END) + _END.size
            _, n_described, _ = _END.unpack(file.read(_END.size))
            end = size - _END.size - n_described
            file.seek(end)
            described = json.loads(file.read(n_described))
        return bool(described["digest"] == _digest(path, end))
    except (OSError, ValueError, KeyError, TypeError, struct.error):
        return False


def key_of(llm: Llama) -> str:
    """Return what a state depends on: the model's header and samples of each of its tensors, the engine, what its context was given.

    llama.cpp does not tell models of the same shape apart.
    """
    digest = hashlib.blake2b(digest_size=16)
    first = engine.read_header(Path(llm.model_path))
    for path in metadata.find_parts(first):
        with open(path, "rb") as file:
            for tensor in engine.read_header(path).tensors:
                digest.update(f"{tensor.name} {tensor.type} {tensor.ne}".encode())
                digest.update(os.pread(file.fileno(), min(_SAMPLE_BYTES, tensor.n_bytes), tensor.offset_bytes + tensor.n_bytes // 2))
    params = llm.context_params
    settings: dict[str, Any] = {name: getattr(params, name) for name in (
        "type_k", "type_v", "flash_attn_type", "swa_full", "rope_scaling_type", "rope_freq_base", "rope_freq_scale", "yarn_ext_factor",
        "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow", "yarn_orig_ctx")}
    stretched = any(".rope.scaling." in name for name in llm.metadata)
    settings |= {"engine": llama_cpp.__version__, "lora": (llm.lora_path, llm.lora_scale),
                 "metadata": sorted(llm.metadata.items()), "n_ctx": int(llm.n_ctx()) if stretched else None}
    digest.update(json.dumps(settings, default=repr).encode())
    return digest.hexdigest()


# ---- keeping --------------------------------------------------------------------------------------------------------

class States(Keeper):
    """Keeps the conversations of a batcher's sequences in a folder, up to so many bytes; who was not used for longest goes.

    Called in the batcher's thread.

    Raises:
        PagerError: the folder cannot be written to.
    """

    def __init__(self, batcher: Batcher, folder: Path, most_bytes: int, key: str | None = None) -> None:
        """`key` is that of the batcher's model, where somebody has it already."""
        self._batcher, self._folder, self._most_bytes = batcher, folder, most_bytes
        self._key = key or key_of(batcher.llm)
        self._states: list[State] = []
        self._of_sequence: dict[int, State] = {}
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            found = sorted(folder.glob(f"*{SUFFIX}"), key=lambda path: path.stat().st_mtime)
            for left in folder.glob(f"{PARTIAL_PREFIX}*{SUFFIX}"):
                left.unlink(missing_ok=True)
        except OSError as error:
            raise PagerError(f"Conversations cannot be kept in {folder}: {error.strerror}. Name another --state-dir.") from None
        for path in found:
            if path.name.startswith(PARTIAL_PREFIX):
                continue
            state = read_state(path, self._key)
            if isinstance(state, State):
                self._states.append(state)
            else:
                log.warning("the conversation in %s is left alone: %s", path, state)

    @property
    def n_states(self) -> int:
        """How many conversations there are on disk that this model can go on with."""
        return len(self._states)

    def bring_back(self, sequence: Sequence, prompt: Ids) -> None:
        """Load the state that has most of a prompt, where that is worth it."""
        most = len(prompt) - 1
        known = min(most, common_prefix(sequence.held, prompt))
        while self._states:
            best = max(self._states, key=lambda state: self._gain(state, prompt))
            gain = self._gain(best, prompt)
            if gain < known + LEAST_GAIN:
                return
            if self._load(sequence, best):
                return
            known = 0

    def _gain(self, state: State, prompt: Ids) -> int:
        common = min(common_prefix(state.ids, prompt), len(prompt) - 1)
        can_be_cut = not self._batcher.memory.is_recurrent or common == len(state.ids)
        return common if can_be_cut and len(state.ids) < self._batcher.n_ctx else 0

    def _load(self, sequence: Sequence, state: State) -> bool:
        self._batcher.memory.cut(sequence, 0)
        self._of_sequence.pop(sequence.number, None)
        is_loaded = is_whole(state.path) and self._read_into(sequence, state)
        if not is_loaded:
            log.warning("the conversation in %s is damaged, and left alone", state.path)
            self._states.remove(state)
            self._batcher.memory.clear(sequence)  # also what was loaded before it was found to be wrong
            return False
        sequence.n_ids = 0
        sequence.note(state.ids.tolist())
        sequence.n_saved = sequence.n_ids
        self._of_sequence[sequence.number] = state
        self._use(state)
        return True

    def _read_into(self, sequence: Sequence, state: State) -> bool:
        room, n_read = (low.llama_token * len(state.ids))(), ctypes.c_size_t()
        is_read = low.llama_state_seq_load_file(self._batcher.llm.ctx, os.fsencode(state.path), sequence.number, room,
                                                len(state.ids), ctypes.byref(n_read))
        # Another server with the same folder may have put something else there since it was looked at.
        return bool(is_read) and n_read.value == len(state.ids) and np.array_equal(np.frombuffer(room, np.intc), state.ids)

    def note_idle(self) -> None:
        """Write what has grown since it was written, when nobody waits for anything."""
        for sequence in self._batcher.sequences:
            self._save(sequence)

    def note_loss(self, sequence: Sequence, n_kept: int) -> None:
        """Write a conversation that gives way to another one; what is only gone on with is not lost."""
        if n_kept * 2 <= sequence.n_ids:
            self._save(sequence)
            self._of_sequence.pop(sequence.number, None)

    def close(self) -> None:
        """Write what is not written yet."""
        self.note_idle()

    def _save(self, sequence: Sequence) -> None:
        if sequence.n_ids < LEAST_KEPT or sequence.n_ids == sequence.n_saved:
            return
        path = self._folder / f"{PARTIAL_PREFIX}{uuid.uuid4().hex}{SUFFIX}"
        ids = sequence.held.copy()
        try:
            if not self._write(sequence, path, ids):
                raise OSError(errno.EIO, "llama.cpp could not write it")
            old = self._of_sequence.get(sequence.number)
            place = old.path if old is not None else self._folder / f"{uuid.uuid4().hex}{SUFFIX}"
            os.replace(path, place)
            state = State(place, ids, place.stat().st_size)
        except OSError as error:
            log.warning("a conversation cannot be kept in %s: %s", self._folder, error.strerror)
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            return
        sequence.n_saved = sequence.n_ids
        self._states = [other for other in self._states if other.path != place] + [state]
        self._of_sequence[sequence.number] = state
        self._forget_oldest()

    def _write(self, sequence: Sequence, path: Path, ids: Ids) -> bool:
        room = (low.llama_token * len(ids))(*ids.tolist())
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        os.close(descriptor)
        n_written = int(low.llama_state_seq_save_file(self._batcher.llm.ctx, os.fsencode(path), sequence.number, room, len(ids)))
        if n_written == 0 or path.stat().st_size != n_written:  # it does not look whether its last bytes found room
            return False
        _finish(path, ids, self._key)
        return True

    def _use(self, state: State) -> None:
        self._states = [other for other in self._states if other is not state] + [state]
        with contextlib.suppress(OSError):
            os.utime(state.path)

    def _forget_oldest(self) -> None:
        total = sum(state.n_bytes for state in self._states)
        while total > self._most_bytes and self._states:
            oldest = self._states.pop(0)
            total -= oldest.n_bytes
            with contextlib.suppress(OSError):
                oldest.path.unlink()
