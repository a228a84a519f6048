"""`gguf-pager run`: generate text, then say what it took."""

from __future__ import annotations

import importlib.metadata
import json
import os
import random
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from gguf_pager import __version__
from gguf_pager.cli import program
from gguf_pager.cli.model import GPU_LAYERS_OPTION, MODEL_OPTION, is_a_default, missing_model, model_named_twice
from gguf_pager.cli.opening import (
    CTX_STEP,
    DEFAULT_CTX,
    MOST_TOKENS,
    Opening,
    open_model,
    opens_model,
    take_opening,
    whole_steps,
)
from gguf_pager.doctor import physical_cores
from gguf_pager.errors import PagerError
from gguf_pager.memory import probe
from gguf_pager.pager import Stats
from gguf_pager.report import generation as shown

if TYPE_CHECKING:
    from gguf_pager.llama import Llama

_SPECIAL_TOKENS = 16
"""Room for tokens that stand for no byte of the prompt, such as the begin token."""

_PROGRAM = "gguf_pager.program"
"""Key of the program that is to be run, in click's context."""

_IN_QUOTES = 'A prompt of several words is one argument: put it into straight quotes, "like this".'


@dataclass(frozen=True, slots=True)
class _Settings:
    """The command's options, under click's names for them."""

    prompt: str | None
    file: IO[bytes] | None
    n_predict: int
    ctx_size: int | None
    temp: float
    top_k: int
    top_p: float
    seed: int
    chat: bool
    as_json: bool


def _check_n_predict(_: click.Context, __: click.Parameter, value: int) -> int:
    if value == 0 or value < -1:
        raise click.BadParameter("a number of tokens, or -1 for as many as the context holds")
    return value


class _Run(click.Command):
    """Says what to do about a prompt that the shell has taken apart."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if "--" in args:
            at = args.index("--")
            if args[at + 1:] and not self._names_a_model(ctx, args[:at]):
                ctx.meta[_PROGRAM], args = args[at + 1:], args[:at]
        try:
            return super().parse_args(ctx, list(args))
        except RuntimeError as error:  # what click makes of '-' where the shell has closed stdin
            if sys.stdin is not None:
                raise
            raise PagerError("The prompt is to come from stdin, but that is closed.") from error
        except click.UsageError as error:
            if "unexpected extra argument" not in error.message:
                raise
            hint = program.forgotten_dashes(args) or _IN_QUOTES
            raise click.UsageError(f"{error.message} {hint}", ctx) from None

    def _names_a_model(self, ctx: click.Context, args: list[str]) -> bool:
        try:
            values, _, _ = self.make_parser(ctx).parse_args(list(args))
        except click.UsageError:  # it is said when they are parsed in earnest
            return False
        return any(isinstance(values.get(name), str) for name in ("model", "model_option"))


@click.command(cls=_Run, context_settings={"auto_envvar_prefix": "GGUF_PAGER"})
@click.argument("model", required=False)
@click.argument("words", metavar="[PROMPT]", required=False)
@MODEL_OPTION
@click.option("-p", "--prompt", metavar="TEXT", help="The prompt.")
@click.option("-f", "--file", metavar="FILE", type=click.File("rb"),
              help="Read the prompt from a file, '-' for stdin; one newline at its end is dropped.")
@click.option("-n", "--n-predict", metavar="N", type=int, default=128, show_default=True, callback=_check_n_predict,
              help="Tokens to generate; -1 for as many as the context holds.")
@GPU_LAYERS_OPTION
@click.option("-c", "--ctx-size", metavar="N", type=click.IntRange(0, MOST_TOKENS),
              help=f"Context in tokens, in steps of {CTX_STEP}; 0 takes the model's own. "
                   f"[default: what the prompt and -n need, at most {DEFAULT_CTX}]")
@click.option("--temp", metavar="X", type=float, default=0.8, show_default=True,
              help="Temperature; 0 takes the likeliest token.")
@click.option("--top-k", metavar="N", type=int, default=40, show_default=True, help="Sample among this many tokens.")
@click.option("--top-p", metavar="X", type=float, default=0.95, show_default=True,
              help="Sample among the tokens of this probability together.")
@click.option("-s", "--seed", metavar="N", type=click.IntRange(-1, 2**32 - 1), default=-1, show_default=True,
              help="Seed of the sampler; -1 for a random one.")
@click.option("--chat", is_flag=True, help="Put the prompt into the model's chat template, as the user's message.")
@opens_model
@click.option("--json", "as_json", is_flag=True, help="Print statistics and text as one JSON object.")
def run(model: str | None, words: str | None, model_option: Path | None, **given: Any) -> None:
    """Generate text from a prompt within a memory budget.

    \b
    gguf-pager run MODEL "Once upon a time"
    gguf-pager run MODEL --chat "Why is the sky blue?"
    gguf-pager run --budget 8GiB -- python anything.py

    The last one runs a Python program that uses llama-cpp-python, and pages what it opens, and what the programs open that it
    starts. The options that say how to page go before the --; the model, threads and text are the program's business.

    The text goes to stdout as it comes; the last line, on stderr, gives the speed of the answer (without the prompt) and
    of the prompt, how many of the experts wanted were in memory, megabytes read per token, the share of the time spent
    waiting for the disk, and peak memory.

    With --json stdout holds one JSON object and nothing else, "text" among its keys; while it is generated, the text
    goes to stderr.
    """
    command = click.get_current_context().meta.get(_PROGRAM)
    if command is not None:
        program.run(command, given)
    if model_option is not None and is_a_default(click.get_current_context(), "model_option") and words is not None:
        model_option = None
    path, words = _take_words(model, words, model_option)
    opening = take_opening(given, path)
    settings = _Settings(**given)
    prompt = _read_prompt(settings, words)
    seed = settings.seed if settings.seed >= 0 else random.randrange(1 << 32)
    begun = time.monotonic()
    llm = open_model(opening, _context_size(settings, prompt))
    try:
        load_s = time.monotonic() - begun
        generation = _generate(llm, settings, prompt, seed, shown.Progress(opening.progress))
        facts = shown.run_facts(_facts(llm, opening, generation, load_s, seed), *generation.phases(),
                                 probe.process_memory().peak_bytes)
        hint = shown.run_hint(facts, llm.pager, probe.memory())
    finally:
        llm.close()
    if settings.as_json:
        click.echo(json.dumps(facts))
    else:
        if hint is not None:
            click.echo(hint, err=True)
        click.echo(shown.run_line(facts), err=True)
    if generation.finish_reason == "interrupt":
        raise KeyboardInterrupt


def _take_words(first: str | None, second: str | None, model: Path | None) -> tuple[Path, str | None]:
    """Return the model and the prompt among the arguments: with -m there is no model among them."""
    if model is not None:
        if second is not None:
            raise model_named_twice()
        return model, first
    if first is None:
        raise missing_model()
    return Path(first), second


def _read_prompt(settings: _Settings, words: str | None) -> str:
    given = [way for way in (words, settings.prompt, settings.file) if way is not None]
    if not given:
        raise click.UsageError('What is the prompt? gguf-pager run MODEL "Once upon a time", or -f FILE.')
    if len(given) > 1:
        raise click.UsageError(f"The prompt is given twice. {_IN_QUOTES}")
    text = words if settings.prompt is None else settings.prompt
    try:
        raw = settings.file.read().removesuffix(b"\n") if settings.file else os.fsencode(text or "")
    except OSError as error:
        raise PagerError(f"The prompt cannot be read: {error.strerror}.") from None
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise PagerError(f"The prompt is not UTF-8 text: {error.reason} at byte {error.start}.") from None


def _context_size(settings: _Settings, prompt: str) -> int:
    """Return the context to ask for. A token is at least a byte, so the prompt's bytes bound its tokens."""
    if settings.ctx_size is not None:
        return whole_steps(settings.ctx_size)
    if settings.chat or settings.n_predict < 0:  # templates add text of any length
        return DEFAULT_CTX
    needed = len(prompt.encode()) + _SPECIAL_TOKENS + settings.n_predict
    return min(DEFAULT_CTX, whole_steps(needed))


class _Generation:
    """Text, time and counters of one run. It is the stopping criterion, too, which is asked once per token."""

    def __init__(self, llm: Llama) -> None:
        self.text = ""
        self.finish_reason: str | None = None
        self._llm = llm
        self._begun = self._first = self._last = self._mark(self._stats())

    def _stats(self) -> Stats | None:
        return self._llm.pager.stats() if self._llm.pager else None

    def _mark(self, stats: Stats | None = None) -> shown.Mark:
        return shown.Mark(time.monotonic(), int(self._llm.n_tokens), stats)

    def __call__(self, *_: Any) -> bool:
        """Note a token; it is chosen but not computed yet. After the last one the question comes twice."""
        if self._first is self._begun:
            self._first = self._last = self._mark(self._stats())
        elif self._llm.n_tokens > self._last.n_tokens:
            self._last = self._mark()  # counters of many layers take a while: they are asked for at the end
        return False

    def phases(self) -> tuple[shown.Phase, shown.Phase]:
        """Return the prompt, whose computation yields the first token, and the decoding of those after it."""
        last = replace(self._last, stats=self._stats())
        return shown.Phase(self._begun, self._first), shown.Phase(self._first, last)


def _generate(llm: Llama, settings: _Settings, prompt: str, seed: int, progress: shown.Progress) -> _Generation:
    """Stream the text; a Ctrl-C ends it early, with finish reason "interrupt"."""
    import llama_cpp

    text, arguments = _apply_template(llm, prompt) if settings.chat else (prompt, {})
    tokens = text if isinstance(text, list) else llm.tokenize(text.encode(), add_bos=True, special=True)
    _check_room(llm, settings, len(tokens))
    generation = _Generation(llm)
    stream = iter(llm.create_completion(
        text, max_tokens=settings.n_predict, temperature=settings.temp, top_k=settings.top_k, top_p=settings.top_p,
        seed=seed, stream=True, stopping_criteria=llama_cpp.StoppingCriteriaList([generation]), **arguments,
    ))
    try:
        with progress.during(lambda: _prompt_progress(llm, len(tokens))):
            chunk = next(stream, None)
        while chunk is not None:
            choice = chunk["choices"][0]
            generation.text += choice["text"]
            generation.finish_reason = choice["finish_reason"]
            click.echo(choice["text"].encode(), nl=False, err=settings.as_json)  # bytes: UTF-8 in any locale
            chunk = next(stream, None)
    except KeyboardInterrupt:
        generation.finish_reason = "interrupt"
    finally:
        if (sys.stderr if settings.as_json else sys.stdout).isatty() or _are_one_file(sys.stdout, sys.stderr):
            click.echo(err=settings.as_json)
    return generation


def _are_one_file(first: IO[str], second: IO[str]) -> bool:
    """Return whether both end up in the same place, so that the figures would stand on the text's last line."""
    try:
        return os.path.samestat(os.fstat(first.fileno()), os.fstat(second.fileno()))
    except OSError:  # one of them is no file at all
        return False


def _apply_template(llm: Llama, prompt: str) -> tuple[list[int], dict[str, Any]]:
    """Return the tokens of the prompt as a user's message, and what makes the model stop."""
    import jinja2
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    template = llm.metadata.get("tokenizer.chat_template")
    if template is None:
        raise PagerError("The model has no chat template: leave out --chat and write the whole prompt.")
    bos, eos = (llm.detokenize([token], special=True).decode() if token >= 0 else ""
                for token in (llm.token_bos(), llm.token_eos()))
    try:
        formatted = Jinja2ChatFormatter(template, eos, bos)(messages=[{"role": "user", "content": prompt}])
    except (jinja2.TemplateError, ValueError) as error:
        raise PagerError(f"The model's chat template cannot be applied: {error}.") from error
    tokens = llm.tokenize(formatted.prompt.encode(), add_bos=not formatted.added_special, special=True)
    return tokens, {"stop": formatted.stop}


def _check_room(llm: Llama, settings: _Settings, n_prompt: int) -> None:
    n_ctx = llm.n_ctx()
    if n_prompt == 0:
        raise PagerError("The prompt is empty, and this model needs at least one token.")
    if n_prompt >= n_ctx:
        raise PagerError(f"The prompt has {n_prompt:,} tokens, the context only {n_ctx:,}: "
                         f"give -c {n_prompt + max(settings.n_predict, 1)}.")
    if n_prompt + settings.n_predict > n_ctx:
        click.echo(f"Only {n_ctx - n_prompt:,} tokens will be generated, then the context is full: "
                   f"give -c {n_prompt + settings.n_predict} for more.", err=True)


def _prompt_progress(llm: Llama, n_prompt: int) -> str:
    if llm.pager is None:
        return f"prompt: {llm.n_tokens:,} of {n_prompt:,} tokens"
    stats = llm.pager.stats()
    done = sum(layer.tokens for layer in stats.layers) / (len(stats.layers) * n_prompt)
    return f"prompt of {n_prompt:,} tokens: {min(done, 1):.0%}, {stats.bytes_read / 1e9:.2f} GB read"


def _facts(llm: Llama, opening: Opening, generation: _Generation, load_s: float, seed: int) -> dict[str, Any]:
    import llama_cpp

    pager = llm.pager
    return {
        "gguf_pager_version": __version__,
        "llama_cpp_python_version": importlib.metadata.version("llama_cpp_python"),
        "model": str(opening.model),
        "text": generation.text,
        "finish_reason": generation.finish_reason,
        "is_paged": pager is not None,
        "not_paged_reason": llm.not_paged_reason,
        "budget": opening.budget,
        "policy": pager.options.policy if pager else None,
        "io": ("direct" if pager.is_direct else "buffered") if pager else None,
        "n_readers": pager.options.n_readers if pager else None,
        "piece_bytes": pager.options.piece_bytes if pager else None,
        "profile": pager.options.profile if pager else None,
        "mirror": [str(path) for path in opening.mirror],
        "copies_bytes_read": list(pager.stats().copies) if pager else None,
        "n_threads": opening.threads or physical_cores(),
        "n_threads_last": pager.n_threads if pager else None,
        "n_ctx": llm.n_ctx(),
        "n_batch": llama_cpp.llama_n_batch(llm.ctx),
        "n_ubatch": llama_cpp.llama_n_ubatch(llm.ctx),
        "seed": seed,
        "load_s": load_s,
    }
