"""What is undone even if this process is ended with kill -9: by a small shell that waits for its end."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

_DONE = b"done\n"
_WAIT = 'trap "" INT TERM HUP QUIT; read -r word && [ "$word" = done ] || {{ {script}; }}'
"""`read` fails when the other end of the pipe is closed, which the kernel does for a process that is gone."""


@contextmanager
def undone_when_killed(script: str, arguments: Sequence[str]) -> Iterator[None]:
    """Have `/bin/sh` run `script` with `arguments` as $1, $2 ... if this process ends within the block.

    A block that is left, with or without an exception, is trusted to have undone its own: nothing runs then. Where no shell can
    be started the block runs all the same, unguarded.
    """
    command = ["/bin/sh", "-c", _WAIT.format(script=script), "sh", *arguments]
    try:
        # A session of its own: a Ctrl-C, or the end of a terminal, is for the process that is watched.
        shell = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                 start_new_session=True)
    except OSError:
        yield
        return
    assert shell.stdin is not None
    try:
        yield
    finally:
        with suppress(OSError):  # somebody has ended the shell
            shell.stdin.write(_DONE)
            shell.stdin.close()
        shell.wait()
