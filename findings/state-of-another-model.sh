#!/usr/bin/env bash
# llama.cpp of llama-cpp-python 0.3.36: a sequence's state file is loaded into a model with other weights, with success.
. "$(dirname "${BASH_SOURCE[0]}")/environment.bash"
install llama-cpp-python==0.3.36 gguf==0.19.0 numpy==2.4.6
"$python" -m tiny_model llama first.gguf
"$python" - <<'END'
import ctypes
import shutil

import gguf
import numpy as np
from llama_cpp import Llama
from llama_cpp import llama_cpp as low

# A fine-tune, so to say: the same header, other keys in its attention.
shutil.copy("first.gguf", "second.gguf")
keys = next(tensor for tensor in gguf.GGUFReader("second.gguf", "r+").tensors if tensor.name == "blk.0.attn_k.weight")
keys.data[:] = -keys.data
keys.data.flush()
del keys

TEXT, NEXT = [5, 17, 33, 8, 60, 2], 9


def after(llm: Llama) -> np.ndarray:
    """Return the logits of one more token."""
    llm.n_tokens = len(TEXT)
    llm.eval([NEXT])
    return np.ctypeslib.as_array(low.llama_get_logits_ith(llm.ctx, -1), (llm.n_vocab(),)).copy()


first, second = (Llama(name, n_ctx=256, n_threads=1, verbose=False) for name in ("first.gguf", "second.gguf"))
first.eval(TEXT)
tokens = (low.llama_token * len(TEXT))(*TEXT)
assert low.llama_state_seq_save_file(first.ctx, b"state.bin", 0, tokens, len(TEXT)) > 0
second.eval(TEXT)
right = after(second)
second.reset()
low.llama_memory_clear(low.llama_get_memory(second.ctx), True)
room, n = (low.llama_token * 64)(), ctypes.c_size_t()
n_read = low.llama_state_seq_load_file(second.ctx, b"state.bin", 0, room, 64, ctypes.byref(n))
wrong = after(second)
difference = float(np.abs(right - wrong).max())
print(f"llama_state_seq_load_file returns {n_read} bytes and {n.value} tokens; the next token's logits differ by up to {difference:.2f} from "
      "those of the same text computed by this model")
print("expected 0, which it returns for a file that it refuses: the state is another model's")
assert n_read > 0 and n.value == len(TEXT) and difference > 0.1, "this has changed"
END
