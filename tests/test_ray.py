"""Replicas behind Ray Serve: they answer alike, a rolling restart loses no request, and one that dies is replaced.

Takes 240 MB of Ray, so it is not part of `scripts/test`: pip install -e '.[ray,test]', then pytest tests/test_ray.py.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

pytestmark = pytest.mark.filterwarnings("ignore")

pytest.importorskip("ray", reason="needs pip install 'gguf-pager[ray]'")

import ray
from ray import serve

ROOT = Path(__file__).resolve().parent.parent
URL = "http://127.0.0.1:8000"
BODY = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0, "max_tokens": 8}


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("ray_serve", ROOT / "examples" / "ray_serve.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ray_serve"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False,
             runtime_env={"env_vars": {"PYTHONPATH": str(ROOT / "examples"), "GGUF_PAGER_CACHE": os.environ["GGUF_PAGER_CACHE"]}})
    serve.start(http_options={"host": "127.0.0.1", "port": 8000})
    yield
    serve.shutdown()
    ray.shutdown()


def deploy(example: Any, small: Path, n_ctx: int) -> None:
    serve.run(example.Model.options(num_replicas=2, ray_actor_options={"num_cpus": 1}).bind(
        str(small), 1, budget="25%", n_ctx=n_ctx, n_threads=1))


def ask() -> str:
    answer = httpx.post(f"{URL}/v1/chat/completions", json=BODY, timeout=120)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def test_rolling_restart_loses_no_request(example: Any, small: Path) -> None:
    deploy(example, small, 512)
    expected = ask()
    answers: list[str] = []
    faults: list[str] = []
    is_over = threading.Event()

    def keep_asking() -> None:
        while not is_over.is_set():
            try:
                answers.append(ask())
            except Exception as error:  # noqa: BLE001  whatever it is, a request was lost
                faults.append(repr(error))

    clients = [threading.Thread(target=keep_asking) for _ in range(3)]
    for client in clients:
        client.start()
    before = replicas()
    deploy(example, small, 768)  # other settings: every replica is replaced
    for _ in range(3):
        ask()
    is_over.set()
    for client in clients:
        client.join()
    assert replicas().isdisjoint(before), "all of them are new"
    assert faults == [] and len(answers) > 5 and set(answers) == {expected}


def replicas() -> set[int]:
    """Return the processes of the replicas."""
    return {process.pid for process in psutil.process_iter(["cmdline"])
            if process.info["cmdline"] and "ServeReplica" in process.info["cmdline"][0]}


def test_replica_that_dies_is_replaced(example: Any, small: Path) -> None:
    deploy(example, small, 512)
    before = replicas()
    assert len(before) == 2
    os.kill(next(iter(before)), signal.SIGKILL)
    until = time.monotonic() + 90
    while len(replicas() - before) < 1 and time.monotonic() < until:
        time.sleep(0.5)
    assert len(replicas()) == 2 and replicas() != before
    assert ask()


def test_streams_pass_through(example: Any, small: Path) -> None:
    deploy(example, small, 512)
    with httpx.stream("POST", f"{URL}/v1/chat/completions", json={**BODY, "stream": True}, timeout=120) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]" and len(lines) > 4
