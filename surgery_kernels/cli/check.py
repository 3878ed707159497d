"""surgery-kernels check."""

from __future__ import annotations

import click

from ..checkpoint.summary import in_columns, recipe_rows
from ..recipes import load_recipes
from ..recipes.parameters import check_given
from .exits import errors_as_exit_codes


@click.command()
@click.argument("recipe", type=click.Path())
@click.option("--strict", is_flag=True, help="Refuse what RECIPE says without effect, which is only noticed else.")
def check(recipe: str, strict: bool) -> None:
    """Say what RECIPE merges, and whether it is right as far as that can be seen without its models."""
    with errors_as_exit_codes():
        for each in load_recipes(recipe, strict=strict):
            check_given(each)
            if each.name is not None:
                click.echo(f"{each.name}:")
            click.echo("\n".join(in_columns(recipe_rows(each))))
            for notice in each.notices:
                click.echo(f"notice: {notice}")
