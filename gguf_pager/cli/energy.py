"""`gguf-pager energy`: which joules this machine can count, and what its sources show now."""

from __future__ import annotations

import json

import click

from gguf_pager import report
from gguf_pager.energy import meter
from gguf_pager.energy.model import constants_json, override
from gguf_pager.energy.source import Absent


def _parse_constants(_: click.Context, __: click.Parameter, given: tuple[str, ...]) -> dict[str, float]:
    constants = {}
    for text in given:
        name, _equals, value = text.partition("=")
        try:
            constants[name] = float(value)
        except ValueError:
            raise click.BadParameter(f"{text!r} is not NAME=NUMBER") from None
    return constants


@click.command()
@click.option("--seconds", metavar="X", type=click.FloatRange(min=0, min_open=True), default=2.0, show_default=True,
              help="Watch the sources for so long; batteries and Apple's counters need 10.")
@click.option("--power-command", metavar="CMD", help="A shell command that prints the watts of this moment, such as a "
                                                     "wall meter's.")
@click.option("--constant", "constants", metavar="NAME=NUMBER", multiple=True, callback=_parse_constants,
              help="Set a constant of the model; may be given again.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, with null for what is not known.")
def energy(seconds: float, power_command: str | None, constants: dict[str, float], as_json: bool) -> None:
    """Show what this machine can tell about the energy it uses.

    Reads every source there is for a moment, and shows the constants of the model that stands in where there is none.
    Sources overlap, so one is chosen and none are added up.
    """
    chosen_constants = override(constants)
    found = meter.find_all(power_command)
    present = [source for source in found if not isinstance(source, Absent)]
    try:
        live = meter.watch(present, seconds)
    finally:
        for source in present:
            source.close()
    facts = report.energy_facts(found, present, live, constants_json(chosen_constants), seconds)
    click.echo(json.dumps(facts, indent=2) if as_json else report.energy_text(facts))
