"""Which models a list of files holds: a model is a file or a set of parts, and its name says how it was quantised."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gguf_pager.errors import LayoutError

_PART = re.compile(r"-(\d{5})-of-(\d{5})$")
"""What llama-gguf-split puts at the end of a part's name."""

_HELPER = re.compile(r"(?i)^(?:\.|mtp-|ggml-vocab-|imatrix)|(?:^|[-_.])mmproj(?:[-_.]|$)")
"""Names of files beside a model that are none: projectors, importance matrices, vocabularies, drafts; and hidden ones."""

_MATRIX = re.compile(r"(?i)[-_.]imatrix(?:[-_.]|$)")
"""Likewise, where the name says no quantisation: what was quantised with the help of such a matrix is often called so, too."""

_LABEL = re.compile(
    r"(?i)(?<![a-z0-9])((?:UD-)?(?:I?Q\d(?:_(?:K|KV|KS|KT|KL|KSS|0|1|2|4|8|S|M|L|XL|XS|XXS|NL|R4|R8))*"
    r"|TQ\d_\d|MXFP4(?:_MOE)?|NVFP4|BF16|F16|FP16|F32))(?![a-z0-9_])")
"""A quantisation as llama-quantize names it, or Unsloth's (UD-)."""

_FIRST = ("Q4_K_M", "Q4_K_XL", "Q4_K_L", "MXFP4", "MXFP4_MOE", "Q4_K_S", "IQ4_NL", "IQ4_XS", "Q4_1", "Q4_0")
"""What is taken where nobody asks, the best first: Q4_K_M as llama.cpp and Ollama do, then what has about its size."""

_THEN = ("Q4", "Q5", "Q6", "Q8", "NVFP4", "Q3", "Q2", "TQ", "Q1", "BF16", "F16", "FP16", "F32")

_MOST_SHOWN = 8
"""So many names go into an error."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One model among files: `files` are its parts in their order, `n_files` how many there should be."""

    name: str
    files: tuple[str, ...]
    n_files: int

    @property
    def quantisation(self) -> str | None:
        """How it was quantised, as the name of the file says, or else that of its folder."""
        folder, _, name = self.name.rpartition("/")
        for text in (name.removesuffix(".gguf"), folder):
            if found := _LABEL.findall(text):
                return str(found[-1]).upper()
        return None

    @property
    def is_complete(self) -> bool:
        """Whether all parts are there."""
        return len(self.files) == self.n_files


def variants_of(files: Iterable[str]) -> list[Variant]:
    """Return the models among files, which are named with slashes; what only helps a model is left out."""
    parts: dict[tuple[str, int], list[str]] = {}
    for file in sorted(files):
        name = file.rpartition("/")[2]
        if not name.lower().endswith(".gguf") or _is_helper(name[: -len(".gguf")]):
            continue
        stem = file[: -len(".gguf")]
        part = _PART.search(stem)
        key = (f"{stem[: part.start()]}.gguf", int(part[2])) if part else (file, 1)
        parts.setdefault(key, []).append(file)
    return [Variant(name, tuple(found), n_files) for (name, n_files), found in parts.items()]


def choose(found: Sequence[Variant], wanted: str | None, where: str) -> Variant:
    """Return the model that is quantised as wanted, or, where nothing is, the one that most people take.

    Raises:
        LayoutError: there is none, or there are several.
    """
    if wanted is None:
        best = min(_rank(variant) for variant in found)
        right = [variant for variant in found if _rank(variant) == best]
    else:
        right = [variant for variant in found if variant.quantisation == wanted.upper()]
        right = right or [variant for variant in found if _says(variant.name, wanted)]
    if not right:
        raise LayoutError(f"{where} has no {wanted}. It has: {listed(labels(found))}.")
    if len(right) > 1:
        raise LayoutError(f"{where} has several such models: name the file. It has: {listed(variant.files[0] for variant in right)}.")
    return right[0]


def labels(found: Iterable[Variant]) -> list[str]:
    """Return how models are quantised, those most people take first; the name of the file where it does not say so."""
    ranked = sorted(found, key=lambda variant: (_rank(variant), variant.name))
    return list(dict.fromkeys(variant.quantisation or variant.files[0] for variant in ranked))


def listed(names: Iterable[str]) -> str:
    """Return names as a part of a sentence, the first few."""
    all_names = list(names)
    more = f" and {len(all_names) - _MOST_SHOWN} more" if len(all_names) > _MOST_SHOWN else ""
    return ", ".join(all_names[:_MOST_SHOWN]) + more


def _is_helper(name: str) -> bool:
    return bool(_HELPER.search(name) or _MATRIX.search(name) and not _LABEL.search(name))


def _rank(variant: Variant) -> tuple[int, str]:
    label = (variant.quantisation or "").removeprefix("UD-")
    if label in _FIRST:
        return _FIRST.index(label), variant.quantisation or ""
    bits = next((at for at, start in enumerate(_THEN) if label.removeprefix("I").startswith(start)), len(_THEN))
    # The larger of the same bits first: K_M before K_S, K_S before IQ_XS.
    kind = next((at for at, end in enumerate(("K_M", "K_XL", "K_L", "K_S", "K", "0")) if label.endswith(end)), 9)
    return len(_FIRST) + 10 * bits + kind, variant.quantisation or ""


def _says(name: str, wanted: str) -> bool:
    return re.search(rf"(?i)(?:^|[-_./]){re.escape(wanted)}(?:[-_./]|$)", name) is not None
