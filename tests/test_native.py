"""The C core, compiled against the fake operating system in tests/native and run: plain and under sanitizers."""

from __future__ import annotations

import math
import os
import platform
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
NATIVE = Path(os.environ.get("GGUF_PAGER_NATIVE", ROOT / "native"))
HERE = ROOT / "tests" / "native"
TRACE = ROOT / "scripts" / "traces" / "qwen3-30b-a3b" / "code.npz"

CORE = tuple(sorted(path.relative_to(NATIVE).with_suffix("").as_posix() for path in NATIVE.glob("*/*.c")
                    if path.parent.name != "os"))
SUPPORT = ("fake_os", "model", "graph")
OF_SYSTEM = ("system_os",)
SYSTEM = ("os/macos",) if platform.system() == "Darwin" else ("os/linux", "os/linux_aio", "os/linux_load")
WITH_ARGUMENTS = ("policy_replay", "system_os")
WAITS_FOR_SLOTS = ("tap_contexts", "waves")  # for seconds, however reads are done
PROGRAMS = tuple(sorted(path.stem for path in HERE.glob("*.c") if path.stem not in SUPPORT))
RUNS = tuple((name, has_queue) for has_queue in (False, True) for name in PROGRAMS
             if name not in WITH_ARGUMENTS and not (has_queue and name in WAITS_FOR_SLOTS))

WARNINGS = ("-std=c11", "-Wall", "-Wextra", "-Werror", "-pthread")
VARIANTS = {
    "plain": ("-O2", "-DNDEBUG"),  # as setuptools compiles the extension
    "address": ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "thread": ("-O1", "-g", "-fsanitize=thread"),
}
RENAMED = ("-Dmalloc=fake_malloc", "-Dcalloc=fake_calloc", "-Dfree=fake_free")
RUN_SECONDS = 150
"""Longer than a program gives itself, CHECK_SECONDS: two run at once."""


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CC") or "gcc") or shutil.which("cc")


def _compile(*arguments: object) -> None:
    command = [str(argument) for argument in (_compiler(), *arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class Build:
    """The test programs of one variant, compiled and all started when the first is asked for: most wait more than they compute."""

    def __init__(self, variant: str, folder: Path, asked_for: Sequence[tuple[str, bool]]) -> None:
        self.folder = folder
        self.pool = ThreadPoolExecutor(os.cpu_count())
        self.flags = (*WARNINGS, *VARIANTS[variant], f"-I{HERE}", f"-I{NATIVE}")
        self.reason = self._reason_to_skip()
        if self.reason is None:
            list(self.pool.map(self._object, (*CORE, *SUPPORT)))
            list(self.pool.map(self._program, PROGRAMS))
            self.started = {(name, has_queue): self.pool.submit(self.run, name, has_queue=has_queue) for name, has_queue in asked_for}

    def _reason_to_skip(self) -> str | None:
        if _compiler() is None:
            return "there is no C compiler"
        source = self.folder / "probe.c"
        source.write_text("int main(void) { return 0; }\n")
        probe = subprocess.run([str(_compiler()), *self.flags, str(source), "-o", str(self.folder / "probe")],
                               capture_output=True, text=True, check=False)
        if probe.returncode != 0:
            return f"the compiler lacks this sanitizer: {probe.stderr.strip().splitlines()[-1]}"
        ran = subprocess.run([str(self.folder / "probe")], capture_output=True, text=True, check=False)
        return None if ran.returncode == 0 else f"this system cannot run the sanitizer: {ran.stderr.strip()[:200]}"

    def _object(self, name: str) -> None:
        source, renamed = (NATIVE / f"{name}.c", RENAMED) if name in CORE else (HERE / f"{name}.c", ())
        _compile(*self.flags, *renamed, "-c", source, "-o", self._object_path(name))

    def _object_path(self, name: str) -> Path:
        return self.folder / f"{name.replace('/', '_')}.o"

    def _program(self, name: str) -> None:
        parts = ([NATIVE / f"{system}.c" for system in SYSTEM] if name in OF_SYSTEM
                 else [self._object_path(part) for part in (*CORE, *SUPPORT)])
        _compile(*self.flags, HERE / f"{name}.c", *parts, "-o", self.folder / name, "-lm", "-ldl")

    def run(self, name: str, *arguments: str, text: str = "", has_queue: bool = False) -> str:
        """Run a program and return what it printed; it says on standard error what does not hold."""
        environment = {**os.environ, "FAKE_QUEUE": "1"} if has_queue else None
        done = subprocess.run([str(self.folder / name), *arguments], input=text, capture_output=True, text=True,
                              timeout=RUN_SECONDS, check=False, env=environment)
        assert done.returncode == 0, f"{name} ended with {done.returncode}:\n{done.stderr}"
        return done.stdout

    def close(self) -> None:
        """Wait for the programs that run; those that nobody waits for any more are not started."""
        self.pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session", params=VARIANTS)
def build(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Build]:
    runs = [item.callspec.params for item in request.session.items if isinstance(item, pytest.Function) and hasattr(item, "callspec")]
    asked_for = [(run["program"], run["has_queue"]) for run in runs if "program" in run and run["build"] == request.param]
    made = Build(request.param, tmp_path_factory.mktemp(f"native_{request.param}"), asked_for)
    if made.reason is not None:
        pytest.skip(f"{request.param}: {made.reason}")
    yield made
    made.close()


@pytest.mark.parametrize(("program", "has_queue"), RUNS, ids=[name + " with a queue" * has_queue for name, has_queue in RUNS])
def test_program_finds_nothing_wrong(build: Build, program: str, has_queue: bool) -> None:
    """With a queue, reads go on in the background."""
    build.started[program, has_queue].result()


def test_system_os_keeps_its_contract(build: Build, tmp_path: Path) -> None:
    path = tmp_path / "numbers"
    path.write_bytes(bytes(i % 251 for i in range(30_000)))
    build.run("system_os", str(path))


# ---- policies: counted again in Python, to the unit ----


def _recorded_ids() -> np.ndarray:
    """Return [token, layer, rank]: 150 tokens of four layers of Qwen3-30B-A3B, with little and with much locality."""
    experts = np.load(TRACE)["experts"]
    return experts[[0, 5, 16, 40], 300:450].transpose(1, 0, 2)


def _fade(age: int, half_life: int) -> float:
    return (1 - age % half_life / half_life / 2) / 2 ** (age // half_life)


def _worth(policy: str, uses: tuple[np.float32, np.float32], age: int, away: int, n_layers: int) -> float:
    if policy == "lru":
        return float(-(age * n_layers + away))
    recent, lasting = map(float, uses)
    root = math.sqrt(age + 1)
    return -(root * math.sqrt(root) / (recent * _fade(age, 32) + 1 / 8 * lasting * _fade(age, 512)) + away / n_layers)


def _replay(policy: str, n_slots: int, ids: np.ndarray) -> list[tuple[int, int, int]]:
    """Return (hits, misses, evictions) per layer; the choice is: free, then least worth, floors kept."""
    _, n_layers, n_used = ids.shape
    floor = min(n_used, n_slots // n_layers)
    slots: list[tuple[int, int] | None] = [None] * n_slots
    where: dict[tuple[int, int], int] = {}
    uses: dict[tuple[int, int], tuple[np.float32, np.float32]] = {}
    last: dict[tuple[int, int], int] = {}
    clock = [0] * n_layers
    hits, misses, evictions = [0] * n_layers, [0] * n_layers, [0] * n_layers
    for token in ids.tolist():
        for layer, chosen in enumerate(token):
            clock[layer] += 1
            wanted = [(layer, expert) for expert in chosen]
            for key in wanted:
                age, one = clock[layer] - last.get(key, 0), np.float32(1)
                recent, lasting = uses.get(key, (0, 0))
                uses[key] = (np.float32(float(recent) * _fade(age, 32)) + one,
                             np.float32(float(lasting) * _fade(age, 512)) + one)
                last[key] = clock[layer]
            held = {where[key] for key in wanted if key in where}
            hits[layer] += len(held)
            for key in wanted:
                if key in where:
                    continue
                misses[layer] += 1
                if None in slots:
                    at = slots.index(None)
                else:
                    kept = Counter(owner for owner, _ in filter(None, slots))
                    at = min(
                        (i for i, (owner, _) in enumerate(filter(None, slots))
                         if i not in held and (owner == layer or kept[owner] > floor)),
                        key=lambda i: _worth(policy, uses[slots[i]], clock[slots[i][0]] - last[slots[i]],
                                             (slots[i][0] - layer) % n_layers or n_layers, n_layers),
                    )
                    evictions[slots[at][0]] += 1
                    del where[slots[at]]
                slots[at] = key
                where[key] = at
                held.add(at)
    return list(zip(hits, misses, evictions, strict=True))


GOLDEN = {
    ("lru", 64): [242, 590, 640, 665],
    ("lru", 128): [513, 810, 848, 844],
    ("lru", 256): [1023, 1094, 1106, 1078],
    ("lfru", 64): [220, 722, 679, 638],
    ("lfru", 128): [562, 915, 915, 869],
    ("lfru", 256): [1032, 1104, 1119, 1093],
}
"""Hits per layer, of 1,200; 64, 128 and 256 slots are 12.5, 25 and 50 % of four layers' 128 experts."""


@pytest.mark.parametrize(("policy", "n_slots"), GOLDEN)
def test_policy_hits_are_golden(build: Build, policy: str, n_slots: int) -> None:
    ids = _recorded_ids()
    n_tokens, n_layers, n_used = ids.shape
    text = f"{n_layers} 128 {n_used} {n_tokens}\n" + " ".join(map(str, ids.reshape(-1).tolist()))
    printed = build.run("policy_replay", policy, str(n_slots), text=text)
    counted = [tuple(map(int, line.split())) for line in printed.splitlines()]
    assert counted == _replay(policy, n_slots, ids)
    assert [hits for hits, _, _ in counted] == GOLDEN[policy, n_slots]
