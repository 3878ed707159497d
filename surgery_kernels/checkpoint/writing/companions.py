"""The files beside the weights, as they are: tokenizer, code, licence; and our index and model card."""

from __future__ import annotations

from pathlib import Path

from ..plan import Plan
from .card import model_card
from .config import write_config
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
            if path.name not in plan.vocabularies.files:
                copy_file(path, folder / path.name)
        if (source / "config.json").is_file():
            write_config(source / "config.json", folder / "config.json", plan)
    for file, content in plan.vocabularies.files.items():
        if isinstance(content, Path):
            copy_file(content, folder / file)
        elif content is not None:
            write_text(folder / file, content)
    write_text(folder / "README.md", model_card(plan, name))
