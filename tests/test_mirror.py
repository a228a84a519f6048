"""Another copy of the model is read in parallel, and only if it is the same model as far as samples tell."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import pickle
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import make_zoo
import numpy as np
import pytest
from conftest import ARGUMENTS, Factory, evaluate, footprint_of, some_tokens
from llama_cpp import llama_cpp as low
from test_install import decode

import gguf_pager
from gguf_pager import LayoutError, Options, PagerError, PagerIOError, _native, read_layout
from gguf_pager.files import ModelFiles
from gguf_pager.model import mirror
from gguf_pager.model.layout import Layout, open_layout

Model = Callable[..., Path]

N_TOKENS = 24


@pytest.fixture
def disks(zoo_model: Model, tmp_path: Path) -> tuple[Path, Path]:
    """A model and a copy of it, both free to be changed."""
    copies = []
    for name in ("disk1", "disk2"):
        (tmp_path / name).mkdir()
        copies.append(Path(shutil.copy(zoo_model("qwen3moe"), tmp_path / name / "model.gguf")))
    return copies[0], copies[1]


def change_byte(path: Path, offset_bytes: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset_bytes)
        old = file.read(1)[0]
        file.seek(offset_bytes)
        file.write(bytes([old ^ 1]))


# ---- read in parallel ----

@pytest.mark.parametrize("io", ("auto", "buffered"))
@pytest.mark.parametrize("budget", ("min", "60%"))
def test_logits_equal_stock_and_both_copies_were_read(
    disks: tuple[Path, Path], pair: Factory, budget: str, io: str
) -> None:
    first, second = disks
    ours, theirs = pair(first, budget, {"mirror": [str(second)], "io": io}, logits_all=True)
    tokens = some_tokens(N_TOKENS)
    assert (evaluate(ours, tokens, (8,)) == evaluate(theirs, tokens, (8,))).all()
    stats = ours.pager.stats()
    assert len(stats.copies) == 2 and all(stats.copies), "both copies were read"
    assert sum(stats.copies) == stats.bytes_read
    assert stats.evictions > 0 and stats.left_alone == 0
    ours.close()
    assert ours.pager.stats().copies == stats.copies


def test_without_a_mirror_there_is_one_copy(zoo_model: Model, paged: Factory) -> None:
    llm = paged(zoo_model("qwen3moe"))
    llm.eval(some_tokens(5))
    assert llm.pager.stats().copies == (llm.pager.stats().bytes_read,)


def test_bytes_between_the_samples_are_not_compared_and_come_from_the_mirror(
    disks: tuple[Path, Path], paged: Factory
) -> None:
    """What is said of the samples is true; and that reads go to the mirror shows in the logits."""
    first, second = disks
    sampled = sorted((at, at + n) for _, _, at, n in mirror.samples(read_layout(first)))
    whole = bytearray(second.read_bytes())
    for (_, end), (begin, _) in itertools.pairwise(sampled):
        for at in range(end, begin, 8):
            whole[at] ^= 1
    second.write_bytes(whole)
    alone, both = paged(first, logits_all=True), paged(first, logits_all=True, mirror=second)
    tokens = some_tokens(N_TOKENS)
    assert (evaluate(alone, tokens, (8,)) != evaluate(both, tokens, (8,))).any()


@pytest.mark.parametrize("align", (0, 4096))
def test_copies_on_file_systems_that_differ(
    disks: tuple[Path, Path], pair: Factory, monkeypatch: pytest.MonkeyPatch, align: int
) -> None:
    """The second knows no direct reads, or wants larger sectors."""
    first, second = disks
    ask = _native.file_alignment

    def alignment(path: str) -> tuple[int, int]:
        if not os.path.samefile(path, second):
            return ask(path)
        if align == 0:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
        return align, align

    monkeypatch.setattr(_native, "file_alignment", alignment)
    ours, theirs = pair(first, "min", {"mirror": [second]}, logits_all=True)
    own = ask(str(first))
    assert ours.pager.is_direct
    assert ours.pager.align == max(*own, align)
    tokens = some_tokens(N_TOKENS)
    assert (evaluate(ours, tokens, (8,)) == evaluate(theirs, tokens, (8,))).all()
    assert all(ours.pager.stats().copies)
    if align == 0:
        with pytest.raises(PagerIOError, match=f"{second} cannot be read directly"):
            gguf_pager.Llama(str(first), budget="min", mirror=[second], io="direct", **ARGUMENTS)


def test_mirror_of_a_split_model(zoo_model: Model, pair: Factory, tmp_path: Path) -> None:
    for name in ("disk1", "disk2"):
        (tmp_path / name).mkdir()
    first = make_zoo.make_split(zoo_model("qwen3moe"), tmp_path / "disk1", 3)
    for part in first.parent.iterdir():
        shutil.copy(part, tmp_path / "disk2")
    second = tmp_path / "disk2" / first.name
    ours, theirs = pair(first, "min", {"mirror": [second]}, logits_all=True)
    assert [path.parent.name for path in ours.pager.paths] == ["disk1"] * 3 + ["disk2"] * 3
    tokens = some_tokens(N_TOKENS)
    assert (evaluate(ours, tokens, (8,)) == evaluate(theirs, tokens, (8,))).all()
    assert all(ours.pager.stats().copies)
    ours.close()
    part = second.with_name(second.name.replace("00001-of", "00003-of"))
    part.unlink()
    with pytest.raises(LayoutError, match=f"{part.name} cannot be read: No such file"):
        gguf_pager.Llama(str(first), budget="min", mirror=[second], **ARGUMENTS)


def test_pickled_llama_keeps_its_mirror(disks: tuple[Path, Path], paged: Factory) -> None:
    llm = paged(disks[0], mirror=[disks[1]])
    copy = pickle.loads(pickle.dumps(llm))
    assert copy.pager.paths == llm.pager.paths == disks
    copy.close()


# ---- what is refused ----

def truncated(path: Path, model: Path) -> None:
    os.truncate(path, path.stat().st_size - 4096)


def longer(path: Path, model: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"\0")


def cut_in_the_header(path: Path, model: Path) -> None:
    os.truncate(path, 100)


def missing(path: Path, model: Path) -> None:
    path.unlink()


def other_model(path: Path, model: Path) -> None:
    make_zoo.make("qwen2moe", path)


def same_shape_other_weights(path: Path, model: Path) -> None:
    layout = read_layout(model)
    header = model.read_bytes()[: layout.header_bytes[0]]
    path.write_bytes(header + bytes(model.stat().st_size - len(header)))


def other_name(path: Path, model: Path) -> None:
    whole = model.read_bytes()
    at = whole.index(b"general.")
    path.write_bytes(whole[:at] + b"generaL." + whole[at + 8 :])


def the_model_itself(path: Path, model: Path) -> None:
    path.unlink()
    path.hardlink_to(model)


@pytest.mark.parametrize(("damage", "message"), (
    (truncated, r"is no mirror of .*: it has [\d,]+ bytes instead of [\d,]+\. Copy the model anew"),
    (longer, r"is no mirror of .*: it has [\d,]+ bytes instead of"),
    (cut_in_the_header, r"is no mirror of .*: their headers differ"),
    (missing, r"mirror .* cannot be read: No such file"),
    (other_model, r"is no mirror of .*: their headers differ"),
    (other_name, r"is no mirror of .*: their headers differ"),
    (same_shape_other_weights, r"is no mirror of .*: the data of blk\.\d+\.ffn_\w+_exps\.weight differ"),
    (the_model_itself, r"itself, or was given twice"),
), ids=lambda value: getattr(value, "__name__", ""))
def test_mirror_that_is_not_the_model_is_refused(
    disks: tuple[Path, Path], tmp_path: Path, damage: Callable[[Path, Path], None], message: str
) -> None:
    first, second = disks
    damage(second, first)
    before = footprint_of(tmp_path)
    with pytest.raises(LayoutError, match=message):
        gguf_pager.Llama(str(first), budget="min", mirror=[second], **ARGUMENTS)
    end = time.monotonic() + 5
    while footprint_of(tmp_path) != before and time.monotonic() < end:
        time.sleep(0.01)  # a thread that Python has joined ends a moment later
    assert footprint_of(tmp_path) == before


def test_mirror_given_twice_is_refused(disks: tuple[Path, Path]) -> None:
    with pytest.raises(LayoutError, match="given twice"):
        gguf_pager.Llama(str(disks[0]), budget="min", mirror=[disks[1], disks[1]], **ARGUMENTS)


def sampled_bytes(model: Path) -> Iterator[tuple[str, int]]:
    for name, _, offset_bytes, n_bytes in mirror.samples(read_layout(model)):
        yield name, offset_bytes
        yield name, offset_bytes + n_bytes - 1


def test_one_wrong_byte_of_any_sample_is_seen(disks: tuple[Path, Path]) -> None:
    first, second = disks
    with ModelFiles() as files:
        check_samples(open_layout([first], files), files, first, second)


def check_samples(layout: Layout, files: ModelFiles, first: Path, second: Path) -> None:
    names = {piece.name for layer in layout.layers for piece in layer.slices}
    assert {name for name, _ in sampled_bytes(first)} == names, "every expert tensor is sampled"
    for name, offset_bytes in sampled_bytes(first):
        change_byte(second, offset_bytes)
        with pytest.raises(LayoutError, match=f"the data of {name} differ"):
            mirror.find_mirrors(layout, files, (second,), is_any_model=False)
        change_byte(second, offset_bytes)
    (found,) = mirror.find_mirrors(layout, files, (second,), is_any_model=False)
    assert [file.path for file in found] == [second]
    found.close()


@pytest.mark.parametrize("given", (3, [3], [None], b"bytes", {"a": 1}, ["x"] * 8), ids=repr)
def test_malformed_mirror_is_refused(given: Any) -> None:
    with pytest.raises(PagerError, match="mirror"):
        Options(mirror=given)


def test_one_path_is_a_list_of_one() -> None:
    for given in ("a.gguf", Path("a.gguf"), ["a.gguf"], (Path("a.gguf"),)):
        assert Options(mirror=given).mirror == (Path("a.gguf"),)


# ---- changed while in use ----

@contextlib.contextmanager
def changed(path: Path) -> Iterator[None]:
    """A byte of the first sample is another."""
    _, _, offset_bytes, _ = next(iter(mirror.samples(read_layout(path))))
    change_byte(path, offset_bytes)
    yield
    change_byte(path, offset_bytes)


def test_mirror_changed_while_in_use_is_an_error_that_names_it(disks: tuple[Path, Path], pair: Factory) -> None:
    first, second = disks
    ours, theirs = pair(first, "min", {"mirror": [second]}, logits_all=True)
    tokens = some_tokens(N_TOKENS)
    expected = evaluate(theirs, tokens, (8,))
    assert (evaluate(ours, tokens[:8], (8,)) == expected[:8]).all()
    with changed(second), pytest.raises(PagerIOError, match="changed while in use") as raised:
        ours.eval(tokens[8:])
    assert (raised.value.errno, raised.value.path) == (errno.ESTALE, str(second))
    assert (evaluate(ours, tokens[8:]) == expected[8:]).all()


def test_touched_mirror_goes_on(disks: tuple[Path, Path], pair: Factory) -> None:
    first, second = disks
    ours, theirs = pair(first, "min", {"mirror": [second]}, logits_all=True)
    tokens = some_tokens(N_TOKENS)
    expected = evaluate(theirs, tokens)
    assert (evaluate(ours, tokens[:8]) == expected[:8]).all()
    os.utime(second, ns=(1, 1))
    assert (evaluate(ours, tokens[8:]) == expected[8:]).all()


@pytest.mark.parametrize("replaced", (0, 1), ids=("model", "mirror"))
def test_file_replaced_before_the_first_context_stays_what_was_opened(
    disks: tuple[Path, Path], stock: Factory, replaced: int
) -> None:
    """The slots are filled when the first context is made: by then another file may have the name."""
    first, second = disks
    tokens = some_tokens(12)
    expected = evaluate(stock(first, logits_all=True, n_ubatch=1), tokens)
    with gguf_pager.install(budget="min", mirror=[second]) as installed:
        model = low.llama_model_load_from_file(os.fsencode(first), low.llama_model_default_params())
        try:
            other = disks[replaced].with_name("other.gguf")
            make_zoo.make("qwen2moe", other)
            other.rename(disks[replaced])
            context = low.llama_init_from_model(model, context_params())
            try:
                assert (np.concatenate([decode(model, context, [token], i) for i, token in enumerate(tokens)]) == expected).all()
                assert all(installed.pagers[0].stats().copies)
            finally:
                low.llama_free(context)
        finally:
            low.llama_model_free(model)


def context_params() -> Any:
    params = low.llama_context_default_params()
    params.n_ctx, params.n_threads, params.n_threads_batch = 128, 1, 1
    params.flash_attn_type = low.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return params


# ---- install ----

def open_all(installed: gguf_pager.Installation, *paths: Path) -> list[gguf_pager.Pager]:
    opened = []
    for path in paths:
        llm = llama_cpp.Llama(str(path), **ARGUMENTS)
        opened.append(llm)
    pagers = installed.pagers
    for llm in opened:
        llm.close()
    return pagers


def test_installed_mirror_serves_the_model_it_is_a_copy_of(disks: tuple[Path, Path], zoo_model: Model) -> None:
    first, second = disks
    with gguf_pager.install(budget="min", mirror=[second]) as installed:
        own, other, itself = open_all(installed, first, zoo_model("qwen2moe"), second)
    assert own.paths == (first, second)
    assert other.paths == (zoo_model("qwen2moe"),)
    assert itself.paths == (second,)


def test_installed_mirror_with_damage_is_refused(disks: tuple[Path, Path]) -> None:
    first, second = disks
    truncated(second, first)
    with gguf_pager.install(budget="min", mirror=[second]) as installed, pytest.raises(LayoutError, match="bytes instead of"):
        open_all(installed, first)
