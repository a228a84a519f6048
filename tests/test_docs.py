"""The README is true on the day: its first screen has the two commands, its table is made from recorded rows."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from serving import serving

import gguf_pager
from gguf_pager.cli import main
from gguf_pager.hooks import hooks

ROOT = Path(__file__).resolve().parent.parent


def test_first_screen_has_the_two_commands() -> None:
    first_screen = "\n".join((ROOT / "README.md").read_text().splitlines()[:40])
    for command in ("scripts/demo", "scripts/test"):
        assert command in first_screen
        assert (ROOT / command).stat().st_mode & 0o111, f"{command} is executable"


def test_speed_table_is_made_from_recorded_rows() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "scripts" / "speed_table.py"), "--check"], check=False)
    assert done.returncode == 0, "run scripts/speed_table.py"


def test_readme_names_every_argument_of_llama() -> None:
    from gguf_pager import Options

    readme = (ROOT / "README.md").read_text()
    for name in ("budget", *Options.__dataclass_fields__):
        assert f"`{name}`" in readme


def blocks(language: str) -> list[tuple[Path, str]]:
    """Return the examples in README.md and docs/, and where they stand."""
    found = [(path, block) for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
             for block in re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)]
    assert found
    return found


MODEL, BUDGET = re.compile(r"[\w./-]+\.gguf|\bMODEL\b"), re.compile(r'budget="[^"]+"')


ADDRESS = "http://127.0.0.1:8000"


@pytest.mark.parametrize(("path", "block"), [(path, block) for path, block in blocks("python") if ADDRESS in block])
def test_examples_of_clients_run(path: Path, block: str, small: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with serving(small, "--budget", "25%", "-c", "512") as server:
        exec(compile(block.replace(ADDRESS, server.url), str(path), "exec"), {})  # noqa: S102  our own examples
    assert capfd.readouterr().out


@pytest.mark.parametrize(("path", "block"), [(path, block) for path, block in blocks("python") if ADDRESS not in block])
def test_python_examples_run(path: Path, block: str, zoo_model: Callable[..., Path], capfd: pytest.CaptureFixture[str]) -> None:
    program = BUDGET.sub('budget="min"', MODEL.sub(str(zoo_model("qwen3moe")), block))
    try:
        exec(compile(program, str(path), "exec"), {})  # noqa: S102  our own examples
    finally:
        while hooks.installed:
            gguf_pager.uninstall()
    assert capfd.readouterr().out, "each of them prints something"


def commands() -> list[str]:
    lines = [line for _, block in blocks("sh") for line in block.splitlines()]
    return sorted({line.split("  #")[0].split(" > ")[0].strip() for line in lines if line.startswith("gguf-pager ")})


@pytest.mark.parametrize("line", commands())
def test_commands_in_examples_are_understood(line: str, trace_model: Path, tmp_path: Path) -> None:
    """Parsed to the end; those that take no time are run."""
    words = shlex.split(MODEL.sub(str(trace_model), line).replace("out.html", str(tmp_path / "out.html")))[1:]
    context = click.Context(main, **main.context_settings)  # click remembers the help option that it made first
    command = main.get_command(context, words[0])
    assert command is not None
    assert command.make_context(words[0], words[1:], parent=context).params
    if words[0] in ("inspect", "doctor", "completion"):
        assert CliRunner().invoke(main, words).exit_code == 0


def test_links_in_documents_lead_somewhere() -> None:
    n_links = 0
    for path in (ROOT / "README.md", ROOT / "benchmarks" / "README.md", ROOT / "findings" / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
            if not target.startswith(("http://", "https://")):
                assert (path.parent / target).exists(), f"{path.name}: {target}"
                n_links += 1
    assert n_links > 20


def test_readme_is_for_somebody_in_a_hurry() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    assert "docs/speed.svg" in "\n".join(lines[:12])


def test_tests_that_the_table_of_troubles_names_exist() -> None:
    """The last column: `test_file: part of a name`, further parts of names, or a file alone."""
    tests, named, file = Path(__file__).parent, 0, ""
    for line in (tests.parent / "docs" / "troubleshooting.md").read_text().splitlines():
        if not line.startswith("| ") or line.startswith("| you see"):
            continue
        for words in re.findall(r"`([^`]+)`", line.rsplit(" | ", 1)[1]):
            if words.startswith("test_"):
                file, _, words = words.partition(": ")
            names = re.findall(r"^def (test_\w+)", (tests / f"{file}.py").read_text(), re.MULTILINE)
            assert any(words in name for name in names), f"{file}.py has no test with {words!r} in its name"
            named += 1
    assert named > 50
