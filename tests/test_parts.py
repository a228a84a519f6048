"""What an answer's text consists of, in the forms of the models that people have, and however it is cut while it comes."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from gguf_pager.serve import calls, parts, templates
from gguf_pager.serve.seat import RequestError, checked

WEATHER = {"type": "object", "properties": {
    "city": {"type": "string"}, "days": {"type": "integer"}, "zip": {"type": "string"}, "note": {"type": ["string", "null"]}, "wet": {"$ref": "#/$defs/wet"},
    "past": {"anyOf": [{"type": "string"}, {"type": "null"}]}, "unit": {"enum": ["1", "2"]}, "any": {}}, "$defs": {"wet": {"type": "boolean"}}}
TOOLS = {"weather": WEATHER, "now": {}}

HERMES = "{% if tools %}<tool_call>{% endif %}<think></think>"
KIMI = "<|im_middle|>"
GPT_OSS = "<|start|><|channel|><|message|>"


def told_apart(pieces: list[str], template: str, prompt_end: str = "", *, has_tools: bool = True) -> tuple[str, str, list[Any]]:
    """Return what was thought, what was said, and the calls."""
    marks = parts.marks_of(template, has_tools=has_tools)
    split = parts.splitter(marks, prompt_end, TOOLS)
    found = [part for piece in pieces for part in split.feed(piece)] + split.end()
    assert all(part.call or part.text for part in found)
    text = {kind: "".join(part.text for part in found if part.kind == kind) for kind in ("reasoning", "content")}
    return text["reasoning"], text["content"], [(part.call.name, json.loads(part.call.arguments)) for part in found if part.call]


def cuts(text: str) -> list[list[str]]:
    """Return a text whole, letter by letter, and cut at random."""
    found, dice = [[text], list(text)], random.Random(len(text))
    for _ in range(20):
        places = sorted(dice.sample(range(len(text)), min(len(text), 5)))
        found.append([text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)])
    return found


PARIS = ("weather", {"city": "Paris"})
RICH = ("weather", {"city": "Paris", "days": 3, "zip": "0750"})

ANSWERS: dict[str, tuple[str, str, str, tuple[str, str, list[Any]]]] = {
    # name: template, end of the prompt, text, what it is
    "plain": (HERMES, "", "Hello <b>you</b>.\n\n", ("", "Hello <b>you</b>.\n\n", [])),
    "only spaces": (HERMES, "", " \n", ("", " \n", [])),
    "qwen3, thinks and speaks": (HERMES, "assistant\n", "<think>\nHm, a < b.\n\nSo?\n</think>\n\nYes: 1.", ("Hm, a < b.\n\nSo?", "Yes: 1.", [])),
    "qwen3, does not think": (HERMES, "<think>\n\n</think>\n\n", "Yes.", ("", "Yes.", [])),
    "qwen3-thinking, the prompt has begun it": (HERMES, "assistant\n<think>\n", "Hm.\n</think>\n\nYes.", ("Hm.", "Yes.", [])),
    "is cut off while it thinks": (HERMES, "<think>\n", "Hm, well, </thi", ("Hm, well, </thi", "", [])),
    "qwen3, calls": (HERMES, "", '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>', ("", "", [PARIS])),
    "thinks, speaks, calls twice": (
        HERMES, "", ('<think>\nHm.\n</think>\n\nI look.\n\n<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>\n<tool_call>\n'
        '{"name": "now", "arguments": {}}\n</tool_call>'), ("Hm.", "I look.", [PARIS, ("now", {})])),
    "arguments as text": (HERMES, "", '<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"Paris\\"}"}</tool_call>', ("", "", [PARIS])),
    "no end mark": (HERMES, "", '<tool_call>\n{"name": "now", "arguments": {}}', ("", "", [("now", {})])),
    "a call that is cut off": (HERMES, "", '<tool_call>\n{"name": "now", "argum', ("", '<tool_call>\n{"name": "now", "argum', [])),
    "no call between the marks": (HERMES, "", "See <tool_call>this</b></tool_call>!", ("", "See <tool_call>this</b></tool_call>!", [])),
    "qwen3-coder": (HERMES, "", ("<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n3\n</parameter>\n<parameter=zip>\n"
                    "0750\n</parameter>\n</function>\n</tool_call>"), ("", "", [RICH])),
    "glm": (HERMES, "", ("<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n"
            "<arg_key>zip</arg_key>\n<arg_value>0750</arg_value>\n</tool_call>"), ("", "", [RICH])),
    "glm, without arguments": (HERMES, "", "<tool_call>now\n</tool_call>", ("", "", [("now", {})])),
    "deepseek v3": ("<｜tool▁calls▁begin｜>", "", ("Well.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
                    '{"city": "Paris"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜>'
                    "<｜tool▁calls▁end｜>"), ("", "Well.", [PARIS, ("now", {})])),
    "deepseek v3.1": ("<｜tool▁calls▁begin｜>", "</think>", ('<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Paris"}'
                      "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"), ("", "", [PARIS])),
    "deepseek v3.2": ("{% set m = '｜DSML｜' %}<think>", "<think>", ('Hm.</think>\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="weather">\n'
                      '<｜DSML｜parameter name="city" string="true">Paris</｜DSML｜parameter>\n<｜DSML｜parameter name="days" string="false">3'
                      '</｜DSML｜parameter>\n<｜DSML｜parameter name="zip" string="true">0750</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
                      "</｜DSML｜function_calls>"), ("Hm.", "", [RICH])),
    "kimi": (KIMI, "", ("I look.<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
             '{"city": "Paris"}<|tool_call_end|><|tool_calls_section_end|>'), ("", "I look.", [PARIS])),
    "minimax": ("<minimax:tool_call><think></think>", "<think>\n", ("Hm.\n</think>\n\n<minimax:tool_call>\n<invoke name=\"weather\">\n"
                '<parameter name="city">Paris</parameter>\n<parameter name="days">3</parameter>\n<parameter name="zip">0750</parameter>\n'
                "</invoke>\n</minimax:tool_call>"), ("Hm.", "", [RICH])),
    "mistral": ("[TOOL_CALLS]", "", '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}, "id": "abcdefghi"}]', ("", "", [PARIS])),
    "mistral since 2025": ("[TOOL_CALLS]", "", '[TOOL_CALLS]weather[ARGS]{"city": "Paris"}[TOOL_CALLS]now[ARGS]{}', ("", "", [PARIS, ("now", {})])),
    "granite": ("<|tool_call|>", "", '<|tool_call|>[{"name": "weather", "arguments": {"city": "Paris"}}]', ("", "", [PARIS])),
    "llama": ("Given functions", "", '{"name": "weather", "parameters": {"city": "Paris"}}', ("", "", [PARIS])),
    "llama, marked": ("Given functions", "", '<|python_tag|>{"name": "weather", "parameters": {"city": "Paris"}}', ("", "", [PARIS])),
    "json that is no call": ("Given functions", "", '{"name": "Paris", "inhabitants": 2}', ("", '{"name": "Paris", "inhabitants": 2}', [])),
    "gpt-oss": (GPT_OSS, "<|start|>assistant", "<|channel|>analysis<|message|>Hm < so.<|end|><|start|>assistant<|channel|>final<|message|>Yes.\n",
                ("Hm < so.", "Yes.\n", [])),
    "gpt-oss, calls": (GPT_OSS, "", ("<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.weather "
                       '<|constrain|>json<|message|>{"city": "Paris"}'), ("Hm.", "", [PARIS])),
    "gpt-oss, its other order": (GPT_OSS, "", ("<|channel|>commentary<|message|>I look.<|end|><|start|>assistant to=functions.weather<|channel|>commentary "
                                 '<|constrain|>json<|message|>{"city": "Paris"}<|call|>'), ("", "I look.", [PARIS])),
    "gpt-oss, calls with nothing": (GPT_OSS, "", "<|channel|>commentary to=functions.now <|constrain|>json<|message|>", ("", "", [("now", {})])),
    "gpt-oss, no header": (GPT_OSS, "", "Yes.", ("", "Yes.", [])),
    "end mark within an argument": (HERMES, "", '<tool_call>{"name": "weather", "arguments": {"city": "a </tool_call> b"}}</tool_call> So.',
                                    ("", "So.", [("weather", {"city": "a </tool_call> b"})])),
    "end marks within an argument without quotes": (
        HERMES, "", "<tool_call>\n<function=weather>\n<parameter=city>\na </tool_call> </parameter> b\n</parameter>\n</function>\n</tool_call>",
        ("", "", [("weather", {"city": "a </tool_call> </parameter> b"})])),
    "begin mark within a text of mistral": ("[TOOL_CALLS]", "", '[TOOL_CALLS]weather[ARGS]{"city": "[TOOL_CALLS] [ARGS]"} [TOOL_CALLS]now[ARGS]{}',
                                            ("", "", [("weather", {"city": "[TOOL_CALLS] [ARGS]"}), ("now", {})])),
    "qwen3-coder, cut off in an argument": (HERMES, "", "<tool_call>\n<function=weather>\n<parameter=city>\nPar", (
        "", "<tool_call>\n<function=weather>\n<parameter=city>\nPar", [])),
    "qwen3-coder, cut off behind one": (HERMES, "", "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n", (
        "", "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n", [])),
    "qwen3-coder, no end mark": (HERMES, "", "<tool_call>\n<function=now>\n</function>", ("", "", [("now", {})])),
    "glm, cut off in its name": (HERMES, "", "<tool_call>now", ("", "<tool_call>now", [])),
    "glm, cut off in a key": (HERMES, "", "<tool_call>weather\n<arg_key>ci", ("", "<tool_call>weather\n<arg_key>ci", [])),
    "glm, cut off behind an argument": (HERMES, "", "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n", (
        "", "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n", [])),
    "kimi, cut off in its second call": (KIMI, "", (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.now:0<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_call_begin|>functions.weather:1"), (
        "", "<|tool_calls_section_begin|><|tool_call_begin|>functions.now:0<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_call_begin|>functions.weather:1", [])),
    "minimax, an argument that does not end": ("<minimax:tool_call>", "", (
        '<minimax:tool_call><invoke name="weather"><parameter name="city">Par</invoke></minimax:tool_call>'), (
        "", '<minimax:tool_call><invoke name="weather"><parameter name="city">Par</invoke></minimax:tool_call>', [])),
    "text about marks, and then a call": (HERMES, "", 'Use the <tool_call> tag, then </tool_call> so: <tool_call>{"name": "now"}</tool_call>\n', (
        "", "Use the <tool_call> tag, then </tool_call> so:", [("now", {})])),
    "marks in a code block": (HERMES, "", "```\n<tool_call>\nwhatever\n</tool_call>\n```\nDone.", (
        "", "```\n<tool_call>\nwhatever\n</tool_call>\n```\nDone.", [])),
    "arguments as their schemas have them": (HERMES, "", "<tool_call>\n<function=weather>\n" + "".join(
        f"<parameter={name}>\n{text}\n</parameter>\n" for name, text in (
            ("note", "123"), ("past", "null"), ("wet", "True"), ("unit", "1"), ("any", "[1]"))) + "</function>\n</tool_call>", (
        "", "", [("weather", {"note": "123", "past": None, "wet": True, "unit": "1", "any": [1]})])),
    "no arguments": (HERMES, "", '<tool_call>{"name": "now", "arguments": null}</tool_call>', ("", "", [("now", {})])),
    "no number": (HERMES, "", '<tool_call>{"name": "now", "arguments": {"a": NaN}}</tool_call>', (
        "", '<tool_call>{"name": "now", "arguments": {"a": NaN}}</tool_call>', [])),
    "half a character": (HERMES, "", '<tool_call>{"name": "now", "arguments": {"a": "\\ud83d"}}</tool_call>', ("", "", [("now", {"a": "\ud83d"})])),
    "a second thought": (HERMES, "", "<think>a</think>b <think>c</think>", ("a", "b <think>c</think>", [])),
    "the end of a thought that nobody has begun": (HERMES, "", "a\n</think>\n\nb", ("", "a\n</think>\n\nb", [])),
    "a list that is no call": ("Given functions", "", "[1] says so.", ("", "[1] says so.", [])),
    "deepseek v4": ("{{ dsml_token + 'tool_calls>' }}<think>{% set dsml_token = '｜DSML｜' %}", "</think>", (
        '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="weather">\n<｜DSML｜parameter name="city" string="true">Paris</｜DSML｜parameter>\n'
        '</｜DSML｜invoke>\n</｜DSML｜tool_calls>'), ("", "", [PARIS])),
    "gpt-oss, cut off in a header": (GPT_OSS, "", "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|chan", ("Hm.", "", [])),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_answer_is_told_apart_however_it_is_cut(name: str) -> None:
    template, prompt_end, text, expected = ANSWERS[name]
    for pieces in cuts(text):
        assert told_apart(pieces, template, prompt_end) == expected, pieces


def test_text_of_parts_of_marks_is_told_apart_however_it_is_cut() -> None:
    dice = random.Random(1)
    for template, _, _, _ in ANSWERS.values():
        marks = parts.marks_of(template, has_tools=True)
        scraps = [*marks.all, *(mark[:-1] for mark in marks.all), *(mark[1:] for mark in marks.all), " ", "\n\n", "a", "<", "[", "}", '{"name": "now"}', "é"]
        for _ in range(60):
            text = "".join(dice.choices(scraps, k=8))
            whole = told_apart([text], template)
            for pieces in cuts(text)[1:6]:
                assert told_apart(pieces, template) == whole, (template, pieces)
            if not whole[2] and not marks.thinking and not marks.is_harmony:
                assert whole[1] == text, "nothing is lost"


@pytest.mark.parametrize(("template", "begin", "end"), [
    (HERMES, '<tool_call>{"name": "now", "arguments": {"a": "', '"}}</tool_call>'), (GPT_OSS, '<|channel|>commentary to=functions.now<|message|>{"a": "', '"}'),
    (HERMES, "<tool_call><function=now><parameter=a>\n", "\n</parameter></function></tool_call>"), ("[TOOL_CALLS]", '[TOOL_CALLS]now[ARGS]{"a": "', '"}')])
def test_arguments_may_be_long(template: str, begin: str, end: str) -> None:
    n_tokens, text = 20_000, "word"
    assert told_apart([begin, *[text] * n_tokens, end], template) == ("", "", [("now", {"a": text * n_tokens})])


@pytest.mark.parametrize("template", [HERMES, GPT_OSS, "Given functions"])
def test_json_deeper_than_python_reads_is_text(template: str) -> None:
    header = {HERMES: "<tool_call>", GPT_OSS: "<|channel|>commentary to=functions.now<|message|>"}.get(template, "")
    assert told_apart([header + "[{" + "[" * 100_000], template)[2] == []


def test_arguments_can_be_sent_whatever_they_hold() -> None:
    split = parts.splitter(parts.marks_of(HERMES, has_tools=True), "", TOOLS)
    [part] = split.feed('<tool_call>{"name": "now", "arguments": {"a": "\\ud83d", "b": "é"}}</tool_call>')
    assert part.call is not None and part.call.arguments.encode()


def test_schemas_that_make_no_sense_are_no_trouble() -> None:
    text = "<tool_call>\n<function=now>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"
    loop = {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}]}
    schemas: list[dict[str, Any]] = [{"properties": []}, {"properties": {"a": True}}, {"properties": {"a": {"type": 5, "enum": 5, "anyOf": [7]}}},
                                     {"properties": {"a": loop}, "$defs": {"a": loop}}]
    for schema in schemas:
        split = parts.splitter(parts.marks_of(HERMES, has_tools=True), "", {"now": schema})
        assert [json.loads(part.call.arguments) for part in split.feed(text) if part.call] == [{"a": 1}]


def test_text_passes_as_it_comes_where_nothing_can_be_a_mark() -> None:
    split = parts.splitter(parts.marks_of(HERMES, has_tools=True), "", TOOLS)
    assert [split.feed(piece) for piece in ("One", " two", "!")] == [[parts.Part("content", piece)] for piece in ("One", " two", "!")]


def test_calls_are_text_where_there_are_no_tools() -> None:
    text = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    assert told_apart([text], HERMES, has_tools=False) == ("", text, [])


def test_models_own_ids_are_kept() -> None:
    split = parts.splitter(parts.marks_of(KIMI, has_tools=True), "", TOOLS)
    text = ANSWERS["kimi"][2]
    assert [part.call.id for part in split.feed(text) if part.call] == ["functions.weather:0"]


# ---- what templates want ----

QWEN = "{% for m in messages %}{% for c in m.tool_calls or [] %}{% set c = c.function %}{% if c.arguments is string %}{{ c.arguments }}{% else %}{{ c.arguments | tojson }}{% endif %}{% endfor %}{% endfor %}"
LLAMA = "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
GLM = "{% for m in messages %}{% for c in m.tool_calls or [] %}{% for k, v in c.function.arguments.items() %}{{ k }}{{ v }}{% endfor %}{% endfor %}{% endfor %}"
DEEPSEEK = "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ '```' + c.function.arguments + '```' }}{% endfor %}{% endfor %}"


MISTRAL = """{% for m in messages if m.role in ("user", "assistant") and not m.tool_calls %}{% if (m.role == "user") != loop.index0 is even %}
{{ raise_exception("they alternate") }}{% endif %}{% endfor %}{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{% endfor %}"""


@pytest.mark.parametrize(("template", "expected"), [(QWEN, False), (MISTRAL, True), (LLAMA, True), (GLM, True), (DEEPSEEK, False), ("{{ messages[0].content }}", False),
                                                    ("{{ raise_exception('no tools') }}", False), ("{% nonsense", False)])
def test_arguments_go_into_a_template_as_it_takes_them(template: str, expected: bool) -> None:
    assert templates.takes_objects(template) is expected


def test_template_that_finds_no_end_of_a_schema_is_an_error_of_the_request() -> None:
    template = Jinja2ChatFormatter(template="{% macro kind(x) %}{{ x.type or kind(x) }}{% endmacro %}{{ kind(tools[0]) }}", eos_token="", bos_token="")
    with pytest.raises(RequestError, match="give each schema in them a type"):
        checked(lambda: template(messages=[], tools=[{}]))


@pytest.mark.parametrize(("template", "is_given"), [
    ("{% for t in tools %}{{ '// ' + t.function.description }}{% endfor %}", True), ("{{ tools | tojson }}", False), ("{{ raise_exception('no') }}", False)])
def test_tools_get_the_description_that_a_template_wants(template: str, is_given: bool) -> None:
    tools = [{"type": "function", "function": {"name": "now"}}, {"type": "function", "function": {"name": "then", "description": "Later."}}]
    first, second = (tool["function"].get("description") for tool in templates.with_descriptions(tools, template))
    assert first == ("" if is_given else None) and second == "Later."


def test_arguments_that_are_no_json_stay_what_they_are() -> None:
    call = {"id": "1", "function": {"name": "now", "arguments": "{no"}}
    good = {"id": "2", "function": {"name": "now", "arguments": '{"a": [1]}'}}
    assert templates.with_objects([call, good, "x"]) == [call, {"id": "2", "function": {"name": "now", "arguments": {"a": [1]}}}, "x"]


def test_every_form_has_an_answer_here() -> None:
    assert {form.begin for form in calls.FORMS} == {form.begin for form in calls.FORMS if any(form.begin in text for _, _, text, _ in ANSWERS.values())}
