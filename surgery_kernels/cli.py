"""The command `surgery-kernels`: merge checkpoints, compare them, and say what this build can do."""

from __future__ import annotations

import errno
import inspect
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click
import torch

from . import _C
from .checkpoint.diff import TensorDifference
from .checkpoint.diff import diff as diff_checkpoints
from .checkpoint.differences import ALLOWABLE
from .checkpoint.estimate import estimate_seconds
from .checkpoint.plan import Plan, plan_merge
from .checkpoint.run import check, run
from .checkpoint.sizes import format_size, parse_size
from .merging import METHODS, Method, Parameter
from .merging.method import NONE_GIVEN, count_in_words
from .merging.methods.sparse import STREAMS
from .ops.arguments import NONFINITE, check_one_of
from .recipes.recipe import load_recipe

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


@contextmanager
def _errors_as_exit_codes(*, writing: bool = False) -> Iterator[None]:
    """One sentence on stderr instead of a traceback. An OSError is a wrong input until the `writing` has begun."""
    try:
        yield
    except (ValueError, TypeError, ImportError) as error:
        _stop(str(error), WRONG_INPUT)
    except BrokenPipeError:  # nobody reads on, as behind `| head`: click ends quietly, with 1
        raise
    except OSError as error:
        hint = ": make room and run it again with --resume" if writing and error.errno == errno.ENOSPC else ""
        _stop(f"{error}{hint}", FAILED if writing else WRONG_INPUT)
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
@click.argument("out", type=click.Path())
@click.option(
    "--allow", multiple=True, type=click.Choice(list(ALLOWABLE)), help="Accept such a difference; repeatable."
)
@click.option("--nonfinite", type=click.Choice(NONFINITE), default="error", show_default=True, help="NaN and infinity.")
@click.option("--random-seed", type=int, help="Of random masks, which are mergekit's then; none: 0, drawn by counter.")
@click.option("--stream", type=click.Choice(STREAMS), help="How random masks are drawn, whatever the seed.")
@click.option("--resume", is_flag=True, help="Go on with OUT.partial, which a stopped merge leaves behind.")
@click.option("--strict", is_flag=True, help="Refuse what RECIPE says without effect, which is only noticed else.")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop; nothing is written.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("--threads", type=click.IntRange(min=1), help="On the CPU; all cores unless given.")
@click.option("--max-shard-size", type=Size(), default="5GB", show_default=True, help="Of the files of the result.")
@click.option("--quiet", is_flag=True, help="Say nothing but errors.")
def merge(
    recipe: str,
    out: str,
    allow: tuple[str, ...],
    nonfinite: str,
    random_seed: int | None,
    stream: str | None,
    resume: bool,
    strict: bool,
    dry_run: bool,
    device: str,
    threads: int | None,
    max_shard_size: int,
    quiet: bool,
) -> None:
    """Merge the checkpoints that RECIPE names into the new folder OUT.

    RECIPE is mergekit's YAML; `surgery-kernels methods` lists its methods, `scope: model` takes the thresholds of ties
    over the whole model. Models are folders with safetensors or pytorch_model.bin, .safetensors files, PEFT LoRA
    folders or ids of the Hugging Face hub.
    """
    with (
        _errors_as_exit_codes(),
        plan_merge(
            load_recipe(recipe, strict=strict),
            allow=allow,
            nonfinite=nonfinite,
            random_seed=random_seed,
            stream=stream,
            max_shard_bytes=max_shard_size,
        ) as plan,
    ):
        if not quiet:
            _print_plan(plan)
        check(plan, out, resume=resume, device=device)
        if dry_run:
            seconds = estimate_seconds(plan, out)
            click.echo(f"would take about {seconds:.0f} s" if seconds >= 1 else "would take about a second")
            return
        with _errors_as_exit_codes(writing=True):
            run(plan, out, resume=resume, device=device, threads=threads, progress=not quiet and sys.stderr.isatty())
        if not quiet:
            click.echo(f"wrote {out}")


def _print_plan(plan: Plan) -> None:
    recipe = plan.recipe
    base = f" over {plan.sources[recipe.base].name}" if recipe.base else ""
    click.echo(f"{recipe.merge_method} of {_counted(len(recipe.experts), 'model')}{base}, scope {recipe.scope}")
    click.echo(
        f"{_counted(len(plan.merged), 'tensor')} to merge, {len(plan.steps) - len(plan.merged)} to copy, "
        f"{sum(step.numel for step in plan.merged) / 1e6:.1f}M parameters"
    )
    click.echo(
        f"{format_size(plan.nbytes_read)} to read, {format_size(plan.layout.nbytes)} to write "
        f"in {_counted(len(plan.layout.shards), 'file')}"
    )
    if plan.merged and plan.merged[0].method and (drawn := plan.merged[0].method.randomness):
        click.echo(drawn)
    for difference in plan.differences:
        click.echo(f"{difference.kind}: {difference.sentence}: {difference.consequence}")
    for notice in plan.notices:
        click.echo(f"notice: {notice}")


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


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
@click.option("--markdown", is_flag=True, help="The list as the table of the README.")
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
