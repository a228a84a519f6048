"""install(): models that other code opens, by high or low-level functions, are paged and compute the same bits."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from conftest import ARGUMENTS, UNWRAPPED, Factory, Footprint, Logits, evaluate, some_tokens
from llama_cpp import llama_cpp as low

import gguf_pager
from gguf_pager import PagerError, PagerIOError, _native
from gguf_pager.model.engine import I32

Model = Callable[..., Path]


@contextlib.contextmanager
def low_level(path: Path, **settings: Any) -> Iterator[tuple[Any, Any]]:
    """Open a model and a context with nothing but llama.h's functions; yield both."""
    params = low.llama_model_default_params()
    params.use_extra_bufts = False
    model = low.llama_model_load_from_file(os.fsencode(path), params)
    assert model
    context_params = low.llama_context_default_params()
    defaults = {"n_ctx": 128, "n_batch": 64, "n_ubatch": 64, "n_threads": 1, "n_threads_batch": 1,
                "flash_attn_type": low.LLAMA_FLASH_ATTN_TYPE_DISABLED}
    for name, value in (defaults | settings).items():
        setattr(context_params, name, value)
    context = low.llama_init_from_model(model, context_params)
    assert context
    try:
        yield model, context
    finally:
        low.llama_free(context)
        low.llama_model_free(model)


def decode_status(context: Any, tokens: list[int], first: int = 0) -> int:
    """Decode one batch that wants all logits; return what llama_decode returns."""
    batch = low.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, first + i, 1, 0, 1
    try:
        return int(low.llama_decode(context, batch))
    finally:
        low.llama_batch_free(batch)


def decode(model: Any, context: Any, tokens: list[int], first: int = 0) -> Logits:
    assert decode_status(context, tokens, first) == 0
    n_vocab = low.llama_vocab_n_tokens(low.llama_model_get_vocab(model))
    return np.ctypeslib.as_array(low.llama_get_logits(context), shape=(len(tokens), n_vocab)).copy()


def run(path: Path, **settings: Any) -> Logits:
    """Return the logits of a batch and three single tokens."""
    tokens = some_tokens(13)
    with low_level(path, **settings) as (model, context):
        rows = [decode(model, context, tokens[:10])]
        rows += [decode(model, context, [tokens[i]], i) for i in range(10, 13)]
        return np.concatenate(rows)


def wrapped() -> set[str]:
    return {name for name, function in UNWRAPPED.items() if getattr(low, name) is not function}


# ---- paged and equal ----

@pytest.mark.parametrize("budget", ("min", "60%"))
def test_low_level_decoding_is_paged_and_equals_stock(zoo_model: Model, budget: str) -> None:
    path = zoo_model("qwen3moe")
    with gguf_pager.install(budget=budget) as installed:
        seen = []
        with low_level(path):
            seen += installed.pagers
        ours = run(path)
    theirs = run(path)
    assert len(seen) == 1
    assert (ours == theirs).all() and theirs.std() > 0


def test_n_ubatch_beyond_all_bounds_is_n_batch_as_in_stock(zoo_model: Model) -> None:
    with gguf_pager.install("min"), low_level(zoo_model("qwen3moe"), n_ubatch=2**32 - 1) as (model, context):
        assert low.llama_n_ubatch(context) == 64
        decode(model, context, some_tokens(20))


def test_llama_cpps_own_class_is_paged_while_installed(zoo_model: Model, stock: Factory) -> None:
    path, tokens = zoo_model("qwen3moe"), some_tokens(20)
    with gguf_pager.install(budget="60%", policy="lru") as installed:
        llm = llama_cpp.Llama(str(path), logits_all=True, **ARGUMENTS)
        (pager,) = installed.pagers
        assert pager.options.policy == "lru"
        ours = evaluate(llm, tokens, (12,))
        assert pager.stats().evictions > 0 and pager.stats().left_alone == 0
        llm.close()
    assert (ours == evaluate(stock(path, logits_all=True), tokens, (12,))).all()


def test_models_of_all_threads_are_paged(zoo_model: Model) -> None:
    with gguf_pager.install(budget="min") as installed:
        found = []

        def work() -> None:
            with low_level(zoo_model("qwen3moe")):
                found.extend(installed.pagers)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join(30)
    assert len(found) == 1


def test_functions_of_the_package_itself_are_wrapped_too() -> None:
    decode = low.llama_decode
    with gguf_pager.install(budget="min"):
        assert llama_cpp.llama_decode == low.llama_decode != decode
    assert llama_cpp.llama_decode is low.llama_decode is UNWRAPPED["llama_decode"]


def test_functions_bound_before_are_paged_all_the_same(zoo_model: Model, tmp_path: Path) -> None:
    """A failed read then shows as llama_decode's return value 2."""
    path = tmp_path / "model.gguf"
    path.write_bytes(zoo_model("qwen3moe").read_bytes())
    tokens = some_tokens(4)
    bound = UNWRAPPED["llama_decode"]
    with gguf_pager.install(budget="min") as installed, low_level(path) as (_, context):
        batch = low.llama_batch_get_one((ctypes.c_int * 4)(*tokens), 4)
        assert bound(context, batch) == 0
        assert installed.pagers[0].stats().misses > 0
        os.utime(path, ns=(1, 1))
        assert bound(context, low.llama_batch_get_one((ctypes.c_int * 4)(*some_tokens(4, seed=2)), 4)) == 0, "touched"
        os.truncate(path, path.stat().st_size + 1)
        assert bound(context, low.llama_batch_get_one((ctypes.c_int * 4)(*some_tokens(4, seed=3)), 4)) == 2


# ---- installing and uninstalling ----

def test_pagers_lists_models_that_are_open(zoo_model: Model) -> None:
    with gguf_pager.install(budget="min") as installed:
        assert installed.pagers == []
        with low_level(zoo_model("qwen3moe")):
            with low_level(zoo_model("gpt-oss")):
                assert [pager.layout.architecture for pager in installed.pagers] == ["qwen3moe", "gpt-oss"]
            assert [pager.layout.architecture for pager in installed.pagers] == ["qwen3moe"]
        assert installed.pagers == []


def test_models_opened_before_and_after_are_not_paged(zoo_model: Model) -> None:
    before = llama_cpp.Llama(str(zoo_model("qwen3moe")), **ARGUMENTS)
    installed = gguf_pager.install(budget="min")
    before.eval(some_tokens(3))
    assert installed.pagers == []
    installed.uninstall()
    after = llama_cpp.Llama(str(zoo_model("qwen3moe")), **ARGUMENTS)
    assert installed.pagers == []
    before.close()
    after.close()


def test_open_models_stay_paged_after_uninstall(zoo_model: Model, footprint: Callable[[Path], Footprint]) -> None:
    path = zoo_model("qwen3moe")
    before = footprint(path)
    installed = gguf_pager.install(budget="min")
    with low_level(path) as (model, context):
        installed.uninstall()
        installed.uninstall()
        misses = installed.pagers[0].stats().misses
        decode(model, context, some_tokens(5))
        assert installed.pagers[0].stats().misses > misses
        assert wrapped() == set(UNWRAPPED), "they are needed as long as the model lives"
    assert footprint(path) == before


def test_latest_installation_rules_and_ends_first(zoo_model: Model) -> None:
    one, two = gguf_pager.install(budget="min"), gguf_pager.install(budget="100%")
    with low_level(zoo_model("qwen3moe")):
        assert (len(one.pagers), len(two.pagers)) == (0, 1)
    gguf_pager.uninstall()
    with low_level(zoo_model("qwen3moe")):
        assert (len(one.pagers), len(two.pagers)) == (1, 0)
    gguf_pager.uninstall()
    assert wrapped() == set()


def test_own_budget_of_our_llama_goes_before_the_installed_one(zoo_model: Model) -> None:
    with gguf_pager.install(budget="100%") as installed:
        llm = gguf_pager.Llama(str(zoo_model("qwen3moe")), budget="min", **ARGUMENTS)
        assert installed.pagers == []
        assert llm.pager.n_slots == tuple(need.n_least for need in llm.pager.needs)
        llm.close()


def test_uninstall_without_install_says_so() -> None:
    with pytest.raises(PagerError, match=r"call install\(\) first"):
        gguf_pager.uninstall()


def test_unknown_option_is_refused_and_nothing_is_wrapped() -> None:
    with pytest.raises(TypeError, match="n_reader.*it knows budget, policy"):
        gguf_pager.install(n_reader=3)
    with pytest.raises(PagerError, match="policy 'best' does not exist"):
        gguf_pager.install(policy="best")
    with pytest.raises(gguf_pager.BudgetError):
        gguf_pager.install(budget="lots")
    assert wrapped() == set()


def test_body_that_raises_ends_the_installation() -> None:
    with pytest.raises(KeyError), gguf_pager.install():
        raise KeyError
    assert wrapped() == set()


def test_installing_before_llama_cpp_is_imported_works(zoo_model: Model) -> None:
    program = (
        "import sys, gguf_pager\n"
        "installed = gguf_pager.install(budget='min')\n"
        "from llama_cpp import Llama\n"
        "llm = Llama(sys.argv[1], n_ctx=64, n_threads=1, verbose=False)\n"
        "llm('the', max_tokens=2)\n"
        "assert installed.pagers[0].stats().misses > 0\n"
        "llm.close()\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(zoo_model("qwen3moe"))], capture_output=True, text=True,
                          timeout=60, check=False, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr


# ---- callbacks of the user's own ----

def tensor(address: int) -> dict[str, Any]:
    return _native.read_tensor(address)


MUL_MAT_ID = b"MUL_MAT_ID"


class Watcher:
    """An eval callback that wants every matrix multiplication of experts, and notes what it is shown."""

    def __init__(self, wants: Callable[[dict[str, Any]], bool]) -> None:
        from gguf_pager.model import engine

        self.op_name = engine.load().base.ggml_op_name
        self.weights: list[tuple[str, tuple[int, ...]]] = []
        self.asked: list[str] = []
        self.ids: list[list[int]] = []
        self.outputs: list[bytes] = []
        self.data: list[int] = []
        self.wants = wants
        self.callback = low.ggml_backend_sched_eval_callback(self._called)

    def _called(self, address: int, ask: bool, data: int | None) -> bool:
        self.data.append(data or 0)
        node = tensor(address)
        if ask:
            self.asked.append(node["name"])
            return self.wants(node)
        if self.op_name(node["op"]) == MUL_MAT_ID:
            weights, ids = tensor(node["src"][0]), tensor(node["src"][2])
            self.weights.append((weights["name"], weights["ne"]))
            assert ids["type"] == I32
            n_used, n_tokens = ids["ne"][:2]
            self.ids.append([
                ctypes.c_int.from_address(ids["data"] + token * ids["nb"][1] + rank * ids["nb"][0]).value
                for token in range(n_tokens) for rank in range(n_used)
            ])
            n_bytes = 4 * node["ne"][0] * node["ne"][1] * node["ne"][2]
            self.outputs.append(ctypes.string_at(node["data"], n_bytes))
        return True

    def is_expert_multiplication(self, node: dict[str, Any]) -> bool:
        return self.op_name(node["op"]) == MUL_MAT_ID


@pytest.mark.parametrize("everything", (False, True), ids=("experts", "every node"))
def test_users_eval_callback_sees_the_graph_as_llama_cpp_made_it(zoo_model: Model, everything: bool) -> None:
    """Tensors of the model, not of slots; expert ids, not slot numbers; the same results."""
    path = zoo_model("qwen3moe")
    seen = []
    for budget in ("60%", None):
        watcher = Watcher(lambda node: True)
        if not everything:
            watcher.wants = watcher.is_expert_multiplication
        with contextlib.ExitStack() as stack:
            if budget:
                stack.enter_context(gguf_pager.install(budget=budget))
            logits = run(path, n_ubatch=2, cb_eval=watcher.callback, cb_eval_user_data=77)
        seen.append((watcher, logits))
    (ours, our_logits), (theirs, their_logits) = seen
    assert {name for name, _ in ours.weights} == {
        f"blk.{block}.ffn_{role}_exps.weight" for block in range(3) for role in ("gate", "up", "down")
    }
    assert {ne[2] for _, ne in ours.weights} == {10}
    assert ours.weights == theirs.weights
    assert ours.ids == theirs.ids
    assert ours.outputs == theirs.outputs
    assert ours.asked == theirs.asked
    assert set(ours.data) == {77}
    assert (our_logits == their_logits).all()


def test_users_eval_callback_may_end_the_graph_as_in_stock(zoo_model: Model) -> None:
    """False, given after a node is computed, ends the graph without an error: llama.cpp's own rule."""
    path = zoo_model("qwen3moe")
    counts = []
    for budget in ("min", None):
        calls: list[str] = []

        @low.ggml_backend_sched_eval_callback
        def stop(address: int, ask: bool, data: int | None, calls: list[str] = calls) -> bool:
            name = tensor(address)["name"]
            calls.append(name)
            return ask and name == "ffn_moe_out-1"

        with contextlib.ExitStack() as stack:
            if budget:
                stack.enter_context(gguf_pager.install(budget=budget))
            with low_level(path, n_ubatch=1, cb_eval=stop) as (_, context):
                assert decode_status(context, [5]) == 0
        counts.append(calls)
    assert counts[0] == counts[1]
    assert counts[0][-1] == "ffn_moe_out-1"


@pytest.mark.parametrize("when", ("created", "set"))
def test_users_abort_callback_ends_a_decode_and_the_next_one_is_right(zoo_model: Model, when: str) -> None:
    path, tokens = zoo_model("qwen3moe"), some_tokens(6)
    calls: list[int] = []
    is_aborting = False

    @low.ggml_abort_callback
    def abort(data: int | None) -> bool:
        calls.append(data or 0)
        return is_aborting and len(calls) > 20

    settings = {"abort_callback": abort, "abort_callback_data": 99} if when == "created" else {}
    with gguf_pager.install(budget="min"), low_level(path, **settings) as (model, context):
        if when == "set":
            low.llama_set_abort_callback(context, abort, ctypes.c_void_p(99))
        ours = [decode(model, context, tokens[:3])]
        assert set(calls) == {99} and len(calls) > 20
        is_aborting = True
        assert decode_status(context, tokens[3:], 3) == 2
        is_aborting = False
        ours.append(decode(model, context, tokens[3:], 3))
    with low_level(path) as (model, context):
        theirs = [decode(model, context, tokens[:3]), decode(model, context, tokens[3:], 3)]
    assert (np.concatenate(ours) == np.concatenate(theirs)).all()


def test_abort_callback_can_be_taken_away_and_ours_stays(zoo_model: Model, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(zoo_model("qwen3moe").read_bytes())
    calls: list[int] = []

    @low.ggml_abort_callback
    def abort(data: int | None) -> bool:
        calls.append(1)
        return True

    change_now = False

    @low.ggml_backend_sched_eval_callback
    def change(address: int, ask: bool, data: int | None) -> bool:
        if change_now:
            os.truncate(path, path.stat().st_size + 1)
        return False

    with gguf_pager.install(budget="min"), low_level(path, cb_eval=change) as (model, context):
        low.llama_set_abort_callback(context, abort, None)
        assert decode_status(context, [5]) == 2 and calls
        low.llama_set_abort_callback(context, low.ggml_abort_callback(0), None)
        calls.clear()
        decode(model, context, [5])
        assert not calls
        change_now = True
        with pytest.raises(PagerIOError, match="changed while in use"):  # which ours told llama.cpp to stop for
            decode_status(context, [6], 1)


# ---- the rest of llama.h ----

def test_handles_may_be_pointers_as_in_stock(zoo_model: Model) -> None:
    """The functions take c_void_p as well as the numbers that they return."""
    tokens = some_tokens(5)
    with gguf_pager.install(budget="min") as installed:
        params = low.llama_model_default_params()
        model = ctypes.c_void_p(low.llama_model_load_from_file(os.fsencode(zoo_model("qwen3moe")), params))
        context_params = low.llama_context_default_params()
        context_params.n_ctx, context_params.n_threads, context_params.n_threads_batch = 64, 1, 1
        context = ctypes.c_void_p(low.llama_init_from_model(model, context_params))
        decode(model, context, tokens)
        assert installed.pagers[0].stats().misses > 0
        low.llama_free(context)
        low.llama_model_free(model)
        assert installed.pagers == []
    assert wrapped() == set()


@pytest.mark.parametrize("kv_unified", (False, True))
def test_batches_of_several_sequences_equal_stock(zoo_model: Model, kv_unified: bool) -> None:
    path, tokens = zoo_model("qwen3moe"), some_tokens(24)

    def logits() -> Logits:
        with low_level(path, n_seq_max=4, kv_unified=kv_unified) as (model, context):
            batch = low.llama_batch_init(24, 0, 4)
            batch.n_tokens = 24
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i], batch.logits[i] = token, i // 4, 1
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, i % 4
            assert low.llama_decode(context, batch) == 0
            n_vocab = low.llama_vocab_n_tokens(low.llama_model_get_vocab(model))
            found = np.array([np.ctypeslib.as_array(low.llama_get_logits_ith(context, i), shape=(n_vocab,)).copy()
                              for i in range(24)])
            low.llama_batch_free(batch)
            return found

    expected = logits()
    for budget in ("min", "60%", "100%"):
        with gguf_pager.install(budget=budget):
            assert (logits() == expected).all()


def test_adapters_put_on_and_taken_off_equal_stock(zoo_model: Model, lora: Path) -> None:
    path, tokens = zoo_model("qwen3moe"), some_tokens(30)

    def logits() -> Logits:
        with low_level(path) as (model, context):
            adapter = low.llama_adapter_lora_init(model, os.fsencode(lora))
            rows = []
            for step, scale in enumerate((0.0, 1.0, 0.0, 0.5, 1.0, 0.0)):
                adapters = (low.llama_adapter_lora_p_ctypes * 1)(adapter)
                scales = (ctypes.c_float * 1)(scale)
                assert low.llama_set_adapters_lora(context, adapters, 1 if scale else 0, scales) == 0
                first = step * 5
                rows += [decode(model, context, tokens[first : first + 3], first)]
                rows += [decode(model, context, [tokens[first + i]], first + i) for i in (3, 4)]
            return np.concatenate(rows)

    expected = logits()
    for budget in ("min", "60%"):
        with gguf_pager.install(budget=budget) as installed:
            assert (logits() == expected).all()
            assert installed.pagers == []


def test_block_for_multi_token_prediction_may_be_loaded(zoo_model: Model) -> None:
    """Its experts are in the file and not in the layout: llama.cpp computes them from its mapping."""
    path, tokens = zoo_model("glm4moe"), some_tokens(8)

    def logits() -> Logits:
        load = low.llama_model_load_from_file

        def with_mtp(path_model: bytes, params: Any, /) -> Any:
            params.load_mtp = True
            return load(path_model, params)

        low.llama_model_load_from_file = with_mtp
        try:
            with low_level(path) as (model, context):
                return decode(model, context, tokens)
        finally:
            low.llama_model_load_from_file = load

    with gguf_pager.install(budget="min"):
        ours = logits()
    assert (ours == logits()).all()


def test_contexts_made_and_freed_beside_a_working_one_change_no_bit(zoo_model: Model) -> None:
    path, tokens = zoo_model("qwen3moe"), some_tokens(40)
    with gguf_pager.install(budget="60%"), low_level(path) as (model, context):
        params = low.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_threads, params.n_threads_batch = 64, 16, 1, 1
        is_done = threading.Event()
        n_made = 0

        def make_and_free() -> None:
            nonlocal n_made
            while not is_done.is_set() or n_made < 5:
                other = low.llama_init_from_model(model, params)
                decode(model, other, tokens[:6])
                low.llama_free(other)
                n_made += 1

        thread = threading.Thread(target=make_and_free)
        thread.start()
        ours = []
        for _ in range(5):
            low.llama_memory_clear(low.llama_get_memory(context), True)
            ours.append(np.concatenate([decode(model, context, [token], i) for i, token in enumerate(tokens)]))
        is_done.set()
        thread.join(60)
        assert not thread.is_alive()
    with low_level(path) as (model, context):
        theirs = np.concatenate([decode(model, context, [token], i) for i, token in enumerate(tokens)])
    assert n_made >= 5
    assert all((rows == theirs).all() for rows in ours)


def test_one_context_too_many_is_refused_and_the_others_go_on(zoo_model: Model) -> None:
    params = low.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_threads, params.n_threads_batch = 64, 4, 1, 1
    with gguf_pager.install(budget="min"), low_level(zoo_model("gpt-oss")) as (model, context):
        contexts = [low.llama_init_from_model(model, params) for _ in range(63)]
        with pytest.raises(gguf_pager.EngineError, match="free one"):
            low.llama_init_from_model(model, params)
        decode(model, context, [5])
        decode(model, contexts[-1], [5])
        low.llama_free(contexts.pop())
        contexts.append(low.llama_init_from_model(model, params))
        decode(model, contexts[-1], [5])
        for other in contexts:
            low.llama_free(other)


AT_EXIT = """
import sys, gguf_pager
keep = gguf_pager.Llama(sys.argv[1], budget="min", n_ctx=64, n_threads=1, verbose=False)
keep("the", max_tokens=2)
generator = keep("the", max_tokens=20, stream=True)
next(generator)
installed = gguf_pager.install(budget="min")
import llama_cpp
other = llama_cpp.Llama(sys.argv[1], n_ctx=64, n_threads=1, verbose=False)
other("the", max_tokens=2)
print("done")
"""


def test_process_that_ends_with_models_open_ends_quietly(zoo_model: Model) -> None:
    done = subprocess.run([sys.executable, "-c", AT_EXIT, str(zoo_model("qwen3moe"))], capture_output=True, text=True,
                          timeout=60, check=False, cwd=Path(__file__).parent.parent)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_tap_survives_as_many_graphs_as_come(zoo_model: Model) -> None:
    """Batches of every length make a graph each; some are used again, most are thrown away."""
    path, tokens = zoo_model("qwen3moe"), some_tokens(120)
    lengths = [1, 5, 1, 1, 3, 2, 7, 1, 4, 4, 1, 6, 2, 2, 8, 1, 1, 1, 3, 5]

    def rows() -> Logits:
        with low_level(path) as (model, context):
            at, found = 0, []
            for length in lengths:
                found.append(decode(model, context, tokens[at : at + length], at))
                at += length
            return np.concatenate(found)

    expected = rows()
    for budget in ("min", "100%"):
        with gguf_pager.install(budget=budget):
            assert (rows() == expected).all()


def test_non_causal_attention_is_paged_at_every_budget(zoo_model: Model) -> None:
    """It needs the whole batch in one piece."""
    path, tokens = zoo_model("qwen3moe"), some_tokens(16)

    def logits() -> Logits:
        with low_level(path, n_ubatch=16) as (model, context):
            low.llama_set_causal_attn(context, False)
            return decode(model, context, tokens)

    expected = logits()
    for budget in ("min", "100%"):
        with gguf_pager.install(budget):
            assert (logits() == expected).all()


def test_non_causal_attention_on_shorter_batches_than_asked_for_is_refused_instead_of_aborting(zoo_model: Model) -> None:
    several = {"n_seq_max": 3, "kv_unified": False, "n_ubatch": 16}
    with gguf_pager.install("min"), low_level(zoo_model("kimi-linear"), **several) as (_, context):
        assert low.llama_n_ubatch(context) == 15
        low.llama_set_causal_attn(context, True)
        with pytest.raises(gguf_pager.EngineError, match="ask for such an n_ubatch"):
            low.llama_set_causal_attn(context, False)
        assert decode_status(context, some_tokens(10)) == 0
