"""The server, with the clients that people have: same tokens as in-process, several at once, and nothing held by who has gone."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from conftest import ARGUMENTS
from serving import Server, serving

import gguf_pager

QUESTION = "What is the capital of France?"
MESSAGES: list[Any] = [{"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module")
def server(small: Path) -> Iterator[Server]:
    with serving(small, "--budget", "25%", "--parallel", "4", "-c", "1024", "--alias", "talking") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return server.client()


# ---- what OpenAI's client asks --------------------------------------------------------------------------------------

def test_chat_gives_the_tokens_of_llama_in_process(client: openai.OpenAI, small: Path) -> None:
    with gguf_pager.Llama(str(small), **{**ARGUMENTS, "n_ctx": 1024, "n_batch": 512}, budget="25%") as llm:
        expected = llm.create_chat_completion(MESSAGES, temperature=0, max_tokens=40, repeat_penalty=1.0)
        completed = llm.create_completion("Once upon a time", temperature=0, max_tokens=30)
    answer = client.chat.completions.create(model="talking", messages=MESSAGES, temperature=0, max_tokens=40)
    assert answer.choices[0].message.content == expected["choices"][0]["message"]["content"]
    assert answer.choices[0].finish_reason == expected["choices"][0]["finish_reason"]
    assert answer.usage is not None and answer.usage.completion_tokens == expected["usage"]["completion_tokens"]
    assert answer.usage.prompt_tokens == expected["usage"]["prompt_tokens"]
    text = client.completions.create(model="talking", prompt="Once upon a time", temperature=0, max_tokens=30)
    assert text.choices[0].text == completed["choices"][0]["text"]
    assert text.usage is not None and text.usage.completion_tokens == 30


def test_stream_gives_the_same_text_and_its_usage(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="talking", messages=MESSAGES, temperature=0, max_tokens=40)
    chunks = list(client.chat.completions.create(model="talking", messages=MESSAGES, temperature=0, max_tokens=40, stream=True,
                                                 stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    usage = chunks[-1].usage
    assert usage is not None and whole.usage is not None and usage.total_tokens == whole.usage.total_tokens
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens - 1, "the same was asked before"
    assert len({chunk.id for chunk in chunks}) == 1
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason] == [
        whole.choices[0].finish_reason]


def test_answer_without_max_tokens_ends_with_the_context(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="talking", prompt="1 2 3 4 5", temperature=0, logit_bias={"2": -100, "0": -100})
    assert answer.usage is not None and answer.choices[0].finish_reason == "length" and answer.usage.total_tokens == 1024


def test_several_choices_and_prompts_are_numbered(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="talking", prompt=["One", "Two"], n=2, max_tokens=4, seed=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    chunks = client.completions.create(model="talking", prompt=["One", "Two"], max_tokens=4, stream=True)
    assert {chunk.choices[0].index for chunk in chunks} == {0, 1}


def test_prompt_counts_once_however_many_answers_there_are(client: openai.OpenAI) -> None:
    one = client.chat.completions.create(model="talking", messages=MESSAGES, max_tokens=4).usage
    three = client.chat.completions.create(model="talking", messages=MESSAGES, max_tokens=4, n=3).usage
    assert one is not None and three is not None and three.prompt_tokens == one.prompt_tokens
    assert three.total_tokens == three.prompt_tokens + three.completion_tokens and three.completion_tokens > 4
    two = client.completions.create(model="talking", prompt=["Once", "Once upon a time"], max_tokens=2, n=2).usage
    assert two is not None and two.prompt_tokens == sum(client.completions.create(model="talking", prompt=text, max_tokens=2).usage.prompt_tokens  # type: ignore[union-attr]
                                                        for text in ("Once", "Once upon a time"))


def test_answers_differ_unless_a_seed_is_given(client: openai.OpenAI) -> None:
    def answers(n: int, **given: Any) -> set[str | None]:
        return {choice.message.content for _ in range(2) for choice in client.chat.completions.create(
            model="talking", messages=[{"role": "user", "content": "Tell me a story."}], temperature=1.5, max_tokens=12, n=n, **given).choices}

    assert len(answers(3)) > 3
    assert len(answers(1, seed=7)) == 1


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain", ""])
def test_body_is_json_whatever_curl_says_of_it(server: Server, kind: str) -> None:
    body = json.dumps({"messages": MESSAGES, "max_tokens": 2})
    headers = {"Content-Type": kind} if kind else {}
    assert httpx.post(f"{server.url}/v1/chat/completions", content=body, headers=headers, timeout=60).status_code == 200
    foreign = httpx.post(f"{server.url}/v1/chat/completions", content=body, headers={**headers, "Origin": "https://example.com"}, timeout=60)
    assert foreign.status_code == 400, "a browser asks before it sends JSON from another page, and only then"


def test_path_that_is_not_there_is_told_what_is(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="/v1/responses here.*chat/completions"):
        client.responses.create(model="talking", input="Hello")


def test_logprobs_are_of_the_likeliest_tokens(client: openai.OpenAI) -> None:
    for stream in (False, True):
        answer: Any = client.chat.completions.create(model="talking", messages=MESSAGES, temperature=0, max_tokens=5, logprobs=True,
                                                     top_logprobs=3, stream=stream)
        found = ([token for chunk in answer if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content] if stream
                 else answer.choices[0].logprobs.content)
        assert len(found) == 5
        for token in found:
            assert token.logprob == max(top.logprob for top in token.top_logprobs) and token.logprob <= 0


def test_json_schema_is_kept(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}, "inhabitants": {"type": "integer"}},
              "required": ["city", "inhabitants"], "additionalProperties": False}
    answer = client.chat.completions.create(
        model="talking", messages=[{"role": "user", "content": "Describe Paris."}], max_tokens=200, temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": schema}})
    found = json.loads(answer.choices[0].message.content or "")
    assert set(found) == {"city", "inhabitants"} and isinstance(found["inhabitants"], int)


def test_tool_that_must_be_used_is_called(client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", "function": {"name": "weather", "parameters": {
        "type": "object", "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}}, "required": ["city"]}}}
    for choice in ({"type": "function", "function": {"name": "weather"}}, "required"):
        answer = client.chat.completions.create(model="talking", messages=MESSAGES, tools=[tool], tool_choice=choice, max_tokens=60)
        calls = answer.choices[0].message.tool_calls
        assert calls and calls[0].function.name == "weather"
        assert json.loads(calls[0].function.arguments)["city"] in ("Paris", "Rome")


def test_embeddings_have_length_one_and_tell_texts_apart(client: openai.OpenAI) -> None:
    texts = ["The cat sat on the mat.", "A cat was sitting on a mat.", "Interest rates rose by half a percent."]
    vectors = [item.embedding for item in client.embeddings.create(model="talking", input=texts, encoding_format="float").data]
    near, far = (sum(a * b for a, b in zip(vectors[0], vectors[i], strict=True)) for i in (1, 2))
    assert far < near < 1.0001 and abs(sum(a * a for a in vectors[0]) - 1) < 1e-4
    single = client.embeddings.create(model="talking", input=texts[0])
    assert single.data[0].embedding == pytest.approx(vectors[0], abs=1e-6), "as base64, as the client asks by itself"


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["talking"]
    assert client.models.retrieve("talking").id == "talking"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


# ---- several at once ------------------------------------------------------------------------------------------------

def test_ten_at_once_get_their_own_answers(client: openai.OpenAI, server: Server) -> None:
    """Each may say one thing only. That their texts do not mix, either, is compared by logits in test_batcher."""
    def ask(n: int) -> str:
        answer = client.chat.completions.create(
            model="talking", messages=[{"role": "user", "content": f"Say the number {n}."}], temperature=0,
            extra_body={"grammar": f'root ::= "client {n} of ten says {n * n * 37} and nothing else"'})
        return answer.choices[0].message.content or ""

    before = server.metric("gguf_pager_batches_total"), server.metric("gguf_pager_batch_tokens_total")
    with ThreadPoolExecutor(10) as pool:
        together = list(pool.map(ask, range(10)))
    assert together == [f"client {n} of ten says {n * n * 37} and nothing else" for n in range(10)]
    assert server.health()["running"] == server.health()["waiting"] == 0
    n_batches, n_tokens = (server.metric(f"gguf_pager_{name}_total") - old for name, old in zip(("batches", "batch_tokens"), before, strict=True))
    assert n_tokens / n_batches > 2, "their next tokens are computed in one batch"


def test_long_prompt_does_not_stop_the_others(client: openai.OpenAI) -> None:
    times: list[float] = []

    def read() -> None:
        for _ in client.completions.create(model="talking", prompt="A story:", max_tokens=300, stream=True,
                                           logit_bias={"2": -100, "0": -100}):
            times.append(time.monotonic())

    reader = threading.Thread(target=read)
    reader.start()
    while len(times) < 5:
        time.sleep(0.01)
    begun, n_before = time.monotonic(), len(times)
    client.completions.create(model="talking", prompt="word " * 900, max_tokens=1)
    n_meanwhile = len([at for at in times if at < time.monotonic()]) - n_before
    reader.join()
    assert n_meanwhile >= 2, f"in {time.monotonic() - begun:.1f} s"


# ---- who asks wrongly, or goes ------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("given", "told"), [
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "user", "content": "word " * 2000}]}, "context"),
    ({"messages": MESSAGES, "max_tokens": -1}, "max_tokens"),
    ({"messages": MESSAGES, "max_tokens": 0}, "max_tokens"),
    ({"messages": MESSAGES, "temperature": -1}, "temperature"),
    ({"messages": MESSAGES, "grammar": "this is no grammar"}, "grammar"),
    ({"messages": MESSAGES, "grammar": 'start ::= "a"'}, "grammar"),
    ({"messages": MESSAGES, "logit_bias": {"99999999": 1}}, "vocabulary"),
    ({"messages": MESSAGES, "logit_bias": {"x": 1}}, "numbers"),
    ({"messages": MESSAGES, "response_format": {"type": "json_schema"}}, "schema"),
    ({"messages": MESSAGES, "response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#/nowhere"}}}}, "schema"),
    ({"messages": MESSAGES, "tools": [{"type": "function"}]}, "function.name"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "text only"),
    ({"messages": "hello"}, "messages"),
    ({"messages": MESSAGES, "n": 1000}, "n"),
    ({"messages": MESSAGES, "chat_template_kwargs": {"llama": 1}}, "chat_template_kwargs"),
    ({"messages": MESSAGES, "chat_template_kwargs": {"logits_processor": 1}}, "chat_template_kwargs"),
    ({"messages": MESSAGES, "tools": [{"type": "function", "function": {"name": "x"}}], "tool_choice": {"function": "x"}}, "among the tools"),
    ({"messages": MESSAGES, "functions": [{"x": 1}]}, "name"),
    ({"messages": MESSAGES, "response_format": {"type": "json_schema", "json_schema": {
        "schema": {"type": "string", "maxLength": 4097}}}}, "repeated"),
    ({"messages": MESSAGES, "response_format": {"type": "json_schema", "json_schema": {
        "schema": {"type": "string", "pattern": "^a{1,4097}$"}}}}, "repeated"),
    ({"messages": MESSAGES, "tools": [{"type": "function", "function": {"name": "x", "parameters": {
        "type": "object", "properties": {"a": {"type": "array", "minItems": 4097}}}}}], "tool_choice": "required"}, "repeated"),
    ({"messages": MESSAGES, "repeat_penalty": 0}, "repeat_penalty"),
])
def test_request_that_makes_no_sense_is_refused(server: Server, given: dict[str, Any], told: str) -> None:
    for stream in (False, True):
        answer = httpx.post(f"{server.url}/v1/chat/completions", json={**given, "stream": stream}, timeout=60)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert told in f"{error['message']} {error['param']}" and error["type"] == "invalid_request_error"
    assert server.health()["running"] == 0


@pytest.mark.parametrize(("given", "told"), [
    ({"prompt": [5, 6, 7], "echo": True}, "echo"), ({"prompt": ["a"] * 300}, "256"), ({"prompt": "a", "logit_bias": {"5": "x"}}, "bias"),
])
def test_completion_that_makes_no_sense_is_refused(server: Server, given: dict[str, Any], told: str) -> None:
    answer = httpx.post(f"{server.url}/v1/completions", json={**given, "max_tokens": 2}, timeout=60)
    assert answer.status_code == 400 and told in answer.json()["error"]["message"], answer.text


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_number_that_is_none_is_refused(server: Server, number: str) -> None:
    body = f'{{"prompt": "a", "max_tokens": 2, "logit_bias": {{"5": {number}}}}}'
    answer = httpx.post(f"{server.url}/v1/completions", content=body, headers={"Content-Type": "application/json"}, timeout=60)
    assert answer.status_code == 400 and "finite" in answer.json()["error"]["message"], answer.text


def test_message_without_content_is_empty(client: openai.OpenAI) -> None:
    """As an answer that is a tool's call comes back in the next request."""
    messages: list[Any] = [*MESSAGES, {"role": "assistant", "content": None}, {"role": "user", "content": "Well?"}]
    assert client.chat.completions.create(model="talking", messages=messages, max_tokens=3).choices


def test_body_that_is_too_large_is_refused_before_it_is_read(server: Server) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(64):
            yield b" " * (1 << 20)

    for content in (b" " * (64 << 20), pieces()):
        try:
            answer = httpx.post(f"{server.url}/v1/completions", content=content, headers={"Content-Type": "application/json"}, timeout=60)
        except httpx.WriteError:  # it has stopped listening
            continue
        assert answer.status_code == 413 and "16 MiB" in answer.json()["error"]["message"], answer.text
    assert server.health()["running"] == 0


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"prompt": [[]]}', b'{"prompt": [99999999]}', b'{"prompt": []}', b'"x"', b"\xff"])
def test_nonsense_is_refused(server: Server, body: bytes) -> None:
    answer = httpx.post(f"{server.url}/v1/completions", content=body, headers={"Content-Type": "application/json"}, timeout=60)
    assert answer.status_code == 400 and answer.json()["error"]["message"], answer.text


def test_client_that_goes_frees_what_it_held(client: openai.OpenAI, server: Server) -> None:
    forever: Any = {"model": "talking", "prompt": "A long story:", "logit_bias": {"2": -100, "0": -100}}
    for _ in range(3):
        stream = client.completions.create(**forever, stream=True)
        next(iter(stream))
        stream.close()
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5).completions.create(**forever)
    until = time.monotonic() + 20
    while server.health()["running"] and time.monotonic() < until:
        time.sleep(0.05)
    assert server.health() | {"running": 0, "waiting": 0} == server.health()
    assert server.metric("gguf_pager_answers_given_up_total") >= 3


def test_metrics_count(client: openai.OpenAI, server: Server) -> None:
    before = server.metric("vllm:generation_tokens_total")
    client.completions.create(model="talking", prompt="Once", max_tokens=7, logit_bias={"2": -100, "0": -100})
    assert server.metric("vllm:generation_tokens_total") == server.metric("llamacpp:tokens_predicted_total") == before + 7
    assert server.metric("llamacpp:requests_deferred") == 0
    assert server.metric("gguf_pager_expert_hits_total") > 0 and server.metric("gguf_pager_read_bytes_total") > 0
    assert 0 <= server.metric("vllm:kv_cache_usage_perc") <= 1


# ---- how it is started and ended --------------------------------------------------------------------------------------

def test_key_is_asked_for(small: Path) -> None:
    with serving(small, "--budget", "25%", "-c", "256", environment={"GGUF_PAGER_API_KEY": "sesame"}) as server:
        with pytest.raises(openai.AuthenticationError):
            server.client().models.list()
        assert server.client(api_key="sesame").models.list().data
        assert httpx.get(f"{server.url}/health", timeout=20).status_code == 200
        assert httpx.get(f"{server.url}/metrics", timeout=20).status_code == 401


def test_key_may_be_of_any_letters(small: Path) -> None:
    with serving(small, "--budget", "25%", "-c", "256", environment={"GGUF_PAGER_API_KEY": "schlüssel"}) as server:
        for key, status in (("schlüssel", 200), ("schlussel", 401)):
            given = httpx.get(f"{server.url}/v1/models", headers={b"Authorization": f"Bearer {key}".encode()}, timeout=20)
            assert given.status_code == status, key


def test_more_answers_than_a_batch_was_to_have_tokens(small: Path) -> None:
    with serving(small, "--budget", "25%", "-c", "256", "--parallel", "4", "-b", "1") as server:
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda n: server.client().completions.create(
                model="x", prompt=f"{n} and", max_tokens=20, logit_bias={"2": -100, "0": -100}), range(4)))
        assert [answer.usage.completion_tokens for answer in answers if answer.usage] == [20] * 4


def test_running_answers_end_cleanly_when_it_is_told_to_stop(small: Path) -> None:
    with serving(small, "--budget", "25%", "-c", "4096") as server:
        stream = server.client().completions.create(model="x", prompt="A long story:", stream=True, logit_bias={"2": -100, "0": -100})
        chunks = iter(stream)
        next(chunks)
        begun = time.monotonic()
        stopper = threading.Thread(target=server.stop, args=(signal.SIGTERM,))
        stopper.start()
        rest = list(chunks)
        stopper.join()
        assert rest[-1].choices[0].finish_reason == "length" and time.monotonic() - begun < 20
        assert server.process.returncode == 0, "".join(server.said)


def test_conversation_goes_on_after_a_restart(small: Path, tmp_path: Path) -> None:
    long: list[Any] = [{"role": "user", "content": "Remember these words: " + "apple pear plum " * 60}]
    arguments = ("--budget", "25%", "-c", "1024", "--state-dir", str(tmp_path / "states"))
    with serving(small, *arguments) as server:
        first = server.client().chat.completions.create(model="x", messages=long, max_tokens=20, temperature=0)
        assert first.usage is not None and first.usage.prompt_tokens_details is not None
        assert first.usage.prompt_tokens_details.cached_tokens == 0
    again = [*long, {"role": "assistant", "content": first.choices[0].message.content}, {"role": "user", "content": "Which fruit?"}]
    with serving(small, *arguments) as server:
        second = server.client().chat.completions.create(model="x", messages=again, max_tokens=20, temperature=0)
        assert second.usage is not None and second.usage.prompt_tokens_details is not None
        assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens
    states = list((tmp_path / "states").glob("*.state"))
    assert len(states) == 1, "one file for one conversation"
    with open(states[0], "r+b") as file:
        file.seek(5000)
        file.write(b"damaged")
    with serving(small, *arguments) as server:
        third = server.client().chat.completions.create(model="x", messages=again, max_tokens=20, temperature=0)
        assert third.usage is not None and third.usage.prompt_tokens_details is not None
        assert third.usage.prompt_tokens_details.cached_tokens == 0
        assert "damaged" in "".join(server.said)
    with serving(small, "--budget", "25%", "-c", "1024") as server:
        fresh = server.client().chat.completions.create(model="x", messages=again, max_tokens=20, temperature=0)
    assert third.choices[0].message.content == fresh.choices[0].message.content


def test_port_that_is_taken_is_said_before_the_model_opens(small: Path, server: Server) -> None:
    import subprocess
    import sys

    port = server.url.rpartition(":")[2]
    done = subprocess.run([sys.executable, "-m", "gguf_pager", "serve", str(small), "--port", port], capture_output=True, text=True,
                          timeout=60, check=False)
    assert done.returncode == 1 and "--port" in done.stderr and "Traceback" not in done.stderr


def test_second_interrupt_ends_it_without_a_traceback(small: Path) -> None:
    with serving(small, "--budget", "25%", "-c", "8192") as server:
        reader = threading.Thread(target=lambda: httpx.post(f"{server.url}/v1/completions", json={"prompt": "word " * 7000}, timeout=100))
        reader.start()
        while not server.health()["running"]:
            time.sleep(0.05)
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert server.stop(signal.SIGINT) == 0
        reader.join()
        assert "Traceback" not in "".join(server.said)
