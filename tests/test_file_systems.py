"""Disks that fail and file systems that are not like the others, for real: FUSE, btrfs, overlayfs. Needs root."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fuse_disk
import pytest
from conftest import ARGUMENTS, Factory, evaluate, footprint_of, settled_footprint_of, some_tokens
from fuse_disk import FuseDisk
from test_residency import state_of

import gguf_pager
from gguf_pager import LayoutError, PagerIOError, _native, doctor
from gguf_pager.model.layout import read_layout

Model = Callable[..., Path]

PIECE_BYTES = 4 << 20

needs_fuse = pytest.mark.skipif(fuse_disk.reason_to_skip() is not None, reason=str(fuse_disk.reason_to_skip()))


@pytest.fixture
def source(zoo_model: Model, tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    shutil.copy(zoo_model("qwen3moe"), tmp_path / "source" / "model.gguf")
    return tmp_path / "source"


@pytest.fixture
def disk(source: Path, tmp_path: Path) -> Iterator[FuseDisk]:
    with fuse_disk.fuse_disk(source, tmp_path) as disk:
        yield disk


# ---- a disk that fails ----------------------------------------------------------------------------------------------

@needs_fuse
def test_model_on_such_a_disk_works_as_long_as_it_does(disk: FuseDisk, source: Path, pair: Factory) -> None:
    ours, theirs = pair(disk.folder / "model.gguf", "60%", logits_all=True)
    tokens = some_tokens(10)
    assert (evaluate(ours, tokens) == evaluate(theirs, tokens)).all()
    assert state_of(ours).method in ("lock", "copy")


@needs_fuse
@pytest.mark.parametrize("lock_dense", ("auto", "lock", "copy", "off"))
@pytest.mark.parametrize("io", ("auto", "buffered"))
def test_bad_sector_under_dense_weights_is_an_error_that_names_it(disk: FuseDisk, lock_dense: str, io: str) -> None:
    """Locking the mapping, the kernel would read it again for ever."""
    path = disk.folder / "model.gguf"
    piece = max(read_layout(path).dense, key=lambda each: each.n_bytes)
    at = (piece.offset_bytes + piece.n_bytes // 2) // 4096 * 4096
    forget(path)
    disk.wish(f"errno {errno.EIO} {at} {at + 4096}")
    before = footprint_of(disk.folder)
    with pytest.raises(PagerIOError, match=r"Reading .*model\.gguf at byte [\d,]+ failed: Input/output error\.") as raised:
        gguf_pager.Llama(str(path), budget="min", lock_dense=lock_dense, io=io, **ARGUMENTS)
    assert raised.value.errno == errno.EIO and raised.value.path == str(path)
    assert raised.value.offset_bytes <= at < raised.value.offset_bytes + PIECE_BYTES
    assert settled_footprint_of(disk.folder, before) == before
    disk.wish()
    gguf_pager.Llama(str(path), budget="min", lock_dense=lock_dense, io=io, **ARGUMENTS).close()


def forget(path: Path) -> None:
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@needs_fuse
@pytest.mark.parametrize("at", (0, 4096, 8192))
def test_bad_sector_under_the_header_is_said_to_be_one(disk: FuseDisk, at: int) -> None:
    path = disk.folder / "model.gguf"
    disk.wish(f"errno {errno.EIO} {at} {at + 4096}")
    with pytest.raises(PagerIOError, match=r"Reading .*model\.gguf at byte [\d,]+ failed: Input/output error\.") as raised:
        gguf_pager.Llama(str(path), budget="min", **ARGUMENTS)
    assert raised.value.errno == errno.EIO and "ownload" not in str(raised.value)
    with pytest.raises(PagerIOError, match="Input/output error"):
        gguf_pager.read_layout(path)


@needs_fuse
def test_file_that_ends_before_its_size_is_said_to(disk: FuseDisk) -> None:
    path = disk.folder / "model.gguf"
    disk.wish("end 5000")
    with pytest.raises(PagerIOError, match="the file ends there, earlier than it should") as raised:
        gguf_pager.Llama(str(path), budget="min", **ARGUMENTS)
    assert raised.value.errno == errno.ENODATA and raised.value.path == str(path)


OPEN = """
import sys
import gguf_pager
gguf_pager.Llama
print("opening", flush=True)
try:
    gguf_pager.Llama(sys.argv[1], budget="min", n_ctx=64, n_threads=1, n_threads_batch=1, verbose=False)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@needs_fuse
def test_interrupt_ends_opening_though_a_read_never_comes_back(disk: FuseDisk) -> None:
    path = disk.folder / "model.gguf"
    piece = max(read_layout(path).dense, key=lambda each: each.offset_bytes)  # far behind what the header's read brings
    at = (piece.offset_bytes + piece.n_bytes - 1) // 4096 * 4096
    forget(path)
    disk.wish(f"hang {at} {at + 4096}")
    process = subprocess.Popen([sys.executable, "-c", OPEN, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, cwd=Path(__file__).parent.parent)
    try:
        assert process.stdout is not None and process.stdout.readline() == "opening\n"
        end = time.monotonic() + 30
        while not disk.is_hanging() and time.monotonic() < end:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        begun = time.monotonic()
        threading.Timer(10, disk.wish).start()
        assert process.stdout.readline() == "interrupted\n"
        assert time.monotonic() - begun < 8
        disk.wish()
        assert process.wait(30) == 0
    finally:
        disk.wish()
        process.kill()
        process.communicate()


@needs_fuse
@pytest.mark.parametrize("use_mmap", (True, False))
def test_file_system_that_cannot_map_is_refused_with_the_reason(source: Path, tmp_path: Path, use_mmap: bool) -> None:
    with fuse_disk.fuse_disk(source, tmp_path, direct_io=True) as disk:
        path = disk.folder / "model.gguf"
        with pytest.raises(LayoutError, match=r"cannot be mapped into memory: No such device\. .*copy the model to a local disk"):
            gguf_pager.Llama(str(path), budget="min", use_mmap=use_mmap, **ARGUMENTS)
        check = {each.name: each for each in doctor.examine(path)}["model"]
        assert check.status == "problem" and "cannot be mapped" in check.message
        if use_mmap:  # a model that fits is stock's to load, which maps it, too
            with pytest.raises(LayoutError, match="cannot be mapped into memory: No such device"):
                gguf_pager.Llama(str(path), budget="auto", **ARGUMENTS)
        else:
            gguf_pager.Llama(str(path), budget="auto", use_mmap=False, **ARGUMENTS).close()


CHANGE = """
import os, sys
import gguf_pager
from llama_cpp import llama_cpp as low
path, at, how = sys.argv[1], int(sys.argv[2]), sys.argv[3]
whole = open(path, "rb").read()
count = -10_000
def change():
    if how == "truncate":
        os.truncate(path, 0)
    else:
        with open(path, "wb") as file:
            file.write(bytes(len(whole)))
llm = gguf_pager.Llama(path, budget="60%", n_ctx=64, n_threads=1, n_threads_batch=1, verbose=False)
llm.eval([5, 6, 7])
if at == 0:
    change()
else:
    low.llama_set_abort_callback(llm.ctx, callback := low.ggml_abort_callback(lambda data: step()), None)
    def step():
        global count
        count += 1
        if count == at:
            change()
        return False
    count = 0
for _ in range(2):
    try:
        llm.eval([5])
        print("no error")
    except gguf_pager.PagerIOError as error:
        print("error")
llm.close()
"""


@pytest.mark.parametrize("how", ("truncate", "copy over"))
@pytest.mark.parametrize("at", (0, 5, 40))
def test_process_lives_when_the_file_shrinks_or_is_written_over(zoo_model: Model, tmp_path: Path, how: str, at: int) -> None:
    path = Path(shutil.copy(zoo_model("gemma4"), tmp_path / "model.gguf"))
    done = subprocess.run([sys.executable, "-c", CHANGE, str(path), str(at), how], capture_output=True, text=True, timeout=60,
                          check=False, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["error", "error"]


# ---- file systems whose mappings go by other numbers ----------------------------------------------------------------

def run(*command: str | Path) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"{command[0]}: {done.stderr.strip()}")


@contextlib.contextmanager
def mounted(*command: str | Path) -> Iterator[None]:
    if os.geteuid() != 0:
        pytest.skip("only root may mount")
    run("mount", *command)
    try:
        yield
    finally:
        subprocess.run(["umount", str(command[-1])], check=True)


@contextlib.contextmanager
def btrfs(folder: Path) -> Iterator[Path]:
    if shutil.which("mkfs.btrfs") is None:
        pytest.skip("mkfs.btrfs is not installed")
    image, mount = folder / "image", folder / "btrfs"
    mount.mkdir()
    with open(image, "wb") as file:
        file.truncate(128 << 20)  # the least that mkfs.btrfs takes is 109 MiB
    run("mkfs.btrfs", "-q", image)
    with mounted("-o", "loop", image, mount):
        (mount / "models").mkdir()
        yield mount / "models"


@contextlib.contextmanager
def overlay(folder: Path) -> Iterator[Path]:
    """A folder of a tmpfs below one of another."""
    lower, upper, mount = folder / "lower", folder / "upper", folder / "overlay"
    for each in (lower, upper, mount):
        each.mkdir()
    with mounted("-t", "tmpfs", "none", lower), mounted("-t", "tmpfs", "none", upper):
        for each in (upper / "files", upper / "work"):
            each.mkdir()
        (lower / "models").mkdir()
        with mounted("-t", "overlay", "-o", f"lowerdir={lower},upperdir={upper / 'files'},workdir={upper / 'work'}", "none",
                     mount):
            yield mount / "models"


@contextlib.contextmanager
def overlay_of_a_lower_file(folder: Path) -> Iterator[Path]:
    """The model lies in the folder below, as a container's image does."""
    with overlay(folder) as models:
        shutil.copy(MODEL[0], folder / "lower" / "models" / "model.gguf")
        subprocess.run(["mount", "-o", "remount", str(folder / "overlay")], check=True)
        yield models


MODEL: list[Path] = []


@pytest.mark.parametrize("is_seen", (True, False), ids=("seen", "from /proc/self/maps"))
@pytest.mark.parametrize("kind", (btrfs, overlay, overlay_of_a_lower_file), ids=lambda kind: kind.__name__)
def test_dense_weights_are_kept_wherever_the_model_lies(
    zoo_model: Model, stock: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Callable[[Path], Iterator[Path]],
    is_seen: bool
) -> None:
    def unfamiliar(library: str) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    MODEL[:] = [zoo_model("qwen3moe")]
    tokens = some_tokens(8)
    expected = evaluate(stock(zoo_model("qwen3moe"), logits_all=True, n_ubatch=1), tokens)
    with kind(tmp_path) as folder:
        path = folder / "model.gguf"
        if not path.exists():
            shutil.copy(zoo_model("qwen3moe"), path)
        if not is_seen:
            monkeypatch.setattr(_native, "lazy_load_begin", unfamiliar)
        llm = gguf_pager.Llama(str(path), budget="min", lock_dense="copy", **ARGUMENTS, logits_all=True, n_ubatch=1)
        try:
            kept = state_of(llm)
            assert kept.method == "copy" and kept.n_bytes >= llm.pager.layout.dense_bytes
            for copy in kept.copies:
                assert not is_mapped(copy.address, copy.n_bytes), "it is no page of the file any more"
            os.utime(path, ns=(1, 1))
            assert (evaluate(llm, tokens) == expected).all(), "and the right bytes"
        finally:
            llm.close()


def is_mapped(address: int, n_bytes: int) -> bool:
    """Return whether a part of this memory is a file's."""
    for line in Path("/proc/self/maps").read_bytes().splitlines():
        fields = line.split(None, 5)
        begin, end = (int(part, 16) for part in fields[0].split(b"-"))
        if begin < address + n_bytes and address < end and int(fields[4]) != 0:
            return True
    return False


def test_option_that_cannot_be_kept_is_an_error(zoo_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where llama.cpp has mapped the model is not known: as on macOS."""
    end = _native.lazy_load_end
    monkeypatch.setattr(_native, "lazy_load_end", lambda: end() and [])
    path = zoo_model("qwen3moe")
    for method in ("lock", "copy"):
        with pytest.raises(gguf_pager.EngineError, match=f"lock_dense='{method}' cannot be kept here"):
            gguf_pager.Llama(str(path), budget="min", lock_dense=method, **ARGUMENTS)
    llm = gguf_pager.Llama(str(path), budget="min", **ARGUMENTS)
    assert state_of(llm).method == "unknown"
    llm.close()


def test_names_that_are_no_text_are_no_matter(zoo_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's list of mappings is bytes; a name may hold a line's end, too."""
    def unfamiliar(library: str) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    folder = tmp_path / "a\nb c"
    folder.mkdir()
    path = Path(shutil.copy(zoo_model("qwen3moe"), folder / "model.gguf"))
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe"))
    odd.write_bytes(bytes(4096))
    with open(odd, "rb") as file, mmap.mmap(file.fileno(), 4096, access=mmap.ACCESS_READ):
        monkeypatch.setattr(_native, "lazy_load_begin", unfamiliar)
        llm = gguf_pager.Llama(str(path), budget="min", **ARGUMENTS)
        assert state_of(llm).n_bytes >= llm.pager.layout.dense_bytes
        llm.close()
