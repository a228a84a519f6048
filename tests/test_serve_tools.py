"""Tools that a model may call, and what it thinks, with OpenAI's client and models whose templates mark them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import openai
import pydantic
import pytest
from conftest import ARGUMENTS, with_vocabulary
from serving import Server, serving

import gguf_pager
from gguf_pager.serve import jobs, parts, schemas
from gguf_pager.serve.batcher import Batcher
from gguf_pager.serve.seat import Seat

QWEN = """{% if tools %}<|im_start|>system
Call tools so: <tool_call>{"name": ..., "arguments": ...}</tool_call>. Tools:
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% if 'tool_calls' in m %}{% for c in m.tool_calls %}<tool_call>{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</tool_call>{% endfor %}{% endif %}<|im_end|>
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


def test_message_may_come_back_with_all_that_it_has_not(client: openai.OpenAI) -> None:
    # As templates of Llama and gpt-oss do, this one asks whether calls are there, not whether they are any.
    nothing: Any = {"tool_calls": None, "function_call": None, "reasoning_content": None, "refusal": None}
    messages = [*MESSAGES, {"role": "assistant", "content": "Rain.", **nothing}, {"role": "user", "content": "And in Rome?"}]
    assert client.chat.completions.create(model="x", messages=messages, tools=TOOLS, max_tokens=2).choices[0].message.content


def test_what_a_template_makes_no_prompt_of_is_told(client: openai.OpenAI) -> None:
    messages: Any = [*MESSAGES, {"role": "assistant", "content": "", "tool_calls": 5}]
    with pytest.raises(openai.BadRequestError, match="The model's chat template cannot make a prompt of these messages: 'int' object is not iterable"):
        client.chat.completions.create(model="x", messages=messages, max_tokens=2)


NAMED: Any = {"type": "function", "function": {"name": "weather"}}


def test_tool_that_is_named_is_called(client: openai.OpenAI) -> None:
    arguments: dict[str, Any] = {"model": "x", "messages": MESSAGES, "tools": TOOLS, "tool_choice": NAMED, "max_tokens": 60}
    with client.chat.completions.stream(**arguments) as stream:
        streamed = stream.until_done().get_final_completion().choices[0]
    for choice in (streamed, client.chat.completions.create(**arguments).choices[0]):
        [call] = choice.message.tool_calls
        assert (choice.finish_reason, call.function.name, len(call.id)) == ("tool_calls", "weather", 9)
        assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")


def test_arguments_that_are_cut_off_are_text(client: openai.OpenAI) -> None:
    choice = client.chat.completions.create(model="x", messages=MESSAGES, tools=TOOLS, tool_choice=NAMED, max_tokens=2).choices[0]
    assert (choice.finish_reason, choice.message.tool_calls) == ("length", None) and choice.message.content


def test_openai_parses_the_arguments_of_a_call(client: openai.OpenAI) -> None:
    class Weather(pydantic.BaseModel):
        city: Literal["Paris", "Rome"]

    tools = [openai.pydantic_function_tool(Weather), openai.pydantic_function_tool(Weather, name="climate")]
    found = client.chat.completions.parse(model="x", messages=MESSAGES, tools=tools, tool_choice="required", max_tokens=60).choices[0].message
    assert [isinstance(call.function.parsed_arguments, Weather) for call in found.tool_calls or []] == [True]


def test_only_tools_that_are_allowed_are_called(client: openai.OpenAI) -> None:
    for mode, text in (("required", None), ("auto", "Hi.")):
        choice: Any = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [NAMED]}}
        message = client.chat.completions.create(model="x", messages=MESSAGES, tools=TOOLS, tool_choice=choice, max_tokens=60,
                                                 extra_body=exactly(text) if text else {}).choices[0].message
        assert message.content == text and [call.function.name for call in message.tool_calls or []] == ([] if text else ["weather"])  # type: ignore[union-attr]


def test_one_call_is_what_comes_where_more_are_not_wanted(client: openai.OpenAI) -> None:
    arguments: dict[str, Any] = {"model": "x", "messages": MESSAGES, "tools": TOOLS, "extra_body": exactly(f"{CALL}\n{CALL.replace('Paris', 'Rome')}")}
    for is_parallel, n_calls in ((False, 1), (True, 2)):
        found = client.chat.completions.create(parallel_tool_calls=is_parallel, **arguments).choices[0].message.tool_calls
        chunks = client.chat.completions.create(parallel_tool_calls=is_parallel, stream=True, **arguments)
        assert len(found) == len([call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]) == n_calls
        assert "Paris" in found[0].function.arguments


@pytest.mark.parametrize("choice", ["auto", {"name": "weather"}])
def test_functions_are_called_as_before_there_were_tools(client: openai.OpenAI, choice: Any) -> None:
    arguments: dict[str, Any] = {"model": "x", "messages": MESSAGES, "functions": [one["function"] for one in TOOLS], "function_call": choice,
                                 "max_tokens": 60, "extra_body": exactly(CALL) if choice == "auto" else {}}
    whole = client.chat.completions.create(**arguments).choices[0]
    *_, called, last = [chunk.choices[0] for chunk in client.chat.completions.create(stream=True, **arguments)]
    assert whole.finish_reason == last.finish_reason == "function_call"
    for call in (whole.message.function_call, called.delta.function_call):
        assert call.name == "weather" and json.loads(call.arguments)["city"] in ("Paris", "Rome")


@pytest.mark.parametrize(("given", "message"), [
    ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice is 'auto'"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "weather"}}, "not among the tools: it is"),
    ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"name": "x"}]}}}, "allowed_tools needs"),
    ({"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}}, "cannot be had together"),
    ({"tool_choice": "required"}, "there are no tools"), ({"tool_choice": NAMED}, "there are no tools"),
    ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "of type 'custom' is not known here"),
    ({"tools": [{"type": "function", "function": {"name": "x", "parameters": "x"}}]}, "parameters of 'x' are no JSON schema"),
    ({"tools": [{"type": "function", "function": {"name": "x", "parameters": {"properties": {"a": {"$ref": "#/nowhere"}}}}}], "tool_choice": "required"}, "nowhere")])
def test_choices_that_make_no_sense_are_refused(client: openai.OpenAI, given: Any, message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        client.chat.completions.create(model="x", messages=MESSAGES, max_tokens=2, **given)


def test_function_without_parameters_has_none(client: openai.OpenAI) -> None:
    now: Any = {"type": "function", "function": {"name": "now", "parameters": None}}
    for tools in ([now], [now, {"type": "function", "function": {"name": "later", "parameters": {}}}]):
        found = client.chat.completions.create(model="x", messages=MESSAGES, tools=tools, tool_choice="required", max_tokens=60).choices[0].message
        assert [json.loads(call.function.arguments) for call in found.tool_calls or []] == [{}]  # type: ignore[union-attr]


def test_every_token_has_its_logprobs_also_where_it_is_a_mark(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model="x", messages=MESSAGES, tools=TOOLS, stream=True, logprobs=True, top_logprobs=1,
                                                 stream_options={"include_usage": True}, extra_body=exactly(THOUGHT)))
    n_tokens = chunks[-1].usage.completion_tokens  # type: ignore[union-attr]
    assert sum(len(choice.logprobs.content or []) for chunk in chunks for choice in chunk.choices if choice.logprobs) == n_tokens


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


def test_thoughts_of_gpt_oss_stay_in_the_text_with_their_marks_where_that_is_asked_for(batcher: Batcher) -> None:
    text = "<|channel|>analysis<|message|>So.<|end|><|start|>assistant<|channel|>final<|message|>Yes."
    tokens = batcher.llm.tokenize(f"{text}<|return|>".encode(), add_bos=False, special=True)
    request = schemas.ChatRequest(messages=MESSAGES, reasoning_format="none", max_tokens=len(tokens) - 1)
    [job] = jobs.chat_jobs(request, scripted(batcher, tokens), "x")
    assert job.whole()["choices"][0]["message"]["content"] == text


def test_marks_that_are_control_tokens_stay_in_a_text_that_is_not_told_apart() -> None:
    template = "[THINK][/THINK]"
    for form, marks in ((None, parts.marks_of(template, has_tools=False)), ("none", parts.Marks(shown=("[THINK]", "[/THINK]")))):
        assert jobs._ToolUse().marks(schemas.ChatRequest(messages=MESSAGES, reasoning_format=form), template) == marks
        assert marks.all == ("[THINK]", "[/THINK]")


def test_thoughts_of_earlier_turns_come_back_as_gpt_oss_has_them() -> None:
    message = schemas.Message(role="assistant", content="I look.", reasoning_content="Hm.")  # type: ignore[call-arg]
    assert jobs._message(message, HARMONY)["thinking"] == "Hm." and "thinking" not in jobs._message(message, QWEN)
    calling = message.model_copy(update={"tool_calls": [{"function": {"name": "weather", "arguments": "{}"}}]})
    found = jobs._message(schemas.Message(**calling.model_dump()), HARMONY)
    assert (found["thinking"], found["content"]) == ("Hm.\n\nI look.", ""), "beside a call its template takes one of them"
