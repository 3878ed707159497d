"""surgery-kernels calibrate."""

from __future__ import annotations

import sys
import time

import click

from ..checkpoint.summary import in_columns, plan_facts, plan_lines
from ..surgery.calibrate.settings import ORDERS, Settings
from ..surgery.checkpoints.plan import plan_calibration
from ..surgery.checkpoints.run import check as check_calibration
from ..surgery.checkpoints.run import run as run_calibration
from ..surgery.checkpoints.summary import perplexity_rows, text_rows
from .exits import EXIT_CODES, errors_as_exit_codes
from .options import as_json, print_json, running


@click.command(epilog=EXIT_CODES)
@click.argument("recipe", type=click.Path())
@click.argument("data", type=click.Path())
@click.argument("out", type=click.Path())
@click.option("--merged", type=click.Path(), help="Folder that RECIPE was merged into; none: merge it now.")
@click.option("--residual", is_flag=True, help="Layers that add to the stream make up for its drift; in order.")
@click.option("--order", type=click.Choice(ORDERS), help="Solve a block at once, or layer by layer.")
@click.option("--lam", type=float, help="Strength of the anchor; none: 0.05, with --residual 0.001.")
@click.option("--anchor", type=float, help="Of the base (0) and the merged model (1); none: 2, with --residual 1.")
@click.option("--teacher", type=float, help="Share of the experts' own inputs; none: 0.3, with --residual 1.")
@click.option("--max-length", type=int, default=512, show_default=True, help="Tokens of a text.")
@click.option("--batch-size", type=int, default=8, show_default=True, help="Texts in one pass.")
@click.option("--resume", is_flag=True, help="Go on with OUT.partial, behind the last block that is done.")
@click.option("--dry-run", is_flag=True, help="Check everything and stop; nothing is written.")
@as_json
@running
def calibrate(
    recipe: str,
    data: str,
    out: str,
    merged: str | None,
    residual: bool,
    order: str | None,
    lam: float | None,
    anchor: float | None,
    teacher: float | None,
    max_length: int,
    batch_size: int,
    resume: bool,
    dry_run: bool,
    as_json: bool,
    device: str,
    threads: int | None,
    max_shard_size: int,
    quiet: bool,
) -> None:
    """Merge language models by RECIPE and calibrate the result on texts of its experts (FeatCal): the new folder OUT.

    DATA are lines of JSON, {"model": "...", "text": "..."}: 8 to 256 unlabeled texts of each expert, by its name in
    RECIPE. Block after block, every linear layer and normalisation of the merged model is solved for, so that it
    answers as those of the experts do; one block of each model is in memory at a time. Prints the perplexity of the
    merged model on the texts of each expert before and after, and the expert's own. Needs transformers.
    """
    say = (lambda _: None) if quiet or as_json else click.echo
    with errors_as_exit_codes():
        how = Settings.of(lam=lam, anchor=anchor, teacher=teacher, unread_weight=1, residual=residual, order=order)
        options = {"max_length": max_length, "batch_size": batch_size, "max_shard_bytes": max_shard_size}
        with plan_calibration(recipe, data, how, merged=merged, **options) as plan:
            check_calibration(plan, out, resume=resume, device=device)
            say("\n".join([*plan_lines(plan.merge), *in_columns(text_rows(plan))]))
            facts = {**plan_facts(plan.merge), "out": out, "written": False}
            if dry_run:
                if as_json:
                    print_json(facts)
                return
            started = time.perf_counter()
            with errors_as_exit_codes(writing=True):
                shown = not quiet and sys.stderr.isatty()
                found = run_calibration(plan, out, resume=resume, device=device, threads=threads, progress=shown)
            seconds = time.perf_counter() - started
            say("\n".join(in_columns(perplexity_rows(found))))
            say(f"wrote {out}: {seconds:.1f} s")
            if as_json:
                print_json({**facts, "perplexity": found, "seconds": seconds, "written": True})
