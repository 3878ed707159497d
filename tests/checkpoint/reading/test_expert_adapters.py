"""Adapters of experts that their base has in another layout, against PEFT's own merge in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AriaTextConfig,
    AriaTextForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from surgery_kernels.checkpoint.experts import layout_of
from surgery_kernels.checkpoint.reading.opening import open_checkpoint
from tests.checkpoints import save_safetensors

pytestmark = [pytest.mark.any_isa, pytest.mark.filterwarnings("ignore")]

SIZES = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 2, "head_dim": 4}
MODELS: dict[str, Any] = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=3)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, moe_intermediate_size=12, num_experts=3, num_experts_per_tok=1)
    ),
    "gpt_oss": lambda: GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=3, num_experts_per_tok=1)),
    "aria_text": lambda: AriaTextForCausalLM(AriaTextConfig(**SIZES, moe_num_experts=3, moe_topk=1, pad_token_id=0)),
}
LAYOUTS = {"mixtral": "split", "qwen3_moe": "split", "gpt_oss": "fused", "aria_text": "fused"}  # of their files


@pytest.mark.parametrize("parameters", [["down_proj"], ["gate_up_proj", "down_proj"]])
@pytest.mark.parametrize("family", MODELS)
def test_fused_targets(tmp_path: Path, family: str, parameters: list[str]) -> None:
    torch.manual_seed(0)
    model: PreTrainedModel = MODELS[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(tmp_path / "base")
    options = {"target_parameters": [f"mlp.experts.{name}" for name in parameters], "target_modules": ["q_proj"]}
    trained = get_peft_model(model, LoraConfig(r=2, lora_alpha=3, init_lora_weights=False, **options))
    trained.save_pretrained(str(tmp_path / "adapter"))
    fresh = type(model).from_pretrained(tmp_path / "base")
    expected = PeftModel.from_pretrained(fresh, str(tmp_path / "adapter")).merge_and_unload().state_dict()
    base = open_checkpoint(tmp_path / "base")
    assert layout_of(base) == LAYOUTS[family]
    expert = open_checkpoint(tmp_path / "adapter", base=base)
    assert {name for name in expert.changed if ".experts." in name} == {
        f"model.layers.{layer}.mlp.experts.{name}" for layer in (0, 1) for name in parameters
    }
    assert expert.tensors.keys() <= expected.keys()
    for name in expert.tensors:
        torch.testing.assert_close(expert.tensor(name), expected[name], rtol=2e-6, atol=2e-6)


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 8)


class Block(nn.Module):
    def __init__(self, biases: bool) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert() for _ in range(3))
        self.router = nn.Linear(8, 3, bias=False)
        if not biases:
            for each in (layer for expert in self.experts for layer in expert.children()):
                each.bias = None


class Split(nn.Module):
    """Experts as one module each."""

    def __init__(self, biases: bool) -> None:
        super().__init__()
        self.mlp = Block(biases)


def fused(split: dict[str, Tensor], family: str) -> dict[str, Tensor]:
    out = {f"model.{name}": tensor for name, tensor in split.items() if ".experts." not in name}
    for kind, end in (("weight", ""), ("bias", "_bias")):
        if f"mlp.experts.0.up_proj.{kind}" not in split:
            continue
        gate, up, down = (
            torch.stack([split[f"mlp.experts.{expert}.{name}_proj.{kind}"] for expert in range(3)])
            for name in ("gate", "up", "down")
        )
        both = torch.stack([gate, up], 2).flatten(1, 2) if family == "gpt_oss" else torch.cat([gate, up], 1)
        turned = family == "gpt_oss" and kind == "weight"
        out[f"model.mlp.experts.gate_up_proj{end}"] = (both.mT if turned else both).contiguous()
        out[f"model.mlp.experts.down_proj{end}"] = (down.mT if turned else down).contiguous()
    return out


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True, "rank_pattern": {"gate_proj": 1}}])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_targets_of_single_experts(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Split(family == "gpt_oss")
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_safetensors(tmp_path / "base", fused(weights, family), config={"model_type": family})
    config = LoraConfig(
        r=2, lora_alpha=3, init_lora_weights=False, target_modules=["gate_proj", "down_proj", "router"], **options
    )
    get_peft_model(model, config).save_pretrained(str(tmp_path / "adapter"))
    fresh = Split(family == "gpt_oss")
    fresh.load_state_dict(weights)
    expected = PeftModel.from_pretrained(fresh, str(tmp_path / "adapter")).merge_and_unload().state_dict()
    base = open_checkpoint(tmp_path / "base")
    assert layout_of(base) == "fused"
    expert = open_checkpoint(tmp_path / "adapter", base=base)
    assert expert.tensors.keys() == {f"model.{name}" for name in expected}
    for name, tensor in expected.items():
        torch.testing.assert_close(expert.tensor(f"model.{name}"), tensor, rtol=2e-6, atol=2e-6)
