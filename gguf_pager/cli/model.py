"""MODEL, and what the fingers of llama.cpp's users type beside it: -m, -ngl."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from gguf_pager.model import names

_Command = TypeVar("_Command", bound=Callable[..., Any])


def model_named_twice() -> click.UsageError:
    """Return the error of a command that was given a model as an argument and another with -m."""
    return click.UsageError("The model is named twice, as an argument and with -m.")


def chosen_model(argument: Path | None, option: Path | None) -> Path | None:
    """Return the model that was named, as an argument or with -m; a UsageError where both are.

    One of the two ways is enough, and where there are two models nobody knows which is meant.
    """
    if argument is not None and option is not None:
        raise model_named_twice()
    return option if argument is None else argument


def is_a_default(context: click.Context, name: str) -> bool:
    """Return whether an option comes from the environment or from a config file, so that the command line goes before."""
    return context.get_parameter_source(name) in (click.core.ParameterSource.ENVIRONMENT, click.core.ParameterSource.DEFAULT_MAP)


MODEL_OPTION = click.option("-m", "--model", "model_option", metavar="MODEL", type=click.Path(path_type=Path), envvar="GGUF_PAGER_MODEL",
                            help="The model, as in llama.cpp's programs; or simply as the first argument.")


def takes_model(function: _Command) -> _Command:
    """Let a command take its MODEL as an argument or with -m."""
    return _with_model(function, is_required=True)


def may_take_model(function: _Command) -> _Command:
    """Likewise, of a command that does without one, too."""
    return _with_model(function, is_required=False)


def _with_model(function: _Command, *, is_required: bool) -> _Command:
    @click.argument("model", type=click.Path(path_type=Path), required=False)
    @MODEL_OPTION
    @functools.wraps(function)
    def taking(*args: Any, model: Path | None, model_option: Path | None, **given: Any) -> Any:
        if model is not None and is_a_default(click.get_current_context(), "model_option"):
            model_option = None
        chosen = chosen_model(model, model_option)
        if chosen is None and is_required:
            raise missing_model()
        return function(*args, model=chosen, **given)

    return taking  # type: ignore[return-value]


def missing_model() -> click.UsageError:
    """Return the error of a command that needs a model and was given none."""
    context = click.get_current_context()
    return click.UsageError(f"Which model? Name a GGUF file: {context.command_path} MODEL")


def local_model(model: Path, has_progress: bool | None = None) -> Path:
    """Return the file that MODEL means, downloaded if it has to be; say on stderr what was chosen where it leaves that open.

    Raises:
        PagerError: there is none, or it cannot be had.
    """
    found = names.find(model, has_bars=os.isatty(2) if has_progress is None else has_progress)
    if found.note is not None:
        click.echo(f"{found.note}.", err=True)
    return found.path


def _say_cpu_only(_: click.Context, __: click.Parameter, value: str | None) -> None:
    if value is not None and value != "0":
        click.echo(f"-ngl {value} is ignored: gguf-pager computes on the CPU only.", err=True)


GPU_LAYERS_OPTION = click.option("-ngl", "--n-gpu-layers", "--gpu-layers", metavar="N", expose_value=False,
                                 callback=_say_cpu_only, help="Taken and ignored: CPU only.")
