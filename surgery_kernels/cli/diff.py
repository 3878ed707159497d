"""surgery-kernels diff."""

from __future__ import annotations

import math
import sys

import click

from ..checkpoint.diff import TensorDifference
from ..checkpoint.diff import diff as diff_checkpoints
from .exits import FAILED, errors_as_exit_codes


@click.command()
@click.argument("first", type=click.Path())
@click.argument("second", type=click.Path())
def diff(first: str, second: str) -> None:
    """Compare two checkpoints: the largest absolute and relative difference of every tensor that differs.

    Exits with 1 where there is one.
    """
    differs = False
    with errors_as_exit_codes():
        for found in diff_checkpoints(first, second):
            differs = True
            click.echo(f"{found.name}: {_in_words(found)}")
    if not differs:
        click.echo("no difference")
    sys.exit(FAILED if differs else 0)


def _in_words(found: TensorDifference) -> str:
    if found.first is None or found.second is None:
        return f"only in the {'second' if found.first is None else 'first'}"
    if found.first.shape != found.second.shape:
        return f"shape {list(found.first.shape)} and {list(found.second.shape)}"
    dtypes = "" if found.first.dtype == found.second.dtype else f"{found.first.dtype} and {found.second.dtype}; "
    return (
        f"{dtypes}{found.count} of {math.prod(found.first.shape)} elements, at most {found.max_abs:.3g} absolute, "
        f"{found.max_rel:.3g} relative"
    )
