"""A plan in a few lines or as facts for JSON, and what came of it."""

from __future__ import annotations

from typing import Any

from ..recipes import Recipe
from ..recipes.modules import DEFAULT
from .plan import Plan
from .sizes import format_size

MODELS_SHOWN = 8


def plan_lines(plan: Plan) -> list[str]:
    """Two columns, then what the user should know before the merge begins."""
    recipe = plan.recipe
    rows = recipe_rows(recipe)
    counts = f"{counted(len(plan.merged), 'tensor')} to merge, {len(plan.steps) - len(plan.merged)} to copy"
    rows.append(("tensors", f"{counts}, {sum(step.numel for step in plan.merged) / 1e6:.1f}M parameters"))
    rows.append(("read", format_size(plan.nbytes_read)))
    rows.append(("write", f"{format_size(plan.layout.nbytes)} in {counted(len(plan.layout.shards), 'file')}"))
    if plan.merged and plan.merged[0].method and (drawn := plan.merged[0].method.randomness):
        rows.append(("masks", drawn))
    return [
        *in_columns(rows),
        *(f"{found.kind}: {found.sentence}: {found.consequence}" for found in plan.differences),
        *(f"notice: {notice}" for notice in plan.notices),
    ]


def recipe_rows(recipe: Recipe) -> list[tuple[str, str]]:
    """What a recipe says without any model at hand."""
    base = f" over {recipe.base}" if recipe.base else ""
    method = f"{recipe.merge_method}{base}, scope {recipe.scope}"
    if recipe.mixture:
        method = f"mixture of experts around {recipe.donor}, routers {recipe.mixture.gate_mode}"
    rows = [("method", method)]
    shown = [str(model) for model in recipe.experts[:MODELS_SHOWN]]
    more = len(recipe.experts) - len(shown)
    rows += [
        ("" if i else "models", model) for i, model in enumerate([*shown, *([f"and {more} more"] if more else [])])
    ]
    for module, origins in recipe.origins.items():
        slices = [part for part in recipe.slices if part.module == module]
        of_module = "" if module in (None, DEFAULT) else f" of {module}"
        rows.append(("slices", f"{len(slices)}{of_module}, {counted(len(origins), 'layer')}"))
    return rows


def plan_facts(plan: Plan) -> dict[str, Any]:
    """The numbers behind `plan_lines`, of all models, under keys that stay."""
    return {
        **recipe_facts(plan.recipe),
        "tensors_merged": len(plan.merged),
        "tensors_copied": len(plan.steps) - len(plan.merged),
        "parameters_merged": sum(step.numel for step in plan.merged),
        "bytes_read": plan.nbytes_read,
        "bytes_written": plan.layout.nbytes,
        "files": len(plan.layout.shards),
        "differences": [
            {"kind": found.kind, "what": found.sentence, "consequence": found.consequence} for found in plan.differences
        ],
        "notices": list(plan.notices),
    }


def recipe_facts(recipe: Recipe) -> dict[str, Any]:
    """The same of a recipe without any model at hand."""
    return {
        "name": recipe.name,
        "method": "mixture" if recipe.mixture else recipe.merge_method,
        "scope": recipe.scope,
        "base": str(recipe.base) if recipe.base else None,
        "models": [str(model) for model in recipe.experts],
        "slices": len(recipe.slices),
        "notices": list(recipe.notices),
    }


def in_columns(rows: list[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in rows)
    return [f"{name:{width}}  {value}" for name, value in rows]


def result_line(plan: Plan, where: str, seconds: float) -> str:
    """Where a finished merge is, how large, how long it took, and what went through the disks in that time."""
    rate = format_size((plan.nbytes_read + plan.layout.nbytes) / max(seconds, 1e-9))
    files = counted(len(plan.layout.shards), "file")
    return f"wrote {where}: {format_size(plan.layout.nbytes)} in {files}, {seconds:.1f} s, {rate}/s read and written"


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
