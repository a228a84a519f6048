"""`gguf-pager chat` in a terminal and in a pipe: it answers, obeys, can be interrupted, and goes on where it was."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import with_vocabulary

from gguf_pager.errors import PagerError
from gguf_pager.serve import conversations
from gguf_pager.serve.conversations import Conversation

ARGUMENTS = ("--budget", "25%", "-t", "1", "--temp", "0", "-n", "24", "-c", "1024", "--no-progress")


class Terminal:
    """A chat in a terminal of 40 columns."""

    def __init__(self, model: Path, *arguments: str) -> None:
        self._fd, slave = pty.openpty()
        self.process = subprocess.Popen([sys.executable, "-m", "gguf_pager", "chat", str(model), *ARGUMENTS, *arguments], stdin=slave,
                                        stdout=slave, stderr=slave, start_new_session=True,
                                        env={**os.environ, "TERM": "dumb", "NO_COLOR": "1", "COLUMNS": "40"})
        os.close(slave)
        self.shown = ""

    def wait(self, pattern: str, seconds: float = 60) -> str:
        """Wait for something to be shown after what was waited for before; return what came until then."""
        until, got = time.monotonic() + seconds, ""
        while not re.search(pattern, got):
            ready, _, _ = select.select([self._fd], [], [], max(0, until - time.monotonic()))
            assert ready, f"{pattern!r} did not come: {got!r}"
            try:
                piece = os.read(self._fd, 4096).decode(errors="replace").replace("\r\n", "\n")
            except OSError:
                piece = ""
            assert piece or re.search(pattern, got), f"it has ended: {got!r}"
            got += piece
            self.shown += piece
        return got

    def say(self, line: str) -> None:
        os.write(self._fd, f"{line}\n".encode())

    def ask(self, line: str) -> str:
        """Say something, and return what was answered until the next prompt."""
        self.say(line)
        return self.wait(r"\n> $").partition("\n")[2].removesuffix("\n> ").strip()

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def leave(self) -> None:
        os.write(self._fd, b"\x04")
        assert self.process.wait(30) == 0


@contextmanager
def talking(model: Path, *arguments: str) -> Iterator[Terminal]:
    terminal = Terminal(model, *arguments)
    try:
        terminal.wait("> $")
        yield terminal
        if terminal.process.poll() is None:
            terminal.leave()
    finally:
        terminal.process.kill()
        terminal.process.wait()


def test_conversation_goes_on_tomorrow(small: Path, tmp_path: Path) -> None:
    where = ("--state-dir", str(tmp_path))
    with talking(small, *where) as chat:
        first = chat.ask("What is the capital of France?")
        assert first
        assert "0 of them" in chat.ask("/stats").replace("\n", " ")
    with talking(small, *where) as chat:
        assert "Going on after 1 message" in chat.shown
        chat.ask("And of Germany?")
        stats = " ".join(chat.ask("/stats").split())
        known, prompt = (int(re.search(pattern, stats)[1].replace(",", "")) for pattern in (r"tokens, ([\d,]+) of them", r"prompt of ([\d,]+)"))  # type: ignore[index]
        assert 20 < known < prompt, stats
        assert chat.ask("/new").startswith("A new conversation")
    with talking(small, *where) as chat:
        assert "Going on" not in chat.shown
    assert not list(tmp_path.rglob(".new-*"))


def test_answer_is_the_same_as_without_a_terminal(small: Path) -> None:
    with talking(small, "--no-keep") as chat:
        shown = chat.ask("What is the capital of France?")
    done = subprocess.run([sys.executable, "-m", "gguf_pager", "chat", str(small), *ARGUMENTS], input="What is the capital of France?\n",
                          capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and done.stdout.strip() == shown.partition("(ended")[0].strip(), done.stderr
    assert "\x1b" not in done.stdout + done.stderr


def test_regenerate_system_and_names(small: Path, tmp_path: Path) -> None:
    with talking(small, "--state-dir", str(tmp_path)) as chat:
        assert "no answer yet" in " ".join(chat.ask("/regenerate").split())
        first = chat.ask("Name a color.")
        assert chat.ask("/regenerate") == first, "at temperature 0"
        assert chat.ask("/save colors") == "Kept as 'colors'."
        assert "Answer in French." in chat.ask("/system Answer in French.")
        chat.ask("/new")
        assert "after 1 message" in " ".join(chat.ask("/load colors").split())
        assert "colors" in chat.ask("/load")
        assert "no conversation 'x'" in " ".join(chat.ask("/load x").split())
        assert "no name" in " ".join(chat.ask("/save ../x").split())
        assert "There is no /what" in chat.ask("/what")
        assert "/regenerate" in chat.ask("/help")
    assert {path.name for path in (tmp_path / "conversations").glob("*.json")} > {"colors.json"}


def test_several_lines_are_one_message(small: Path, tmp_path: Path) -> None:
    with talking(small, "--state-dir", str(tmp_path)) as chat:
        chat.say("One\\")
        chat.wait(r"\.\.\. $")
        chat.ask("two")
        chat.say('"""')
        chat.wait(r"\.\.\. $")
        chat.say("three")
        chat.wait(r"\.\.\. $")
        chat.ask('"""')
    (kept,) = (tmp_path / "conversations").glob("last *.json")
    said = [message["content"] for message in conversations.load(kept).messages if message["role"] == "user"]
    assert said == ["One\ntwo", "three"]


def test_ctrl_c_ends_the_answer_and_keeps_the_conversation(small: Path, tmp_path: Path) -> None:
    with talking(small, "--state-dir", str(tmp_path), "-n", "-1", "--temp", "1.5") as chat:
        chat.say("Tell a very long story about a ship, in every detail.")
        chat.wait(r"detail\.\n[^>]{30}")
        chat.interrupt()
        chat.wait(r"\(ended\)\n> $", 20)
        assert chat.ask("/stats")
        time.sleep(0.5)  # Python's readline misses a signal between its prompt and its waiting for a key; nobody is so fast
        chat.interrupt()
        chat.wait(r"Ctrl-D leaves\.\n> $", 20)
    (kept,) = (tmp_path / "conversations").glob("last *.json")
    assert [message["role"] for message in conversations.load(kept).messages] == ["user", "assistant"]


def test_conversation_that_is_too_long_can_be_begun_anew(small: Path) -> None:
    with talking(small, "--no-keep", "-c", "256") as chat:
        assert re.search(r"more\s+than\s+the\s+context\s+holds.*/new\s+begins.*-c\s+512", chat.ask("word " * 300), re.DOTALL)
        assert chat.ask("Hello")


def test_answer_that_is_cut_off_says_why(small: Path) -> None:
    with talking(small, "--no-keep", "-n", "5") as chat:
        assert "(ended after 5 tokens, as -n says)" in " ".join(chat.ask("Tell me a story.").split())
    with talking(small, "--no-keep", "-c", "256", "-n", "-1") as chat:
        assert re.search(r"\(the\s+context\s+is\s+full:.*-c\s+512\)", chat.ask("word " * 200), re.DOTALL)


def test_what_a_model_thinks_is_no_part_of_the_answer(small: Path, tmp_path: Path) -> None:
    thinking = with_vocabulary(small, tmp_path / "thinking.gguf", "{{ messages[-1].content }}<think>\n{# </think> #}")
    done = subprocess.run([sys.executable, "-m", "gguf_pager", "chat", str(thinking), *ARGUMENTS], input=b"Once", capture_output=True, check=True,
                          timeout=120, env={**os.environ, "NO_COLOR": "1"})
    assert done.stdout == b"\n"
    assert re.search(r"\(thinking\)\n\S.{20}", done.stderr.decode(), re.DOTALL), done.stderr


def test_empty_pipe_is_refused(small: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "gguf_pager", "chat", str(small), *ARGUMENTS], input="", capture_output=True, text=True,
                          timeout=120, check=False)
    assert done.returncode == 1 and "stdin is empty" in done.stderr


# ---- files ----

@pytest.mark.parametrize("text", ["", "{", "[]", '{"messages": 3}', '{"messages": [{"role": "user"}]}', "\x00"])
def test_damaged_file_is_told(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(PagerError, match="damaged"):
        conversations.load(path)


def test_what_cannot_be_kept_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    conversations.save(path, Conversation([{"role": "user", "content": "ä"}]))
    assert conversations.load(path).messages == [{"role": "user", "content": "ä"}]
    (tmp_path / "file").write_text("")
    with pytest.raises(PagerError, match="cannot be kept"):
        conversations.save(tmp_path / "file" / "x.json", Conversation())
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


def test_system_message_comes_first_and_answers_can_be_taken_back() -> None:
    talk = Conversation()
    assert talk.take_back() is None and talk.system is None
    talk.say("user", "a")
    talk.say("assistant", "b")
    talk.system = "be kind"
    talk.system = "be brief"
    assert [message["content"] for message in talk.messages] == ["be brief", "a", "b"] and talk.n_turns == 1
    assert talk.take_back() == "a" and talk.take_back() == "a"
    talk.system = None
    assert talk.messages == [{"role": "user", "content": "a"}]


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_pipe_may_bring_what_is_no_text(small: Path, errors: str) -> None:
    done = subprocess.run([sys.executable, "-m", "gguf_pager", "chat", str(small), *ARGUMENTS], input=b"caf\xe9 \xff hello", timeout=120,
                          capture_output=True, check=False, env={**os.environ, "PYTHONIOENCODING": f"utf-8:{errors}"})
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
