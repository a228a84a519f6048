"""Runs when a Python program starts that `gguf-pager run --` has started: llama_cpp is paged as soon as the program imports it.

It costs nothing where llama_cpp is not imported, and hides no sitecustomize of the user's or the system's. It must run under any
Python, with and without gguf_pager.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys

TYPE_CHECKING = False
"""As typing has it, which takes as long to import as all of this."""

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

_HERE = os.path.dirname(os.path.abspath(__file__))


class _Paging(importlib.abc.Loader):
    """Loads llama_cpp as its own loader does, then lets gguf_pager wrap it; and pages once gguf_pager is ready for that.

    The two are apart because it is gguf_pager itself that imports llama_cpp in a program that begins with gguf_pager.
    """

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: Any) -> None:
        module.__loader__ = module.__spec__.loader = self._loader
        is_llama_cpp = module.__name__ == "llama_cpp"
        if is_llama_cpp:
            _or_end(_set_up_the_engine)  # before llama_cpp is: it sets what libgomp reads once
        self._loader.exec_module(module)
        if not is_llama_cpp:
            _or_end(_install)
        elif "gguf_pager.hooks" not in sys.modules:
            _or_end(_import_gguf_pager)


def _set_up_the_engine() -> None:
    from gguf_pager.model import engine

    engine.load()


def _import_gguf_pager() -> None:
    import gguf_pager.llama  # noqa: F401  found by _Finder, which installs


def _install() -> None:
    from gguf_pager import environment

    environment.install()


def _or_end(step: Callable[[], None]) -> None:
    """Do it, or end the program with a sentence: many programs go on without llama_cpp where its import raises."""
    reason: Exception
    try:
        step()
    except ImportError as error:
        if str(error).startswith("gguf-pager: "):
            raise
        said, reason = f"{sys.executable} cannot import {error.name or error}: install gguf-pager for that Python, too.", error
    except Exception as error:
        if "PagerError" not in [each.__name__ for each in type(error).__mro__]:
            raise
        said, reason = str(error), error
    else:
        return
    import threading

    if threading.current_thread() is threading.main_thread():
        sys.exit(f"gguf-pager: {said}")
    raise ImportError(f"gguf-pager: {said}") from reason  # threads swallow a SystemExit without a word


class _Finder(importlib.abc.MetaPathFinder):
    """Finds llama_cpp where everybody else does."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name == "gguf_pager.cli":
            self._step_aside()
        if name not in ("llama_cpp", "gguf_pager.llama") or self not in sys.meta_path:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            find = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find(name, path, target) if find is not None else None
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _Paging(spec.loader)
                return spec
        return None

    def _step_aside(self) -> None:
        """Leave gguf_pager's own commands alone, which say themselves what is paged, and what they start (bench: what is not)."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        kept = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place != _HERE]
        os.environ["PYTHONPATH"] = os.pathsep.join(kept)  # an empty one is none


def _run_the_hidden_one() -> None:
    places = [place for place in sys.path if os.path.abspath(place or ".") != _HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", places)
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


if not any(type(finder).__name__ == "_Finder" and type(finder).__module__ == "sitecustomize" for finder in sys.meta_path):
    sys.meta_path.insert(0, _Finder())
_run_the_hidden_one()
