"""A touched file goes on, a changed one does not, and nothing a decode touches lies in a file's mapping."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import make_zoo
import numpy as np
import pytest
from conftest import ARGUMENTS, Factory, Logits, evaluate, some_tokens
from llama_cpp import llama_cpp as low
from test_errors import damaged, overwrite, touch
from test_install import decode, decode_status, low_level

import gguf_pager
from gguf_pager import PagerIOError, hooks
from gguf_pager.files import ModelFiles
from gguf_pager.fingerprint import Fingerprint
from gguf_pager.model import engine
from gguf_pager.model.layout import open_layout

Model = Callable[..., Path]

N_TOKENS = 16


@pytest.fixture
def model(zoo_model: Model, tmp_path: Path) -> Path:
    return Path(shutil.copy(zoo_model("qwen3moe"), tmp_path / "model.gguf"))


@pytest.fixture
def expected(zoo_model: Model, stock: Factory) -> Logits:
    return evaluate(stock(zoo_model("qwen3moe"), logits_all=True, n_ubatch=1), some_tokens(N_TOKENS))


def chmod(path: Path) -> None:
    path.chmod(0o600 if path.stat().st_mode & 0o077 else 0o644)


def link(path: Path) -> None:
    path.with_name("link.gguf").hardlink_to(path)


def write_the_same(path: Path) -> None:
    whole = path.read_bytes()
    with open(path, "r+b") as file:
        file.write(whole)


def unlink(path: Path) -> None:
    path.unlink()


TOUCHES = (touch, chmod, link, write_the_same, unlink)


@pytest.mark.parametrize("way", TOUCHES, ids=lambda way: way.__name__)
@pytest.mark.parametrize("budget", ("min", "100%"))
def test_touched_file_goes_on(model: Path, expected: Logits, budget: str, way: Callable[[Path], None]) -> None:
    tokens = some_tokens(N_TOKENS)
    llm = gguf_pager.Llama(str(model), budget=budget, **ARGUMENTS, logits_all=True, n_ubatch=1)
    assert (evaluate(llm, tokens[:4]) == expected[:4]).all()
    way(model)
    assert (evaluate(llm, tokens[4:]) == expected[4:]).all()
    assert llm.pager.stats().left_alone == 0
    if budget != "min":
        llm.pager.pin({0: [1]})
    llm.close()


@pytest.mark.parametrize("arch", ("qwen3moe", "jamba", "qwen3next"))
@pytest.mark.parametrize("at", (1, 30, 60))
def test_file_touched_in_the_middle_of_a_graph_goes_on(
    zoo_model: Model, stock: Factory, tmp_path: Path, arch: str, at: int
) -> None:
    """Also of a recurrent model, whose half-done batch could not be done again."""
    path = Path(shutil.copy(zoo_model(arch), tmp_path / "model.gguf"))
    tokens, count = some_tokens(12), [-10_000]
    expected = evaluate(stock(path, logits_all=True), tokens, (8,))

    @low.ggml_backend_sched_eval_callback
    def meddle(address: int, ask: bool, data: int | None) -> bool:
        count[0] += 1
        if count[0] == at:
            touch(path)
        return False

    with gguf_pager.install(budget="min") as installed, low_level(path, cb_eval=meddle) as (model, context):
        rows = [decode(model, context, tokens[:8])]
        count[0] = 0
        rows += [decode(model, context, [tokens[i]], i) for i in range(8, 12)]
        assert count[0] > at and installed.pagers[0].stats().left_alone == 0
    assert (np.concatenate(rows) == expected).all()


def clear_experts(path: Path) -> None:
    with open(path, "r+b") as file:
        for tensor in engine.read_header(path).tensors:
            if "_exps" in tensor.name:
                file.seek(tensor.offset_bytes)
                file.write(bytes(tensor.n_bytes))


@pytest.mark.parametrize("n_failing", (1, 8))
def test_change_that_is_undone_before_anybody_compares_is_found_in_what_was_read(
    model: Path, stock: Factory, n_failing: int
) -> None:
    """Experts are read while the file holds others, which are gone again when the file is compared."""
    tokens = some_tokens(N_TOKENS)
    expected = evaluate(stock(model, logits_all=True), tokens, (8, n_failing))
    count, stack = [-10_000], contextlib.ExitStack()

    @low.ggml_backend_sched_eval_callback
    def meddle(address: int, ask: bool, data: int | None) -> bool:
        count[0] += 1
        if count[0] == 20:
            stack.enter_context(damaged(model, clear_experts))
        return False

    with gguf_pager.install(budget="min"), low_level(model, cb_eval=meddle) as (address, context):
        rows = [decode(address, context, tokens[:8])]
        paged = hooks.hooks.models[address]
        find_change = paged.watch.find_change

        def restore_first() -> tuple[int, int, int] | None:
            stack.close()
            return find_change()

        paged.watch.find_change = restore_first  # type: ignore[method-assign]
        count[0] = 0
        with pytest.raises(PagerIOError, match="changed while in use"):
            decode_status(context, tokens[8 : 8 + n_failing], 8)
        paged.watch.find_change = find_change  # type: ignore[method-assign]
        count[0] = -10_000
        rows += [decode(address, context, tokens[8 : 8 + n_failing], 8)]
        rows += [decode(address, context, [tokens[i]], i) for i in range(8 + n_failing, N_TOKENS)]
    assert (np.concatenate(rows) == expected).all()


def test_what_was_read_of_a_changed_file_is_not_kept_when_it_is_restored(model: Path, expected: Logits) -> None:
    """By a pin, say, which fails; the file's first bytes come back, and so do its experts."""
    tokens = some_tokens(N_TOKENS)
    llm = gguf_pager.Llama(str(model), budget="60%", **ARGUMENTS, logits_all=True, n_ubatch=1)
    with damaged(model, overwrite):
        for _ in range(2):
            with pytest.raises(PagerIOError, match="changed while in use"):
                llm.pager.pin({layer: [0, 1, 2] for layer in range(3)})
    llm.pager.pin({0: [0]})
    assert (evaluate(llm, tokens) == expected).all()
    llm.close()


@pytest.mark.parametrize("tensor", ("output_norm.weight", "blk.1.ffn_up_exps.weight", "token_embd.weight", "header"))
def test_byte_changed_with_the_old_time_is_found(model: Path, tensor: str) -> None:
    """In dense weights any byte; of experts and tables those that were sampled."""
    llm = gguf_pager.Llama(str(model), budget="min", **ARGUMENTS)
    llm.eval(some_tokens(3))
    header, status = engine.read_header(model), model.stat()
    found = next((each for each in header.tensors if each.name == tensor), None)
    at = found.offset_bytes if found else header.data_offset_bytes - 20
    with open(model, "r+b") as file:
        file.seek(at)
        old = file.read(1)[0]
        file.seek(at)
        file.write(bytes([old ^ 1]))
    os.utime(model, ns=(status.st_atime_ns, status.st_mtime_ns))
    for _ in range(2):
        with pytest.raises(PagerIOError) as raised:
            llm.eval(some_tokens(3))
        assert raised.value.errno == errno.ESTALE
    llm.close()


def test_samples_lie_in_every_tensor_that_is_not_dense(zoo_model: Model, tmp_path: Path) -> None:
    path = make_zoo.make_split(zoo_model("glm4moe"), tmp_path, 2)
    with ModelFiles() as files:
        layout = open_layout([path], files)
        taken = Fingerprint.of(layout, files)
        for job in taken.jobs(files):
            job()
        assert len(taken.samples) == len(taken.places) > 0
        for file, opened in enumerate(files):
            for tensor in engine.read_header(opened).tensors:
                first, end = tensor.offset_bytes, tensor.offset_bytes + tensor.n_bytes
                is_dense = any(piece.file == file and piece.offset_bytes <= first
                               and end <= piece.offset_bytes + piece.n_bytes for piece in layout.dense)
                is_sampled = any(place.file == file and place.offset_bytes < end
                                 and first < place.offset_bytes + place.n_bytes for place in taken.places)
                assert is_dense or is_sampled or tensor.name.startswith("blk.3."), "of the block that is not loaded"
            assert taken.matches(opened, file)


# ---- the mapping ----------------------------------------------------------------------------------------------------

def resident_ranges(path: Path) -> list[tuple[int, int]]:
    """Return the file ranges whose mapped pages this process has touched, from /proc/self/pagemap."""
    found = []
    with open("/proc/self/pagemap", "rb") as pagemap:
        for line in Path("/proc/self/maps").read_bytes().splitlines():
            fields = line.split(None, 5)
            if len(fields) < 6 or fields[5] != os.fsencode(path) or fields[1][3:4] != b"s":
                continue
            begin, end = (int(part, 16) for part in fields[0].split(b"-"))
            pagemap.seek(begin // 4096 * 8)
            entries = np.frombuffer(pagemap.read((end - begin) // 4096 * 8), np.uint64)
            for page in np.flatnonzero(entries >> np.uint64(63)):
                at = int(fields[2], 16) + int(page) * 4096
                found.append((at, at + 4096))
    return found


@pytest.mark.parametrize("arch", make_zoo.ARCHS)
def test_decode_touches_no_page_of_the_mapping_but_rows_of_tables(zoo_model: Model, paged: Factory, arch: str) -> None:
    """A page of a file's mapping ends the process when the file shrinks or its disk fails. Pages that the kernel maps around
    one that was touched are none: it does so for those that are in the page cache, so they are dropped from it before."""
    path = zoo_model(arch)
    llm = paged(path)
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    llm.eval(some_tokens(5))
    llm.eval(some_tokens(1))
    assert llm.pager.stats().left_alone == 0
    tables = [(tensor.offset_bytes // 4096 * 4096, tensor.offset_bytes + tensor.n_bytes)
              for tensor in engine.read_header(path).tensors if re.fullmatch(r"(per_layer_)?token_embd\.weight", tensor.name)]
    names = {tensor.name for at, end in resident_ranges(path) for tensor in engine.read_header(path).tensors
             if tensor.offset_bytes < end and at < tensor.offset_bytes + tensor.n_bytes
             and not any(first <= at < stop for first, stop in tables)}
    assert not names
