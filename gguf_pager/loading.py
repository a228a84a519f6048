"""Loading a model that is to be paged: what is decided before llama.cpp sees the file, and what is done right after."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama_cpp import llama_cpp as low

from gguf_pager import _native, budget, device, engine, probe, residency
from gguf_pager.errors import printable
from gguf_pager.layout import Layout, explain_refusal, read_layout
from gguf_pager.metadata import Override
from gguf_pager.mirror import find_mirrors
from gguf_pager.pager import Pager
from gguf_pager.residency import FileIdentity, Residency
from gguf_pager.sizing import Request, check_room, may_be_enough

log = logging.getLogger("gguf_pager")


@dataclass(frozen=True, slots=True)
class Opened:
    """What became of a file: llama.cpp's model (None: it refused), and its pager; without one it runs as stock."""

    address: int | None
    pager: Pager | None = None
    identities: list[FileIdentity | None] = field(default_factory=list)
    residency: Residency | None = None


class Loader:
    """Loads models through llama_cpp's own functions, called by `call(name, *arguments)`; one at a time."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def load(self, path_model: bytes, params: Any, request: Request) -> Opened:
        """Load a model; without reading its experts, when it is to be paged. `request.reason` tells why it is not.

        Raises:
            LayoutError: the file is no model that can be paged.
            BudgetError, PagerIOError: see `sizing.check_room` and `residency.keep_dense`.
        """
        path = Path(os.fsdecode(path_model))
        layout = read_layout(path, _read_overrides(params))
        reason = _reason_to_step_aside(layout, request)
        request.reason = reason
        if reason is not None:
            log.info("%s runs as stock llama.cpp: %s", printable(path), reason)
            return Opened(self._call("llama_model_load_from_file", path_model, params))
        mirrors = find_mirrors(layout, request.options.mirror, is_any_model=request.is_any_model)
        options = device.fill(layout, request.options)
        pager = Pager(layout, options, mirrors)
        check_room(pager, request)
        identities = [residency.identify(file) for file in pager.paths]
        others = residency.files_mappings(layout)
        params = type(params).from_buffer_copy(params)
        params.use_extra_bufts = False  # repacking would copy the experts into ordinary memory
        params.load_mode = low.LLAMA_LOAD_MODE_MMAP  # LoRA and use_mlock would read or lock the whole file
        address = self._load_unread(path_model, params, layout)
        if not address:
            contradiction = explain_refusal(layout)
            if contradiction is not None:
                raise contradiction
            return Opened(None)
        try:
            # A budget that cannot be kept is refused by llama_init_from_model, which knows all of what is needed.
            method = request.options.lock_dense if may_be_enough(layout, pager, request) else "off"
            kept = residency.keep_dense(layout, method, others)
        except BaseException:
            self._call("llama_model_free", address)
            raise
        return Opened(address, pager, identities, kept)

    def _load_unread(self, path_model: bytes, params: Any, layout: Layout) -> int | None:
        try:
            _native.lazy_load_begin(str(engine.load().llama_library))
        except OSError as error:
            log.info("The whole model is read once while loading, because this libllama looks unfamiliar: %s", error)
            address = self._call("llama_model_load_from_file", path_model, params)
            if address:
                residency.release_experts(layout)
            return int(address) if address else None
        try:
            address = self._call("llama_model_load_from_file", path_model, params)
        finally:
            _native.lazy_load_end()
        return int(address) if address else None


def can_take_tokens_back(model: Any) -> bool:
    """Return whether a model can forget its last tokens: one with a recurrent state cannot, of that there is the last only."""
    return not low.llama_model_is_recurrent(model) and not low.llama_model_is_hybrid(model)


def _reason_to_step_aside(layout: Layout, request: Request) -> str | None:
    if not layout.layers:
        return "it has no experts to page"
    if request.budget.kind == "auto":
        memory = probe.memory()
        spare = budget.auto_budget_bytes(memory.available_bytes, memory.total_bytes)
        if budget.fits_whole(layout.tensor_bytes, spare):
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
