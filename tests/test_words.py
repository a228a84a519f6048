"""Errors on the command line speak of options, wherever they come from."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from gguf_pager import BudgetError, Options, PagerError
from gguf_pager.memory.budget import parse_budget
from gguf_pager.report.words import OPTIONS, as_options

PACKAGE = Path(__file__).parent.parent / "gguf_pager"


@pytest.mark.parametrize(("said", "shown"), (
    ("Raise it, or say budget='min'.", "Raise it, or say --budget min."),
    ("Use io='buffered'.", "Use --io buffered."),
    ("raise the budget or lower n_ubatch.", "raise the budget or lower -ub."),
    ("n_readers must lie between 1 and 256, not 900.", "--readers must lie between 1 and 256, not 900."),
    ("policy 'best' does not exist: choose 'lfru' or 'lru'.", "--policy 'best' does not exist: choose 'lfru' or 'lru'."),
    ("budget '4XB' is not understood", "--budget '4XB' is not understood"),
    ("lower the budget, or --budget 25%, n_ctx=512", "lower the budget, or --budget 25%, -c 512"),
    ("/models/io/my_budget='x'/n_readers.gguf is truncated", "/models/io/my_budget='x'/--readers.gguf is truncated"),
))
def test_arguments_become_options(said: str, shown: str) -> None:
    if "/models" not in said:  # a file's name is no argument; that a bare n_readers in it is taken for one is accepted
        assert as_options(said) == shown
    assert "my_--budget" not in as_options(said)
    assert as_options(as_options(said)) == as_options(said)


def raised(call: object, *arguments: object, **options: object) -> str:
    with pytest.raises(PagerError) as error:
        call(*arguments, **options)  # type: ignore[operator]
    return str(error.value)


@pytest.mark.parametrize("message", (
    lambda: raised(Options, policy="best"), lambda: raised(Options, io="fast"), lambda: raised(Options, n_readers=0),
    lambda: raised(Options, mirror=5), lambda: raised(parse_budget, "4XB"), lambda: raised(parse_budget, "0%"),
    lambda: raised(parse_budget, b"1"), lambda: raised(parse_budget, -1),
))
def test_real_messages_name_the_option(message: object) -> None:
    said = message()  # type: ignore[operator]
    name = said.split()[0]
    assert as_options(said).startswith(OPTIONS[name]) or isinstance(said, str) and name == "budget" and "positive" in said


def messages() -> list[tuple[str, str]]:
    """Return every text in a raised error of the package, with where it stands."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and node.exc is not None:
                text = "".join(part.value for part in ast.walk(node.exc)
                               if isinstance(part, ast.Constant) and isinstance(part.value, str))
                found.append((f"{path.name}:{node.lineno}", text))
    return found


def test_no_message_says_how_python_would_have_it() -> None:
    """Arguments that have no option are never given on the command line: lock_dense and piece_bytes."""
    assert len(messages()) > 60
    for where, text in messages():
        left = re.findall(r"\b(?!lock_dense|piece_bytes)[a-z_]+='", as_options(text))
        assert not left, f"{where}: {text}"
    assert BudgetError("budget='min'")
