"""The command line where its streams are closed, full, or a pipe that nobody reads; and where names are no text."""

from __future__ import annotations

import errno
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import gguf_pager

Model = Callable[..., Path]

COMMANDS = ["run", "run --json", "inspect", "doctor", "energy", "bench", "--help", "--version"]

LINUX = pytest.mark.skipif(platform.system() != "Linux", reason="needs /dev/full and /proc")


def arguments_of(command: str, model: Path) -> list[str]:
    more = {"run": ["-p", "hello", "-n", "3", "-t", "1", "--budget", "min"], "inspect": [],
            "bench": ["--budget", "min", "--cap", "none", "--baseline", "none", "--warm", "--idle", "0", "-p", "8",
                      "-n", "4", "-r", "1", "-t", "1"]}
    first, *options = command.split()
    return [first, *([str(model), *more[first]] if first in more else []), *options]


def execute(command: str, model: Path, redirection: str) -> subprocess.CompletedProcess[str]:
    line = f'"$@" {redirection}'
    return subprocess.run(["bash", "-c", line, "bash", sys.executable, "-m", "gguf_pager", *arguments_of(command, model)],
                          capture_output=True, text=True, timeout=120, check=False)


@LINUX
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("redirection", "number"), [(">&-", errno.EBADF), (">/dev/full", errno.ENOSPC)])
def test_stdout_that_takes_nothing_is_an_error_in_one_line(
    zoo_model: Model, command: str, redirection: str, number: int
) -> None:
    done = execute(command, zoo_model("qwen3moe"), redirection)
    assert done.returncode == 1
    assert done.stderr.endswith(f"Error: Standard output cannot be written to: {os.strerror(number)}.\n"), done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


@LINUX
@pytest.mark.parametrize("command", ["run", "doctor", "--version"])
def test_both_streams_closed_leave_an_exit_code(zoo_model: Model, command: str) -> None:
    assert execute(command, zoo_model("qwen3moe"), ">&- 2>&-").returncode == 1


@LINUX
@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full"])
def test_stderr_that_takes_nothing_costs_the_figures_and_no_text(zoo_model: Model, redirection: str) -> None:
    model = zoo_model("qwen3moe")
    done = execute("run --json", model, redirection)
    assert done.returncode == 1 and json.loads(done.stdout)["finish_reason"] == "length"
    assert execute("inspect", model, redirection).returncode == 0, "which has nothing to say there"


@LINUX
@pytest.mark.parametrize("command", ["run", "inspect", "bench", "--help"])
def test_pipe_that_nobody_reads_ends_a_command_in_silence(zoo_model: Model, command: str) -> None:
    done = execute(command, zoo_model("qwen3moe"), "| true; exit ${PIPESTATUS[0]}")
    if done.returncode == 0:
        pytest.skip("all was written before the reader was gone")
    assert done.returncode == 141
    assert "Error" not in done.stderr and "Traceback" not in done.stderr and "Exception" not in done.stderr


@LINUX
def test_first_line_of_a_command_is_had_without_complaint(zoo_model: Model) -> None:
    done = execute("inspect", zoo_model("qwen3moe"), "| head -1")
    assert done.stdout and done.stderr == ""


@LINUX
def test_report_that_cannot_be_written_is_an_error_in_one_line(zoo_model: Model) -> None:
    done = execute("bench --report /dev/full", zoo_model("qwen3moe"), "")
    assert done.returncode == 1 and "Error: [Errno 28] No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


# ---- names that are no text ----

NAMED = """
import ctypes, mmap, os, sys
ctypes.CDLL(None).prctl(15, b"caf\\xc3", 0, 0, 0)  # PR_SET_NAME, cut amid a letter
for name in (b"caf\\xe9", b"a\\rVmRSS: x\\xc2\\x85 1 2 3 4 5 6 7", "separator \\u2028 1 2 3 4 5 6 7".encode()):
    path = os.path.join(os.fsencode(sys.argv[1]), name)
    with open(path, "wb+") as file:
        file.truncate(4096)
        kept = globals().setdefault("kept", []) + [mmap.mmap(file.fileno(), 4096)]
        globals()["kept"] = kept
"""

LIBRARY = NAMED + """
import gguf_pager
from gguf_pager.disk import device
from gguf_pager.memory import cap, probe
from pathlib import Path
with gguf_pager.Llama(sys.argv[2], budget="min", n_ctx=64, n_batch=16, n_threads=1, verbose=False)._stack:
    pass
print(probe.process_memory().resident_bytes > 0, probe.memory().total_bytes > 0, device.identify(Path(sys.argv[2])) is not None)
from gguf_pager.bench import worker
print(worker.storage_bytes() >= 0)
"""

COMMAND = NAMED + """
from gguf_pager.cli import main
main(sys.argv[3:])
"""

LOCALES = [{}, {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]


@LINUX
@pytest.mark.parametrize("locale", LOCALES, ids=["UTF-8", "ASCII"])
def test_names_that_are_no_text_do_not_matter(zoo_model: Model, tmp_path: Path, locale: dict[str, str]) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG"))} | locale
    model = str(zoo_model("qwen3moe"))

    def child(program: str, *arguments: str) -> str:
        done = subprocess.run([sys.executable, "-c", program, str(tmp_path), model, *arguments], capture_output=True,
                              text=True, errors="replace", timeout=120, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert child(LIBRARY) == "True True True\nTrue\n"
    for arguments in (["doctor", model], ["energy"], ["bench", model, *arguments_of("bench", Path(model))[2:]], ["inspect", model]):
        assert child(COMMAND, *arguments)


@LINUX
def test_model_whose_name_is_no_text_is_refused_with_a_sentence(zoo_model: Model, tmp_path: Path) -> None:
    """llama_cpp encodes the name as UTF-8: a UnicodeEncodeError."""
    model = os.path.join(os.fsencode(tmp_path), b"caf\xe9.gguf")
    os.link(zoo_model("qwen3moe"), model)
    with pytest.raises(gguf_pager.LayoutError, match="name that is no UTF-8"):
        gguf_pager.Llama(os.fsdecode(model), budget="min")


@LINUX
@pytest.mark.parametrize("locale", LOCALES, ids=["UTF-8", "ASCII"])
def test_model_in_a_folder_that_is_no_text_is_shown_by_numbers(
    zoo_model: Model, tmp_path: Path, locale: dict[str, str]
) -> None:
    folder = os.path.join(os.fsencode(tmp_path), b"caf\xe9")
    os.mkdir(folder)
    model = os.path.join(folder, b"model.gguf")
    shutil.copy(zoo_model("qwen3moe"), model)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG"))} | locale
    for command in ("inspect", "doctor"):
        done = subprocess.run([sys.executable, "-m", "gguf_pager", command, model], capture_output=True, timeout=60,
                              check=False, env=environment)
        assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr


def test_mount_whose_name_is_no_text_has_a_place_in_the_cache() -> None:
    from gguf_pager.disk.device import Device

    assert Device("disk", os.fsdecode(b"/mnt/caf\xe9")).cache_name != Device("disk", os.fsdecode(b"/mnt/caf\xe8")).cache_name


def test_what_the_kernel_says_is_read_in_one_place() -> None:
    """Path.read_text takes it for text."""
    package = Path(__file__).parent.parent / "gguf_pager"
    for path in package.rglob("*.py"):
        source = path.read_text("utf-8")
        if path.name != "cache.py":  # whose files are our own
            assert ".read_text()" not in source, path
