"""The model that talks: as exact as any other, and it makes sense. Made on the spot, of a small one from PyPI."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import make_talking_model
import numpy as np
import pytest
from conftest import Factory, evaluate, made
from make_talking_model import Noise, Recipe, router

import gguf_pager
from gguf_pager import read_layout

QUESTIONS = json.loads((Path(__file__).parent / "talking_questions.json").read_text())
"""Ten questions that SmolLM2-135M-Instruct itself answers so that the pattern is found."""


def test_header_says_what_it_is(small: Path, source: Path) -> None:
    ours, theirs = gguf.GGUFReader(small).fields, gguf.GGUFReader(source).fields
    for kept in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.chat_template"):
        assert ours[kept].contents() == theirs[kept].contents()
    description = ours["general.description"].contents()
    assert "Not a trained mixture of experts" in description and "first 6 of 30 blocks" in description
    assert "32 experts" in ours["general.name"].contents()
    layout = read_layout(small)
    assert [(layer.n_experts, layer.n_used) for layer in layout.layers] == [(32, 2)] * 6


@pytest.mark.parametrize("budget", ("25%", "10%", "min"))
def test_logits_are_stocks(small: Path, stock: Factory, paged: Factory, budget: str) -> None:
    """Its experts are near copies of one another: a wrong one would hardly show in the text."""
    ours = paged(small, budget, logits_all=True, n_ctx=256)
    tokens = ours.tokenize(b"<|im_start|>user\nWhat is the capital of Germany?<|im_end|>\n<|im_start|>assistant\n", special=True)
    tokens += ours.tokenize(b"The capital of Germany is Berlin, a city on the river Spree with many lakes.", add_bos=False)
    batches = (8, 3, len(tokens) - 20)
    theirs = stock(small, logits_all=True, n_ctx=256)
    assert np.array_equal(evaluate(ours, tokens, batches), evaluate(theirs, tokens, batches))
    stats = ours.pager.stats()
    assert stats.misses > 0 and stats.left_alone == 0


def test_experts_differ_and_each_is_used(small: Path) -> None:
    llm = gguf_pager.Llama(str(small), budget="100%", n_ctx=2048, n_ubatch=64, verbose=False, profile=False)
    for text in make_talking_model.read_texts():
        llm.reset()
        llm.eval(llm.tokenize(text.encode(), special=True))
    assert llm.pager is not None
    assert all(layer.resident_experts >= 30 for layer in llm.pager.stats().layers)
    llm.close()
    up = next(tensor for tensor in gguf.GGUFReader(small).tensors if tensor.name == "blk.3.ffn_up_exps.weight")
    assert len({expert.tobytes() for expert in up.data}) == 32


def test_ten_questions_are_answered_with_sense(source: Path, tmp_path: Path) -> None:
    path = made(tmp_path / "whole.gguf", source, "--experts", "8")
    found: list[Any] = []
    with gguf_pager.Llama(str(path), budget="25%", n_ctx=512, n_ubatch=64, verbose=False) as llm:
        for question, pattern in QUESTIONS.items():
            answer = llm.create_chat_completion([{"role": "user", "content": question}], max_tokens=32, temperature=0.0)
            text = answer["choices"][0]["message"]["content"]
            if not re.search(pattern, text, re.IGNORECASE):
                found.append((question, text))
        assert llm.pager is not None and llm.pager.stats().left_alone == 0
    path.unlink()
    assert len(found) <= 2, found


def test_router_sends_clusters_to_experts_of_their_own() -> None:
    rng = np.random.default_rng(3)
    centres = rng.standard_normal((4, 64), np.float32)
    states = np.concatenate([centre + 5 + 0.1 * rng.standard_normal((50, 64), np.float32) for centre in centres])
    chosen = (states @ router(states, 4, rng).T).argmax(1).reshape(4, 50)
    assert all(len(set(cluster)) == 1 for cluster in chosen.tolist()) and len(set(chosen[:, 0])) == 4


def test_noise_is_two_percent_and_another_for_each() -> None:
    noise = Noise(10_000, np.random.default_rng(1))
    first, second = (noise.factors(start, 10_000) for start in noise.starts(2))
    assert abs(float(first.std()) - make_talking_model.NOISE) < 0.001 and abs(float(first.mean()) - 1) < 0.001
    assert abs(float(np.corrcoef(first, second)[0, 1])) < 0.05


@pytest.mark.parametrize("recipe", (Recipe(experts=2, used=3), Recipe(blocks=31), Recipe(used=0)))
def test_recipe_that_cannot_be_made_is_refused(source: Path, tmp_path: Path, recipe: Recipe) -> None:
    with pytest.raises(ValueError, match="30 blocks"):
        make_talking_model.make(tmp_path / "x.gguf", recipe, source)
    assert not list(tmp_path.iterdir())


