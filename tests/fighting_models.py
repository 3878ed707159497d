"""A base and four experts that are like one another, fight in some layers and hold odd numbers, all by construction."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from tests.checkpoints import save_safetensors

LAYERS, FIGHTING = 8, (5, 6)
EXPERTS = ("math", "code", "chat", "chat-again")
SHAPES = {
    "model.embed_tokens.weight": (40, 16),
    "lm_head.weight": (40, 16),
    "model.norm.weight": (16,),
    **{
        f"model.layers.{layer}.{name}.weight": shape
        for layer in range(LAYERS)
        for name, shape in {"self_attn.q_proj": (16, 16), "mlp.up_proj": (32, 16), "input_layernorm": (16,)}.items()
    },
}


def fighting_models(folder: Path) -> dict[str, str]:
    """Folders by name: base and EXPERTS."""
    generator = torch.Generator().manual_seed(0)

    def random() -> dict[str, Tensor]:
        return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}

    base, common = random(), random()
    states = {"base": base}
    for expert in EXPERTS:
        own = random()
        states[expert] = {name: base[name] + 0.01 * own[name] + 0.02 * common[name] for name in SHAPES}
        for layer in FIGHTING if expert == "code" else ():
            for name in SHAPES:
                if f".{layer}." in name:
                    states[expert][name] -= 0.04 * common[name]
        states[expert]["lm_head.weight"] += 0.4 * common["lm_head.weight"]
    states["chat-again"] = {
        name: x + 0.001 * torch.randn(x.shape, generator=generator) for name, x in states["chat"].items()
    }
    states["math"]["model.norm.weight"][3] = torch.nan
    for name, state in states.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": LAYERS}))
        save_safetensors(folder / name, state)
    return {name: str(folder / name) for name in states}
