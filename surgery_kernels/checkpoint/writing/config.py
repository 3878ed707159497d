"""The config.json of a result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..plan import Plan
from ..reading.files import read_json
from .durable import copy_file, write_text


def write_config(source: Path, target: Path, plan: Plan) -> None:
    """A copy, but for the dtype and the number of tokens where the merge changes them."""
    config = read_json(source)
    new: dict[str, object] = {}
    dtypes = {step.out_dtype for step in plan.merged}
    if len(dtypes) == 1 and any(step.out_dtype != step.first.info.dtype for step in plan.merged):
        keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
        new |= dict.fromkeys(keys, str(dtypes.pop()).removeprefix("torch."))
    rows = {step.shape[0] for step in plan.merged if step.shape != step.first.info.shape}
    if len(rows) == 1:
        new["vocab_size"] = rows.pop()
    if new:
        write_text(target, json.dumps(_with(config, new), indent=2, ensure_ascii=False) + "\n")
    else:
        copy_file(source, target)


def _with(config: Mapping[str, Any], new: Mapping[str, object]) -> dict[str, Any]:
    """Only what is there changes, in the configuration of a language model within another too; a dtype may be new."""
    changed = {key: value for key, value in new.items() if key in config or key == "torch_dtype"}
    if isinstance(inner := config.get("text_config"), Mapping):
        changed["text_config"] = {**inner, **{key: value for key, value in new.items() if key in inner}}
    return {**config, **changed}
