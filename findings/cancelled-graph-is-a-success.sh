#!/usr/bin/env bash
# llama.cpp of llama-cpp-python 0.3.36: a cb_eval that stops the graph gives llama_decode == 0, and logits that nobody computed.
. "$(dirname "${BASH_SOURCE[0]}")/environment.bash"
install llama-cpp-python==0.3.36 gguf==0.19.0 numpy==2.4.6
"$python" -m tiny_model llama model.gguf
"$python" - <<'END'
import ctypes

import numpy as np
from llama_cpp import llama_cpp as low

quiet = low.llama_log_callback(lambda *_: None)
low.llama_log_set(quiet, None)
low.llama_backend_init()
model = low.llama_model_load_from_file(b"model.gguf", low.llama_model_default_params())
with open("/proc/self/maps") as maps:
    ggml = ctypes.CDLL(next(line.split()[-1] for line in maps if "libggml-base" in line))
ggml.ggml_get_name.restype, ggml.ggml_get_name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
goes_on = True


@low.ggml_backend_sched_eval_callback
def look(tensor: int, ask: bool, _: object) -> bool:
    return ggml.ggml_get_name(tensor) == b"ffn_inp-0" if ask else goes_on


params = low.llama_context_default_params()
params.n_ctx, params.n_threads, params.n_threads_batch, params.cb_eval = 256, 1, 1, look
context = low.llama_init_from_model(model, params)


def decode(token: int) -> tuple[int, np.ndarray]:
    low.llama_memory_clear(low.llama_get_memory(context), True)
    tokens = (low.llama_token * 1)(token)
    code = low.llama_decode(context, low.llama_batch_get_one(tokens, 1))
    return code, np.array(np.ctypeslib.as_array(low.llama_get_logits_ith(context, -1), (96,)))


(_, right), (_, again) = decode(5), decode(5)
assert (right == again).all()
goes_on = False
code, logits = decode(5)
print(f"stopped after the first layer's attention: llama_decode returns {code}; the greatest difference of the logits from the "
      f"right ones is {np.abs(logits - right).max():.3g}")
print("expected a code other than 0, as an abort_callback gives")
assert code == 0 and not np.array_equal(logits, right), "this has changed"
END
