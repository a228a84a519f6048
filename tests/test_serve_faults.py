"""A server whose disk, file, memory or settings fail: it says so, and goes on where it can."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import Server, serving

TOLERANCE = 1.03
FOREVER: dict[str, Any] = {"prompt": "A long story:", "logit_bias": {"2": -100, "0": -100}}


def ask(url: str, **given: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/completions", json={"prompt": "Once", "max_tokens": 4, **given}, timeout=120)


def test_file_that_is_cut_while_it_answers_is_told_and_the_server_lives(small: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copy(small, tmp_path / "copy.gguf"))
    with serving(copy, "--budget", "min", "-c", "1024") as server:
        assert ask(server.url).status_code == 200
        answers: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: answers.append(ask(server.url, **FOREVER, max_tokens=900)))
        thread.start()
        while not server.health()["running"]:
            pass
        os.truncate(copy, copy.stat().st_size // 2)
        thread.join(60)
        assert answers[0].status_code == 500, answers[0].text
        assert re.search("truncated|changed", answers[0].json()["error"]["message"]), answers[0].text
        health = httpx.get(f"{server.url}/health", timeout=60)
        assert health.status_code == 503 and health.json()["status"] == "error" and health.json()["running"] == 0
        assert re.search("truncated|changed", health.json()["reason"])
        assert ask(server.url).status_code == 500, "the model is gone for good"
        with httpx.stream("POST", f"{server.url}/v1/completions", json={"prompt": "Once", "stream": True}, timeout=60) as stream:
            events = [line for line in stream.iter_lines() if line.startswith("data: ")]
        assert re.search("truncated|changed", json.loads(events[-1][6:])["error"]["message"])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_process_keeps_to_its_budget_with_several_clients_and_embeddings(small: Path) -> None:
    budget = 420 << 20
    with serving(small, "--budget", str(budget), "--parallel", "4", "-c", "512") as server:
        with ThreadPoolExecutor(8) as pool:
            texts = list(pool.map(lambda i: ask(server.url, prompt=f"{i} " + "word " * 300, max_tokens=64), range(8)))
            assert all(answer.status_code == 200 for answer in texts)
        given = httpx.post(f"{server.url}/v1/embeddings", json={"input": ["a text", "another"]}, timeout=120)
        assert given.status_code == 200, given.text
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert found is not None and int(found[1]) * 1024 <= budget * TOLERANCE


def test_context_that_does_not_fit_says_what_to_lower(small: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "gguf_pager", "serve", str(small), "--port", "0", "--budget", "300MiB", "--parallel", "64",
                           "-c", "8192"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1 and "Error" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("numbers", [(signal.SIGTERM,), (signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGINT)])
def test_long_prompt_does_not_hold_up_the_end(small: Path, numbers: tuple[signal.Signals, ...]) -> None:
    """Computed to its end, this batch would take most of a minute."""
    with serving(small, "--budget", "50%", "-c", "8192", "-b", "8192", "-ub", "8192") as server:
        answers: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: answers.append(ask(server.url, prompt="word " * 7800)))
        thread.start()
        while not server.health()["running"]:
            time.sleep(0.01)
        time.sleep(0.5)
        begun = time.monotonic()
        for number in numbers[1:]:
            server.process.send_signal(number)
            time.sleep(0.3)
        assert server.stop(numbers[0]) == 0 and time.monotonic() - begun < 20
        thread.join()
        assert answers[0].status_code == 503 and answers[0].json()["error"]["code"] == "server_closing"
        assert "Traceback" not in "".join(server.said)


def test_schema_that_leaves_too_much_open_is_told_by_its_name(small: Path) -> None:
    """llama.cpp takes exactly 1,000: if it takes more, or fewer, this fails."""
    with serving(small, "--budget", "25%", "-c", "256") as server:
        def wanted(schema: dict[str, Any]) -> httpx.Response:
            return httpx.post(f"{server.url}/v1/chat/completions", timeout=60, json={
                "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2,
                "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}})

        items = {"type": "integer"}
        for least, most, kind in (("minLength", "maxLength", {"type": "string"}), ("minItems", "maxItems", {"type": "array", "items": items})):
            assert wanted({**kind, most: 1000}).status_code == 200
            assert wanted({**kind, least: 500, most: 1500}).status_code == 200
            refused = wanted({"type": "object", "properties": {"a": {**kind, most: 1001}}})
            assert refused.status_code == 400 and f"{most} 1,001" in refused.json()["error"]["message"], refused.text
            refused = wanted({**kind, least: 500, most: 1501})
            assert refused.status_code == 400 and least in refused.json()["error"]["message"], refused.text
        for pattern in ("^a{0,1001}$", "^a{1,1002}$"):
            refused = wanted({"type": "string", "pattern": pattern})
            assert refused.status_code == 400 and "repeats something" in refused.json()["error"]["message"], refused.text


def test_two_servers_share_a_folder_of_conversations(small: Path, tmp_path: Path) -> None:
    """Both go on with one conversation, in different ways: neither way is lost. One of them is killed."""
    def cached(server: Server, prompt: str) -> int:
        return int(ask(server.url, prompt=prompt, temperature=0).json()["usage"]["prompt_tokens_details"]["cached_tokens"])

    def wait_for(n_states: int) -> None:
        end = time.monotonic() + 30
        while len(list(folder.glob("*.state"))) < n_states or list(folder.glob(".new-*")):
            assert time.monotonic() < end
            time.sleep(0.05)

    folder, begun = tmp_path / "states", "The cat sat on the mat. " * 20
    ways = [begun + word * 40 for word in ("red ", "blue ")]
    arguments = ("--budget", "25%", "-c", "512", "--state-dir", str(folder))
    with serving(small, *arguments) as first, serving(small, *arguments) as second:
        assert cached(first, begun) == 0
        wait_for(1)
        for server, way in zip((first, second), ways, strict=True):
            assert cached(server, way) > 100
        wait_for(2)
        assert [cached(server, way) > 150 for server, way in zip((second, first), ways, strict=True)] == [True, True]
        first.process.kill()
        first.process.wait()
        assert second.stop() == 0
        assert not any("damaged" in line or "left alone" in line for line in second.said)
    with serving(small, *arguments) as server:
        assert [cached(server, way) > 150 for way in ways] == [True, True]
    assert not list(folder.glob(".new-*"))


# ---- settings -----------------------------------------------------------------------------------------------------------

def test_config_file_of_llama_cpp_server_is_understood(small: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"host: 127.0.0.1\nport: 1\napi_key: secret\nmodels:\n  - model: {small}\n    model_alias: mine\n    n_ctx: 256\n"
                      "    n_gpu_layers: 20\n")
    command = [sys.executable, "-m", "gguf_pager", "serve", "--config", str(config), "--port", "0", "--budget", "25%", "-t", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        said = ""
        for line in process.stderr:
            said += line
            if "Serving" in line:
                break
        assert "Serving mine" in said and "256 tokens each" in said and "n_gpu_layers" in said, said
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("name", "text", "told"), [
    ("x.json", "{", "not understood"), ("x.yaml", "a: [", "not understood"), ("x.json", "{}", "names no models"),
    ("x.json", '{"models": []}', "names no models"), ("x.json", '{"models": [{"model": "/no/such"}]}', "does not exist"),
    ("missing.json", None, "cannot be read"),
])
def test_config_file_that_is_wrong_is_refused(tmp_path: Path, name: str, text: str | None, told: str) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    done = subprocess.run([sys.executable, "-m", "gguf_pager", "serve", "--config", str(path), "--port", "0"], capture_output=True, text=True,
                          timeout=60, check=False)
    assert done.returncode == 1 and told in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize(("arguments", "told"), [
    (("--state-size", "lots"), "'lots'"), (("--state-size", "25%"), "a size such as"),
    (("--host", "no.such.host.invalid"), "Cannot listen"), (("--state-dir", "/proc/nowhere"), "--state-dir"),
    (("--cors", "localhost:3000"), "--cors"), (("--cors", "http://localhost:3000/page"), "--cors"), (("--cors", ""), "--cors"),
    (("--api-key", ""), "--api-key"), (("--parallel", "0"), "parallel"), (("--port", "99999"), "port"),
])
def test_setting_that_cannot_be_is_refused(small: Path, arguments: tuple[str, ...], told: str) -> None:
    done = subprocess.run([sys.executable, "-m", "gguf_pager", "serve", str(small), "--budget", "25%", "-c", "256", "--port", "0", *arguments],
                          capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode in (1, 2) and told in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_open_server_says_so(small: Path) -> None:
    with serving(small, "--budget", "25%", "-c", "256", "--host", "0.0.0.0") as server:
        assert any("--api-key" in line for line in server.said)
    with serving(small, "--budget", "25%", "-c", "256", "--host", "0.0.0.0", "--api-key", "x") as server:
        assert not any("Anybody" in line for line in server.said)


def test_pages_from_elsewhere_are_let_in_by_name_only(small: Path) -> None:
    """What a browser asks before, and what it lets a page read: also of an error, and without a key, or nobody could say what is wrong."""
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    page, other = "http://localhost:3000", "http://localhost:3001"
    with serving(small, "--budget", "25%", "-c", "256", "--api-key", "x", "--cors", f"{page.upper()}/") as server:
        url = f"{server.url}/v1/chat/completions"
        allowed = httpx.options(url, headers={"Origin": page, **asked})
        assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == page
        assert "authorization" in allowed.headers["access-control-allow-headers"]
        assert "access-control-allow-origin" not in httpx.options(url, headers={"Origin": other, **asked}).headers
        for origin, given in ((page, page), (other, None)):
            refused = httpx.post(url, json={}, headers={"Origin": origin})
            assert refused.status_code == 401 and refused.headers.get("access-control-allow-origin") == given
    with serving(small, "--budget", "25%", "-c", "256") as server:
        url = f"{server.url}/v1/completions"
        assert "access-control-allow-origin" not in httpx.options(url, headers={"Origin": page, **asked}).headers
        simple = httpx.post(url, content='{"prompt": "a"}', headers={"Origin": page, "Content-Type": "text/plain"})
        assert simple.status_code == 400, "what a page may send without asking is not computed"


def test_environment_sets_every_option(small: Path) -> None:
    variables = {"GGUF_PAGER_MODEL": str(small), "GGUF_PAGER_BUDGET": "25%", "GGUF_PAGER_CTX_SIZE": "512", "GGUF_PAGER_PARALLEL": "2",
                 "GGUF_PAGER_ALIAS": "named"}
    with serving(small, environment=variables) as server:
        said = "".join(server.said)
        assert "Serving named" in said and "2 answers at a time, 512 tokens each" in said
