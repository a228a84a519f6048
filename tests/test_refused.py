"""Systems that refuse a way to read: io="auto" takes the other, io="direct" says why it cannot."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gguf_pager import _native

Model = Callable[..., Path]

pytestmark = pytest.mark.skipif(platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"),
                                reason="system calls are refused by a Linux filter, by their numbers")

_NUMBERS = {
    "x86_64": {"openat": 257, "statx": 332, "io_setup": 206, "io_submit": 209, "io_getevents": 208},
    "aarch64": {"openat": 56, "statx": 291, "io_setup": 0, "io_submit": 2, "io_getevents": 4},
}

CHILD = """
import json, sys
sys.path.insert(0, sys.argv[1])
import test_refused, gguf_pager
path, io, refused, number = sys.argv[2:]
llm = None
if refused:
    test_refused.refuse(refused.split(","), int(number))
try:
    llm = gguf_pager.Llama(path, budget="min", io=io, n_ctx=64, n_batch=16, n_ubatch=16, n_threads=1, verbose=False)
    llm.eval(list(range(5, 21)))
    print(json.dumps({"is_direct": llm.pager.is_direct, "bytes_read": llm.pager.stats().bytes_read,
                      "is_in_background": llm.pager.native().reads_in_background(),
                      "best": int(llm._ctx.get_logits_ith(-1)[0] * 1e6)}))
except gguf_pager.PagerIOError as error:
    print(json.dumps({"error": str(error), "errno": error.errno}))
"""


def refuse(calls: list[str], number: int) -> None:
    """Let the kernel answer these system calls of this process with an error; `openat` only with O_DIRECT."""
    load, equal, set_bits, answer = 0x20, 0x15, 0x45, 0x06  # BPF_LD|W|ABS; BPF_JMP|JEQ|K, BPF_JMP|JSET|K; BPF_RET|K
    number_at, third_argument_at, allow, with_error = 0, 32, 0x7FFF0000, 0x00050000 | number
    program: list[tuple[int, int, int, int]] = [(load, 0, 0, number_at)]
    for call in calls:
        program.append((equal, 0, 3 if call == "openat" else 1, _NUMBERS[platform.machine()][call]))
        if call == "openat":
            program += [(load, 0, 0, third_argument_at), (set_bits, 0, 1, os.O_DIRECT)]
        program.append((answer, 0, 0, with_error))
        program.append((load, 0, 0, number_at))
    program.append((answer, 0, 0, allow))

    class Instruction(ctypes.Structure):
        _fields_ = (("code", ctypes.c_uint16), ("if_true", ctypes.c_uint8), ("if_false", ctypes.c_uint8),
                    ("value", ctypes.c_uint32))

    class Program(ctypes.Structure):
        _fields_ = (("n_instructions", ctypes.c_ushort), ("instructions", ctypes.POINTER(Instruction)))

    filled = (Instruction * len(program))(*program)
    libc = ctypes.CDLL(None, use_errno=True)
    no_new_privileges, seccomp, filter_mode = 38, 22, 2
    assert libc.prctl(no_new_privileges, 1, 0, 0, 0) == 0
    assert libc.prctl(seccomp, filter_mode, ctypes.byref(Program(len(program), filled)), 0, 0) == 0, ctypes.get_errno()


def run(model: Path, io: str = "auto", refused: str = "", number: int = 0, **environment: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", CHILD, str(Path(__file__).parent), str(model), io, refused, str(number)],
                          capture_output=True, text=True, timeout=120, check=False, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def usual(zoo_model: Model) -> dict[str, Any]:
    """What comes of it where nothing is refused."""
    found = run(zoo_model("qwen3moe"))
    if not found["is_direct"]:
        pytest.skip("this file system does not read directly")
    return found


@pytest.mark.parametrize("number", [errno.EPERM, errno.EACCES, errno.EIO, errno.EINVAL])
def test_direct_reads_that_are_refused_are_buffered(zoo_model: Model, usual: dict[str, Any], number: int) -> None:
    found = run(zoo_model("qwen3moe"), refused="openat", number=number)
    assert not found["is_direct"] and found["bytes_read"] > 0 and found["best"] == usual["best"]


@pytest.mark.parametrize("number", [errno.EPERM, errno.EACCES, errno.EIO])
def test_direct_reads_that_were_asked_for_say_why_they_are_refused(
    zoo_model: Model, usual: dict[str, Any], number: int
) -> None:
    found = run(zoo_model("qwen3moe"), "direct", "openat", number)
    assert found["errno"] == number and f"{os.strerror(number)}. Use io='buffered'." in found["error"]


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS, errno.EACCES])
def test_alignment_that_the_system_will_not_tell_is_tried(zoo_model: Model, usual: dict[str, Any], number: int) -> None:
    for io in ("auto", "direct"):
        found = run(zoo_model("qwen3moe"), io, "statx", number)
        assert found["is_direct"] and found["best"] == usual["best"]


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS, errno.EAGAIN])  # the last: aio-max-nr is used up
@pytest.mark.parametrize("call", ["io_setup", "io_submit", "io_getevents"])
def test_queue_that_is_refused_is_replaced_by_threads(
    zoo_model: Model, usual: dict[str, Any], call: str, number: int
) -> None:
    found = run(zoo_model("qwen3moe"), "direct", call, number)
    assert found["is_direct"] and not found["is_in_background"] and found["best"] == usual["best"]


_FAILING_READS = """
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>
ssize_t pread(int fd, void *into, size_t bytes, off_t at) {
    if (fcntl(fd, F_GETFL) & O_DIRECT) { errno = EIO; return -1; }
    return syscall(SYS_pread64, fd, into, bytes, at);
}
ssize_t pread64(int fd, void *into, size_t bytes, off_t at) { return pread(fd, into, bytes, at); }
"""


def test_direct_reads_that_open_and_then_fail_are_buffered(
    zoo_model: Model, usual: dict[str, Any], tmp_path: Path
) -> None:
    compiler = shutil.which(os.environ.get("CC") or "gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    source, library = tmp_path / "reads.c", tmp_path / "reads.so"
    source.write_text(_FAILING_READS)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True, timeout=60)
    found = run(zoo_model("qwen3moe"), LD_PRELOAD=str(library))
    assert not found["is_direct"] and found["best"] == usual["best"]
    found = run(zoo_model("qwen3moe"), "direct", LD_PRELOAD=str(library))
    assert found["errno"] == errno.EIO


def test_file_system_in_memory_is_read_either_way(zoo_model: Model, usual: dict[str, Any]) -> None:
    """Of tmpfs it depends on the kernel whether it opens directly; it never reads in the background."""
    folder = Path("/dev/shm")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        pytest.skip("there is no /dev/shm to write to")
    copy = folder / f"gguf_pager-test-{os.getpid()}.gguf"
    try:
        shutil.copy(zoo_model("qwen3moe"), copy)
        found = run(copy)
        assert found["best"] == usual["best"] and found["bytes_read"] > 0
        try:
            _native.file_alignment(str(copy))
            assert found["is_direct"]
        except OSError:
            assert not found["is_direct"]
    finally:
        copy.unlink(missing_ok=True)


def test_missing_file_is_named_whatever_was_tried(tmp_path: Path, zoo_model: Model) -> None:
    with pytest.raises(OSError, match="No such file"):
        _native.file_alignment(str(tmp_path / "missing"))
