"""How models write calls of tools into their text, by family; each from its own chat template.

The forms: Hermes, Qwen2.5 and Qwen3 (JSON between `<tool_call>` tags), Qwen3-Coder (`<function=...>` in them), GLM-4.5 and later (`<arg_key>` in
them), DeepSeek V3, R1 and V3.1, DeepSeek V3.2 and V4 (DSML), Kimi K2, MiniMax M2, Mistral, Granite, and Llama's bare JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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

def _no_constant(name: str) -> Any:
    raise _NoCall(f"{name} is no JSON, though Python reads it.")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)


def _as_text(arguments: Mapping[str, Any]) -> str:
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a character, escaped: nobody could be sent it as it is
        return json.dumps(arguments)
    return text


def is_object(text: str) -> bool:
    """Whether a text is a JSON object."""
    try:
        return isinstance(_DECODER.decode(text), dict)
    except (ValueError, RecursionError):
        return False


def _object(text: str) -> dict[str, Any]:
    found = _DECODER.decode(text)
    if not isinstance(found, dict):
        raise _NoCall(text)
    return found


def _call_of(found: Any) -> Call:
    """Return the call that a JSON object says. Arguments may be an object, or one as text."""
    if not isinstance(found, dict) or not isinstance(found.get("name"), str) or not found["name"].isprintable():
        raise _NoCall("It has no name.")
    arguments = found.get("arguments", found.get("parameters"))
    if isinstance(arguments, str):
        arguments = _object(arguments or "{}")
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise _NoCall("Its arguments are no object.")
    own_id = found.get("id")
    return Call(found["name"], _as_text(arguments), own_id if isinstance(own_id, str) and own_id.isprintable() else None)


def _from_json(text: str, _: Tools) -> list[Call]:
    found = _DECODER.decode(text.strip())
    return [_call_of(one) for one in (found if isinstance(found, list) else [found])]


def from_bare_json(text: str, tools: Tools) -> list[Call]:
    """Return the call that an answer is as a whole, of a tool that there is: Llama 3 and 4, and what a grammar has forced."""
    found = _from_json(text.removeprefix("<|python_tag|>"), tools)
    if not found or any(call.name not in tools for call in found):
        raise _NoCall(text)
    return found


# ---- arguments that stand alone, by their names -----------------------------------------------------------------------------

_KINDS: dict[type, str] = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object", type(None): "null"}
_PYTHON_WORDS = {"True": True, "False": False, "None": None}


def _kinds(schema: Any, root: Mapping[str, Any], seen: set[str]) -> set[str]:
    """Return the types of JSON that a schema lets through, as far as it says; `seen` are references that were followed."""
    if not isinstance(schema, Mapping):
        return set()
    kind, reference = schema.get("type"), schema.get("$ref")
    found = {one for one in (kind if isinstance(kind, list) else [kind]) if isinstance(one, str)}
    values = [*_list(schema.get("enum")), *([schema["const"]] if "const" in schema else [])]
    found |= {_KINDS[type(value)] for value in values}
    for part in (part for name in ("anyOf", "oneOf", "allOf") for part in _list(schema.get(name))):
        found |= _kinds(part, root, seen)
    if isinstance(reference, str) and reference.startswith("#/") and reference not in seen:
        seen.add(reference)
        target: Any = root
        for name in reference[2:].split("/"):
            target = target.get(name) if isinstance(target, Mapping) else None
        found |= _kinds(target, root, seen)
    return found


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _value(text: str, kinds: set[str]) -> Any:
    """Return an argument that was written without quotes: text where only that is let through, else JSON if it is any."""
    if kinds == {"string"}:
        return text
    try:
        found = _DECODER.decode(text.strip())
    except ValueError:
        found = _PYTHON_WORDS.get(text.strip(), text)  # what a template has written for true, a model writes too
    kind = _KINDS[type(found)]
    is_let_through = kind in kinds or (kind == "integer" and "number" in kinds)
    return text if not is_let_through and ("string" in kinds or text.strip() in _PYTHON_WORDS) else found


def _named(name: str, arguments: Iterable[tuple[str, str]], tools: Tools) -> Call:
    root = tools.get(name, {})
    schemas = root.get("properties")
    schemas = schemas if isinstance(schemas, Mapping) else {}
    return Call(name, _as_text({key: _value(text, _kinds(schemas.get(key), root, set())) for key, text in arguments}))


def _matches(pattern: str, text: str) -> Iterator[re.Match[str]]:
    """Yield what fits one after the other. Where something else than spaces stands between, a call was cut off, or is none."""
    end = 0
    for match in re.finditer(pattern, text, re.DOTALL):
        if text[end : match.start()].strip():
            raise _NoCall("There is text between.")
        yield match
        end = match.end()
    if text[end:].strip():
        raise _NoCall("There is text behind.")


def _groups(pattern: str, text: str) -> Iterator[tuple[str, str]]:
    for match in _matches(pattern, text):
        yield match[1], match[2]


def _from_tags(text: str, tools: Tools) -> list[Call]:
    """What `<tool_call>` encloses is JSON, or a function's tags, or a name and then keys and values."""
    text = text.strip()
    if text.startswith("{"):
        return _from_json(text, tools)
    if text.startswith("<function="):
        found = re.fullmatch(r"<function=([^>\n]+)>(.*?)(?:</function>)?", text, re.DOTALL)
        if not found:
            raise _NoCall("It is no function.")
        return [_named(found[1], _groups(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>(?=\s*(?:<parameter=|$))", found[2]), tools)]
    name, mark, rest = text.partition("<arg_key>")
    if name.strip() not in tools:  # nothing else tells it from prose
        raise _NoCall("It is no tool's name.")
    pairs = _groups(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>(?=\s*(?:<arg_key>|$))", f"{mark}{rest}")
    return [_named(name.strip(), pairs, tools)]


def _from_invokes(text: str, tools: Tools) -> list[Call]:
    return [_named(name, _groups(r'<parameter name="([^"]+)">(.*?)</parameter>(?=\s*(?:<parameter |$))', inner), tools)
            for name, inner in _groups(r'<invoke name="([^"]+)">(.*?)</invoke>(?=\s*(?:<invoke |$))', text)]


def _from_dsml(text: str, _: Tools) -> list[Call]:
    calls = []
    for name, inner in _groups(r'<｜DSML｜invoke name="([^"]+)">(.*?)</｜DSML｜invoke>', text):
        arguments = {match[1]: match[3] if match[2] == "true" else _DECODER.decode(match[3].strip()) for match in _matches(
            r'<｜DSML｜parameter name="([^"]+)" string="(true|false)">(.*?)</｜DSML｜parameter>', inner)}
        calls.append(Call(name, _as_text(arguments)))
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
    while text.strip():
        label, mark, rest = text.partition("[ARGS]")
        rest = rest.lstrip()
        arguments, end = _DECODER.raw_decode(rest)  # the marks may stand in a text of it
        behind = rest[end:].lstrip()
        if not mark or not isinstance(arguments, dict) or not (behind == "" or behind.startswith("[TOOL_CALLS]")):
            raise _NoCall("It is no call.")
        name, _, own_id = label.partition("[CALL_ID]")
        calls.append(Call(name.strip(), rest[:end], own_id.strip() or None))
        text = behind.removeprefix("[TOOL_CALLS]")
    return calls


# ---- forms -------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True, slots=True)
class Form:
    """How calls are written: between `begin` and `end`, or up to the answer's end.

    `inner` are marks that stand between them, `known_by` is what a template of such a model has in it, if that is not `begin`. Where
    `whole_with` is not empty, a call whose `end` is missing was not cut off only if it ends so.
    """

    begin: str
    end: str | None
    parse: Callable[[str, Tools], list[Call]]
    inner: tuple[str, ...] = ()
    known_by: str | None = None
    whole_with: tuple[str, ...] = ()

    def is_of(self, template: str) -> bool:
        """Whether a model with this chat template writes calls so."""
        return (self.known_by or self.begin) in template

    def calls(self, text: str, tools: Tools, *, has_end: bool = True) -> list[Call] | None:
        """Return the calls in what stands between the marks; None: it is none, and only text."""
        if not has_end and self.whole_with and not text.rstrip().endswith(self.whole_with):
            return None
        try:
            return self.parse(text, tools) or None
        except (ValueError, RecursionError):
            return None


_OPENS = (("<parameter", "</parameter>"), ("<arg_value>", "</arg_value>"))


def is_open(text: str) -> bool:
    """Whether a text ends within an argument, so that an end mark which comes next is a part of that."""
    if text.lstrip().startswith(("{", "[")):
        try:
            _DECODER.raw_decode(text.lstrip())
        except json.JSONDecodeError as error:
            return error.msg.startswith("Unterminated string")
        except (ValueError, RecursionError):
            pass
        return False
    return any(text.rfind(begin) > text.rfind(end) for begin, end in _OPENS)


FORMS = (
    Form("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", _from_deepseek,
         ("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>")),
    Form("<｜DSML｜tool_calls>", "</｜DSML｜tool_calls>", _from_dsml, ("｜DSML｜",), "dsml_token + 'tool_calls>"),
    Form("<｜DSML｜function_calls>", "</｜DSML｜function_calls>", _from_dsml, ("｜DSML｜",), "｜DSML｜"),
    Form("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", _from_kimi,
         ("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"), "<|im_middle|>"),
    Form("<minimax:tool_call>", "</minimax:tool_call>", _from_invokes),
    Form("[TOOL_CALLS]", None, _from_mistral, ("[ARGS]", "[CALL_ID]")),
    Form("<|tool_call|>", None, _from_json),
    Form("<tool_call>", "</tool_call>", _from_tags, whole_with=("}", "</function>")),
)
"""Where a template fits more than one, the first counts."""
