"""`gguf-pager doctor`: what works here, and what to do about what does not."""

from __future__ import annotations

import json
from pathlib import Path

import click

from gguf_pager import doctor as probing
from gguf_pager.cli.model import local_model, may_take_model
from gguf_pager.report import checks as shown


@click.command()
@may_take_model
@click.option("--probe", "is_probing", is_flag=True,
              help="Measure anew how the device that holds MODEL is read best, and remember it; takes 1 to 2.4 s.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, with null for what is not known.")
@click.pass_context
def doctor(context: click.Context, model: Path | None, is_probing: bool, as_json: bool) -> None:
    """Check whether experts can be paged on this machine.

    With MODEL also whether this model can, on the file system it lies on; without, the current folder's file system is
    looked at. The exit code is 1 when something stops paging, else 0.
    """
    if is_probing and model is None:
        raise click.UsageError("--probe reads a MODEL: name one.")
    checks = probing.examine(model and local_model(model), measure_device=is_probing)
    click.echo(json.dumps(shown.checks_json(checks), indent=2) if as_json else shown.checks_text(checks))
    context.exit(1 if any(check.status == "problem" for check in checks) else 0)
