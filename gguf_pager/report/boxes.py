"""The frames that the page puts around what it shows."""

from __future__ import annotations

from collections.abc import Iterable

from gguf_pager.report.svg import escape


def section(title: str, words: str, body: str, css: str = "grid") -> str:
    """Return a section; `body` is HTML."""
    return f'<section><h2>{title}</h2><p class="about">{words}</p><div class="{css}">{body}</div></section>'


def figure_box(title: str, legend: str, body: str, words: str = "") -> str:
    """Return a figure with its title, and a note beneath it; `legend` and `body` are HTML."""
    note = f'<p class="note">{escape(words)}</p>' if words else ""
    return f"<figure><figcaption>{escape(title)}</figcaption>{legend}{body}{note}</figure>"


def legend(keys: Iterable[tuple[str, str]]) -> str:
    """Return the key of a drawing: a sign in HTML, and what it means."""
    items = "".join(f"<li>{sign}<span>{escape(words)}</span></li>" for sign, words in keys)
    return f'<ul class="legend">{items}</ul>'
