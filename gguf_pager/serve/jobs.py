"""From a request to llama_cpp's arguments, and from its answers to OpenAI's: what the two understand differently."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import llama_cpp
from llama_cpp.llama_grammar import LlamaGrammar

from gguf_pager.serve.calls import tools_of
from gguf_pager.serve.parts import BARE, Marks, Splitter, marks_of, split_answer, split_chunks, splitting
from gguf_pager.serve.schemas import MOST_ANSWERS, SAMPLING, ChatRequest, CompletionRequest, Message, ResponseFormat
from gguf_pager.serve.seat import RequestError, Seat, checked
from gguf_pager.serve.templates import takes_objects, template_of, with_descriptions, with_objects

Chunk = dict[str, Any]

MOST_REPEATED = 4096
"""What a JSON schema may let be repeated: each one is written out in its grammar, and is a frame of llama.cpp's stack."""

MOST_OPTIONAL = 1000
"""How many characters or items more than there must be llama.cpp 0.3.36 takes: each may be left out, and they are brackets in brackets."""

_DEFAULTS: dict[str, Any] = {name: field.default for name, field in CompletionRequest.model_fields.items() if name in SAMPLING}


class Job:
    """One answer of a request: a seat, and what it is asked. `index` is its place among the request's choices, `is_first` tells whether
    its prompt is none of those before.
    """

    def __init__(self, seat: Seat, index: int, ask: Callable[[], Any], *, is_first: bool) -> None:
        self.seat, self.index, self._ask, self.is_first = seat, index, ask, is_first

    def whole(self) -> Chunk:
        """Return the answer in one piece."""
        answer: Chunk = checked(self._ask)
        answer["choices"][0]["index"] = self.index
        return answer

    def chunks(self) -> Iterator[Chunk]:
        """Return the answer piece by piece. What is wrong with the request is raised at once, before the first of them."""
        found: Iterator[Chunk] = checked(self._ask)
        return self._numbered(found)

    def _numbered(self, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        for chunk in chunks:
            chunk["choices"][0]["index"] = self.index
            yield chunk

    def give_up(self) -> None:
        """Compute no more of it."""
        self.seat.close()


class ChatJob(Job):
    """An answer of a chat, whose parts are told apart. `is_old` where it calls functions as OpenAI's API had them before tools."""

    def __init__(self, seat: Seat, index: int, ask: Callable[[], Any], open_splitter: Callable[[], Splitter], *, is_old: bool) -> None:
        super().__init__(seat, index, ask, is_first=index == 0)
        self._open_splitter, self._is_old = open_splitter, is_old

    def whole(self) -> Chunk:
        """Return the answer in one piece."""
        answer = super().whole()
        split_answer(answer, self._open_splitter())
        return _as_functions(answer, "message") if self._is_old else answer

    def _numbered(self, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        found = split_chunks(chunks, self._open_splitter)
        return super()._numbered((_as_functions(chunk, "delta") for chunk in found) if self._is_old else found)


def _as_functions(answer: Chunk, name: str) -> Chunk:
    """Say a call as it was said before there were tools."""
    choice = answer["choices"][0]
    calls = choice[name].pop("tool_calls", None)
    if calls:
        choice[name]["function_call"] = calls[0]["function"]
    if choice["finish_reason"] == "tool_calls":
        choice["finish_reason"] = "function_call"
    return answer


# ---- how tokens are chosen ------------------------------------------------------------------------------------------

def _sampling(request: CompletionRequest | ChatRequest) -> dict[str, Any]:
    given = {name: getattr(request, name) for name in SAMPLING}
    return {name: _DEFAULTS[name] if value is None else value for name, value in given.items()}


def _bias(request: CompletionRequest | ChatRequest, n_vocab: int) -> dict[int, float] | None:
    if not request.logit_bias:
        return None
    try:
        bias = {int(token): value for token, value in request.logit_bias.items()}
    except ValueError:
        raise RequestError("logit_bias names tokens by their numbers.", "logit_bias") from None
    if not all(0 <= token < n_vocab for token in bias):
        raise RequestError(f"logit_bias names a token outside the vocabulary of {n_vocab:,}.", "logit_bias")
    return bias


def _check_schema(schema: Any, parameter: str) -> None:
    """Refuse a schema whose grammar would be of any size: the converter writes out what may be repeated."""
    parts = [schema]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            counts = [part.get(name) for name in ("minLength", "maxLength", "minItems", "maxItems")]
            counts += [int(count[:9]) for count in re.findall(r"[{,](\d+)", str(part.get("pattern", "")))]
            if any(isinstance(count, int | float) and count > MOST_REPEATED for count in counts):
                raise RequestError(f"The JSON schema lets something be repeated more than {MOST_REPEATED:,} times: lower it, or leave it "
                                   "out.", parameter)
            for most, least in (("maxLength", "minLength"), ("maxItems", "minItems")):
                n_most, n_least = (count if isinstance(count := part.get(name), int | float) else 0 for name in (most, least))
                if n_most - n_least > MOST_OPTIONAL:
                    raise RequestError(f"The JSON schema has {most} {n_most:,}, and llama.cpp takes {MOST_OPTIONAL:,} more than {least} at most: "
                                       "lower it, or leave it out.", parameter)
            parts += part.values()
        elif isinstance(part, list):
            parts += part


def _schema_grammar(schema: dict[str, Any] | None, parameter: str = "response_format") -> LlamaGrammar:
    _check_schema(schema, parameter)
    try:
        return LlamaGrammar.from_json_schema(json.dumps(schema if schema is not None else {"type": "object"}))
    except Exception as error:  # whatever llama_cpp's converter stumbles over in a schema
        raise RequestError(f"The JSON schema cannot be made into a grammar: {error}", parameter) from error


def _grammar(text: str | None, wanted: ResponseFormat | None = None) -> LlamaGrammar | None:
    if wanted is not None and wanted.type != "text":
        if text is not None:
            raise RequestError("grammar and response_format cannot be had together.", "grammar")
        if wanted.type == "json_schema" and (wanted.json_schema is None or wanted.json_schema.schema_ is None):
            raise RequestError("response_format json_schema needs json_schema.schema.", "response_format")
        return _schema_grammar(wanted.json_schema.schema_ if wanted.json_schema else wanted.schema_)
    return LlamaGrammar.from_string(text, verbose=False) if text is not None else None


# ---- plain completions ----------------------------------------------------------------------------------------------

def completion_jobs(request: CompletionRequest, open_seat: Callable[[], Seat], model: str) -> list[Job]:
    """Return the answers that are wanted: `n` of each prompt."""
    jobs: list[Job] = []
    grammar = _grammar(request.grammar)
    if request.stream and request.echo:
        raise RequestError("echo cannot be had with stream.", "echo")
    prompts = _prompts(request)
    if len(prompts) * (request.n or 1) > MOST_ANSWERS:
        raise RequestError(f"A request may ask for {MOST_ANSWERS} answers: send several.", "prompt")
    if request.echo and not all(isinstance(prompt, str) for prompt in prompts):
        raise RequestError("echo needs a prompt that is text, not tokens.", "echo")
    for prompt in prompts:
        for i in range(request.n or 1):
            seat = open_seat()
            arguments = _sampling(request)
            if i and arguments["seed"] is not None:
                arguments["seed"] += i  # or all of them would be the same
            jobs.append(Job(seat, len(jobs), _asking(
                seat.create_completion, prompt, suffix=request.suffix, max_tokens=_most(request.max_tokens), echo=request.echo,
                logprobs=request.logprobs, stream=request.stream, logit_bias=_bias(request, seat._n_vocab), grammar=grammar,
                model=model, **arguments), is_first=i == 0))
    return jobs


def _most(max_tokens: int | None) -> int | None:
    if max_tokens == 0:
        raise RequestError("max_tokens must be 1 or more; without it an answer ends with the context.", "max_tokens")
    return max_tokens


def _prompts(request: CompletionRequest) -> list[str | list[int]]:
    prompt = request.prompt
    if isinstance(prompt, str):
        found: list[Any] = [prompt]
    elif prompt and isinstance(prompt[0], int):
        found = [prompt]
    else:
        found = list(prompt)
    if not found or any(isinstance(text, list) and not text for text in found):
        raise RequestError("The prompt is empty.", "prompt")
    return found


def _asking(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[[], Any]:
    return lambda: function(*args, **kwargs)


# ---- chat -----------------------------------------------------------------------------------------------------------

def chat_jobs(request: ChatRequest, open_seat: Callable[[], Seat], model: str) -> list[Job]:
    """Return the answers that are wanted: `n` to the conversation."""
    use = _tool_use(request)
    if use.schema is not None:
        grammar: LlamaGrammar | None = _schema_grammar(use.schema, "tools")
    else:
        grammar = _grammar(request.grammar, request.response_format)
    most = _most(request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens)
    jobs: list[Job] = []
    for i in range(request.n or 1):
        seat = open_seat()
        template = template_of(seat)
        arguments = _sampling(request)
        if i and arguments["seed"] is not None:
            arguments["seed"] += i
        handler = (seat.chat_handler or seat._chat_handlers.get(seat.chat_format)
                   or llama_cpp.llama_chat_format.get_chat_completion_handler(seat.chat_format))
        kwargs = request.chat_template_kwargs or {}
        taken = sorted(kwargs.keys() & inspect.signature(handler).parameters.keys())
        if taken:
            raise RequestError(f"chat_template_kwargs is for the model's template, which has no {taken[0]!r} of its own: leave it out.",
                               "chat_template_kwargs")
        jobs.append(ChatJob(seat, i, _asking(
            handler, llama=seat, messages=[_message(message, template) for message in request.messages], tools=with_descriptions(use.tools, template) if use.tools else None,
            tool_choice="auto" if use.tools else None, max_tokens=most, stream=request.stream,
            logprobs=request.logprobs, top_logprobs=request.top_logprobs if request.top_logprobs is not None else 0,
            logit_bias=_bias(request, seat._n_vocab), grammar=grammar, model=model, **arguments,
            **({"reasoning_effort": request.reasoning_effort} if request.reasoning_effort else {}) | kwargs),
            splitting(seat, use.marks(request, template), tools_of(use.tools or []), is_free=grammar is None), is_old=use.is_old))
    return jobs


def _message(message: Message, template: str) -> dict[str, Any]:
    """Return a message as templates have it: text in one piece, and OpenAI's newer name of a role by its older one."""
    found = {name: value for name, value in message.model_dump(exclude_unset=True).items() if value is not None}  # templates ask what is there
    if isinstance(message.content, list):
        if any(part.get("type") not in ("text", "input_text") for part in message.content):
            raise RequestError("Messages may hold text only: pictures and sound are not understood here.", "messages")
        found["content"] = "\n".join(str(part.get("text", "")) for part in message.content)
    if found["role"] == "developer":
        found["role"] = "system"
    if found.get("content") is None:
        found["content"] = ""
    if not found.get("tool_calls", True):
        del found["tool_calls"]
    if isinstance(found.get("tool_calls"), list) and takes_objects(template):
        found["tool_calls"] = with_objects(found["tool_calls"])
    if isinstance(thought := found.get("reasoning_content"), str) and thought and marks_of(template, has_tools=False).is_harmony:
        found.setdefault("thinking", thought)
        if found.get("tool_calls") and found["content"]:  # gpt-oss's template takes one of them beside a call, and as a thought
            found["thinking"], found["content"] = f"{found['thinking']}\n\n{found['content']}", ""
    return found


@dataclass(frozen=True, slots=True)
class _ToolUse:
    """The tools of an answer; what it is held to where it must be a call: the arguments of the tool that is `named`, or a call of any."""

    tools: list[dict[str, Any]] | None = None
    schema: dict[str, Any] | None = None
    named: str | None = None
    is_old: bool = False
    most_calls: int | None = None

    def marks(self, request: ChatRequest, template: str) -> Marks:
        """Return what is to be told apart in the answer."""
        if self.schema is not None:
            return Marks(form=BARE if self.named is None else None, named=self.named)
        if request.response_format is not None and request.response_format.type != "text":
            return Marks()
        marks = marks_of(template, has_tools=self.tools is not None)
        if request.reasoning_format == "none":
            marks = Marks(form=marks.form, shown=marks.all)
        return replace(marks, most_calls=self.most_calls)


def _tool_use(request: ChatRequest) -> _ToolUse:
    tools, field, is_old = request.tools, "tool_choice", False
    choice: Any = request.tool_choice
    if request.functions and not tools:
        tools, field, is_old = [{"type": "function", "function": one} for one in request.functions], "function_call", True
        choice = request.function_call
        if isinstance(choice, dict):
            choice = {"type": "function", "function": choice}
    if not tools or choice == "none":
        if not tools and choice not in (None, "auto", "none"):
            raise RequestError(f"{field} asks for a tool, and there are no tools.", field)
        return _ToolUse()
    for tool in tools:
        _check_tool(tool, "functions" if is_old else "tools")
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        tools, choice = _allowed(tools, choice.get("allowed_tools"))
    if choice == "required" and len(tools) == 1:
        choice = {"type": "function", "function": {"name": tools[0]["function"]["name"]}}
    if choice not in (None, "auto", "required") and not isinstance(choice, dict):
        raise RequestError(f"{field} is 'auto' or 'none', or 'required' for tools, or names a function.", field)
    if choice in (None, "auto"):
        return _ToolUse(tools, is_old=is_old, most_calls=1 if is_old or request.parallel_tool_calls is False else None)
    if request.grammar is not None or (request.response_format is not None and request.response_format.type != "text"):
        raise RequestError(f"{field} that asks for a call cannot be had together with grammar or response_format.", field)
    if choice == "required":
        return _ToolUse(tools, _any_call(tools))
    named = choice.get("function")
    name = named.get("name") if isinstance(named, dict) else None
    schema = next((tool["function"]["parameters"] for tool in tools if tool["function"]["name"] == name), None)
    if schema is None:
        form = '{"name": NAME}' if is_old else '{"type": "function", "function": {"name": NAME}}'
        raise RequestError(f"{field} names a tool that is not among the tools: it is {form}.", field)
    return _ToolUse(tools, schema, name, is_old=is_old)


def _check_tool(tool: dict[str, Any], parameter: str) -> None:
    """Refuse what is no function, and have a schema for the arguments of one."""
    function = tool.get("function")
    if tool.get("type", "function") != "function":
        raise RequestError(f"A tool of type {tool['type']!r} is not known here: say it as a function.", parameter)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RequestError("A tool needs function.name." if parameter == "tools" else "A function needs a name.", parameter)
    parameters = function.get("parameters") or {"type": "object", "properties": {}}
    if not isinstance(parameters, dict):
        raise RequestError(f"The parameters of {function['name']!r} are no JSON schema.", parameter)
    _check_schema(parameters, parameter)
    function["parameters"] = parameters


def _allowed(tools: list[dict[str, Any]], allowed: Any) -> tuple[list[dict[str, Any]], str]:
    """Return the tools that may be called among those there are, and whether one must."""
    given = allowed if isinstance(allowed, dict) else {}
    wanted: Any = given.get("tools")
    wanted = wanted if isinstance(wanted, list) else []
    found = [tool for tool in tools if any(isinstance(one, dict) and isinstance(one.get("function"), dict)
                                           and one["function"].get("name") == tool["function"]["name"] for one in wanted)]
    if not found or len(found) != len(wanted) or given.get("mode") not in ("auto", "required"):
        raise RequestError("tool_choice.allowed_tools needs a mode, 'auto' or 'required', and tools that are among the tools.", "tool_choice")
    return found, given["mode"]


def _any_call(tools: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the JSON schema of a call of any of these tools. What a schema refers to stays at its root."""
    calls, shared = [], dict[str, dict[str, Any]]()
    for tool in tools:
        parameters = dict(tool["function"]["parameters"])
        for place in ("$defs", "definitions"):
            for name, definition in (parameters.pop(place, None) or {}).items():
                if shared.setdefault(place, {}).setdefault(name, definition) != definition:
                    raise RequestError(f"Two tools define {name!r} differently: name the tool that is meant as tool_choice.", "tool_choice")
        calls.append({"type": "object", "properties": {"name": {"const": tool["function"]["name"]}, "arguments": parameters},
                      "required": ["name", "arguments"]})
    return {"oneOf": calls, **shared}


# ---- several answers in one -----------------------------------------------------------------------------------------

def join(answers: list[Chunk], jobs: list[Job]) -> Chunk:
    """Return all choices of a request in one answer, with what they took together."""
    whole = answers[0]
    whole["choices"] = [choice for answer in answers for choice in answer["choices"]]
    whole["usage"] = usage(jobs)
    return whole


def usage(jobs: list[Job]) -> dict[str, Any]:
    """Return what a request took; a prompt counts once, however many answers there are to it."""
    found = [(job.seat.usage(), job.is_first) for job in jobs]
    n_answer = sum(one["completion_tokens"] for one, _ in found)
    prompts = [one for one, is_first in found if is_first]
    n_prompt = sum(one["prompt_tokens"] for one in prompts)
    return {"prompt_tokens": n_prompt, "completion_tokens": n_answer, "total_tokens": n_prompt + n_answer,
            "prompt_tokens_details": {"cached_tokens": sum(one["prompt_tokens_details"]["cached_tokens"] for one in prompts)}}


def last_chunk(first: Chunk, jobs: list[Job]) -> Chunk:
    """Return what a stream ends with where its usage was asked for."""
    return {name: first[name] for name in ("id", "object", "created", "model")} | {"choices": [], "usage": usage(jobs)}
