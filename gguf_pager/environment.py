"""Paging by environment: what GGUF_PAGER_BUDGET and its kin say, for programs that know nothing of it."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf_pager.errors import PagerError
from gguf_pager.pager import Options

PREFIX = "GGUF_PAGER_"
VERBOSE = f"{PREFIX}VERBOSE"
AUTOSTART = Path(__file__).parent / "autostart"
"""The folder whose sitecustomize.py a program finds first that is started so."""

_BOOLEANS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
_FIELDS = {field.name: field for field in dataclasses.fields(Options)}
_NAMES = {name: PREFIX + {"n_readers": "readers"}.get(name, name).upper() for name in _FIELDS}
"""Each option's variable: its name on the command line, where it has one there."""


def with_settings(environment: Mapping[str, str], budget: str, **options: Any) -> dict[str, str]:
    """Return an environment that says this; of these options, what is as by default is not in it."""
    found = {**environment, f"{PREFIX}BUDGET": budget}
    for name, value in options.items():
        if value == _FIELDS[name].default:
            found.pop(_NAMES[name], None)
        else:
            found[_NAMES[name]] = os.pathsep.join(map(str, value)) if isinstance(value, tuple) else str(value).lower()
    return found


def settings(environment: Mapping[str, str] = os.environ) -> tuple[str, dict[str, Any]]:
    """Return the budget and the options that an environment sets.

    Raises:
        PagerError: a value that does not exist.
    """
    options = {name: _value(name, environment[variable]) for name, variable in _NAMES.items() if variable in environment}
    return environment.get(f"{PREFIX}BUDGET", "auto"), options


def _value(name: str, text: str) -> Any:
    default = _FIELDS[name].default
    if name == "look_ahead" and text.lower() == "auto":
        return "auto"
    if name == "look_ahead" and text.lower() not in _BOOLEANS:
        raise PagerError(f"{_NAMES[name]} must be auto, true or false, not {text!r}.")
    if isinstance(default, bool) or name == "look_ahead":
        return _boolean(_NAMES[name], text)
    if name == "mirror":
        return tuple(part for part in text.split(os.pathsep) if part)
    if name in ("n_readers", "piece_bytes"):
        try:
            return int(text)
        except ValueError:
            raise PagerError(f"{_NAMES[name]} must be a number, not {text!r}.") from None
    return text


def _boolean(name: str, text: str) -> bool:
    if text.lower() not in _BOOLEANS:
        raise PagerError(f"{name} must be true or false, not {text!r}.")
    return _BOOLEANS[text.lower()]


def install() -> None:
    """Page what llama_cpp opens in this process, as the environment says, and show the log if it says so.

    Raises:
        PagerError: a value that does not exist.
    """
    import gguf_pager

    budget, options = settings()
    if _boolean(VERBOSE, os.environ.get(VERBOSE, "false")):
        # A descriptor of our own, because llama_cpp points 2 at /dev/null while it loads.
        handler = logging.StreamHandler(os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace"))
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        log = logging.getLogger("gguf_pager")
        log.addHandler(handler)
        log.setLevel(logging.INFO)
    gguf_pager.install(budget, **options)


def with_autostart(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which Python programs are paged, and those that they start."""
    path = environment.get("PYTHONPATH")
    return {**environment, "PYTHONPATH": os.pathsep.join([str(AUTOSTART), *([path] if path else [])])}
