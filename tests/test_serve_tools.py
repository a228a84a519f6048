"""Tools that a model may call, and what it thinks, with OpenAI's client and models whose templates mark them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import openai
import pytest
from conftest import ARGUMENTS, with_vocabulary
from serving import Server, serving

import gguf_pager
from gguf_pager.serve import jobs, schemas
from gguf_pager.serve.batcher import Batcher
from gguf_pager.serve.seat import Seat

QWEN = """{% if tools %}<|im_start|>system
Call tools so: <tool_call>{"name": ..., "arguments": ...}</tool_call>. Tools:
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if thinks or reasoning_effort == "high" %}<think>
{% endif %}{% endif %}{# <think> </think> #}"""

MESSAGES: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]


def tool(name: str) -> Any:
    return {"type": "function", "function": {"name": name, "parameters": {
        "type": "object", "properties": {"city": {"$ref": "#/$defs/city"}}, "required": ["city"], "$defs": {"city": {"enum": ["Paris", "Rome"]}}}}}


TOOLS = [tool("weather"), tool("population")]


@pytest.fixture(scope="module")
def qwen(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The talking model, told of tools as Qwen3 is."""
    return with_vocabulary(small, tmp_path_factory.mktemp("tools") / "qwen.gguf", QWEN)


@pytest.fixture(scope="module")
def server(qwen: Path) -> Iterator[Server]:
    with serving(qwen, "--budget", "25%", "-c", "1024") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return server.client()


def exactly(text: str) -> dict[str, Any]:
    """Return what has a model write this text and nothing else: its sampler allows no other token."""
    return {"grammar": f"root ::= {json.dumps(text)}"}


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
THOUGHT = f"<think>\nThe weather: I ask.\n</think>\n\nI look.\n{CALL}"


@pytest.mark.parametrize("is_stream", [False, True])
def test_model_that_calls_a_tool_by_itself_is_understood(client: openai.OpenAI, is_stream: bool) -> None:
    arguments: dict[str, Any] = {"model": "x", "messages": MESSAGES, "tools": TOOLS, "tool_choice": "auto", "extra_body": exactly(THOUGHT)}
    thought, text, reason = "", "", None
    calls: list[Any] = []
    if is_stream:
        for chunk in client.chat.completions.create(stream=True, **arguments):
            delta = chunk.choices[0].delta
            thought += getattr(delta, "reasoning_content", None) or ""
            text += delta.content or ""
            calls += delta.tool_calls or []
            reason = chunk.choices[0].finish_reason or reason
        assert [call.index for call in calls] == [0]
    else:
        choice = client.chat.completions.create(**arguments).choices[0]
        thought, text, calls, reason = choice.message.reasoning_content, choice.message.content, choice.message.tool_calls, choice.finish_reason  # type: ignore[attr-defined]
    assert (thought, text, reason) == ("The weather: I ask.", "I look.", "tool_calls")
    assert [(call.type, call.function.name, json.loads(call.function.arguments)) for call in calls] == [("function", "weather", {"city": "Paris"})]
    assert len(calls[0].id) == 9 and calls[0].id.isalnum()


def test_what_a_tool_said_goes_into_the_next_turn(client: openai.OpenAI, qwen: Path) -> None:
    first = client.chat.completions.create(model="x", messages=MESSAGES, tools=TOOLS, extra_body=exactly(CALL)).choices[0].message
    messages = [*MESSAGES, first.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "Rain."}]  # type: ignore[index,union-attr]
    answer = client.chat.completions.create(model="x", messages=messages, tools=TOOLS, temperature=0, max_tokens=8)
    given = [{"role": "user", "content": MESSAGES[0]["content"]},
             {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Paris"}}}]},
             {"role": "tool", "content": "Rain."}]
    with gguf_pager.Llama(str(qwen), **{**ARGUMENTS, "n_ctx": 1024, "n_batch": 512}, budget="25%") as llm:
        expected = llm.create_chat_completion(given, tools=TOOLS, temperature=0, max_tokens=8, repeat_penalty=1.0)
    assert answer.usage is not None and answer.usage.prompt_tokens == expected["usage"]["prompt_tokens"], "arguments as the object that the template wants"


def test_any_of_several_tools_must_be_called(client: openai.OpenAI) -> None:
    for is_stream in (False, True):
        found: Any = client.chat.completions.create(model="x", messages=MESSAGES, tools=TOOLS, tool_choice="required", max_tokens=60, stream=is_stream)
        calls = [call for chunk in found for call in chunk.choices[0].delta.tool_calls or []] if is_stream else found.choices[0].message.tool_calls
        assert len(calls) == 1 and calls[0].function.name in ("weather", "population")
        assert json.loads(calls[0].function.arguments)["city"] in ("Paris", "Rome")


def test_tools_that_cannot_be_told_apart_by_their_schemas_are_refused(client: openai.OpenAI) -> None:
    other = tool("population")
    other["function"]["parameters"]["$defs"]["city"] = {"enum": ["Oslo"]}
    with pytest.raises(openai.BadRequestError, match="define 'city' differently"):
        client.chat.completions.create(model="x", messages=MESSAGES, tools=[tool("weather"), other], tool_choice="required")


def test_thought_that_the_prompt_has_begun_is_no_text(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="x", messages=MESSAGES, max_tokens=12, temperature=0, reasoning_effort="high")
    message: Any = answer.choices[0].message
    assert message.reasoning_content and message.content == "" and answer.choices[0].finish_reason == "length"


def test_thoughts_stay_in_the_text_where_that_is_asked_for(client: openai.OpenAI) -> None:
    text = "<think>\nSo.\n</think>\n\nYes."
    answer = client.chat.completions.create(model="x", messages=MESSAGES, extra_body={**exactly(text), "reasoning_format": "none"})
    assert answer.choices[0].message.content == text


def test_json_that_a_schema_holds_is_text_after_a_thought_that_was_begun(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"city": {"enum": ["Paris"]}}, "required": ["city"]}
    answer = client.chat.completions.create(
        model="x", messages=MESSAGES, max_tokens=60, extra_body={"chat_template_kwargs": {"thinks": True}},
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": schema}})
    assert json.loads(answer.choices[0].message.content or "") == {"city": "Paris"}


# ---- gpt-oss, whose marks are control tokens ----

HARMONY = """{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}<|start|>assistant{# <|channel|> #}"""
CONTROLS = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|call|>", "<|return|>")  # with all three, <|end|> ends no answer


@pytest.fixture(scope="module")
def batcher(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Batcher]:
    path = with_vocabulary(small, tmp_path_factory.mktemp("harmony") / "harmony.gguf", HARMONY, CONTROLS)
    with gguf_pager.Llama(str(path), **{**ARGUMENTS, "n_ctx": 1024}, budget="25%") as llm:
        batcher = Batcher(llm, 1)
        yield batcher
        batcher.close()


def scripted(batcher: Batcher, tokens: Sequence[int]) -> Callable[[], Seat]:
    """Return what opens seats whose sampler takes these tokens, whatever the logits say."""
    class Scripted(Seat):
        def _ask(self, *args: Any) -> Any:
            left = iter(tokens)
            self._begun = batcher.begin
            answer_of = super()._ask

            def begin(answer: Any) -> None:
                answer.sample = lambda row: next(left)
                self._begun(answer)

            batcher.begin = begin  # type: ignore[method-assign]
            try:
                return answer_of(*args)
            finally:
                del batcher.begin

    return lambda: Scripted(batcher)


@pytest.mark.parametrize("is_stream", [False, True])
def test_gpt_oss_is_understood(batcher: Batcher, is_stream: bool) -> None:
    text = ('<|channel|>analysis<|message|>The weather: I ask.<|end|><|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json'
            '<|message|>{"city": "Paris"}<|call|>')
    tokens = batcher.llm.tokenize(text.encode(), add_bos=False, special=True)
    assert len(tokens) < 60, "marks are single tokens"
    request = schemas.ChatRequest(messages=MESSAGES, tools=TOOLS, stream=is_stream)
    [job] = jobs.chat_jobs(request, scripted(batcher, tokens), "x")
    if is_stream:
        chunks = list(job.chunks())
        assert "".join(chunk["choices"][0]["delta"].get("reasoning_content", "") for chunk in chunks) == "The weather: I ask."
        assert not any(chunk["choices"][0]["delta"].get("content") for chunk in chunks)
        calls = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", [])]
    else:
        message = job.whole()["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("The weather: I ask.", None)
        calls = message["tool_calls"]
    assert [(call["function"]["name"], call["function"]["arguments"]) for call in calls] == [("weather", '{"city": "Paris"}')]
