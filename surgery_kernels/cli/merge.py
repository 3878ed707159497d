"""surgery-kernels merge."""

from __future__ import annotations

import sys
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..checkpoint.differences import ALLOWABLE
from ..checkpoint.estimate import estimate_seconds
from ..checkpoint.experts import DECISIONS, LAYOUTS
from ..checkpoint.plan import Plan, plan_merge
from ..checkpoint.run import check as check_run
from ..checkpoint.run import run
from ..checkpoint.stages import stages
from ..checkpoint.summary import in_columns, plan_facts, plan_lines, recipe_facts, recipe_rows, result_line
from ..merging.methods.sparse import STREAMS
from ..ops.arguments import NONFINITE
from ..recipes import load_recipes
from ..recipes.recipe import DTYPES
from .exits import EXIT_CODES, errors_as_exit_codes
from .options import as_json, print_json, running

if TYPE_CHECKING:
    from ..inspect.reporting import Reporting

EXAMPLE = """
\b
An example that works as typed:
  surgery-kernels example example
  surgery-kernels merge example/ties.yml example/merged
"""


@click.command(epilog=EXAMPLE + EXIT_CODES, no_args_is_help=True)
@click.argument("recipe", type=click.Path())
@click.argument("out", type=click.Path(), required=False)
@click.option(
    "--allow", multiple=True, type=click.Choice(list(ALLOWABLE)), help="Accept such a difference; repeatable."
)
@click.option("--nonfinite", type=click.Choice(NONFINITE), default="error", show_default=True, help="NaN and infinity.")
@click.option(
    "--random-seed", type=int, help="Of random masks and routers, mergekit's then; none: 0, masks by counter."
)
@click.option("--stream", type=click.Choice(STREAMS), help="How random masks are drawn, whatever the seed.")
@click.option(
    "--lora-merge-dtype", type=click.Choice(list(DTYPES)), help="Of what adapters change; none: the recipe's."
)
@click.option(
    "--merge-computed", is_flag=True, help="Merge buffers too, such as inv_freq; else those of the donor stay."
)
@click.option("--moe-layout", type=click.Choice(LAYOUTS), help="Of the experts in OUT; none: as the donor has them.")
@click.option(
    "--moe-decisions",
    type=click.Choice(DECISIONS),
    default="matrix",
    show_default=True,
    help="Over each expert's matrices, or as mergekit over those of all in a fused tensor.",
)
@click.option("--unsafe-truncate-embeddings", is_flag=True, help="Merge the rows that all models have, as mergekit.")
@click.option("--strict", is_flag=True, help="Refuse what RECIPE says without effect, which is only noticed else.")
@click.option("--intermediate-dir", type=click.Path(), help="Keep the results of named documents in this folder.")
@click.option("--resume", is_flag=True, help="Go on with OUT.partial, which a stopped merge leaves behind.")
@click.option("--report", type=click.Path(path_type=Path), help="Write a page and its numbers into this new folder.")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop; nothing is written.")
@as_json
@running
def merge(
    recipe: str,
    out: str | None,
    allow: tuple[str, ...],
    nonfinite: str,
    random_seed: int | None,
    stream: str | None,
    lora_merge_dtype: str | None,
    merge_computed: bool,
    moe_layout: str | None,
    moe_decisions: str,
    unsafe_truncate_embeddings: bool,
    strict: bool,
    intermediate_dir: str | None,
    resume: bool,
    report: Path | None,
    dry_run: bool,
    as_json: bool,
    device: str,
    threads: int | None,
    max_shard_size: int,
    quiet: bool,
) -> None:
    """Merge the checkpoints that RECIPE names into the new folder OUT.

    RECIPE is mergekit's YAML; `surgery-kernels methods` lists its methods, `scope: model` takes the thresholds of ties
    and breadcrumbs over the whole model. Models are folders (of transformers, diffusers, sentence-transformers, timm,
    open_clip), files of weights, PEFT LoRA folders or ids of the Hugging Face hub.

    Of several documents those with a `name` are merged first, into OUT.partial or --intermediate-dir, and others name
    their results as models; the one without a name becomes OUT.
    """
    options: dict[str, Any] = {
        "allow": allow,
        "nonfinite": nonfinite,
        "random_seed": random_seed,
        "stream": stream,
        "lora_merge_dtype": lora_merge_dtype,
        "merge_computed": merge_computed,
        "moe_layout": moe_layout,
        "moe_decisions": moe_decisions,
        "unsafe_truncate_embeddings": unsafe_truncate_embeddings,
        "max_shard_bytes": max_shard_size,
    }
    say = (lambda _: None) if quiet or as_json else click.echo
    facts: list[dict[str, Any]] = []
    with (
        errors_as_exit_codes(),
        closing(stages(load_recipes(recipe, strict=strict), out, intermediate_dir, resume=resume)) as merges,
    ):
        written = False
        for stage in merges:
            if stage.recipe.name is not None and not stage.is_last:
                say(f"{stage.recipe.name}:")
            if dry_run and not stage.is_ready:
                facts.append(recipe_facts(stage.recipe))
                say("\n".join(in_columns(recipe_rows(stage.recipe))))
                continue
            with (
                errors_as_exit_codes(written=written),
                plan_merge(stage.recipe, results=stage.results, **options) as plan,
            ):
                facts.append({**plan_facts(plan), "out": str(stage.out), "written": False})
                say("\n".join(plan_lines(plan)))
                if stage.is_done(plan):
                    say(f"{stage.out} is there already")
                elif dry_run:
                    if stage.is_last or stage.out.parent.is_dir():
                        check_run(plan, stage.out, resume=stage.resume, device=device)
                    seconds = estimate_seconds(plan, stage.out)
                    facts[-1]["estimated_seconds"] = seconds
                    if not as_json:
                        click.echo(f"would take about {f'{seconds:.0f} s' if seconds >= 1 else 'a second'}")
                else:
                    reporting = _reporting(plan, report) if report and stage.is_last else None
                    stage.begin(plan)
                    check_run(plan, stage.out, resume=stage.resume, device=device)
                    started = time.perf_counter()
                    with errors_as_exit_codes(writing=True):
                        shown = not quiet and sys.stderr.isatty()
                        how: dict[str, Any] = {"device": device, "threads": threads, "progress": shown}
                        run(
                            plan,
                            stage.out,
                            resume=stage.resume,
                            told=reporting.see_merged if reporting else None,
                            **how,
                        )
                        if reporting:
                            say(f"report   {reporting.write()}")
                    where = out if stage.is_last and out else str(stage.out)
                    seconds = time.perf_counter() - started
                    say(result_line(plan, where, seconds))
                    facts[-1] |= {"seconds": seconds, "written": True}
                    written = True
    if as_json:
        print_json({"merges": facts})


def _reporting(plan: Plan, folder: Path) -> Reporting:
    from ..inspect.reporting import Reporting

    return Reporting(plan, folder)
