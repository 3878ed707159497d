"""surgery-kernels verify."""

from __future__ import annotations

import sys

import click

from ..checkpoint.record import verify as changed_tensors
from .exits import FAILED, errors_as_exit_codes
from .options import as_json, print_json


@click.command()
@click.argument("out", type=click.Path())
@as_json
def verify(out: str, as_json: bool) -> None:
    """Say whether the result OUT of a merge is as it was written: every tensor has the hash that its record tells.

    Exits with 1 where one has not, or is missing, or was added.
    """
    with errors_as_exit_codes():
        changed = list(changed_tensors(out))
    if as_json:
        print_json({"changed": [{"tensor": found.name, "how": found.how} for found in changed]})
    else:
        click.echo("\n".join(f"{found.name}: {found.how}" for found in changed) or "as it was written")
    sys.exit(FAILED if changed else 0)
