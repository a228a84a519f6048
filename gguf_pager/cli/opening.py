"""Opening a model from the command line: the options of every command that does, and what went wrong in one sentence."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from gguf_pager.cli.model import local_model
from gguf_pager.doctor import physical_cores
from gguf_pager.errors import BudgetError, PagerError, printable
from gguf_pager.memory import probe
from gguf_pager.memory.budget import auto_budget_bytes, fits_whole, format_bytes, full_arena_bytes, parse_budget
from gguf_pager.model.layout import read_layout
from gguf_pager.pager import Options
from gguf_pager.report import generation as shown

if TYPE_CHECKING:
    from gguf_pager.llama import Llama

DEFAULT_CTX = 4096
"""No larger context without being asked: its KV cache is taken from the budget."""

CTX_STEP = 256
"""llama.cpp rounds a context up to this, llama_cpp goes on with the number it was given: so they are kept equal."""

MOST_TOKENS = 2**31 - CTX_STEP
"""llama.cpp counts in 32 bits: more would be taken for a small number."""

MOST_THREADS = 512
"""GGML_MAX_N_THREADS of ggml.h."""

_WARN = 3
"""GGML_LOG_LEVEL_WARN of ggml.h. To llama_cpp 0.3.36 it is that of an error, which it prints also with verbose=False."""

_DEFAULT = Options()

_Command = TypeVar("_Command", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Opening:
    """How to open a model: the options, under click's names for them."""

    model: Path
    threads: int | None
    batch_size: int
    ubatch_size: int
    budget: str
    policy: str
    io: str
    readers: int | None
    mirror: tuple[Path, ...]
    look_ahead: Literal["auto"] | bool
    profile: bool
    adapt_threads: bool
    overcommit: bool
    verbose: bool
    progress: bool | None


LOOK_AHEAD: dict[str, Literal["auto"] | bool] = {"auto": "auto", "on": True, "off": False}


def _look_ahead(_: click.Context, __: click.Parameter, given: str) -> Literal["auto"] | bool:
    return LOOK_AHEAD[given]


LOOK_AHEAD_OPTION = click.option(
    "--look-ahead", type=click.Choice(list(LOOK_AHEAD)), default="auto", show_default=True, callback=_look_ahead,
    help="Read what the next layer will probably choose while a token passes this one; 'auto': where that is faster.")

_OPTIONS = (
    click.option("-t", "--threads", metavar="N", type=click.IntRange(1, MOST_THREADS),
              help="Threads that compute. [default: physical cores]"),
    click.option("-b", "--batch-size", metavar="N", type=click.IntRange(1, MOST_TOKENS), default=512, show_default=True,
              help="Prompt tokens per call of llama.cpp."),
    click.option("-ub", "--ubatch-size", metavar="N", type=click.IntRange(1, MOST_TOKENS), default=512, show_default=True,
              help="Prompt tokens computed at once."),
    click.option("--budget", metavar="SIZE", default="auto", show_default=True,
              help="Memory to use: '4GiB' for the whole process, '25%' of the experts, 'min', or 'auto'."),
    click.option("--policy", metavar="NAME", default=_DEFAULT.policy, show_default=True,
              help="Who leaves when a slot is needed: 'lfru' (uses per age) or 'lru'."),
    click.option("--io", type=click.Choice(["auto", "direct", "buffered"]), default=_DEFAULT.io, show_default=True,
              help="Read past the page cache or through it."),
    click.option("--readers", metavar="N", type=int,
              help="Reads of 512 KiB in flight at a time. [default: as measured for the device]"),
    click.option("--mirror", metavar="PATH", type=click.Path(path_type=Path), multiple=True,
              help="Another copy of the model, on another disk, that is read at the same time; may be given again. It is "
                   "compared by samples when it is opened."),
    LOOK_AHEAD_OPTION,
    click.option("--profile/--no-profile", default=_DEFAULT.profile, show_default=True,
              help="Keep how often each expert was chosen, and begin with the most used ones next time."),
    click.option("--adapt-threads/--no-adapt-threads", default=_DEFAULT.adapt_threads, show_default=True,
              help="Compute with fewer threads while other programs take the processors, where that is faster."),
    click.option("--overcommit", is_flag=True,
              help="Take the budget's word even where the machine seems to have less memory."),
    click.option("--verbose", is_flag=True, help="Show llama.cpp's own output and what is paged, on stderr."),
    click.option("--progress/--no-progress", default=None,
              help="Say on stderr what takes longer than a second. [default: when stderr is a terminal]"),
)


STATE_SIZE_OPTION = click.option("--state-size", metavar="SIZE", default="10GiB", show_default=True,
                                 help="Room for kept conversations; who was not used for longest goes.")


def state_bytes(text: str) -> int:
    """Return the bytes that --state-size means."""
    try:
        budget = parse_budget(text)
    except BudgetError:
        budget = None
    if budget is None or budget.kind != "bytes":
        raise PagerError(f"--state-size is a size such as 10GiB, not {text!r}.")
    return int(budget.value or 0)


def whole_steps(n_ctx: int) -> int:
    """Return a context of so many tokens, rounded up as llama.cpp does."""
    return -(-n_ctx // CTX_STEP) * CTX_STEP


def opens_model(function: _Command) -> _Command:
    """Give a command the options of `Opening`, but for the model."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def take_opening(given: dict[str, Any], model: Path) -> Opening:
    """Take those options out of all that a command was given."""
    return Opening(model, **{name: given.pop(name) for name in Opening.__dataclass_fields__ if name != "model"})


def open_model(opening: Opening, n_ctx: int, n_seq_max: int = 1) -> Llama:
    """Open a model, with a bar for what takes a while, and say on stderr what the user would not expect.

    `n_ctx` is of all sequences together.

    Raises:
        PagerError: with what to do about it.
    """
    if opening.verbose:
        logging.basicConfig(format="%(name)s: %(message)s")
        logging.getLogger("gguf_pager").setLevel(logging.INFO)
    opening = replace(opening, model=local_model(opening.model, opening.progress))
    memory, progress = probe.memory(), shown.Progress(opening.progress)
    with progress.bar(f"opening {printable(opening.model.name)}", lambda: _opening_bytes(opening, memory),
                      lambda: probe.process_memory().resident_bytes):
        llm = _open(opening, n_ctx, n_seq_max)
    if _holds_warnings(opening, n_seq_max):
        _warn_of_length(llm, n_ctx // n_seq_max)
    if llm.not_paged_reason:
        click.echo(f"Not paged: {llm.not_paged_reason}.", err=True)
    taken = _budget_taken(llm, opening, memory)
    if taken is not None:
        click.echo(taken, err=True)
    return llm


def _open(opening: Opening, n_ctx: int, n_seq_max: int) -> Llama:
    from gguf_pager import Llama

    n_threads = opening.threads or physical_cores()
    try:
        with _no_warnings() if _holds_warnings(opening, n_seq_max) else nullcontext():
            return Llama(
                str(opening.model), budget=opening.budget, policy=opening.policy, io=opening.io,
                n_readers=opening.readers, mirror=opening.mirror, profile=opening.profile,
                look_ahead=opening.look_ahead, adapt_threads=opening.adapt_threads, overcommit=opening.overcommit, n_ctx=n_ctx, n_seq_max=n_seq_max,
                n_batch=opening.batch_size, n_ubatch=opening.ubatch_size, n_threads=n_threads, n_threads_batch=n_threads,
                verbose=opening.verbose,
            )
    except MemoryError:
        raise PagerError("There is no memory for a context of that size: give a smaller -c or -b.") from None
    except PagerError:  # LayoutError is a ValueError, and says all there is
        raise
    except ValueError as error:  # what llama_cpp raises for a file or context that llama.cpp refuses
        hint = "" if opening.verbose else ". Run with --verbose to see llama.cpp's reason"
        raise PagerError(f"{str(error).rstrip('.')}{hint}.") from error


def _holds_warnings(opening: Opening, n_seq_max: int) -> bool:
    """Whether llama.cpp's warnings are held back: it compares the tokens of all sequences together with what a model was trained for."""
    return n_seq_max > 1 and not opening.verbose


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Let llama_cpp print no warning meanwhile."""
    from llama_cpp import _logger

    levels = _logger.GGML_LOG_LEVEL_TO_LOGGING_LEVEL
    before = levels[_WARN]
    levels[_WARN] = logging.DEBUG
    try:
        yield
    finally:
        levels[_WARN] = before


def _warn_of_length(llm: Llama, n_ctx: int) -> None:
    """Say in llama.cpp's place that conversations may be longer than what the model has learned."""
    n_train = int(llm._model.n_ctx_train())
    if n_ctx > n_train > 0:
        click.echo(f"The model was trained for {n_train:,} tokens, and may lose the thread in a context of {n_ctx:,}.", err=True)


def _opening_bytes(opening: Opening, memory: probe.Memory) -> int | None:
    """Return about how much becomes resident while the model opens; None where it cannot be opened, which is said later."""
    try:
        layout = read_layout(opening.model)
    except PagerError:
        return None
    fits = fits_whole(layout.tensor_bytes, memory.available_bytes, memory.total_bytes)
    is_whole = not layout.layers or (opening.budget == "auto" and fits)
    return layout.tensor_bytes if is_whole else layout.dense_bytes


def _budget_taken(llm: Llama, opening: Opening, memory: probe.Memory) -> str | None:
    """Say which budget was taken, and why, where nobody has set one."""
    if llm.pager is None or opening.budget != "auto":
        return None
    spare = auto_budget_bytes(memory.available_bytes, memory.total_bytes)
    share = llm.pager.arena_bytes / full_arena_bytes(llm.pager.needs)
    return (f"The model is larger than the memory that can be spared: of {format_bytes(memory.available_bytes)} free, "
            f"{format_bytes(spare)} are taken, and {share:.0%} of the experts stay in memory. --budget sets another size.")
