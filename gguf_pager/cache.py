"""Small files kept between processes. Nothing here fails: what cannot be read is absent, what cannot be kept is not."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any


def cache_folder() -> Path | None:
    """Return $GGUF_PAGER_CACHE, or else where the system keeps caches; None where this user has no home."""
    own = os.environ.get("GGUF_PAGER_CACHE")
    if own:
        return Path(own)
    try:
        home = Path.home()
    except RuntimeError:
        return None
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "gguf_pager"
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "gguf_pager"


def read_json(name: str) -> Any:
    """Return what `write_json` has kept under this name; None if nothing, or if it is damaged."""
    folder = cache_folder()
    if folder is None:
        return None
    try:
        return json.loads((folder / name).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def write_json(name: str, value: Any) -> None:
    """Keep a value under a name, which may begin with a folder's; readers see the old one or the new one."""
    folder = cache_folder()
    if folder is None:
        return
    path = folder / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=".new-")
    except OSError:
        return
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(value, file, separators=(",", ":"))
        os.replace(partial, path)
    except OSError:
        Path(partial).unlink(missing_ok=True)
