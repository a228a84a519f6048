"""What a process may not have, or has to share its stacks with: the pager opens, or its error names what is missing."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Model = Callable[..., Path]

ARGUMENTS = "n_ctx=64, n_batch=16, n_ubatch=16, n_threads=1, n_threads_batch=1, verbose=False, budget='min'"

DECODE = f"""
import sys, gguf_pager
for io in sys.argv[2:]:
    llm = gguf_pager.Llama(sys.argv[1], io=io, {ARGUMENTS})
    llm.eval(list(range(5, 21)))
    print(llm.pager.stats().bytes_read > 0)
    llm.close()
"""


# ---- stacks ----

@pytest.mark.parametrize("n_kilobytes", [1, 245, 250, 1024])
def test_static_thread_local_storage_of_others_leaves_threads_their_stacks(
    zoo_model: Model, tmp_path: Path, n_kilobytes: int
) -> None:
    """The C library takes it out of every thread's stack."""
    compiler = shutil.which(os.environ.get("CC") or "gcc") or shutil.which("cc")
    if compiler is None or platform.system() != "Linux":
        pytest.skip("there is no C compiler, or no LD_PRELOAD")
    source, library = tmp_path / "storage.c", tmp_path / "storage.so"
    source.write_text(f"__thread char storage[{n_kilobytes} * 1024];\n"
                      "char *storage_at(int i) { return storage + i; }\n")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True, timeout=60)
    done = subprocess.run([sys.executable, "-c", DECODE, str(zoo_model("qwen3moe")), "buffered", "auto"], text=True,
                          env={**os.environ, "LD_PRELOAD": str(library)}, capture_output=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "True\nTrue\n"), done.stderr


# ---- limits ----

UNDER_A_LIMIT = f"""
import os, resource, sys, gguf_pager
from gguf_pager.pager import Pager
open_freely = Pager.open

def open_under_limit(self, n_slots):
    what = sys.argv[2]
    if what == "threads":
        if os.getuid() == 0:  # whom no limit holds
            os.setresuid(65534, 65534, 65534)
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    elif what == "descriptors":
        first_free = os.dup(0)
        os.close(first_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (first_free, first_free))
    else:
        used = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGESIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + int(what), used + int(what)))
    open_freely(self, n_slots)

Pager.open = open_under_limit
try:
    gguf_pager.Llama(sys.argv[1], io="buffered", {ARGUMENTS})
except gguf_pager.PagerError as error:
    print(type(error).__name__, error)
"""


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may read, as pytest's are not."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.mark.skipif(platform.system() != "Linux", reason="limits are set by what /proc says is used")
@pytest.mark.parametrize(("limit", "kind", "words"), [
    ("threads", "EngineError", ["thread", "Resource temporarily unavailable", "ulimit -u", "pids.max"]),
    ("descriptors", "EngineError", ["model.gguf", "Too many open files", "ulimit -n"]),
    ("0", "BudgetError", ["bytes for experts", "lower the budget", "ulimit -v"]),
])
def test_what_fails_while_the_pager_opens_is_named(
    zoo_model: Model, open_folder: Path, limit: str, kind: str, words: list[str]
) -> None:
    model = open_folder / "model.gguf"
    shutil.copy(zoo_model("qwen3moe"), model)
    done = subprocess.run([sys.executable, "-c", UNDER_A_LIMIT, str(model), limit], capture_output=True, text=True,
                          timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{kind} ") and all(word in done.stdout for word in words), done.stdout + done.stderr
    assert done.stdout.count("\n") == 1


ONE_DESCRIPTOR_LEFT = """
import os, resource, sys
from pathlib import Path
from gguf_pager import PagerError
from gguf_pager.model import engine
engine.load()
spare = os.open(sys.argv[1], os.O_RDONLY)  # the number of the only descriptor that is left below
os.close(spare)
resource.setrlimit(resource.RLIMIT_NOFILE, (spare + 1, spare + 1))
try:
    engine.read_header(Path(sys.argv[1]))
except PagerError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.skipif(platform.system() != "Linux", reason="elsewhere the header is opened by its name")
def test_header_that_there_is_no_descriptor_for_is_not_called_damaged(zoo_model: Model) -> None:
    done = subprocess.run([sys.executable, "-c", ONE_DESCRIPTOR_LEFT, str(zoo_model("qwen3moe"))], capture_output=True, text=True,
                          timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("EngineError ") and "Too many open files. Raise the limit on open files" in done.stdout, done.stdout
