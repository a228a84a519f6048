"""What chat templates want: some take the arguments of earlier calls as the text that they were, others as objects."""

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

    Found out by trying, as llama.cpp does: text may be refused, left out, or put between quotes once more.
    """
    return not _shows(template, _PROBE) and _shows(template, json.loads(_PROBE))


def _shows(template: str, arguments: Any) -> bool:
    call = {"id": "123456789", "type": "function", "function": {"name": "probe", "arguments": arguments}}
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "123456789", "name": "probe", "content": "y"}, {"role": "assistant", "content": "w"},
                {"role": "user", "content": "z"}]  # a whole conversation: Mistral's templates want user and assistant to alternate
    tool = {"type": "function", "function": {"name": "probe", "description": "", "parameters": {"type": "object", "properties": {}}}}
    try:
        text = Jinja2ChatFormatter(template=template, eos_token="", bos_token="")(messages=messages, tools=[tool]).prompt
    except (jinja2.TemplateError, ValueError, TypeError, KeyError):  # whatever a template does with what it does not expect
        return False
    return '\\"needle\\"' not in text and "needle" in text


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
