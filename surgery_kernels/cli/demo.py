"""surgery-kernels demo."""

from __future__ import annotations

import click

from ..reproduce.__main__ import main as reproduce


@click.command()
@click.option("--quick", is_flag=True, help="Experts of fewer steps and one repair: half a minute.")
@click.option("--full", is_flag=True, help="Also SurgeryV2 by gradient, and what rank, steps and images do.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of split, heads and training.")
@click.option("--out", type=click.Path(), default=".cache", show_default=True, help="Folder for tables and plots.")
def demo(quick: bool, full: bool, seed: int, out: str) -> None:
    """Fine-tune eight experts on scikit-learn's digits, merge them, repair the merges, and show what that brings.

    Needs surgery-kernels[demo]. Experts are kept in OUT and read the next time.
    """
    flags = [name for name, given in {"--quick": quick, "--full": full}.items() if given]
    reproduce(["digits", "--seed", str(seed), "--out", out, *flags])
