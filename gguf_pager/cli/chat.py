"""`gguf-pager chat`: a conversation in the terminal, which goes on tomorrow where it was."""

from __future__ import annotations

import io
import logging
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gguf_pager.cache import cache_folder
from gguf_pager.cli.model import GPU_LAYERS_OPTION, takes_model
from gguf_pager.cli.opening import (
    CTX_STEP,
    DEFAULT_CTX,
    MOST_TOKENS,
    STATE_SIZE_OPTION,
    open_model,
    opens_model,
    state_bytes,
    take_opening,
    whole_steps,
)
from gguf_pager.errors import PagerError, printable
from gguf_pager.memory import probe
from gguf_pager.memory.budget import format_bytes

if TYPE_CHECKING:
    from gguf_pager.pager import Stats
    from gguf_pager.serve.batcher import Batcher
    from gguf_pager.serve.conversations import Conversation
    from gguf_pager.serve.seat import Seat

_HELP = """\
/stats         how fast the last answer was, and what it took
/regenerate    answer the last message again
/system TEXT   tell the model what to be; without TEXT, show it
/new           begin a new conversation
/save NAME     keep this one under a name      /load NAME   go on with one
/exit          leave; so does Ctrl-D           Ctrl-C       ends an answer
A message of several lines: end a line with \\, or put it between two lines of \"\"\"."""

_FENCE = '"""'


@dataclass(frozen=True, slots=True)
class _Settings:
    """The command's own options, under click's names for them."""

    ctx_size: int
    n_predict: int
    temp: float
    top_k: int
    top_p: float
    seed: int | None
    system: str | None
    new: bool
    keep: bool
    state_dir: Path | None
    state_size: str


@click.command(context_settings={"auto_envvar_prefix": "GGUF_PAGER"})
@takes_model
@click.option("--system", metavar="TEXT", help="What the model shall be.")
@click.option("--new", is_flag=True, help="Begin a new conversation, instead of going on with the last one.")
@click.option("-n", "--n-predict", metavar="N", type=click.IntRange(-1), default=-1, show_default=True,
              help="Tokens of an answer at most; -1 for as many as the context holds.")
@GPU_LAYERS_OPTION
@click.option("-c", "--ctx-size", metavar="N", type=click.IntRange(0, MOST_TOKENS), default=DEFAULT_CTX, show_default=True,
              help=f"Context in tokens, in steps of {CTX_STEP}: all of the conversation must fit into it. 0 takes the model's own.")
@click.option("--temp", metavar="X", type=click.FloatRange(0), default=0.8, show_default=True,
              help="Temperature; 0 takes the likeliest token.")
@click.option("--top-k", metavar="N", type=click.IntRange(0), default=40, show_default=True, help="Sample among this many tokens.")
@click.option("--top-p", metavar="X", type=click.FloatRange(0, 1), default=0.95, show_default=True,
              help="Sample among the tokens of this probability together.")
@click.option("-s", "--seed", metavar="N", type=click.IntRange(0, 2**32 - 1), help="Seed of the sampler. [default: a random one]")
@click.option("--keep/--no-keep", default=True, show_default=True, help="Keep the conversation, to go on with it next time.")
@click.option("--state-dir", metavar="DIR", type=click.Path(path_type=Path), help="Where. [default: the user's cache folder]")
@STATE_SIZE_OPTION
@opens_model
def chat(model: Path, **given: Any) -> None:
    """Talk with a model.

    It goes on with the last conversation with this model, without computing it again. From a pipe, all that comes is one message, and
    the answer goes to stdout.
    """
    opening = take_opening(given, model)
    settings = _Settings(**given)
    most_bytes = state_bytes(settings.state_size)
    llm = open_model(opening, whole_steps(settings.ctx_size))
    from gguf_pager.saved import state_key
    from gguf_pager.serve.batcher import Batcher
    from gguf_pager.serve.states import States

    try:
        batcher = Batcher(llm, 1)
        try:
            folder, key = (_folder(settings) if settings.keep else None), ""
            if folder is not None:
                key = state_key(llm) or ""
                batcher.keeper = States(batcher, folder / "states", most_bytes, foreign_level=logging.INFO)
            talk = _Talk(batcher, settings, folder, key)
            if isinstance(sys.stdin, io.TextIOWrapper):
                sys.stdin.reconfigure(errors="replace")  # a message may hold bytes that are no text: a diff, say
            if sys.stdin is not None and sys.stdin.isatty():
                talk.loop()
            else:
                talk.answer_pipe()
        finally:
            batcher.close()
    finally:
        llm.close()


def _folder(settings: _Settings) -> Path | None:
    if settings.state_dir is not None:
        return settings.state_dir
    folder = cache_folder()
    return folder / "chat" if folder is not None else None


def _messages(n: int) -> str:
    return f"{n} message{'s' * (n != 1)} of yours"


class _Talk:
    """One conversation at the terminal, or the one that takes its place."""

    def __init__(self, batcher: Batcher, settings: _Settings, folder: Path | None, key: str) -> None:
        from gguf_pager.serve import conversations

        self._batcher, self._settings = batcher, settings
        self._kept = conversations
        self._folder = folder / "conversations" if folder is not None else None
        self._path = self._folder / f"last {key[:12]}.json" if self._folder is not None else None
        self._last = ""
        self.conversation: Conversation = conversations.Conversation()
        if self._path is not None and self._path.exists() and not settings.new:
            try:
                self.conversation = conversations.load(self._path)
            except PagerError as error:
                _say(str(error))
        if settings.system is not None:
            self.conversation.system = settings.system

    # ---- a terminal ----

    def loop(self) -> None:
        """Take messages and commands until the user leaves."""
        import readline  # noqa: F401  what makes input() a line editor

        n_turns = self.conversation.n_turns
        if n_turns:
            _say(f"Going on after {_messages(n_turns)}; /new begins another conversation, /help tells more.")
        else:
            _say("Ask something. /help tells what else there is.")
        while (text := _read_message()) is not None:
            if not text.strip():
                continue
            try:
                if text.startswith("/"):
                    if self._obey(text):
                        return
                else:
                    self._ask(text)
            except PagerError as error:
                is_full = getattr(error, "code", None) == "context_length_exceeded"
                _say(f"This is more than the context holds: {self._way_on()}." if is_full else f"Error: {error}")

    def _obey(self, line: str) -> bool:
        """Do what a command says; return whether it was the last."""
        word, _, rest = line[1:].strip().partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: _say(_HELP), "?": lambda _: _say(_HELP), "stats": lambda _: _say(self._last or "Nothing was answered yet."),
            "regenerate": self._regenerate, "system": self._system, "new": self._new, "clear": self._new, "save": self._save, "load": self._load,
        }
        if word in ("exit", "quit", "bye"):
            return True
        if word in commands:
            commands[word](rest.strip())
        else:
            _say(f"There is no /{word}. /help tells what there is.")
        return False

    def _regenerate(self, _: str) -> None:
        if self.conversation.take_back() is None:
            raise PagerError("There is no answer yet that could be given again.")
        self._answer()

    def _system(self, text: str) -> None:
        if text:
            self.conversation.system = text
            self._keep()
        _say(self.conversation.system or "The model was told nothing: /system TEXT tells it what to be.")

    def _new(self, _: str) -> None:
        self.conversation = self._kept.Conversation()
        self.conversation.system = self._settings.system
        self._keep()
        _say("A new conversation.")

    def _save(self, name: str) -> None:
        self._kept.save(self._named(name), self.conversation)
        _say(f"Kept as {name!r}.")

    def _load(self, name: str) -> None:
        self.conversation = self._kept.load(self._named(name))
        self._keep()
        _say(f"Going on with {name!r}, after {_messages(self.conversation.n_turns)}.")

    def _named(self, name: str) -> Path:
        if self._folder is None:
            raise PagerError("Nothing is kept with --no-keep.")
        if not name:
            known = [name for name in self._kept.names(self._folder) if not name.startswith("last ")]
            raise PagerError(f"Which name? There is {', '.join(known)}." if known else "Which name?")
        return self._kept.path_of(self._folder, name)

    # ---- a pipe ----

    def answer_pipe(self) -> None:
        """Answer what comes from stdin, all of it one message, in a conversation of its own."""
        if sys.stdin is None:
            raise PagerError("There is nothing to answer: stdin is closed.")
        text = sys.stdin.read().strip()
        if not text:
            raise PagerError("There is nothing to answer: stdin is empty.")
        self._path = None
        self.conversation = self._kept.Conversation()
        self.conversation.system = self._settings.system
        self._ask(text)

    # ---- answers ----

    def _ask(self, text: str) -> None:
        self.conversation.say("user", text)
        try:
            self._answer()
        except PagerError:
            self.conversation.messages.pop()  # it was not answered
            raise

    def _answer(self) -> None:
        """Write an answer as it comes. Ctrl-C ends it; what came stays part of the conversation."""
        from gguf_pager.serve.parts import marks_of, split_chunks, splitting
        from gguf_pager.serve.seat import Seat, checked
        from gguf_pager.serve.templates import template_of

        settings, seat = self._settings, Seat(self._batcher)
        chunks = checked(lambda: seat.create_chat_completion(
            self.conversation.messages, stream=True, temperature=settings.temp, top_k=settings.top_k, top_p=settings.top_p,
            seed=settings.seed, max_tokens=settings.n_predict if settings.n_predict > 0 else None, repeat_penalty=1.0))
        parts = split_chunks(chunks, splitting(seat, marks_of(template_of(seat), has_tools=False), {}))
        before, begun = self._stats(), time.monotonic()
        text, reason, is_thinking, is_interrupted = "", None, False, False
        try:
            for chunk in parts:
                delta, reason = chunk["choices"][0]["delta"], chunk["choices"][0]["finish_reason"]
                if (thought := delta.get("reasoning_content") or "") and not is_thinking:
                    _say("(thinking)")
                if (piece := delta.get("content") or "") and is_thinking:
                    _say("\n(answer)")
                is_thinking = bool(thought) or (is_thinking and not piece)
                click.echo(_dim(thought), nl=False, err=True)
                text += piece
                click.echo(piece, nl=False)
        except KeyboardInterrupt:
            is_interrupted = True
        finally:
            seat.close()
        click.echo()
        if is_interrupted:
            _say("(ended)")
        elif reason == "length":
            _say(self._cut_off(seat))
        self.conversation.say("assistant", text)
        self._keep()
        self._last = self._figures(seat, before, time.monotonic() - begun)
        if is_interrupted and not sys.stdin.isatty():
            raise KeyboardInterrupt

    def _cut_off(self, seat: Seat) -> str:
        """Say why an answer has no end."""
        answer = seat.answers[-1]
        if len(answer.prompt) + answer.n_generated >= self._batcher.n_ctx:
            return f"(the context is full: {self._way_on()})"
        return f"(ended after {answer.n_generated:,} tokens, as -n says)"

    def _way_on(self) -> str:
        return f"/new begins another conversation, or leave and come back with a larger one, -c {2 * self._batcher.n_ctx}"

    def _stats(self) -> Stats | None:
        pager = self._batcher.llm.pager
        return pager.stats() if pager is not None else None

    def _figures(self, seat: Seat, before: Stats | None, seconds: float) -> str:
        answer, after = seat.answers[-1], self._stats()
        n_known, n_prompt = answer.n_cached, len(answer.prompt)
        parts = [f"prompt of {n_prompt:,} tokens, {n_known:,} of them known already"]
        if answer.first_s is not None and answer.begun_s is not None:
            parts.append(f"first token after {answer.first_s - answer.asked_s:.1f} s")
            if answer.n_generated > 1 and answer.last_s is not None:
                parts.append(f"{(answer.n_generated - 1) / max(answer.last_s - answer.first_s, 1e-9):.1f} tok/s")
        if before is not None and after is not None:
            hits, misses = after.hits - before.hits, after.misses - before.misses
            if hits + misses:
                parts.append(f"{hits / (hits + misses):.0%} of the experts were in memory")
            parts.append(f"{(after.bytes_read - before.bytes_read) / 1e6:,.0f} MB read")
            parts.append(f"{(after.stall_ns - before.stall_ns) / 1e9 / max(seconds, 1e-9):.0%} of the time waiting for the disk")
        parts.append(f"{format_bytes(probe.process_memory().resident_bytes)} of memory")
        parts.append(f"{n_prompt + answer.n_generated:,} of {self._batcher.n_ctx:,} tokens of the context used")
        return ", ".join(parts)

    def _keep(self) -> None:
        if self._path is not None:
            self._kept.save(self._path, self.conversation)


def _read_message() -> str | None:
    """Return what the user says, of one line or several; None when he leaves."""
    lines: list[str] = []
    is_fenced = False
    while True:
        try:
            line = input("... " if lines or is_fenced else "> ")
        except EOFError:
            click.echo(err=True)
            return "\n".join(lines) if lines else None
        except KeyboardInterrupt:
            click.echo(err=True)
            if not lines and not is_fenced:
                _say("Ctrl-D leaves.")
            lines, is_fenced = [], False
            continue
        if line.strip() == _FENCE:
            if is_fenced:
                return "\n".join(lines)
            is_fenced = True
        elif is_fenced:
            lines.append(line)
        elif line.endswith("\\"):
            lines.append(line[:-1])
        else:
            return "\n".join([*lines, line])


def _say(text: str) -> None:
    """Say something that is no part of the conversation, within the width of the terminal."""
    width = max(20, shutil.get_terminal_size().columns - 1)
    shown = "\n".join(textwrap.fill(printable(line), width, subsequent_indent="  ", drop_whitespace=False) for line in text.split("\n"))
    click.echo(_dim(shown), err=True)


def _dim(text: str) -> str:
    """Return text that is no part of the conversation as a terminal shows it."""
    return text if "NO_COLOR" in os.environ or not text else click.style(text, dim=True)
