#!/usr/bin/env bash
# llama-cpp-python 0.3.36: LlamaDiskCache loses a conversation when another one begins with the same token, and all of them past 1 GiB.
. "$(dirname "${BASH_SOURCE[0]}")/environment.bash"
install llama-cpp-python==0.3.36 diskcache==5.6.3 gguf==0.19.0 numpy==2.4.6
"$python" -m tiny_model llama model.gguf
"$python" - <<'END' 2> >(grep -v LlamaDiskCache >&2)
from llama_cpp import Llama, LlamaDiskCache

FIRST, SECOND = [1, 17, 33, 8, 60, 2], [1, 44, 45, 46, 47, 48]
cache = LlamaDiskCache("conversations")
llm = Llama("model.gguf", n_ctx=256, n_threads=1, verbose=False)
llm.eval(FIRST)
cache[FIRST] = llm.save_state()
found = cache[SECOND]    # what create_completion() asks at the beginning of each answer
print(f"conversations kept: 1; after a question about a text that has its first token in common: {len(cache.cache)}")
print("expected 1: nothing was taken over but that token")
assert found.n_tokens == len(FIRST) and len(cache.cache) == 0, "this has changed"

large = LlamaDiskCache("large", capacity_bytes=8 << 30)
state = llm.save_state()
state.llama_state = bytes(400 << 20)    # as large as a few thousand tokens of a real model
kept = []
for number in range(3):
    large[[number]] = state
    kept.append(len(large.cache))
print(f"states of 400 MiB kept under capacity_bytes of 8 GiB: {kept[0]}, {kept[1]}, {kept[2]}")
print("expected 1, 2, 3: diskcache has a limit of its own, 1 GiB, that nobody has raised, and throws out ten at a time")
assert kept == [1, 2, 0], "this has changed"
END
