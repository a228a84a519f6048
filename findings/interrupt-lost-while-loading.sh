#!/usr/bin/env bash
# llama-cpp-python 0.3.36: a Ctrl-C while a model loads is lost in the callback for the log, and the program goes on.
. "$(dirname "${BASH_SOURCE[0]}")/environment.bash"
install llama-cpp-python==0.3.36 gguf==0.19.0 numpy==2.4.6
"$python" -m tiny_model llama model.gguf
"$python" - <<'END'
import os
import signal
import sys

from llama_cpp import Llama

lost, out = [], sys.stderr
sys.unraisablehook = lambda told: lost.append(told.exc_type.__name__)


class Terminal:
    """Where llama_cpp writes its log: somebody presses Ctrl-C at the first line."""

    has_pressed = False

    def write(self, text):
        if not self.has_pressed:
            self.has_pressed = True
            os.kill(os.getpid(), signal.SIGINT)
        return len(text)

    def flush(self):
        pass


signal.signal(signal.SIGINT, signal.default_int_handler)
sys.stderr = Terminal()
try:
    llm = Llama("model.gguf", n_ctx=256, n_threads=1, verbose=True)
    seen = "a model, no exception"
except KeyboardInterrupt:
    seen = "KeyboardInterrupt"
sys.stderr = out
print(f"Ctrl-C at the first line of the log: {seen}; told to sys.unraisablehook: {lost}")
print("expected KeyboardInterrupt, once llama.cpp has returned")
assert seen == "a model, no exception" and lost == ["KeyboardInterrupt"], "this has changed"
END
