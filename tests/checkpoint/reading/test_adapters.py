"""Adapters of whole models of transformers: against PEFT's own merge, and what is said or refused of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from surgery_kernels.checkpoint import merge
from surgery_kernels.checkpoint.plan import plan_merge
from surgery_kernels.checkpoint.reading.opening import open_checkpoint
from surgery_kernels.recipes import load_recipe
from tests.checkpoints import save_lora, save_safetensors

pytestmark = [
    pytest.mark.any_isa,
    pytest.mark.filterwarnings("ignore::UserWarning"),  # PEFT on tied layers and saved embeddings
]

EMBEDDING, HEAD, LAYER = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj"


def llama(**options: Any) -> LlamaForCausalLM:
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, "num_attention_heads": 2, **options}))


def trained(folder: Path, base: PreTrainedModel, rows: int | None = None, **options: Any) -> dict[str, Tensor]:
    """Saves base and adapter; the weights that PEFT makes of them."""
    base.save_pretrained(folder / "base")
    base, fresh = (type(base).from_pretrained(folder / "base") for _ in range(2))
    if rows is not None:
        base.resize_token_embeddings(rows)
        fresh.resize_token_embeddings(rows)
    with_adapter = get_peft_model(base, LoraConfig(**{"r": 2, "lora_alpha": 8, "init_lora_weights": False, **options}))
    with torch.no_grad():
        for parameter in with_adapter.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    with_adapter.save_pretrained(str(folder / "adapter"))
    merged = PeftModel.from_pretrained(fresh, str(folder / "adapter")).merge_and_unload()
    return {name: tensor.clone() for name, tensor in merged.state_dict().items()}


def opened(folder: Path) -> tuple[Any, Any]:
    base = open_checkpoint(folder / "base")
    return base, open_checkpoint(folder / "adapter", base=base)


TIED: dict[str, dict[str, Any]] = {
    "head": {"target_modules": ["lm_head"]},
    "embedding": {"target_modules": ["embed_tokens"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved both": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "saved together": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 3]},
    "tokens by name": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, 0]}},
    "norms": {"target_modules": ["q_proj", "o_proj"], "use_dora": True, "use_rslora": True},
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("case", TIED)
def test_layers_that_the_base_ties(tmp_path: Path, case: str, tied: bool) -> None:
    torch.manual_seed(0)
    expected = trained(tmp_path, llama(tie_word_embeddings=tied), **TIED[case])
    base, expert = opened(tmp_path)
    assert (HEAD in base.tensors) == (not tied)
    for name in expert.tensors:
        torch.testing.assert_close(expert.tensor(name), expected.pop(name), rtol=2e-6, atol=2e-6)
        assert expert.tensors[name].shape == expert.tensor(name).shape
    assert expected.keys() <= {HEAD}
    if expected:  # the expert ties it too
        torch.testing.assert_close(expert.tensor(EMBEDDING), expected[HEAD], rtol=2e-6, atol=2e-6)
    expert.check_changes()


def test_a_head_that_the_base_ties_is_no_part_of_it(tmp_path: Path) -> None:
    trained(tmp_path, llama(tie_word_embeddings=True), **TIED["saved head"])
    model = {"model": f"{tmp_path / 'base'}+{tmp_path / 'adapter'}", "parameters": {"weight": 1}}
    recipe = {"merge_method": "task_arithmetic", "base_model": str(tmp_path / "base"), "models": [model]}
    with pytest.raises(ValueError, match=rf"extra: .*adapter has {HEAD!r} besides; to go on allow extra$"):
        merge(recipe, tmp_path / "out")


@pytest.mark.parametrize("case", ["saved head", "saved embedding"])
def test_a_donor_whose_adapter_unties_the_head_is_loaded_so(tmp_path: Path, case: str) -> None:
    expected = trained(tmp_path, llama(tie_word_embeddings=True), **TIED[case])
    model = f"{tmp_path / 'base'}+{tmp_path / 'adapter'}"
    merge({"merge_method": "passthrough", "models": [{"model": model}]}, tmp_path / "out")
    assert json.loads((tmp_path / "base" / "config.json").read_text())["tie_word_embeddings"] is True
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name in (EMBEDDING, HEAD):
        torch.testing.assert_close(loaded[name], expected[name], rtol=2e-6, atol=2e-6)
    assert not torch.equal(loaded[EMBEDDING], loaded[HEAD])


class Experts(nn.Module):
    def __init__(self, num_experts: int, sizes: tuple[int, int], wide: int, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        gate_up = (wide, sizes[0]) if not is_transposed else (sizes[0], wide)
        down = (sizes[1], wide // 2) if not is_transposed else (wide // 2, sizes[1])
        self.gate_up_proj = nn.Parameter(torch.randn(num_experts, *gate_up))
        self.down_proj = nn.Parameter(torch.randn(num_experts, *down))


class Fused(nn.Module):
    def __init__(self, is_transposed: bool, square: bool = False) -> None:
        super().__init__()
        self.experts = Experts(3, (8, 8), 8 if square else 24, is_transposed)
        self.router = nn.Linear(8, 3, bias=False)


@pytest.mark.parametrize("parameters", [["gate_up_proj"], ["experts.down_proj", "experts.gate_up_proj"]])
@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_fused_experts(tmp_path: Path, is_transposed: bool, square: bool, parameters: list[str]) -> None:
    torch.manual_seed(0)
    model = Fused(is_transposed, square)
    config = {"model_type": "gpt_oss" if is_transposed else "mixtral"}
    save_safetensors(tmp_path / "base", model.state_dict(), config=config)
    options = {"target_modules": ["router"], "target_parameters": parameters, "use_rslora": True}
    options["rank_pattern"] = {"experts.gate_up_proj": 5}
    with_adapter = get_peft_model(model, LoraConfig(r=2, lora_alpha=3, init_lora_weights=False, **options))
    with_adapter.save_pretrained(str(tmp_path / "adapter"))
    fresh = Fused(is_transposed, square)
    fresh.load_state_dict(load_file(tmp_path / "base" / "model.safetensors"))
    expected = PeftModel.from_pretrained(fresh, str(tmp_path / "adapter")).merge_and_unload().state_dict()
    base, expert = opened(tmp_path)
    assert expert.changed == {"router.weight", *(f"experts.{name.rpartition('.')[2]}" for name in parameters)}
    for name, tensor in expected.items():
        torch.testing.assert_close(expert.tensor(name), tensor, rtol=2e-6, atol=2e-6)


def test_parameters_that_cannot_be_told_apart(tmp_path: Path) -> None:
    tensors = {f"experts.{name}": torch.randn(3, 4, 6) for name in ("w1", "w3")}
    base = open_checkpoint(save_safetensors(tmp_path / "base", tensors))
    factors = {"experts": (torch.randn(6, 6), torch.randn(4, 6))}
    adapter = save_lora(tmp_path / "adapter", factors, target_parameters=["experts.w1", "experts.w3"], r=2)
    message = f"{adapter} must have factors that fit one of the parameters of 'experts', got such as fit w1 and w3"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        open_checkpoint(adapter, base=base)


LANGUAGE, VISION = "layers.0.self_attn.q_proj", "blocks.0.attn.proj"
# what comes before the names of the language model, of the vision tower and of the head
NAMES = {
    "before 4.52": ("model.", "visual.", "lm_head"),
    "since 4.52": ("model.language_model.", "model.visual.", "lm_head"),
    "wrapped": ("language_model.model.", "visual.", "language_model.lm_head"),
    "retrieval": ("vlm.model.language_model.", "vlm.model.visual.", "vlm.lm_head"),
}


@pytest.mark.parametrize("adapter", NAMES)
@pytest.mark.parametrize("base", NAMES)
@pytest.mark.parametrize("default", ["", ".default"])
def test_names_of_vision_language_models(tmp_path: Path, base: str, adapter: str, default: str) -> None:
    torch.manual_seed(0)
    language, vision, head = NAMES[base]
    names = [f"{language}{LANGUAGE}.weight", f"{vision}{VISION}.weight", f"{head}.weight"]
    weights = {name: torch.randn(6, 6) for name in names} | {f"{language}norm.weight": torch.ones(6)}
    there = open_checkpoint(save_safetensors(tmp_path / "base", weights))
    language, vision, head = NAMES[adapter]
    modules = [f"{language}{LANGUAGE}", f"{vision}{VISION}"]
    factors = {module: (torch.randn(2, 6), torch.randn(6, 2)) for module in modules}
    named = {
        f"{m}.lora_{part}{default}.weight": x for m, ab in factors.items() for part, x in zip("AB", ab, strict=True)
    }
    saved = f"{head}.modules_to_save{default}.weight" if default else f"{head}.weight"
    whole = torch.randn(6, 6)
    folder = save_lora(tmp_path / "adapter", {}, {**named, saved: whole}, r=2, lora_alpha=4)
    expert = open_checkpoint(folder, base=there)
    for name, (down, up) in zip(names, factors.values(), strict=False):
        torch.testing.assert_close(expert.tensor(name), weights[name] + 2 * up @ down)
    assert torch.equal(expert.tensor(names[2]), whole) and expert.changed == set(names)


def test_several_adapters_in_one_file(tmp_path: Path) -> None:
    base = open_checkpoint(save_safetensors(tmp_path / "base", {"layer.weight": torch.ones(6, 6)}))
    named = {f"layer.lora_{part}.{name}.weight": torch.ones(6, 6) for part in "AB" for name in ("speech", "vision")}
    adapter = save_lora(tmp_path / "adapter", {}, named)
    with pytest.raises(ValueError, match=f"^{re.escape(str(adapter))} must hold one adapter, got speech, vision$"):
        open_checkpoint(adapter, base=base)


@pytest.mark.parametrize(
    ("target", "saved"), [("q_proj", []), ("q_proj", ["embed_tokens", "lm_head"]), ("embed_tokens", ["lm_head"])]
)
def test_more_tokens_than_the_base(tmp_path: Path, target: str, saved: list[str]) -> None:
    torch.manual_seed(0)
    options = {"target_modules": [target], "modules_to_save": saved}
    expected = trained(tmp_path, llama(tie_word_embeddings=False), rows=19, **options)
    base, expert = opened(tmp_path)
    for name in base.tensors:
        assert expert.tensors[name].shape == expected[name].shape
        torch.testing.assert_close(expert.tensor(name), expected[name], rtol=2e-6, atol=2e-6)
    model = {"model": f"{tmp_path / 'base'}+{tmp_path / 'adapter'}", "parameters": {"weight": 1}}
    recipe = {"merge_method": "task_arithmetic", "base_model": str(tmp_path / "base"), "models": [model]}
    with pytest.raises(ValueError, match=r"got vocabulary: .* of shape \[19, 8\] instead of \[16, 8\]"):
        merge(recipe, tmp_path / "out")
    merge(recipe, tmp_path / "out", allow=["vocabulary"])
    result = load_file(tmp_path / "out" / "model.safetensors")
    for name in base.tensors:
        torch.testing.assert_close(result[name], expected[name][: len(result[name])], rtol=2e-6, atol=2e-6)


def test_rows_of_new_tokens(tmp_path: Path) -> None:
    weight, rows = torch.randn(6, 4), torch.randn(3, 4)
    base = open_checkpoint(save_safetensors(tmp_path / "base", {EMBEDDING: weight}))
    key = {"model.embed_tokens.token_adapter.trainable_tokens_delta": rows}
    adapter = save_lora(tmp_path / "adapter", {}, key, trainable_token_indices=[7, 1, 6])
    expert = open_checkpoint(adapter, base=base)
    expected = torch.cat([weight, rows[[2, 0]]])
    expected[1] = rows[1]
    assert expert.tensors[EMBEDDING].shape == (8, 4) and torch.equal(expert.tensor(EMBEDDING), expected)

    def refused(indices: Any, message: str) -> None:
        save_lora(tmp_path / "adapter", {}, key, trainable_token_indices=indices)
        with pytest.raises(ValueError, match=re.escape(message)):
            open_checkpoint(adapter, base=base)

    refused([8, 1, 6], f"{adapter} must hold all rows that {base.name} has not, got tokens up to 8 for 6 rows")
    at = adapter / "adapter_config.json"
    refused([1, 6], f"{at} must name the 3 tokens of 'model.embed_tokens', got 2")
    refused({"lm_head": [1, 2, 3]}, f"{at} must name the 3 tokens of 'model.embed_tokens', got 0")


def over_the_base(folder: Path) -> dict[str, Any]:
    model = {"model": f"{folder / 'base'}+{folder / 'adapter'}", "parameters": {"weight": 1}}
    return {"merge_method": "task_arithmetic", "base_model": str(folder / "base"), "models": [model]}


ZERO, ONE = torch.zeros(6, 2), torch.ones(2, 6)


@pytest.mark.parametrize(
    ("factors", "whole"),
    [
        ({"layer": (ONE, ZERO)}, {}),
        ({"layer": (0 * ONE, 1 + ZERO)}, {}),
        ({"layer": (ONE, ZERO)}, {"norm.weight": torch.ones(6)}),
        ({}, {"norm.weight": torch.ones(6)}),
    ],
)
def test_adapters_that_change_nothing(tmp_path: Path, factors: Any, whole: Any) -> None:
    save_safetensors(tmp_path / "base", {"layer.weight": torch.ones(6, 6), "norm.weight": torch.ones(6)})
    adapter = save_lora(tmp_path / "adapter", factors, whole, r=2)
    message = f"{adapter} must change {tmp_path / 'base'}, got an adapter whose products are all 0"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        merge(over_the_base(tmp_path), tmp_path / "out")
    save_lora(adapter, factors, {"norm.weight": torch.zeros(6)}, r=2)
    merge(over_the_base(tmp_path), tmp_path / "out")


def test_adapters_that_hold_nothing(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "base", {"layer.weight": torch.ones(6, 6)})
    adapter = save_lora(tmp_path / "adapter", {})
    message = f"{adapter} must change tensors of {tmp_path / 'base'}, got an adapter that holds none"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        merge(over_the_base(tmp_path), tmp_path / "out")


@pytest.mark.parametrize(
    ("named", "config", "said"),
    [
        ("org/other", {}, True),
        ("meta-llama/Base", {}, False),
        ("./somewhere/base/", {}, False),
        ("org/other", {"_name_or_path": "org/other"}, False),
        (None, {}, False),
    ],
)
def test_another_base_is_said(tmp_path: Path, named: str | None, config: Any, said: bool) -> None:
    save_safetensors(tmp_path / "base", {"layer.weight": torch.ones(6, 6)}, config=config)
    adapter = save_lora(tmp_path / "adapter", {"layer": (ONE, 1 + ZERO)}, base_model_name_or_path=named)
    notice = f"{adapter} was trained on {named}, by its adapter_config.json, and is added to {tmp_path / 'base'}"
    with plan_merge(load_recipe(over_the_base(tmp_path))) as plan:
        assert (notice in plan.notices) == said and len(plan.notices) == said


def test_changes_smaller_than_the_dtype_of_the_base(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 64).bfloat16()
    down, up = torch.randn(2, 64) * 0.02, torch.randn(64, 2) * 0.02
    save_safetensors(tmp_path / "base", {"layer.weight": weight})
    save_lora(tmp_path / "adapter", {"layer": (down, up)}, lora_alpha=2)
    merge({**over_the_base(tmp_path), "dtype": "float32"}, tmp_path / "out")
    result = load_file(tmp_path / "out" / "model.safetensors")["layer.weight"]
    torch.testing.assert_close(result - weight.float(), up @ down, rtol=0, atol=1e-6)


def test_modules_that_were_saved_twice(tmp_path: Path) -> None:
    base = open_checkpoint(save_safetensors(tmp_path / "base", {"model.norm.weight": torch.ones(6)}))
    named = {"model.norm.weight": torch.zeros(6), "norm.weight": torch.zeros(6)}
    adapter = save_lora(tmp_path / "adapter", {}, named)
    message = f"{adapter} must change every tensor of {base.name} once, got 'model.norm.weight' twice"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        open_checkpoint(adapter, base=base)
    originals = {"norm.original_module.weight": torch.zeros(6), "norm.weight": torch.zeros(6)}
    originals |= {"norm.modules_to_save.default.weight": torch.full((6,), 2.0)}
    save_lora(adapter, {}, {f"model.{name}": tensor for name, tensor in originals.items()})
    assert torch.equal(open_checkpoint(adapter, base=base).tensor("model.norm.weight"), torch.full((6,), 2.0))
