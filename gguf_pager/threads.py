"""A context's threads, where ggml was built without OpenMP (as for macOS): kept from one piece of graph to the next."""

from __future__ import annotations

import ctypes
import functools
import logging

from llama_cpp import llama_cpp as low

from gguf_pager import engine

log = logging.getLogger("gguf_pager")

POLL = 1
"""ggml's polling level, in 131,072 looks each: how long a thread looks for the next piece of graph before it sleeps. ggml's
default is 50, which is a wait for the disk spent spinning."""

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


@functools.cache
def are_kept() -> bool:
    """Return whether this ggml keeps its threads by itself, which is what OpenMP does for it."""
    return b"OPENMP = 1" in low.llama_print_system_info()


@functools.cache
def _functions() -> tuple[ctypes.CDLL, ctypes.CDLL, ctypes.CDLL] | None:
    """Return the libraries of llama, ggml's base and its CPU backend, declared; None where they are not as expected."""
    loaded = engine.load()
    base, cpu = loaded.base, loaded.cpu
    if cpu is None:
        return None
    try:
        llama = ctypes.CDLL(str(loaded.llama_library))
        base.ggml_threadpool_params_init.restype = None
        base.ggml_threadpool_params_init.argtypes = [ctypes.POINTER(_Params), ctypes.c_int]
        cpu.ggml_threadpool_new.restype, cpu.ggml_threadpool_new.argtypes = ctypes.c_void_p, [ctypes.POINTER(_Params)]
        cpu.ggml_threadpool_free.restype, cpu.ggml_threadpool_free.argtypes = None, [ctypes.c_void_p]
        llama.llama_attach_threadpool.restype = None
        llama.llama_attach_threadpool.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    except (OSError, AttributeError):
        return None
    return llama, base, cpu


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
        if are_kept():
            return
        n_wanted = max(int(low.llama_n_threads(self._context)), int(low.llama_n_threads_batch(self._context)))
        if n_wanted <= max(self._n_threads, 1):
            return
        pool = _make_pool(n_wanted)
        if pool is None:
            log.info("ggml's threads are not kept between pieces of graph: its functions for it are not known here")
            return
        llama, _, _ = _functions() or (None, None, None)
        assert llama is not None
        llama.llama_attach_threadpool(self._context, pool, None)
        self._pools.append(pool)
        self._n_threads = n_wanted

    def close(self) -> None:
        """End the threads."""
        functions = _functions()
        while functions and self._pools:
            functions[2].ggml_threadpool_free(self._pools.pop())


def _make_pool(n_threads: int) -> int | None:
    functions = _functions()
    if functions is None or n_threads > _MAX_THREADS:
        return None
    _, base, cpu = functions
    params = _Params()
    base.ggml_threadpool_params_init(params, n_threads)
    if params.n_threads != n_threads or params.poll != _DEFAULT_POLL:
        return None
    params.poll = POLL
    pool = cpu.ggml_threadpool_new(params)
    return int(pool) if pool else None
