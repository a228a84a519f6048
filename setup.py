"""The C extension: which sources on which system, and the flags that keep it warning-free."""

import os
import platform

from setuptools import Extension, setup

SYSTEM_SOURCES = {"Linux": ["os_linux.c", "os_linux_aio.c", "os_linux_load.c"], "Darwin": ["os_macos.c"]}
SOURCES = ["ahead.c", "arena.c", "compute.c", "copies.c", "fetch.c", "ffn.c", "ffn_batch.c", "ffn_between.c", "ffn_shape.c",
           "ffn_shares.c", "module.c", "pager.c", "pins.c", "policy.c", "product.c", "slots.c", "tap.c", "warm.c"]

system_sources = SYSTEM_SOURCES.get(platform.system())
if system_sources is None:
    raise SystemExit(f"gguf_pager runs on Linux and macOS; this is {platform.system()}.")

# GGUF_PAGER_SANITIZE=address,undefined builds with those sanitizers and with assertions on, for the tests.
sanitize = os.environ.get("GGUF_PAGER_SANITIZE", "")
flags = ["-std=c11", "-Wall", "-Wextra", "-O2"]
link_flags = ["-pthread", "-lm"]
if sanitize:
    flags += ["-g", "-UNDEBUG", f"-fsanitize={sanitize}"]
    link_flags += [f"-fsanitize={sanitize}"]

setup(
    ext_modules=[
        Extension(
            "gguf_pager._native",
            sources=[f"native/{name}" for name in SOURCES + system_sources],
            depends=[f"native/{name}" for name in
                     ("gguf_pager.h", "os.h", "compute.h", "copies.h", "fetch.h", "ffn.h", "ffn_batch.h", "ffn_between.h", "ffn_shape.h",
                      "ffn_shares.h", "policy.h", "pager.h", "product.h", "slots.h", "ggml_tensor.h")],
            define_macros=[("Py_LIMITED_API", "0x030B0000")],
            py_limited_api=True,
            extra_compile_args=flags,
            extra_link_args=link_flags,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
