"""An hour of clients that behave as clients do: `python scripts/soak_serve.py MODEL [--minutes 60] [--clients 4]`.

Each of them, at random: streams an answer and checks it, asks without a stream, hangs up in the middle, lets itself be killed (a process,
kill -9), sends nonsense, or asks for embeddings. MODEL is the talking model (scripts/make_talking_model.py): its answers to ten questions are
known, and an answer with somebody else's text in it is not among them. Every minute a line of JSON tells memory, threads, open files and what was
done; the last one tells whether anything was held, leaked or wrong, and the exit code is 1 if so. Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import httpx
from serving import Server

QUESTIONS: list[tuple[str, str]] = list(json.loads((ROOT / "tests" / "talking_questions.json").read_text()).items())
"""And what is found in the answer."""
MOST_WRONG_SHARE = 0.02
"""Batches of several sequences have other last bits than single tokens, and now and then another word."""

MOST_GROWTH = 1.05
"""Of resident memory, from a tenth of the time to the end."""

NONSENSE: tuple[bytes, ...] = (
    b"", b"{", b"\xff\xfe", b"[]", b'{"messages": 3}', b'{"messages": []}', b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": -5}',
    b'{"messages": [{"role": "user", "content": "x"}], "grammar": "root ::= ("}', b'{"messages": [{"role": "nobody"}], "temperature": "hot"}',
    json.dumps({"messages": [{"role": "user", "content": "word " * 5000}]}).encode(),
)

VICTIM = """
import sys, httpx
with httpx.stream("POST", sys.argv[1], content=sys.argv[2], timeout=120) as answer:
    for line in answer.iter_lines():
        print("x", flush=True)
"""


class Client(threading.Thread):
    """Somebody who asks until the time is over."""

    def __init__(self, url: str, until: float, seed: int) -> None:
        super().__init__(daemon=True)
        self.url, self._until, self._random = url, until, random.Random(seed)
        self.done, self.wrong = Counter[str](), list[str]()

    def run(self) -> None:
        """Ask."""
        ways = (self.stream, self.stream, self.whole, self.hang_up, self.be_killed, self.nonsense, self.embed)
        while time.monotonic() < self._until:
            way = self._random.choice(ways)
            try:
                way()
                self.done[way.__name__] += 1
            except Exception as error:  # noqa: BLE001  whatever it is, it is a result
                self.wrong.append(f"{way.__name__}: {type(error).__name__}: {error}")

    def _body(self, question: tuple[str, str], **given: Any) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": question[0]}], "temperature": 0, "max_tokens": 48, **given}

    def _check(self, question: tuple[str, str], text: str) -> None:
        self.done["checked"] += 1
        if not re.search(question[1], text, re.IGNORECASE):
            self.done["unexpected"] += 1
            print(json.dumps({"unexpected": text, "question": question[0]}), flush=True)

    def stream(self) -> None:
        """Read an answer to its end."""
        question, text = self._random.choice(QUESTIONS), ""
        with httpx.stream("POST", f"{self.url}/v1/chat/completions", json=self._body(question, stream=True), timeout=120) as answer:
            answer.raise_for_status()
            lines = [line for line in answer.iter_lines() if line.startswith("data: ")]
        assert lines[-1] == "data: [DONE]", lines[-1]
        for line in lines[:-1]:
            text += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
        self._check(question, text)

    def whole(self) -> None:
        """Take an answer in one piece."""
        question = self._random.choice(QUESTIONS)
        answer = httpx.post(f"{self.url}/v1/chat/completions", json=self._body(question), timeout=120)
        answer.raise_for_status()
        self._check(question, answer.json()["choices"][0]["message"]["content"])

    def hang_up(self) -> None:
        """Stop listening after a few tokens."""
        body = self._body(self._random.choice(QUESTIONS), stream=True, max_tokens=400)
        n = self._random.randrange(6)
        with httpx.stream("POST", f"{self.url}/v1/chat/completions", json=body, timeout=120) as answer:
            for i, _ in enumerate(answer.iter_lines()):
                if i >= n:
                    break

    def be_killed(self) -> None:
        """Have a process ask that ends without a word."""
        body = json.dumps(self._body(self._random.choice(QUESTIONS), stream=True, max_tokens=400))
        victim = subprocess.Popen([sys.executable, "-c", VICTIM, f"{self.url}/v1/chat/completions", body], stdout=subprocess.PIPE)
        assert victim.stdout is not None
        victim.stdout.readline()
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        victim.stdout.close()

    def nonsense(self) -> None:
        """Ask what cannot be answered."""
        answer = httpx.post(f"{self.url}/v1/chat/completions", content=self._random.choice(NONSENSE), timeout=120,
                            headers={"Content-Type": "application/json"})
        assert answer.status_code == 400, f"{answer.status_code}: {answer.text[:200]}"

    def embed(self) -> None:
        """Ask for vectors."""
        answer = httpx.post(f"{self.url}/v1/embeddings", json={"input": ["one", "two"]}, timeout=120)
        answer.raise_for_status()
        assert len(answer.json()["data"]) == 2


def watch(server: Server) -> dict[str, int]:
    """Return what the server holds."""
    folder = Path(f"/proc/{server.process.pid}")
    fields = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
    return {"resident_bytes": int(fields["VmRSS"].split()[0]) * 1024, "threads": int(fields["Threads"]), "files": len(os.listdir(folder / "fd"))}


def main() -> int:
    """Let them loose, and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--budget", default="50%")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = Server(given.model, "--budget", given.budget, "--parallel", "3", "-c", "1024", "--state-dir", folder, "--state-size", "200MB")
        begun = time.monotonic()
        until = begun + given.minutes * 60
        clients = [Client(server.url, until, seed) for seed in range(given.clients)]
        for client in clients:
            client.start()
        early: dict[str, int] | None = None
        while any(client.is_alive() for client in clients):
            time.sleep(min(60.0, max(1.0, given.minutes * 6)))
            now = watch(server)
            if early is None and time.monotonic() - begun > given.minutes * 6:
                early = now
            print(json.dumps({"minutes": round((time.monotonic() - begun) / 60, 1), **now, **sum((client.done for client in clients), Counter())}),
                  flush=True)
        while server.health()["running"] and time.monotonic() < until + 60:
            time.sleep(0.2)
        health, late = server.health(), watch(server)
        code = server.stop()
    done = sum((client.done for client in clients), Counter[str]())
    faults = [fault for client in clients for fault in client.wrong]
    assert early is not None
    if health["running"] or health["waiting"]:
        faults.append(f"it still holds answers: {health}")
    if late["resident_bytes"] > early["resident_bytes"] * MOST_GROWTH or late["files"] > early["files"] + given.clients:
        faults.append(f"it has grown: {early} to {late}")
    if done["unexpected"] > done["checked"] * MOST_WRONG_SHARE:
        faults.append(f"{done['unexpected']} of {done['checked']} answers were not what was expected")
    if code != 0:
        faults.append(f"exit code {code}: {''.join(server.said)[-500:]}")
    print(json.dumps({"minutes": given.minutes, "early": early, "late": late, **done, "faults": faults}), flush=True)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
