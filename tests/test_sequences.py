"""Separate sequences: whatever n_ubatch a budget leaves suits what llama.cpp needs of it, or is refused; the bits are stock's.

Each architecture is tried in a process of its own, because llama.cpp ends the process where it does not suit.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gguf_pager import read_layout
from gguf_pager.errors import EngineError
from gguf_pager.memory.sizing import NEED_MULTIPLES, Batches, suitable_ubatch

Model = Callable[..., Path]

WITH_STATES = ("bailingmoe3", "deepseek4", "glm5-next", "granitehybrid", "jamba", "kimi-k3", "kimi-linear", "lfm2moe", "minimax-01",
               "nemotron_h_moe", "qwen35moe", "qwen3next", "qwen4exp")
"""All of the zoo that llama.cpp calls hybrid or recurrent; the test checks that."""

SCRIPT = """
import json, os, sys
import gguf_pager
gguf_pager.Llama
import numpy as np
from llama_cpp import llama_cpp as low

quiet = low.llama_log_callback(lambda level, text, data: None)
low.llama_log_set(quiet, None)
path, cases, told = sys.argv[1], json.loads(sys.argv[2]), []

def decode(settings):
    params = low.llama_model_default_params()
    params.use_extra_bufts = False
    model = low.llama_model_load_from_file(os.fsencode(path), params)
    context_params = low.llama_context_default_params()
    for name, value in ({"n_ctx": 256, "n_batch": 64, "n_ubatch": 64, "n_threads": 1, "n_threads_batch": 1} | settings).items():
        setattr(context_params, name, value)
    try:
        context = low.llama_init_from_model(model, context_params)
        n_seq = settings["n_seq_max"]
        places = [(s, at) for at in range(9) for s in range(n_seq) if at < 9 - 2 * s]  # lengths that differ
        batch = low.llama_batch_init(len(places), 0, 1)
        batch.n_tokens = len(places)
        for i, (s, at) in enumerate(places):
            batch.token[i], batch.pos[i], batch.logits[i] = 7 + 3 * i, at, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, s
        assert low.llama_decode(context, batch) == 0
        n_vocab = low.llama_vocab_n_tokens(low.llama_model_get_vocab(model))
        found = np.array([np.ctypeslib.as_array(low.llama_get_logits_ith(context, i), shape=(n_vocab,)).copy()
                          for i in range(len(places))])
        low.llama_batch_free(batch)
        n_ubatch = low.llama_n_ubatch(context)
        has_states = low.llama_model_is_hybrid(model) or low.llama_model_is_recurrent(model)
        low.llama_free(context)
        return found, n_ubatch, bool(has_states)
    finally:
        low.llama_model_free(model)

for budget, settings in cases:
    with gguf_pager.install(budget=budget, profile=False) as installed:
        try:
            ours, n_ubatch, has_states = decode(settings)
        except gguf_pager.BudgetError as error:
            told.append([budget, settings, str(error), None, None])
            continue
    theirs = decode(settings | {"n_ubatch": n_ubatch})[0]
    told.append([budget, settings, n_ubatch, has_states, bool((ours == theirs).all())])
print(json.dumps(told))
"""


def decode_in_child(path: Path, cases: list[tuple[str, dict[str, Any]]]) -> list[list[Any]]:
    """Return (budget, settings, n_ubatch or what was refused, whether llama.cpp keeps states, whether stock's bits came)."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(path), json.dumps(cases)], capture_output=True, text=True,
                          timeout=120, check=False, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr[-1500:]
    told: list[list[Any]] = json.loads(done.stdout.splitlines()[-1])
    assert len(told) == len(cases)
    return told


@pytest.mark.parametrize("arch", NEED_MULTIPLES)
def test_n_ubatch_that_would_end_the_process_is_made_a_multiple(zoo_model: Model, arch: str) -> None:
    cases = [("100%", {"n_seq_max": 3, "kv_unified": False, "n_ubatch": n}) for n in (64, 4, 0)]
    told = decode_in_child(zoo_model(arch), cases)
    assert [n_ubatch for _, _, n_ubatch, _, _ in told] == [63, 3, 63]
    assert all(is_equal for *_, is_equal in told)


@pytest.mark.parametrize("arch", (*WITH_STATES, "qwen3moe"))
def test_any_number_of_separate_sequences_can_be_computed(zoo_model: Model, arch: str) -> None:
    cases = [(budget, {"n_seq_max": n, "kv_unified": False}) for n in (1, 2, 3, 4) for budget in ("min", "45%", "70%")]
    for budget, settings, n_ubatch, has_states, is_equal in decode_in_child(zoo_model(arch), cases):
        n = settings["n_seq_max"]
        if isinstance(n_ubatch, str):  # a tiny model's share may hold too few
            assert budget != "min" and "too few" in n_ubatch
            continue
        assert has_states == (arch in WITH_STATES)
        assert is_equal, (budget, n, n_ubatch)
        assert n_ubatch == 64 or not has_states or n_ubatch % n == 0, (budget, n, n_ubatch)
        assert budget != "min" or n > 2 or n_ubatch < 64, "with more sequences all experts may be the least"


def test_batches_are_longer_than_the_states_that_are_kept(zoo_model: Model) -> None:
    cases = [("min", {"n_seq_max": n, "kv_unified": False, "n_rs_seq": 3}) for n in (1, 2, 3)]
    told = decode_in_child(zoo_model("qwen35moe"), cases)
    assert all(n_ubatch > 4 and n_ubatch % settings["n_seq_max"] == 0 or n_ubatch == 64 for _, settings, n_ubatch, _, _ in told)
    assert all(is_equal for *_, is_equal in told)


def test_second_context_with_more_sequences_than_the_slots_allow_is_refused(zoo_model: Model) -> None:
    script = """
import os, sys
import gguf_pager
llm = gguf_pager.Llama(sys.argv[1], budget="min", n_ctx=128, n_threads=1, n_threads_batch=1, verbose=False)
from llama_cpp import llama_cpp as low
params = low.llama_context_default_params()
params.n_ctx, params.n_ubatch, params.n_seq_max, params.kv_unified = 256, 63, 3, False
try:
    low.llama_init_from_model(llm.model, params)
except gguf_pager.BudgetError as error:
    print(error)
llm.eval([7, 8, 9])
"""
    done = subprocess.run([sys.executable, "-c", script, str(zoo_model("kimi-linear"))], capture_output=True, text=True,
                          timeout=60, check=False, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr[-1500:]
    assert "keeps 3 sequences apart" in done.stdout and "lower n_seq_max or set kv_unified" in done.stdout


# ---- the choice alone ----

def test_smallest_batch_suits_what_was_asked_for() -> None:
    assert Batches(64).n_least == 1
    assert Batches(64, n_sequences=3).n_least == 1, "nothing depends on it"
    assert Batches(64, n_sequences=3, must_divide=True).n_least == 3
    assert Batches(2, n_sequences=3, must_divide=True).n_least == 2, "never more than was asked for"
    assert Batches(64, n_sequences=4, must_divide=True, n_tail=4).n_least == 8
    assert Batches(64, n_tail=4).n_least == 5
    assert Batches(64, is_uncut=True, n_sequences=3, must_divide=True).n_least == 1


def test_n_ubatch_below_the_number_of_separate_sequences_is_refused(zoo_model: Model) -> None:
    layout = read_layout(zoo_model("kimi-linear"))
    with pytest.raises(EngineError, match="n_ubatch of at least 4, not 2"):
        suitable_ubatch(layout, 2, 4)
    assert suitable_ubatch(layout, 2, 1) == 2 and suitable_ubatch(read_layout(zoo_model("qwen3moe")), 2, 4) == 2


def test_chosen_batch_is_a_multiple_wherever_one_fits(zoo_model: Model) -> None:
    layout = read_layout(zoo_model("kimi-linear"))
    n_used = max(layer.n_used for layer in layout.layers)
    for n_sequences in (1, 2, 3, 4):
        for n_tokens in range(n_sequences, 3):
            slots = [n_tokens * n_used] * len(layout.shapes)
            for must_divide in (False, True):
                found = Batches(64, n_sequences=n_sequences, must_divide=must_divide).largest(layout, slots)
                assert found == n_tokens // n_sequences * n_sequences
    assert Batches(64, n_sequences=4).largest(layout, [n_used] * len(layout.shapes)) == 1, "where none fits, what does"
