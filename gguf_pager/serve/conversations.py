"""What was said, kept as text: a JSON file each, beside the states that spare computing it again."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf_pager.cache import PARTIAL_PREFIX
from gguf_pager.errors import PagerError

VERSION = 1
_MOST_BYTES = 64 << 20
_NAME = re.compile(r"[^\W_][\w .-]{0,99}", re.UNICODE)


@dataclass(slots=True)
class Conversation:
    """Messages in order, as OpenAI's API has them: `role` and `content`. The system's comes first, if there is one."""

    messages: list[dict[str, str]] = field(default_factory=list)

    @property
    def system(self) -> str | None:
        """What the model was told to be."""
        return self.messages[0]["content"] if self.messages and self.messages[0]["role"] == "system" else None

    @system.setter
    def system(self, text: str | None) -> None:
        if self.system is not None:
            del self.messages[0]
        if text:
            self.messages.insert(0, {"role": "system", "content": text})

    @property
    def n_turns(self) -> int:
        """How often the user has said something."""
        return sum(message["role"] == "user" for message in self.messages)

    def say(self, role: str, content: str) -> None:
        """Add a message."""
        self.messages.append({"role": role, "content": content})

    def take_back(self) -> str | None:
        """Remove the last answer, if there is one; return what it was an answer to, which stays."""
        if self.messages and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        return self.messages[-1]["content"] if self.messages and self.messages[-1]["role"] == "user" else None


def path_of(folder: Path, name: str) -> Path:
    """Return where a conversation of this name lies.

    Raises:
        PagerError: it is no name for a file.
    """
    if not _NAME.fullmatch(name) or name.endswith((".", " ")):
        raise PagerError(f"{name!r} is no name for a conversation: use letters, digits, '-', '_', '.' and spaces, up to 100.")
    return folder / f"{name}.json"


def save(path: Path, conversation: Conversation) -> None:
    """Write a conversation; it is whole or, where that fails, as it was before.

    Raises:
        PagerError: it cannot be written.
    """
    partial = None
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=PARTIAL_PREFIX)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump({"version": VERSION, "messages": conversation.messages}, file, ensure_ascii=False, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        if partial is not None:
            with contextlib.suppress(OSError):
                os.unlink(partial)
        raise PagerError(f"The conversation cannot be kept in {path}: {error.strerror}.") from None


def load(path: Path) -> Conversation:
    """Read a conversation.

    Raises:
        PagerError: it is not there, or damaged.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError
        found: Any = json.loads(path.read_bytes())
        messages = [{"role": str(message["role"]), "content": str(message["content"])} for message in found["messages"]]
    except FileNotFoundError:
        raise PagerError(f"There is no conversation {path.stem!r} in {path.parent}.") from None
    except OSError as error:
        raise PagerError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise PagerError(f"{path} is no conversation, or damaged: move it away.") from None
    return Conversation(messages)


def names(folder: Path) -> list[str]:
    """Return the names of the conversations in a folder."""
    return sorted(path.stem for path in folder.glob("*.json"))
