"""`gguf-pager run -- PROGRAM`: programs that know nothing of it are paged, others cost nothing, and nobody's set-up is hidden."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gguf_pager import environment
from gguf_pager.errors import PagerError
from gguf_pager.model import engine
from gguf_pager.pager import Options

OPEN = """
import sys
from llama_cpp import Llama
llm = Llama(sys.argv[1], n_ctx=64, n_threads=1, verbose=False)
llm.eval([1, 2, 3])
from gguf_pager.hooks import hooks
(pager,) = hooks.installed[-1].opened
print("paged", hooks.is_paged(llm), pager.arena_bytes, pager.options.io, pager.options.profile)
"""


def run(*arguments: str, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "gguf_pager", "run", *arguments], capture_output=True, text=True, timeout=120,
                          check=False, cwd=cwd, env={**os.environ, **variables})


def test_program_is_paged_without_a_change(zoo_model: Callable[..., Path]) -> None:
    path = str(zoo_model("qwen3moe"))
    done = run("--budget", "min", "--no-profile", "--io", "buffered", "--", sys.executable, "-c", OPEN, path)
    assert done.returncode == 0, done.stderr
    word, is_paged, least, io, profile = done.stdout.split()
    assert (word, is_paged, io, profile) == ("paged", "True", "buffered", "False")
    done = run("--", sys.executable, "-c", OPEN, path, GGUF_PAGER_BUDGET="100%")
    assert done.stdout.split()[1] == "True" and int(done.stdout.split()[2]) > int(least), done.stderr


LOOK_FIRST = """
import importlib, importlib.metadata, importlib.util, inspect, pkgutil, sys
assert "llama_cpp" not in sys.modules and importlib.metadata.version("llama_cpp_python")
spec = importlib.util.find_spec("llama_cpp")
assert spec.origin.endswith("__init__.py") and importlib.util.find_spec("llama_cpp.llama") and "llama_cpp" in {m.name for m in pkgutil.iter_modules()}
import llama_cpp
assert importlib.reload(llama_cpp) is llama_cpp and llama_cpp.Llama
assert type(llama_cpp.__loader__).__module__ == "importlib._bootstrap_external" or "frozen" in repr(type(llama_cpp.__loader__)), llama_cpp.__loader__
assert llama_cpp.__loader__ is llama_cpp.__spec__.loader and pkgutil.get_data("llama_cpp", "__init__.py") and inspect.getsource(llama_cpp)
from gguf_pager.hooks import hooks
assert len(hooks.installed) == 1, hooks.installed
"""

IN_A_THREAD = "import sys, threading\ndef work():\n    exec(PROGRAM, {})\nthread = threading.Thread(target=work); thread.start(); thread.join()"

FORKED = """
import os
child = os.fork()
if child == 0:
    exec(PROGRAM, {})
    sys.stdout.flush()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""

SPAWNED = """
import concurrent.futures, multiprocessing, sys
with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
    pool.submit(exec, "import sys; sys.argv[1:] = [%r]\\n" % sys.argv[1] + PROGRAM, {}).result()
"""


@pytest.mark.parametrize("way", [
    LOOK_FIRST + OPEN,
    f"PROGRAM = {OPEN!r}\n{IN_A_THREAD}",
    f"import sys\nPROGRAM = {OPEN!r}\n{FORKED}",
    f"PROGRAM = {OPEN!r}\n{SPAWNED}",
    "import gguf_pager; gguf_pager.Llama\n" + OPEN,
    "import gguf_pager.hooks, gguf_pager.llama\n" + OPEN,
    "import gguf_pager.model.engine as engine; engine.load()\n" + OPEN,
], ids=["looked for first", "in a thread", "forked", "spawned", "gguf_pager first", "its hooks first", "its engine first"])
def test_however_it_is_imported(way: str, zoo_model: Callable[..., Path]) -> None:
    done = run("--budget", "min", "--", sys.executable, "-c", way, str(zoo_model("qwen3moe")))
    assert done.returncode == 0 and done.stdout.startswith("paged True"), done.stderr


def test_what_is_paged_is_said_where_that_is_wanted(zoo_model: Callable[..., Path], dense_model: Path) -> None:
    path = zoo_model("qwen3moe")
    for words, variables in ((("--verbose",), {}), ((), {"GGUF_PAGER_VERBOSE": "1"})):
        done = run("--budget", "min", *words, "--", sys.executable, "-c", OPEN, str(path), **variables)
        assert done.returncode == 0 and f"gguf_pager: {path.name} is paged: " in done.stderr, done.stderr
    program = "import sys; from llama_cpp import Llama; Llama(sys.argv[1], n_ctx=64, verbose=False)"
    done = run("--verbose", "--", sys.executable, "-c", program, str(dense_model))
    assert done.returncode == 0 and "runs as stock llama.cpp" in done.stderr, done.stderr
    quiet = run("--budget", "min", "--", sys.executable, "-c", OPEN, str(path))
    assert quiet.returncode == 0 and "gguf_pager" not in quiet.stderr, quiet.stderr


def test_console_script_and_pytest_are_paged(zoo_model: Callable[..., Path], tmp_path: Path) -> None:
    body = "".join(f"    {line}\n" for line in OPEN.replace("sys.argv[1]", repr(str(zoo_model("qwen3moe")))).splitlines())
    (tmp_path / "test_it.py").write_text(f"def test_it():\n{body}    assert hooks.is_paged(llm)\n")
    pytest_script = Path(sys.executable).with_name("pytest")
    if not pytest_script.exists():
        pytest.skip("pytest is not installed beside this Python")
    done = run("--budget", "min", "--", str(pytest_script), "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path / "test_it.py"))
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr


def test_our_own_commands_say_themselves_what_is_paged() -> None:
    """What bench starts is compared with plain llama.cpp."""
    done = run("--", sys.executable, "-c", "import os, gguf_pager.cli, gguf_pager.llama\nfrom gguf_pager.hooks import hooks\n"
               "print(hooks.installed, os.environ['PYTHONPATH'])", PYTHONPATH="/kept")
    assert done.stdout.strip() == "[] /kept", done.stderr


@pytest.mark.parametrize(("words", "told"), [
    (("import llama_cpp",), "gguf-pager: "),
    (("try: import llama_cpp\nexcept Exception: print('went on')",), "gguf-pager: "),
    (("import threading\ndef work():\n    import llama_cpp\nthreading.Thread(target=work).start()",), "ImportError: gguf-pager: "),
])
def test_python_without_gguf_pager_says_so(words: tuple[str, ...], told: str, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "other")], check=True, timeout=60)
    (site,) = (tmp_path / "other" / "lib").glob("python*/site-packages")
    (site / "llama_cpp").symlink_to(engine.library_folder().parent)
    python = tmp_path / "other" / "bin" / "python"
    done = run("--", str(python), "-c", *words, cwd=tmp_path)
    assert f"{told}{python} cannot import gguf_pager: install gguf-pager for that Python, too." in done.stderr
    assert done.stdout == ""


def test_what_the_program_starts_is_paged_too(zoo_model: Callable[..., Path]) -> None:
    start = f"import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', {OPEN!r}, sys.argv[1]]).returncode)"
    done = run("--budget", "min", "--", sys.executable, "-c", start, str(zoo_model("qwen3moe")))
    assert done.returncode == 0 and done.stdout.startswith("paged True"), done.stderr


def test_program_without_llama_cpp_loads_nothing_of_ours() -> None:
    done = run("--", sys.executable, "-c", "import sys, json; print([name for name in sys.modules if name.split('.')[0] in ('gguf_pager', 'gguf', 'llama_cpp', 'ctypes')])")
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
    (("--", "no-such-program"), {}, "no-such-program cannot be run: No such file"),
    (("--", "python3.1"), {}, f"Activate its environment, or name it: gguf-pager run -- {sys.executable}"),
    (("--", __file__), {}, "A Python file is run by Python"),
    (("--", "true"), {"GGUF_PAGER_LOCK_DENSE": "never"}, "lock_dense 'never'"),
    (("--", "true"), {"GGUF_PAGER_READ_AHEAD": "maybe"}, "true or false"),
    (("--", sys.executable, "-I", "-c", ""), {}, "python -I starts without what pages"),
    (("--", sys.executable, "-OE", "x.py"), {}, "python -E starts"),
    (("--", sys.executable, "-B", "-SW", "error", "x.py"), {}, "python -S starts"),
])
def test_what_is_wrong_is_said_before_the_program_begins(arguments: tuple[str, ...], variables: dict[str, str], told: str) -> None:
    done = run(*arguments, **variables)
    assert done.returncode == 1 and told in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize(("arguments", "told"), [
    (("-n", "5", "--", "true"), "--n-predict says nothing to a program"),
    (("--json", "--", "true"), "--json says nothing"),
    (("-t", "2", "--budget", "min", "--", "true"), "--threads says nothing"),
    (("--budget", "min", "env", "FOO=1", "true"), "To run a program: gguf-pager run --budget min -- env FOO=1"),
])
def test_what_cannot_be_meant_is_a_wrong_usage(arguments: tuple[str, ...], told: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2 and told in " ".join(done.stderr.split()), done.stderr


@pytest.mark.parametrize("words", [("-c", "import sys; print(sys.argv[1:])", "-I"), ("-Werror", "-c", "print('-S')", "-E")])
def test_what_follows_the_program_is_not_pythons(words: tuple[str, ...]) -> None:
    done = run("--", sys.executable, *words)
    assert done.returncode == 0 and done.stdout, done.stderr


def test_wrong_environment_ends_a_program_that_would_go_on() -> None:
    program = "try: import llama_cpp\nexcept Exception: print('went on')"
    told = environment.with_autostart({**os.environ, "GGUF_PAGER_READ_AHEAD": "maybe"})
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False, env=told)
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.strip() == "gguf-pager: GGUF_PAGER_READ_AHEAD must be true or false, not 'maybe'."


def test_command_line_goes_before_the_environment() -> None:
    done = run("--profile", "--budget", "7GiB", "--mirror", "here", "--", sys.executable, "-c",
               "import os; print([os.environ.get('GGUF_PAGER_' + n) for n in ('PROFILE', 'BUDGET', 'MIRROR')])",
               GGUF_PAGER_PROFILE="false", GGUF_PAGER_BUDGET="1GiB")
    assert done.stdout.strip() == str([None, "7GiB", os.path.abspath("here")]), done.stderr


def test_prompt_that_begins_with_a_dash_is_still_one(zoo_model: Callable[..., Path]) -> None:
    done = run(str(zoo_model("qwen3moe")), "-n", "1", "--", "-- hello")
    assert "cannot be run" not in done.stderr and "hello" not in done.stderr, done.stderr


def test_options_come_back_as_they_were() -> None:
    given = {"policy": "lru", "io": "direct", "n_readers": 3, "piece_bytes": 4096, "read_ahead": False, "lock_dense": "copy",
             "mirror": ("/a b", "/c"), "profile": False, "adapt_threads": False, "overcommit": True}
    told = environment.with_settings({}, "5GiB", **given)
    assert environment.settings(told) == ("5GiB", given)
    assert environment.with_settings(told, "min", **dataclasses.asdict(Options())) == {"GGUF_PAGER_BUDGET": "min"}


def test_numbers_must_be_numbers() -> None:
    with pytest.raises(PagerError, match="GGUF_PAGER_READERS must be a number"):
        environment.settings({"GGUF_PAGER_READERS": "many"})
