#!/usr/bin/env bash
# gguf 0.19.0: one tensor in Q2_0, which llama.cpp of llama-cpp-python 0.3.36 computes with, and not even the metadata can be read.
. "$(dirname "${BASH_SOURCE[0]}")/environment.bash"
install llama-cpp-python==0.3.36 gguf==0.19.0 numpy==2.4.6
"$python" -m tiny_model llama-q2_0 model.gguf
"$python" - <<'END'
from gguf import GGUFReader
from llama_cpp import Llama

llm = Llama("model.gguf", n_ctx=256, n_threads=1, verbose=False)
llm.eval([5, 17, 33, 8])
print(f"llama.cpp loads it: {llm.metadata['general.architecture']}, next token {llm.sample(temp=0.0)}")
try:
    GGUFReader("model.gguf")
    said = "nothing"
except ValueError as error:
    said = str(error)
print("GGUFReader says:", said)
print("expected the metadata and the other tensors")
assert "42" in said and "is not a valid GGMLQuantizationType" in said, "this has changed"
END
