"""Look-ahead on real models: it changes what is read when, and not one bit of what comes out. Which architectures are foretold is
a table here, so that a change shows."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import make_zoo
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import Factory, evaluate, some_tokens
from llama_cpp import llama_cpp as low
from test_environment import run
from test_interrupts import LONG, N_TOKENS, Alarm, alarm, raising
from test_llama import run_all, shift
from test_oracle import Logits, check_equal, check_served, context_of, decode, opened, opened_paged, sequences_logits

import gguf_pager
from gguf_pager import environment
from gguf_pager.cli import main
from gguf_pager.errors import PagerError
from gguf_pager.pager import Options

Model = Callable[..., Path]

ON = {"look_ahead": True}

FIRST, OTHER = "no layer before it", "a router of another kind"

NOT_FORETOLD = {
    "deepseek4": ((1,), "its first layers have no router: a table says which experts a token has"),
    "grovemoe": ((1, 3, 5), "the ids of its small experts are computed from those of the large ones, not by a router"),
    "qwen4exp": ((1, 2), "its router's input is a mixture of several streams, each with a norm of its own"),
    "smallthinker": ((1, 2), "its router is asked with the layer's own input, before any norm"),
}
"""Layers with experts of which nothing is foretold, counted from 0, and why; all others of all architectures are, but for the first."""

SILENT = ("grovemoe",)
"""Said to be on, but nothing is foretold: the layer before each is one of small experts, which computes nothing to foretell with."""

N_BATCHED, N_SINGLE = 5, 14
"""Tokens of a first batch, for which is looked ahead as well, and tokens after it, one by one."""


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """What llama.cpp says of each graph is longer than what it computes here takes."""
    with make_zoo.quiet():
        yield


# ---- every architecture ----

def some_logits(model: Any, context: Any) -> Logits:
    """Feed a prompt of more tokens than are looked ahead for, a small batch, and single tokens."""
    rows = [decode(model, context, [(0, i) for i in range(20)])]
    rows.append(decode(model, context, [(0, 20 + i) for i in range(N_BATCHED)], 20))
    rows += [decode(model, context, [(0, 20 + N_BATCHED + i)], 20 + N_BATCHED + i) for i in range(N_SINGLE)]
    return np.concatenate(rows)


@pytest.mark.parametrize("arch", make_zoo.ARCHS)
def test_logits_equal_stock_and_what_can_be_is_foretold(zoo_model: Model, arch: str) -> None:
    path = zoo_model(arch)
    with opened(path) as model, context_of(model, 32, n_threads=1, n_threads_batch=1) as context:
        expected = some_logits(model, context)
    assert np.isfinite(expected).all() and expected.std() > 0
    layers, reason = NOT_FORETOLD.get(arch, ((), ""))
    for budget in ("25%", "min"):
        with opened_paged(path, budget, **ON) as (model, pager):
            with context_of(model, 32, n_threads=1, n_threads_batch=1) as context:
                check_equal(some_logits(model, context), expected, f"at {budget}")
                check_served(context, pager)
            stats = pager.stats()
        said = [layer.look_ahead for layer in stats.layers]
        assert said == [FIRST, *(OTHER if i in layers else "on" for i in range(1, len(said)))], reason
        for layer in stats.layers:
            assert layer.foreseen <= layer.misses and (layer.look_ahead == "on" or layer.foreseen == layer.in_vain == 0)
        assert sum(layer.foreseen for layer in stats.layers) == stats.foreseen
        if budget == "25%" and "on" in said:
            assert (stats.foreseen + stats.in_vain > 0) == (arch not in SILENT)


def test_table_names_architectures_that_there_are() -> None:
    assert set(NOT_FORETOLD) < set(make_zoo.ARCHS)
    assert all(reason for _, reason in NOT_FORETOLD.values())


@pytest.mark.parametrize("arch", ("kimi-k3", "nemotron_h_moe"))
def test_router_is_asked_with_its_own_input_where_experts_get_a_projection(zoo_model: Model, arch: str) -> None:
    """Another row would foretell no more than chance does: a router's own choices among eight experts or more, two of them."""
    with opened_paged(zoo_model(arch), "25%", **ON) as (model, pager):
        with context_of(model, 32, n_threads=1, n_threads_batch=1) as context:
            some_logits(model, context)
        stats = pager.stats()
    assert stats.foreseen > max(8, 1.5 * stats.in_vain)


@pytest.mark.parametrize("arch", ("qwen3moe", "gpt-oss", "deepseek2", "llama4", "gemma4"))
def test_several_sequences_in_one_batch_equal_stock(zoo_model: Model, arch: str) -> None:
    """Two of them miss enough for some of it to be foretold, whatever comes first: of the others it was none to four."""
    path = zoo_model(arch)
    with opened(path) as model:
        expected = sequences_logits(model, 16, True)
    for budget in ("25%", "min"):
        with opened_paged(path, budget, **ON) as (model, pager):
            found = sequences_logits(model, 16, True, lambda context: check_served(context, pager, has_single_tokens=False))
            check_equal(found, expected, f"at {budget}")
            stats = pager.stats()
        assert budget == "min" or arch not in ("qwen3moe", "gemma4") or stats.foreseen > 0


# ---- whose it is ----

@pytest.mark.parametrize("budget", ("25%", "min"))
def test_two_contexts_of_a_model_in_two_threads_equal_stock(zoo_model: Model, budget: str) -> None:
    path, threads = zoo_model("qwen3moe"), {"n_threads": 1, "n_threads_batch": 1}
    with opened(path) as model, context_of(model, 16, **threads) as context:
        expected = some_logits(model, context)
    with opened_paged(path, budget, **ON) as (model, pager):
        with context_of(model, 16, **threads) as one, context_of(model, 16, **threads) as two:

            def work(context: Any) -> Callable[[], None]:
                def again() -> None:
                    for _ in range(5):
                        low.llama_memory_clear(low.llama_get_memory(context), True)
                        check_equal(some_logits(model, context), expected, f"at {budget}")
                return again

            run_all(work(one), work(two))
            check_served(one, pager)
        stats = pager.stats()
    assert stats.foreseen + stats.in_vain > 0 and stats.left_alone == 0


def test_context_that_is_freed_leaves_the_others_right(zoo_model: Model) -> None:
    path = zoo_model("qwen3moe")
    with opened(path) as model, context_of(model, 16) as context:
        expected = some_logits(model, context)
    with opened_paged(path, "25%", **ON) as (model, pager), context_of(model, 16) as kept:
        for _ in range(3):
            with context_of(model, 16) as context:
                check_equal(some_logits(model, context), expected, "of a context that goes")
            low.llama_memory_clear(low.llama_get_memory(kept), True)
            check_equal(some_logits(model, kept), expected, "of the one that stays")
        assert pager.stats().foreseen > 0


def set_adapter(context: Any, adapter: Any, scale: float) -> None:
    adapters = (low.llama_adapter_lora_p_ctypes * 1)(adapter)
    assert low.llama_set_adapters_lora(context, adapters, 1, (low.ctypes.c_float * 1)(scale)) == 0


def with_and_without_adapter(lora: Path, model: Any, is_first: bool) -> list[Logits]:
    """Learn with or without it, then the other way round; free it and go on. Return the logits of each step."""
    rows = []
    with context_of(model, 16) as context:
        for step in range(2):
            adapter = None
            if (step == 0) == is_first:
                adapter = low.llama_adapter_lora_init(model, os.fsencode(lora))
                assert adapter
                set_adapter(context, adapter, 0.7)
            for _ in range(2):
                low.llama_memory_clear(low.llama_get_memory(context), True)
                rows.append(some_logits(model, context))
            if adapter:
                low.llama_set_adapters_lora(context, None, 0, None)
                low.llama_adapter_lora_free(adapter)
                junk = [bytearray(1 << 16) for _ in range(64)]   # its memory is somebody else's now
                low.llama_memory_clear(low.llama_get_memory(context), True)
                rows.append(some_logits(model, context))
                del junk
    return rows


@pytest.mark.parametrize("is_first", (False, True))
@pytest.mark.parametrize("budget", ("25%", "min"))
def test_adapter_that_comes_and_goes_changes_no_bit(zoo_model: Model, lora: Path, is_first: bool, budget: str) -> None:
    """A router that was learnt with or without it is asked without and with it."""
    path = zoo_model("qwen3moe")
    with opened(path) as model:
        expected = with_and_without_adapter(lora, model, is_first)
    assert (expected[0] != expected[-1]).any() or not is_first, "the adapter changes something"
    with opened_paged(path, budget, **ON) as (model, pager):
        found = with_and_without_adapter(lora, model, is_first)
        stats = pager.stats()
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        check_equal(ours, theirs, f"in step {i} at {budget}")
    assert stats.left_alone == 0


# ---- asked for, or not ----

@pytest.mark.parametrize("arch", ("qwen3moe", "smallthinker"))
def test_off_foretells_nothing(zoo_model: Model, paged: Factory, arch: str) -> None:
    llm = paged(zoo_model(arch), "25%", look_ahead=False)
    for token in some_tokens(20):
        llm.eval([token])
    stats = llm.pager.stats()
    assert stats.misses > 0 and stats.foreseen == stats.in_vain == 0
    assert {layer.look_ahead for layer in stats.layers} == {"off"}
    assert stats.look_ahead == f"0 of {len(stats.layers)} layers; {len(stats.layers)}: off"


def test_stats_say_in_how_many_layers(zoo_model: Model, paged: Factory) -> None:
    llm = paged(zoo_model("qwen3moe"), "25%", look_ahead=True)
    assert "on" not in {layer.look_ahead for layer in llm.pager.stats().layers}, "before the first token nothing is known"
    llm.eval(some_tokens(4))
    n_layers = len(llm.pager.stats().layers)
    assert llm.pager.stats().look_ahead == f"{n_layers - 1} of {n_layers} layers; 1: {FIRST}"


def test_auto_is_right_and_counts(zoo_model: Model, pair: Factory) -> None:
    ours, theirs = pair(zoo_model("qwen3moe"), "25%", logits_all=True, n_ctx=512)
    tokens = some_tokens(300)
    check_equal(evaluate(ours, tokens, (20,)), evaluate(theirs, tokens, (20,)), "as it measures itself")
    stats = ours.pager.stats()
    assert ours.pager.options.look_ahead == "auto"
    assert all(layer.foreseen <= layer.misses and layer.hits + layer.misses > 0 for layer in stats.layers)


@pytest.mark.parametrize("nonsense", ("yes", "on", "", None, 2, 0.5))
def test_nonsense_is_refused(nonsense: object) -> None:
    with pytest.raises(PagerError, match="'auto', True or False"):
        Options(look_ahead=nonsense)  # type: ignore[arg-type]


@pytest.mark.parametrize("command", ("run", "serve", "bench"))
def test_nonsense_on_the_command_line_is_refused(command: str, zoo_model: Model) -> None:
    done = CliRunner().invoke(main, [command, str(zoo_model("qwen3moe")), "--look-ahead", "perhaps"])
    assert done.exit_code == 2 and "look-ahead" in done.output


@pytest.mark.parametrize(("said", "meant"), (("auto", "auto"), ("AUTO", "auto"), ("true", True), ("false", False)))
def test_environment_is_understood(said: str, meant: str | bool) -> None:
    _, options = environment.settings({"GGUF_PAGER_BUDGET": "25%", "GGUF_PAGER_LOOK_AHEAD": said})
    assert options["look_ahead"] is meant or options["look_ahead"] == meant == "auto"


def test_nonsense_in_the_environment_is_refused() -> None:
    with pytest.raises(PagerError, match="GGUF_PAGER_LOOK_AHEAD"):
        environment.settings({"GGUF_PAGER_BUDGET": "25%", "GGUF_PAGER_LOOK_AHEAD": "perhaps"})


OPEN = """
import sys
from llama_cpp import Llama
llm = Llama(sys.argv[1], n_ctx=64, n_threads=1, verbose=False)
for token in range(1, 9): llm.eval([token])
from gguf_pager.hooks import hooks
(pager,) = hooks.installed[-1].opened
print(pager.options.look_ahead, pager.stats().look_ahead, sep="|")
"""


@pytest.mark.parametrize(("word", "meant", "said"), (("off", "False", "0 of "), ("on", "True", "2 of 3 layers")))
def test_command_line_reaches_a_program(word: str, meant: str, said: str, zoo_model: Model) -> None:
    done = run("--budget", "25%", "--look-ahead", word, "--", sys.executable, "-c", OPEN, str(zoo_model("qwen3moe")))
    assert done.returncode == 0, done.stderr
    option, _, stats = done.stdout.partition("|")
    assert option == meant and stats.startswith(said)


# ---- what else happens to a context ----

@pytest.mark.parametrize("budget", ("25%", "min"))
def test_saved_state_and_context_shift_equal_stock(zoo_model: Model, pair: Factory, budget: str) -> None:
    ours, theirs = pair(zoo_model("qwen3moe"), budget, ON, n_ctx=256, n_batch=32, logits_all=True)
    tokens, results = some_tokens(120), []
    for llm in (ours, theirs):
        rows = [evaluate(llm, tokens[:30], (20,))]
        state = llm.save_state()
        rows.append(evaluate(llm, tokens[30:50]))
        llm.load_state(state)
        rows.append(evaluate(llm, tokens[60:80]))
        shift(llm, 4, 20)
        rows.append(evaluate(llm, tokens[80:100], (12,)))
        results.append(np.concatenate(rows))
    check_equal(*results, f"at {budget}")
    assert ours.pager.stats().left_alone == 0


def test_interrupted_decode_is_right_afterwards(zoo_model: Model, paged: Factory) -> None:
    """It ends between a forecast and its layer's turn, somewhere."""
    llm = paged(zoo_model("qwen3moe"), "25%", **LONG, logits_all=True, **ON)
    tokens = some_tokens(N_TOKENS)
    expected = evaluate(llm, tokens[:24], (8,))
    for _ in range(3):
        llm.reset()
        with alarm(raising(llm.pager)), pytest.raises(Alarm):
            llm.eval(tokens)
        llm.reset()
        check_equal(evaluate(llm, tokens[:24], (8,)), expected, "after an interrupted decode")
    stats = llm.pager.stats()
    assert stats.foreseen > 0 and stats.left_alone == 0


# ---- a model whose hidden states say something ----

TEXT = """The harbour lay quiet in the early morning. A few boats came in with the tide, and the men who had been out all night
tied them up without a word. On the quay a woman counted the boxes of fish, wrote down a number, and counted them again. The first
light fell on the roofs of the old town. Somewhere a door was opened, a dog barked, and a boy with a basket of bread ran down the hill
to the houses by the water, where people were waking up and putting the kettle on."""


def test_most_misses_of_a_model_that_talks_are_foreseen(small: Path) -> None:
    """Counted, not timed: what its next layer chooses is mostly known a layer before."""
    with gguf_pager.Llama(str(small), budget="25%", n_ctx=256, n_threads=1, verbose=False, profile=False, look_ahead=True) as llm:
        for token in llm.tokenize(TEXT.encode()):
            llm.eval([token])
        stats = llm.pager.stats()
    assert stats.left_alone == 0 and stats.look_ahead == f"5 of 6 layers; 1: {FIRST}"
    assert stats.misses > 200
    rest = stats.layers[2:]  # a token's embedding, which the first layer has, says little of the second
    misses = sum(layer.misses for layer in rest)
    assert sum(layer.foreseen for layer in rest) > 0.7 * misses
    assert sum(layer.in_vain for layer in rest) < 0.3 * misses
    assert stats.in_vain < 0.3 * stats.misses


def test_choices_that_rarely_come_true_are_read_for_no_more(small: Path) -> None:
    """Of the second layer little is known: with all that its router names a quarter of the misses would be read in vain."""
    with gguf_pager.Llama(str(small), budget="25%", n_ctx=256, n_threads=1, verbose=False, profile=False, look_ahead=True) as llm:
        for _ in range(2):
            llm.reset()
            for token in llm.tokenize(TEXT.encode()):
                llm.eval([token])
        second = llm.pager.stats().layers[1]
    assert second.misses > 200
    assert second.in_vain < 0.18 * second.misses


def test_nonsense_is_foretold_from_no_longer_than_it_lasts(small: Path) -> None:
    """What a batch of no numbers taught would stay for as long as the context."""
    with gguf_pager.Llama(str(small), budget="25%", n_ctx=256, n_threads=1, verbose=False, profile=False, look_ahead=True) as llm:
        llm.eval([1])
        batch = low.llama_batch_init(1, low.llama_model_n_embd(llm.model), 1)
        for i in range(low.llama_model_n_embd(llm.model)):
            batch.embd[i] = float("nan")
        batch.n_tokens, batch.pos[0], batch.n_seq_id[0], batch.seq_id[0][0], batch.logits[0] = 1, 1, 1, 0, 1
        assert low.llama_decode(llm.ctx, batch) == 0
        low.llama_batch_free(batch)
        low.llama_memory_clear(low.llama_get_memory(llm.ctx), True)
        llm.reset()
        before = llm.pager.stats()
        for token in llm.tokenize(TEXT.encode()):
            llm.eval([token])
        stats = llm.pager.stats()
    assert stats.foreseen - before.foreseen > 0.4 * (stats.misses - before.misses) > 80
    assert stats.in_vain - before.in_vain < 0.3 * (stats.misses - before.misses)
