"""surgery-kernels diff."""

from __future__ import annotations

import math
import sys
from typing import Any

import click

from ..checkpoint.diff import TensorDifference
from ..checkpoint.diff import diff as diff_checkpoints
from ..checkpoint.reading.source import TensorInfo
from .exits import FAILED, errors_as_exit_codes
from .options import as_json, print_json


@click.command()
@click.argument("first", type=click.Path())
@click.argument("second", type=click.Path())
@as_json
def diff(first: str, second: str, as_json: bool) -> None:
    """Compare two checkpoints: the largest absolute and relative difference of every tensor that differs.

    Exits with 1 where there is one.
    """
    differences = []
    with errors_as_exit_codes():
        for found in diff_checkpoints(first, second):
            differences.append(_facts(found))
            if not as_json:
                click.echo(f"{found.name}: {_in_words(found)}")
    if as_json:
        print_json({"differences": differences})
    elif not differences:
        click.echo("no difference")
    sys.exit(FAILED if differences else 0)


def _facts(found: TensorDifference) -> dict[str, Any]:
    counted = found.first and found.second and found.first.shape == found.second.shape
    return {
        "tensor": found.name,
        "first": _tensor(found.first),
        "second": _tensor(found.second),
        "elements": found.count if counted else None,
        "largest_absolute": found.max_abs,
        "largest_relative": found.max_rel,
    }


def _tensor(info: TensorInfo | None) -> dict[str, Any] | None:
    return None if info is None else {"shape": list(info.shape), "dtype": str(info.dtype).removeprefix("torch.")}


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
