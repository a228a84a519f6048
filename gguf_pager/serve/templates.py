"""What chat templates want, found out by trying: how calls and tools go into them."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

import jinja2
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

_PROBE = '{"needle": 1}'


def template_of(seat: Any) -> str:
    """Return a model's chat template; empty where it has none."""
    return str(seat.metadata.get("tokenizer.chat_template", ""))


@functools.lru_cache(maxsize=16)
def takes_objects(template: str) -> bool:
    """Whether the arguments of a call go into this template as an object; else as JSON in text, which leaves them as the model wrote them.

    As llama.cpp finds it out: text may be refused, left out, or put between quotes once more.
    """
    return not _shows(template, _PROBE) and _shows(template, json.loads(_PROBE))


def _shows(template: str, arguments: Any) -> bool:
    call = {"id": "123456789", "type": "function", "function": {"name": "probe", "arguments": arguments}}
    text = _prompt(template, {"description": ""}, {"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [call]},
                   {"role": "tool", "tool_call_id": "123456789", "name": "probe", "content": "y"}, {"role": "assistant", "content": "w"},
                   {"role": "user", "content": "z"})  # a whole conversation: Mistral's templates want user and assistant to alternate
    return text is not None and '\\"needle\\"' not in text and "needle" in text


def _prompt(template: str, tool: dict[str, Any], *messages: dict[str, Any]) -> str | None:
    """Return what a template makes of these messages and a tool; None where it refuses them."""
    function = {"name": "probe", "parameters": {"type": "object", "properties": {}}, **tool}
    try:
        return str(Jinja2ChatFormatter(template=template, eos_token="", bos_token="")(
            messages=list(messages), tools=[{"type": "function", "function": function}]).prompt)
    except (jinja2.TemplateError, ValueError, TypeError, KeyError, RecursionError):  # whatever a template does with what it does not expect
        return None


@functools.lru_cache(maxsize=16)
def _wants_descriptions(template: str) -> bool:
    asked = {"role": "user", "content": "x"}
    return _prompt(template, {}, asked) is None and _prompt(template, {"description": ""}, asked) is not None


def with_descriptions(tools: Sequence[dict[str, Any]], template: str) -> list[dict[str, Any]]:
    """Return tools as a template takes them: gpt-oss's and others refuse one without a description, which OpenAI's API lets be left out."""
    if not _wants_descriptions(template):
        return list(tools)
    return [{**tool, "function": {"description": "", **tool["function"]}} for tool in tools]


def with_objects(calls: Sequence[Any]) -> list[Any]:
    """Return a message's calls with their arguments as objects, where they are JSON objects in text."""
    found = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:
                call = {**call, "function": {**function, "arguments": json.loads(function["arguments"] or "{}")}}
            except ValueError:
                pass  # the template says what it thinks of it
        found.append(call)
    return found
