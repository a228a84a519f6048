#!/usr/bin/env bash
# llama-cpp-python 0.3.36: a draft model ends greedy decoding with an error where the model has a recurrent state.
. "$(dirname "${BASH_SOURCE[0]}")/environment.bash"
install llama-cpp-python==0.3.36 gguf==0.19.0 numpy==2.4.6
"$python" -m tiny_model llama attention.gguf
"$python" -m tiny_model mamba recurrent.gguf
"$python" - <<'END'
from itertools import islice

from llama_cpp import Llama
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding


def answer(model: str, draft: LlamaPromptLookupDecoding | None) -> list[int] | str:
    llm = Llama(model, n_ctx=256, n_threads=1, verbose=False, draft_model=draft)
    try:
        return list(islice(llm.generate([5, 17, 33, 8, 5, 17, 33, 8, 5, 17, 33], temp=0.0), 20))
    except RuntimeError as error:
        return str(error)


found = {}
for model in ("attention.gguf", "recurrent.gguf"):
    found[model] = answer(model, None), answer(model, LlamaPromptLookupDecoding(num_pred_tokens=4))
    print(model, "alone:", found[model][0])
    print(model, "with drafts from the prompt:", found[model][1])
print("expected the same tokens with and without drafts")
assert found["attention.gguf"][0] == found["attention.gguf"][1]
assert found["recurrent.gguf"][1] == "llama_decode returned -1", "this has changed"
END
