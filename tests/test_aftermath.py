"""What this process has set outside of itself is undone, even if it is killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gguf_pager import aftermath

SLEEP = """
import sys
from gguf_pager.aftermath import undone_when_killed
with undone_when_killed('echo "$2" > "$1"', sys.argv[1:]):
    print("in it", flush=True)
    sys.stdin.readline()
"""


def test_what_a_killed_process_left_is_undone(tmp_path: Path) -> None:
    setting = tmp_path / "a setting"
    setting.write_text("128")
    with subprocess.Popen([sys.executable, "-c", SLEEP, str(setting), "8192"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "in it\n"
        time.sleep(0.1)
        assert setting.read_text() == "128"
        child.send_signal(signal.SIGKILL)
    until = time.monotonic() + 20
    while setting.read_text() != "8192\n":
        assert time.monotonic() < until, "nobody has undone it"
        time.sleep(0.02)


def test_block_that_is_left_has_undone_its_own(tmp_path: Path) -> None:
    with pytest.raises(KeyError), aftermath.undone_when_killed('touch "$1"', [str(tmp_path / "made")]):
        raise KeyError
    assert not (tmp_path / "made").exists(), "the shell has ended, and did nothing"


def test_block_runs_where_there_is_no_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no processes left")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    with aftermath.undone_when_killed("true", []):
        ran = True
    assert ran
