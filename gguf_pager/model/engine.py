"""The ggml that llama-cpp-python computes with: where it is, what it says of its structs, what it reads in a file."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf_pager import _native
from gguf_pager.errors import EngineError, LayoutError
from gguf_pager.files import OpenedFile

OLDEST, NEWEST = (0, 3, 36), (0, 4)
"""llama-cpp-python from the first whose graph and structs are known, up to the next that may change them."""

SPIN_COUNT = "20000"
"""libgomp's threads spin this often between pieces of graph before they sleep. Sleeping at once costs a fifth of the
speed, spinning without end burns the processor during reads: 20.9 tok/s at two thirds of the CPU time, 16.1 asleep; the figures are of this project's prototype
(Qwen3-30B shape, 25 % resident, 2 cores)."""

_OBJECT_HEADER_BYTES = 32
"""sizeof(struct ggml_object), which ggml_tensor_overhead() includes: offs, size, next, type, padding."""


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


class _GgufInitParams(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


class _CpuTypeTraits(ctypes.Structure):
    _fields_ = [
        ("from_float", ctypes.c_void_p),
        ("vec_dot", ctypes.c_void_p),
        ("vec_dot_type", ctypes.c_int),
        ("nrows", ctypes.c_int64),
    ]


@dataclass(frozen=True, slots=True)
class Engine:
    """The loaded libraries. Made by `load`."""

    version: str
    folder: Path
    base: ctypes.CDLL
    cpu: ctypes.CDLL | None

    @property
    def llama_library(self) -> Path:
        """The path of libllama."""
        return _library(self.folder, "llama")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One entry of a GGUF file's tensor table; `offset_bytes` counts from the start of the file."""

    name: str
    type: int
    type_name: str
    ne: tuple[int, int, int, int]
    offset_bytes: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a GGUF file says of itself. `values` holds scalars, strings, arrays of numbers, and of other arrays the lengths;
    `kinds` how each is stored: "u32", "string", "array of i32".
    """

    path: Path
    file_bytes: int
    data_offset_bytes: int
    values: dict[str, Any]
    tensors: tuple[TensorInfo, ...]
    kinds: dict[str, str]


def _library(folder: Path, name: str) -> Path:
    return folder / f"lib{name}{'.dylib' if sys.platform == 'darwin' else '.so'}"


def library_folder() -> Path:
    """Return the folder of the libraries that `import llama_cpp` would load, without importing it.

    Raises:
        EngineError: llama-cpp-python is not installed.
    """
    override = os.environ.get("LLAMA_CPP_LIB_PATH")
    if override:
        return Path(override)
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise EngineError("llama-cpp-python is not installed: pip install 'llama-cpp-python>=0.3.36,<0.4'.")
    return Path(next(iter(spec.submodule_search_locations))) / "lib"


def check_version(version: str) -> None:
    """Raise EngineError unless this llama-cpp-python is one whose structs are known."""
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())
    if not OLDEST <= numbers < NEWEST:
        raise EngineError(
            f"llama-cpp-python {version} is installed, but gguf_pager knows 0.3.36 up to 0.4: "
            "pip install 'llama-cpp-python>=0.3.36,<0.4'."
        )


@functools.cache
def load() -> Engine:
    """Load and verify the ggml libraries of llama-cpp-python; the same ones that `import llama_cpp` uses.

    Raises:
        EngineError: they are missing, of an unknown version, or lay out their structs in an unknown way.
    """
    folder = library_folder()
    try:
        version = importlib.metadata.version("llama_cpp_python")
    except importlib.metadata.PackageNotFoundError:
        raise EngineError("llama-cpp-python is not installed: pip install 'llama-cpp-python>=0.3.36,<0.4'.") from None
    check_version(version)
    _limit_spinning()
    try:
        base = ctypes.CDLL(str(_library(folder, "ggml-base")))
    except OSError as error:
        raise EngineError(f"The ggml library of llama-cpp-python {version} cannot be loaded: {error}.") from None
    try:
        cpu: ctypes.CDLL | None = ctypes.CDLL(str(_library(folder, "ggml-cpu")))
    except OSError:
        cpu = None  # a build with loadable backends: only the check of multipliable types is lost
    try:
        _declare(base)
        if "llama_cpp" not in sys.modules:
            base.ggml_log_set(_silence, None)  # llama_cpp sets its own when it is imported
        _verify_tensor_struct(base, version)
    except AttributeError as error:
        raise EngineError(f"The ggml library of llama-cpp-python {version} lacks a function: {error}.") from None
    return Engine(version, folder, base, cpu)


def _limit_spinning() -> None:
    """Bound libgomp's spinning, unless the user has said something or libgomp has read its settings already."""
    said = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys()
    if not said and "llama_cpp" not in sys.modules:
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)  # type: ignore[untyped-decorator]
def _silence(level: int, text: bytes, data: int) -> None:
    pass


def _declare(base: ctypes.CDLL) -> None:
    pointer, size, i64, integer = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64, ctypes.c_int
    text = ctypes.c_char_p
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "ggml_init": (pointer, [_InitParams]),
        "ggml_free": (None, [pointer]),
        "ggml_new_tensor_2d": (pointer, [pointer, integer, i64, i64]),
        "ggml_new_tensor_3d": (pointer, [pointer, integer, i64, i64, i64]),
        "ggml_mul_mat_id": (pointer, [pointer, pointer, pointer, pointer]),
        "ggml_argsort": (pointer, [pointer, pointer, integer]),
        "ggml_top_k": (pointer, [pointer, pointer, integer]),
        "ggml_view_2d": (pointer, [pointer, pointer, i64, i64, size, size]),
        "ggml_reshape_2d": (pointer, [pointer, pointer, i64, i64]),
        "ggml_custom_4d": (pointer, [pointer, integer, i64, i64, i64, i64, pointer, integer, pointer, integer, pointer]),
        "ggml_swiglu_split": (pointer, [pointer, pointer, pointer]),
        "ggml_relu": (pointer, [pointer, pointer]),
        "ggml_sqr": (pointer, [pointer, pointer]),
        "ggml_scale": (pointer, [pointer, pointer, ctypes.c_float]),
        "ggml_clamp": (pointer, [pointer, pointer, ctypes.c_float, ctypes.c_float]),
        "ggml_mul": (pointer, [pointer, pointer, pointer]),
        "ggml_add": (pointer, [pointer, pointer, pointer]),
        "ggml_repeat": (pointer, [pointer, pointer, pointer]),
        "ggml_norm": (pointer, [pointer, pointer, ctypes.c_float]),
        "ggml_rms_norm": (pointer, [pointer, pointer, ctypes.c_float]),
        "ggml_add_id": (pointer, [pointer, pointer, pointer, pointer]),
        "ggml_get_rows": (pointer, [pointer, pointer, pointer]),
        "ggml_set_name": (pointer, [pointer, text]),
        "ggml_get_name": (text, [pointer]),
        "ggml_get_data": (pointer, [pointer]),
        "ggml_nbytes": (size, [pointer]),
        "ggml_op_name": (text, [integer]),
        "ggml_type_name": (text, [integer]),
        "ggml_blck_size": (i64, [integer]),
        "ggml_type_size": (size, [integer]),
        "ggml_tensor_overhead": (size, []),
        "ggml_log_set": (None, [pointer, pointer]),
        "gguf_init_from_file": (pointer, [text, _GgufInitParams]),
        "gguf_free": (None, [pointer]),
        "gguf_get_data_offset": (size, [pointer]),
        "gguf_get_n_kv": (i64, [pointer]),
        "gguf_get_key": (text, [pointer, i64]),
        "gguf_get_kv_type": (integer, [pointer, i64]),
        "gguf_get_arr_type": (integer, [pointer, i64]),
        "gguf_get_arr_n": (size, [pointer, i64]),
        "gguf_get_arr_data": (pointer, [pointer, i64]),
        "gguf_get_val_str": (text, [pointer, i64]),
        "gguf_get_val_data": (pointer, [pointer, i64]),
        "gguf_get_n_tensors": (i64, [pointer]),
        "gguf_get_tensor_name": (text, [pointer, i64]),
        "gguf_get_tensor_type": (integer, [pointer, i64]),
        "gguf_get_tensor_offset": (size, [pointer, i64]),
        "gguf_get_tensor_size": (size, [pointer, i64]),
        "gguf_get_tensor_ne": (ctypes.POINTER(i64), [pointer, i64]),
        "ggml_backend_buffer_is_host": (ctypes.c_bool, [pointer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(base, name)
        function.restype, function.argtypes = result, arguments


F32, Q8_0, Q4_K, I32 = 0, 8, 12, 26
"""Numbers of ggml types, checked by name."""

_MOST_TYPES = 64
"""More than ggml has (GGML_TYPE_COUNT of ggml.h is about 40): a larger number is none of its types."""


@contextmanager
def _scratch(base: ctypes.CDLL) -> Iterator[int]:
    context = base.ggml_init(_InitParams(1 << 20, None, False))
    if not context:
        raise EngineError("ggml cannot allocate 1 MiB: free some memory.")
    try:
        yield context
    finally:
        base.ggml_free(context)


def _verify_tensor_struct(base: ctypes.CDLL, version: str) -> None:
    """Compare our declaration of struct ggml_tensor with what ggml's own functions return, field by field."""
    with _scratch(base) as context:
        weights = base.ggml_new_tensor_3d(context, F32, 32, 24, 5)
        inputs = base.ggml_new_tensor_3d(context, F32, 32, 1, 3)
        ids = base.ggml_new_tensor_2d(context, I32, 2, 3)
        node = base.ggml_mul_mat_id(context, weights, inputs, ids)
        view = base.ggml_view_2d(context, inputs, 8, 2, 128, 64)
        base.ggml_set_name(weights, b"blk.0.ffn_up_exps.weight")
        seen = {name: _native.read_tensor(at) for name, at in
                (("weights", weights), ("ids", ids), ("node", node), ("view", view))}
        last = int(seen["weights"]["nb"][2]) * 5 if isinstance(seen["weights"]["nb"], tuple) else None
        checks = {
            "size": (seen["weights"]["struct_bytes"], base.ggml_tensor_overhead() - _OBJECT_HEADER_BYTES),
            "type": (base.ggml_type_name(seen["ids"]["type"]), b"i32"),
            "ne": (seen["weights"]["ne"], (32, 24, 5, 1)),
            "nb": (last, base.ggml_nbytes(weights)),
            "op": (base.ggml_op_name(seen["node"]["op"]), b"MUL_MAT_ID"),
            "src": (seen["node"]["src"], (weights, inputs, ids)),
            "view_src": (seen["view"]["view_src"], inputs),
            "view_offs": (seen["view"]["view_offs"], 64),
            "data": (seen["weights"]["data"], base.ggml_get_data(weights)),
            "name": (seen["weights"]["name"], base.ggml_get_name(weights).decode()),
            "buffer": (seen["weights"]["buffer"], 0),
        }
    for field, (ours, theirs) in checks.items():
        if ours != theirs:
            raise EngineError(
                f"The field '{field}' of ggml_tensor in llama-cpp-python {version} is not where gguf_pager expects it "
                f"({ours!r} instead of {theirs!r}): install a version that gguf_pager's README names as tested."
            )


_ALL_THREADS = -1
"""GGML_N_TASKS_MAX of ggml.h."""


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _cpu_traits(engine: Engine, context: int) -> int:
    """Return the address of ggml_get_type_traits_cpu, or 0 where it or what hangs on it is not as we know it.

    Then nodes stay ggml's own: experts that are there wait for those that are not.
    """
    if engine.cpu is None or not hasattr(engine.cpu, "ggml_get_type_traits_cpu"):
        return 0
    base, find, place = engine.base, _traits_function(engine.cpu), ctypes.c_int()
    node = base.ggml_custom_4d(context, F32, 4, 1, 1, 1, None, 0, ctypes.addressof(place), _ALL_THREADS, 1 << 20)
    if _native.read_tensor(node)["custom"] != (ctypes.addressof(place), _ALL_THREADS, 1 << 20):
        return 0
    for number, input_name in ((Q8_0, b"q8_0"), (Q4_K, b"q8_K"), (F32, b"f32")):
        traits = find(number).contents
        if not traits.vec_dot or traits.nrows not in (1, 2) or not 0 <= traits.vec_dot_type < _MOST_TYPES:
            return 0
        if base.ggml_type_name(traits.vec_dot_type) != input_name:
            return 0
    return _address(engine.cpu.ggml_get_type_traits_cpu)


def _traits_function(cpu: ctypes.CDLL) -> Any:
    traits = cpu.ggml_get_type_traits_cpu
    traits.restype, traits.argtypes = ctypes.POINTER(_CpuTypeTraits), [ctypes.c_int]
    return traits


@functools.cache
def ggml_numbers() -> _native._Ggml:
    """Return what the tap must know of this ggml, in the order of `_native.Tap`'s argument `ggml`.

    Numbers of operations are taken from tensors that ggml itself makes, never from a list.
    """
    engine = load()
    base = engine.base

    def op(tensor: int) -> int:
        number = _native.read_tensor(tensor)["op"]
        assert isinstance(number, int)
        return number

    with _scratch(base) as context:
        scores = base.ggml_new_tensor_2d(context, F32, 8, 3)
        ids = base.ggml_new_tensor_2d(context, I32, 2, 3)
        inputs = base.ggml_new_tensor_3d(context, F32, 32, 1, 3)
        weights = base.ggml_new_tensor_3d(context, F32, 32, 24, 5)
        numbers = (
            op(scores),
            op(base.ggml_mul_mat_id(context, weights, inputs, ids)),
            op(base.ggml_argsort(context, scores, 1)),
            op(base.ggml_top_k(context, scores, 2)),
            op(base.ggml_view_2d(context, scores, 2, 3, 32, 0)),
            op(base.ggml_reshape_2d(context, scores, 3, 8)),
            op(base.ggml_custom_4d(context, F32, 4, 1, 1, 1, None, 0, None, _ALL_THREADS, None)),
            op(base.ggml_add_id(context, base.ggml_new_tensor_3d(context, F32, 8, 2, 3), scores, ids)),
            op(base.ggml_get_rows(context, scores, base.ggml_new_tensor_2d(context, I32, 2, 1))),
        )
        row_operations = (
            op(base.ggml_swiglu_split(context, scores, scores)),
            op(base.ggml_relu(context, scores)),
            op(base.ggml_sqr(context, scores)),
            op(base.ggml_scale(context, scores, 2.0)),
            op(base.ggml_clamp(context, scores, 0.0, 1.0)),
            op(base.ggml_mul(context, scores, scores)),
        )
        router_operations = (
            op(base.ggml_mul(context, scores, scores)),
            op(base.ggml_add(context, scores, scores)),
            op(base.ggml_repeat(context, scores, base.ggml_new_tensor_2d(context, F32, 8, 6))),
            op(base.ggml_norm(context, scores, 1e-5)),
            op(base.ggml_rms_norm(context, scores, 1e-5)),
        )
        traits = _cpu_traits(engine, context)
        is_computed = _compute_flag(base, context)
    return (*numbers, is_computed, row_operations, router_operations, I32, F32, _address(base.ggml_backend_buffer_is_host), traits,
            _address(base.ggml_blck_size), _address(base.ggml_type_size), _graph_functions(engine))


def _compute_flag(base: ctypes.CDLL, context: int) -> int:
    """Return the flag of nodes that are to be computed, GGML_TENSOR_FLAG_COMPUTE: what a graph adds to a node that is put
    into it. 0 where it adds nothing, and all nodes are computed."""
    if not hasattr(base, "ggml_new_graph_custom") or not hasattr(base, "ggml_build_forward_expand"):
        return 0
    new_graph, expand = base.ggml_new_graph_custom, base.ggml_build_forward_expand
    new_graph.restype, new_graph.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_bool]
    expand.restype, expand.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p]
    node = base.ggml_sqr(context, base.ggml_new_tensor_2d(context, F32, 8, 3))
    before = _native.read_tensor(node)["flags"]
    expand(new_graph(context, 8, False), node)
    after = _native.read_tensor(node)["flags"]
    assert isinstance(before, int) and isinstance(after, int)
    return after & ~before


def _graph_functions(engine: Engine) -> tuple[int, ...]:
    """Return the addresses of what makes and computes small graphs, as in struct gp_graphs; zeros if any is missing."""
    names = {
        "ggml_init": engine.base, "ggml_free": engine.base, "ggml_graph_overhead_custom": engine.base,
        "ggml_new_graph_custom": engine.base, "ggml_graph_clear": engine.base, "ggml_build_forward_expand": engine.base,
        "ggml_backend_cpu_init": engine.cpu, "ggml_backend_cpu_set_n_threads": engine.cpu,
        "ggml_backend_free": engine.base, "ggml_backend_graph_compute": engine.base,
    }
    if not all(hasattr(library, name) for name, library in names.items()):
        return (0,) * len(names)
    return tuple(_address(getattr(library, name)) for name, library in names.items())


def can_multiply(engine: Engine, type_number: int) -> bool:
    """Return whether ggml's CPU backend can multiply matrices of this type; True where it cannot be asked."""
    if engine.cpu is None or not hasattr(engine.cpu, "ggml_get_type_traits_cpu"):
        return True
    return bool(_traits_function(engine.cpu)(type_number).contents.vec_dot)


_SCALARS: dict[int, Any] = {
    0: ctypes.c_uint8, 1: ctypes.c_int8, 2: ctypes.c_uint16, 3: ctypes.c_int16, 4: ctypes.c_uint32, 5: ctypes.c_int32,
    6: ctypes.c_float, 7: ctypes.c_bool, 10: ctypes.c_uint64, 11: ctypes.c_int64, 12: ctypes.c_double,
}
_STRING, _ARRAY = 8, 9
_KINDS = {0: "u8", 1: "i8", 2: "u16", 3: "i16", 4: "u32", 5: "i32", 6: "f32", 7: "bool", _STRING: "string", 10: "u64",
          11: "i64", 12: "f64"}
"""Numbers of the value types in a GGUF file, from its specification (ggml/docs/gguf.md)."""


def _read_kind(base: ctypes.CDLL, gguf: int, index: int) -> str:
    kind = base.gguf_get_kv_type(gguf, index)
    return f"array of {_KINDS[base.gguf_get_arr_type(gguf, index)]}" if kind == _ARRAY else _KINDS[kind]


def _read_value(base: ctypes.CDLL, gguf: int, index: int) -> Any:
    kind = base.gguf_get_kv_type(gguf, index)
    if kind == _STRING:
        return base.gguf_get_val_str(gguf, index).decode("utf-8", "replace")
    if kind == _ARRAY:
        n, item = base.gguf_get_arr_n(gguf, index), base.gguf_get_arr_type(gguf, index)
        if item not in _SCALARS or n > 4096:  # a vocabulary: its length is all that is wanted
            return n
        return list((_SCALARS[item] * n).from_address(base.gguf_get_arr_data(gguf, index))) if n else []
    return _SCALARS[kind].from_address(base.gguf_get_val_data(gguf, index)).value


_MOST_HEADER_BYTES = 64 << 20
"""How far a file is read to tell a bad sector from a damaged header. The largest vocabularies take some 20 MB."""


def _check_readable(file: OpenedFile) -> None:
    """Raise if a header could not be read because the file cannot be read, or not be opened a second time as ggml does.

    Raises:
        PagerIOError: a read fails.
        EngineError: there is no further descriptor.
    """
    try:
        os.close(os.open(file.reopen_path, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        hint = " Raise the limit on open files (ulimit -n)." if error.errno in (errno.EMFILE, errno.ENFILE) else ""
        raise EngineError(f"{file.path} cannot be opened a second time: {error.strerror}.{hint}") from None
    whole, step = min(file.identity.size_bytes, _MOST_HEADER_BYTES), 1 << 20
    for at in range(0, whole, step):
        file.read(min(step, whole - at), at)


def read_header(path: Path | OpenedFile) -> GgufHeader:
    """Read a GGUF file's header with ggml's own reader, so that both sides see the same file.

    Raises:
        LayoutError: the file is missing, no GGUF, or damaged.
        PagerIOError: it cannot be read.
        EngineError: llama-cpp-python is not usable.
    """
    base = load().base
    if not isinstance(path, OpenedFile):
        with contextlib.closing(OpenedFile(path)) as opened:
            return read_header(opened)
    file, path = path, path.path
    file_bytes = file.identity.size_bytes
    magic = file.read(min(4, file_bytes), 0)
    if magic != b"GGUF":
        raise LayoutError(f"{path} is not a GGUF file: it begins with {magic!r} instead of b'GGUF'.")
    gguf = base.gguf_init_from_file(os.fsencode(file.reopen_path), _GgufInitParams(True, None))
    if not gguf:
        _check_readable(file)
        raise LayoutError(f"{path} is not a complete GGUF file: ggml cannot read its header. Download it again.")
    try:
        keys = [base.gguf_get_key(gguf, i).decode("utf-8", "replace") for i in range(base.gguf_get_n_kv(gguf))]
        values = {key: _read_value(base, gguf, i) for i, key in enumerate(keys)}
        kinds = {key: _read_kind(base, gguf, i) for i, key in enumerate(keys)}
        data_offset = base.gguf_get_data_offset(gguf)
        tensors = []
        for i in range(base.gguf_get_n_tensors(gguf)):
            kind = base.gguf_get_tensor_type(gguf, i)
            ne = base.gguf_get_tensor_ne(gguf, i)
            tensors.append(
                TensorInfo(
                    name=base.gguf_get_tensor_name(gguf, i).decode("utf-8", "replace"),
                    type=kind,
                    type_name=base.ggml_type_name(kind).decode(),
                    ne=(ne[0], ne[1], ne[2], ne[3]),
                    offset_bytes=data_offset + base.gguf_get_tensor_offset(gguf, i),
                    n_bytes=base.gguf_get_tensor_size(gguf, i),
                )
            )
    finally:
        base.gguf_free(gguf)
    return GgufHeader(path, file_bytes, data_offset, values, tuple(tensors), kinds)
