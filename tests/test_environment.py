"""`gguf-pager run -- PROGRAM`: programs that know nothing of it are paged, others cost nothing, and nobody's set-up is hidden."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gguf_pager import environment
from gguf_pager.errors import PagerError

OPEN = """
import sys
from llama_cpp import Llama
llm = Llama(sys.argv[1], n_ctx=64, n_threads=1, verbose=False)
llm.eval([1, 2, 3])
from gguf_pager.hooks import hooks
(pager,) = hooks.installed[-1].opened
print("paged", hooks.is_paged(llm), pager.arena_bytes, pager.options.io, pager.options.profile)
"""


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "gguf_pager", "run", *arguments], capture_output=True, text=True, timeout=120,
                          check=False, env={**os.environ, **variables})


def test_program_is_paged_without_a_change(zoo_model: Callable[..., Path]) -> None:
    path = str(zoo_model("qwen3moe"))
    done = run("--budget", "min", "--no-profile", "--io", "buffered", "--", sys.executable, "-c", OPEN, path)
    assert done.returncode == 0, done.stderr
    word, is_paged, least, io, profile = done.stdout.split()
    assert (word, is_paged, io, profile) == ("paged", "True", "buffered", "False")
    done = run("--", sys.executable, "-c", OPEN, path, GGUF_PAGER_BUDGET="100%")
    assert done.stdout.split()[1] == "True" and int(done.stdout.split()[2]) > int(least), done.stderr


def test_what_the_program_starts_is_paged_too(zoo_model: Callable[..., Path]) -> None:
    start = f"import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', {OPEN!r}, sys.argv[1]]).returncode)"
    done = run("--budget", "min", "--", sys.executable, "-c", start, str(zoo_model("qwen3moe")))
    assert done.returncode == 0 and done.stdout.startswith("paged True"), done.stderr


def test_program_without_llama_cpp_loads_nothing_of_ours() -> None:
    done = run("--", sys.executable, "-c", "import sys, json; print([name for name in sys.modules if 'gguf' in name or 'llama' in name])")
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_exit_code_and_arguments_are_the_programs() -> None:
    done = run("--", sys.executable, "-c", "import sys; print(sys.argv[1:]); sys.exit(7)", "--budget", "-h", "--")
    assert done.returncode == 7 and done.stdout.strip() == "['--budget', '-h', '--']"


def test_own_sitecustomize_runs_as_well(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.is_customized = __file__\n")
    done = run("--", sys.executable, "-c", "import sys; print(sys.is_customized)", PYTHONPATH=str(tmp_path))
    assert done.stdout.strip() == str(tmp_path / "sitecustomize.py"), done.stderr


def test_missing_llama_cpp_is_said_by_python_itself(tmp_path: Path) -> None:
    done = run("--", sys.executable, "-c", "import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p]\n"
               "try: import llama_cpp\nexcept ModuleNotFoundError as error: print(error)")
    assert done.stdout.strip() == "No module named 'llama_cpp'", done.stderr


@pytest.mark.parametrize(("arguments", "variables", "told"), [
    (("--budget", "nonsense", "--", "true"), {}, "is not understood"),
    (("--", "no-such-program"), {}, "cannot be run"),
    (("--", sys.executable, "-c", "import llama_cpp"), {"GGUF_PAGER_LOCK_DENSE": "never"}, "lock_dense 'never'"),
    (("--", sys.executable, "-c", "try: import llama_cpp\nexcept Exception: pass"), {"GGUF_PAGER_READ_AHEAD": "maybe"}, "true or false"),
])
def test_what_is_wrong_ends_the_program(arguments: tuple[str, ...], variables: dict[str, str], told: str) -> None:
    done = run(*arguments, **variables)
    assert done.returncode == 1 and told in done.stderr and "Traceback" not in done.stderr


def test_prompt_that_begins_with_a_dash_is_still_one(zoo_model: Callable[..., Path]) -> None:
    done = run(str(zoo_model("qwen3moe")), "-n", "1", "--", "-- hello")
    assert "cannot be run" not in done.stderr and "hello" not in done.stderr, done.stderr


def test_options_come_back_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"policy": "lru", "io": "direct", "n_readers": 3, "piece_bytes": 4096, "read_ahead": False, "lock_dense": "copy",
             "mirror": ("/a b", "/c"), "profile": False, "adapt_threads": False, "overcommit": True}
    for name, value in environment.variables("5GiB", **given).items():
        monkeypatch.setenv(name, value)
    assert environment.settings() == ("5GiB", given)


def test_numbers_must_be_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GGUF_PAGER_READERS", "many")
    with pytest.raises(PagerError, match="GGUF_PAGER_READERS must be a number"):
        environment.settings()
