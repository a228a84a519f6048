"""bench with several sequences, run for real: that each gets its own tokens and logits, and that what they share is counted."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import make_trace_model
import numpy as np
import pytest
from click.testing import CliRunner
from llama_cpp import llama_cpp as low
from trace_routing import recorded_experts

from gguf_pager.bench import tokens, worker
from gguf_pager.bench.cases import Mode, Shape
from gguf_pager.bench.disk import Device
from gguf_pager.bench.interrupts import Interrupts
from gguf_pager.bench.runner import Runner, Settings
from gguf_pager.bench.sequences import One, Several, sequences_of
from gguf_pager.cli import main
from gguf_pager.cli.serve import MOST_SEQUENCES
from gguf_pager.errors import EngineError
from gguf_pager.model.layout import read_layout

COMMAND = [sys.executable, "-m", "gguf_pager", "bench"]
SPEC = make_trace_model.preset_spec("tiny")
N_PROMPT, N_GEN = 16, 12


def bench(model: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    line = [*COMMAND, str(model), "-t", "1", "-r", "1", "--idle", "0", "--read-ahead", "present", *arguments]
    done = subprocess.run(line, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done


def bench_rows(model: Path, *arguments: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in bench(model, "-o", "jsonl", *arguments).stdout.splitlines()]


# ---- rows -----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def rows(trace_model: Path) -> list[dict[str, Any]]:
    return bench_rows(trace_model, "-p", str(N_PROMPT), "-n", str(N_GEN), "--budget", "50%", "--baseline", "stock,resident",
                      "--parallel", "1,3,8")


def of(rows: list[dict[str, Any]], mode: str, n_parallel: int, name: str = "n_gen") -> dict[str, Any]:
    return next(row for row in rows if row["mode"] == mode and row["n_parallel"] == n_parallel and row[name])


def test_rows_of_each_number_follow_one_another(rows: list[dict[str, Any]]) -> None:
    assert [(row["n_parallel"], row["mode"], row["n_prompt"], row["n_gen"], row["n_depth"]) for row in rows] == [
        (n, mode, *numbers) for n in (1, 3, 8) for mode in ("paged", "stock", "resident")
        for numbers in ((N_PROMPT, 0, 0), (0, N_GEN, N_PROMPT))]
    assert all(row["median_ts"] > 1 for row in rows)


def test_speed_is_of_all_together(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        n_tokens = row["n_parallel"] * (row["n_prompt"] or row["n_gen"])
        assert row["median_ts"] == pytest.approx(n_tokens / row["avg_ns"] * 1e9)
        assert row["sequence_ts"] == pytest.approx(row["median_ts"] / row["n_parallel"])


def test_logits_of_all_sequences_are_stocks(rows: list[dict[str, Any]]) -> None:
    assert [row["same_logits"] for row in rows if row["mode"] == "paged"] == [True] * 6


def test_ratio_to_one_sequence_is_that_of_the_speeds(rows: list[dict[str, Any]]) -> None:
    for mode in ("paged", "stock", "resident"):
        for name in ("n_prompt", "n_gen"):
            one, three = of(rows, mode, 1, name), of(rows, mode, 3, name)
            assert one["over_1"] is None
            if one["status"] != "disturbed":
                assert three["over_1"] == pytest.approx(three["median_ts"] / one["median_ts"])


def test_union_is_that_of_the_recording(rows: list[dict[str, Any]]) -> None:
    """What each step wants is computed from the recording that the model was made of, and not asked of the pager."""
    recorded = recorded_experts(SPEC.trace, range(SPEC.first_layer, SPEC.first_layer + SPEC.layers), SPEC.positions, SPEC.top_k,
                                SPEC.experts)
    for n_parallel in (1, 3, 8):
        places = tokens.take(range(SPEC.positions), N_PROMPT + N_GEN, 0, 1, n_parallel)
        n_wanted = sum(len({expert for own in places for expert in layer[own[step]]})
                       for layer in recorded.tolist() for step in range(N_PROMPT, N_PROMPT + N_GEN))
        union = n_wanted / (N_GEN * SPEC.layers * SPEC.top_k)
        assert of(rows, "paged", n_parallel)["expert_union"] == pytest.approx(union)
        assert union == 1 if n_parallel == 1 else 1 < union < n_parallel
    assert of(rows, "stock", 3)["expert_union"] is None and of(rows, "paged", 3, "n_prompt")["expert_union"] is None


def test_cap_is_found_with_as_many_sequences_and_stock_has_it_too(rows: list[dict[str, Any]]) -> None:
    if rows[0]["cap"] == "none":
        pytest.skip(rows[0]["cap_reason"])
    for n_parallel in (1, 3, 8):
        ours, stock = of(rows, "paged", n_parallel), of(rows, "stock", n_parallel)
        assert ours["cap_bytes"] == stock["cap_bytes"] > ours["peak_rss_bytes"]


def test_cap_has_room_for_the_caches_of_all_tokens_of_all_sequences(trace_model: Path) -> None:
    """Calibration decodes few tokens, in a context for all."""
    layout = read_layout(trace_model)
    settings = Settings(trace_model, 1, 60.0, False, "trace", {}, None, None, "not asked for", False)
    runner = Runner(settings, layout, Device(layout.paths, None), Interrupts(), lambda _: None)
    one, four = (runner.calibrate(Shape(8, 10_000, 0, 1, 64, 64, n), "50%") for n in (1, 4))
    cell_bytes = SPEC.layers * 2 * SPEC.n_head_kv * SPEC.head_dim * 2  # keys and values in f16
    assert one > 10_000 * cell_bytes and four - one > 0.9 * 30_000 * cell_bytes


def test_depth_is_each_sequences_own_and_a_prompt_may_be_all_or_nothing(trace_model: Path) -> None:
    made = bench_rows(trace_model, "-p", "0,9", "-n", "0,5", "-d", "10", "--parallel", "2", "--budget", "50%")
    assert [(row["mode"], row["n_prompt"], row["n_gen"], row["n_depth"], row["same_logits"]) for row in made if row["mode"] == "paged"] == [
        ("paged", 0, 5, 10, True), ("paged", 9, 0, 10, True), ("paged", 9, 0, 10, True), ("paged", 0, 5, 19, True)]
    assert all(row["n_parallel"] == 2 and row["over_1"] is None for row in made)


@pytest.mark.parametrize("arch", ["gpt-oss", "qwen3next", "deepseek2"])
def test_sequences_with_windows_states_and_other_attention_have_stocks_logits(zoo_model: Callable[..., Path], arch: str) -> None:
    made = bench_rows(zoo_model(arch), "-p", "20", "-n", "6", "--parallel", "3", "--budget", "60%", "--tokens", "random", "--cap", "none")
    assert [(row["same_logits"], row["left_alone"]) for row in made if row["mode"] == "paged"] == [(True, 0)] * 2


def test_table_and_page_tell_of_sequences_and_without_them_are_as_before(trace_model: Path, tmp_path: Path) -> None:
    line = ("-p", "8", "-n", "8", "--budget", "50%", "--cap", "none")
    done = bench(trace_model, *line, "--parallel", "1-2", "--report", str(tmp_path / "several.html"))
    assert "| parallel |" in done.stdout and "| union |" in done.stdout and "paged 50%, 2 sequences" in done.stdout
    assert "[3/4] paged 50%, 2 sequences: prefill" in done.stderr
    page = (tmp_path / "several.html").read_text()
    assert "<th>union</th>" in page and "Decode of 2 sequences, 8 tokens each after 8" in page
    done = bench(trace_model, *line, "--report", str(tmp_path / "one.html"))
    page = (tmp_path / "one.html").read_text()
    assert not any(word in done.stdout + page for word in ("parallel", "union", "sequences"))


# ---- sequences ------------------------------------------------------------------------------------------------------

@contextmanager
def a_run(model: Path, mode: Mode, shape: Shape, source: str = "trace") -> Iterator[worker.Run]:
    task = worker.Task(str(model), mode, shape, False, "60%" if mode == "paged" else None, {}, False, False, source, 0, 1, None, None,
                       "not asked for", os.getpid(), time.monotonic_ns())
    llm = worker.open_model(task)
    try:
        yield worker.Run(task, llm, read_layout(model))
    finally:
        llm.close()


def steps_of(model: Path, mode: Mode, shape: Shape) -> list[list[bytes]]:
    """Return the logits of each sequence after its prompt and after each step."""
    with a_run(model, mode, shape) as run:
        run.prefill()
        found = [run._sequences.logits()]
        for step in run._steps:
            run._sequences.step(step)
            found.append(run._sequences.logits())
        return found


def test_every_sequence_has_stocks_logits_after_every_step_and_they_are_its_own(trace_model: Path) -> None:
    """Prompts take two calls of llama.cpp. The model answers each token of its recording with the next one."""
    shape = Shape(30, 6, 0, 1, 64, 64, 3)
    ours, stock = (steps_of(trace_model, mode, shape) for mode in ("paged", "stock"))
    assert ours == stock and len(ours) == 7 and all(len(set(logits)) == 3 for logits in ours)
    first = int(read_layout(trace_model).values["gguf_pager.trace.first_token"])
    places = tokens.take(range(SPEC.positions), shape.n_sequence_tokens, 0, 1, 3)
    for step, logits in enumerate(ours):
        for own, row in zip(places, logits, strict=True):
            assert int(np.frombuffer(row, np.single).argmax()) == first + own[29 + step] + 1


def test_digest_is_of_the_logits_of_all_sequences(trace_model: Path) -> None:
    shape = Shape(4, 2, 0, 1, 64, 64, 3)
    with a_run(trace_model, "paged", shape) as run:
        run.prefill()
        before = run.digest()
        run.decode()
        assert len(run.token_ns) == 2 and before != run.digest()
        assert run.digest() == hashlib.sha256(b"".join(steps_of(trace_model, "stock", shape)[-1])).hexdigest()


def test_sequences_compute_together_what_each_computes_alone(zoo_model: Callable[..., Path]) -> None:
    """To the rounding of other batches: up to 0.03 was seen, and 1.4 where a third of the prompt was missing."""
    model = zoo_model("qwen3moe")
    with a_run(model, "paged", Shape(30, 6, 0, 1, 64, 64, 3), "random") as run:
        run.prefill()
        prompts, steps, together = run._prompts, run._steps, [run._sequences.logits()]
        for step in steps:
            run._sequences.step(step)
            together.append(run._sequences.logits())
        memory = low.llama_get_memory(run.llm.ctx)
        ends = [(low.llama_memory_seq_pos_min(memory, n), low.llama_memory_seq_pos_max(memory, n)) for n in range(3)]
        assert ends == [(0, 35)] * 3
    with a_run(model, "stock", Shape(30, 6, 0, 1, 64, 64), "random") as run:
        for number in range(3):
            run.llm.reset()
            alone = [run._sequences.extend([prompts[number]]) and run._sequences.logits()[0]]
            for step in steps:
                run._sequences.step([step[number]])
                alone.append(run._sequences.logits()[0])
            for row, own in zip(alone, together, strict=True):
                np.testing.assert_allclose(np.frombuffer(own[number], np.single), np.frombuffer(row, np.single), rtol=0, atol=0.2)


def test_one_sequence_is_evals_and_several_are_not(trace_model: Path) -> None:
    with a_run(trace_model, "stock", Shape(4, 1, 0, 1, 64, 64)) as run:
        assert isinstance(run._sequences, One) and low.llama_n_seq_max(run.llm.ctx) == 1
    for mode in ("stock", "paged"):
        with a_run(trace_model, mode, Shape(4, 1, 0, 1, 64, 64, 5)) as run:  # type: ignore[arg-type]
            assert isinstance(run._sequences, Several) and low.llama_n_seq_max(run.llm.ctx) == 5
            assert low.llama_n_ctx(run.llm.ctx) == low.llama_n_ctx_seq(run.llm.ctx) == 256, "one cache for all"


def test_batches_are_counted_as_they_are_computed(trace_model: Path) -> None:
    with a_run(trace_model, "stock", Shape(30, 1, 0, 1, 64, 16, 3)) as run:
        assert run._sequences.extend(run._prompts) == 6, "90 tokens: 64 in four, 26 in two"


def test_more_tokens_than_the_context_holds_are_told(trace_model: Path) -> None:
    with a_run(trace_model, "stock", Shape(4, 1, 0, 1, 64, 64, 2)) as run, pytest.raises(EngineError, match="llama_decode returned 1"):
        sequences_of(run.llm, 2).extend([[300] * 200] * 2)


# ---- what goes wrong ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("arguments", "message"), [
    (("--parallel", "0"), "the least is 1."), (("--parallel", "257"), "the most is 256: llama.cpp keeps no more sequences apart."),
    (("--parallel", "1,x"), "is not understood"), (("--parallel", "4-2"), "ends before it begins"),
])
def test_number_of_sequences_that_cannot_be_is_misuse(trace_model: Path, arguments: tuple[str, ...], message: str) -> None:
    result = CliRunner().invoke(main, ["bench", str(trace_model), "--budget", "min", *arguments])
    assert result.exit_code == 2 and result.stdout == ""
    assert message in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(("arguments", "message"), [
    (("--parallel", "1-8*2", "-b", "4"), "--parallel 8 puts as many tokens into a batch, and -b 4 allows 4: give -b 8 or more."),
    (("--parallel", "256", "-p", "100000000"), "A context of 25,600,032,768 tokens is needed, and llama.cpp's most is 2,147,483,392"),
    (("-p", "3000000000",), "llama.cpp's most is 2,147,483,392: give less of -p, -n, -d or --parallel."),
])
def test_more_sequences_than_llama_cpp_takes_are_refused_at_once(trace_model: Path, arguments: tuple[str, ...], message: str) -> None:
    result = CliRunner().invoke(main, ["bench", str(trace_model), "--budget", "min", *arguments])
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.startswith("Error: ") and message in result.stderr and len(result.stderr.splitlines()) == 1


def test_most_sequences_are_llama_cpps() -> None:
    assert low.llama_max_parallel_sequences() == MOST_SEQUENCES
