"""The config.json of a result: the donor's, but for what the merge changes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...ops.arguments import name_of
from ..layer_lists import followed
from ..plan import Plan
from ..reading.files import read_json
from ..reading.parts import Part
from ..vocabulary.layers import says_tied, untied
from ..vocabulary.sizes import inner_configs
from .durable import copy_file, write_text

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
    steps = [step for step in plan.merged if plan.first.anatomy.part_of(step.name) is part]
    new: dict[str, object] = {}
    dtypes = {step.out_dtype for step in steps}
    if len(dtypes) == 1 and any(step.out_dtype != step.first.info.dtype for step in steps):
        keys = [key for key in ("dtype", "torch_dtype") if key in config]
        if not keys and CLASS not in config:
            keys = ["torch_dtype"]
        new |= dict.fromkeys(keys, name_of(dtypes.pop()))
    changed = {key: value for key, value in new.items() if key in config or key == "torch_dtype"}
    changed |= _of_layers(plan, config)
    for name, inner in inner_configs(config).items():
        of_inner = {key: value for key, value in new.items() if key in inner} | _of_layers(plan, inner)
        changed[name] = {**inner, **of_inner}
    merged = {**config, **changed}
    if part.folder:
        return merged
    if False in says_tied(plan.first.config or {}) and False not in says_tied(config):  # by an adapter
        merged = untied(merged)
    return plan.vocabularies.configured(merged)


def _of_layers(plan: Plan, config: Mapping[str, Any]) -> dict[str, Any]:
    origins = plan.recipe.origins
    if origins is None:
        return {}
    return followed(config, [(plan.sources[model].config or {}, layer) for model, layer in origins])
