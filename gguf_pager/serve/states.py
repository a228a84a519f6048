"""Conversations on disk: a file each, so that a restart, or another conversation in between, costs no prompt a second time.

A file (see `state_files`) is written beside its place and renamed, so it is whole or not there. What is damaged, or of another model or
other settings, is left alone and said in the log.

Several servers may share a folder: each goes on with what the others have kept, and replaces a file only while it is the one that it
has loaded or written itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import stat
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from llama_cpp import llama_cpp as low

from gguf_pager.cache import PARTIAL_PREFIX
from gguf_pager.errors import PagerError
from gguf_pager.saved import state_key
from gguf_pager.serve.batcher import Batcher, Keeper
from gguf_pager.serve.sequences import Ids, Sequence, common_prefix
from gguf_pager.serve.state_files import (
    FOREIGN,
    Stamp,
    State,
    digest_of,
    finish,
    is_locked,
    is_there,
    read_end,
    read_state,
    stamp_of,
    touch,
)

log = logging.getLogger("gguf_pager")

SUFFIX = ".state"

LEAST_GAIN = 32
"""Tokens that a state on disk must save over what is in memory: to load one takes as long as to compute a few."""

LEAST_KEPT = 32
"""Tokens of a conversation that are worth a file."""

class States(Keeper):
    """Keeps the conversations of a batcher's sequences in a folder, up to so many bytes; who was not used for longest goes.

    Called in the batcher's thread.

    Raises:
        PagerError: the folder cannot be written to, or the model's file cannot be read any more.
    """

    def __init__(self, batcher: Batcher, folder: Path, most_bytes: int, *, foreign_level: int = logging.WARNING) -> None:
        """`foreign_level`: at which level the log says that there are conversations of other models; in some folders there always are."""
        self._batcher, self._folder, self._most_bytes = batcher, folder, most_bytes
        self._foreign_level = foreign_level
        key = state_key(batcher.llm)
        if key is None:
            raise PagerError(f"{batcher.llm.model_path} cannot be read any more: open the model again.")
        self._key = key
        self._states: list[State] = []
        self._of_sequence: dict[int, State] = {}
        self._refused: dict[Path, Stamp] = {}
        self._looked_ns = 0
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            self._clean()
            self._learn(self._found(), logging.WARNING)
        except OSError as error:
            raise PagerError(f"Conversations cannot be kept in {folder}: {error.strerror}. Name another --state-dir.") from None

    def _clean(self) -> None:
        """Remove what a process has left that was killed while it wrote; who still writes has locked his file."""
        for left in self._folder.glob(f"{PARTIAL_PREFIX}*{SUFFIX}"):
            with contextlib.suppress(FileNotFoundError), open(left, "rb") as file:
                if is_locked(file.fileno()):
                    left.unlink()

    def _found(self) -> dict[Path, os.stat_result]:
        """Return the files that may be states, who was not used for longest first."""
        found = {}
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if entry.name.endswith(SUFFIX) and not entry.name.startswith(PARTIAL_PREFIX):
                    with contextlib.suppress(FileNotFoundError):
                        status = entry.stat()
                        if stat.S_ISREG(status.st_mode):  # to open something else might wait forever
                            found[self._folder / entry.name] = status
        return dict(sorted(found.items(), key=lambda item: item[1].st_mtime_ns))

    def _learn(self, found: dict[Path, os.stat_result], level: int) -> None:
        """Take in what is new in the folder, and forget what is not there any more."""
        known = {state.path: state for state in self._states if state.path in found}
        self._refused = {path: stamp for path, stamp in self._refused.items() if path in found}
        now_ns, n_foreign = time.time_ns(), 0
        for path, status in found.items():
            old = known.get(path)
            if stamp_of(status) == (self._refused.get(path) if old is None else old.stamp):
                continue
            state = read_state(path, self._key)
            if isinstance(state, str):
                if state == FOREIGN:
                    n_foreign += 1
                else:
                    log.log(level, "the conversation in %s is left alone: %s", path, state)
                self._refused[path] = stamp_of(status)
                known.pop(path, None)
                continue
            if status.st_mtime_ns > now_ns:  # the clock was ahead: it would count as the newest until then
                now_ns += 1
                touch(state, now_ns)
            if old is not None and state.digest == old.digest:
                old.stamp = state.stamp
            else:
                known[path] = state
        if n_foreign:
            log.log(min(level, self._foreign_level), "conversations of other models or settings in %s, left alone: %d", self._folder, n_foreign)
        self._states = list(known.values())

    def _look(self) -> None:
        """See what other servers have done in the folder since it was looked at."""
        try:
            changed_ns = self._folder.stat().st_mtime_ns
            if changed_ns != self._looked_ns:
                self._learn(self._found(), logging.INFO)
                self._looked_ns = changed_ns
        except OSError:  # it was removed, with all that was kept
            self._states.clear()
            self._of_sequence.clear()
            for sequence in self._batcher.sequences:
                sequence.n_saved = 0

    @property
    def n_states(self) -> int:
        """How many conversations there are on disk that this model can go on with."""
        return len(self._states)

    def bring_back(self, sequence: Sequence, prompt: Ids) -> None:
        """Load the state that has most of a prompt, where that is worth it."""
        most = len(prompt) - 1
        known = min(most, common_prefix(sequence.held, prompt))
        self._look()
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
        is_loaded = is_same = False
        with contextlib.suppress(OSError, ValueError, RecursionError), open(state.path, "rb") as file:
            _, end, described = read_end(file)
            is_same = described.get("digest") == state.digest
            is_loaded = is_same and digest_of(file, end) == state.digest and self._read_into(sequence, state)
            # llama.cpp opens it by its name. No other file has the inode of one that is open.
            is_same = is_same and os.path.samestat(os.fstat(file.fileno()), state.path.stat())
        if not (is_loaded and is_same):
            if is_same:
                log.warning("the conversation in %s is damaged, and left alone", state.path)
                self._refused[state.path] = state.stamp
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
        self._look()
        if sequence.n_ids < LEAST_KEPT or sequence.n_ids == sequence.n_saved:
            return
        path = self._folder / f"{PARTIAL_PREFIX}{uuid.uuid4().hex}{SUFFIX}"
        ids = sequence.held.copy()
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._new_file(path):
                digest = self._write(sequence, path, ids)
                state = self._put(State(path, ids, digest, stamp_of(path.stat())), self._of_sequence.get(sequence.number))
        except OSError as error:
            log.warning("a conversation cannot be kept in %s: %s", self._folder, error.strerror)
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            return
        sequence.n_saved = sequence.n_ids
        self._states = [other for other in self._states if other.path != state.path] + [state]
        self._of_sequence[sequence.number] = state
        self._forget_oldest()

    @contextlib.contextmanager
    def _new_file(self, path: Path) -> Iterator[None]:
        """Make a file, locked: another server that begins meanwhile does not take it for a left one."""
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        try:
            is_locked(descriptor)
            yield
        finally:
            os.close(descriptor)

    def _put(self, new: State, old: State | None) -> State:
        """Give a state its name: that of the one it replaces, if that is still there, or else one of its own."""
        place = self._folder / f"{uuid.uuid4().hex}{SUFFIX}"
        descriptor = os.open(self._folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if old is not None and is_locked(descriptor) and is_there(old):
                place = old.path
            new.path.replace(place)
        finally:
            os.close(descriptor)
        return replace(new, path=place)

    def _write(self, sequence: Sequence, path: Path, ids: Ids) -> str:
        context, room = self._batcher.llm.ctx, (low.llama_token * len(ids))(*ids.tolist())
        system = os.statvfs(self._folder)
        if system.f_bavail * system.f_frsize < int(low.llama_state_seq_get_size(context, sequence.number)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        n_written = int(low.llama_state_seq_save_file(context, os.fsencode(path), sequence.number, room, len(ids)))
        if n_written == 0 or path.stat().st_size != n_written:  # it does not look whether its last bytes found room
            raise OSError(errno.EIO, "llama.cpp could not write it")
        return finish(path, ids, self._key)

    def _use(self, state: State) -> None:
        self._states = [other for other in self._states if other is not state] + [state]
        touch(state, time.time_ns())

    def _forget_oldest(self) -> None:
        total = sum(state.n_bytes for state in self._states)
        while total > self._most_bytes and self._states:
            oldest = self._states.pop(0)
            total -= oldest.n_bytes
            if is_there(oldest):
                with contextlib.suppress(OSError):
                    oldest.path.unlink()
