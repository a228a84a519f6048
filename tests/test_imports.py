"""Imports within the package run one way, those of the C core too, and importing it costs nothing."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "gguf_pager"

# A module imports from those above it only. A room does not loosen that: its files stand here one by one.
ORDER = (
    "errors", "deferral", "files", "_native", "kernel", "cache",
    "model.engine", "llama_log", "model.metadata", "model.variants", "model.hub", "model.stores", "model.names", "model.layout", "model.mirror",
    "memory.budget", "memory.allocator", "memory.cgroup", "memory.probe", "aftermath", "memory.cap",
    "profile", "pager", "environment", "disk.bandwidth", "disk.device", "verdict", "memory.residency", "fingerprint", "memory.sizing",
    "loading", "threads", "pace", "contention", "turns", "wrapping", "guard", "arguments", "contexts", "windows", "hooks", "pieces", "saved", "llama",
    "autostart", "energy", "serve", "doctor", "bench", "report", "cli", "__main__",
)

ROOMS = {name.split(".")[0] for name in ORDER if "." in name}  # their files are modules of their own
FOLDERS = ("serve", "energy", "bench", "report", "cli")  # files of one topic, which may import each other

ANY_NAME = ("__version__",)  # of the package itself, which is complete before any module is

OPEN_MODELS = {"bench", "cli"}
USERS_OF_LLAMA_CPP = {"contexts", "arguments", "guard", "windows", "hooks", "pieces", "saved", "llama", "loading", "serve"}
USERS_OF_NATIVE = {"profile", "model.engine", "pager", "memory.residency", "loading", "turns", "contexts", "hooks",
                   "doctor", "llama_log", "fingerprint"}


def dotted(parts: Sequence[str]) -> str:
    """Return the name in ORDER of what lies at a path in the package: a module, in a room or in none, or a folder."""
    return ".".join(parts[: 2 if parts[0] in ROOMS else 1])


def module_of(path: Path) -> str:
    return dotted(path.relative_to(PACKAGE).with_suffix("").parts)


def faces() -> list[Path]:
    """Return the files that only say what a room is for."""
    return [PACKAGE / name / "__init__.py" for name in sorted(ROOMS)]


def files() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path not in (PACKAGE / "__init__.py", *faces())]


def imports(path: Path, *, whole: bool = True) -> Iterator[str]:
    """Yield the dotted names that a file imports; with `whole` false only those that run when it is imported."""
    tree = ast.parse(path.read_text())
    nodes: list[ast.AST] = list(ast.walk(tree)) if whole else list(tree.body)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def package_imports(path: Path) -> set[str]:
    """Return the modules of the package that a file imports from, anywhere in it."""
    found = set()
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "gguf_pager" and len(parts) > 1 and parts[1] not in ANY_NAME:
            found.add(dotted(parts[1:]))
    return found


def test_table_holds_every_module() -> None:
    assert {module_of(path) for path in files()} | {"_native"} == set(ORDER), "a new module has its place in ORDER"


@pytest.mark.parametrize("path", faces(), ids=lambda path: path.parent.name)
def test_room_says_what_it_is_for_and_nothing_else(path: Path) -> None:
    """What it imported would come before the module that is asked for, outside of the order."""
    tree = ast.parse(path.read_text())
    assert len(tree.body) == 1 and ast.get_docstring(tree)


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_import_from_above_only(path: Path) -> None:
    own = module_of(path)
    for name in package_imports(path):
        if own in FOLDERS and name == own or own in OPEN_MODELS and name == "Llama":  # as users do
            continue
        assert name in ORDER, f"{path.name} imports gguf_pager.{name}"
        assert ORDER.index(name) < ORDER.index(own), f"{own} imports {name}"


def test_only_the_hooks_and_the_face_import_llama_cpp() -> None:
    """Those that open models may, in the functions that need it, so that `--help` does not load it."""
    users = {module_of(path) for path in files() if any(name.split(".")[0] == "llama_cpp" for name in imports(path))}
    assert users - OPEN_MODELS == USERS_OF_LLAMA_CPP
    for path in files():
        if module_of(path) not in USERS_OF_LLAMA_CPP:
            assert not any(name.split(".")[0] == "llama_cpp" for name in imports(path, whole=False)), path


def test_only_few_modules_use_the_core() -> None:
    assert {module_of(path) for path in files() if "_native" in package_imports(path)} == USERS_OF_NATIVE


NATIVE = PACKAGE.parent / "native"

# A C file includes from its own floor and those below it. A floor is a folder; `module` is module*.c and module.h.
FLOORS = ("module", "graph", "compute", "slots", "reads", "gguf_pager.h", "os")


def floor(path: str) -> str:
    """Return the floor of a C file, which is named as seen from native/."""
    folder, slash, _ = path.partition("/")
    return folder if slash else re.sub(r"^module.*", "module", path)


def includes(file: Path) -> list[tuple[str, str]]:
    """Return the bracket, < or ", and the name of all that a C file includes."""
    return re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)', file.read_text(), re.MULTILINE)


def misplaced_includes(native: Path) -> list[str]:
    """Return the includes that climb, that are not named as seen from native/, or that are Python's where it is not known."""
    wrong = []
    for file in sorted(native.rglob("*.[ch]")):
        path = file.relative_to(native).as_posix()
        for bracket, name in includes(file):
            if bracket == "<":
                is_wrong = name.lower().startswith("py") and floor(path) != "module"
            else:
                is_wrong = not (native / name).is_file() or FLOORS.index(floor(name)) < FLOORS.index(floor(path))
            if is_wrong:
                wrong.append(f"{path} includes {name}")
    return wrong


def test_c_files_include_from_their_floor_and_below() -> None:
    assert {floor(file.relative_to(NATIVE).as_posix()) for file in NATIVE.rglob("*.[ch]")} == set(FLOORS)
    assert misplaced_includes(NATIVE) == []


@pytest.mark.parametrize(("path", "line", "name"), [
    ("slots/slots.c", '#include "compute/compute.h"', "compute/compute.h"),
    ("reads/watch.h", '# include "slots/slots.h"', "slots/slots.h"),
    ("os/linux.c", '#include "gguf_pager.h"', "gguf_pager.h"),
    ("gguf_pager.h", '#include "reads/fetch.h"', "reads/fetch.h"),
    ("slots/slots.c", '#include "slots.h"', "slots.h"),
    ("graph/tap.c", "#include <Python.h>", "Python.h"),
    ("gguf_pager.h", "#include <pythread.h>", "pythread.h"),
])
def test_include_that_climbs_is_found(tmp_path: Path, path: str, line: str, name: str) -> None:
    for file in ("compute/compute.h", "slots/slots.h", "reads/fetch.h", "gguf_pager.h", path):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    (tmp_path / path).write_text(f"/* of {path} */\n{line}\n")
    assert misplaced_includes(tmp_path) == [f"{path} includes {name}"]


def test_slots_know_nobody_who_fills_them() -> None:
    named = {name for file in ("slots.c", "slots.h") for _, name in includes(NATIVE / "slots" / file)}
    assert {name for name in named if floor(name) == "slots"} == {"slots/slots.h", "slots/pager.h", "slots/policy.h"}


def python(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False,
                          cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_loads_nothing() -> None:
    loaded = python("import sys, gguf_pager; print(*sorted(m for m in sys.modules if '.' not in m))").split()
    assert not {"llama_cpp", "numpy", "gguf", "psutil", "ctypes", "click"} & set(loaded)


@pytest.mark.parametrize("module", [name for name in ORDER if name not in {*USERS_OF_LLAMA_CPP, "autostart", "cli", "__main__"}])
def test_modules_load_without_llama_cpp(module: str) -> None:
    assert python(f"import sys, gguf_pager.{module}; print('llama_cpp' in sys.modules)") == "False"


def test_every_name_that_is_promised_is_there() -> None:
    found = python(
        "import gguf_pager\n"
        "assert set(gguf_pager.__all__) <= set(dir(gguf_pager))\n"
        "for name in gguf_pager.__all__: assert getattr(gguf_pager, name).__name__ == name, name\n"
        "print(len(gguf_pager.__all__))\n"
    )
    assert int(found) >= 15


def test_name_that_does_not_exist_is_an_attribute_error() -> None:
    assert python(
        "import gguf_pager\ntry: gguf_pager.Lama\nexcept AttributeError as error: print(error)"
    ) == "module 'gguf_pager' has no attribute 'Lama'"


def test_from_import_of_the_drop_in_bounds_spinning_before_llama_cpp_is_loaded() -> None:
    program = ("import os; [os.environ.pop(n, None) for n in ('GOMP_SPINCOUNT', 'OMP_WAIT_POLICY')]\n"
               "from gguf_pager import Llama; print(os.environ['GOMP_SPINCOUNT'])")
    assert python(program) == "20000"
