"""The modules of a model that has several stacks of layers, by the names of its tensors: what mergekit calls them.

modules:
  text_decoder: {slices: [...]}
  vision_tower: {models: [...]}
  multi_modal_projector: {models: [...]}
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from ..merging.depths import LAYER

DEFAULT = "default"

PROJECTOR = re.compile(r"(^|\.)(multi_modal_projector|visual\.(merger|deepstack_merger_list))\.")
VISION = re.compile(r"(^|\.)(vision_tower|vision_model|visual)\.")
ENCODER, DECODER = re.compile(r"(^|\.)encoder\."), re.compile(r"(^|\.)decoder\.")
REST = re.compile("")

# Of the architectures with several modules that mergekit describes: a tensor is of the first whose pattern is found.
Patterns = Mapping[str, re.Pattern[str]]
WITH_VISION = {"multi_modal_projector": PROJECTOR, "vision_tower": VISION, "text_decoder": REST}
DESCRIBED: dict[str, Patterns] = {
    "Gemma3ForConditionalGeneration": WITH_VISION,
    "Llama4ForConditionalGeneration": {
        "multi_modal_projector": PROJECTOR,
        "vision_model": VISION,
        "text_decoder": REST,
    },
    "Mistral3ForConditionalGeneration": WITH_VISION,
    "Qwen2VLForConditionalGeneration": WITH_VISION,
    "Qwen2_5_VLForConditionalGeneration": WITH_VISION,
    "Qwen3VLForConditionalGeneration": WITH_VISION,
    "Qwen3VLMoeForConditionalGeneration": WITH_VISION,
    "T5ForConditionalGeneration": {"encoder": ENCODER, "decoder": DECODER, "shared": REST},
    "WhisperForConditionalGeneration": {"encoder": ENCODER, "decoder": REST},
}
# In names of the same stack, which files and transformers' versions have or lack.
AROUND = {"base_model", "language_model", "llm", "model", "text_model", "vision_model", "vlm"}

# What the layers of a module are counted as in a configuration, by what is in its name.
ROLES = (
    ("projector", re.compile("projector|merger|connector")),
    ("vision", re.compile("vis")),
    ("audio", re.compile("aud|speech")),
    ("encoder", re.compile("encoder")),
    ("decoder", re.compile(r"(^|\.)decoder")),
)


def modules_of(names: Collection[str], config: Mapping[str, Any]) -> dict[str, list[str]]:
    """The names of the tensors of every module of a model.

    Those of an architecture that is not described are its stacks of layers, by what is in front of the numbers of
    their layers, and "default" for what lies in none; one stack, or none, is all "default".

    Args:
        names: Of all tensors of the model.
        config: Its config.json.

    Source: mergekit 0.1.5.
    """
    architectures = config.get("architectures")
    described = DESCRIBED.get(str(architectures[0])) if isinstance(architectures, list) and architectures else None
    if described:
        return _by_pattern(names, described)
    found: dict[str, list[str]] = {}
    for name in names:
        layer = LAYER.search(name)
        found.setdefault(name[: layer.start()] if layer else DEFAULT, []).append(name)
    return found if len(found.keys() - {DEFAULT}) > 1 else {DEFAULT: list(names)}


def in_module(module: str | None, names: Collection[str], config: Mapping[str, Any], model: str) -> list[str]:
    """The names of the tensors of one module, or of all for None.

    Raises:
        ValueError: `model`, which has the tensors, has no such module.
    """
    if module is None:
        return list(names)
    modules = modules_of(names, config)
    alike = [own for own in modules if own == module] or [own for own in modules if _core(own) == _core(module)]
    if len(alike) != 1:
        raise ValueError(f"recipe.modules must be among those of {model}, {', '.join(modules)}, got {module!r}")
    return modules[alike[0]]


def role_of(module: str | None) -> str:
    """What the layers of a module are: of "language" unless its name says "vision", "audio", "encoder", ..."""
    return next((role for role, pattern in ROLES if pattern.search(module or "")), "language")


def _by_pattern(names: Collection[str], patterns: Patterns) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {module: [] for module in patterns}
    for name in names:
        found[next(module for module, pattern in patterns.items() if pattern.search(name))].append(name)
    return {module: own for module, own in found.items() if own}


def _core(module: str) -> list[str]:
    return [part for part in module.split(".") if part not in AROUND]
