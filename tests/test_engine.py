"""The engine finds the ggml that llama_cpp computes with, and reads files as it does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from gguf_pager import EngineError, LayoutError, _native
from gguf_pager.model import engine

Model = Callable[..., Path]

REPOSITORY = Path(__file__).parent.parent


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a fresh process."""
    inherited = {name: value for name, value in os.environ.items()
                 if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "LLAMA_CPP_LIB_PATH")}
    return subprocess.run([sys.executable, "-c", program], env=inherited | environment, capture_output=True, text=True,
                          timeout=30, check=False, cwd=REPOSITORY)


# ---- the libraries ----

def test_libraries_are_those_that_llama_cpp_has_loaded() -> None:
    loaded = engine.load()
    assert loaded.folder == Path(llama_cpp.__file__).parent / "lib"
    mapped = {Path(line.split(None, 5)[5]) for line in Path("/proc/self/maps").read_text().splitlines() if ".so" in line}
    assert loaded.llama_library.resolve() in {path.resolve() for path in mapped}
    bases = {path.resolve() for path in mapped if "ggml-base" in path.name}
    assert len(bases) == 1, "one ggml, not two"


def test_loading_the_engine_does_not_import_llama_cpp() -> None:
    done = run("import sys; from gguf_pager.model import engine; engine.load(); engine.ggml_numbers();"
               "print('llama_cpp' in sys.modules)")
    assert done.stdout == "False\n" and done.stderr == ""


def test_folder_can_be_chosen_as_llama_cpp_lets_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path))
    assert engine.library_folder() == tmp_path


def test_missing_library_is_said_in_one_line() -> None:
    done = run("import gguf_pager.model.engine as e\ntry: e.load()\nexcept e.EngineError as error: print(error)",
               LLAMA_CPP_LIB_PATH="/nowhere")
    assert done.stdout.startswith("The ggml library of llama-cpp-python 0.3.")
    assert "cannot be loaded: /nowhere/libggml-base" in done.stdout and done.stdout.count("\n") == 1


def test_missing_llama_cpp_python_is_said_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EngineError, match="not installed: pip install"):
        engine.load.__wrapped__()


def test_library_that_lacks_a_function_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours in the place of ggml's: a library, but another one."""
    monkeypatch.setattr(engine, "_library", lambda folder, name: Path(_native.__file__))
    with pytest.raises(EngineError, match="lacks a function"):
        engine.load.__wrapped__()


@pytest.mark.parametrize(("environment", "expected"), (
    ({}, engine.SPIN_COUNT), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None"),
), ids=str)
def test_spinning_is_bounded_unless_the_user_has_said_otherwise(environment: dict[str, str], expected: str) -> None:
    done = run("import os; from gguf_pager.model import engine; engine.load(); print(os.environ.get('GOMP_SPINCOUNT'))",
               **environment)
    assert done.stdout == f"{expected}\n"


def test_spinning_is_left_alone_once_llama_cpp_is_there() -> None:
    done = run("import os, llama_cpp; from gguf_pager.model import engine; engine.load();"
               "print(os.environ.get('GOMP_SPINCOUNT'))")
    assert done.stdout == "None\n"


# ---- what ggml says of itself ----

def test_numbers_of_operations_are_those_of_their_names() -> None:
    base = engine.load().base
    *operations, flag, of_rows, of_routers, type_i32, type_f32, is_host, traits, block_size, type_size, graphs = engine.ggml_numbers()
    assert [base.ggml_op_name(number) for number in operations] == [
        b"NONE", b"MUL_MAT_ID", b"ARGSORT", b"TOP_K", b"VIEW", b"RESHAPE", b"CUSTOM", b"ADD_ID", b"GET_ROWS"
    ]
    assert [base.ggml_op_name(number) for number in of_rows] == [b"GLU", b"UNARY", b"SQR", b"SCALE", b"CLAMP", b"MUL"]
    assert [base.ggml_op_name(number) for number in of_routers] == [b"MUL", b"ADD", b"REPEAT", b"NORM", b"RMS_NORM"]
    assert flag == 16, "GGML_TENSOR_FLAG_COMPUTE of ggml.h"
    assert base.ggml_type_name(type_i32) == b"i32" and base.ggml_type_name(type_f32) == b"f32"
    assert min(is_host, traits, block_size, type_size, *graphs) > 0


MULTIPLIABLE = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
                "IQ1_S", "IQ2_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "MXFP4", "TQ1_0")


@pytest.mark.parametrize("name", (*MULTIPLIABLE, "I8", "I16", "I32", "I64", "F64"))
def test_types_that_can_be_multiplied_are_known(name: str) -> None:
    number = GGMLQuantizationType[name].value
    assert engine.can_multiply(engine.load(), number) == (name in MULTIPLIABLE)


# ---- headers ----

def test_header_is_as_another_reader_sees_it(zoo_model: Model) -> None:
    path = zoo_model("deepseek4")
    header, reader = engine.read_header(path), gguf.GGUFReader(path)
    assert header.path == path and header.file_bytes == path.stat().st_size
    assert header.data_offset_bytes == reader.data_offset
    assert len(header.tensors) == len(reader.tensors) > 50
    for ours, theirs in zip(header.tensors, reader.tensors, strict=True):
        assert ours.name == theirs.name and ours.type == theirs.tensor_type
        assert ours.type_name == theirs.tensor_type.name.lower()
        assert ours.ne == (*(int(n) for n in theirs.shape), 1, 1, 1, 1)[:4]
        assert (ours.offset_bytes, ours.n_bytes) == (theirs.data_offset, theirs.n_bytes)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF."):
            theirs = field.contents()
            is_text = isinstance(theirs, list) and isinstance(theirs[0], str)
            assert header.values[field.name] == pytest.approx(len(theirs) if is_text else theirs)


VALUES: dict[str, Any] = {
    "uint8": 200, "int8": -100, "uint16": 60_000, "int16": -30_000, "uint32": 4_000_000_000, "int32": -2_000_000_000,
    "float32": 0.5, "bool": True, "uint64": 1 << 63, "int64": -(1 << 62), "float64": 0.1,
    "string": "Größe \u2581 \U0001f600", "array": [3, 1, 2],
}


def test_values_of_every_kind_are_read(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "arch")
    for kind, value in VALUES.items():
        getattr(writer, f"add_{kind}")(f"x.{kind}", value)
    writer.add_array("x.floats", [0.25, 2.0])
    writer.add_array("x.texts", ["a", "b", "c"])
    writer.add_array("x.long", list(range(5000)))
    writer.add_tensor("t", np.zeros((2, 3), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    values = engine.read_header(tmp_path / "a.gguf").values
    assert {name: values[f"x.{name}"] for name in VALUES} == VALUES
    assert values["x.floats"] == [0.25, 2.0]
    assert values["x.texts"] == 3, "of texts and of long arrays the length is wanted"
    assert values["x.long"] == 5000


def test_values_outlive_the_reader(zoo_model: Model) -> None:
    """Arrays are copied out of ggml's memory before it is freed."""
    first = engine.read_header(zoo_model("deepseek4")).values["deepseek4.attention.compress_ratios"]
    for _ in range(50):
        engine.read_header(zoo_model("qwen3moe"))
    assert first == [0, 0, 4, 128]


def test_file_that_is_no_gguf_is_refused_before_ggml_sees_it(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGML" + bytes(100))
    with pytest.raises(LayoutError, match="begins with b'GGML'"):
        engine.read_header(path)
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(LayoutError, match="not a complete GGUF file"):
        engine.read_header(path)
