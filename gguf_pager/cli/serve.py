"""`gguf-pager serve`: an OpenAI-compatible server for one model."""

from __future__ import annotations

import json
import re
import socket
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from gguf_pager.cli.model import GPU_LAYERS_OPTION, takes_model
from gguf_pager.cli.opening import (
    CTX_STEP,
    DEFAULT_CTX,
    MOST_TOKENS,
    STATE_SIZE_OPTION,
    open_model,
    opens_model,
    state_bytes,
    take_opening,
    whole_steps,
)
from gguf_pager.errors import PagerError
from gguf_pager.memory.budget import format_bytes

MOST_SEQUENCES = 256
"""LLAMA_MAX_SEQ of llama-cparams.h."""

_FROM_FILE = {
    "model": "model", "model_alias": "alias", "n_ctx": "ctx_size", "n_batch": "batch_size", "n_ubatch": "ubatch_size",
    "n_threads": "threads", "host": "host", "port": "port", "api_key": "api_key", "verbose": "verbose",
}
"""Settings of llama_cpp.server's config file, and what they are called here."""


@dataclass(frozen=True, slots=True)
class _Settings:
    """The command's own options, under click's names for them."""

    ctx_size: int
    host: str
    port: int
    api_key: str | None
    alias: str | None
    parallel: int
    state_dir: Path | None
    state_size: str
    cors: tuple[str, ...]
    root_path: str


def _read_yaml(text: str) -> Any:
    try:
        import yaml
    except ImportError:
        raise PagerError("A config file in YAML needs PyYAML: pip install 'gguf-pager[server]'.") from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(error) from None


def _read_config(context: click.Context, _: click.Parameter, path: Path | None) -> None:
    """Take what a config file of llama_cpp.server says as defaults, and say what of it does not apply."""
    if path is None:
        return
    try:
        text = path.read_bytes().decode()
        found = _read_yaml(text) if path.suffix in (".yaml", ".yml") else json.loads(text)
    except OSError as error:
        raise PagerError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise PagerError(f"{path} is not understood: {' '.join(str(error).split())}.") from None
    models = found.get("models") if isinstance(found, dict) else None
    if not isinstance(models, list) or not models or not all(isinstance(model, dict) for model in models):
        raise PagerError(f"{path} names no models: it is to be a config file of llama_cpp.server.")
    if len(models) > 1:
        click.echo(f"{path} names {len(models)} models; the first is served. Start a server for each.", err=True)
    given = {name: value for name, value in {**found, **models[0]}.items() if name != "models"}
    unused = sorted(name for name in given if name not in _FROM_FILE)
    if unused:
        click.echo(f"Of {path} this does not apply here: {', '.join(unused)}.", err=True)
    taken = {_FROM_FILE[name]: value for name, value in given.items() if name in _FROM_FILE}
    taken["model_option"] = taken.pop("model", None)
    context.default_map = {**(context.default_map or {}), **taken}


@click.command(context_settings={"auto_envvar_prefix": "GGUF_PAGER"})
@takes_model
@click.option("--config", metavar="FILE", type=click.Path(path_type=Path), callback=_read_config, is_eager=True, expose_value=False,
              help="Take settings from a config file of llama_cpp.server; what is given here goes before.")
@click.option("--host", metavar="NAME", default="127.0.0.1", show_default=True, help="Address to listen at; 0.0.0.0 for all.")
@click.option("--port", metavar="N", type=click.IntRange(0, 65535), default=8000, show_default=True, help="Port; 0 for any free one.")
@click.option("--api-key", metavar="KEY", help="Answer only to who knows it.")
@click.option("-a", "--alias", metavar="NAME", help="Name of the model in the API. [default: the file's]")
@click.option("-np", "--parallel", metavar="N", type=click.IntRange(1, MOST_SEQUENCES), default=1, show_default=True,
              help="Answers computed at the same time; others wait in order.")
@GPU_LAYERS_OPTION
@click.option("-c", "--ctx-size", metavar="N", type=click.IntRange(0, MOST_TOKENS), default=DEFAULT_CTX, show_default=True,
              help=f"Context of each of them in tokens, in steps of {CTX_STEP}; 0 takes the model's own.")
@click.option("--state-dir", metavar="DIR", type=click.Path(path_type=Path),
              help="Keep conversations in this folder, so that they go on after a restart without computing them again.")
@STATE_SIZE_OPTION
@click.option("--cors", metavar="ORIGIN", multiple=True, help="Let pages from there use the server; '*' for all. May be given again.")
@click.option("--root-path", metavar="PATH", default="", help="Where a proxy has put the server.")
@opens_model
def serve(model: Path, **given: Any) -> None:
    """Serve a model: OpenAI's API, and a page to chat at.

    \b
    gguf-pager serve MODEL --parallel 4
    curl http://127.0.0.1:8000/v1/chat/completions -d '{"messages": [{"role": "user", "content": "Hello"}]}'

    Every option can be set in the environment: --ctx-size is GGUF_PAGER_CTX_SIZE.
    """
    opening = take_opening(given, model)
    settings = _Settings(**given)
    most_bytes = state_bytes(settings.state_size)
    if settings.api_key == "":
        raise PagerError("--api-key is empty: give a key, or leave it out.")
    origins = [_origin(text) for text in settings.cors]
    try:
        from gguf_pager.serve import server
    except ImportError as error:
        raise PagerError(f"The server needs more packages ({error.name}): pip install 'gguf-pager[server]'.") from None
    listening = _listen(settings.host, settings.port)
    with listening:
        n_ctx = whole_steps(settings.ctx_size)
        if n_ctx == 0:
            from gguf_pager.model.layout import read_layout

            layout = read_layout(model)
            n_ctx = int(layout.values.get(f"{layout.architecture}.context_length") or DEFAULT_CTX)
        # A batch holds a token of every answer, whatever --batch-size says of prompts.
        opening = replace(opening, batch_size=max(opening.batch_size, settings.parallel),
                          ubatch_size=min(opening.ubatch_size, opening.batch_size))
        llm = open_model(opening, n_ctx * settings.parallel, settings.parallel)
        try:
            served = server.Settings(
                model=settings.alias or model.name.removesuffix(".gguf"), n_sequences=settings.parallel, api_key=settings.api_key,
                state_dir=settings.state_dir, state_bytes=most_bytes, cors_origins=origins, root_path=settings.root_path)
            _say(settings, listening, served.model, n_ctx)
            server.run(llm, served, listening)
        finally:
            llm.close()


def _origin(text: str) -> str:
    """Return an origin as browsers send it: another way to write it would never be the same."""
    origin = text.rstrip("/").lower()
    if origin not in ("*", "null") and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#@]+", origin):
        raise PagerError(f"--cors {text!r} is no origin: give it as http://localhost:3000, without a path, or '*' for all.")
    return origin


def _listen(host: str, port: int) -> socket.socket:
    """Take the port before the model is opened: who has to wait for that wants to hear of a taken port first."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise PagerError(f"Cannot listen at {host}, port {port}: {error.strerror}. Choose another --port or --host.") from None
    return listening


def _say(settings: _Settings, listening: socket.socket, name: str, n_ctx: int) -> None:
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    is_open = host not in ("127.0.0.1", "::1") and settings.api_key is None
    click.echo(f"Serving {name} at http://{shown}:{port} (API: /v1), {settings.parallel} answer{'s' * (settings.parallel > 1)} at a "
               f"time, {n_ctx:,} tokens each.", err=True)
    if settings.state_dir is not None:
        click.echo(f"Conversations are kept in {settings.state_dir}, up to {format_bytes(state_bytes(settings.state_size))}.", err=True)
    if is_open:
        click.echo("Anybody who can reach this machine can use it: set --api-key, or leave --host as it is.", err=True)
