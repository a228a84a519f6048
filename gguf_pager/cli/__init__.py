"""The command line: one file per command, imported when it is called; what goes wrong becomes one line here."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from typing import Any

import click

from gguf_pager import __version__
from gguf_pager.cli.streams import OutputError, guarded
from gguf_pager.errors import PagerError
from gguf_pager.report.words import as_options

_COMMANDS = ("run", "chat", "serve", "bench", "inspect", "doctor", "energy", "completion")
"""In the order of the help. Each is a module of this package with a command of the same name."""

_ELSEWHERE = {
    "server": "The server is: gguf-pager serve MODEL",
    "pull": "A model is downloaded when it is opened: gguf-pager run hf:OWNER/REPO:Q4_K_M. Ollama's are read in place: ollama:NAME.",
    "list": "There is no list of models: gguf-pager opens any GGUF file, and what Ollama has under ollama:NAME, LM Studio under lmstudio:NAME.",
    "ps": "What is served where is told by http://127.0.0.1:8000/health, or the page at http://127.0.0.1:8000.",
    "show": "What a model is made of: gguf-pager inspect MODEL",
    "help": "Ask with --help.", "version": "Ask with --version.",
}
"""What people type who come from other programs."""

_NAMES = ("hf:", "hf.co/", "ollama:", "lmstudio:", "https:")
"""How a name of a model begins, which can be no command."""


class _Commands(click.Group):
    """Imports only the command that is called, and shows an error of ours as one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            if cmd_name in _ELSEWHERE or cmd_name.endswith(".gguf") or cmd_name.startswith(_NAMES):
                ctx.fail(_ELSEWHERE.get(cmd_name) or f"Did you mean: gguf-pager run {cmd_name}")
            return None
        try:
            command = getattr(importlib.import_module(f"gguf_pager.cli.{cmd_name}"), cmd_name)
        except ImportError as error:
            if "_native" not in str(error):
                raise
            raise PagerError(f"The compiled part of gguf_pager cannot be loaded ({error}): install it again.") from None
        assert isinstance(command, click.Command)
        return command

    def main(self, *args: Any, **settings: Any) -> Any:
        """Run a command and exit; not with 0 where something could not be shown."""
        with guarded() as has_lost_words:
            try:
                try:
                    return super().main(*args, **settings)
                finally:
                    sys.stdout.flush()
            except OutputError as error:
                if error.exit_code == 1:
                    _complain(str(error))
                sys.exit(error.exit_code)
            except SystemExit as ended:
                if not ended.code and has_lost_words():
                    sys.exit(1)
                raise

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except PagerError as error:
            _complain(str(error))
            ctx.exit(1)
        except OSError as error:  # of a file that was named on the command line, such as a report's
            _complain(str(error))
            ctx.exit(1)
        except KeyboardInterrupt:
            ctx.exit(130)  # 128 + SIGINT, as a shell would have it


def _complain(message: str) -> None:
    """Say it in one line, whatever the system's part of it holds."""
    click.secho(f"Error: {' '.join(as_options(message).split())}", fg="red", err=True)


def _show_version(ctx: click.Context, _: click.Parameter, is_wanted: bool) -> None:
    if not is_wanted or ctx.resilient_parsing:
        return
    try:
        engine_version = importlib.metadata.version("llama_cpp_python")
    except importlib.metadata.PackageNotFoundError:
        engine_version = "not installed"
    click.echo(f"gguf-pager {__version__}, llama-cpp-python {engine_version}")
    ctx.exit()


_START = """\
gguf-pager runs mixture-of-experts models (GGUF) that are larger than your memory.

  gguf-pager inspect MODEL.gguf          does it run here, and how much memory should it get?
  gguf-pager run MODEL.gguf "Once upon"  let it go on; for a question: --chat "Why is the sky blue?"
  gguf-pager chat MODEL.gguf             a conversation, which goes on tomorrow where it was
  gguf-pager serve MODEL.gguf            OpenAI's API at http://127.0.0.1:8000, and a page to chat at
  gguf-pager doctor                      what works on this machine
  gguf-pager bench MODEL.gguf            how fast, beside stock llama-cpp-python

No model yet? pip install 'gguf-pager[hf]', then this downloads one, 12 GB:
  gguf-pager inspect hf:ggml-org/gpt-oss-20b-GGUF

All commands: gguf-pager --help. The options of one: gguf-pager run --help."""


@click.group(cls=_Commands, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_show_version,
              help="Show the versions of gguf-pager and of llama-cpp-python, and exit.")
@click.pass_context
def main(context: click.Context) -> None:
    """Run mixture-of-experts GGUF models larger than RAM, within a memory budget.

    MODEL is a GGUF file, of a split model the first file; a folder that holds one model; hf:OWNER/REPO:QUANT, which is
    downloaded from Hugging Face; ollama:NAME; or lmstudio:NAME.
    """
    if context.invoked_subcommand is None:
        click.echo(_START)
