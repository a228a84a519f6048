"""Write docs/cli.md: the `--help` of every command, as it is printed.

    $ python scripts/make_cli_docs.py

tests/test_cli.py fails while the two differ. Wrapping is click's: text made with another click may differ in places.
"""

from __future__ import annotations

from pathlib import Path

import click
from click.testing import CliRunner

from gguf_pager.cli import main

WIDTH = 78  # what click leaves of 80 columns
OUT = Path(__file__).resolve().parent.parent / "docs" / "cli.md"

HEAD = """\
# The command line

Made by `python scripts/make_cli_docs.py`. `python -m gguf_pager` is the same as `gguf-pager`.

Exit codes: 0 done; 1 an error, shown as one line `Error: ...` on stderr, or a problem that `doctor` found; 2 the
command was not understood; 130 interrupted (what was generated until then is counted and shown).
"""

NOTES = {
    "run": """\
The last line on stderr. Decode counts the tokens after the first generated one, whose computation is the prompt's; hits
are experts found in RAM, of those wanted; stalled is the share of decoding spent waiting for reads; peak memory is the
largest resident size of the process. MB are 10^6 bytes, MiB and GiB are binary. A model that is not paged has no hits,
reads and stalls, and a line before the text says why.

Keys of the JSON object: `gguf_pager_version`, `llama_cpp_python_version`, `model`, `text`, `finish_reason` (`length`,
`stop`, `interrupt`), `is_paged`, `not_paged_reason`, `budget`, `policy`, `io`, `n_readers`, `n_threads`, `n_ctx`,
`n_batch`, `n_ubatch`, `seed`, `load_s`, `arena_bytes`, `resident_expert_bytes`, `peak_memory_bytes`, and `prompt` and
`decode`, each with `tokens`, `seconds`, `tokens_per_s`, `hits`, `misses`, `hit_rate`, `bytes_read`,
`bytes_read_per_token`, `stall_ns`, `stall_share`, `evictions`, `left_alone`. What is not known is null.
""",
    "inspect": """\
A slice is one expert's part of a tensor. Layers whose slices have equal sizes form a shape class and share slots.
`resident` is the share of all experts that fit, `process` an estimate without KV cache and compute buffers.
""",
    "doctor": """\
`ok`, `note` (something costs speed or cannot be known here) or `problem` (paging does not work); the line below says
what to do. In JSON, `checks` maps each name to its `status`, `message`, `remedy` and `facts`.
""",
}


def help_text(command: str | None) -> str:
    """Return what `gguf-pager COMMAND --help` prints on a terminal of 80 columns."""
    arguments = [command, "--help"] if command else ["--help"]
    return CliRunner().invoke(main, arguments, prog_name="gguf-pager", terminal_width=WIDTH).output


def render() -> str:
    """Return the whole document."""
    parts = [HEAD, f"```\n{help_text(None)}```\n"]
    for command in main.list_commands(click.Context(main)):
        note = NOTES.get(command)
        parts += [f"## gguf-pager {command}\n", f"```\n{help_text(command)}```\n", *([note] if note else [])]
    return "\n".join(parts)


if __name__ == "__main__":
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(render())
    print(OUT)
