"""What `doctor` shows: a line per check."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from gguf_pager import __version__
from gguf_pager.doctor import Check
from gguf_pager.errors import printable

_COLORS = {"ok": "green", "note": "yellow", "problem": "red"}


def checks_json(checks: Sequence[Check]) -> dict[str, Any]:
    """Return all checks by name."""
    return {
        "gguf_pager_version": __version__,
        "n_problems": sum(check.status == "problem" for check in checks),
        "checks": {check.name: {"status": check.status, "message": check.message, "remedy": check.remedy,
                                "facts": check.facts} for check in checks},
    }


def checks_text(checks: Sequence[Check]) -> str:
    """Return one line per check, and one below it where something can be done."""
    lines = []
    for check in checks:
        label = check.name.replace("_", " ")
        lines.append(f"{click.style(f'{check.status:8}', fg=_COLORS[check.status])} {label:14} {printable(check.message)}")
        if check.remedy:
            lines.append(f"{'':24}{printable(check.remedy)}")
    return "\n".join(lines)
