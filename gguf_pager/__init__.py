"""Mixture-of-experts GGUF models larger than RAM, on stock llama-cpp-python, within a memory budget.

>>> from gguf_pager import Llama                                    # doctest: +SKIP
>>> llm = Llama(model_path="Qwen3-235B.gguf", budget="24GiB")       # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gguf_pager.errors import BudgetError, EngineError, LayoutError, PagerError, PagerIOError

if TYPE_CHECKING:
    from gguf_pager.llama import Installation, Llama, install, uninstall
    from gguf_pager.model.layout import Layout, read_layout
    from gguf_pager.pager import LayerStats, Options, Pager, Stats

__version__ = "0.1.0"

__all__ = [
    "BudgetError", "EngineError", "Installation", "LayerStats", "Layout", "LayoutError", "Llama", "Options", "Pager",
    "PagerError", "PagerIOError", "Stats", "install", "read_layout", "uninstall",
]

_HOME = {
    "Llama": "llama", "Installation": "llama", "install": "llama", "uninstall": "llama",
    "Layout": "model.layout", "read_layout": "model.layout",
    "LayerStats": "pager", "Options": "pager", "Pager": "pager", "Stats": "pager",
}


def __getattr__(name: str) -> Any:
    """Import on first use: `import gguf_pager` stays fast and does not load llama_cpp."""
    if name not in _HOME:
        raise AttributeError(f"module 'gguf_pager' has no attribute {name!r}")
    import importlib

    try:
        if _HOME[name] == "llama":
            from gguf_pager.model import engine

            engine.load()  # sets what libgomp reads once, and refuses an unknown version, before llama_cpp is imported
        return getattr(importlib.import_module(f"gguf_pager.{_HOME[name]}"), name)
    except ImportError as error:
        if "_native" not in str(error):
            raise
        raise EngineError(f"The compiled part of gguf_pager cannot be loaded from {__path__[0]} ({error}). If that is a checkout, start "
                          "your program in another folder, or install it with pip install --editable; else install it again.") from None


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
