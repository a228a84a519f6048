"""A context's threads, where ggml was built without OpenMP (as for macOS): kept from one piece of graph to the next."""

from __future__ import annotations

import ctypes
import functools
import logging
from dataclasses import dataclass

from gguf_pager.model import engine

log = logging.getLogger("gguf_pager")

POLL = 1
"""ggml's polling level, in 131,072 looks each: how long a thread looks for the next piece of graph before it sleeps. ggml's
default is 50, which is a wait for the disk spent spinning. 0, 1, 4 and 50 decode alike on 2 cores (benchmarks/LOG.md)."""

_MAX_THREADS = 512
"""GGML_MAX_N_THREADS in ggml.h."""

_DEFAULT_POLL = 50
"""What ggml_threadpool_params_init sets, by which the field is found where it is believed to be."""


class _Params(ctypes.Structure):
    _fields_ = [
        ("cpumask", ctypes.c_bool * _MAX_THREADS),
        ("n_threads", ctypes.c_int),
        ("prio", ctypes.c_int),
        ("poll", ctypes.c_uint32),
        ("strict_cpu", ctypes.c_bool),
        ("paused", ctypes.c_bool),
        ("reserve", ctypes.c_byte * 1024),
    ]


@dataclass(frozen=True, slots=True)
class _Libraries:
    """Of llama.cpp, ggml's base and its CPU backend, with the functions used here declared."""

    llama: ctypes.CDLL
    base: ctypes.CDLL
    cpu: ctypes.CDLL


@functools.cache
def _libraries() -> _Libraries | None:
    """Return the libraries; None where they are not as expected."""
    loaded = engine.load()
    if loaded.cpu is None:
        return None
    try:
        found = _Libraries(ctypes.CDLL(str(loaded.llama_library)), loaded.base, loaded.cpu)
        llama, base, cpu = found.llama, found.base, found.cpu
        llama.llama_print_system_info.restype, llama.llama_print_system_info.argtypes = ctypes.c_char_p, []
        for function in (llama.llama_n_threads, llama.llama_n_threads_batch):
            function.restype, function.argtypes = ctypes.c_int32, [ctypes.c_void_p]
        llama.llama_attach_threadpool.restype = None
        llama.llama_attach_threadpool.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
        base.ggml_threadpool_params_init.restype = None
        base.ggml_threadpool_params_init.argtypes = [ctypes.POINTER(_Params), ctypes.c_int]
        cpu.ggml_threadpool_new.restype, cpu.ggml_threadpool_new.argtypes = ctypes.c_void_p, [ctypes.POINTER(_Params)]
        cpu.ggml_threadpool_free.restype, cpu.ggml_threadpool_free.argtypes = None, [ctypes.c_void_p]
    except (OSError, AttributeError):
        return None
    return found


@functools.cache
def are_kept() -> bool:
    """Return whether this ggml keeps its threads by itself, which is what OpenMP does for it, or is not known here."""
    found = _libraries()
    if found is None:
        log.info("ggml's threads are left as they are: its functions for keeping them are not known here")
        return True
    return b"OPENMP = 1" in found.llama.llama_print_system_info()


class Threads:
    """Threads that are attached to a context. Close it after the context is freed, and not in a fork, which has none."""

    def __init__(self, context: int) -> None:
        self._context = context
        self._pools: list[int] = []  # the last is in use; llama.cpp looks at the one before once more
        self._n_threads = 0

    @property
    def n_threads(self) -> int:
        """The number of threads, with the one that calls llama_decode; 0: ggml is left to itself."""
        return self._n_threads

    def provide(self) -> None:
        """Have as many threads as the context wants now, if ggml keeps none. More would not harm; fewer it would go on with.

        Leaves ggml to itself, with a line in the log, where it is not as expected.
        """
        found = None if are_kept() else _libraries()
        if found is None:
            return
        n_wanted = max(found.llama.llama_n_threads(self._context), found.llama.llama_n_threads_batch(self._context))
        if n_wanted <= max(self._n_threads, 1):
            return
        pool = _make_pool(found, n_wanted)
        if pool is None:
            log.info("ggml's threads are left as they are: its settings of a thread pool are not known here")
            return
        found.llama.llama_attach_threadpool(self._context, pool, None)
        self._pools.append(pool)
        self._n_threads = n_wanted

    def close(self) -> None:
        """End the threads."""
        found = _libraries()
        while found and self._pools:
            found.cpu.ggml_threadpool_free(self._pools.pop())


def _make_pool(libraries: _Libraries, n_threads: int) -> int | None:
    if n_threads > _MAX_THREADS:
        return None
    params = _Params()
    libraries.base.ggml_threadpool_params_init(params, n_threads)
    if params.n_threads != n_threads or params.poll != _DEFAULT_POLL:
        return None
    params.poll = POLL
    pool = libraries.cpu.ggml_threadpool_new(params)
    return int(pool) if pool else None
