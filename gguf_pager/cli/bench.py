"""`gguf-pager bench`: speed, memory and energy, ours beside stock llama-cpp-python in the same memory."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

import click

from gguf_pager import __version__
from gguf_pager.bench import details, rows, tokens
from gguf_pager.bench.cases import (
    Baseline,
    Case,
    Shape,
    budget_bytes,
    cases_of,
    parse_numbers,
    parse_read_aheads,
    rounds_of,
    shapes,
)
from gguf_pager.bench.disk import Device
from gguf_pager.bench.interrupts import Interrupts
from gguf_pager.bench.runner import Run, Runner, Settings
from gguf_pager.cli.energy import CONSTANT_OPTION, POWER_COMMAND_OPTION
from gguf_pager.cli.model import GPU_LAYERS_OPTION, local_model, takes_model
from gguf_pager.cli.opening import LOOK_AHEAD_OPTION, MOST_TOKENS
from gguf_pager.cli.serve import MOST_SEQUENCES
from gguf_pager.disk.device import fill
from gguf_pager.doctor import LINUX_READ_AHEAD_KB, physical_cores
from gguf_pager.energy import meter
from gguf_pager.energy.model import override
from gguf_pager.energy.source import Absent
from gguf_pager.errors import BudgetError, PagerError
from gguf_pager.memory import budget, probe
from gguf_pager.model.layout import Layout, read_layout
from gguf_pager.pager import Options, Pager
from gguf_pager.report import page
from gguf_pager.report.bench import PRINTERS, mode_name, test_name
from gguf_pager.report.words import as_options

_DEFAULT = Options()
_Command = TypeVar("_Command", bound=Callable[..., Any])

_PHASE_S = 5.0
"""About what a phase takes: a source that needs longer is taken only where there is no other."""

_BASELINES: tuple[Baseline, ...] = ("stock", "resident", "repacked")


def _numbers(_: click.Context, parameter: click.Parameter, given: tuple[str, ...]) -> tuple[int, ...]:
    least = 1 if parameter.name in ("threads", "batch_size", "ubatch_size", "parallel") else 0
    try:
        numbers = tuple(number for text in given for number in parse_numbers(text))
    except ValueError as error:
        raise click.BadParameter(f"{error}.") from None
    if any(number < least for number in numbers):
        raise click.BadParameter(f"the least is {least}.")
    if parameter.name == "parallel" and max(numbers) > MOST_SEQUENCES:
        raise click.BadParameter(f"the most is {MOST_SEQUENCES}: llama.cpp keeps no more sequences apart.")
    return numbers


def _read_aheads(_: click.Context, __: click.Parameter, given: tuple[str, ...]) -> tuple[int | None, ...]:
    try:
        return tuple(kb for text in given for kb in parse_read_aheads(text))
    except ValueError as error:
        raise click.BadParameter(f"{error}.") from None


def _words(_: click.Context, __: click.Parameter, given: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(word.strip() for text in given for word in text.split(","))


def _baselines(context: click.Context, parameter: click.Parameter, given: tuple[str, ...]) -> tuple[str, ...]:
    words = _words(context, parameter, given)
    for word in words:
        if word not in (*_BASELINES, "none"):
            raise click.BadParameter(f"{word!r} is none of {', '.join(_BASELINES)}, none.")
    return () if "none" in words else words


def _list(*names: str, default: str | None, text: str) -> Callable[[_Command], _Command]:
    """Return an option that takes lists and ranges, and may be given again."""
    return click.option(*names, metavar="N", multiple=True, callback=_numbers, default=[default] if default else None,
                        show_default=bool(default), help=text)


@dataclass(frozen=True, slots=True)
class _Request:
    """The command's options, under click's names for them."""

    model: Path
    n_prompt: tuple[int, ...]
    n_gen: tuple[int, ...]
    n_depth: tuple[int, ...]
    repetitions: int
    threads: tuple[int, ...]
    batch_size: tuple[int, ...]
    ubatch_size: tuple[int, ...]
    parallel: tuple[int, ...]
    output: str
    budgets: tuple[str, ...]
    baselines: tuple[Baseline, ...]
    cap: str
    is_warm: bool
    read_ahead: tuple[int | None, ...]
    tokens: str | None
    timeout: float
    policy: str
    io: str
    readers: int | None
    look_ahead: Literal["auto"] | bool
    overcommit: bool
    power_command: str | None
    constants: dict[str, float]
    idle: float
    report: Path | None


@click.command()
@takes_model
@_list("-p", "--n-prompt", default="512", text="Tokens of prompt; 0 measures decode alone.")
@_list("-n", "--n-gen", default="128", text="Tokens decoded one by one, after the prompt; 0 measures the prompt alone.")
@_list("-d", "--n-depth", default="0", text="Tokens computed before the clock starts.")
@GPU_LAYERS_OPTION
@click.option("-r", "--repetitions", metavar="N", type=click.IntRange(min=1), default=3, show_default=True,
              help="Runs of each case, which take turns.")
@_list("-t", "--threads", default=None, text="Threads that compute. [default: physical cores]")
@_list("-b", "--batch-size", default="2048", text="Prompt tokens per call of llama.cpp.")
@_list("-ub", "--ubatch-size", default="512", text="Prompt tokens computed at once.")
@_list("-npl", "--parallel", default="1", text="Sequences, each with its own prompt and depth, that share every batch and take "
                                                "steps of one token each. Speeds are of all together.")
@click.option("-o", "--output", type=click.Choice(list(PRINTERS)), default="md", show_default=True,
              help="Format of the rows on stdout.")
@click.option("--budget", "budgets", metavar="SIZE", multiple=True, callback=_words, default=["auto"], show_default=True,
              help="Our memory: '4GiB' for the whole process, '25%' of the experts, 'min', 'auto'; a list is measured one "
                   "after the other.")
@click.option("--baseline", "baselines", metavar="NAME", multiple=True, callback=_baselines, default=["stock"],
              show_default=True,
              help="What runs beside ours: 'stock' llama-cpp-python under the same cap, the model 'resident' in RAM with "
                   "the same kernels, 'repacked' in RAM with the fastest ones, or 'none'. A list takes several.")
@click.option("--cap", metavar="SIZE", default="budget", show_default=True,
              help="Memory cap on ours and stock: '4GiB'; 'budget' for that of each budget, or for one that is not in bytes what "
                   "ours took in a run that does not count; 'none', and then no ratio.")
@click.option("--cold/--warm", "is_cold", default=True,
              help="Whether the file is gone from the page cache before each run, or read into it as far as the cap "
                   "allows.  [default: cold]")
@click.option("--read-ahead", metavar="KIB", multiple=True, callback=_read_aheads,
              help="Set the device's read-ahead where permitted, and restore it; with a list stock runs at each. 'present' "
                   "leaves it as it is.  [default: present,128 where stock runs and it can be set, else present]")
@click.option("--tokens", metavar="SOURCE", help="'text:FILE', 'ids:FILE', 'random', or 'trace' for a trace-driven model's "
                                                 "own. [default: trace, else a text, else random]")
@click.option("--timeout", metavar="S", type=click.FloatRange(min=0, min_open=True), default=900.0, show_default=True,
              help="The longest a run may take, loading included.")
@click.option("--policy", metavar="NAME", default=_DEFAULT.policy, show_default=True, help="As for run.")
@click.option("--io", type=click.Choice(["auto", "direct", "buffered"]), default=_DEFAULT.io, show_default=True,
              help="As for run.")
@click.option("--readers", metavar="N", type=int, help="As for run; a device is measured before the first run.")
@LOOK_AHEAD_OPTION
@click.option("--overcommit", is_flag=True, help="As for run.")
@POWER_COMMAND_OPTION
@CONSTANT_OPTION
@click.option("--idle", metavar="S", type=click.FloatRange(min=0), default=10.0, show_default=True,
              help="Watch the idle machine's power for so long first, where it can be measured.")
@click.option("--report", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False, writable=True),
              help="Write a page in HTML, too.")
def bench(is_cold: bool, **given: Any) -> None:
    """Measure speed and energy beside stock llama-cpp-python.

    Prompts and answers, in the same memory. Every run is a process of its own. A round runs each case once; ratios are taken within
    rounds, under the same memory cap, against stock at the best of the read-aheads that were measured. Lists multiply: -p 64,512 -n 64,128 are four
    shapes. Numbers may be given as 64,128 or 16-64+16 or 1-8*2.

    A Ctrl-C leaves the rows that were finished. The exit code is 1 where no row has a result, or where logits differ from
    stock's; rows without a result beside others are a warning on stderr.
    """
    with Interrupts() as interrupts:
        _bench(_Request(**given | {"is_warm": not is_cold}), interrupts)


def _bench(request: _Request, interrupts: Interrupts) -> None:
    is_spin_chosen = not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}.isdisjoint(os.environ)  # before ggml is loaded
    layout = read_layout(local_model(request.model))
    _check(request, layout)
    read_ahead, constants = _settable(request, layout), override(request.constants)
    settings, idle_w = _settings(request, layout, is_spin_chosen, interrupts)
    pager = Pager(layout, Options())  # not with --io: the device is what it is
    device = Device(layout.paths, pager.align if pager.is_direct else None)
    runner = Runner(settings, layout, device, interrupts, lambda line: click.echo(line, err=True))
    machine, printer = _machine(layout), PRINTERS[request.output]()
    all_runs, all_rows = list[Run](), list[dict[str, Any]]()
    click.echo(printer.head(), nl=False)
    try:
        runner.settle()
        for group in rounds_of(_shapes(request)):
            runs: list[Run] = []
            try:
                for run in runner.rounds([case for shape in group for case in _cases(request, shape, read_ahead, runner)]):
                    runs += [run]  # at once, so that an interrupt leaves it
            finally:
                made = rows.rows_of(runs, rows.Common(
                    str(request.model), machine, device.best_bytes_per_s, runner.stream_bytes_per_s, idle_w, constants,
                    settings.tokens, request.is_warm, request.repetitions))
                all_runs, all_rows = all_runs + runs, all_rows + made
                click.echo(printer.rows(made), nl=False)
    finally:
        click.echo(printer.foot(), nl=False)
        if request.report is not None and all_rows:
            request.report.write_text(page.page(_page_facts(layout, machine, all_rows, all_runs)), "utf-8")
            click.echo(f"{request.report} written", err=True)
    _judge(all_rows)


def _shapes(request: _Request) -> list[Shape]:
    return shapes(request.n_prompt, request.n_gen, request.n_depth, request.threads or (physical_cores(),), request.batch_size,
                  request.ubatch_size, request.parallel)


def _judge(made: list[dict[str, Any]]) -> None:
    """End with an error where nothing was measured or tokens were wrong; name the rows that have no result.

    Raises:
        PagerError: no row has a result, or ours ended with other logits than stock.
    """
    wrong = [row for row in made if row["same_logits"] is False]
    if wrong:
        raise PagerError(f"The logits of {len(wrong)} of {len(made)} rows differ from those of stock llama.cpp: please report this.")
    lost = [row for row in made if row["status"] not in ("ok", "disturbed")]
    words = [f"{mode_name(row)}, {test_name(row)}: {row['status']}: {row['status_reason']}" for row in lost]
    if made and all(row["median_ts"] is None or row["status"] == "invalid" for row in made):
        raise PagerError(f"No row has a result: {words[0]}")
    if lost:
        reasons = as_options("; ".join(dict.fromkeys(words)))
        click.echo(f"Warning: {len(lost)} of {len(made)} rows have no valid result: {reasons}", err=True)


def _settings(request: _Request, layout: Layout, is_spin_chosen: bool,
              interrupts: Interrupts) -> tuple[Settings, float | None]:
    """Return how every run is made, and the watts of the idle machine, where they can be measured."""
    wanted = Options(policy=request.policy, io=request.io, n_readers=request.readers,  # type: ignore[arg-type]
                     look_ahead=request.look_ahead)
    options = fill(layout, wanted)  # here, that no run's loading time and cap have a part in it
    source = tokens.choose_source(request.tokens, layout.values)
    found = _energy_source(request.power_command)
    energy = meter.Meter(found)
    try:
        energy.measure_idle(request.idle, interrupts.sleep)
    finally:
        energy.close()
    settings = Settings(
        model=layout.paths[0], n_rounds=request.repetitions, timeout_s=request.timeout, is_warm=request.is_warm,
        tokens=source, options={
            "policy": options.policy, "io": options.io, "n_readers": options.n_readers, "piece_bytes": options.piece_bytes,
            "look_ahead": options.look_ahead, "profile": False, "overcommit": request.overcommit},  # or a run would begin with what the one before has learned
        power_command=request.power_command, energy_source=None if isinstance(found, Absent) else found.name,
        no_energy_reason=found.reason if isinstance(found, Absent) else None, is_spin_chosen=is_spin_chosen)
    return settings, energy.idle_w


def _check(request: _Request, layout: Layout) -> None:
    """Refuse what cannot be measured, before anything runs."""
    if not layout.layers:
        raise PagerError("This model has no experts: there is nothing to page. Measure it with llama-bench.")
    wanted = _shapes(request)
    if not wanted:
        raise PagerError("There is nothing to measure: give -p, -n or both above 0.")
    for shape in wanted:
        if shape.n_parallel > shape.n_batch:
            raise PagerError(f"--parallel {shape.n_parallel} puts as many tokens into a batch, and -b {shape.n_batch} allows "
                             f"{shape.n_batch}: give -b {shape.n_parallel} or more.")
        if shape.n_ctx > MOST_TOKENS:
            raise PagerError(f"A context of {shape.n_ctx:,} tokens is needed, and llama.cpp's most is {MOST_TOKENS:,}: give less of -p, "
                             "-n, -d or --parallel.")
    cap_bytes = None if request.cap in ("budget", "none") else _cap_bytes(request.cap)
    memory = probe.memory()
    fits = budget.fits_whole(layout.tensor_bytes, min(memory.available_bytes, cap_bytes or memory.available_bytes),
                             min(memory.total_bytes, cap_bytes or memory.total_bytes))
    if "auto" in request.budgets and fits:
        raise PagerError("The model fits into RAM, where stock llama.cpp runs it and nothing is paged: "
                         "give a --budget to measure, such as --budget 25%.")
    if request.report is not None and not os.access(request.report.absolute().parent, os.W_OK):
        raise PagerError(f"--report: there is no folder {request.report.absolute().parent} that can be written to.")
    for text in request.budgets:
        n_bytes = budget_bytes(text)
        if cap_bytes is not None and n_bytes is not None and n_bytes > cap_bytes:
            raise PagerError(f"--budget {text} is above --cap {request.cap}: the kernel would end the run. Lower the budget.")
        if n_bytes is not None and not request.overcommit and n_bytes > budget.most_bytes(memory.available_bytes):
            raise PagerError(f"--budget {text} is more than a run can get: {budget.format_bytes(memory.available_bytes)} of "
                             f"{budget.format_bytes(memory.total_bytes)} of RAM are available. Lower the budget, free memory, or "
                             "insist with --overcommit.")


def _energy_source(power_command: str | None) -> meter.Found:
    found = meter.find_all(power_command)
    quick = meter.choose(found, _PHASE_S)
    chosen = meter.choose(found) if isinstance(quick, Absent) else quick
    for source in found:
        if source is not chosen and not isinstance(source, Absent):
            source.close()
    return chosen


def _cap_bytes(text: str) -> int:
    try:
        n_bytes = budget_bytes(text)
    except BudgetError:
        n_bytes = None
    if n_bytes is None:
        raise PagerError(f"--cap {text!r} is not understood: give a size such as 4GiB, or 'budget' or 'none'.")
    return n_bytes


def _settable(request: _Request, layout: Layout) -> tuple[int | None, ...]:
    """Return the read-aheads to measure with, in KiB: none where the device is to be left, or can only be left, as it is."""
    asked, has_stock = request.read_ahead, "stock" in request.baselines
    present, setting = probe.read_ahead_kb(layout.paths[0]), probe.read_ahead_setting(layout.paths[0])
    if not asked:
        asked = (None, LINUX_READ_AHEAD_KB) if has_stock else (None,)
    wanted = tuple(dict.fromkeys(present if kb is None else kb for kb in asked))
    if wanted == (present,):
        return ()
    if present is None or setting is None or not os.access(setting, os.W_OK):
        click.echo(f"The read-ahead cannot be set here: it stays at {'an unknown size' if present is None else f'{present:,} KiB'}"
                   f"{', and stock runs once' if has_stock else ''}. Run as root for more.", err=True)
        return ()
    return wanted


def _cases(request: _Request, shape: Shape, read_ahead: tuple[int | None, ...], runner: Runner) -> list[Case]:
    def cap_of(text: str) -> int | None:
        if request.cap == "none":
            return None
        if request.cap != "budget":
            return _cap_bytes(request.cap)
        if (n_bytes := budget_bytes(text)) is not None or "stock" not in request.baselines:
            return n_bytes  # ours keeps to a budget by itself: only what is compared with it needs a cap
        return runner.calibrate(shape, text)

    return cases_of(shape, request.budgets, request.baselines, read_ahead, cap_of)


def _machine(layout: Layout) -> dict[str, Any]:
    """Return what goes into every row about where it was measured, and with which versions."""
    return {
        "cpu_info": probe.cpu_name(),
        "n_cores": physical_cores(),
        "ram_bytes": probe.memory().total_bytes,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "device": probe.device_name(layout.paths[0]),
        "gguf_pager_version": __version__,
        "llama_cpp_python_version": importlib.metadata.version("llama_cpp_python"),
    }


def _page_facts(layout: Layout, machine: dict[str, Any], made: list[dict[str, Any]], runs: list[Run]) -> dict[str, Any]:
    return {
        "title": layout.name,
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": shlex.join(["gguf-pager", *sys.argv[1:]]),
        "gguf_pager_version": machine["gguf_pager_version"],
        "llama_cpp_python_version": machine["llama_cpp_python_version"],
        "machine": machine | {"read_ahead_kb": probe.read_ahead_kb(layout.paths[0]),
                              "device_bytes_per_s": made[0]["device_bytes_per_s"]},
        "model": {
            "name": layout.name, "architecture": layout.architecture,
            "file_bytes": sum(path.stat().st_size for path in layout.paths),
            "expert_bytes": layout.expert_bytes, "dense_bytes": layout.dense_bytes,
            "n_expert_layers": len(layout.layers),
            "n_experts": max(layer.n_experts for layer in layout.layers),
            "n_used": max(layer.n_used for layer in layout.layers),
            "bytes_per_token": layout.bytes_per_token,
        },
        "cache_state": " / ".join(sorted({_cache_state(row) for row in made})),
        "rows": made,
        "timelines": details.timelines(runs),
        "heat": details.heat(runs),
    }


def _cache_state(row: dict[str, Any]) -> str:
    if row["cached_bytes"] is None:
        return str(row["cache"])
    return f"{row['cache']}, at most {row['cached_bytes']:,} bytes of the file in it before a run"
