"""Runs when a Python program starts that `gguf-pager run --` has started: llama_cpp is paged as soon as the program imports it.

It costs nothing where llama_cpp is not imported, and hides no sitecustomize of the user's or the system's.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))


class _Paging(importlib.abc.Loader):
    """Loads llama_cpp as its own loader does, then lets gguf_pager wrap it."""

    def __init__(self, loader):
        self._loader = loader

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        try:
            from gguf_pager.model import engine
        except ModuleNotFoundError as error:
            sys.exit(f"gguf-pager: {sys.executable} cannot import {error.name}: install gguf-pager for that Python, too.")
        engine.load()  # before llama_cpp is: it sets what libgomp reads once
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        from gguf_pager import environment

        environment.install()


class _Finder(importlib.abc.MetaPathFinder):
    """Finds llama_cpp where everybody else does."""

    def find_spec(self, name, path=None, target=None):
        if name != "llama_cpp":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Paging(spec.loader)
        return spec


def _run_the_hidden_one():
    places = [place for place in sys.path if os.path.abspath(place or ".") != _HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", places)
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


sys.meta_path.insert(0, _Finder())
_run_the_hidden_one()
