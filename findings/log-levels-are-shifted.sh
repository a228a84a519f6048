#!/usr/bin/env bash
# llama-cpp-python 0.3.36: verbose=False prints llama.cpp's warnings and hides its errors: its levels are one off.
. "$(dirname "${BASH_SOURCE[0]}")/environment.bash"
install llama-cpp-python==0.3.36 gguf==0.19.0 numpy==2.4.6
"$python" -m tiny_model llama model.gguf
printf 'Once upon a time' > story.txt
printed() {
    "$python" - "$@" <<'END' 2>&1 >/dev/null
import sys

from llama_cpp import Llama

path, n_ctx, verbose = sys.argv[1:]
try:
    Llama(path, n_ctx=int(n_ctx), n_threads=1, verbose=verbose == "verbose").close()
except ValueError as error:
    print(f"ValueError: {error}", file=sys.stderr)
END
}
warned=$(printed model.gguf 1024 quiet | grep -c 'n_ctx_train' || true)
reasons=$(printed story.txt 256 quiet | grep -c 'error loading model' || true)
with_verbose=$(printed story.txt 256 verbose | grep -c 'error loading model' || true)
echo "verbose=False: $warned warning of a context longer than what the model was trained for, $reasons lines with the reason why a file is not loaded"
echo "verbose=True: $with_verbose such lines"
echo "expected the other way round: no warning, and the reason; ggml.h counts debug 1, info 2, warn 3, error 4; _logger.py has info 1, warning 2, error 3, debug 4"
[ "$warned" -ge 1 ] && [ "$reasons" -eq 0 ] && [ "$with_verbose" -ge 1 ] || { echo "this has changed"; exit 1; }
