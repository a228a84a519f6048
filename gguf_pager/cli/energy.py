"""`gguf-pager energy`: which joules this machine can count, and what its sources show now."""

from __future__ import annotations

import json

import click

from gguf_pager.energy import meter, paper
from gguf_pager.energy.model import constants_json, override
from gguf_pager.energy.source import Absent
from gguf_pager.report import energy as shown
from gguf_pager.report import paper as paper_shown


def _parse_constants(_: click.Context, __: click.Parameter, given: tuple[str, ...]) -> dict[str, float]:
    constants = {}
    for text in given:
        name, _equals, value = text.partition("=")
        try:
            constants[name] = float(value)
        except ValueError:
            raise click.BadParameter(f"{text!r} is not NAME=NUMBER") from None
    return constants


POWER_COMMAND_OPTION = click.option("--power-command", metavar="CMD", help="A shell command that prints the watts of this "
                                                                            "moment, such as a wall meter's.")
CONSTANT_OPTION = click.option("--constant", "constants", metavar="NAME=NUMBER", multiple=True, callback=_parse_constants,
                               help="Set a constant of the energy model; may be given again.")
"""These two are bench's, too."""


@click.command()
@click.option("--seconds", metavar="X", type=click.FloatRange(min=0, min_open=True), default=2.0, show_default=True,
              help="Watch the sources for so long; batteries and Apple's counters need 10.")
@POWER_COMMAND_OPTION
@CONSTANT_OPTION
@click.option("--model-paper", is_flag=True, help="Show instead the energy per token of arXiv 2508.06978, again from its "
                                                  "constants: experts in HBM, in DDR5 or on an SSD.")
@click.option("--hit-rate", metavar="X", type=click.FloatRange(min=0, max=1),
              help="With --model-paper: a cache before the SSD that hits so often, 0 to 1.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, with null for what is not known.")
def energy(seconds: float, power_command: str | None, constants: dict[str, float], model_paper: bool,
           hit_rate: float | None, as_json: bool) -> None:
    """Show what this machine can tell about the energy it uses.

    Reads every source there is for a moment, and shows the constants of the model that stands in where there is none.
    Sources overlap, so one is chosen and none are added up.
    """
    if hit_rate is not None and not model_paper:
        raise click.UsageError("--hit-rate is for --model-paper.")
    if model_paper:
        paper_facts = paper_shown.paper_facts(paper.override(constants), hit_rate)
        click.echo(json.dumps(paper_facts, indent=2) if as_json else paper_shown.paper_text(paper_facts))
        return
    chosen_constants = override(constants)
    found = meter.find_all(power_command)
    present = [source for source in found if not isinstance(source, Absent)]
    try:
        live = meter.watch(present, seconds)
    finally:
        for source in present:
            source.close()
    facts = shown.energy_facts(found, present, live, constants_json(chosen_constants), seconds)
    click.echo(json.dumps(facts, indent=2) if as_json else shown.energy_text(facts))
