"""What the commands show, one file per kind: tables for people, dictionaries for JSON. Unknown is None there, a dash here."""

from __future__ import annotations


def number(value: float | None, style: str) -> str:
    """Return a value in a format of Python's, a dash where it is not known."""
    return "-" if value is None else format(value, style)
