"""`gguf-pager inspect`: what a model is made of, from its header alone."""

from __future__ import annotations

import json
from pathlib import Path

import click

from gguf_pager.cli.model import local_model, takes_model
from gguf_pager.disk import device
from gguf_pager.memory import probe
from gguf_pager.model.layout import read_layout
from gguf_pager.pager import Options, Pager
from gguf_pager.report import inspection as shown


@click.command()
@takes_model
@click.option("--details", "has_details", is_flag=True, help="Show the sizes of experts and slots, and how they are read.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, with null for what is not known.")
def inspect(model: Path, has_details: bool, as_json: bool) -> None:
    """Say whether a model runs here, and what budgets mean for it.

    Reads the header of each file and nothing else, so it takes no time on a model of any size. Figures for the whole
    process leave out the KV cache and the compute buffers, which depend on the context.
    """
    layout = read_layout(local_model(model))
    facts = shown.inspection(layout, Pager(layout, Options()) if layout.layers else None, probe.memory(),
                             device.best_rate(layout.paths[0]))
    click.echo(json.dumps(facts, indent=2) if as_json else shown.inspection_text(facts, has_details=has_details))
