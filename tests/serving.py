"""A server as users start it, in a process of its own, and what its stderr said."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai


class Server:
    """A running `gguf-pager serve`."""

    def __init__(self, model: Path, *arguments: str, environment: dict[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "gguf_pager", "serve", str(model), "--port", "0", "-t", "1", "--no-progress", *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                        env={**os.environ, **(environment or {})})
        self.said: list[str] = []
        self._is_up = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._is_up.wait(120)
        found = re.search(r"at (http://\S+?) ", "".join(self.said))
        if found is None:
            self.process.kill()
            raise AssertionError(f"the server did not start: {''.join(self.said)}")
        self.url = found[1]
        self.wait_ready()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            if "Serving" in line:
                self._is_up.set()
        self._is_up.set()

    def wait_ready(self) -> None:
        """Wait until it answers."""
        transport = httpx.HTTPTransport(retries=20)
        with httpx.Client(transport=transport) as client:
            assert client.get(f"{self.url}/health", timeout=60).status_code == 200

    def client(self, **given: object) -> openai.OpenAI:
        """Return OpenAI's own client."""
        return openai.OpenAI(**{"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0, "timeout": 120, **given})

    def health(self) -> dict[str, int]:
        """Return what /health says."""
        return httpx.get(f"{self.url}/health", timeout=60).json()

    def metric(self, name: str) -> float:
        """Return a metric's value."""
        text = httpx.get(f"{self.url}/metrics", timeout=60).text
        found = re.search(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
        assert found is not None, name
        return float(found[1])

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End it as a service manager does; return its exit code."""
        self.process.send_signal(number)
        code = self.process.wait(60)
        self._reader.join(10)
        return code


@contextmanager
def serving(model: Path, *arguments: str, environment: dict[str, str] | None = None) -> Iterator[Server]:
    """Run a server for the time of the block; it must end cleanly."""
    server = Server(model, *arguments, environment=environment)
    try:
        yield server
        if server.process.poll() is None:
            assert server.stop() == 0, "".join(server.said)
    finally:
        server.process.kill()
        server.process.wait()
