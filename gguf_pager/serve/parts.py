"""What an answer consists of: what the model thinks, what it says, and which tools it calls; told apart while its text comes.

How a model marks them is read off its chat template. Text that has no marks passes unchanged.
"""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from gguf_pager.serve.calls import FORMS, Call, Form, Tools, from_bare_json, is_object, is_open

_THINKING = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"))
"""Qwen, DeepSeek, GLM, MiniMax, Kimi, Nemotron; Mistral's Magistral; Seed."""

_HARMONY = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>")
"""gpt-oss: https://cookbook.openai.com/articles/openai-harmony"""


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of an answer: text of one kind, or a call."""

    kind: Literal["reasoning", "content", "call"]
    text: str = ""
    call: Call | None = None


class Splitter(Protocol):
    """Takes an answer's text as it comes. What may be a part of a mark is held back until it is known."""

    def feed(self, text: str) -> list[Part]:
        """Return what is known after more text has come."""
        ...

    def end(self) -> list[Part]:
        """Return the rest: no more text comes."""
        ...


@dataclass(frozen=True, slots=True)
class Marks:
    """How a model marks the parts of its answers.

    `shown` are marks that stay in the text, `named` is a tool whose arguments are the whole answer; of calls come `most_calls`, the first.
    """

    thinking: tuple[str, str] | None = None
    form: Form | None = None
    is_harmony: bool = False
    shown: tuple[str, ...] = ()
    named: str | None = None
    most_calls: int | None = None

    @property
    def all(self) -> tuple[str, ...]:
        """All marks: some are control tokens, whose text is not part of an answer otherwise."""
        form = self.form
        found = [*self.shown, *(self.thinking or ()), *(_HARMONY if self.is_harmony else ())]
        if form is not None:
            found += [form.begin, *form.inner, *([form.end] if form.end else [])]
        return tuple(found)


BARE = Form("", None, from_bare_json)
"""An answer that is a call as a whole."""


def marks_of(template: str, *, has_tools: bool) -> Marks:
    """Return how a model marks what it writes, by its chat template. Calls are looked for only where there are tools."""
    if "<|channel|>" in template and "<|message|>" in template:
        return Marks(is_harmony=True)
    thinking = next((pair for pair in _THINKING if pair[0] in template or pair[1] in template), None)
    form = next((form for form in FORMS if form.is_of(template)), BARE) if has_tools else None
    return Marks(thinking, form)


def splitter(marks: Marks, prompt_end: str, tools: Tools) -> Splitter:
    """Return what tells an answer's parts apart. Where a prompt ends with the mark of thinking, the answer begins with it."""
    if marks.named is not None:
        return _Arguments(marks.named)
    is_thinking = marks.thinking is not None and prompt_end.rstrip().endswith(marks.thinking[0])
    found = _Harmony() if marks.is_harmony else _Marked(marks, tools, is_thinking=is_thinking)
    return found if marks.most_calls is None else _Few(found, marks.most_calls)


class Answering(Protocol):
    """Who answers: gguf_pager.serve.seat.Seat."""

    def show(self, marks: Sequence[str]) -> None:
        """Have marks in the text of the answer."""
        ...

    def prompt_end(self) -> str:
        """Return the last of the prompt, once it is known."""
        ...


def splitting(seat: Answering, marks: Marks, tools: Tools, *, is_free: bool = True) -> Callable[[], Splitter]:
    """Return what opens a splitter for the answer. One that a grammar holds does not begin in the middle of a thought."""
    seat.show(marks.all)
    return lambda: splitter(marks, seat.prompt_end() if is_free else "", tools)


class _Arguments:
    """An answer that a grammar holds to the arguments of a tool."""

    def __init__(self, name: str) -> None:
        self._name, self._text = name, ""

    def feed(self, text: str) -> list[Part]:
        self._text += text
        return []

    def end(self) -> list[Part]:
        text = self._text.strip()
        return _called([Call(self._name, text)]) if is_object(text) else _said("content", self._text)


class _Few:
    """Another splitter's parts, without the calls that are too many."""

    def __init__(self, split: Splitter, most_calls: int) -> None:
        self._split, self._n_left = split, most_calls

    def feed(self, text: str) -> list[Part]:
        return self._few(self._split.feed(text))

    def end(self) -> list[Part]:
        return self._few(self._split.end())

    def _few(self, parts: list[Part]) -> list[Part]:
        found = []
        for part in parts:
            self._n_left -= part.call is not None
            if part.call is None or self._n_left >= 0:
                found.append(part)
        return found


class _Marked:
    """Thoughts first, then text and calls between marks."""

    def __init__(self, marks: Marks, tools: Tools, *, is_thinking: bool) -> None:
        self._thinking, self._form, self._tools = marks.thinking, marks.form, tools
        self._step = self._think if is_thinking else self._begin
        self._text = self._spaces = ""
        self._n_seen = 0  # of a call's text: so far it has not ended
        self._is_after = is_thinking  # a mark, and spaces there are no text of the answer

    def feed(self, text: str) -> list[Part]:
        self._text += text
        found: list[Part] = []
        while self._step(found):
            pass
        return found

    def end(self) -> list[Part]:
        found: list[Part] = []
        while self._step == self._call:
            assert self._form is not None
            calls = self._form.calls(self._text, self._tools, has_end=False)
            if calls is not None:
                return found + _called(calls)
            self._take_back(found)
            found += self.feed("")
        text = self._text
        if self._step == self._think:
            return _said("reasoning", text.rstrip())
        calls = self._form.calls(text.strip(), self._tools) if self._form is BARE and self._step == self._begin else None
        return _called(calls) if calls is not None else found + _said("content", text.lstrip() if self._is_after else text)

    def _begin(self, _: list[Part]) -> bool:
        """What comes first; false: that is not known yet."""
        start, thinking = self._text.lstrip(), self._thinking
        if thinking is not None and start.startswith(thinking[0]):
            self._text, self._step, self._is_after = start[len(thinking[0]) :], self._think, True
            return True
        if not start or (thinking is not None and thinking[0].startswith(start)):
            return False
        if self._form is BARE and (_BARE_BEGINS.match(start) or _PYTHON.startswith(start) or start.startswith(_PYTHON)):
            return False  # as a whole it is a call, or none
        self._step = self._speak
        return True

    def _think(self, found: list[Part]) -> bool:
        assert self._thinking is not None
        text, mark, rest = self._text.partition(self._thinking[1])
        if self._is_after:
            text = text.lstrip()
        if not mark:
            text, self._text = _without_what_may_be(self._thinking[1], text)
        if said := _said("reasoning", text.rstrip() if mark else text):
            self._is_after = False
            found += said
        if mark:
            self._text, self._thinking, self._step, self._is_after = rest, None, self._begin, True
        return bool(mark)

    def _speak(self, found: list[Part]) -> bool:
        text, mark, rest = self._text.partition(self._form.begin) if self._form and self._form.begin else (self._text, "", "")
        if self._is_after:
            text = text.lstrip()
        if mark:
            n_said = len(text.rstrip())
            self._spaces, text, self._text, self._step = text[n_said:], text[:n_said], rest, self._call
        elif self._form is not None and self._form.begin:
            text, self._text = _without_what_may_be(self._form.begin, text)
        else:
            self._text = ""
        if said := _said("content", text):
            self._is_after = False
            found += said
        return bool(mark)

    def _call(self, found: list[Part]) -> bool:
        assert self._form is not None
        mark = self._form.end
        if mark is None:
            return False
        n_inner = self._text.find(mark, self._n_seen)
        if n_inner < 0:
            self._n_seen = max(0, len(self._text) - len(mark) + 1)
            return False
        text = self._text[:n_inner]
        calls = self._form.calls(text, self._tools)
        if calls is not None:
            found += _called(calls)
            self._text, self._n_seen, self._step, self._is_after = self._text[n_inner + len(mark) :], 0, self._speak, True
        elif is_open(text):
            self._n_seen = n_inner + len(mark)
        else:
            self._take_back(found)
        return True

    def _take_back(self, found: list[Part]) -> None:
        """Go on behind a mark of calls that was text."""
        assert self._form is not None
        found += _said("content", self._spaces + self._form.begin)
        self._n_seen, self._step, self._is_after = 0, self._speak, False


def _called(calls: Sequence[Call]) -> list[Part]:
    return [Part("call", call=call) for call in calls]


_BARE_BEGINS = re.compile(r"\{|\[\s*(?:\{|$)")
_PYTHON = "<|python_tag|>"


def _said(kind: Literal["reasoning", "content"], text: str) -> list[Part]:
    return [Part(kind, text)] if text else []


def _without_what_may_be(mark: str, text: str) -> tuple[str, str]:
    """Cut off a text's end that may be the beginning of a mark, and the spaces before it, which belong to the mark if it is."""
    n_held = next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)
    n_kept = len(text[: len(text) - n_held].rstrip())
    return text[:n_kept], text[n_kept:]


_LONGEST = max(map(len, _HARMONY))


class _Harmony:
    """gpt-oss: messages with a header each, which says the channel and who it is for."""

    _MARK = re.compile("|".join(re.escape(mark) for mark in _HARMONY))

    def __init__(self) -> None:
        self._text = ""
        self._n_seen = 0  # so far there is no mark
        self._header: str | None = ""  # None: in a message
        self._has_begun = False
        self._kind: Literal["reasoning", "content", "call"] = "content"
        self._recipient = ""

    def feed(self, text: str) -> list[Part]:
        self._text += text
        found: list[Part] = []
        while match := self._MARK.search(self._text, self._n_seen):
            self._n_seen = 0
            before, self._text = self._text[: match.start()], self._text[match.end() :]
            self._take(before, match[0], found)
        if self._header is None and self._kind != "call":
            n_held = max((n for mark in _HARMONY for n in range(1, len(mark)) if self._text.endswith(mark[:n])), default=0)
            n_kept = len(self._text) - n_held
            found += _said(self._kind, self._text[:n_kept])
            self._text = self._text[n_kept:]
        self._n_seen = max(0, len(self._text) - _LONGEST + 1)
        return found

    def _take(self, before: str, mark: str, found: list[Part]) -> None:
        """Go on by a mark, and what stood before it."""
        self._has_begun = True
        if self._header is None:
            found += self._message(before)
            self._header = ""
        else:
            self._header += before
        if mark == "<|message|>":
            self._open()
        elif mark in ("<|channel|>", "<|constrain|>"):
            self._header += mark
        elif mark == "<|start|>":
            self._header = ""

    def _open(self) -> None:
        header = self._header or ""
        channel = re.search(r"<\|channel\|>\s*(\w+)", header)
        recipient = re.search(r"\bto=([^\s<]+)", header)
        self._header = None
        self._recipient = recipient[1] if recipient else ""
        if self._recipient.startswith("functions."):
            self._kind = "call"
        else:
            self._kind = "reasoning" if channel is not None and channel[1] == "analysis" else "content"

    def _message(self, text: str) -> list[Part]:
        if self._kind != "call":
            return _said(self._kind, text)
        arguments = text.strip() or "{}"  # of a tool that takes none
        if not is_object(arguments):
            return _said("content", text)
        return _called([Call(self._recipient.removeprefix("functions."), arguments)])

    def end(self) -> list[Part]:
        text, self._text = self._text, ""
        return self._message(text) if self._header is None or not self._has_begun else []  # without any header it is what the model says


# ---- as OpenAI's clients have it --------------------------------------------------------------------------------------------

_ID_CHARACTERS = string.ascii_letters + string.digits


def _call_id() -> str:
    """Return a name for a call: nine letters and digits, because Mistral's templates refuse any other."""
    return "".join(secrets.choice(_ID_CHARACTERS) for _ in range(9))


def _as_openai(call: Call) -> dict[str, Any]:
    return {"id": call.id or _call_id(), "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _reason(reason: str | None, n_calls: int) -> str | None:
    return "tool_calls" if reason == "stop" and n_calls else reason


def split_answer(answer: dict[str, Any], split: Splitter) -> None:
    """Tell apart what a chat completion of llama_cpp has as one text, in place."""
    choice = answer["choices"][0]
    message = choice["message"]
    if "tool_calls" in message:  # the chat format has done it
        return
    parts = split.feed(message["content"] or "") + split.end()
    texts = {kind: "".join(part.text for part in parts if part.kind == kind) for kind in ("reasoning", "content")}
    calls = [_as_openai(part.call) for part in parts if part.call is not None]
    message["content"] = texts["content"] or (None if calls else "")
    if texts["reasoning"]:
        message["reasoning_content"] = texts["reasoning"]
    if calls:
        message["tool_calls"] = calls
    choice["finish_reason"] = _reason(choice["finish_reason"], len(calls))


def split_chunks(chunks: Iterator[dict[str, Any]], open_splitter: Callable[[], Splitter]) -> Iterator[dict[str, Any]]:
    """Yield chat completion chunks of llama_cpp with the parts of their text told apart. The splitter is opened once there is text."""
    split: Splitter | None = None
    n_calls = 0
    for chunk in chunks:
        choice = chunk["choices"][0]
        is_last = choice["finish_reason"] is not None
        if not is_last and "content" not in choice["delta"]:
            yield chunk
            continue
        split = split or open_splitter()
        deltas: list[dict[str, Any]] = []
        for part in split.feed(choice["delta"].get("content") or "") + (split.end() if is_last else []):
            if part.call is not None:
                deltas.append({"tool_calls": [{"index": n_calls, **_as_openai(part.call)}]})
                n_calls += 1
            else:
                deltas.append({"reasoning_content" if part.kind == "reasoning" else "content": part.text})
        if choice["logprobs"] is not None and not deltas:
            deltas.append({"content": ""})
        for i, delta in enumerate(deltas):
            yield {**chunk, "choices": [{**choice, "delta": delta, "logprobs": None if i else choice["logprobs"], "finish_reason": None}]}
        if is_last:
            yield {**chunk, "choices": [{**choice, "delta": {}, "logprobs": None, "finish_reason": _reason(choice["finish_reason"], n_calls)}]}
