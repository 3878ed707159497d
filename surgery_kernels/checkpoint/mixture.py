"""Mixtures of experts made from dense models, as by mergekit-moe: which tensor of which model goes where."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..merging.methods.linear import Passthrough
from ..recipes import Recipe
from ..recipes.mixture import Expert, Mixture
from ..recipes.model_reference import ModelReference
from ..recipes.recipe import DTYPES
from .reading.expert_layouts import MIXTRAL, USUAL, Family
from .reading.parts import Anatomy
from .reading.source import FileStamp, Source, TensorInfo
from .steps import Input, Step

LAYER = re.compile(r"model\.layers\.(?P<layer>\d+)\.(?P<rest>.+)")
EXPERT = re.compile(r"mlp\.(?P<matrix>gate_proj|up_proj|down_proj)\.weight")
KNOWN = re.compile(
    r"self_attn\.([qkvo]_proj\.weight|[qkv]_proj\.bias|[qk]_norm\.weight)|(input|post_attention)_layernorm\.weight"
)
AROUND = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
EMBEDDING = AROUND[0]
COMPUTED = "rotary_emb.inv_freq"  # in files of old models
SEED = 0  # where none is given


@dataclass(frozen=True)
class Output:
    """An architecture that a mixture is written in."""

    class_name: str
    model_type: str
    from_types: tuple[str, ...]  # of the dense models
    family: Family
    layout: str  # that mergekit-moe writes
    num_shared: int = 0
    attention_biases: bool = False  # zeros where the dense models have none

    def configured(self, config: Mapping[str, Any], mixture: Mixture, dtype: torch.dtype | None) -> dict[str, Any]:
        """The configuration of the base as that of the mixture."""
        count = len(mixture.experts)
        new: dict[str, Any] = {"architectures": [self.class_name], "model_type": self.model_type}
        new["num_experts_per_tok"] = mixture.experts_per_token
        if self.family is MIXTRAL:
            new |= {"num_local_experts": count, "sliding_window": None}
        else:
            new |= {"num_experts": count, "decoder_sparse_step": 1, "norm_topk_prob": True}
            new["moe_intermediate_size"] = config.get("intermediate_size")
        if self.num_shared:
            new |= {"sliding_window": None, "use_sliding_window": False}
            new["shared_expert_intermediate_size"] = config.get("intermediate_size")
        if dtype is not None:
            new["dtype" if "dtype" in config else "torch_dtype"] = str(dtype).removeprefix("torch.")
        return {**config, **new}


OUTPUTS = {
    "mixtral": Output("MixtralForCausalLM", "mixtral", ("llama", "mistral"), MIXTRAL, "fused"),
    "qwen": Output(
        "Qwen2MoeForCausalLM", "qwen2_moe", ("qwen2", "llama", "mistral"), USUAL, "split", 1, attention_biases=True
    ),
    "qwen3": Output("Qwen3MoeForCausalLM", "qwen3_moe", ("qwen3",), USUAL, "fused"),
}


def output_of(mixture: Mixture, base: Source) -> Output:
    """The architecture that is asked for, or the first that fits the models.

    Raises:
        ValueError: none does.
    """
    kind, shared = (base.config or {}).get("model_type"), len(mixture.shared)
    for name, output in OUTPUTS.items():
        fits = kind in output.from_types and shared == output.num_shared
        if fits and mixture.architecture in (None, name):
            return output
    allowed = "; ".join(
        f"{name} from {', '.join(output.from_types)} with {output.num_shared or 'no'} shared expert"
        for name, output in OUTPUTS.items()
    )
    raise ValueError(
        f"recipe.architecture must fit the models ({allowed}), got {mixture.architecture or 'none'} from {kind} with "
        f"{shared or 'no'} shared"
    )


def dtype_of(recipe: Recipe, base: Source) -> torch.dtype | None:
    """That of the recipe, else of the configuration of the base; None: every tensor has its own."""
    config = base.config or {}
    return recipe.dtype or DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch."))


def mixture_steps(
    recipe: Recipe,
    mixture: Mixture,
    sources: Mapping[ModelReference, Source],
    options: Mapping[str, Any],
    folder: Path | None,
) -> list[Step]:
    """A step for every tensor of the mixture.

    Args:
        recipe: That `mixture` is of.
        mixture: What becomes of the models.
        sources: Them.
        options: `random_seed` of random routers, which is mergekit-moe's ``--random-seed`` (None: 0), and `nonfinite`.
        folder: With the tokenizer that prompts are read by.

    Raises:
        ValueError: the models are not of one architecture, or not of one that is known.
    """
    base = sources[recipe.donor]
    output, dtype = output_of(mixture, base), dtype_of(recipe, base)
    layers = _layers(base)
    _check_alike(mixture, sources, base)
    routers = Routers(mixture, base, len(layers), options["random_seed"], folder)
    steps = []

    def copied(name: str, source: Source, own: str, scale: float | None = None) -> None:
        info = source.tensors[own]
        tensor, out_dtype = Input(source, own), dtype or info.dtype
        if scale is None:
            steps.append(Step(name, info.shape, tensor, (), None, info.dtype, out_dtype))
        else:
            method = Passthrough(scale=[scale], nonfinite=options["nonfinite"])
            steps.append(Step(name, info.shape, tensor, (tensor,), method, info.dtype, out_dtype))

    for name in base.tensors:
        found = LAYER.fullmatch(name)
        if name in AROUND or (found and KNOWN.fullmatch(found["rest"])):
            copied(name, base, name)
    for layer in layers:
        block = f"model.layers.{layer}"
        for dense, own in zip(USUAL.matrices, output.family.matrices, strict=True):
            of_dense = f"{block}.mlp.{dense}.weight"
            for number, expert in enumerate(mixture.experts):
                scale = expert.residual_scale if dense == USUAL.down else None
                copied(output.family.split(block, number, own), sources[expert.model], of_dense, scale)
            for expert in mixture.shared:
                scale = expert.residual_scale if dense == USUAL.down else None
                copied(f"{block}.mlp.shared_expert.{dense}.weight", sources[expert.model], of_dense, scale)
        copied(f"{block}.{output.family.inner}.gate.weight", routers, f"{layer}.experts")
        if mixture.shared:
            copied(f"{block}.mlp.shared_expert_gate.weight", routers, f"{layer}.shared")
        for matrix in "qkv" if output.attention_biases else "":
            if (name := f"{block}.self_attn.{matrix}_proj.bias") not in base.tensors:
                copied(name, routers, f"{layer}.{matrix}")
    return sorted(steps, key=lambda step: step.name)


class Routers:
    """A `Source` of what the models do not have: the routers, and biases of zeros."""

    folder: Path | None = None
    config: Mapping[str, Any] | None = None
    files: tuple[FileStamp, ...] = ()
    tied: Mapping[str, str] = {}
    changed: frozenset[str] = frozenset()
    notices: tuple[str, ...] = ()

    def __init__(self, mixture: Mixture, base: Source, num_layers: int, seed: int | None, folder: Path | None) -> None:
        self.anatomy: Anatomy = base.anatomy
        seed = SEED if seed is None else seed
        self.name = f"routers around {base.name} from seed {seed}"
        gates = gates_of(mixture, base, num_layers, seed, folder)
        count = len(mixture.experts)
        self._tensors: dict[str, Tensor] = {}
        for layer, gate in enumerate(gates):
            self._tensors[f"{layer}.experts"] = gate[:count].contiguous()
            self._tensors[f"{layer}.shared"] = gate[count:].contiguous()
            for matrix in "qkv":
                weight = base.tensors[f"model.layers.{layer}.self_attn.{matrix}_proj.weight"]
                self._tensors[f"{layer}.{matrix}"] = torch.zeros(weight.shape[0], dtype=weight.dtype)
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(x.dtype, tuple(x.shape), x.nbytes, None, None) for name, x in self._tensors.items()
        }

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def release(self) -> None: ...

    def close(self) -> None: ...


def gates_of(mixture: Mixture, base: Source, num_layers: int, seed: int, folder: Path | None) -> Tensor:
    """The rows of all routers.  # float32 [layers, experts and shared ones, dim]

    Source: mergekit 0.1.5, `mergekit-moe`, draw for draw.
    """
    dim = base.tensors[EMBEDDING].shape[1]
    shape = num_layers, len(mixture.all_experts), dim
    generator = torch.Generator().manual_seed(seed)
    if mixture.gate_mode == "random":
        return torch.randn(shape, generator=generator)
    if mixture.gate_mode == "uniform_random":
        scale = math.sqrt(1 / dim)  # of a new torch.nn.Linear
        return torch.rand(shape, generator=generator) * 2 * scale - scale
    embedded = _embedding_of(base, folder)
    rows = [_direction(expert, embedded) for expert in mixture.all_experts]
    return torch.stack(rows).expand(num_layers, -1, -1)


def _direction(expert: Expert, embedded: Callable[[tuple[str, ...]], Tensor]) -> Tensor:
    """Of an expert's prompts, away from those that it is not for.  # [dim]"""
    found = embedded(expert.positive_prompts)
    if expert.negative_prompts:
        found = found - embedded(expert.negative_prompts)
    return _unit(found)


def _embedding_of(base: Source, folder: Path | None) -> Callable[[tuple[str, ...]], Tensor]:
    """The unit vector of the sum of the embeddings of all tokens of some prompts."""
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ImportError(
            f"transformers must be installed for gate_mode: cheap_embed, which reads prompts, got: {error}"
        ) from error
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    tokenizer.padding_side, tokenizer.pad_token_id = "left", tokenizer.bos_token_id
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    table = base.tensor(EMBEDDING)

    def embedded(prompts: tuple[str, ...]) -> Tensor:
        texts = [(tokenizer.bos_token or "") + prompt for prompt in prompts]
        found = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        rows = table[found["input_ids"]].float() * found["attention_mask"].unsqueeze(-1)  # [prompts, tokens, dim]
        return _unit(rows.sum(dim=1).sum(dim=0))

    return embedded


def _unit(vector: Tensor) -> Tensor:
    return vector / vector.norm(dim=-1, keepdim=True).clamp(min=1e-8)


def _layers(base: Source) -> range:
    """Raises ValueError for tensors that a mixture has no place for."""
    layers = set()
    for name in base.tensors:
        found = LAYER.fullmatch(name)
        if found:
            layers.add(int(found["layer"]))
        known = name in AROUND or (found and (KNOWN.fullmatch(found["rest"]) or EXPERT.fullmatch(found["rest"])))
        if not known and not name.endswith(COMPUTED):
            raise ValueError(f"{base.name} must be a dense model whose tensors a mixture has too, got {name!r}")
    if EMBEDDING not in base.tensors or layers != set(range(len(layers))) or not layers:
        raise ValueError(f"{base.name} must be a dense model with {EMBEDDING!r} and model.layers, got another")
    return range(len(layers))


def _check_alike(mixture: Mixture, sources: Mapping[ModelReference, Source], base: Source) -> None:
    wanted = {name: info.shape for name, info in base.tensors.items() if ".mlp." in name}
    for expert in mixture.all_experts:
        source = sources[expert.model]
        got = {name: info.shape for name, info in source.tensors.items() if ".mlp." in name}
        if got != wanted:
            name = next(name for name in (*wanted, *got) if got.get(name) != wanted.get(name))
            raise ValueError(
                f"experts must have the layers of {base.name}, {name!r} of shape {list(wanted.get(name, ()))}, got "
                f"{list(got.get(name, ()))} in {source.name}"
            )
