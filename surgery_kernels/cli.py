"""The command `surgery-kernels`: merge checkpoints, calibrate and compare them, and say what this build can do."""

from __future__ import annotations

import errno
import inspect
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import click
import torch

from . import _C
from .checkpoint.diff import TensorDifference
from .checkpoint.diff import diff as diff_checkpoints
from .checkpoint.differences import ALLOWABLE
from .checkpoint.estimate import estimate_seconds
from .checkpoint.experts import DECISIONS, LAYOUTS
from .checkpoint.plan import plan_merge
from .checkpoint.run import check as check_run
from .checkpoint.run import run
from .checkpoint.sizes import parse_size
from .checkpoint.stages import stages
from .checkpoint.summary import in_columns, plan_lines, recipe_rows, result_line
from .merging import METHODS, Method, Parameter
from .merging.method import NONE_GIVEN, count_in_words
from .merging.methods.sparse import STREAMS
from .ops.arguments import NONFINITE, check_one_of
from .recipes import load_recipes
from .recipes.parameters import check_given
from .recipes.recipe import DTYPES
from .surgery.calibrate.settings import ORDERS, Settings

FAILED, WRONG_INPUT, INTERRUPTED = 1, 2, 130
DECIDES = {
    "element": "each element alone",
    "tensor": "over each tensor",
    "row": "over each row of a tensor",
    "scope": "over each tensor, or over the model (scope: model)",
    "model": "over the model",
}

EXIT_CODES = """
\b
Exit codes:
  0    done (diff: no difference)
  1    failed on the way, such as on a full disk; --resume goes on from there (diff: different)
  2    wrong arguments, recipe or checkpoints; nothing was written
  130  interrupted; --resume goes on from there
"""


def _running(command: Callable[..., None]) -> Callable[..., None]:
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


@contextmanager
def _errors_as_exit_codes(*, writing: bool = False, written: bool = False) -> Iterator[None]:
    """One sentence on stderr instead of a traceback.

    An OSError is a wrong input until the `writing` has begun, and nothing is once an earlier document was `written`.
    """
    try:
        yield
    except (ValueError, TypeError, ImportError) as error:
        _stop(str(error), FAILED if written else WRONG_INPUT)
    except BrokenPipeError:  # nobody reads on, as behind `| head`: click ends quietly, with 1
        raise
    except OSError as error:
        hint = ": make room and run it again with --resume" if writing and error.errno == errno.ENOSPC else ""
        _stop(f"{error}{hint}", FAILED if writing or written else WRONG_INPUT)
    except RuntimeError as error:
        _stop(str(error), FAILED)
    except KeyboardInterrupt:
        _stop("interrupted: run it again with --resume to go on" if writing else "interrupted", INTERRUPTED)


def _stop(sentence: str, code: int) -> None:
    click.echo(f"surgery-kernels: {sentence}", err=True)
    sys.exit(code)


class Size(click.ParamType):
    """Bytes, with a decimal unit or none."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return parse_size(str(value))
        except ValueError as error:
            raise click.BadParameter(str(error), ctx, param) from None


@click.group(epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(_C.build_info()["version"], prog_name="surgery-kernels")
def main() -> None:
    """Exact and fast merging of models."""


@main.command(epilog=EXIT_CODES)
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
@click.option("--dry-run", is_flag=True, help="Print the plan and stop; nothing is written.")
@_running
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
    dry_run: bool,
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
    say = (lambda _: None) if quiet else click.echo
    with (
        _errors_as_exit_codes(),
        closing(stages(load_recipes(recipe, strict=strict), out, intermediate_dir, resume=resume)) as merges,
    ):
        written = False
        for stage in merges:
            if stage.recipe.name is not None and not stage.is_last:
                say(f"{stage.recipe.name}:")
            if dry_run and not stage.is_ready:
                say("\n".join(in_columns(recipe_rows(stage.recipe))))
                continue
            with (
                _errors_as_exit_codes(written=written),
                plan_merge(stage.recipe, results=stage.results, **options) as plan,
            ):
                say("\n".join(plan_lines(plan)))
                if stage.is_done(plan):
                    say(f"{stage.out} is there already")
                elif dry_run:
                    if stage.is_last or stage.out.parent.is_dir():
                        check_run(plan, stage.out, resume=stage.resume, device=device)
                    seconds = estimate_seconds(plan, stage.out)
                    click.echo(f"would take about {seconds:.0f} s" if seconds >= 1 else "would take about a second")
                else:
                    stage.begin(plan)
                    check_run(plan, stage.out, resume=stage.resume, device=device)
                    started = time.perf_counter()
                    with _errors_as_exit_codes(writing=True):
                        shown = not quiet and sys.stderr.isatty()
                        run(plan, stage.out, resume=stage.resume, device=device, threads=threads, progress=shown)
                    where = out if stage.is_last and out else str(stage.out)
                    say(result_line(plan, where, time.perf_counter() - started))
                    written = True


@main.command(epilog=EXIT_CODES)
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
@_running
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
    from .surgery.checkpoints.plan import plan_calibration
    from .surgery.checkpoints.run import check as check_calibration
    from .surgery.checkpoints.run import run as run_calibration
    from .surgery.checkpoints.summary import perplexity_rows, text_rows

    say = (lambda _: None) if quiet else click.echo
    with _errors_as_exit_codes():
        how = Settings.of(lam=lam, anchor=anchor, teacher=teacher, unread_weight=1, residual=residual, order=order)
        options = {"max_length": max_length, "batch_size": batch_size, "max_shard_bytes": max_shard_size}
        with plan_calibration(recipe, data, how, merged=merged, **options) as plan:
            check_calibration(plan, out, resume=resume, device=device)
            say("\n".join([*plan_lines(plan.merge), *in_columns(text_rows(plan))]))
            if dry_run:
                return
            started = time.perf_counter()
            with _errors_as_exit_codes(writing=True):
                shown = not quiet and sys.stderr.isatty()
                found = run_calibration(plan, out, resume=resume, device=device, threads=threads, progress=shown)
            say("\n".join(in_columns(perplexity_rows(found))))
            say(f"wrote {out}: {time.perf_counter() - started:.1f} s")


@main.command()
@click.argument("recipe", type=click.Path())
@click.option("--strict", is_flag=True, help="Refuse what RECIPE says without effect, which is only noticed else.")
def check(recipe: str, strict: bool) -> None:
    """Say what RECIPE merges, and whether it is right as far as that can be seen without its models."""
    with _errors_as_exit_codes():
        for each in load_recipes(recipe, strict=strict):
            check_given(each)
            if each.name is not None:
                click.echo(f"{each.name}:")
            click.echo("\n".join(in_columns(recipe_rows(each))))
            for notice in each.notices:
                click.echo(f"notice: {notice}")


@main.command()
@click.argument("first", type=click.Path())
@click.argument("second", type=click.Path())
def diff(first: str, second: str) -> None:
    """Compare two checkpoints: the largest absolute and relative difference of every tensor that differs.

    Exits with 1 where there is one.
    """
    differs = False
    with _errors_as_exit_codes():
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


@main.command()
@click.argument("name", required=False)
@click.option("--markdown", is_flag=True, help="The list as a table.")
def methods(name: str | None, markdown: bool) -> None:
    """List the merging methods, or explain the one called NAME."""
    with _errors_as_exit_codes():
        if markdown:
            click.echo(methods_table())
            return
        if name is None:
            width = max(map(len, METHODS))
            for method in METHODS.values():
                click.echo(f"{method.name:{width}}  {method.summary()}")
            return
        check_one_of("name", name, tuple(METHODS))
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


@main.command()
def info() -> None:
    """Print the build, the instruction sets and the devices."""
    build = _C.build_info()
    lines = {
        "surgery_kernels": build["version"],
        "torch": f"{torch.__version__} (built against {build['torch']})",
        "compiler": build["compiler"],
        "instruction set": f"{_C.isa()} of {', '.join(_C.isas())}",
        "threads": torch.get_num_threads(),
        "CUDA kernels": ", ".join(build["cuda"]) or "none besides Triton's",
        "CUDA devices": ", ".join(map(torch.cuda.get_device_name, range(torch.cuda.device_count()))) or "none",
    }
    for name, value in lines.items():
        click.echo(f"{name:16} {value}")


if __name__ == "__main__":
    main()
