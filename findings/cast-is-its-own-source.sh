#!/usr/bin/env bash
# llama-cpp-python 0.3.36: in ggml's graphs, which are called acyclic, the node of a cast has itself as its second source.
. "$(dirname "${BASH_SOURCE[0]}")/environment.bash"
install llama-cpp-python==0.3.36
"$python" - <<'END'
import ctypes
import pathlib

import llama_cpp

folder = pathlib.Path(llama_cpp.__file__).parent / "lib"
ggml = ctypes.CDLL(str(next(path for path in folder.iterdir() if path.name.startswith("libggml-base."))))


class Params(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("memory", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


pointer, integer = ctypes.c_void_p, ctypes.c_int
for name, result, arguments in (
    ("ggml_init", pointer, [Params]), ("ggml_new_tensor_1d", pointer, [pointer, integer, ctypes.c_int64]),
    ("ggml_cast", pointer, [pointer, pointer, integer]), ("ggml_cont", pointer, [pointer, pointer]),
    ("ggml_tensor_overhead", ctypes.c_size_t, []),
):
    getattr(ggml, name).restype, getattr(ggml, name).argtypes = result, arguments
context = ggml.ggml_init(Params(1 << 20, None, True))
numbers = ggml.ggml_new_tensor_1d(context, 0, 8)


def sources(node):
    """The pointers from where the first source is named in the node's own memory, until there is none."""
    words = (ctypes.c_uint64 * (ggml.ggml_tensor_overhead() // 8)).from_address(node)
    begin = list(words).index(numbers)
    return [words[begin], words[begin + 1]]


cast, cont = ggml.ggml_cast(context, numbers, 26), ggml.ggml_cont(context, numbers)
is_own_source = sources(cast)[1] == cast
print("a cast from F32 to I32: its second source is", "itself" if is_own_source else "another")
print("a copy that makes numbers contiguous: its second source is", "none" if sources(cont)[1] == 0 else "something")
print("expected no node to be its own source: who follows sources to the leaves, as one does in a graph without cycles, never comes to an end")
raise SystemExit(0 if is_own_source and sources(cont)[1] == 0 else "this has changed")
END
