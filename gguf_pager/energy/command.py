"""A wall meter, or anything else that a command can read: each run prints the watts of this moment."""

from __future__ import annotations

import math
import subprocess
from functools import partial

from gguf_pager.energy.source import Absent, GaugeSource, NoReading

NAME = "command"

TIMEOUT_S = 10.0
"""For one run; a meter on the network answers in less."""


def find(command: str | None) -> GaugeSource | Absent:
    """Return the meter behind a shell command, which is run once to see that it works."""
    if command is None:
        return Absent(NAME, "no --power-command given")
    try:
        _read_w(command)
    except NoReading as error:
        return Absent(NAME, str(error))
    return GaugeSource(NAME, f"what `{command}` measures", "machine", partial(_read_w, command), period_s=1.0)


def _read_w(command: str) -> float:
    try:
        done = subprocess.run(command, shell=True, check=False, stdin=subprocess.DEVNULL, capture_output=True,
                              text=True, errors="replace", timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise NoReading(f"the power command took longer than {TIMEOUT_S:g} s") from None
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        raise NoReading(f"the power command failed with {done.returncode}" + (f": {said[-1]}" if said else ""))
    text = done.stdout.strip()
    try:
        watts = float(text)
    except ValueError:
        raise NoReading(f"the power command did not print watts but {text[:40]!r}") from None
    if not math.isfinite(watts) or watts < 0:
        raise NoReading(f"the power command printed {text[:40]!r}, which cannot be watts")
    return watts
