"""Make the zoo: tiny random mixture-of-experts models of every architecture llama.cpp knows.

    python scripts/make_zoo.py OUT_DIR [--arch NAME ...] [--type TYPE] [--list]

llama.cpp itself says which tensors an architecture has: it is given the metadata alone and asked to
build the model (`llama_model_init_from_user`), and its callback is handed every tensor. The file is
written here rather than by `llama_model_save_to_file`, which aborts the process for some architectures
(step35), adds metadata that was never set, and cannot leave out the tensors llama.cpp takes as optional.

Everything is random but repeatable: a tensor's values depend on its name and the seed alone.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import logging
import re
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import llama_cpp.llama_cpp as native
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFValueType
from zoo_metadata import (
    ARCHITECTURES,
    N_LAYER,
    UNBUILDABLE,
    WIDE_ARRAYS,
    WITHOUT_DECODE,
    Arch,
    Keys,
    Value,
    common,
    tokenizer,
)

__all__ = ["ARCHS", "UNBUILDABLE", "WITHOUT_DECODE", "make", "make_lora", "make_split"]

# All that Llama.eval can run; `make` takes those of WITHOUT_DECODE too.
ARCHS: tuple[str, ...] = tuple(arch for arch in ARCHITECTURES if arch not in WITHOUT_DECODE)

# All that ggml's CPU backend multiplies, by name. The gguf package does not know q2_0.
TYPES = {
    name: GGMLQuantizationType[name.upper()].value
    for name in (
        *("f32", "f16", "bf16", "q8_0", "q5_0", "q5_1", "q4_0", "q4_1", "iq4_nl", "iq4_xs", "mxfp4", "nvfp4"),
        *("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "tq1_0", "tq2_0", "q1_0"),
        *("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s"),
    )
} | {"q2_0": 42}
# Quantising to these takes seconds per million values: of a tensor so many rows are, and the others are the same anew.
SLOW_TYPES = tuple(kind for name, kind in TYPES.items() if name.startswith(("iq1", "iq2", "iq3")))
MOST_SLOW_ROWS = 512
F32, F16, I32 = (GGMLQuantizationType[name].value for name in ("F32", "F16", "I32"))

# A mix gives the down slices of every second layer the larger type, as llama-quantize does on some
# layers; so one model holds slices of two sizes.
MIXES = {"q3_k_m": ("q3_k", "q5_k"), "q4_k_m": ("q4_k", "q6_k"), "q5_k_m": ("q5_k", "q6_k")}

EXPERTS = re.compile(r"blk\.(\d+)\.ffn_(gate|up|gate_up|down)_(exps|chexps)\.weight")
LORA_TARGETS = re.compile(r"blk\.\d+\.(ffn_(gate|up|gate_up|down)_exps|attn_q|attn_output)\.weight")

Array = npt.NDArray[np.generic]
Shape = tuple[int, ...]


def make(arch: str, path: Path, *, file_type: str = "", seed: int = 1) -> None:
    """Write a tiny random model of this architecture; its experts are of `file_type`.

    `file_type` is the name of a ggml type in lower case ("f32", "q8_0", "mxfp4"), a mix ("q4_k_m"), or
    empty for the architecture's own default. All other weights stay f32. Types with blocks of 256 get
    experts of 256 x 256. Raises ValueError for an unknown architecture or type and where an expert's
    rows do not divide into blocks of the type.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(UNBUILDABLE.get(arch, f"unknown architecture {arch!r}"))
    row = ARCHITECTURES[arch]
    types = expert_types(file_type or row.file_type)
    metadata = model_keys(arch, row, max(block_values(kind) for kind in types))
    shapes = tidy(tensor_shapes(metadata), row)
    check_divisible(shapes, types)

    writer = new_writer(path, metadata)
    for name, shape in shapes.items():
        add_tensor(writer, name, random_values(name, shape, row, seed), tensor_type(name, types))
    finish(writer)


def expert_types(file_type: str) -> tuple[int, int]:
    """Return ggml's numbers of the type of most expert tensors, and of that of the down tensors of odd layers."""
    if file_type not in TYPES and file_type not in MIXES:
        raise ValueError(f"unknown type {file_type!r}; known are {', '.join((*TYPES, *MIXES))}")
    usual, larger = MIXES.get(file_type, (file_type, file_type))
    return TYPES[usual], TYPES[larger]


def block_values(kind: int) -> int:
    """Return the number of values in a block of this type."""
    return int(native_call("ggml_blck_size", ctypes.c_int64, kind))


def model_keys(arch: str, row: Arch, block_size: int) -> Keys:
    """Return all metadata of one model, with the geometry wide enough for blocks of `block_size`."""
    is_wide = block_size > max(row.n_ff, 32)
    n_embd, n_ff = (block_size, block_size) if is_wide else (row.n_embd, row.n_ff)
    n_layer = row.keys.get("block_count", N_LAYER)
    assert isinstance(n_layer, int)
    keys = common(n_embd, n_ff, row.n_expert, n_layer) | row.keys
    return {"general.architecture": arch} | {f"{arch}.{key}": value for key, value in keys.items()} | tokenizer()


def tensor_shapes(metadata: Keys) -> dict[str, Shape]:
    """Return the name and shape (fastest dimension first) of each tensor llama.cpp wants for this metadata."""
    found: dict[str, Shape] = {}

    def note(tensor: int, _: int) -> None:
        view = TensorHead.from_address(tensor)
        name = native_call("ggml_get_name", ctypes.c_char_p, ctypes.c_void_p(tensor)).decode()
        found[name] = trim(tuple(view.ne))

    with tempfile.TemporaryDirectory() as folder:
        header = Path(folder, "header.gguf")
        finish(new_writer(header, metadata))
        context = native_call("gguf_init_from_file", ctypes.c_void_p, str(header).encode(), GgufInitParams(True, None))
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    params.load_mtp = True  # or the layers for multi-token prediction abort the process
    callback = native.llama_model_set_tensor_data_t(note)
    try:
        with quiet():
            model = llama_cpp.llama_model_init_from_user(ctypes.c_void_p(context), callback, None, params)
    finally:
        native_call("gguf_free", None, ctypes.c_void_p(context))
    if not model:
        raise ValueError(f"llama.cpp does not build {metadata['general.architecture']!r} from this metadata")
    llama_cpp.llama_model_free(model)
    return found


def tidy(shapes: Mapping[str, Shape], row: Arch) -> dict[str, Shape]:
    """Return the tensors a usual file has: without scales nobody set, gate and up apart unless the row fuses them.

    Asked to invent a model, llama.cpp takes every optional tensor as present.
    """
    scales = (".ffn_gate_inp.scale", ".ffn_down_exps.scale") if row.has_expert_scales else (".ffn_gate_inp.scale",)
    kept: dict[str, Shape] = {}
    for name, shape in shapes.items():
        if name.endswith((".scale", ".input_scale")) and not name.endswith(scales):
            continue
        if "_gate_up_exps." in name and not row.is_fused:
            half = (shape[0], shape[1] // 2, *shape[2:])
            kept[name.replace("_gate_up_", "_gate_")] = half
            kept[name.replace("_gate_up_", "_up_")] = half
        else:
            kept[name] = shape
    return kept


def check_divisible(shapes: Mapping[str, Shape], types: tuple[int, int]) -> None:
    """Raise ValueError if a row of an expert tensor is no whole number of blocks of its type."""
    for name, shape in shapes.items():
        kind = tensor_type(name, types)
        block = block_values(kind)
        if shape[0] % block:
            type_name = native_call("ggml_type_name", ctypes.c_char_p, kind).decode()
            raise ValueError(f"{name}: rows of {shape[0]} do not divide into {type_name} blocks of {block}")


def tensor_type(name: str, types: tuple[int, int]) -> int:
    """Return the type a tensor is stored in: experts as asked for, ids as integers, the rest f32."""
    if name.endswith("tid2eid.weight"):
        return I32
    match = EXPERTS.fullmatch(name)
    if match is None:
        return F32
    is_larger = match[2] == "down" and int(match[1]) % 2 == 1
    return types[1] if is_larger else types[0]


def random_values(name: str, shape: Shape, row: Arch, seed: int) -> Array:
    """Return values for one tensor, scaled so that activations stay near 1 and routing varies.

    The array's shape is C order: the reverse of `shape`.
    """
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    size = shape[::-1]
    if name.endswith("tid2eid.weight"):
        ranks = rng.random((size[0], row.n_expert)).argsort(axis=1)
        return ranks[:, : size[1]].astype(np.int32)
    noise = rng.standard_normal(size, dtype=np.float32)
    if "norm" in name and name.endswith("weight") or name.endswith("scale"):
        values = 1 + 0.1 * noise
    elif "rope_f" in name:  # divisors of the rotary frequencies
        values = 1 + np.abs(noise)
    elif ".ssm_a" in name and not name.endswith("alpha.weight"):  # decay: must be negative
        values = -0.2 - np.abs(noise)
    elif name.endswith("bias"):
        values = 0.1 * noise
    elif name.startswith("token_embd"):
        values = noise
    elif name.endswith("ffn_gate_inp.weight"):  # far enough apart that the top experts differ by token
        values = 2 * noise / np.sqrt(shape[0])
    else:
        values = noise / np.sqrt(shape[0])
    return values.astype(np.float32)


def add_tensor(writer: gguf.GGUFWriter, name: str, values: Array, kind: int) -> None:
    """Convert values to this type, with ggml's own quantiser, and add them. Where that asks which columns matter, all do."""
    if kind in (F32, I32):
        writer.add_tensor(name, values)
    elif kind == F16:
        writer.add_tensor(name, values.astype(np.float16))
    else:
        row_values = values.shape[-1]
        all_rows = values.size // row_values
        rows = min(all_rows, MOST_SLOW_ROWS) if kind in SLOW_TYPES else all_rows
        blocks = np.empty((rows, native_call("ggml_row_size", ctypes.c_size_t, kind, ctypes.c_int64(row_values))), dtype=np.int8)
        importance = np.ones(row_values, np.float32)
        needs_it = native_call("ggml_quantize_requires_imatrix", ctypes.c_bool, kind)
        native_call(
            "ggml_quantize_chunk",
            ctypes.c_size_t,
            kind,
            np.ascontiguousarray(values).ctypes.data_as(ctypes.c_void_p),
            blocks.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_int64(0),
            ctypes.c_int64(rows),
            ctypes.c_int64(row_values),
            importance.ctypes.data_as(ctypes.c_void_p) if needs_it else None,
        )
        if rows < all_rows:
            blocks = blocks[np.random.default_rng(zlib.crc32(name.encode())).integers(0, rows, all_rows)]
        # Of bytes that are signed gguf takes the shape as it is given: it can only work out that of types it knows.
        writer.add_tensor(name, blocks, raw_shape=values.shape, raw_dtype=kind)


def make_split(src: Path, out_dir: Path, parts: int) -> Path:
    """Write a model again as a set of `parts` files, tensors in their order, and return the first.

    The cuts fall anywhere, so that slices of one expert end up in different files. Raises ValueError if
    there are fewer tensors than parts.
    """
    reader = gguf.GGUFReader(src)
    n_tensors = len(reader.tensors)
    if not 1 <= parts <= n_tensors:
        raise ValueError(f"{n_tensors} tensors cannot make {parts} files")
    paths = [out_dir / f"{src.stem}-{part + 1:05d}-of-{parts:05d}.gguf" for part in range(parts)]
    arch = reader.fields["general.architecture"].contents()
    for part, path in enumerate(paths):
        writer = gguf.GGUFWriter(path, arch)
        if part == 0:
            copy_fields(reader, writer)
        writer.add_uint16("split.no", part)
        writer.add_uint16("split.count", parts)
        writer.add_int32("split.tensors.count", n_tensors)
        for tensor in reader.tensors[part * n_tensors // parts : (part + 1) * n_tensors // parts]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        finish(writer)
    return paths[0]


def copy_fields(reader: gguf.GGUFReader, writer: gguf.GGUFWriter) -> None:
    """Copy all metadata but the architecture, which the writer has set, and the reader's own entries."""
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            sub_type = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type)


def make_lora(model: Path, path: Path, rank: int = 4, *, seed: int = 1) -> None:
    """Write a LoRA adapter for a model of the zoo: all expert tensors, and attention where it has that name."""
    reader = gguf.GGUFReader(model)
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(rank))
    for tensor in reader.tensors:
        if LORA_TARGETS.fullmatch(tensor.name):
            n_in, n_out, *experts = (int(n) for n in tensor.shape)
            rng = np.random.default_rng([seed, zlib.crc32(tensor.name.encode())])
            down = rng.standard_normal((*experts, rank, n_in), dtype=np.float32) / np.sqrt(n_in)
            up = rng.standard_normal((*experts, n_out, rank), dtype=np.float32) / np.sqrt(rank)
            writer.add_tensor(f"{tensor.name}.lora_a", down.astype(np.float32))
            writer.add_tensor(f"{tensor.name}.lora_b", (0.1 * up).astype(np.float32))
    finish(writer)


class GgufInitParams(ctypes.Structure):
    """ggml's gguf_init_params."""

    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


class TensorHead(ctypes.Structure):
    """The first fields of ggml_tensor: as far as the shape."""

    _fields_ = [("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4)]
    ne: Iterable[int]


def native_call(name: str, result: type[Any] | None, *arguments: object) -> Any:
    """Call a function of the ggml libraries that llama_cpp has loaded, for which it has no binding."""
    function = native._lib[name]
    function.restype = result
    return function(*arguments)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Let llama_cpp print errors only: it prints all of llama.cpp's log until told otherwise."""
    logger = logging.getLogger("llama-cpp-python")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def trim(shape: Shape) -> Shape:
    """Drop the trailing dimensions of 1 that ggml fills up with."""
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def new_writer(path: Path, metadata: Mapping[str, Value]) -> gguf.GGUFWriter:
    """Return a writer that holds this metadata; whole numbers go in as u32, as llama.cpp expects."""
    writer = gguf.GGUFWriter(path, str(metadata["general.architecture"]))
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif key.endswith(WIDE_ARRAYS):
            writer.add_key_value(key, value, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT64)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif key != "general.architecture":
            writer.add_string(key, value)
    return writer


def finish(writer: gguf.GGUFWriter) -> None:
    """Write header, metadata and tensors, and close the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> int:
    """Parse the command line, make the models asked for, and say what was not made."""
    parser = argparse.ArgumentParser(description="Make tiny random models of mixture-of-experts architectures.")
    parser.add_argument("out_dir", type=Path, nargs="?", help="where NAME.gguf goes, one file per architecture")
    parser.add_argument("--arch", action="append", help="only this architecture; may be repeated")
    parser.add_argument("--type", default="", help="type of the experts, e.g. f16, q8_0, q4_k_m; else each one's own")
    parser.add_argument("--list", action="store_true", help="print the architectures and stop")
    options = parser.parse_args()
    status = 0
    if options.list or options.out_dir is None:
        for arch, row in ARCHITECTURES.items():
            print(f"{arch:16} {row.file_type}")
    else:
        options.out_dir.mkdir(parents=True, exist_ok=True)
        for arch in options.arch or ARCHITECTURES:
            try:
                make(arch, options.out_dir / f"{arch}.gguf", file_type=options.type)
                print(f"{arch}: made")
            except ValueError as error:
                print(f"{arch}: not made: {error}")
                status = 1
    for arch, reason in UNBUILDABLE.items():
        print(f"{arch}: not in the zoo: {reason}")
    return status


if __name__ == "__main__":
    sys.exit(main())
