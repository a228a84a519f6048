"""What this machine lets gguf_pager do: one function per question, each answers with a Check. Shown by report.py."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil

from gguf_pager import __version__, _native, cache, kernel
from gguf_pager.disk import bandwidth, device
from gguf_pager.errors import EngineError, PagerError
from gguf_pager.files import ModelFiles, check_can_be_mapped
from gguf_pager.memory import budget, probe, residency
from gguf_pager.memory.budget import format_bytes
from gguf_pager.memory.cap import memory_cap
from gguf_pager.model import engine
from gguf_pager.model.layout import Layout, open_layout
from gguf_pager.pager import Options, Pager
from gguf_pager.verdict import judge, process_bytes

LINUX_READ_AHEAD_KB = 128
"""The kernel's default; below the model's size stock llama.cpp decoded faster with it than with 8 MiB wherever both were measured
(benchmarks/results)."""

_TRIAL_LOCK_BYTES = 4096
_TRIAL_CAP_BYTES = 256 << 20
_TRIAL_FILE_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Check:
    """One answer. `problem` stops paging; `note` costs speed or knowledge. `remedy` says what to do, where one can."""

    name: str
    status: Literal["ok", "note", "problem"]
    message: str
    remedy: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def examine(model: Path | None, *, measure_device: bool = False) -> list[Check]:
    """Ask everything, about a model and its file system or, without one, about the current folder's.

    With `measure_device` the model's device is measured, whether it is known or not, and remembered.
    """
    said = {name: os.environ[name] for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY") if name in os.environ}
    checks = [_versions(), _engine(), _lazy_load(), _spinning(said), _cores()]
    layout: Layout | None = None
    if model is not None:
        layout, check = _model(model)
        if layout is not None:
            checks.insert(0, _verdict(layout))
        checks.append(check)
    checks += [_memory(), _memory_lock(layout), _huge_pages(Path("/sys/kernel/mm/transparent_hugepage/enabled"))]
    try:
        with _file_here(model) as path:
            checks += [_direct_io(path, layout), _device(path, layout if measure_device else None), _read_ahead(path)]
    except OSError as error:
        checks.append(Check("direct_io", "note", f"cannot be tried in the current folder: {error.strerror}",
                            "Name a model: gguf-pager doctor MODEL"))
    return [*checks, _memory_cap(), _energy(Path("/sys/class"))]


def _versions() -> Check:
    try:
        engine_version = importlib.metadata.version("llama_cpp_python")
    except importlib.metadata.PackageNotFoundError:
        engine_version = None
    facts = {"python": platform.python_version(), "gguf_pager": __version__, "llama_cpp_python": engine_version,
             "system": platform.system(), "release": platform.release(), "machine": platform.machine()}
    message = (f"gguf_pager {__version__}, llama-cpp-python {engine_version or 'not installed'}, Python "
               f"{facts['python']}, {facts['system']} {facts['release']} {facts['machine']}")
    if sys.platform not in ("linux", "darwin"):
        return Check("versions", "problem", message, "gguf_pager runs on Linux and macOS.", facts)
    return Check("versions", "ok", message, None, facts)


def _engine() -> Check:
    try:
        loaded = engine.load()
        engine.ggml_numbers()
    except EngineError as error:
        return Check("engine", "problem", str(error))
    return Check("engine", "ok", "ggml's tensor fields are where they are expected",
                 None, {"library_folder": str(loaded.folder)})


def _lazy_load() -> Check:
    try:
        library = engine.load().llama_library
        ctypes.CDLL(str(library))
        _native.lazy_load_begin(str(library))
        _native.lazy_load_end()
    except (EngineError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return Check("lazy_load", "note", f"models are read once, whole, while they load: {reason}",
                     "Loading takes as long as stock llama.cpp's; nothing else suffers.", {"is_possible": False})
    return Check("lazy_load", "ok", "models load without being read", None, {"is_possible": True})


def _spinning(said: dict[str, str]) -> Check:
    """Tell how libgomp's threads wait. engine.load sets the variable, so `said` was read before it."""
    facts: dict[str, Any] = {"gomp_spincount": os.environ.get("GOMP_SPINCOUNT"),
                             "omp_wait_policy": said.get("OMP_WAIT_POLICY"), "has_libgomp": None}
    try:
        engine.load()
    except EngineError:
        return Check("spinning", "note", "not known without the engine", None, facts)
    if sys.platform == "linux":
        facts["has_libgomp"] = "libgomp" in kernel.read_text(Path("/proc/self/maps"))
        if not facts["has_libgomp"]:
            return Check("spinning", "note", "this ggml does not use libgomp: its threads are started anew for every "
                         "piece of graph", "A llama-cpp-python built with OpenMP decodes faster.", facts)
    if said and said != {"GOMP_SPINCOUNT": engine.SPIN_COUNT}:
        setting = ", ".join(f"{name}={value}" for name, value in sorted(said.items()))
        return Check("spinning", "note", f"you have set {setting}, which is left alone",
                     "Unset it: sleeping at once costs a fifth of the speed, endless spinning burns power.", facts)
    return Check("spinning", "ok", f"threads spin {engine.SPIN_COUNT} times, then sleep (GOMP_SPINCOUNT)", None, facts)


def physical_cores() -> int:
    """Return the cores worth computing with: physical ones, and no more than this process may use."""
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return min(psutil.cpu_count(logical=False) or usable, usable)


def _cores() -> Check:
    physical, logical, usable = psutil.cpu_count(logical=False), psutil.cpu_count(), physical_cores()
    facts = {"physical": physical, "logical": logical, "used_by_default": usable}
    return Check("cores", "ok", f"{physical or '?'} physical, {logical or '?'} logical; {usable} used by default (-t)",
                 None, facts)


def _model(path: Path) -> tuple[Layout | None, Check]:
    try:
        with ModelFiles() as files:
            layout = open_layout([path], files)
            for file in files:
                check_can_be_mapped(file)
        needs = Pager(layout, Options()).needs
    except PagerError as error:
        return None, Check("model", "problem", str(error))
    if not layout.layers:
        return layout, Check("model", "note", f"{layout.name} has no experts: there is nothing to page")
    least = process_bytes(layout, budget.least_arena_bytes(needs))
    available = probe.memory().reachable_bytes  # `least` is of a whole process
    facts = {"architecture": layout.architecture, "tensor_bytes": layout.tensor_bytes, "least_bytes": least,
             "available_bytes": available}
    if least > available:
        message = f"{layout.name} needs at least {format_bytes(least)}, but {format_bytes(available)} are available"
        return layout, Check("model", "problem", message, "Free memory, or take a smaller model.", facts)
    message = f"{layout.name}: {format_bytes(layout.expert_bytes)} of experts, runs in {format_bytes(least)} and more"
    return layout, Check("model", "ok", message, None, facts)


def _verdict(layout: Layout) -> Check:
    """The answer, in a sentence; what it rests on stands below."""
    verdict = judge(layout, tuple(Pager(layout, Options()).needs), probe.memory(), device.best_rate(layout.paths[0]))
    status: dict[str, Literal["ok", "note", "problem"]] = {"stock": "ok", "well": "ok", "no": "problem"}
    remedy = "Measure it: gguf-pager doctor MODEL --probe" if verdict.kind == "unknown" else None
    return Check("verdict", status.get(verdict.kind, "note"), verdict.sentence, remedy, {"kind": verdict.kind})


def _memory() -> Check:
    memory = probe.memory()
    facts = {"total_bytes": memory.total_bytes, "ram_bytes": memory.ram_bytes, "available_bytes": memory.available_bytes,
             "cgroup_limit_bytes": memory.limit_bytes, "swap_bytes": memory.swap_bytes,
             "auto_budget_bytes": budget.auto_budget_bytes(memory.available_bytes, memory.total_bytes)}
    limit = "no cgroup limit" if memory.limit_bytes is None else (
        f"limited to {format_bytes(memory.limit_bytes)} by a cgroup of version {memory.cgroup_version}")
    message = (f"{format_bytes(memory.ram_bytes or memory.total_bytes)} of RAM, {format_bytes(memory.available_bytes)} available, {limit}, "
               f"{format_bytes(memory.swap_bytes) if memory.swap_bytes else 'no'} swap")
    if memory.swap_bytes:
        return Check("memory", "note", message, "Under pressure the system may swap experts out, which costs more than "
                     "reading them again: keep the budget below what is available.", facts)
    return Check("memory", "ok", message, None, facts)


def _memory_lock(layout: Layout | None) -> Check:
    """Lock as much as the dense weights have, without a model a little: limits are one thing, rights another."""
    n_bytes = layout.dense_bytes if layout is not None else _TRIAL_LOCK_BYTES
    reason = residency.try_lock(n_bytes)
    limit = probe.lock_limit_bytes()
    facts = {"limit_bytes": limit, "tried_bytes": n_bytes, "reason": reason}
    shown = "no limit" if limit is None else f"limit {format_bytes(limit)}"
    if reason is not None:
        message = f"{format_bytes(n_bytes)} cannot be locked ({shown}): {reason}; dense weights are kept in ordinary memory"
        return Check("memory_lock", "note", message, "Without swap that is as good; else: ulimit -l unlimited, and in a "
                     "container the capability IPC_LOCK.", facts)
    if layout is not None or limit is None:
        return Check("memory_lock", "ok", f"{shown}: {format_bytes(n_bytes)} were locked to try it", None, facts)
    return Check("memory_lock", "note", f"{shown}: enough for dense weights of that size, larger ones are kept in ordinary "
                 "memory", "Without swap that is as good; else: ulimit -l unlimited.", facts)


def _huge_pages(setting: Path) -> Check:
    try:
        chosen = kernel.read_text(setting).split("[")[1].split("]")[0]
    except (OSError, IndexError):
        return Check("huge_pages", "note", "the setting is not known here", None, {"setting": None})
    facts = {"setting": chosen}
    if chosen == "never":
        return Check("huge_pages", "note", "off: the experts' memory consists of small pages, into which some disks read slower",
                     f"echo madvise | sudo tee {setting}", facts)
    return Check("huge_pages", "ok", f"{chosen}: the experts' memory uses them", None, facts)


@contextmanager
def _file_here(model: Path | None) -> Iterator[Path]:
    """Yield the model or, without one, a small file in the current folder, which is gone afterwards."""
    if model is not None and model.is_file():
        yield model
        return
    with tempfile.NamedTemporaryFile(dir=Path.cwd(), prefix=".gguf_pager-doctor-") as file:
        file.write(bytes(_TRIAL_FILE_BYTES))
        file.flush()
        yield Path(file.name)


def _direct_io(path: Path, layout: Layout | None) -> Check:
    try:
        offset_align, memory_align = _native.file_alignment(str(path))
    except OSError as error:
        message = f"not on the file system of {path.parent} ({error.strerror}): reads go through the page cache"
        return Check("direct_io", "note", message, "Keep models on a local disk (ext4, xfs, btrfs, APFS).",
                     {"is_possible": False, "offset_align_bytes": None, "memory_align_bytes": None})
    facts = {"is_possible": True, "offset_align_bytes": offset_align, "memory_align_bytes": memory_align}
    align = max(offset_align, memory_align)
    message = f"works on the file system of {path.parent}, in multiples of {align} bytes"
    if layout is not None and any(size % align for shape in layout.shapes for size in shape):
        message += "; this model's slices are no such multiples and are moved after reading"
    return Check("direct_io", "ok", message, None, facts)


def _device(path: Path, measured_with: Layout | None) -> Check:
    """Tell what is remembered of a file's device, or measure it with a model."""
    found = device.identify(path)
    facts: dict[str, Any] = {"device": found.name if found else None, "date": None, "io": None, "direct": None,
                             "buffered": None}
    if found is None:
        return Check("device", "note", "not known: reads are as by default", None, facts)
    if measured_with is not None:
        try:
            findings = bandwidth.measure(measured_with)
        except (PagerError, OSError) as error:
            return Check("device", "note", f"{found.name} cannot be measured: {error}", None, facts)
        if not device.remember(found, findings):
            return Check("device", "note", f"{found.name}: {findings}; it cannot be remembered",
                         f"Set GGUF_PAGER_CACHE to a folder that can be written to, not {cache.cache_folder()}", facts)
    findings_now = device.recall(found)
    if findings_now is None:
        return Check("device", "note", f"{found.name} is not measured yet; the first model of "
                     f"{format_bytes(device.LEAST_EXPERT_BYTES)} of experts that is opened there does it",
                     "Or now: gguf-pager doctor MODEL --probe", facts)
    for io, best in (("direct", findings_now.direct), ("buffered", findings_now.buffered)):
        facts[io] = best and {"n_readers": best[0].n_readers, "piece_bytes": best[0].piece_bytes, "bytes_per_s": best[1]}
    facts |= {"date": findings_now.date, "io": findings_now.io}
    return Check("device", "ok", f"{found.name}: {findings_now} (measured {findings_now.date})", None, facts)


def _read_ahead(path: Path) -> Check:
    kb, setting = probe.read_ahead_kb(path), probe.read_ahead_setting(path)
    facts = {"read_ahead_kb": kb}
    if kb is None:
        return Check("read_ahead", "note", "not known for this device: state it beside any comparison with stock",
                     None, facts)
    if kb > LINUX_READ_AHEAD_KB:
        message = (f"{kb:,} KiB: with less RAM than the model, stock llama.cpp reads up to that much for each page it "
                   "misses; gguf_pager does not mind")
        return Check("read_ahead", "note", message,
                     f"Before comparing with stock: echo {LINUX_READ_AHEAD_KB} | sudo tee {setting}", facts)
    return Check("read_ahead", "ok", f"{kb:,} KiB: fair to stock llama.cpp; gguf_pager does not mind", None, facts)


def _memory_cap() -> Check:
    with memory_cap(_TRIAL_CAP_BYTES) as cap:
        facts = {"method": cap.method, "reason": cap.reason}
        if cap.method == "none":
            return Check("memory_cap", "note", f"none can be made for comparisons: {cap.reason}",
                         "Compare as root or in a systemd user session; paging needs no cap.", facts)
        return Check("memory_cap", "ok", f"can be made for comparisons, by {cap.method}", None, facts)


def _energy(classes: Path) -> Check:
    """Look for counters; reading them is another module's business."""
    patterns = {"powercap": "powercap/*/energy_uj", "hwmon_ina": "hwmon/*/power*_input",
                "battery": "power_supply/*/power_now"}
    found: dict[str, dict[str, bool]] = {}
    for kind, pattern in patterns.items():
        paths = [path for path in sorted(classes.glob(pattern)) if kind != "hwmon_ina" or _is_ina(path.parent)]
        found[kind] = {str(path): os.access(path, os.R_OK) for path in paths}
    everything = {path: is_readable for kind in found.values() for path, is_readable in kind.items()}
    facts = {kind: [{"path": path, "is_readable": ok} for path, ok in paths.items()] for kind, paths in found.items()}
    if not everything:
        return Check("energy", "note", "no counters here (powercap, hwmon ina, battery)", None, facts)
    locked = [path for path, is_readable in everything.items() if not is_readable]
    message = f"{len(everything)} counters, {len(locked)} of them not readable by this user"
    if locked:
        return Check("energy", "note", message, f"sudo chmod a+r {locked[0]}, or run as root", facts)
    return Check("energy", "ok", f"{len(everything)} counters, all readable", None, facts)


def _is_ina(device: Path) -> bool:
    """Return whether a sensor is one of TI's ina2xx and ina3221, which measure a board's supply."""
    try:
        return kernel.read_text(device / "name").startswith("ina")
    except OSError:
        return False
