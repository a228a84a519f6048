"""What people write for a model, and the file that it means: a path, a folder, or a name in another program's world.

A path that exists goes before everything else. Names are told by their beginnings, so that nothing is downloaded by mistake.
"""

from __future__ import annotations

import errno
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

from gguf_pager.errors import LayoutError
from gguf_pager.model import hub, stores

log = logging.getLogger("gguf_pager")


@dataclass(frozen=True, slots=True)
class Found:
    """The file that a name means, the first of a split model; `note` says what was chosen where the name leaves it open."""

    path: Path
    note: str | None = None


def find(name: str | os.PathLike[str], *, has_bars: bool = True) -> Found:
    """Return the file that a name means; one of Hugging Face is downloaded, with bars on stderr, where it is a terminal.

    Raises:
        LayoutError: there is no such model, or there are several.
        PagerError: it cannot be had, and why.
    """
    text = os.fspath(name)
    if os.path.isdir(text):
        return Found(stores.find_in_folder(Path(text)))
    try:
        os.stat(text)
        return Found(Path(text))
    except ValueError as error:  # a zero in it
        raise LayoutError(f"{text} cannot be read: {error}.") from None
    except OSError as error:
        code, reason = error.errno, error.strerror
    if not os.path.lexists(text):
        if (wanted := hub.parse(text)) is not None:
            return Found(*hub.download(wanted, has_bars=has_bars))
        if text.startswith("ollama:"):
            return Found(stores.find_in_ollama(text.removeprefix("ollama:")))
        if text.startswith("lmstudio:"):
            return Found(stores.find_in_lmstudio(text.removeprefix("lmstudio:")))
    if code in (errno.ENOENT, errno.ENOTDIR):
        raise LayoutError(f"{text} does not exist.{_meant(text)}")
    raise LayoutError(f"{text} cannot be read: {reason}.")


def local_path(name: str | os.PathLike[str]) -> Path:
    """Return the same file; what was chosen goes into the log.

    Raises:
        LayoutError: there is no such model, or there are several.
        PagerError: it cannot be had, and why.
    """
    found = find(name)
    if found.note is not None:
        log.info("%s", found.note)
    return found.path


def _meant(name: str) -> str:
    """Return a hint about a name that another program would understand."""
    if name.endswith(".gguf"):
        return ""
    if re.fullmatch(r"[\w.-]+/[\w.-]+(:\w+)?", name):
        return f" If that is a repository of Hugging Face: hf:{name}"
    if re.fullmatch(r"[\w.-]+(:[\w.-]+)?", name):
        return f" If that is a model of Ollama's: ollama:{name}"
    return ""
