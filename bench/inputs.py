"""Inputs of the benchmarks: a base and experts a small step away from it, the stored task vectors alone for PEFT."""

from __future__ import annotations

import math

import torch
from torch import Tensor

NUM_TASKS = 8

Inputs = tuple[Tensor | None, list[Tensor]]


def flat_inputs(num_params: int, dtype: torch.dtype, takes_base: bool = True, num_tasks: int = NUM_TASKS) -> Inputs:
    """Written in place: no temporary of the size of a tensor raises the peak of memory."""
    generator = torch.Generator().manual_seed(0)

    def step() -> Tensor:
        return torch.empty(num_params, dtype=dtype).normal_(0, 0.001, generator=generator)

    if not takes_base:
        return None, [step() for _ in range(num_tasks)]
    base = torch.empty(num_params, dtype=dtype).normal_(0, 0.02, generator=generator)
    return base, [step().add_(base) for _ in range(num_tasks)]


def vit_b32_shapes(layers: int = 12) -> dict[str, tuple[int, ...]]:
    """The 152 tensors of CLIP's ViT-B/32 image encoder, 88M parameters; with 2 layers 32 tensors, 17M parameters."""
    width, patch, positions, projected = 768, 32, 50, 512
    shapes: dict[str, tuple[int, ...]] = {
        "class_embedding": (width,),
        "positional_embedding": (positions, width),
        "proj": (width, projected),
        "conv1.weight": (width, 3, patch, patch),
        "ln_pre.weight": (width,),
        "ln_pre.bias": (width,),
    }
    for i in range(layers):
        block = {
            "attn.in_proj_weight": (3 * width, width),
            "attn.in_proj_bias": (3 * width,),
            "attn.out_proj.weight": (width, width),
            "attn.out_proj.bias": (width,),
            "ln_1.weight": (width,),
            "ln_1.bias": (width,),
            "mlp.c_fc.weight": (4 * width, width),
            "mlp.c_fc.bias": (4 * width,),
            "mlp.c_proj.weight": (width, 4 * width),
            "mlp.c_proj.bias": (width,),
            "ln_2.weight": (width,),
            "ln_2.bias": (width,),
        }
        shapes |= {f"transformer.resblocks.{i}.{name}": shape for name, shape in block.items()}
    return shapes | {"ln_post.weight": (width,), "ln_post.bias": (width,)}


def llama_shapes(layers: int, width: int, vocabulary: int = 32_000) -> dict[str, tuple[int, ...]]:
    """A Llama with as many heads for keys and values as for queries."""
    hidden = 8 * width // 3 // 64 * 64
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    for i in range(layers):
        layer = {
            **{f"self_attn.{name}_proj.weight": (width, width) for name in "qkvo"},
            "mlp.gate_proj.weight": (hidden, width),
            "mlp.up_proj.weight": (hidden, width),
            "mlp.down_proj.weight": (width, hidden),
            "input_layernorm.weight": (width,),
            "post_attention_layernorm.weight": (width,),
        }
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes | {"model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}


def num_params_of(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(map(math.prod, shapes.values()))


def state_dict(flat: Tensor, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Views into `flat`, one after the other."""
    parts = flat.split([math.prod(shape) for shape in shapes.values()])
    return {name: part.view(shape) for part, (name, shape) in zip(parts, shapes.items(), strict=True)}
