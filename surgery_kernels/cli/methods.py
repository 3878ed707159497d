"""surgery-kernels methods."""

from __future__ import annotations

import inspect
from textwrap import indent
from typing import Any

import click

from ..merging import METHODS, Method, Parameter
from ..merging.method import NONE_GIVEN, count_in_words
from ..ops.arguments import check_one_of
from ..recipes.examples import as_yaml, example_of
from .exits import errors_as_exit_codes
from .options import as_json, print_json

DECIDES = {
    "element": "each element alone",
    "tensor": "over each tensor",
    "row": "over each row of a tensor",
    "scope": "over each tensor, or over the model (scope: model)",
    "model": "over the model",
}


@click.command()
@click.argument("name", required=False)
@click.option("--markdown", is_flag=True, help="The list as a table.")
@click.option("--examples", is_flag=True, help="A recipe for each, as a page.")
@as_json
def methods(name: str | None, markdown: bool, examples: bool, as_json: bool) -> None:
    """List the merging methods, or explain the one called NAME."""
    with errors_as_exit_codes():
        if name is not None:
            check_one_of("name", name, tuple(METHODS))
        if as_json:
            print_json({"methods": [_facts(method) for method in METHODS.values() if name in (None, method.name)]})
            return
        if markdown or examples:
            click.echo(methods_table() if markdown else recipes_by_example())
            return
        if name is None:
            width = max(map(len, METHODS))
            for method in METHODS.values():
                click.echo(f"{method.name:{width}}  {method.summary()}")
            return
        _explain(METHODS[name])


def methods_table() -> str:
    """One line for every method, as it declares itself."""
    rows = ["| method | what it does | models | source |", "|---|---|---|---|"]
    for method in METHODS.values():
        name = f"`{method.name}`" if method.in_recipes else f"`{method.name}` (Python only)"
        base = {"required": "base + ", "optional": "(base +) ", "none": ""}[method.base]
        number = count_in_words(method).replace("exactly ", "").replace("at least ", "\u2265 ")
        rows.append(f"| {name} | {method.summary()} | {base}{number} | {method.source} |")
    return "\n".join(rows)


def recipes_by_example() -> str:
    """For every method of recipes what it does and the least that a recipe of it says."""
    parts = []
    for method in METHODS.values():
        if method.in_recipes:
            recipe = as_yaml(example_of(method)).rstrip()
            parts.append(f"## {method.name}\n\n{method.summary()}\n\n```yaml\n{recipe}\n```\n")
    return "\n".join(parts).rstrip()


def _facts(method: type[Method]) -> dict[str, Any]:
    return {
        "name": method.name,
        "title": method.title,
        "formula": method.formula,
        "source": method.source,
        "base": method.base,
        "models": count_in_words(method),
        "decides": method.decides,
        "in_recipes": method.in_recipes,
        "parameters": [
            {
                "name": parameter.name,
                "key": parameter.key,
                "meaning": parameter.meaning,
                "takes": parameter.values,
                "of_each_model": parameter.per_model,
                "required": parameter.required,
                "default": _plain(parameter.default),
                "default_in_recipes": _plain(parameter.recipe_default),
            }
            for parameter in method.parameters()
        ],
    }


def _plain(default: Any) -> Any:
    return default if isinstance(default, (bool, int, float, str)) else None


def _explain(method: type[Method]) -> None:
    """What a method declares."""
    base = {"required": "a base and ", "optional": "a base or none, and ", "none": ""}[method.base]
    experts = "models" if method.base == "none" else "experts"
    click.echo(f"{method.name}: {inspect.getdoc(method)}\n\n    {method.formula}\n")
    click.echo(f"takes     {base}{count_in_words(method)} {experts}")
    click.echo(f"decides   {DECIDES[method.decides]}")
    click.echo(f"source    {method.source}")
    click.echo(f"recipes   {'merge_method: ' + method.name if method.in_recipes else 'from Python only'}")
    for title, of_model in (("for each model", True), ("for the merge", False)):
        parameters = [parameter for parameter in method.parameters() if parameter.per_model == of_model]
        if parameters:
            click.echo(f"\nparameters {title}:")
        for parameter in parameters:
            click.echo(f"  {_in_both(parameter):24} {parameter.meaning}: {parameter.values}{_default(parameter)}")
    if method.in_recipes:
        click.echo("\na recipe:\n" + indent(as_yaml(example_of(method)).rstrip(), "  "))


def _in_both(parameter: Parameter) -> str:
    """Its name in Python, and in recipes where that is another."""
    named = parameter.key is None or parameter.key == parameter.name
    return parameter.name if named else f"{parameter.name} ({parameter.key})"


def _default(parameter: Parameter) -> str:
    if parameter.required:
        return "; must be given"
    in_recipes = ""
    if parameter.key is not None and parameter.recipe_default is NONE_GIVEN:
        in_recipes = ", must be given in recipes"
    elif parameter.key is not None and parameter.recipe_default != parameter.default:
        in_recipes = f", {parameter.recipe_default} in recipes"
    return f"; default {parameter.default}{in_recipes}"
