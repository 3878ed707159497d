"""Small Llama checkpoints, and recipes that merge them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery_kernels.checkpoint.reading.opening import open_checkpoint
from surgery_kernels.recipes.recipe import RECIPE_METHODS
from tests.cases import Inputs, bits, gaussian, inputs, option_id
from tests.checkpoints import save_safetensors

StateDict = dict[str, Tensor]
Data = Callable[[Sequence[int], int, torch.dtype], Inputs]
Merges = Callable[..., tuple[StateDict, StateDict]]
LAYERS, WIDTH, HIDDEN, VOCABULARY = 3, 8, 16, 40
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip
DENSITIES = [0.2, 0.55, 1.0, 0.37]
NUMBERS = [{"weight": w, "density": d} for w, d in zip([1.0, 0.5, -0.3, 0.7], DENSITIES, strict=True)]


def llama_shapes(vocabulary: int = VOCABULARY) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (vocabulary, WIDTH)}
    for layer in (f"model.layers.{i}" for i in range(LAYERS)):
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (WIDTH, WIDTH) for name in "qkvo"}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (HIDDEN, WIDTH) for name in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (WIDTH, HIDDEN)
        shapes |= {f"{layer}.{name}_layernorm.weight": (WIDTH,) for name in ("input", "post_attention")}
    return {**shapes, "model.norm.weight": (WIDTH,), HEAD: (vocabulary, WIDTH)}


def models(data: Data, dtype: torch.dtype, num_tasks: int = 3) -> list[StateDict]:
    """The base and the experts."""
    state_dicts: list[StateDict] = [{} for _ in range(1 + num_tasks)]
    for name, shape in llama_shapes().items():
        base, experts = data(shape, num_tasks, dtype)
        for state_dict, tensor in zip(state_dicts, [base, *experts], strict=True):
            state_dict[name] = tensor.clone()
    return state_dicts


def gaussians(shape: Sequence[int], num_tasks: int, dtype: torch.dtype) -> Inputs:
    return inputs(gaussian, shape, num_tasks, dtype)


def save(folder: Path, state_dicts: Sequence[StateDict], **config: Any) -> list[str]:
    names = ["base", *(f"expert{t}" for t in range(len(state_dicts) - 1))]
    return [save_one(folder / name, tensors, **config) for name, tensors in zip(names, state_dicts, strict=True)]


def save_one(folder: Path, tensors: StateDict, **config: Any) -> str:
    sizes = {"dtype": option_id(tensors[EMBEDDING].dtype), "vocab_size": len(tensors[EMBEDDING])}
    return str(save_safetensors(folder, tensors, config={**CONFIG, **sizes, **config}))


def recipe(
    method: str, folders: Sequence[str], of_model: Sequence[Mapping[str, Any]] = NUMBERS, **keys: Any
) -> dict[str, Any]:
    """Of a base and experts; parameters that the method does not have are left out."""

    def known(parameters: Mapping[str, Any]) -> dict[str, Any]:
        known = [parameter.key for parameter in RECIPE_METHODS[method].parameters()]
        return {name: value for name, value in parameters.items() if name in (*known, *RECIPE_METHODS[method].ignored)}

    base, *experts = folders
    models = [
        {"model": expert, "parameters": known(parameters)}
        for expert, parameters in zip(experts, of_model, strict=False)
    ]
    if "parameters" in keys:
        keys["parameters"] = known(keys["parameters"])
    return {"merge_method": method, **({} if method == "linear" else {"base_model": base}), "models": models, **keys}


def loaded(folder: Path) -> StateDict:
    with closing(open_checkpoint(folder)) as source:
        return {name: source.tensor(name).clone() for name in source.tensors}


def written(folder: Path, file: str) -> list[dict[str, Any]]:
    """What the last merges in a folder wrote, mergekit's and ours."""
    last = max(folder.glob("*.yml"), key=lambda path: int(path.stem))
    return [json.loads((last.with_suffix(end) / file).read_text()) for end in (".mergekit", ".ours")]


def assert_same_bits(stock: StateDict, ours: StateDict) -> None:
    assert list(ours) == list(stock)
    for name, tensor in ours.items():
        assert tensor.dtype == stock[name].dtype, name
        assert torch.equal(bits(tensor), bits(stock[name])), f"{name}: {int((tensor != stock[name]).sum())} differ"
