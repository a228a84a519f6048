"""Loading a model that is to be paged: what is decided before llama.cpp sees the file, and what is done right after."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_cpp import llama_cpp as low

from gguf_pager import _native
from gguf_pager.deferral import Deferral
from gguf_pager.disk import device
from gguf_pager.errors import LayoutError, PagerIOError, printable
from gguf_pager.files import ModelFiles, check_can_be_mapped
from gguf_pager.fingerprint import Fingerprint, Watch
from gguf_pager.llama_log import llama_log, reason_of
from gguf_pager.memory import budget, probe, residency
from gguf_pager.memory.residency import Mapping, Residency, find_mappings, sort_mappings, without
from gguf_pager.memory.sizing import Request, check_room, may_be_enough
from gguf_pager.model import engine
from gguf_pager.model.layout import Layout, explain_refusal, open_layout
from gguf_pager.model.metadata import Override
from gguf_pager.model.mirror import find_mirrors
from gguf_pager.pager import Pager

_MOST_TRIES = 5
"""A file that is replaced by another leaves its own times changed; more often than this nobody replaces it for good."""

log = logging.getLogger("gguf_pager")


@dataclass(frozen=True, slots=True)
class Opened:
    """What became of a file: llama.cpp's model and its pager; without one it runs as stock."""

    address: int
    pager: Pager | None = None
    watch: Watch | None = None
    residency: Residency | None = None
    keep_dense: Callable[[], Residency] = lambda: residency.LEFT
    """For a model whose budget seemed too small for them."""


class Loader:
    """Loads models through llama_cpp's own functions, called by `call(name, *arguments)`; one at a time."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def load(self, named: bytes | list[bytes], params: Any, request: Request) -> Opened:
        """Load a model; without reading its experts, when it is to be paged. `request.reason` tells why it is not.

        Args:
            named: the model's first file, or all of them.
            params: llama_model_params.
            request: what is wanted.

        Raises:
            LayoutError: the file is no model that can be paged, or llama.cpp refuses it.
            BudgetError, PagerIOError, EngineError: see `sizing.check_room` and `residency.keep_dense`.
        """
        names = named if isinstance(named, list) else [named]
        with contextlib.ExitStack() as stack:
            files, layout, fingerprint = _open_settled([Path(os.fsdecode(name)) for name in names], _read_overrides(params), stack)
            path = layout.paths[0]
            reason = _reason_to_step_aside(layout, request)
            request.reason = reason
            if reason is not None:
                log.info("%s runs as stock llama.cpp: %s", printable(path), reason)
                try:
                    return Opened(self._load(layout, *_call_for(names, params)))
                except LayoutError:
                    if params.load_mode in _MAPPING_MODES:
                        for file in files:
                            check_can_be_mapped(file)
                    raise
            for file in files:
                check_can_be_mapped(file)
            mirrors = find_mirrors(layout, files, request.options.mirror, is_any_model=request.is_any_model)
            for mirror in mirrors:
                stack.enter_context(mirror)
            options = device.fill(layout, request.options, files)
            pager = Pager(layout, options, mirrors, files)
            check_room(pager, request)
            opened = self._load_paged(pager, files, mirrors, fingerprint, params, request)
            stack.pop_all()
            return opened

    def _load_paged(self, pager: Pager, files: ModelFiles, mirrors: Sequence[ModelFiles], fingerprint: Fingerprint,
                    params: Any, request: Request) -> Opened:
        layout = pager.layout
        params = type(params).from_buffer_copy(params)
        params.use_extra_bufts = False  # repacking would copy the experts into ordinary memory
        params.load_mode = low.LLAMA_LOAD_MODE_MMAP  # LoRA and use_mlock would read or lock the whole file
        address, mappings = self._load_unread(params, layout, files)
        try:
            others = fingerprint.jobs(files)
            keep = functools.partial(residency.keep_dense, layout, files, mappings, request.options.lock_dense,
                                     is_direct=pager.is_direct)
            # A budget that cannot be kept is refused by llama_init_from_model, which knows all of what is needed.
            if may_be_enough(layout, pager, request):
                kept = keep(others=others)
            else:
                for job in others:
                    job()
                kept = residency.LEFT
            watch = Watch(pager, (files, *mirrors), fingerprint, kept.copies)
            change = watch.find_change()
            if change is not None:
                raise pager.failure_error(change)
        except BaseException:
            self._call("llama_model_free", address)
            raise
        return Opened(address, pager, watch, kept, keep)

    def _load_unread(self, params: Any, layout: Layout, files: ModelFiles) -> tuple[int, list[list[Mapping]]]:
        """Return llama.cpp's model, and where it has mapped each file."""
        call = _call_for([os.fsencode(file.reopen_path) for file in files], params)
        try:
            _native.lazy_load_begin(str(engine.load().llama_library))
        except OSError as error:
            log.info("The whole model is read once while loading, because this libllama looks unfamiliar: %s", error)
            before = [find_mappings(file) for file in files]
            address = self._load(layout, *call, files=files)
            residency.release_experts(layout, files)
            return address, [without(find_mappings(file), known) for file, known in zip(files, before, strict=True)]
        seen = []
        try:
            address = self._load(layout, *call, files=files)
        finally:
            seen = _native.lazy_load_end()
        return address, sort_mappings(files, seen)

    def _load(self, layout: Layout, name: str, *arguments: Any, files: ModelFiles | None = None) -> int:
        names = {file.reopen_path: str(file.path) for file in files or () if not file.is_known_by_name}
        *rest, params = arguments
        deferral, params = Deferral(), type(params).from_buffer_copy(params)
        if not params.progress_callback:
            params.progress_callback = ctypes.cast(deferral.progress, type(params.progress_callback))
        with llama_log.listening(names) as listener:
            address = deferral.call(self._call, name, *rest, params, undo=self._free)
        if listener.caught is not None:
            self._free(address)
            raise listener.caught
        if not address:
            path, reason = layout.paths[0], reason_of(listener.lines)
            contradiction = explain_refusal(layout, reason or "")
            if contradiction is not None:
                raise contradiction
            raise LayoutError(f"llama.cpp refuses {path}: {reason.rstrip('.')}." if reason else
                              f"llama.cpp refuses {path} and gives no reason here: verbose=True shows what it says.")
        return int(address)


    def _free(self, address: int | None) -> None:
        if address:
            self._call("llama_model_free", address)


_MAPPING_MODES = (low.LLAMA_LOAD_MODE_AUTO, low.LLAMA_LOAD_MODE_MMAP, low.LLAMA_LOAD_MODE_MMAP_MLOCK)


def _call_for(paths: Sequence[bytes], params: Any) -> tuple[Any, ...]:
    """Return the name of llama.cpp's function that loads these files, and its arguments."""
    if len(paths) == 1:
        return "llama_model_load_from_file", paths[0], params
    return "llama_model_load_from_splits", (ctypes.c_char_p * len(paths))(*paths), len(paths), params


def _open_settled(paths: Sequence[Path], overrides: dict[str, Override], stack: contextlib.ExitStack,
                  ) -> tuple[ModelFiles, Layout, Fingerprint]:
    """Open a model's files and read their headers, again if they change meanwhile.

    Raises:
        PagerIOError: they keep changing.
    """
    for _ in range(_MOST_TRIES):
        files = stack.enter_context(ModelFiles())
        layout = open_layout(paths, files, overrides)
        fingerprint = Fingerprint.of(layout, files)
        if all(file.status() == file.identity for file in files):
            return files, layout, fingerprint
        files.close()
    raise PagerIOError(f"{paths[0]} changes while it is being opened. Open it again when it is complete.", errno=errno.ESTALE,
                       path=str(paths[0]), offset_bytes=0)


def can_take_tokens_back(model: Any) -> bool:
    """Return whether a model can forget its last tokens: one with a recurrent state cannot, of that there is the last only."""
    return not low.llama_model_is_recurrent(model) and not low.llama_model_is_hybrid(model)


def _reason_to_step_aside(layout: Layout, request: Request) -> str | None:
    if not layout.layers:
        return "it has no experts to page"
    if request.budget.kind == "auto":
        memory = probe.memory()
        if budget.fits_whole(layout.tensor_bytes, memory.available_bytes, memory.total_bytes):
            spare = budget.whole_spare_bytes(memory.available_bytes, memory.total_bytes)
            return (f"all {budget.format_bytes(layout.tensor_bytes)} of it fit into the "
                    f"{budget.format_bytes(spare)} of RAM that can be spared")
    return None


def _read_overrides(params: Any) -> dict[str, Override]:
    """Return what the caller sets over the metadata, which llama.cpp is handed as an array that ends with an empty key."""
    found: dict[str, Override] = {}
    at = 0
    while params.kv_overrides and params.kv_overrides[at].key:
        entry = params.kv_overrides[at]
        value: Override
        if entry.tag == low.LLAMA_KV_OVERRIDE_TYPE_INT:
            value = int(entry.value.val_i64)
        elif entry.tag == low.LLAMA_KV_OVERRIDE_TYPE_FLOAT:
            value = float(entry.value.val_f64)
        elif entry.tag == low.LLAMA_KV_OVERRIDE_TYPE_BOOL:
            value = bool(entry.value.val_bool)
        else:
            value = entry.value.val_str.decode("utf-8", "replace")
        found.setdefault(entry.key.decode("utf-8", "replace"), value)  # of a key that is there twice llama.cpp takes the first
        at += 1
    return found
