"""A model is what was opened: whatever becomes of its name, and on whatever disk it lies."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import make_zoo
import numpy as np
import pytest
from conftest import ARGUMENTS, Factory, Logits, evaluate, footprint_of, settled_footprint_of, some_tokens
from llama_cpp import _logger
from llama_cpp import llama_cpp as low
from test_install import decode

import gguf_pager
from gguf_pager import LayoutError, PagerIOError, _native, hooks, llama_log, loading
from gguf_pager.files import OpenedFile
from gguf_pager.fingerprint import Fingerprint
from gguf_pager.memory import residency
from gguf_pager.model import engine

Model = Callable[..., Path]

N_TOKENS = 12


def open_paged(path: Path | str, budget: str = "min", **arguments: Any) -> gguf_pager.Llama:
    return gguf_pager.Llama(str(path), budget=budget, **ARGUMENTS | {"logits_all": True, "n_ubatch": 1} | arguments)


@pytest.fixture
def model(zoo_model: Model, tmp_path: Path) -> Path:
    """One of one's own, in a folder of its own."""
    (tmp_path / "models").mkdir()
    return Path(shutil.copy(zoo_model("qwen3moe"), tmp_path / "models" / "model.gguf"))


@pytest.fixture
def expected(zoo_model: Model, stock: Factory) -> Logits:
    return evaluate(stock(zoo_model("qwen3moe"), logits_all=True, n_ubatch=1), some_tokens(N_TOKENS))


# ---- names ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("damage", ("dense", "cut"))
@pytest.mark.parametrize("move", ("chdir", "folder", "file"))
def test_changed_file_is_found_wherever_its_name_went(
    model: Path, expected: Logits, monkeypatch: pytest.MonkeyPatch, move: str, damage: str
) -> None:
    tokens = some_tokens(N_TOKENS)
    monkeypatch.chdir(model.parent)
    llm = open_paged("model.gguf")
    assert (evaluate(llm, tokens[:6]) == expected[:6]).all()
    now = model
    if move == "chdir":
        monkeypatch.chdir("/")
    elif move == "folder":
        now = model.parent.rename(model.parent.with_name("renamed")) / model.name
    else:
        now = model.rename(model.with_name("renamed.gguf"))
    assert (evaluate(llm, tokens[6:9]) == expected[6:9]).all(), "and goes on until then"
    if damage == "cut":
        os.truncate(now, now.stat().st_size - 4096)
    else:
        change_bytes(now, "output_norm.weight")
    with pytest.raises(PagerIOError) as raised:
        llm.eval(tokens[9:])
    assert raised.value.errno == (errno.ENODATA if damage == "cut" else errno.ESTALE)
    assert raised.value.path == "model.gguf" and str(raised.value).endswith("Open it again.")
    llm.close()


def change_bytes(path: Path, tensor: str) -> None:
    found = next(each for each in engine.read_header(path).tensors if each.name == tensor)
    with open(path, "r+b") as file:
        file.seek(found.offset_bytes)
        old = file.read(found.n_bytes)
        file.seek(found.offset_bytes)
        file.write(bytes(byte ^ 1 for byte in old))


def test_context_can_be_made_after_chdir(model: Path, expected: Logits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)
    with gguf_pager.install(budget="min"):
        params = low.llama_model_default_params()
        address = low.llama_model_load_from_file(b"model.gguf", params)
        monkeypatch.chdir("/")
        try:
            context_params = low.llama_context_default_params()
            context_params.n_ctx, context_params.n_threads, context_params.n_threads_batch = 128, 1, 1
            context_params.n_batch = context_params.n_ubatch = 64
            context_params.flash_attn_type = low.LLAMA_FLASH_ATTN_TYPE_DISABLED
            context = low.llama_init_from_model(address, context_params)
            try:
                rows = [decode(address, context, [token], i) for i, token in enumerate(some_tokens(N_TOKENS))]
                assert (np.concatenate(rows) == expected).all()
            finally:
                low.llama_free(context)
        finally:
            low.llama_model_free(address)


STAGES: dict[str, tuple[Any, str]] = {
    "header": (engine, "read_header"), "digest": (Fingerprint, "of"), "mapping": (loading, "check_can_be_mapped"),
    "mirrors": (loading, "find_mirrors"), "measuring": (loading.device, "fill"), "pager": (loading, "Pager"),
    "load": (_native, "lazy_load_begin"), "loaded": (_native, "lazy_load_end"), "dense": (residency, "keep_dense"),
    "watch": (loading, "Watch"), "slots": (hooks, "open_or_shrink"),
}


@pytest.mark.parametrize("parts", (1, 3))
@pytest.mark.parametrize("stage", STAGES)
def test_file_replaced_at_any_stage_of_opening_stays_the_one_that_was_opened(
    zoo_model: Model, stock: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, parts: int
) -> None:
    """By the same architecture with another header and other weights: offsets of one are wrong in the other."""
    first, others = tmp_path / "a", tmp_path / "b"
    first.mkdir(), others.mkdir()
    make_zoo.make("qwen3moe", others / "whole.gguf", file_type="q8_0")
    if parts == 1:
        path = Path(shutil.copy(zoo_model("qwen3moe"), first / "model.gguf"))
        (others / "whole.gguf").rename(others / "model.gguf")
    else:
        path = make_zoo.make_split(zoo_model("qwen3moe"), first, parts)
        make_zoo.make_split(others / "whole.gguf", others, parts)
        (others / "whole.gguf").unlink()
    tokens = some_tokens(N_TOKENS)
    old = evaluate(stock(zoo_model("qwen3moe"), logits_all=True, n_ubatch=1), tokens)
    owner, name = STAGES[stage]
    original, n_swaps = getattr(owner, name), 0

    def swap_first(*arguments: Any, **named: Any) -> Any:
        nonlocal n_swaps
        for other, own in zip(sorted(others.iterdir()), sorted(first.iterdir()), strict=False):
            n_swaps += 1
            other.replace(own)
        return original(*arguments, **named)

    monkeypatch.setattr(owner, name, swap_first)
    llm = open_paged(path)
    monkeypatch.undo()
    assert n_swaps == parts
    new = evaluate(stock(path, logits_all=True, n_ubatch=1), tokens)
    found = evaluate(llm, tokens)
    llm.close()
    assert (old != new).any() and ((found == old).all() or (found == new).all())
    if stage not in ("header", "digest"):  # until then opening begins anew
        assert (found == old).all()


RACE = """
import os, shutil, sys, threading
from pathlib import Path
import gguf_pager
folder = Path(sys.argv[1])
path, is_over, n_swaps = folder / "model.gguf", False, 0
def swap():
    global n_swaps
    while not is_over:
        shutil.copy(folder / ("a.gguf" if n_swaps % 2 else "b.gguf"), folder / "next")
        os.replace(folder / "next", path)
        n_swaps += 1
thread = threading.Thread(target=swap)
thread.start()
try:
    for _ in range(12):
        try:
            llm = gguf_pager.Llama(str(path), budget="min", n_ctx=64, n_threads=1, n_threads_batch=1, verbose=False,
                                   logits_all=True, n_ubatch=1)
        except gguf_pager.PagerError as error:
            print("error", type(error).__name__)
            continue
        try:
            llm.eval([5, 6, 7])
            print("logits", llm.scores[:3].tobytes().hex()[:512])
        finally:
            llm.close()
finally:
    is_over = True
    thread.join()
print("swaps", n_swaps)
"""


def test_file_replaced_over_and_over_while_it_is_opened_is_one_or_the_other(
    zoo_model: Model, stock: Factory, tmp_path: Path
) -> None:
    shutil.copy(zoo_model("qwen3moe"), tmp_path / "a.gguf")
    make_zoo.make("qwen3moe", tmp_path / "b.gguf", file_type="q8_0")
    shutil.copy(tmp_path / "a.gguf", tmp_path / "model.gguf")
    right = {evaluate(stock(tmp_path / name, logits_all=True, n_ubatch=1, n_ctx=64), [5, 6, 7]).tobytes().hex()[:512]
             for name in ("a.gguf", "b.gguf")}
    done = subprocess.run([sys.executable, "-c", RACE, str(tmp_path)], capture_output=True, text=True, timeout=120,
                          check=False, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert {value for kind, value in lines if kind == "logits"} <= right and len(right) == 2
    assert {value for kind, value in lines if kind == "error"} <= {"PagerIOError"}
    assert int(lines[-1][1]) > 10


def test_file_written_over_while_it_is_opened_is_an_error(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep = residency.keep_dense

    def change_first(*arguments: Any, **named: Any) -> Any:
        kept = keep(*arguments, **named)
        change_bytes(model, "output_norm.weight")
        return kept

    monkeypatch.setattr(residency, "keep_dense", change_first)
    before = footprint_of(model.parent)
    with pytest.raises(PagerIOError, match="changed while in use"):
        open_paged(model)
    assert settled_footprint_of(model.parent, before) == before


@pytest.mark.skipif(sys.platform != "linux", reason="it is the way of other systems")
def test_without_proc_names_are_compared(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS: a file that was replaced is refused once something else has its name."""
    monkeypatch.setattr(OpenedFile, "reopen_path", property(lambda self: self._absolute))
    llm = open_paged(model)
    llm.eval(some_tokens(3))
    llm.close()
    other = Path(shutil.copy(model, model.with_name("other.gguf")))
    fill = loading.device.fill
    monkeypatch.setattr(loading.device, "fill", lambda *of: (other.replace(model), fill(*of))[1])
    with pytest.raises(PagerIOError, match="changed while in use"):
        open_paged(model)


# ---- what is no file ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("which", ("model", "part", "mirror"))
def test_pipe_is_refused_at_once(zoo_model: Model, model: Path, tmp_path: Path, which: str) -> None:
    pipe, arguments = tmp_path / "pipe.gguf", {}
    path = pipe
    if which == "part":
        (tmp_path / "parts").mkdir()
        path = make_zoo.make_split(zoo_model("qwen3moe"), tmp_path / "parts", 2)
        pipe = path.with_name(path.name.replace("00001-of", "00002-of"))
        pipe.unlink()
    elif which == "mirror":
        path, arguments = model, {"mirror": [pipe]}
    os.mkfifo(pipe)
    with pytest.raises(LayoutError, match=f"{pipe.name} is a pipe"):
        open_paged(path, **arguments)


def test_refusals_are_value_errors_too(tmp_path: Path, lora: Path) -> None:
    """Stock raises ValueError, and programs catch that."""
    with gguf_pager.install(budget="min"), pytest.raises(ValueError, match="No such file"):
        low.llama_model_load_from_file(os.fsencode(tmp_path / "missing.gguf"), low.llama_model_default_params())
    with gguf_pager.install(budget="min"), pytest.raises(ValueError, match="is an adapter"):
        low.llama_model_load_from_file(os.fsencode(lora), low.llama_model_default_params())


def current_callbacks() -> dict[str, tuple[int, int | None]]:
    functions = llama_log.llama_log._functions()
    assert functions is not None
    return {kind: llama_log._current(get) for kind, (get, _) in functions.items()}


def test_callback_for_the_log_is_the_users_again(model: Path) -> None:
    said: list[bytes] = []
    callback = low.llama_log_callback(lambda level, text, data: said.append(text))
    low.llama_log_set(callback, None)
    try:
        before = current_callbacks()
        open_paged(model).close()
        assert current_callbacks() == before
        assert any(str(model).encode() in text for text in said), "files are called what the user calls them"
        assert not any(b"/proc/self/fd" in text for text in said)
    finally:
        low.llama_log_set(_logger.llama_log_callback, ctypes.c_void_p(0))


def test_longer_names_are_replaced_first_and_an_interrupt_is_kept() -> None:
    heard: list[bytes] = []

    @low.llama_log_callback
    def callback(level: int, text: bytes, data: int | None) -> None:
        heard.append(text)

    low.llama_log_set(callback, None)
    try:
        names = {"/proc/self/fd/9": "a.gguf", "/proc/self/fd/90": "b.gguf"}
        with llama_log.llama_log.listening(names) as listener:
            llama_log.llama_log._hear("llama", 4, b"cannot read /proc/self/fd/90\n", None)
            assert heard[-1] == b"cannot read b.gguf\n" and listener.lines == ["cannot read b.gguf"]
            listener.names.append((b"x", None))  # type: ignore[arg-type]
            llama_log.llama_log._hear("llama", 4, b"x\n", None)
            assert isinstance(listener.caught, TypeError)
    finally:
        low.llama_log_set(_logger.llama_log_callback, ctypes.c_void_p(0))


def test_child_of_a_fork_in_the_middle_of_a_load_has_the_users_callback_again(model: Path) -> None:
    said: list[bytes] = []
    callback = low.llama_log_callback(lambda level, text, data: said.append(text))
    low.llama_log_set(callback, None)
    try:
        with llama_log.llama_log.listening({}) as listener:
            listener.thread = -1  # another thread's, as for the child's
            llama_log.llama_log._listeners = {-1: listener}
            child = os.fork()
            if child == 0:
                signal.alarm(20)
                low.llama_log_set(callback, None)
                before = current_callbacks()
                open_paged(model).close()
                os._exit(0 if current_callbacks() == before else 1)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        low.llama_log_set(_logger.llama_log_callback, ctypes.c_void_p(0))


def test_callback_set_while_a_model_is_loaded_stays() -> None:
    callback = low.llama_log_callback(lambda level, text, data: None)
    with llama_log.llama_log.listening({}), llama_log.llama_log.listening({}):
        low.llama_log_set(callback, None)
        mine = current_callbacks()
    try:
        assert current_callbacks() == mine
    finally:
        low.llama_log_set(_logger.llama_log_callback, ctypes.c_void_p(0))
