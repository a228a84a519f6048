"""What can go wrong is said in one exception with the remedy, leaves nothing behind, and never gives a wrong token."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import make_zoo
import numpy as np
import pytest
from conftest import (
    ARGUMENTS,
    Factory,
    Logits,
    evaluate,
    footprint_of,
    settled_footprint_of,
    some_tokens,
    stated_minimum,
)
from llama_cpp import llama_cpp as low
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding
from test_install import decode, decode_status, low_level

import gguf_pager
from gguf_pager import BudgetError, EngineError, LayoutError, PagerError, PagerIOError, _native
from gguf_pager.model import engine

Model = Callable[..., Path]

N_TRUNCATIONS = 24


@contextlib.contextmanager
def leaving_nothing(folder: Path) -> Iterator[None]:
    """Check that no descriptor, thread, mapping of a file in `folder` or wrapped function stays behind."""
    before = footprint_of(folder)
    yield
    assert settled_footprint_of(folder, before) == before


def open_paged(path: Path, budget: float | str = "min", **arguments: Any) -> gguf_pager.Llama:
    return gguf_pager.Llama(str(path), budget=budget, **ARGUMENTS | arguments)


def rewrite(source: Path, path: Path, change: Callable[[gguf.GGUFWriter, gguf.ReaderTensor], None]) -> Path:
    """Write a model again; `change` adds each tensor, or another, or none."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    make_zoo.copy_fields(reader, writer)
    for tensor in reader.tensors:
        change(writer, tensor)
    make_zoo.finish(writer)
    return path


def keep(writer: gguf.GGUFWriter, tensor: gguf.ReaderTensor) -> None:
    writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)


# ---- files that cannot be paged ----

def no_gguf(path: Path, _: Path) -> None:
    path.write_text("this is a shopping list")


def empty(path: Path, _: Path) -> None:
    path.touch()


def folder(path: Path, _: Path) -> None:
    path.mkdir()


def vocabulary(path: Path, source: Path) -> None:
    rewrite(source, path, lambda writer, tensor: None)


def uneven(path: Path, source: Path) -> None:
    """The up tensor of a layer loses an expert."""

    def change(writer: gguf.GGUFWriter, tensor: gguf.ReaderTensor) -> None:
        if tensor.name == "blk.1.ffn_up_exps.weight":
            writer.add_tensor(tensor.name, tensor.data[:-1], raw_dtype=tensor.tensor_type)
        else:
            keep(writer, tensor)

    rewrite(source, path, change)


@pytest.mark.parametrize(("make", "message"), (
    (no_gguf, r"is not a GGUF file: it begins with b'this'"),
    (empty, r"is not a GGUF file: it begins with b''"),
    (folder, r"is a folder without a GGUF model: give the path of a .gguf file"),
    (vocabulary, r"is a vocabulary without a model: open the model's own file"),
    (uneven, r"expert tensors of block 1 do not belong together: they hold 9, 10 experts"),
), ids=lambda value: getattr(value, "__name__", ""))
def test_file_that_is_no_model_is_refused(
    zoo_model: Model, tmp_path: Path, make: Callable[[Path, Path], None], message: str
) -> None:
    path = tmp_path / "model.gguf"
    make(path, zoo_model("qwen3moe"))
    with leaving_nothing(tmp_path), pytest.raises(LayoutError, match=message):
        open_paged(path)
    with pytest.raises(LayoutError, match=message):
        gguf_pager.read_layout(path)


@pytest.mark.parametrize("kind", ("I8", "I32", "I64", "F64"))
def test_experts_that_ggml_cannot_multiply_are_refused(zoo_model: Model, tmp_path: Path, kind: str) -> None:
    numpy_type = {"I8": np.int8, "I32": np.int32, "I64": np.int64, "F64": np.float64}[kind]

    def change(writer: gguf.GGUFWriter, tensor: gguf.ReaderTensor) -> None:
        if tensor.name == "blk.2.ffn_down_exps.weight":
            writer.add_tensor(tensor.name, np.ones(tensor.shape[::-1].tolist(), numpy_type))
        else:
            keep(writer, tensor)

    path = rewrite(zoo_model("qwen3moe"), tmp_path / "model.gguf", change)
    with leaving_nothing(tmp_path), pytest.raises(
        LayoutError, match=rf"blk\.2\.ffn_down_exps\.weight is of type {kind.lower()}, which ggml cannot multiply"
    ):
        open_paged(path)


def test_truncated_file_is_refused_wherever_it_ends(zoo_model: Model, tmp_path: Path) -> None:
    """In the metadata, in the tensor table, in the padding, in the data, one byte before the end."""
    whole = zoo_model("qwen3moe").read_bytes()
    data_at = engine.read_header(zoo_model("qwen3moe")).data_offset_bytes
    last = max(tensor.offset_bytes + tensor.n_bytes for tensor in engine.read_header(zoo_model("qwen3moe")).tensors)
    ends = [*np.linspace(1, data_at - 1, N_TRUNCATIONS, dtype=int), data_at,
            *np.linspace(data_at + 1, last - 1, N_TRUNCATIONS, dtype=int)]
    path = tmp_path / "model.gguf"
    with leaving_nothing(tmp_path):
        for end in ends:
            path.write_bytes(whole[:end])
            with pytest.raises(LayoutError, match=r"not a complete GGUF file|is truncated: tensor|is not a GGUF file"):
                open_paged(path)
    path.write_bytes(whole[:last])
    open_paged(path).close()


DAMAGE = """
import sys
import numpy as np
from pathlib import Path
import gguf_pager
path, header_bytes = Path(sys.argv[1]), int(sys.argv[2])
whole = path.read_bytes()
rng = np.random.default_rng(1)
refused = 0
for _ in range(300):
    damaged = bytearray(whole)
    for at in rng.integers(0, header_bytes, 3):
        damaged[at] = rng.integers(0, 256)
    path.write_bytes(damaged)
    try:
        gguf_pager.read_layout(path)
    except gguf_pager.PagerError:
        refused += 1
print(refused)
"""


def test_damaged_header_never_ends_the_process(zoo_model: Model, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    shutil.copy(zoo_model("qwen3moe"), path)
    header_bytes = engine.read_header(path).data_offset_bytes
    done = subprocess.run([sys.executable, "-c", DAMAGE, str(path), str(header_bytes)], capture_output=True, text=True,
                          timeout=120, check=False, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr[-800:]
    assert int(done.stdout) > 30


def test_missing_file_is_refused_as_in_stock(tmp_path: Path) -> None:
    with leaving_nothing(tmp_path), pytest.raises(ValueError, match="does not exist"):
        open_paged(tmp_path / "model.gguf")
    with pytest.raises(LayoutError, match="does not exist"):
        gguf_pager.read_layout(tmp_path / "model.gguf")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file_is_refused(zoo_model: Model, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    shutil.copy(zoo_model("qwen3moe"), path)
    path.chmod(0)
    with leaving_nothing(tmp_path), pytest.raises(LayoutError, match="Permission denied"):
        open_paged(path)


def test_read_only_file_is_enough(zoo_model: Model, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    shutil.copy(zoo_model("qwen3moe"), path)
    path.chmod(0o444)
    tmp_path.chmod(0o555)
    try:
        llm = open_paged(path)
        llm.eval(some_tokens(3))
        assert llm.n_tokens == 3
        llm.close()
    finally:
        tmp_path.chmod(0o755)


@pytest.mark.parametrize("part", (2, 3))
def test_split_model_with_a_part_missing_or_damaged_is_refused(zoo_model: Model, tmp_path: Path, part: int) -> None:
    first = make_zoo.make_split(zoo_model("qwen3moe"), tmp_path, 3)
    other = tmp_path / first.name.replace("00001-of", f"{part:05d}-of")
    with leaving_nothing(tmp_path):
        with pytest.raises(LayoutError, match=f"is part {part} of 3 of a split model: open part 1, {first.name}"):
            open_paged(other)
        whole = other.read_bytes()
        other.write_bytes(whole[:-4096])
        with pytest.raises(LayoutError, match=f"{other.name} is truncated"):
            open_paged(first)
        other.unlink()
        with pytest.raises(LayoutError, match=f"Part {part} of 3 is missing: {other.name} does not lie beside {first.name}"):
            open_paged(first)


def test_adapter_is_no_model(lora: Path) -> None:
    with leaving_nothing(lora.parent), pytest.raises(LayoutError, match=r"is an adapter \(LoRA\): open the model it was made"):
        open_paged(lora)


# ---- budgets ----

MALFORMED = ("", " ", "lots", "4 GiBs", "4XB", "-1", "-4GiB", "0", "0%", "-5%", "101%", "%", "1e400", "nan", "inf", "1,5GB",
             "4GiB 2", 0, -1, 0.0, -2.5, float("nan"), float("inf"), True, None, [4], b"4GiB", 3 + 0j)


@pytest.mark.parametrize("value", MALFORMED, ids=repr)
def test_malformed_budget_is_refused_with_what_would_be_right(zoo_model: Model, value: Any) -> None:
    path = zoo_model("qwen3moe")
    with leaving_nothing(path), pytest.raises(BudgetError, match="budget"):
        open_paged(path, value)


TRY_MINIMUM = """
import re, sys
import gguf_pager
path, n_ctx = sys.argv[1], int(sys.argv[2])
arguments = {"n_ctx": n_ctx, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
def refused(budget):
    try:
        gguf_pager.Llama(path, budget=budget, **arguments).close()
    except gguf_pager.BudgetError as error:
        return int(re.search(r"\\((\\d+) bytes\\)", str(error))[1])
    return 0
least = refused(1000)
llm = gguf_pager.Llama(path, budget=least, **arguments)
llm.create_completion("the", max_tokens=4)
llm.close()
print(least, refused(least - (8 << 20)))
"""


@pytest.mark.parametrize("n_ctx", (256, 16384))
def test_budget_below_the_minimum_names_the_minimum_which_then_works(trace_model: Path, n_ctx: int) -> None:
    """In a fresh process, where nothing else has raised the memory in use; the KV cache counts."""
    done = subprocess.run([sys.executable, "-c", TRY_MINIMUM, str(trace_model), str(n_ctx)], capture_output=True,
                          text=True, timeout=60, check=False, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    first, then = map(int, done.stdout.split())
    assert then, "8 MiB less is too little: the minimum is no guess"
    assert abs(then - first) <= 4 << 20, "nor does what an earlier model has freed change it"


LARGE_CONTEXT = {"n_ctx": 16384, "n_batch": 16384, "n_ubatch": 16384}


def test_budget_that_a_large_context_outgrows_says_what_to_lower(trace_model: Path) -> None:
    """Its buffers are for as many tokens at once as nobody asks, and more than the model."""
    with leaving_nothing(trace_model), pytest.raises(BudgetError) as raised:
        open_paged(trace_model, 1 << 30, **LARGE_CONTEXT)
    said = str(raised.value)
    assert stated_minimum(said) > 1 << 30
    assert re.search(r", of which this context takes [0-9.]+ GiB\. Lower n_ubatch or n_ctx, or raise it, or say budget='min'\.$", said)
    open_paged(trace_model, 1 << 30, **LARGE_CONTEXT | {"n_ubatch": 512}).close()


def test_further_context_that_is_too_large_says_what_to_lower(trace_model: Path) -> None:
    llm = open_paged(trace_model, 1 << 30)
    params = low.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 16384
    params.flash_attn_type = low.LLAMA_FLASH_ATTN_TYPE_DISABLED
    with pytest.raises(BudgetError, match="Lower n_ubatch or n_ctx, or raise it"):
        low.llama_init_from_model(llm.model, params)
    llm.eval([5, 6, 7])
    llm.close()


def test_budget_that_no_context_fits_says_nothing_of_it(trace_model: Path) -> None:
    with pytest.raises(BudgetError, match=r"bytes\)\. Raise it, or say budget='min'\.$"):
        open_paged(trace_model, 1 << 20)


def test_refused_budget_leaves_nothing(zoo_model: Model) -> None:
    path = zoo_model("qwen3moe")
    for arguments in ({}, {"lock_dense": "copy"}, {"embedding": True, "pooling_type": low.LLAMA_POOLING_TYPE_MEAN}):
        with leaving_nothing(path):
            with pytest.raises(BudgetError) as raised:
                open_paged(path, 1 << 20, **arguments)
            assert stated_minimum(str(raised.value)) > 1 << 20


@pytest.mark.parametrize("arch", ("qwen3moe", "bailingmoe2", "llama4"))
def test_share_below_the_minimum_names_the_minimum_which_then_works(zoo_model: Model, arch: str) -> None:
    path = zoo_model(arch)
    with leaving_nothing(path):
        with pytest.raises(BudgetError, match="too few") as raised:
            open_paged(path, "0.5%")
        found = re.search(r"at least ([0-9.]+)%", str(raised.value))
        assert found
        open_paged(path, f"{found[1]}%").close()
        with pytest.raises(BudgetError, match="too few"):
            open_paged(path, f"{float(found[1]) - 0.1}%")


LIMITED = """
import os, resource, sys
from pathlib import Path
import gguf_pager
from gguf_pager import Options, Pager
pager = Pager(gguf_pager.read_layout(sys.argv[1]), Options())
def left():
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
before = left()
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (64 << 20), resource.RLIM_INFINITY))
try:
    pager.open([4000] * len(pager.needs))
except gguf_pager.BudgetError as error:
    assert left() == before
    print(error)
pager.open([8] * len(pager.needs))
pager.close()
assert left() == before
"""


def test_memory_that_the_system_does_not_give_is_a_budget_error(trace_model: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LIMITED, str(trace_model)], capture_output=True, text=True, timeout=60,
                          check=False, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    assert re.match(r"The system does not give [0-9,]+ bytes for experts: lower the budget\.", done.stdout)


# ---- arguments ----

@pytest.mark.parametrize(("name", "hint"), (
    ("n_ctxx", "Did you mean n_ctx?"), ("bugdet", "Did you mean budget?"), ("n_reader", "Did you mean n_readers?"),
    ("chatformat", "Did you mean chat_format?"), ("zzzzqq", "'zzzzqq'."),
))
def test_unknown_argument_is_refused_with_a_suggestion(zoo_model: Model, name: str, hint: str) -> None:
    path = zoo_model("qwen3moe")
    with leaving_nothing(path), pytest.raises(TypeError, match=re.escape(hint)):
        open_paged(path, **{name: 1})


@pytest.mark.parametrize("option", (
    {"read_ahead": -1}, {"profile": "x.json"}, {"adapt_threads": "no"}, {"overcommit": 1},
    {"policy": "best"}, {"policy": ""}, {"io": "fast"}, {"lock_dense": "yes"}, {"n_readers": 0}, {"n_readers": 257},
    {"n_readers": -1}, {"piece_bytes": 0}, {"piece_bytes": 4095}, {"piece_bytes": 5000}, {"piece_bytes": -4096},
    {"piece_bytes": 1 << 31}, {"piece_bytes": 1 << 70}, {"piece_bytes": "4096"}, {"n_readers": 2.5}, {"n_readers": True},
), ids=str)
def test_option_that_does_not_exist_is_refused(zoo_model: Model, option: dict[str, Any]) -> None:
    path, (name, value) = zoo_model("qwen3moe"), next(iter(option.items()))
    with leaving_nothing(path), pytest.raises(PagerError, match=f"{name}.*{re.escape(repr(value))}"):
        open_paged(path, **option)


@pytest.mark.parametrize("where", ("LlamaModel", "LlamaContext", "LlamaBatch", "LlamaTokenDataArray"))
def test_failure_of_the_original_while_constructing_leaves_nothing(
    zoo_model: Model, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """At each of its steps; after the second, the slots exist."""

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(llama_cpp._internals, where, fail)
    path = zoo_model("qwen3moe")
    with leaving_nothing(path), pytest.raises(MemoryError):
        open_paged(path)


# ---- the engine ----

@pytest.mark.parametrize("version", ("0.3.35", "0.2.90", "0.4.0", "0.4.1", "1.0.0", "0.3", "unknown", ""))
def test_version_that_is_not_known_is_refused(version: str) -> None:
    with pytest.raises(EngineError, match=r"pip install 'llama-cpp-python>=0\.3\.36,<0\.4'"):
        engine.check_version(version)


@pytest.mark.parametrize("version", ("0.3.36", "0.3.37", "0.3.99", "0.3.36+cu124"))
def test_version_that_is_known_is_taken(version: str) -> None:
    engine.check_version(version)


def test_old_version_is_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.3.2")
    with pytest.raises(EngineError, match="llama-cpp-python 0.3.2 is installed"):
        engine.load.__wrapped__()


@pytest.mark.parametrize("field", ("struct_bytes", "type", "ne", "nb", "op", "src", "view_src", "view_offs", "data",
                                   "name", "buffer"))
def test_struct_that_lies_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    """As if a new version had put something before this field of ggml_tensor."""
    read = _native.read_tensor

    def shifted(address: int) -> dict[str, Any]:
        seen = dict(read(address))
        value = seen[field]
        if isinstance(value, tuple):
            seen[field] = tuple(number + 8 for number in value)
        else:
            seen[field] = value + 8 if isinstance(value, int) else value[1:]
        return seen

    monkeypatch.setattr(_native, "read_tensor", shifted)
    shown = "size" if field == "struct_bytes" else field
    with pytest.raises(EngineError, match=rf"field '{shown}' of ggml_tensor in llama-cpp-python 0\.3\.\d+ is not where"):
        engine.load.__wrapped__()


# ---- a file that changes while it is in use ----

@pytest.fixture
def working(zoo_model: Model, stock: Factory, tmp_path: Path) -> tuple[Path, list[int], Logits]:
    """A model of one's own to damage, tokens, and the logits that stock gives."""
    path = tmp_path / "model.gguf"
    shutil.copy(zoo_model("qwen3moe"), path)
    tokens = some_tokens(24)
    return path, tokens, evaluate(stock(zoo_model("qwen3moe"), logits_all=True, n_ubatch=1), tokens)


def truncate_all(path: Path) -> None:
    os.truncate(path, 0)


def truncate_experts(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100_000)


def overwrite(path: Path) -> None:
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.seek(size // 2)
        file.write(bytes(size // 4))


def rewrite_a_dense_byte(path: Path) -> None:
    """One of a norm, and the file's time put back."""
    status = path.stat()
    norm = next(tensor for tensor in engine.read_header(path).tensors if tensor.name == "output_norm.weight")
    with open(path, "r+b") as file:
        file.seek(norm.offset_bytes + 5)
        old = file.read(1)[0]
        file.seek(norm.offset_bytes + 5)
        file.write(bytes([old ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def grow(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"more")


@contextlib.contextmanager
def damaged(path: Path, damage: Callable[[Path], None]) -> Iterator[None]:
    """Damage a file in place; then restore its content and its times."""
    whole, status = path.read_bytes(), path.stat()
    damage(path)
    yield
    with open(path, "r+b") as file:
        file.write(whole)
        file.truncate(len(whole))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("lock_dense", ("lock", "copy", "off"))
@pytest.mark.parametrize("damage", (truncate_all, truncate_experts, overwrite, rewrite_a_dense_byte, grow),
                         ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("budget", ("min", "100%"))
def test_file_changed_while_in_use_is_an_error_and_no_wrong_token(
    working: tuple[Path, list[int], Logits], budget: str, damage: Callable[[Path], None], lock_dense: str
) -> None:
    """Even when all experts are resident."""
    path, tokens, expected = working
    llm = open_paged(path, budget, logits_all=True, lock_dense=lock_dense, n_ubatch=1)
    assert (evaluate(llm, tokens[:8]) == expected[:8]).all()
    with damaged(path, damage):
        size = path.stat().st_size
        for _ in range(2):  # it stays usable, and stays right
            with pytest.raises(PagerIOError) as raised:
                llm.eval(tokens[8:])
            error = raised.value
            is_cut = damage in (truncate_all, truncate_experts)
            assert error.errno == (errno.ENODATA if is_cut else errno.ESTALE)
            assert error.path == str(path) and str(path) in str(error)
            assert error.offset_bytes == (size if is_cut else 0)
            assert ("truncated" if is_cut else "changed") in str(error) and str(error).endswith("Open it again.")
            assert llm.n_tokens == 8
        with pytest.raises(PagerIOError):
            llm("the", max_tokens=3)
    llm.reset()
    assert (evaluate(llm, tokens) == expected).all()
    llm.close()


@pytest.mark.parametrize("damage", (overwrite, truncate_experts), ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("at", (1, 30, 60, 90))
@pytest.mark.parametrize("n_failing", (1, 16))
def test_file_changed_in_the_middle_of_a_graph_aborts_it(
    zoo_model: Model, stock: Factory, tmp_path: Path, damage: Callable[[Path], None], at: int, n_failing: int
) -> None:
    path, tokens = tmp_path / "model.gguf", some_tokens(24)
    shutil.copy(zoo_model("qwen3moe"), path)
    expected = evaluate(stock(path, logits_all=True), tokens, (8, n_failing))
    count, stack = [0], contextlib.ExitStack()

    @low.ggml_backend_sched_eval_callback
    def meddle(address: int, ask: bool, data: int | None) -> bool:
        count[0] += 1
        if count[0] == at:
            stack.enter_context(damaged(path, damage))
        return False

    with gguf_pager.install(budget="min", lock_dense="copy") as installed, low_level(path, cb_eval=meddle) as (
        model, context
    ):
        count[0] = -10_000
        rows = [decode(model, context, tokens[:8])]
        assert not installed.pagers[0].stats().left_alone
        count[0] = 0
        with pytest.raises(PagerIOError) as raised:
            decode_status(context, tokens[8 : 8 + n_failing], 8)
        assert raised.value.errno in (errno.ESTALE, errno.ENODATA) and raised.value.path == str(path)
        stack.close()
        count[0] = -10_000
        rows += [decode(model, context, tokens[8 : 8 + n_failing], 8)]
        rows += [decode(model, context, [tokens[i]], i) for i in range(8 + n_failing, 24)]
    assert (np.concatenate(rows) == expected).all()


def test_file_changed_in_a_graph_that_reads_nothing_is_an_error_too(working: tuple[Path, list[int], Logits]) -> None:
    """All experts are resident, so that only a look at the file after the graph can tell."""
    path, tokens, expected = working
    is_meddling, damaging = False, contextlib.ExitStack()

    @low.ggml_backend_sched_eval_callback
    def meddle(address: int, ask: bool, data: int | None) -> bool:
        if is_meddling:
            damaging.enter_context(damaged(path, rewrite_a_dense_byte))
        return False

    with gguf_pager.install(budget="100%") as installed, low_level(path, cb_eval=meddle, n_ubatch=1) as (model, context):
        first = decode(model, context, tokens)
        assert low.llama_memory_seq_rm(low.llama_get_memory(context), 0, 23, -1)
        misses, is_meddling = installed.pagers[0].stats().misses, True
        with pytest.raises(PagerIOError, match="changed while in use"):
            decode_status(context, tokens[23:], 23)
        is_meddling = False
        damaging.close()
        assert low.llama_memory_seq_rm(low.llama_get_memory(context), 0, 23, -1)
        again = decode(model, context, tokens[23:], 23)
        assert installed.pagers[0].stats().misses == misses, "nothing was read meanwhile"
    assert (first == expected).all() and (again == expected[23:]).all()


@pytest.mark.parametrize("arch", ("jamba", "qwen3next"))
def test_recurrent_model_after_a_failure_refuses_until_reset(
    zoo_model: Model, stock: Factory, tmp_path: Path, arch: str
) -> None:
    """Half of its state has moved on, and cannot be taken back: going on would give wrong tokens."""
    path = tmp_path / "model.gguf"
    shutil.copy(zoo_model(arch), path)
    tokens = some_tokens(12)
    expected = evaluate(stock(path, logits_all=True), tokens, (12,))
    count, damaging = [-10_000], contextlib.ExitStack()

    @low.ggml_backend_sched_eval_callback
    def meddle(address: int, ask: bool, data: int | None) -> bool:
        count[0] += 1
        if count[0] == 60:
            damaging.enter_context(damaged(path, overwrite))
        return False

    with gguf_pager.install(budget="min"), low_level(path, cb_eval=meddle) as (model, context):
        decode(model, context, tokens[:8])
        count[0] = 0
        with pytest.raises(PagerIOError):
            decode_status(context, tokens[8:9], 8)
        damaging.close()
        assert decode_status(context, tokens[8:9], 8) == -1
        low.llama_memory_clear(low.llama_get_memory(context), True)
        assert (decode(model, context, tokens) == expected).all()


@pytest.mark.parametrize("how", ("removed", "replaced"))
def test_file_removed_or_replaced_while_in_use_does_no_harm(
    working: tuple[Path, list[int], Logits], how: str
) -> None:
    path, tokens, expected = working
    llm = open_paged(path, logits_all=True)
    assert (evaluate(llm, tokens[:8]) == expected[:8]).all()
    if how == "removed":
        path.unlink()
    else:
        other = path.with_suffix(".new")
        other.write_bytes(bytes(1000))
        other.replace(path)
    assert (evaluate(llm, tokens[8:]) == expected[8:]).all()
    llm.close()


def test_stock_goes_on_beside_a_paged_model_that_failed(working: tuple[Path, list[int], Logits], stock: Factory) -> None:
    path, tokens, expected = working
    theirs = stock(path, logits_all=True, n_ubatch=1, use_mmap=False)
    llm = open_paged(path)
    with damaged(path, overwrite), pytest.raises(PagerIOError):
        llm.eval(tokens)
    llm.close()
    assert (evaluate(theirs, tokens) == expected).all()
    assert isinstance(theirs, llama_cpp.Llama)


# ---- what is no file ----

def as_pipe(path: Path) -> None:
    os.mkfifo(path)


def as_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def as_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made, contextlib.chdir(path.parent):
        made.bind(path.name)


@pytest.mark.parametrize(("make", "what"), ((as_pipe, "a pipe"), (as_device, "a device"), (as_socket, "a socket")))
def test_pipe_or_device_as_model_part_or_mirror_is_refused_at_once(
    zoo_model: Model, tmp_path: Path, make: Callable[[Path], None], what: str
) -> None:
    path = tmp_path / "model.gguf"
    make(path)
    whole = tmp_path / "whole.gguf"
    shutil.copy(zoo_model("qwen3moe"), whole)
    first = make_zoo.make_split(zoo_model("qwen3moe"), tmp_path, 3)
    part = tmp_path / first.name.replace("00001-of", "00002-of")
    part.unlink()
    make(part)
    with leaving_nothing(tmp_path):
        with pytest.raises(LayoutError, match=f"model.gguf is {what}, .*: put it into a file"):
            open_paged(path)
        with pytest.raises(LayoutError, match=f"{part.name} is {what}"):
            open_paged(first)
        with pytest.raises(LayoutError, match=r"is no file|cannot be read|No such device|put it into a file"):
            open_paged(whole, mirror=[path])


# ---- drafts ----

@pytest.mark.parametrize("arch", ("jamba", "qwen3next", "granitehybrid"))
def test_draft_for_a_model_that_cannot_take_tokens_back_is_refused(zoo_model: Model, arch: str) -> None:
    path = zoo_model(arch)
    draft = LlamaPromptLookupDecoding(num_pred_tokens=4)
    with leaving_nothing(path.parent), pytest.raises(EngineError, match=r"recurrent state cannot. Leave out draft_model\."):
        open_paged(path, draft_model=draft)


def test_draft_for_a_model_that_can_is_taken(zoo_model: Model, pair: Factory) -> None:
    draft = LlamaPromptLookupDecoding(num_pred_tokens=4)
    texts = [llm("the the the the", max_tokens=6, temperature=0)["choices"][0]["text"]
             for llm in pair(zoo_model("qwen3moe"), "100%", draft_model=draft)]
    assert texts[0] == texts[1]


def test_checkout_that_was_not_built_says_what_to_do(tmp_path: Path) -> None:
    """A program in a checkout's folder finds the checkout, and not what pip has installed: it was an ImportError."""
    shutil.copytree(Path(gguf_pager.__file__).parent, tmp_path / "gguf_pager", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    program = ("import sys\nsys.meta_path[:] = [finder for finder in sys.meta_path if 'editable' not in str(finder).lower()]\n"
               "try:\n    from gguf_pager import Llama\nexcept Exception as error:\n    print(type(error).__name__, error)")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("EngineError The compiled part of gguf_pager cannot be loaded from ")
    assert "start your program in another folder" in done.stdout
