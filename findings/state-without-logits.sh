#!/usr/bin/env bash
# llama-cpp-python 0.3.36: the first token after load_state() answers whatever was evaluated last.
. "$(dirname "${BASH_SOURCE[0]}")/environment.bash"
install llama-cpp-python==0.3.36 gguf==0.19.0 numpy==2.4.6
"$python" -m tiny_model llama model.gguf
"$python" - <<'END'
from llama_cpp import Llama

llm = Llama("model.gguf", n_ctx=256, n_threads=1, verbose=False)
llm.eval([5, 17, 33, 8])
first, state = llm.sample(temp=0.0), llm.save_state()
llm.reset()
llm.eval([60, 61, 62, 63, 64])
second = llm.sample(temp=0.0)
llm.load_state(state)
after = llm.sample(temp=0.0)
print(f"next token of the first text {first}, of the second {second}; first one loaded again ({llm.n_tokens} tokens): {after}")
print(f"expected {first}")
assert first != second and after == second, "this has changed"
llm.n_tokens -= 1
llm.eval([8])
assert llm.sample(temp=0.0) == first, "evaluating the last token once more used to help"
END
