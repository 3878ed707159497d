"""surgery-kernels explain."""

from __future__ import annotations

import click

from ..checkpoint.record import explained, record_of
from .exits import errors_as_exit_codes
from .options import as_json, print_json


@click.command()
@click.argument("out", type=click.Path())
@as_json
def explain(out: str, as_json: bool) -> None:
    """Say what the result OUT of a merge was made from and how, and what that was made from, as far as it is known."""
    with errors_as_exit_codes():
        record = record_of(out)
        if as_json:
            print_json(record)
        else:
            click.echo("\n".join([out, *explained(record)]))
