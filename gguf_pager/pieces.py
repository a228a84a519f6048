"""The text of tokens, all of it: llama-cpp-python 0.3.36 leaves out those that are longer than 32 bytes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from llama_cpp import llama_cpp as low
from llama_cpp.llama_tokenizer import LlamaTokenizer

_USUAL_BYTES = 64


class Pieces(dict[int, bytes]):
    """A vocabulary's tokens and their bytes, each asked for once; of control tokens none, unless they are wanted. Threads may share it."""

    def __init__(self, vocabulary: int, *, has_controls: bool = False) -> None:
        super().__init__()
        self._vocabulary, self._has_controls = vocabulary, has_controls

    def __missing__(self, token: int) -> bytes:
        n_room = _USUAL_BYTES
        while True:
            buffer = ctypes.create_string_buffer(n_room)
            n_bytes = int(low.llama_token_to_piece(self._vocabulary, token, buffer, n_room, 0, self._has_controls))
            if n_bytes >= 0:
                return self.setdefault(token, buffer.raw[:n_bytes])
            n_room = -n_bytes

    def text_of(self, llm: Any, tokens: Sequence[int]) -> bytes | None:
        """Return what llama_cpp.Llama.detokenize should, without control tokens; None where it has a tokenizer of the user's own.

        A newline and deep indentation are such tokens, in the vocabularies of SmolLM2, GPT-4o and others (findings/long-tokens-vanish.sh).
        """
        if type(llm.tokenizer_) is not LlamaTokenizer:
            return None
        text = b"".join(map(self.__getitem__, tokens))
        # As stock has it: a space that some tokenizers put after a begin token.
        return text[1:] if len(tokens) > 0 and tokens[0] == llm.token_bos() and text.startswith(b" ") else text
