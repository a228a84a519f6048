"""Which tokens a run computes: a trace-driven model's own, a text's, given ids, or random ones.

All modes compute the same ones in the same round, so that their experts are the same.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gguf_pager.errors import PagerError

TEXT = Path(__file__).with_name("text.txt")
"""24 kB of Shakespeare, for models with a tokenizer when nothing else is asked for."""

_IDS = re.compile(r"[\d\s,]+")


def choose_source(asked: str | None, values: Mapping[str, Any]) -> str:
    """Return "trace", "random", or "text:FILE" or "ids:FILE", given what was asked for and a model's metadata.

    Raises:
        PagerError: the model has no such tokens, or there is no such file.
    """
    has_trace = "gguf_pager.trace.first_token" in values
    has_tokenizer = values.get("tokenizer.ggml.model") not in (None, "no_vocab", "none")
    if asked is None:
        return "trace" if has_trace else f"text:{TEXT}" if has_tokenizer else "random"
    kind, _, name = asked.partition(":")
    if asked == "random":
        return asked
    if asked == "trace":
        if not has_trace:
            raise PagerError("This model was not made from a trace: leave out --tokens, or name a text.")
        return asked
    if kind == "text" and not has_tokenizer:
        raise PagerError("This model has no tokenizer: give --tokens ids:FILE or --tokens random.")
    if kind not in ("text", "ids") or not name:
        raise PagerError(f"--tokens {asked!r} is not understood: say trace, random, text:FILE or ids:FILE.")
    if not Path(name).is_file():
        raise PagerError(f"--tokens: {name} is not a file.")
    return asked


def read_ids(source: str, values: Mapping[str, Any], n_vocab: int, tokenize: Callable[[bytes], Sequence[int]],
             turn: int, n_needed: int) -> list[int]:
    """Return the whole sequence of a source; random ones differ from turn to turn and are as many as needed.

    Raises:
        PagerError: it holds no tokens of this model.
    """
    kind, _, name = source.partition(":")
    if kind == "trace":
        first = int(values["gguf_pager.trace.first_token"])
        return list(range(first, first + int(values["gguf_pager.trace.positions"])))
    if kind == "random":
        return random.Random(turn).choices(range(n_vocab), k=n_needed)
    try:
        raw = Path(name).read_bytes()
    except OSError as error:
        raise PagerError(f"{name} cannot be read: {error.strerror}.") from None
    if kind == "text":
        ids = list(tokenize(raw))
    else:
        text = raw.decode("ascii", "replace")
        if not _IDS.fullmatch(text):
            raise PagerError(f"{name} holds something else than token ids, separated by spaces, commas or lines.")
        ids = [int(word) for word in text.replace(",", " ").split()]
        if ids and max(ids) >= n_vocab:
            raise PagerError(f"{name} holds the token id {max(ids)}, and this model knows {n_vocab}.")
    if not ids:
        raise PagerError(f"{name} holds no tokens.")
    return ids


def take(ids: Sequence[int], n_needed: int, turn: int, n_turns: int, n_parallel: int = 1) -> list[list[int]]:
    """Return the tokens of one round, of each sequence: rounds begin at places spread evenly over the ids; short ones repeat.

    The first sequence is the one that a round of one has. The others begin at places spread evenly over all ids from there on,
    behind whose end the beginning follows, so that the experts of a step differ.
    """
    spare = max(0, len(ids) - n_needed)
    start = spare * turn // max(1, n_turns - 1)
    starts = [start + len(ids) * number // n_parallel for number in range(n_parallel)]
    return [[ids[(start + i) % len(ids)] for i in range(n_needed)] for start in starts]
