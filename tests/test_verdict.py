"""Whether a model runs here, in a sentence: the same arithmetic whatever the machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import make_trace_model
import pytest
from click.testing import CliRunner

from gguf_pager import read_layout, verdict
from gguf_pager.cli import main
from gguf_pager.disk import device
from gguf_pager.memory import probe
from gguf_pager.memory.probe import Memory
from gguf_pager.pager import Options, Pager
from gguf_pager.verdict import judge, share_missed

MIB, GIB = 1 << 20, 1 << 30


def memory(available_bytes: int) -> Memory:
    return Memory(total_bytes=64 * GIB, available_bytes=available_bytes, limit_bytes=None, swap_bytes=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 0.25 GB: larger than what a process takes without one, so that a part of it may fit."""
    path = tmp_path_factory.mktemp("verdict") / "model.gguf"
    make_trace_model.make(path, "tiny", layers=6, experts=128, n_ff=768)
    return path


def asked(path: Path, available_bytes: int, bytes_per_s: float | None) -> verdict.Verdict:
    layout = read_layout(path)
    return judge(layout, tuple(Pager(layout, Options()).needs) if layout.layers else (), memory(available_bytes), bytes_per_s)


def test_share_missed_falls_from_all_to_nothing() -> None:
    shares = [share_missed(percent / 100) for percent in range(101)]
    assert shares == sorted(shares, reverse=True) and shares[0] == 1 and shares[100] == 0
    assert share_missed(0.25) == pytest.approx(0.381)


RESERVE = int(64 * GIB * 0.08)


def test_verdicts(model: Path, dense_model: Path) -> None:
    path, layout = model, read_layout(model)
    room = RESERVE + verdict.process_bytes(layout, layout.expert_bytes // 2)
    assert asked(dense_model, 40 * GIB, 1e9).sentence.startswith("Has no experts")
    whole = asked(path, 40 * GIB, 1e9)
    assert whole.kind == "stock" and whole.sentence.startswith("Runs well: all ")
    well = asked(path, room, 1e9)
    assert well.kind == "well" and well.sentence.startswith("Runs well (") and "1.0 GB/s measured here" in well.sentence
    slow = asked(path, room, 1e6)
    assert slow.kind == "slowly" and slow.sentence.startswith("Runs, slowly, (")
    unknown = asked(path, room, None)
    assert unknown.kind == "unknown" and "not measured yet" in unknown.sentence
    least = asked(path, RESERVE + MIB, 1e9)
    assert least.kind == "slowly" and "with --budget min" in least.sentence
    nothing = asked(path, MIB, 1e9)
    assert nothing.kind == "no" and nothing.sentence.startswith("Does not fit: it needs ")


def test_inspect_and_doctor_begin_with_it(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(model)

    def call(*arguments: str) -> Any:
        return CliRunner().invoke(main, arguments)

    assert call("inspect", path).output.startswith("Runs well: all ")
    assert call("doctor", path).output.splitlines()[0].endswith("stock llama.cpp runs it.")
    layout = read_layout(path)
    room = memory(RESERVE + verdict.process_bytes(layout, layout.expert_bytes // 2))
    monkeypatch.setattr(probe, "memory", lambda: room)
    monkeypatch.setattr(device, "best_rate", lambda _: None)
    assert "doctor MODEL --probe" in call("inspect", path).output.splitlines()[1]
    assert json.loads(call("inspect", "--json", path).output)["verdict"] == "unknown"
    assert json.loads(call("doctor", "--json", path).output)["checks"]["verdict"]["status"] == "note"
    monkeypatch.setattr(device, "best_rate", lambda _: 3e9)
    assert call("inspect", path).output.startswith("Runs well (")
    monkeypatch.setattr(probe, "memory", lambda: memory(MIB))
    assert call("inspect", path).output.startswith("Does not fit")
    assert call("doctor", path).exit_code == 1
