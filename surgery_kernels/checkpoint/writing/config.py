"""The config.json of a result: the donor's, but for what the merge changes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...ops.arguments import name_of
from ...recipes.modules import role_of
from ..layer_lists import COUNTED_BY, followed
from ..mixture import dtype_of, output_of
from ..plan import Plan
from ..reading.files import read_json
from ..reading.parts import Part
from ..vocabulary.layers import says_tied, untied
from ..vocabulary.sizes import LANGUAGE
from .durable import copy_file, write_text

DTYPE_KEYS = ("dtype", "torch_dtype")  # the last is understood by all versions of transformers
CLASS = "_class_name"  # in a configuration of diffusers, which have no dtype


def write_config(source: Path, target: Path, plan: Plan, part: Part) -> None:
    """Of a component; a copy where nothing changes."""
    config = read_json(source)
    merged = _merged(plan, part, config)
    if merged == config:
        copy_file(source, target)
    else:
        write_text(target, json.dumps(merged, indent=2, ensure_ascii=False) + "\n")


def _merged(plan: Plan, part: Part, config: Mapping[str, Any]) -> dict[str, Any]:
    """`config`, that of the donor, with the dtype, the number of tokens, the layers and the ties of the result.

    Only what is there changes, in the configuration of a language model within another too; a dtype may be new.
    """
    if plan.recipe.mixture:
        output = output_of(plan.recipe.mixture, plan.first)
        return output.configured(config, plan.recipe.mixture, dtype_of(plan.recipe, plan.first))
    merged = _with_layers(plan, config)
    steps = [step for step in plan.merged if plan.first.anatomy.part_of(step.name) is part]
    dtypes = {step.out_dtype for step in steps}
    if len(dtypes) == 1 and any(step.out_dtype != step.first.info.dtype for step in steps):
        merged = _with_dtype(merged, name_of(dtypes.pop()))
    if part.folder:
        return merged
    if False in says_tied(plan.first.config or {}) and False not in says_tied(config):  # by an adapter
        merged = untied(merged)
    return plan.vocabularies.configured(merged)


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """In the configurations within another only where they say one."""

    def said(of: Mapping[str, Any]) -> dict[str, str]:
        return {key: dtype for key in DTYPE_KEYS if key in of}

    own = said(config) or ({} if CLASS in config else {DTYPE_KEYS[-1]: dtype})
    within = {key: of for key, of in config.items() if isinstance(of, Mapping) and (key in LANGUAGE or "conf" in key)}
    return {**config, **own, **{key: {**of, **said(of)} for key, of in within.items()}}


def _with_layers(plan: Plan, config: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(config)
    for module, origins in plan.recipe.origins.items():
        if (role := role_of(module)) in COUNTED_BY:
            sources = [(plan.sources[model].config or {}, layer) for model, layer in origins]
            merged |= followed(merged, sources, role)
    return merged
