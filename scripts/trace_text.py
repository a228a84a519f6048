"""A vocabulary whose tokens, in order, spell a text.

The trace model says token i+1 after token i, so the tokens have to be pieces of a
readable text, each used once, and the tokeniser has to find the same pieces again.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TEXT = Path(__file__).parent.parent / "gguf_pager" / "bench" / "text.txt"  # the package has it for its benchmark, too

# llama_cpp.Llama.detokenize fails on a token of more than 32 bytes.
MAX_PIECE_BYTES = 31
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Token texts by id: end of text, 256 single bytes, then the pieces in order."""

    tokens: list[str]
    types: list[int]
    first_piece: int


def cut_pieces(text: str, count: int) -> list[str]:
    """Cut the start of an ASCII text into `count` distinct pieces of a word or more.

    A greedy longest-match tokeniser finds exactly these pieces again: a piece is
    taken only if no longer one fits in its place and if it fits in no earlier place
    (where it would have been the longer one). Raises ValueError when the text is too
    short or repeats itself too much.
    """
    if not text.isascii():
        raise ValueError("the text must be ASCII")
    ends = [word.end() for word in re.finditer(r"\s*\S+", text)]
    pieces: dict[str, None] = {}
    starts: list[int] = []
    start = 0
    while len(pieces) < count:
        limit = start + MAX_PIECE_BYTES
        if limit > len(text):
            raise ValueError(f"the text ends after {len(pieces)} of {count} pieces")
        first_end = bisect_right(ends, start)
        words = [end for end in ends[first_end : first_end + 16] if end <= limit]
        # A repeated speech may have no distinct end at a word: then cut anywhere.
        for end in [*words, *range(limit, start + 1, -1)]:
            piece = text[start:end]
            if (
                len(piece) > 1
                and piece not in pieces
                and not any(text[start:e] in pieces for e in range(end + 1, limit + 1))
                and not any(text.startswith(piece, earlier) for earlier in starts)
            ):
                break
        else:
            raise ValueError(f"no distinct piece in {text[start:limit]!r}")
        pieces[piece] = None
        starts.append(start)
        start = end
    return list(pieces)


def vocabulary(pieces: Sequence[str]) -> Vocabulary:
    """Return the vocabulary for llama.cpp's "rwkv" tokeniser.

    That one is a greedy longest match over arbitrary byte strings, adds neither
    spaces nor special tokens, and with all single bytes present no text can fail.
    """
    single = [chr(byte) if chr(byte).isascii() and chr(byte).isalnum() else f"\\x{byte:02x}" for byte in range(256)]
    escaped = [piece.replace("\\", "\\\\") for piece in pieces]
    control, normal = 3, 1  # LLAMA_TOKEN_TYPE_CONTROL, LLAMA_TOKEN_TYPE_NORMAL
    return Vocabulary(
        tokens=[END_OF_TEXT, *single, *escaped],
        types=[control] + [normal] * (len(single) + len(escaped)),
        first_piece=1 + len(single),
    )
