"""surgery-kernels check."""

from __future__ import annotations

import click

from ..checkpoint.summary import in_columns, recipe_facts, recipe_rows
from ..recipes import load_recipes
from ..recipes.parameters import check_given
from .exits import errors_as_exit_codes
from .options import as_json, print_json


@click.command()
@click.argument("recipe", type=click.Path())
@click.option("--strict", is_flag=True, help="Refuse what RECIPE says without effect, which is only noticed else.")
@as_json
def check(recipe: str, strict: bool, as_json: bool) -> None:
    """Say what RECIPE merges, and whether it is right as far as that can be seen without its models."""
    with errors_as_exit_codes():
        documents = load_recipes(recipe, strict=strict)
        for each in documents:
            check_given(each)
        if as_json:
            print_json({"documents": list(map(recipe_facts, documents))})
            return
        for each in documents:
            if each.name is not None:
                click.echo(f"{each.name}:")
            click.echo("\n".join(in_columns(recipe_rows(each))))
            for notice in each.notices:
                click.echo(f"notice: {notice}")
