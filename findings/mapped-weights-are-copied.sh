#!/usr/bin/env bash
# llama-cpp-python 0.3.36: with use_mmap=True (its default) the weights lie in anonymous memory all the same, beside the mapping.
. "$(dirname "${BASH_SOURCE[0]}")/environment.bash"
install llama-cpp-python==0.3.36 gguf==0.19.0 numpy==2.4.6
"$python" -m tiny_model llama-q4_0 model.gguf
"$python" - <<'END'
import os
import re
from pathlib import Path

from llama_cpp import Llama
from llama_cpp import llama_cpp as low

MIB = 1 << 20
load = low.llama_model_load_from_file
Llama("model.gguf", n_ctx=256, n_threads=1, verbose=False).close()  # what the library itself takes is taken


def anonymous_bytes() -> int:
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def grown_bytes(is_repacked: bool) -> int:
    def load_as_asked(path, params):
        params.use_extra_bufts = is_repacked
        return load(path, params)

    low.llama_model_load_from_file = load_as_asked
    before = anonymous_bytes()
    llm = Llama("model.gguf", n_ctx=256, n_threads=1, verbose=False, use_mmap=True)
    grown = anonymous_bytes() - before
    llm.close()
    return grown


plain, default = grown_bytes(False), grown_bytes(low.llama_model_default_params().use_extra_bufts)
size = os.stat("model.gguf").st_size
print(f"a file of {size / MIB:.0f} MiB, mapped: anonymous memory grows by {default / MIB:.0f} MiB, and by {plain / MIB:.0f} MiB with "
      "use_extra_bufts=False, which Llama has no argument for")
print("expected little in both cases: the weights are in the mapping")
assert default - plain > 0.7 * size, "this has changed, or this processor has no kernels for repacked Q4_0"
END
