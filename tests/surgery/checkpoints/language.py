"""Tiny causal language models with a tokenizer, as folders, and texts of their experts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from tests.encoders import perturbed

WORDS = [f"w{i}" for i in range(28)]
VOCABULARY = {"<unk>": 0, "<pad>": 1, **{word: 2 + i for i, word in enumerate(WORDS)}}
EXPERTS = ("first", "second")


def llama(**options: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, architectures=["LlamaForCausalLM"], **options,
    )  # fmt: skip


def texts_of(expert: int, count: int = 6) -> list[str]:
    """Every expert counts in steps of its own, from texts of several lengths."""
    return [" ".join(WORDS[(start + (expert + 1) * i) % 28] for i in range(9 - start % 4)) for start in range(count)]


def trained(model: nn.Module, texts: Sequence[str], steps: int) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(steps):
        ids = torch.tensor([[VOCABULARY[word] for word in texts[step % len(texts)].split()]])
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return model


def save(folder: Path, model: Any) -> str:
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>").save_pretrained(folder)
    return str(folder)


def family(folder: Path, config: Any, *, steps: int = 0) -> dict[str, Any]:
    """A base and experts, trained or moved at random: their folders, and the recipe of their mean."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(config)
        if steps:
            trained(base, [*texts_of(0), *texts_of(1)], steps)
        folders = {"base": save(folder / "base", base)}
        for number, name in enumerate(EXPERTS):
            expert = perturbed(base, number, 0.0 if steps else 0.05)
            if steps:
                trained(expert, texts_of(number), steps)
            folders[name] = save(folder / name, expert)
    return recipe_of(folders)


def recipe_of(folders: Mapping[str, str], **keys: Any) -> dict[str, Any]:
    models = [{"model": folders[name], "parameters": {"weight": 0.5}} for name in EXPERTS]
    recipe = {"merge_method": "task_arithmetic", "base_model": folders["base"], "models": models, "dtype": "float32"}
    return {**recipe, **keys}


def write_data(path: Path, recipe: Mapping[str, Any], texts: Sequence[Sequence[str]] | None = None) -> Path:
    texts = [texts_of(number) for number in range(len(EXPERTS))] if texts is None else texts
    names = [model["model"] for model in recipe["models"]]
    rows = [{"model": name, "text": text} for name, lines in zip(names, texts, strict=True) for text in lines]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path
