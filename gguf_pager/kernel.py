"""What the kernel says of processes, groups, mounts and devices, in files under /proc and /sys.

It is bytes: names in it are whatever somebody has given, cut after 15 bytes amid a letter as a process's own are, and in no
particular encoding. So it is read as file names are, in any locale, and only a newline ends a line.
"""

from __future__ import annotations

import os
from pathlib import Path


def read_text(path: Path) -> str:
    """Return a file's text without white space around it; OSError where there is none."""
    return os.fsdecode(path.read_bytes()).strip()


def read_bytes(path: Path) -> bytes:
    """Return a file as it is; OSError where there is none."""
    return path.read_bytes()


def read_lines(path: Path) -> list[str]:
    """Return a file's lines; OSError where there is none."""
    return [os.fsdecode(line) for line in path.read_bytes().split(b"\n") if line]
