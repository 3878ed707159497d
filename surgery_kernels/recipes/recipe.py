"""What to merge and how, read from mergekit's YAML.

    merge_method: ties
    base_model: org/base
    models:                                               # or slices, or modules: see `slices.py`
      - model: org/expert_a@main
        parameters: {weight: 0.6, density: [0.3, 0.7]}    # over the layers
      - model: ./expert_b
    parameters: {weight: 0.4, density: 0.5, lambda: 0.9, normalize: true}
    dtype: bfloat16

What mergekit ignores is ignored, with a notice: an unknown key, a parameter that the method does not have.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..merging import METHODS, Method
from ..ops import arguments
from .mixture import Mixture, is_mixture, read_mixture
from .model_reference import ModelReference
from .node import Node
from .settings import read_settings
from .slices import Context, Slice, Source, base_alone, read_slices
from .tokenizer import TokenizerSettings, read_chat_template, read_tokenizer

RECIPE_METHODS = {name: method for name, method in METHODS.items() if method.in_recipes}
DTYPES = {arguments.name_of(dtype): dtype for dtype in arguments.DTYPES}
SCOPES = ("tensor", "model")
KEYS = (
    "base_model",
    "chat_template",
    "dtype",
    "merge_method",
    "models",
    "modules",
    "name",
    "out_dtype",
    "parameters",
    "scope",
    "slices",
    "tokenizer",
    "tokenizer_source",
)
# What only recipes of mergekit's other commands have.
OTHER_COMMANDS = {"genome": "mergekit-evolve"}


@dataclass(frozen=True)
class Recipe:
    """A merge: which models, by which method, with which settings."""

    source: str  # the YAML text; of several documents its own if it has a name
    merge_method: str
    slices: tuple[Slice, ...]
    base_model: ModelReference | None = None
    dtype: torch.dtype | None = None
    out_dtype: torch.dtype | None = None
    tokenizer: TokenizerSettings | None = None  # None: that of the donor, and rows are merged by their numbers
    chat_template: str | None = None  # "auto", a name or a text; None: that of the tokenizer
    scope: str = "tensor"
    name: str | None = None  # by which other documents call the result
    notices: tuple[str, ...] = ()  # what is ignored or understood in another way than written
    mixture: Mixture | None = None  # what becomes of dense models, instead of a merge

    @property
    def method(self) -> type[Method]:
        return RECIPE_METHODS[self.merge_method]

    @property
    def base(self) -> ModelReference | None:
        """What task vectors are taken from; None for methods to which a base is one model more."""
        base = self.slices[0].base
        return base.model if base else None

    @property
    def experts(self) -> tuple[ModelReference, ...]:
        """What is merged, each once."""
        return tuple(dict.fromkeys(source.model for part in self.slices for source in part.experts))

    @property
    def origins(self) -> dict[str | None, list[tuple[ModelReference, int]]]:
        """By module, whose layer, and which, every layer of the result takes after; whole ones are left out."""
        found: dict[str | None, list[tuple[ModelReference, int]]] = {}
        for part in self.slices:
            if part.first.layers is not None:
                found.setdefault(part.module, []).extend((part.first.model, layer) for layer in part.first.layers)
        return found

    @property
    def donor(self) -> ModelReference:
        """The model whose configuration, tokenizer and other files the merged one gets."""
        return self.base_model or self.slices[0].first.model

    @property
    def references(self) -> tuple[ModelReference, ...]:
        """All models, each once, the donor first."""
        of_slices = [source.model for part in self.slices for source in part.sources]
        return tuple(dict.fromkeys([self.donor, *of_slices]))


def read_recipe(root: Node, text: str) -> Recipe:
    """The recipe in a document of a YAML text."""
    if isinstance(root.value, dict):
        for key, command in OTHER_COMMANDS.items():
            if key in root.value:
                raise ValueError(f"{root.at} must be of a merge, got {key!r} of {command}: run it with that command")
    if is_mixture(root):
        return _read_mixture(root, text)
    keys = root.given(KEYS, "a recipe")
    merge_method = root.required(keys, "merge_method").one_of(tuple(RECIPE_METHODS))
    method = RECIPE_METHODS[merge_method]
    base_model = ModelReference.read(keys["base_model"]) if "base_model" in keys else None
    settings = read_settings(keys.get("parameters"), method, of_model=False)
    slices = read_slices(root, keys, Context(method, base_model, (settings,)))
    scope = _read_scope(keys.get("scope", root.key("scope", method.recipe_scope)), method, slices)
    if copied := base_alone(root, slices):
        merge_method, slices, scope = "passthrough", copied, "tensor"
    return Recipe(
        text,
        merge_method,
        slices,
        base_model,
        _read_dtype(keys.get("dtype")),
        _read_dtype(keys.get("out_dtype")),
        read_tokenizer(root, keys),
        read_chat_template(keys.get("chat_template")),
        scope,
        str(keys["name"].value) if "name" in keys else None,
        tuple(root.notices),
    )


def _read_mixture(root: Node, text: str) -> Recipe:
    base, mixture, keys = read_mixture(root)
    experts = tuple(Source(expert.model, {}, at=root.at) for expert in mixture.all_experts)
    slices = (Slice(experts, None, Source(base, {}, at=root.at), ()),)
    dtype = _read_dtype(keys.get("dtype"))
    return Recipe(text, "passthrough", slices, base, dtype, notices=tuple(root.notices), mixture=mixture)


def _read_scope(node: Node, method: type[Method], slices: tuple[Slice, ...]) -> str:
    scope = node.one_of(SCOPES)
    if method.decides != "scope" and scope != method.recipe_scope:
        raise node.must(f"be {method.recipe_scope!r} for {method.name}")
    if scope == "tensor":
        return scope
    if len({tuple(source.model for source in part.sources) for part in slices}) > 1:
        raise node.must("be 'tensor' for slices of different models")
    return scope


def _read_dtype(node: Node | None) -> torch.dtype | None:
    if node is None:
        return None
    name = node.value.removeprefix("torch.") if isinstance(node.value, str) else None
    if name not in DTYPES:
        raise node.must(f"be one of {', '.join(DTYPES)}")
    return DTYPES[name]
