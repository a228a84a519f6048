"""`gguf-pager run -- PROGRAM`: become a program whose llama_cpp is paged."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from gguf_pager import environment
from gguf_pager.errors import PagerError
from gguf_pager.memory.budget import parse_budget
from gguf_pager.pager import Options

_OPTIONS = {"policy": "policy", "io": "io", "readers": "n_readers", "look_ahead": "look_ahead", "mirror": "mirror", "profile": "profile",
            "adapt_threads": "adapt_threads", "overcommit": "overcommit"}
"""Options of the command that mean something to a program, and their names in `Options`."""

_IGNORING = "IES"
"""Options of Python with which it does not look at PYTHONPATH, or does not run sitecustomize."""

_TAKING_A_WORD = "cmWX"
"""Options of Python after which a value follows; -c and -m are the last."""


def run(command: list[str], given: dict[str, Any]) -> NoReturn:
    """Become a program, in an environment in which llama_cpp is paged in all Python programs.

    Raises:
        PagerError: what is asked for does not exist, or cannot be paged; said here, not in the middle of the program.
    """
    _refuse_what_means_nothing()
    paging = {name: given[option] for option, name in _OPTIONS.items()}
    paging["mirror"] = tuple(os.path.abspath(path) for path in paging["mirror"])  # the program may be in another folder by then
    told = environment.with_settings(os.environ, given["budget"], **paging)
    if given["verbose"]:
        told[environment.VERBOSE] = "true"
    budget, options = environment.settings(told)
    parse_budget(budget)
    Options(**options)
    _refuse_isolated_python(command)
    try:
        os.execvpe(command[0], command, environment.with_autostart(told))
    except OSError as error:
        raise PagerError(f"{command[0]} cannot be run: {error.strerror}.{_remedy(command[0], error)}") from None


def forgotten_dashes(words: Sequence[str]) -> str | None:
    """Return what to say to somebody who has left out the two dashes; None where that is not it.

    Words of a prompt are programs, too: time, yes. So nothing after a model counts.
    """
    for at, word in enumerate(words):
        if os.path.exists(word) or ":" in word:
            return None
        if not word.startswith("-") and not word.endswith(".gguf") and shutil.which(word):
            return f"To run a program: gguf-pager run {' '.join([*words[:at], '--', *words[at:at + 2]])}"
    return None


def _refuse_what_means_nothing() -> None:
    """Say that an option is no use here, which would otherwise be taken for granted."""
    context = click.get_current_context()
    for parameter in context.command.params:
        name = parameter.name or ""
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE and name not in (*_OPTIONS, "budget", "verbose"):
            raise click.UsageError(f"{max(parameter.opts, key=len)} says nothing to a program: set that in the program itself.")


def _refuse_isolated_python(command: list[str]) -> None:
    if not re.fullmatch(r"python[\d.]*t?|pypy[\d.]*", os.path.basename(command[0])):
        return
    for word in command[1:]:
        if not re.match("-[a-zA-Z]", word):
            return
        letters = re.split(f"[{_TAKING_A_WORD}]", word[1:])[0]
        for letter in letters:
            if letter in _IGNORING:
                raise PagerError(f"python -{letter} starts without what pages: leave it out, or let the program itself call "
                                 "gguf_pager.install().")
        if set(word) & set("cm"):
            return


def _remedy(name: str, error: OSError) -> str:
    if isinstance(error, FileNotFoundError) and re.fullmatch(r"python[\d.]*", name):
        return f" Activate its environment, or name it: gguf-pager run -- {sys.executable}"
    if name.endswith(".py") and os.path.isfile(name):
        return f" A Python file is run by Python: gguf-pager run -- python {name}"
    return ""
