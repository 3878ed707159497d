"""surgery-kernels inspect."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import click

from ..inspect import inspect_models
from ..inspect.facts import as_json as facts_of
from ..inspect.terminal import show
from .exits import EXIT_CODES, errors_as_exit_codes
from .options import as_json, print_json


@click.command(epilog=EXIT_CODES)
@click.argument("models", nargs=-1, required=True)
@click.option("--base", help="What the models were tuned from; none: the first of them.")
@click.option("--density", type=float, default=0.2, show_default=True, help="Of the TIES tried on every tensor.")
@click.option("--spectra", is_flag=True, help="Also stable ranks and leading directions of every matrix; takes long.")
@click.option("--html", "page", type=click.Path(path_type=Path), help="Write a page with pictures to this file.")
@click.option("--png", "pictures", type=click.Path(path_type=Path), help="Write the pictures into this folder.")
@click.option("--quiet", is_flag=True, help="Say nothing but errors.")
@as_json
def inspect(
    models: tuple[str, ...],
    base: str | None,
    density: float,
    spectra: bool,
    page: Path | None,
    pictures: Path | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Say what MODELS are to their base and to one another, from one read of all of them.

    Models are named as in recipes: folders, files of weights, adapters (`base+adapter`, or alone over --base), ids of
    the Hugging Face hub. Shows how much each changed and where, which of them agree, where their changes conflict,
    what TIES would keep, and what is odd about their numbers; then says what follows.
    """
    with errors_as_exit_codes():
        shown = not quiet and sys.stderr.isatty()
        found = inspect_models(models, base, density=density, spectra=spectra, progress=shown)
        if page is not None:
            from ..inspect.page import write_page

            write_page(found, page)
        if pictures is not None:
            from ..inspect.pictures import write_pictures

            write_pictures(found, pictures)
        if as_json:
            print_json(facts_of(found))
        elif not quiet:
            click.echo(show(found, shutil.get_terminal_size((100, 24)).columns))
