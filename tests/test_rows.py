"""Rows of embedding tables are read by us: a disk that fails is an error and not the end of the process, and no page of a
table stays with it.

What ends a process with SIGBUS would end the tests: such cases run in processes of their own.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import make_zoo
import numpy as np
import pytest
import zoo_metadata
from conftest import Factory, Logits, evaluate, some_tokens
from llama_cpp import llama_cpp as low
from test_install import decode, low_level

import gguf_pager
from gguf_pager import read_layout
from gguf_pager.memory import budget

Model = Callable[..., Path]

TESTS = Path(__file__).parent
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, mounts loop devices")


def run(script: str, *arguments: object) -> Any:
    """Run a script in a process of its own; return the JSON it printed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(TESTS), str(TESTS.parent / "scripts")))}
    done = subprocess.run([sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, timeout=120,
                          check=False, cwd=TESTS.parent, env=environment)
    assert done.returncode != -signal.SIGBUS, "the process was ended by SIGBUS"
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


# ---- files and disks that fail ----

CUT = """
import json, os, sys
from pathlib import Path
import numpy as np
import gguf_pager
from conftest import some_tokens
from gguf_pager import PagerIOError, read_layout
from llama_cpp import llama_cpp as low
from test_install import decode, decode_status, low_level
path, how, n_tokens = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
whole, status, is_meddling = path.read_bytes(), path.stat(), False

def damage():
    if how == "truncated":
        os.truncate(path, read_layout(path).header_bytes[0])
    else:
        path.write_bytes(bytes(1000))

@low.ggml_backend_sched_eval_callback
def meddle(address, ask, data):
    global is_meddling
    if is_meddling:  # asked about the first node: nothing was looked up yet
        is_meddling = False
        damage()
    return False

with gguf_pager.install(budget="100%", lock_dense="copy") as installed, low_level(path, cb_eval=meddle) as (model, context):
    decode(model, context, [5, 6, 7, 8])
    tokens = [300 + i for i in range(n_tokens)]  # nobody has used these yet
    is_meddling = True
    try:
        decode_status(context, tokens, 4)
        seen = None
    except PagerIOError as error:
        seen = [error.errno, error.path]
    path.write_bytes(whole)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    low.llama_memory_clear(low.llama_get_memory(context), True)
    ours = decode(model, context, tokens)
    left_alone = installed.pagers[0].stats().left_alone
with low_level(path) as (model, context):
    theirs = decode(model, context, tokens)
print(json.dumps({"seen": seen, "equal": bool((ours == theirs).all()), "left_alone": left_alone}))
"""


@LINUX
@pytest.mark.parametrize("n_tokens", (1, 9))
@pytest.mark.parametrize("how", ("truncated", "copied over"))
@pytest.mark.parametrize("arch", ("qwen3moe", "gemma4"))
def test_file_cut_before_a_token_is_looked_up_is_an_error(
    zoo_model: Model, tmp_path: Path, arch: str, how: str, n_tokens: int
) -> None:
    path = tmp_path / "model.gguf"
    shutil.copy(zoo_model(arch), path)
    result = run(CUT, path, how, n_tokens)
    assert result["seen"] in ([errno.ESTALE, str(path)], [errno.ENODATA, str(path)])
    assert result["equal"] and result["left_alone"] == 0


FAILING_DISK = """
import json, os, sys
from pathlib import Path
import gguf_pager
from conftest import ARGUMENTS, evaluate
from gguf_pager import PagerIOError, read_layout
path, image = Path(sys.argv[1]), Path(sys.argv[2])
whole = image.read_bytes()
llm = gguf_pager.Llama(str(path), budget="100%", lock_dense="copy", logits_all=True, **ARGUMENTS)
evaluate(llm, [5, 6, 7, 8])

def forget():
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

forget()
os.truncate(image, 1 << 20)  # reads of what lies behind it are EIO now; the file system does not know
seen = []
for tokens in ([300], [301, 302, 303]):
    try:
        llm.eval(tokens)
        seen.append(None)
    except PagerIOError as error:
        seen.append([error.errno, error.path, error.offset_bytes, str(error)])
image.write_bytes(whole)
forget()
llm.reset()
scores = evaluate(llm, [5, 6, 7, 8, 300, 301])
llm.close()
print(json.dumps({"seen": seen, "scores": scores.tolist()}))
"""


@contextlib.contextmanager
def loop_mount(folder: Path, model: Path) -> Iterator[tuple[Path, Path]]:
    """A file system in a file, with a copy of the model; yield both."""
    image, mount = folder / "image", folder / "mount"
    missing = [tool for tool in ("mkfs.ext4", "mount", "umount") if not shutil.which(tool)]
    if os.geteuid() != 0 or missing:
        pytest.skip(f"a loop mount needs root and {', '.join(missing) or 'its tools'}")
    mount.mkdir()
    with open(image, "wb") as file:
        file.truncate(24 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    for last in (False, True):
        made = subprocess.run(["mount", "-o", "loop,ro" if last else "loop", str(image), str(mount)], capture_output=True,
                              text=True, check=False)
        if made.returncode:
            pytest.skip(f"no loop device can be mounted here: {made.stderr.strip()}")
        try:
            if last:
                yield mount / "model.gguf", image
            else:
                shutil.copy(model, mount / "model.gguf")
        finally:
            subprocess.run(["umount", str(mount)], check=True)


@LINUX
def test_disk_that_fails_under_a_table_is_an_error_that_says_where(
    zoo_model: Model, stock: Factory, tmp_path: Path
) -> None:
    with loop_mount(tmp_path, zoo_model("qwen3moe")) as (path, image):
        result = run(FAILING_DISK, path, image)
    (table,) = read_layout(zoo_model("qwen3moe")).tables
    for found, token in zip(result["seen"], (300, 301), strict=True):
        assert found is not None, "a token whose row cannot be read is not computed"
        number, where, offset_bytes, message = found
        assert (number, where) == (errno.EIO, str(path)) and "Input/output error" in message
        assert offset_bytes == table.offset_bytes + token * table.row_bytes
    expected = evaluate(stock(zoo_model("qwen3moe"), logits_all=True), [5, 6, 7, 8, 300, 301])
    assert (np.array(result["scores"], np.single) == expected).all(), "the same object works when the disk does"


# ---- memory ----

N_VOCAB, N_RANDOM, BATCH = 70_000, 8192, 512

TABLE_PAGES = """
import json, re, struct, sys
from pathlib import Path
import numpy as np
from gguf_pager import BudgetError, Llama, read_layout

def resident_pages(path, first, n_bytes):
    \"\"\"Return how many whole pages of these bytes of a file this process has mapped, by the kernel's table of pages.\"\"\"
    n = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, offset, _, _, *name = line.split(maxsplit=5)
        if not name or name[0] != str(path):
            continue
        begin, end = (int(part, 16) for part in span.split("-"))
        at = begin - int(offset, 16)
        low, high = max(begin, at + -(-first // 4096) * 4096), min(end, at + (first + n_bytes) // 4096 * 4096)
        with open("/proc/self/pagemap", "rb") as pages:
            pages.seek(low // 4096 * 8)
            found = pages.read(max(0, high - low) // 4096 * 8)
        n += sum(entry >> 63 for (entry,) in struct.iter_unpack("=Q", found))
    return n

def peak():
    return int(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)) * 1024

path, n_tokens, batch = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
(table,) = read_layout(path).tables
with open(path, "rb") as file:
    while file.read(1 << 20):  # all of it is in the page cache: nothing that is looked at comes alone
        pass
arguments = {"n_ctx": batch, "n_batch": batch, "n_ubatch": batch, "n_threads": 2, "n_threads_batch": 2, "verbose": False}
try:
    Llama(str(path), budget=1000, **arguments)
except BudgetError as error:
    budget = int(re.search(r"\\((\\d+) bytes\\)", str(error))[1]) + (8 << 20)  # so that all its experts fit, and its batches
llm = Llama(str(path), budget=budget, **arguments)
tokens = np.random.default_rng(3).permutation(np.arange(300, table.ne[1]))[:n_tokens].tolist()
for at in range(0, n_tokens, batch):
    llm.reset()
    llm.eval(tokens[at : at + batch])
stats = llm.pager.stats()
print(json.dumps({"pages": resident_pages(path, table.offset_bytes, table.row_bytes * table.ne[1]), "peak_bytes": peak(), "budget_bytes": budget,
                  "rows": stats.rows_read, "bytes": stats.row_bytes_read, "row_bytes": table.row_bytes,
                  "left_alone": stats.left_alone}))
"""


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tiny model with a vocabulary of 70,000: its table has 72 MB."""
    path = tmp_path_factory.mktemp("wide") / "wide.gguf"
    row = zoo_metadata.ARCHITECTURES["qwen3moe"]
    metadata = make_zoo.model_keys("qwen3moe", row, 256)
    more = N_VOCAB - zoo_metadata.N_VOCAB
    for key, values in (("tokens", [f"token{i}" for i in range(more)]), ("scores", [-1000.0] * more), ("token_type", [1] * more)):
        known = metadata[f"tokenizer.ggml.{key}"]
        assert isinstance(known, list)
        metadata[f"tokenizer.ggml.{key}"] = known + values
    metadata["qwen3moe.vocab_size"] = N_VOCAB
    writer = make_zoo.new_writer(path, metadata)
    types = make_zoo.expert_types(row.file_type)
    for name, shape in make_zoo.tidy(make_zoo.tensor_shapes(metadata), row).items():
        make_zoo.add_tensor(writer, name, make_zoo.random_values(name, shape, row, 1), make_zoo.tensor_type(name, types))
    make_zoo.finish(writer)
    yield path
    path.unlink()


@LINUX
def test_process_stays_under_its_budget_whatever_it_looks_up(wide_model: Path) -> None:
    """With little more than the smallest budget that is taken: where rows stay with the process, they come on top."""
    result = run(TABLE_PAGES, wide_model, N_RANDOM, BATCH)
    assert result["rows"] == N_RANDOM and result["bytes"] == N_RANDOM * result["row_bytes"]
    assert result["left_alone"] == 0
    assert result["pages"] == 0, "no page of the table is mapped in this process"
    assert result["peak_bytes"] <= result["budget_bytes"] * 1.03


# ---- what is looked up ----

def test_each_row_of_a_batch_is_read_once_and_counted(zoo_model: Model, paged: Factory) -> None:
    llm = paged(zoo_model("qwen3moe"), "100%", n_ubatch=64)
    (table,) = read_layout(zoo_model("qwen3moe")).tables
    llm.eval([9, 11, 9, 9, 12])
    assert (llm.pager.stats().rows_read, llm.pager.stats().row_bytes_read) == (3, 3 * table.row_bytes)
    llm.eval([9])
    assert llm.pager.stats().rows_read == 4
    llm.close()
    assert llm.pager.stats().rows_read == 4, "the last figures stay"


def test_tied_table_is_not_looked_up_by_us(zoo_model: Model, paged: Factory, stock: Factory, tmp_path: Path) -> None:
    """It is the output matrix too, which is kept in RAM whole."""
    from test_errors import keep, rewrite

    path = rewrite(zoo_model("qwen3moe"), tmp_path / "tied.gguf",
                   lambda writer, tensor: None if tensor.name == "output.weight" else keep(writer, tensor))
    assert read_layout(path).tables == ()
    tokens = some_tokens(12)
    ours, theirs = paged(path, logits_all=True, n_ubatch=1), stock(path, logits_all=True, n_ubatch=1)
    assert (evaluate(ours, tokens) == evaluate(theirs, tokens)).all()
    assert ours.pager.stats().rows_read == 0 and ours.pager.stats().left_alone == 0


def decode_embeddings(model: Any, context: Any, values: Logits, first: int) -> Logits:
    """Decode a batch of embeddings instead of tokens, as programs do with pictures."""
    n, n_embd = values.shape
    batch = low.llama_batch_init(n, n_embd, 1)
    batch.n_tokens = n
    ctypes.memmove(batch.embd, np.ascontiguousarray(values, np.single).ctypes.data, values.size * 4)
    for i in range(n):
        batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = first + i, 1, 0, 1
    assert low.llama_decode(context, batch) == 0
    low.llama_batch_free(batch)
    n_vocab = low.llama_vocab_n_tokens(low.llama_model_get_vocab(model))
    return np.ctypeslib.as_array(low.llama_get_logits(context), shape=(n, n_vocab)).copy()


@pytest.mark.parametrize(("arch", "n_rows"), (("qwen3moe", 0), ("gemma4", 1)))
def test_batch_of_embeddings_looks_up_no_token(zoo_model: Model, arch: str, n_rows: int) -> None:
    """gemma4's layers then take the first row of their table for all of it."""
    path = zoo_model(arch)
    values = np.random.default_rng(4).standard_normal((6, read_layout(path).tables[0].ne[0]), np.single)

    def steps(rows_read: Callable[[], int], is_paged: bool) -> Logits:
        with low_level(path) as (model, context):
            found: list[Logits] = []
            for first in (0, 10):
                found += [*decode(model, context, some_tokens(4), first)]
                before = rows_read()
                found += [*decode_embeddings(model, context, values, first + 4)]
                assert rows_read() - before == (n_rows if is_paged else 0)
            return np.array(found)

    def count() -> int:
        stats = installed.pagers[0].stats()
        assert stats.left_alone == 0
        return stats.rows_read

    with gguf_pager.install(budget="100%") as installed:
        ours = steps(count, True)
    assert (ours == steps(lambda: 0, False)).all() and ours.std() > 0


def test_contexts_of_one_model_look_up_their_own_rows(zoo_model: Model) -> None:
    path = zoo_model("qwen4exp")
    tokens = [some_tokens(20, seed) for seed in (1, 2)]

    def steps() -> Logits:
        with low_level(path) as (model, first):
            params = low.llama_context_default_params()
            params.n_ctx, params.n_batch, params.n_ubatch = 128, 64, 64
            params.n_threads = params.n_threads_batch = 1
            params.flash_attn_type = low.LLAMA_FLASH_ATTN_TYPE_DISABLED
            second = low.llama_init_from_model(model, params)
            found = []
            for at, n in ((0, 9), (9, 1), (10, 7), (17, 1), (18, 1), (19, 1)):  # graphs that are used again among them
                for context, own in zip((first, second), tokens, strict=True):
                    found += [*decode(model, context, own[at : at + n], at)]
            low.llama_free(second)
            return np.array(found)

    with gguf_pager.install(budget="100%"):
        ours = steps()
    assert (ours == steps()).all() and ours.std() > 0


@pytest.mark.parametrize("is_enough", (True, False))
@pytest.mark.parametrize("arch", ("gemma4", "qwen3moe"))
def test_memory_is_for_a_batch_of_different_tokens_and_no_more(
    zoo_model: Model, stock: Factory, paged: Factory, monkeypatch: pytest.MonkeyPatch, arch: str, is_enough: bool
) -> None:
    """With less, the look-up is left to llama.cpp, with the same bits."""
    real, tables = budget.row_bytes, read_layout(zoo_model(arch)).tables
    less = 0 if is_enough else 3 * 64 * len(tables) + tables[-1].row_bytes  # what aligning may cost, and a row
    monkeypatch.setattr(budget, "row_bytes", lambda *given: real(*given) - less)
    tokens = list(range(100, 164))
    ours = paged(zoo_model(arch), "100%", logits_all=True, n_ubatch=64)
    theirs = stock(zoo_model(arch), logits_all=True, n_ubatch=64)
    assert (evaluate(ours, tokens, (64,)) == evaluate(theirs, tokens, (64,))).all()
    stats = ours.pager.stats()
    assert stats.left_alone == (0 if is_enough else 1)
    assert stats.rows_read == 64 * (len(tables) - stats.left_alone)
