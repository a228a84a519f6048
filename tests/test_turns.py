"""Several threads with one model: they take turns, get their own answers, and never end or hang the process."""

from __future__ import annotations

import asyncio
import contextvars
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp
import make_trace_model
import pytest
from conftest import ARGUMENTS, UNWRAPPED, Factory, evaluate, some_tokens
from llama_cpp import llama_cpp as low
from test_llama import check_equal, context_of, decode, run_all

import gguf_pager
from gguf_pager import EngineError, guard, turns
from gguf_pager.hooks import hooks

Model = Callable[..., Path]
PROMPTS = ("the rain in", "a hen and", "once upon a", "is it the")
GREEDY: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0}


@pytest.fixture(params=("ours", "installed"))
def llm(request: pytest.FixtureRequest, zoo_model: Model) -> Iterator[llama_cpp.Llama]:
    """Our class, and stock's own while we are installed."""
    path = str(zoo_model("qwen3moe"))
    if request.param == "ours":
        made = gguf_pager.Llama(path, budget="min", **ARGUMENTS)
        yield made
        made.close()
        return
    with gguf_pager.install(budget="min") as installed:
        made = llama_cpp.Llama(path, **ARGUMENTS)
        assert len(installed.pagers) == 1
        yield made
        made.close()


def text_of(llm: llama_cpp.Llama, prompt: str) -> str:
    return str(llm(prompt, **GREEDY)["choices"][0]["text"])


def streamed(llm: llama_cpp.Llama, prompt: str) -> str:
    return "".join(chunk["choices"][0]["text"] for chunk in llm(prompt, stream=True, **GREEDY))


@pytest.fixture
def expected(llm: llama_cpp.Llama) -> dict[str, str]:
    return {prompt: text_of(llm, prompt) for prompt in PROMPTS}


def test_requests_of_several_threads_get_their_own_answers(llm: llama_cpp.Llama, expected: dict[str, str]) -> None:
    """A framework's `.batch()`: it ended the process."""

    def work(prompt: str, ask: Callable[[llama_cpp.Llama, str], str]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(4):
                assert ask(llm, prompt) == expected[prompt]
        return run

    run_all(*(work(prompt, ask) for prompt, ask in zip(PROMPTS, (text_of, streamed, text_of, streamed), strict=True)))


def test_state_embedding_and_answers_take_turns(zoo_model: Model) -> None:
    llm = gguf_pager.Llama(str(zoo_model("qwen3moe")), budget="min", embedding=True, **ARGUMENTS)
    expected, vector = text_of(llm, "the rain in"), llm.embed("a hen")

    def ask() -> None:
        for _ in range(6):
            assert text_of(llm, "the rain in") == expected

    def embed() -> None:
        for _ in range(6):
            assert llm.embed("a hen") == vector

    def keep() -> None:
        for _ in range(6):
            llm.load_state(llm.save_state())
            llm.reset()

    run_all(ask, embed, keep)
    llm.close()


def test_stream_of_another_thread_comes_to_its_end_first(llm: llama_cpp.Llama, expected: dict[str, str]) -> None:
    order: list[str] = []
    has_begun = threading.Event()

    def read_slowly() -> None:
        text = ""
        for chunk in llm(PROMPTS[0], stream=True, **GREEDY):
            has_begun.set()
            time.sleep(0.02)
            text += chunk["choices"][0]["text"]
        order.append(text)

    def ask() -> None:
        assert has_begun.wait(30)
        order.append(text_of(llm, PROMPTS[1]))

    run_all(read_slowly, ask)
    assert order == [expected[PROMPTS[0]], expected[PROMPTS[1]]]


def test_stream_that_nobody_reads_is_overtaken_and_says_so(
    llm: llama_cpp.Llama, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "PATIENCE_S", 0.2)
    stream = llm(PROMPTS[0], stream=True, **GREEDY)
    next(stream)
    run_all(lambda: check_text(llm, PROMPTS[1], expected))
    with pytest.raises(EngineError, match="begin the stream again"):
        next(stream)
    assert text_of(llm, PROMPTS[0]) == expected[PROMPTS[0]]


def check_text(llm: llama_cpp.Llama, prompt: str, expected: dict[str, str]) -> None:
    assert text_of(llm, prompt) == expected[prompt]


def test_thread_need_not_wait_for_its_own_stream(llm: llama_cpp.Llama, expected: dict[str, str]) -> None:
    """A loop that was left early, its generator still alive in a variable, must not stop the next request."""
    stream = llm(PROMPTS[0], stream=True, **GREEDY)
    next(stream)
    started = time.monotonic()
    assert text_of(llm, PROMPTS[1]) == expected[PROMPTS[1]]
    assert time.monotonic() - started < turns.PATIENCE_S / 2
    with pytest.raises(EngineError, match="begin the stream again"):
        next(stream)


@pytest.mark.parametrize("has_contexts", (True, False))
def test_streams_whose_steps_a_pool_of_threads_makes_come_to_their_ends(
    llm: llama_cpp.Llama, expected: dict[str, str], has_contexts: bool
) -> None:
    """As FastAPI answers with a generator, or any server that hands each step to a thread. One overtook the other, whose next
    step was an EngineError, where a thread made a step of one and then the first of another."""
    with ThreadPoolExecutor(4) as pool:

        async def step(stream: Iterator[Any]) -> Any:
            loop = asyncio.get_running_loop()
            if has_contexts:  # asyncio.to_thread, anyio, starlette
                return await loop.run_in_executor(pool, contextvars.copy_context().run, next, stream, None)
            return await loop.run_in_executor(pool, next, stream, None)

        async def read(prompt: str) -> None:
            for _ in range(5):
                stream, text = llm(prompt, stream=True, **GREEDY), ""
                while (chunk := await step(stream)) is not None:
                    text += chunk["choices"][0]["text"]
                assert text == expected[prompt]

        async def read_all() -> None:
            await asyncio.gather(*(read(prompt) for prompt in PROMPTS))

        asyncio.run(read_all())


def test_request_waits_for_one_stream_and_not_for_all_that_come_after(llm: llama_cpp.Llama, expected: dict[str, str]) -> None:
    """A thread that reads one stream after the other let another thread's request wait for ever."""
    begun, is_over = [0], threading.Event()

    def read_on_and_on() -> None:
        while not is_over.is_set() and begun[0] < 200:
            begun[0] += 1
            for _ in llm(PROMPTS[0], stream=True, **GREEDY):
                time.sleep(0.002)

    def ask() -> None:
        try:
            time.sleep(0.1)
            for _ in range(5):
                before = begun[0]
                assert text_of(llm, PROMPTS[1]) == expected[PROMPTS[1]]
                assert begun[0] - before <= 2
        finally:
            is_over.set()

    run_all(read_on_and_on, ask)


def test_who_was_interrupted_while_waiting_holds_nobody_up(llm: llama_cpp.Llama, expected: dict[str, str]) -> None:
    turn, ticket = guard.turn_of(llm), turns._Ticket()
    turn._queue.append(ticket)
    ticket.asked_s -= turns.PATIENCE_S
    check_text(llm, PROMPTS[1], expected)
    assert not turn._queue


@pytest.mark.parametrize("streams", (False, True))
def test_request_from_inside_another_is_refused_and_the_next_is_right(
    llm: llama_cpp.Llama, expected: dict[str, str], streams: bool
) -> None:
    """The outer one went on with the inner one's context: another text, in silence (stock's, too)."""
    inner = (streamed, text_of)

    def ask(*_: Any) -> bool:
        inner[not streams](llm, PROMPTS[1])
        return False

    criteria = llama_cpp.StoppingCriteriaList([ask])
    with pytest.raises(EngineError, match="from inside another one"):
        answer = llm(PROMPTS[0], stopping_criteria=criteria, stream=streams, **GREEDY)
        list(answer)
        pytest.fail("it was answered")
    for prompt in PROMPTS[:2]:
        check_text(llm, prompt, expected)


def test_event_loop_does_not_wait_for_a_stream_of_its_own(llm: llama_cpp.Llama, expected: dict[str, str]) -> None:
    """Who reads the other one cannot go on meanwhile."""

    async def read_two() -> None:
        stream = llm(PROMPTS[0], stream=True, **GREEDY)
        next(stream)
        started = time.monotonic()
        assert await asyncio.create_task(ask()) == expected[PROMPTS[1]]
        assert time.monotonic() - started < turns.PATIENCE_S / 2

    async def ask() -> str:
        return text_of(llm, PROMPTS[1])

    asyncio.run(read_two())


def test_looking_at_the_state_leaves_the_own_stream_alone(llm: llama_cpp.Llama, expected: dict[str, str]) -> None:
    text = ""
    for chunk in llm(PROMPTS[2], stream=True, **GREEDY):
        llm.save_state()
        llm.tokenize(b"the")
        text += chunk["choices"][0]["text"]
    assert text == expected[PROMPTS[2]]


@pytest.mark.parametrize("streams", (False, True))
def test_close_waits_for_the_token_being_computed_and_the_other_thread_is_told(
    zoo_model: Model, streams: bool
) -> None:
    """It ended or hung the process in 18 of 20 cases."""
    for _ in range(6):
        llm = gguf_pager.Llama(str(zoo_model("qwen3moe")), budget="min", **ARGUMENTS | {"n_ctx": 2048})
        has_begun = threading.Event()

        def ask(llm: llama_cpp.Llama = llm, has_begun: threading.Event = has_begun) -> None:
            def note(*_: Any) -> bool:
                has_begun.set()
                return False

            with pytest.raises(EngineError, match="closed"):
                answer = llm("the rain", max_tokens=1900, temperature=1.0, stream=streams,
                             stopping_criteria=llama_cpp.StoppingCriteriaList([note]))
                if streams:
                    list(answer)

        def close(llm: llama_cpp.Llama = llm, has_begun: threading.Event = has_begun) -> None:
            assert has_begun.wait(30)
            llm.close()

        run_all(ask, close)
        assert llm.pager is not None and not llm.pager.is_open


def test_low_level_context_used_by_two_threads_takes_turns(zoo_model: Model) -> None:
    tokens = some_tokens(8)
    with gguf_pager.install(budget="min"):
        model = low.llama_model_load_from_file(str(zoo_model("qwen3moe")).encode(), low.llama_model_default_params())
        n_vocab = low.llama_vocab_n_tokens(low.llama_model_get_vocab(model))
        with context_of(model) as context:
            memory = low.llama_get_memory(context)

            def work() -> None:
                for _ in range(30):
                    low.llama_memory_clear(memory, True)
                    batch = low.llama_batch_init(len(tokens), 0, 1)
                    batch.n_tokens = len(tokens)
                    for i, token in enumerate(tokens):
                        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
                        batch.seq_id[i][0] = 0
                    assert low.llama_decode(context, batch) in (0, -1)  # the other thread's tokens may be there
                    low.llama_batch_free(batch)

            run_all(work, work, work)
            low.llama_memory_clear(memory, True)
            first = decode(context, tokens, 0, n_vocab)
            low.llama_memory_clear(memory, True)
            check_equal(decode(context, tokens, 0, n_vocab), first)
        low.llama_model_free(model)


def test_context_freed_while_another_thread_decodes_is_freed_afterwards(zoo_model: Model) -> None:
    tokens = some_tokens(30)
    with gguf_pager.install(budget="min"):
        model = low.llama_model_load_from_file(str(zoo_model("qwen3moe")).encode(), low.llama_model_default_params())
        n_vocab = low.llama_vocab_n_tokens(low.llama_model_get_vocab(model))
        for _ in range(10):
            with context_of(model) as other:
                decode(other, tokens[:2], 0, n_vocab)
            params = low.llama_context_default_params()
            params.n_ctx, params.n_batch, params.n_ubatch, params.n_threads, params.n_threads_batch = 128, 32, 1, 1, 1
            context = low.llama_init_from_model(model, params)
            is_decoding = threading.Event()

            def work(context: Any = context, is_decoding: threading.Event = is_decoding) -> None:
                batch = low.llama_batch_init(len(tokens), 0, 1)
                batch.n_tokens = len(tokens)
                for i, token in enumerate(tokens):
                    batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
                    batch.seq_id[i][0] = 0
                is_decoding.set()
                try:
                    assert low.llama_decode(context, batch) == 0
                except EngineError as error:
                    assert "freed" in str(error)  # it came too late
                finally:
                    low.llama_batch_free(batch)

            def free(context: Any = context, is_decoding: threading.Event = is_decoding) -> None:
                assert is_decoding.wait(30)
                time.sleep(0.002)
                low.llama_free(context)

            run_all(work, free)
        low.llama_model_free(model)


def test_context_is_not_freed_from_its_own_callback(zoo_model: Model) -> None:
    refused = []
    with gguf_pager.install(budget="min"):
        model = low.llama_model_load_from_file(str(zoo_model("qwen3moe")).encode(), low.llama_model_default_params())
        n_vocab = low.llama_vocab_n_tokens(low.llama_model_get_vocab(model))

        @low.ggml_backend_sched_eval_callback
        def free(address: int, ask: bool, data: int | None) -> bool:
            if not refused:
                try:
                    low.llama_free(made[0])
                except EngineError as error:
                    refused.append(str(error))
            return False

        with context_of(model, cb_eval=free) as context:
            made = [context]
            decode(context, some_tokens(3), 0, n_vocab)
        low.llama_model_free(model)
    assert "cannot be freed" in refused[0]


# ---- what is counted, while it is closed ----

def test_stats_pins_and_close_in_three_threads(zoo_model: Model) -> None:
    for _ in range(15):
        llm = gguf_pager.Llama(str(zoo_model("qwen3moe")), budget="60%", **ARGUMENTS)
        llm.eval(some_tokens(3))
        pager = llm.pager
        assert pager is not None
        is_closed = threading.Event()

        def look(pager: gguf_pager.Pager = pager, is_closed: threading.Event = is_closed) -> None:
            while not is_closed.is_set():
                assert pager.stats().misses > 0
            assert pager.stats().misses > 0

        def pin(pager: gguf_pager.Pager = pager) -> None:
            try:
                for i in range(1000):
                    pager.pin({0: [i % 4]})
                    pager.unpin_all()
                    pager.resident_experts(0)
            except EngineError as error:
                assert "closed" in str(error)

        def close(llm: gguf_pager.Llama = llm, is_closed: threading.Event = is_closed) -> None:
            time.sleep(0.005)
            llm.close()
            is_closed.set()

        run_all(look, pin, close)
        assert not pager.is_open
        with pytest.raises(EngineError, match="closed"):
            pager.pin({0: [0]})  # what it finds are descriptors that are closed


# ---- opened at the same time ----

def test_first_contexts_of_one_model_share_one_arena(zoo_model: Model) -> None:
    """Made at once by two threads they had an arena each, 77 times of 120."""
    for _ in range(10):
        with gguf_pager.install(budget="min") as installed:
            model = low.llama_model_load_from_file(str(zoo_model("qwen3moe")).encode(), low.llama_model_default_params())
            opened, contexts = [], []
            pager = installed.pagers or installed._request.opened
            original = type(pager[0]).open

            def count(self: Any, n_slots: Any, original: Any = original, opened: list[Any] = opened) -> None:
                opened.append(n_slots)
                original(self, n_slots)

            def make(model: Any = model, contexts: list[Any] = contexts) -> None:
                params = low.llama_context_default_params()
                params.n_ctx, params.n_batch, params.n_ubatch, params.n_threads = 64, 8, 8, 1
                contexts.append(low.llama_init_from_model(model, params))

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(type(pager[0]), "open", count)
                run_all(make, make, make)
            assert len(opened) == 1 and len(contexts) == 3
            for context in contexts:
                low.llama_free(context)
            low.llama_model_free(model)


def test_same_file_opened_twice_shares_slots_until_the_last_is_closed(zoo_model: Model, stock: Factory) -> None:
    path, tokens = zoo_model("qwen3moe"), some_tokens(12)
    expected = evaluate(stock(path, logits_all=True, n_ubatch=1), tokens)
    first = gguf_pager.Llama(str(path), budget="min", logits_all=True, **ARGUMENTS)
    second = gguf_pager.Llama(str(path), budget="min", embedding=True, logits_all=True, **ARGUMENTS)
    other = gguf_pager.Llama(str(path), budget="60%", logits_all=True, **ARGUMENTS)
    assert first.pager is second.pager is not other.pager
    check_equal(evaluate(first, tokens), expected)
    first.close()
    assert second.pager is not None and second.pager.is_open
    check_equal(evaluate(second, tokens), expected)
    second.close()
    assert not second.pager.is_open
    check_equal(evaluate(other, tokens), expected)
    other.close()


SHARES = """
import json, sys
import gguf_pager
path, budget = sys.argv[1], int(sys.argv[2])
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
given = dict(budget=budget, n_ctx=4096, n_batch=64, n_ubatch=64, n_threads=1, verbose=False)
chat = gguf_pager.Llama(path, **given)
before = chat.pager.arena_bytes
tokens = list(range(5, 69))
chat.eval(tokens)
expected = chat.sample(temp=0.0)
other = gguf_pager.Llama(path, embedding=True, **given | {"n_ctx": 8192})
assert other.pager is chat.pager
other.embed("a hen")
for llm in (chat, other):
    llm.reset()
    llm.eval(tokens)
    for i in range(60):
        llm.eval([5 + i])
chat.reset()
chat.eval(tokens)
stats = chat.pager.stats()
print(json.dumps({"before": before, "after": stats.arena_bytes, "peak": peak(), "left_alone": stats.left_alone,
                  "same": chat.sample(temp=0.0) == expected}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_second_context_within_a_budget_in_bytes_takes_its_memory_from_the_slots(tmp_path: Path) -> None:
    """Chat and embeddings of one model: the second was refused, or a third got 42 MB, in silence. There must be room for 8,192 tokens of the
    second's, though it has 69."""
    path = tmp_path / "model.gguf"
    make_trace_model.make(path, "tiny", layers=6, experts=64, n_ff=512)
    budget = 156 << 20
    done = subprocess.run([sys.executable, "-c", SHARES, str(path), str(budget)], capture_output=True, text=True, timeout=120,
                          check=False)
    assert done.returncode == 0, done.stderr[-800:]
    found = json.loads(done.stdout)
    assert found["after"] < found["before"] and found["same"] and found["left_alone"] == 0
    assert found["peak"] <= budget * 1.03


def test_model_being_freed_is_not_shared(zoo_model: Model) -> None:
    """Its last owner waits for a context that computes; who opens the file meanwhile has a model of his own, not a freed one."""
    path, computing = os.fsencode(zoo_model("qwen3moe")), threading.Event()

    def compute() -> None:
        computing.set()
        time.sleep(1)

    with gguf_pager.install(budget="min"):
        first = low.llama_model_load_from_file(path, low.llama_model_default_params())
        context = low.llama_init_from_model(first, low.llama_context_default_params())
        entry = hooks.contexts[context]
        UNWRAPPED["llama_free"](context)  # before its model, as it has to be; we have not seen it
        computes = threading.Thread(target=entry.mutex.call, args=(compute,))
        computes.start()
        computing.wait()
        frees = threading.Thread(target=low.llama_model_free, args=(first,))
        frees.start()
        time.sleep(0.3)
        second = low.llama_model_load_from_file(path, low.llama_model_default_params())
        frees.join()
        computes.join()
        assert second != first
        assert list(hooks.models) == [second]
        low.llama_model_free(second)
    assert not hooks.models


def test_model_that_another_thread_frees_was_not_freed_unseen(zoo_model: Model, caplog: pytest.LogCaptureFixture) -> None:
    """Who opens one looks for such, and closed a pager that its owner was closing: EngineError for the owner."""
    other = gguf_pager.Llama(str(zoo_model("gpt-oss")), budget="60%", **ARGUMENTS)
    (model,) = hooks.models.values()
    model.is_leaving, there = True, model.residency
    model.residency = replace(there, copies=(replace(there.copies[0], address=1),))  # its memory is gone
    gguf_pager.Llama(str(zoo_model("qwen3moe")), budget="min", **ARGUMENTS).close()
    assert hooks.models[model.address] is model and "not wrapped" not in caplog.text
    assert model.pager.is_open
    model.is_leaving, model.residency = False, there
    other.close()


def test_pager_closed_by_two_threads_at_once(zoo_model: Model) -> None:
    llm = gguf_pager.Llama(str(zoo_model("qwen3moe")), budget="min", **ARGUMENTS)
    llm.eval(some_tokens(3))
    pager = llm.pager
    assert pager is not None and pager._keeper is not None
    count = pager._count_choices

    def late() -> list[list[int]]:
        native, pager._native = pager._native, None  # as the other one does meanwhile
        try:
            return count()
        finally:
            pager._native = native

    pager._keeper._count = late
    pager.keep_profile()
    llm.close()


def test_fork_while_another_thread_opens_a_model(zoo_model: Model) -> None:
    """The lock that the other thread holds is given back by nobody in the child, which waited for ever."""
    opening, is_done = threading.Event(), threading.Event()

    def hold() -> None:
        opening.set()
        is_done.wait()

    other = threading.Thread(target=hooks._opening.call, args=(hold,))
    other.start()
    opening.wait()
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        try:
            gguf_pager.Llama(str(zoo_model("qwen3moe")), budget="min", **ARGUMENTS).close()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    is_done.set()
    other.join()
    assert status == 0
    assert hooks._opening.call(lambda: 1) == 1
