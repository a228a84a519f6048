"""`gguf-pager completion`: what makes a shell complete commands, options and files."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print what makes a shell complete commands and options.

    \b
    bash: gguf-pager completion bash >> ~/.bashrc
    zsh:  gguf-pager completion zsh >> ~/.zshrc
    fish: gguf-pager completion fish > ~/.config/fish/completions/gguf-pager.fish
    """
    made = get_completion_class(shell)
    assert made is not None
    click.echo(made(context.find_root().command, {}, "gguf-pager", "_GGUF_PAGER_COMPLETE").source())
