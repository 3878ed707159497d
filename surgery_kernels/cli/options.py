"""Options that commands share."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import click

from ..checkpoint.sizes import parse_size
from ..json_numbers import finite

as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead, and nothing else.")


def print_json(facts: dict[str, Any]) -> None:
    """Numbers that JSON does not have, infinity and NaN, are null."""
    click.echo(json.dumps(finite(facts), indent=2))


class Size(click.ParamType):
    """Bytes, with a decimal unit or none."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return parse_size(str(value))
        except ValueError as error:
            raise click.BadParameter(str(error), ctx, param) from None


def running(command: Callable[..., None]) -> Callable[..., None]:
    """Options of what computes a model and writes it."""
    for option in (
        click.option("--quiet", is_flag=True, help="Say nothing but errors."),
        click.option(
            "--max-shard-size", type=Size(), default="5GB", show_default=True, help="Of the files of the result."
        ),
        click.option("--threads", type=click.IntRange(min=1), help="On the CPU; all cores unless given."),
        click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N."),
    ):
        command = option(command)
    return command
