"""The C extension: which sources on which system, and the flags that keep it warning-free."""

import os
import platform
from pathlib import Path

from setuptools import Extension, setup

SYSTEM_SOURCES = {"Linux": ["os/linux.c", "os/linux_aio.c", "os/linux_load.c"], "Darwin": ["os/macos.c"]}
NATIVE = Path(__file__).parent / "native"
SOURCES = sorted(path.relative_to(NATIVE).as_posix() for path in NATIVE.rglob("*.c") if path.parent.name != "os")
HEADERS = sorted(path.relative_to(NATIVE).as_posix() for path in NATIVE.rglob("*.h"))

system_sources = SYSTEM_SOURCES.get(platform.system())
if system_sources is None:
    raise SystemExit(f"gguf_pager runs on Linux and macOS; this is {platform.system()}.")

# GGUF_PAGER_SANITIZE=address,undefined builds with those sanitizers and with assertions on, for the tests.
sanitize = os.environ.get("GGUF_PAGER_SANITIZE", "")
flags = ["-std=c11", "-Wall", "-Wextra", "-O2", "-g"]
link_flags = ["-pthread", "-lm", "-ldl"]
if sanitize:
    flags += ["-g", "-UNDEBUG", f"-fsanitize={sanitize}"]
    link_flags += [f"-fsanitize={sanitize}"]

setup(
    ext_modules=[
        Extension(
            "gguf_pager._native",
            sources=[f"native/{name}" for name in SOURCES + system_sources],
            depends=[f"native/{name}" for name in HEADERS],
            include_dirs=["native"],
            define_macros=[("Py_LIMITED_API", "0x030B0000")],
            py_limited_api=True,
            extra_compile_args=flags,
            extra_link_args=link_flags,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
