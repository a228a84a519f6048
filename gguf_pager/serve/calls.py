"""How models write calls of tools into their text, by family; each from its own chat template.

The forms: Hermes, Qwen2.5 and Qwen3 (JSON between `<tool_call>` tags), Qwen3-Coder (`<function=...>` in them), GLM-4.5 and later (`<arg_key>` in
them), DeepSeek V3, R1 and V3.1, DeepSeek V3.2 (DSML), Kimi K2, MiniMax M2, Mistral, Granite, and Llama's bare JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a tool. `arguments` is a JSON object as text; `id` is the model's own, where its form has one."""

    name: str
    arguments: str
    id: str | None = None


Tools = Mapping[str, Mapping[str, Any]]
"""The tools there are: the JSON schema of the arguments, by name."""


def tools_of(tools: Sequence[Mapping[str, Any]]) -> Tools:
    """Return a request's tools by their names."""
    return {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}


class _NoCall(ValueError):
    """What stands between the marks is no call."""


# ---- JSON ---------------------------------------------------------------------------------------------------------------

def _object(text: str) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise _NoCall(text)
    return found


def _call_of(found: Any) -> Call:
    """Return the call that a JSON object says. Arguments may be an object, or one as text."""
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        raise _NoCall(str(found))
    arguments = found.get("arguments", found.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _object(arguments)
    if not isinstance(arguments, dict):
        raise _NoCall(str(found))
    return Call(found["name"], json.dumps(arguments, ensure_ascii=False), found["id"] if isinstance(found.get("id"), str) else None)


def _from_json(text: str, _: Tools) -> list[Call]:
    found = json.loads(text)
    return [_call_of(one) for one in (found if isinstance(found, list) else [found])]


def from_bare_json(text: str, tools: Tools) -> list[Call]:
    """Return the call that an answer is as a whole, of a tool that there is: Llama 3 and 4, and what a grammar has forced."""
    found = _from_json(text.removeprefix("<|python_tag|>"), tools)
    if not found or any(call.name not in tools for call in found):
        raise _NoCall(text)
    return found


# ---- arguments that stand alone, by their names -----------------------------------------------------------------------------

def _value(text: str, schema: Any) -> Any:
    """Return an argument that was written without quotes: text where the schema has text, else JSON if it is any."""
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    if kind == "string":
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def _named(name: str, arguments: Iterator[tuple[str, str]], tools: Tools) -> Call:
    schemas = tools.get(name, {}).get("properties") or {}
    return Call(name, json.dumps({key: _value(text, schemas.get(key)) for key, text in arguments}, ensure_ascii=False))


def _groups(pattern: str, text: str) -> Iterator[tuple[str, str]]:
    for match in re.finditer(pattern, text, re.DOTALL):
        yield match[1], match[2]


def _from_tags(text: str, tools: Tools) -> list[Call]:
    """What `<tool_call>` encloses is JSON, or a function's tags, or a name and then keys and values."""
    text = text.strip()
    if text.startswith("{"):
        return _from_json(text, tools)
    if text.startswith("<function="):
        found = re.fullmatch(r"<function=([^>\n]+)>(.*?)(?:</function>)?", text, re.DOTALL)
        if not found:
            raise _NoCall(text)
        return [_named(found[1], _groups(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", found[2]), tools)]
    name, _, rest = text.partition("<arg_key>")
    if not name.strip() or "<" in name:
        raise _NoCall(text)
    pairs = _groups(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", f"<arg_key>{rest}" if rest else "")
    return [_named(name.strip(), pairs, tools)]


def _from_invokes(text: str, tools: Tools) -> list[Call]:
    return [_named(name, _groups(r'<parameter name="([^"]+)">(.*?)</parameter>', inner), tools)
            for name, inner in _groups(r'<invoke name="([^"]+)">(.*?)</invoke>', text)]


def _from_dsml(text: str, _: Tools) -> list[Call]:
    calls = []
    for name, inner in _groups(r'<｜DSML｜invoke name="([^"]+)">(.*?)</｜DSML｜invoke>', text):
        arguments = {match[1]: match[3] if match[2] == "true" else json.loads(match[3]) for match in re.finditer(
            r'<｜DSML｜parameter name="([^"]+)" string="(true|false)">(.*?)</｜DSML｜parameter>', inner, re.DOTALL)}
        calls.append(Call(name, json.dumps(arguments, ensure_ascii=False)))
    return calls


# ---- a name, a mark, and JSON ------------------------------------------------------------------------------------------------

def _from_deepseek(text: str, _: Tools) -> list[Call]:
    """V3 and R1 say "function", then the name, and fence the JSON; V3.1 says the name and then the JSON."""
    calls = []
    for before, after in _groups(r"<｜tool▁call▁begin｜>(.*?)<｜tool▁sep｜>(.*?)<｜tool▁call▁end｜>", text):
        fenced = re.fullmatch(r"\s*([^\n]+)\n```json\n(.*?)\n?```\s*", after, re.DOTALL)
        name, arguments = (fenced[1], fenced[2]) if fenced else (before, after)
        _object(arguments)
        calls.append(Call(name.strip(), arguments.strip()))
    return calls


def _from_kimi(text: str, _: Tools) -> list[Call]:
    calls = []
    for label, arguments in _groups(r"<\|tool_call_begin\|>(.*?)<\|tool_call_argument_begin\|>(.*?)<\|tool_call_end\|>", text):
        _object(arguments)
        name = re.sub(r":\d+$", "", label.strip()).removeprefix("functions.")
        calls.append(Call(name, arguments.strip(), label.strip()))
    return calls


def _from_mistral(text: str, tools: Tools) -> list[Call]:
    """A list of calls; or, since 2025, each a mark, a name, a mark, and JSON."""
    if text.lstrip().startswith("["):
        return _from_json(text, tools)
    calls = []
    for one in text.split("[TOOL_CALLS]"):
        label, mark, arguments = one.partition("[ARGS]")
        if not mark:
            raise _NoCall(text)
        name, _, own_id = label.partition("[CALL_ID]")
        _object(arguments)
        calls.append(Call(name.strip(), arguments.strip(), own_id.strip() or None))
    return calls


# ---- forms -------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True, slots=True)
class Form:
    """How calls are written: between `begin` and `end`, or up to the answer's end.

    `inner` are marks that stand between them, `known_by` is what a template of such a model has in it, if that is not `begin`.
    """

    begin: str
    end: str | None
    parse: Callable[[str, Tools], list[Call]]
    inner: tuple[str, ...] = ()
    known_by: str | None = None

    def is_of(self, template: str) -> bool:
        """Whether a model with this chat template writes calls so."""
        return (self.known_by or self.begin) in template

    def calls(self, text: str, tools: Tools) -> list[Call] | None:
        """Return the calls in what stands between the marks; None: it is none, and only text."""
        try:
            return self.parse(text, tools) or None
        except ValueError:
            return None


FORMS = (
    Form("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", _from_deepseek,
         ("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>")),
    Form("<｜DSML｜function_calls>", "</｜DSML｜function_calls>", _from_dsml, ("｜DSML｜",), "｜DSML｜"),
    Form("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", _from_kimi,
         ("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"), "<|im_middle|>"),
    Form("<minimax:tool_call>", "</minimax:tool_call>", _from_invokes),
    Form("[TOOL_CALLS]", None, _from_mistral, ("[ARGS]", "[CALL_ID]")),
    Form("<|tool_call|>", None, _from_json),
    Form("<tool_call>", "</tool_call>", _from_tags),
)
"""Where a template fits more than one, the first counts."""
