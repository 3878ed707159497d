"""Recipes of mergekit-moe: dense models of one architecture that become the experts of a mixture.

base_model: org/base                     # everything but the experts and the routers
gate_mode: cheap_embed                   # or random, uniform_random
experts:
  - source_model: org/math
    positive_prompts: ["solve", "prove"]
    negative_prompts: ["write a poem"]
    residual_scale: 0.5                  # of what the expert adds
shared_experts: [{source_model: org/base, positive_prompts: [...]}]    # of Qwen 2's mixtures, exactly one
experts_per_token: 2
architecture: mixtral                    # or qwen, qwen3; none: what the models allow
dtype: bfloat16
"""

from __future__ import annotations

from dataclasses import dataclass

from .model_reference import ModelReference
from .node import Node
from .settings import number, whole_number

GATE_MODES = ("random", "uniform_random", "cheap_embed")
WITHOUT_PROMPTS = ("random", "uniform_random")
# They need the base model to run over the prompts.
HIDDEN = ("hidden", "hidden_avg", "hidden_last")
ARCHITECTURES = ("mixtral", "qwen", "qwen3")
KEYS = ("architecture", "base_model", "dtype", "experts", "experts_per_token", "gate_mode", "shared_experts")
EXPERT_KEYS = ("negative_prompts", "noise_scale", "positive_prompts", "residual_scale", "source_model")


@dataclass(frozen=True)
class Expert:
    """A model whose layers of one kind become an expert of every layer."""

    model: ModelReference
    positive_prompts: tuple[str, ...] = ()
    negative_prompts: tuple[str, ...] = ()
    residual_scale: float | None = None


@dataclass(frozen=True)
class Mixture:
    """What becomes of the models."""

    experts: tuple[Expert, ...]
    shared: tuple[Expert, ...] = ()
    gate_mode: str = "random"
    experts_per_token: int = 2
    architecture: str | None = None  # None: what the models allow

    @property
    def all_experts(self) -> tuple[Expert, ...]:
        return (*self.experts, *self.shared)


def is_mixture(root: Node) -> bool:
    return (
        isinstance(root.value, dict)
        and "merge_method" not in root.value
        and bool({"experts", "gate_mode"} & set(root.value))
    )


def read_mixture(root: Node) -> tuple[ModelReference, Mixture, dict[str, Node]]:
    """The base, what becomes of it, and the other keys of a recipe."""
    keys = root.given(KEYS, "a recipe of mergekit-moe")
    base = ModelReference.read(root.required(keys, "base_model"))
    gate_mode = keys["gate_mode"].value if "gate_mode" in keys else HIDDEN[0]
    if gate_mode in HIDDEN:
        raise ValueError(
            f"{root.at}.gate_mode must be one of {', '.join(GATE_MODES)}, got {gate_mode!r}, which runs the base model "
            "over the prompts: use mergekit-moe for that"
        )
    keys["gate_mode"].one_of(GATE_MODES)
    with_prompts = gate_mode not in WITHOUT_PROMPTS
    experts = tuple(_read_expert(entry, with_prompts) for entry in root.required(keys, "experts").entries())
    shared = tuple(_read_expert(entry, with_prompts) for entry in _entries(keys.get("shared_experts")))
    per_token = whole_number(keys["experts_per_token"]) if "experts_per_token" in keys else 2
    if not 1 <= per_token <= len(experts):
        raise ValueError(f"{root.at}.experts_per_token must be 1 to {len(experts)}, the experts, got {per_token}")
    prompts = {(expert.positive_prompts, expert.negative_prompts) for expert in experts}
    if with_prompts and len(experts) > 1 and len(prompts) == 1:
        raise ValueError(f"{root.at}.experts must have prompts of their own, got the same for all")
    if len({expert.model for expert in experts}) == 1 and len(experts) > 1:
        root.notices.append(
            f"{root.at}.experts are all {experts[0].model}: it computes what that does until it is trained"
        )
    wanted = keys["architecture"].one_of(ARCHITECTURES) if "architecture" in keys else None
    return base, Mixture(experts, shared, gate_mode, per_token, wanted), keys


def _entries(node: Node | None) -> list[Node]:
    return node.entries(least=0) if node else []


def _read_expert(node: Node, with_prompts: bool) -> Expert:
    keys = node.given(EXPERT_KEYS, "an expert")
    if "noise_scale" in keys and number(keys["noise_scale"]):
        raise keys["noise_scale"].must("be left out: noise is not added here, mergekit-moe does")
    positive, negative = (_prompts(keys.get(f"{kind}_prompts")) for kind in ("positive", "negative"))
    if with_prompts and not positive:
        raise ValueError(f"{node.at}.positive_prompts must be given for routers made from prompts, got none")
    scale = number(keys["residual_scale"]) if "residual_scale" in keys else None
    return Expert(ModelReference.read(node.required(keys, "source_model")), positive, negative, scale)


def _prompts(node: Node | None) -> tuple[str, ...]:
    if node is None:
        return ()
    if not isinstance(node.value, list) or not all(isinstance(text, str) for text in node.value):
        raise node.must("be a list of texts")
    return tuple(node.value)
