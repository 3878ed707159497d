"""The files beside the weights: configuration, tokenizer, index and model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..plan import Plan
from ..reading.files import read_json
from .card import model_card
from .durable import copy_file, write_text

# By name, from the checkpoint that the result takes after.
COPIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.tiktoken",
    "sentencepiece*.model",
    "spiece.model",
    "chat_template*",
    "*processor_config.json",
    "configuration_*.py",
    "modeling_*.py",
    "tokenization_*.py",
    "LICENSE*",
    "NOTICE*",
)


def write_companions(folder: Path, plan: Plan, name: str) -> None:
    """Everything of the result besides the weights; the same bytes for the same plan."""
    if len(plan.layout.shards) > 1:
        write_text(folder / "model.safetensors.index.json", plan.layout.index())
    if source := plan.first.folder:
        for path in sorted({path for pattern in COPIED for path in source.glob(pattern) if path.is_file()}):
            copy_file(path, folder / path.name)
        if (source / "config.json").is_file():
            _write_config(source / "config.json", folder / "config.json", plan)
    write_text(folder / "README.md", model_card(plan, name))


def _write_config(source: Path, target: Path, plan: Plan) -> None:
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
