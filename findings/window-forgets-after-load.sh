#!/usr/bin/env bash
# llama-cpp-python 0.3.36: after load_state() a model with sliding windows computes texts that begin alike without tokens in their window.
. "$(dirname "${BASH_SOURCE[0]}")/environment.bash"
install llama-cpp-python==0.3.36 gguf==0.19.0 numpy==2.4.6
"$python" -m tiny_model cohere2 model.gguf
"$python" - <<'END' 2> >(grep -v iswa >&2)
from itertools import islice

import numpy as np
from llama_cpp import Llama
from llama_cpp import llama_cpp as low

TEXT = [int(token) for token in np.random.default_rng(1).integers(5, 90, 40)]
OTHER = [*TEXT[:25], 5, 17, 33]


def after(llm: Llama, text: list[int]) -> np.ndarray:
    """Return the logits after a text, computed as generate() does: from where it parts from the one before."""
    next(llm.generate(text, temp=0.0))
    return np.ctypeslib.as_array(low.llama_get_logits_ith(llm.ctx, -1), (llm.n_vocab(),)).copy()


llm = Llama("model.gguf", n_ctx=256, n_threads=1, verbose=False, swa_full=True)
alone = after(llm, OTHER)
llm.reset()
list(islice(llm.generate(TEXT, temp=0.0), 24))
without = after(llm, OTHER)
llm.reset()
llm.eval(TEXT)
llm.load_state(llm.save_state())
list(islice(llm.generate(TEXT, temp=0.0), 24))
first = low.llama_memory_seq_pos_min(low.llama_get_memory(llm.ctx), 0)
loaded = after(llm, OTHER)
print(f"logits after 28 tokens, of which 25 were the beginning of the text before: off by {np.abs(without - alone).max():.3f} in general, "
      f"by {np.abs(loaded - alone).max():.3f} where that text was loaded from a state; tokens before {first} are gone, window 16")
print("expected the same logits, or that llama_memory_seq_rm refuses, as it does for recurrent models: generate() then computes all of it")
scale = float(np.abs(alone).max())
assert np.abs(without - alone).max() < 0.01 * scale and first > 25 - 16 and np.abs(loaded - alone).max() > 0.1 * scale, "this has changed"
END
