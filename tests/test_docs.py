"""The README is true on the day: its first screen has the two commands, its table is made from recorded rows."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_first_screen_has_the_two_commands() -> None:
    first_screen = "\n".join((ROOT / "README.md").read_text().splitlines()[:40])
    for command in ("scripts/demo", "scripts/test"):
        assert command in first_screen
        assert (ROOT / command).stat().st_mode & 0o111, f"{command} is executable"


def test_speed_table_is_made_from_recorded_rows() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "scripts" / "speed_table.py"), "--check"], check=False)
    assert done.returncode == 0, "run scripts/speed_table.py"


def test_readme_names_every_argument_of_llama() -> None:
    from gguf_pager import Options

    readme = (ROOT / "README.md").read_text()
    for name in ("budget", *Options.__dataclass_fields__):
        assert f"`{name}`" in readme


def test_tests_that_the_table_of_troubles_names_exist() -> None:
    """The last column: `test_file: part of a name`, further parts of names, or a file alone."""
    tests, named, file = Path(__file__).parent, 0, ""
    for line in (tests.parent / "docs" / "troubleshooting.md").read_text().splitlines():
        if not line.startswith("| ") or line.startswith("| you see"):
            continue
        for words in re.findall(r"`([^`]+)`", line.rsplit(" | ", 1)[1]):
            if words.startswith("test_"):
                file, _, words = words.partition(": ")
            names = re.findall(r"^def (test_\w+)", (tests / f"{file}.py").read_text(), re.MULTILINE)
            assert any(words in name for name in names), f"{file}.py has no test with {words!r} in its name"
            named += 1
    assert named > 50
