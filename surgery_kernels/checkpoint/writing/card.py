"""The README.md of a result: what it was made from, and how."""

from __future__ import annotations

import torch
import yaml

from ... import _C
from ..plan import Plan


def model_card(plan: Plan, name: str) -> str:
    recipe = plan.recipe
    about = {
        "base_model": [str(reference) for reference in recipe.references],
        "library_name": "transformers" if plan.first.config else "safetensors",
        "tags": ["merge", "surgery-kernels"],
    }
    base = f" over the base {recipe.base}" if recipe.base else ""
    experts = "\n".join(f"- {reference}" for reference in recipe.experts)
    return (
        f"---\n{yaml.safe_dump(about, sort_keys=False)}---\n\n"
        f"# {name}\n\n"
        f"A merge by {recipe.method.title}{base} of\n\n{experts}\n\n"
        f"made by surgery_kernels {_C.build_info()['version']} with torch {torch.__version__} from this recipe:\n\n"
        f"```yaml\n{recipe.source.strip()}\n```\n"
    )
