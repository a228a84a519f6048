"""Several sequences at once: n_ubatch is what was asked for, or what llama.cpp needs of it, or is refused; the bits are stock's.

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
from llama_cpp import llama_cpp as low

import gguf_pager
from gguf_pager import read_layout
from gguf_pager.errors import EngineError
from gguf_pager.memory.sizing import NEED_MULTIPLES, suitable_ubatch

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
path, cases, stock_n_ubatch, told = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), []

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
        (left_alone,) = [pager.stats().left_alone for pager in installed.pagers] if installed else [0]
        low.llama_free(context)
        return found, n_ubatch, bool(has_states), left_alone
    finally:
        low.llama_model_free(model)

for budget, settings in cases:
    with gguf_pager.install(budget=budget, profile=False) as installed:
        try:
            ours, n_ubatch, has_states, left_alone = decode(settings)
        except gguf_pager.BudgetError as error:
            told.append([budget, settings, str(error), None, None])
            continue
    assert left_alone == 0
    installed = None
    theirs = decode(settings | {"n_ubatch": stock_n_ubatch or settings.get("n_ubatch", 64)})[0]
    told.append([budget, settings, n_ubatch, has_states, bool((ours == theirs).all())])
print(json.dumps(told))
"""


def decode_in_child(path: Path, cases: list[tuple[str, dict[str, Any]]], stock_n_ubatch: int = 0) -> list[list[Any]]:
    """Return (budget, settings, n_ubatch or what was refused, whether llama.cpp keeps states, whether stock's bits came).

    Stock gets the n_ubatch that was asked for, unless another one is given, because that one would end the process.
    """
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(path), json.dumps(cases), str(stock_n_ubatch)], capture_output=True, text=True,
                          timeout=120, check=False, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr[-1500:]
    told: list[list[Any]] = json.loads(done.stdout.splitlines()[-1])
    assert len(told) == len(cases)
    return told


@pytest.mark.parametrize(("asked", "suitable"), ((64, 63), (4, 3), (0, 63)))
@pytest.mark.parametrize("arch", NEED_MULTIPLES)
def test_n_ubatch_that_would_end_the_process_is_made_a_multiple(zoo_model: Model, arch: str, asked: int, suitable: int) -> None:
    cases = [(budget, {"n_seq_max": 3, "kv_unified": False, "n_ubatch": asked}) for budget in ("min", "100%")]
    for _, _, n_ubatch, _, is_equal in decode_in_child(zoo_model(arch), cases, stock_n_ubatch=suitable):
        assert n_ubatch == suitable and is_equal


@pytest.mark.parametrize("arch", (*WITH_STATES, "qwen3moe"))
def test_any_number_of_separate_sequences_can_be_computed(zoo_model: Model, arch: str) -> None:
    counts = (1, 2, 4) if arch in NEED_MULTIPLES else (1, 2, 3, 4)  # 64 is no multiple of 3
    cases = [(budget, {"n_seq_max": n, "kv_unified": False}) for n in counts for budget in ("min", "45%", "70%")]
    for budget, settings, n_ubatch, has_states, is_equal in decode_in_child(zoo_model(arch), cases):
        if isinstance(n_ubatch, str):  # a tiny model's share may hold too few
            assert budget != "min" and "too few" in n_ubatch
            continue
        assert has_states == (arch in WITH_STATES)
        assert n_ubatch == 64 and is_equal, (budget, settings)


def test_states_that_are_kept_to_go_back_to_change_nothing(zoo_model: Model) -> None:
    cases = [("min", {"n_seq_max": n, "kv_unified": False, "n_rs_seq": 3}) for n in (1, 2, 3)]
    told = decode_in_child(zoo_model("qwen35moe"), cases)
    assert all(n_ubatch == 64 and is_equal for _, _, n_ubatch, _, is_equal in told)


def test_n_ubatch_below_the_number_of_separate_sequences_is_refused(zoo_model: Model) -> None:
    layout = read_layout(zoo_model("kimi-linear"))
    with pytest.raises(EngineError, match="n_ubatch of at least 4, not 2"):
        suitable_ubatch(layout, 2, 4)
    assert suitable_ubatch(layout, 2, 1) == 2 and suitable_ubatch(read_layout(zoo_model("qwen3moe")), 2, 4) == 2


def test_context_whose_n_ubatch_no_multiple_fits_is_refused(zoo_model: Model) -> None:
    llm = gguf_pager.Llama(str(zoo_model("kimi-linear")), budget="min", n_ctx=128, n_threads=1, verbose=False)
    params = low.llama_context_default_params()
    params.n_ctx, params.n_ubatch, params.n_seq_max, params.kv_unified = 256, 2, 3, False
    with pytest.raises(EngineError, match="3 separate sequences needs an n_ubatch of at least 3, not 2: raise it, or set kv_unified"):
        low.llama_init_from_model(llm.model, params)
    llm.eval([7, 8, 9])
    llm.close()
