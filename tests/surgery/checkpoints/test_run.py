"""Calibration from disk to disk against `calibrate` in memory, and what it does for a merged model's perplexity."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery_kernels.checkpoint import merge
from surgery_kernels.surgery import calibrate
from surgery_kernels.surgery.checkpoints import calibrate_checkpoint
from surgery_kernels.surgery.checkpoints.language_model import LanguageModel
from tests.llama_checkpoints import loaded

pytest.importorskip("transformers", reason="transformers is not installed", exc_type=ImportError)

from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3TextConfig, GPT2Config

from tests.surgery.checkpoints.language import (
    EXPERTS,
    VOCABULARY,
    family,
    llama,
    texts_of,
    write_data,
)  # fmt: skip

pytestmark = pytest.mark.any_isa


def gemma() -> Any:
    """Norms that add 1 to their weights, tied embeddings, blocks that are called in two ways."""
    return Gemma3TextConfig(
        vocab_size=len(VOCABULARY), hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, sliding_window=4, layer_types=["sliding_attention"] * 2 + ["full_attention"],
        architectures=["Gemma3ForCausalLM"], bos_token_id=0, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip


def gpt2() -> Any:
    return GPT2Config(
        vocab_size=len(VOCABULARY), n_embd=16, n_layer=2, n_head=2, n_positions=32, architectures=["GPT2LMHeadModel"],
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip


def model_in(folder: str | Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def in_memory(recipe: dict[str, Any], merged: Path, batch_size: int, **options: Any) -> dict[str, Tensor]:
    """By the names of the backbone's parameters."""
    folders = [merged, recipe["base_model"], *(model["model"] for model in recipe["models"])]
    models = [model_in(folder).base_model for folder in folders]
    tokenizer = AutoTokenizer.from_pretrained(merged)
    batches = {}
    for number, name in enumerate(EXPERTS):
        rows = sorted((tokenizer(text)["input_ids"] for text in texts_of(number)), key=len)
        width = len(rows[-1])
        batches[name] = {
            "input_ids": torch.tensor([row + [0] * (width - len(row)) for row in rows]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
        }
    experts = dict(zip(EXPERTS, models[2:], strict=True))
    return calibrate(
        models[0], models[1], experts, batches, unread_weight=1.0, batch_size=batch_size, progress=False, **options
    ).state


@pytest.mark.parametrize("config", [llama, gemma, gpt2], ids=lambda config: config.__name__)
@pytest.mark.parametrize("options", [{}, {"residual": True}], ids=str)
def test_it_equals_calibration_in_memory(config: Callable[[], Any], options: dict[str, Any], tmp_path: Path) -> None:
    recipe = family(tmp_path, config())
    data = write_data(tmp_path / "data.jsonl", recipe)
    merge(recipe, tmp_path / "merged")
    expected = in_memory(recipe, tmp_path / "merged", 4, **options)
    found = calibrate_checkpoint(recipe, data, tmp_path / "out", batch_size=4, progress=False, **options)
    assert set(found) == {"before", "after", "expert"}
    model = model_in(tmp_path / "out")
    for name, value in model.base_model.named_parameters():
        torch.testing.assert_close(value, expected[name], rtol=2e-4, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")
    merged, written = loaded(tmp_path / "merged"), loaded(tmp_path / "out")
    assert [(name, x.dtype, x.shape) for name, x in merged.items()] == [
        (name, x.dtype, x.shape) for name, x in written.items()
    ]
    kept = {name for name in merged if torch.equal(merged[name], written[name])}
    assert kept == {name for name in merged if re.search(r"embed|lm_head|wte|wpe", name)}


def perplexity_of(folder: str | Path, texts: list[str]) -> float:
    """exp of the mean cross entropy, by transformers."""
    model, tokenizer = model_in(folder), AutoTokenizer.from_pretrained(folder)
    total, count = 0.0, 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return math.exp(total / count)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """Experts that count in steps of their own, and their texts."""
    folder = tmp_path_factory.mktemp("learned")
    recipe = family(folder, llama(), steps=60)
    return recipe, write_data(folder / "data.jsonl", recipe, [texts_of(number, 28) for number in range(2)])


def test_perplexity_falls_on_the_texts_of_every_expert(learned: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    recipe, data = learned
    found = calibrate_checkpoint(recipe, data, tmp_path / "out", residual=True, progress=False)
    merge(recipe, tmp_path / "merged")
    for number, model in enumerate(recipe["models"]):
        name, texts = model["model"], texts_of(number, 28)
        assert found["after"][name] < 0.9 * found["before"][name]
        for kind, folder in (("before", tmp_path / "merged"), ("after", tmp_path / "out"), ("expert", name)):
            assert found[kind][name] == pytest.approx(perplexity_of(folder, texts), rel=1e-4)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Calibrated by surgery_kernels" in card and "task_arithmetic" in card
    assert f"| {recipe['models'][0]['model']} | {found['before'][recipe['models'][0]['model']]:.3f} |" in card
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("w3 w4")["input_ids"] == [5, 6]
    assert not (tmp_path / "out.partial").exists()


def test_a_model_that_is_merged_already(learned: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    recipe, data = learned
    merge(recipe, tmp_path / "merged")
    calibrate_checkpoint(recipe, data, tmp_path / "at_once", progress=False)
    calibrate_checkpoint(recipe, data, tmp_path / "after", merged=tmp_path / "merged", progress=False)
    first, second = (loaded(tmp_path / name) for name in ("at_once", "after"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (tmp_path / "merged").exists()


def test_blocks_of_experts_are_read_once(
    learned: tuple[dict[str, Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, data = learned
    put, read = LanguageModel._put, []

    def counted(self: LanguageModel, names: Sequence[str], **options: Any) -> None:
        read.extend(f"{self.source.name}/{name}" for name in names if ".layers." in name)
        put(self, names, **options)

    monkeypatch.setattr(LanguageModel, "_put", counted)
    calibrate_checkpoint(recipe, data, tmp_path / "out", progress=False)
    for model in recipe["models"]:
        of_expert = [name for name in read if name.startswith(f"{model['model']}/")]
        assert len(of_expert) == len(set(of_expert)) == 3 * 9


def test_shards_and_16_bits(tmp_path: Path) -> None:
    recipe = {**family(tmp_path, llama()), "dtype": "bfloat16"}
    data = write_data(tmp_path / "data.jsonl", recipe)
    calibrate_checkpoint(recipe, data, tmp_path / "out", max_shard_bytes=4000, progress=False)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    written = loaded(tmp_path / "out")
    assert {x.dtype for x in written.values()} == {torch.bfloat16}
    assert all(x.isfinite().all() for x in written.values())
    assert model_in(tmp_path / "out").config.num_hidden_layers == 3
