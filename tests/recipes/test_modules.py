"""Modules, told by names, against the architectures that mergekit describes."""

from __future__ import annotations

import importlib
import re
from typing import Any

import pytest

from surgery_kernels.recipes import load_recipe
from surgery_kernels.recipes.layers import has_layers
from surgery_kernels.recipes.modules import DESCRIBED, in_module, modules_of, role_of

pytestmark = pytest.mark.any_isa

LLAVA = [
    "model.vision_tower.vision_model.encoder.layers.0.fc1.weight",
    "model.vision_tower.vision_model.embeddings.weight",
    "model.language_model.layers.0.mlp.up_proj.weight",
    "model.language_model.layers.1.mlp.up_proj.weight",
    "model.language_model.embed_tokens.weight",
]


def test_what_mergekit_describes() -> None:
    pytest.importorskip("mergekit", reason="mergekit is not installed", exc_type=ImportError)
    definitions = importlib.import_module("mergekit.architecture.json_definitions")
    described = [each for each in definitions.JSON_ARCHITECTURES if list(each.modules) != ["default"]]
    assert {name for each in described for name in each.architectures} == DESCRIBED.keys()
    for each in described:
        belonging: dict[str, str] = {}
        for module, definition in each.modules.items():
            weights = definition.architecture.definition
            # mergekit 0.1.5 forgets the point behind Whisper's decoder
            prefix = re.sub(r"(?<=\w)$", ".", definition.weight_prefix or "")
            for weight in (*weights.pre_weights, *weights.layer_templates.weights, *weights.post_weights):
                belonging[prefix + weight.name.replace("${layer_index}", "0")] = module
        found = modules_of(list(belonging), {"architectures": each.architectures})
        assert {name: module for module, names in found.items() for name in names} == belonging


def test_stacks_of_other_architectures() -> None:
    found = modules_of(LLAVA, {"architectures": ["LlavaForConditionalGeneration"]})
    assert found == {
        "model.vision_tower.vision_model.encoder.layers": LLAVA[:1],
        "default": [LLAVA[1], LLAVA[4]],
        "model.language_model.layers": LLAVA[2:4],
    }
    assert modules_of(LLAVA[2:], {}) == {"default": LLAVA[2:]}
    assert in_module(None, LLAVA, {}, "a") == LLAVA


@pytest.mark.parametrize("name", ["language_model.model.layers", "model.layers", "model.language_model.layers"])
def test_names_that_files_have_otherwise(name: str) -> None:
    """transformers has moved what is around the layers of language models."""
    assert in_module(name, LLAVA, {}, "a") == LLAVA[2:4]
    assert in_module("vision_tower.encoder.layers", LLAVA, {}, "a") == LLAVA[:1]


def test_modules_that_are_not_there() -> None:
    config = {"architectures": ["Gemma3ForConditionalGeneration"]}
    names = ["vision_tower.vision_model.embeddings.weight", "language_model.model.norm.weight"]
    message = "recipe.modules must be among those of a, vision_tower, text_decoder, got 'vision'"
    with pytest.raises(ValueError, match=f"^{message}$"):
        in_module("vision", names, config, "a")
    with pytest.raises(ValueError, match=r"recipe.modules must be a mapping of modules, got \['text_decoder'\]"):
        load_recipe({"merge_method": "linear", "modules": ["text_decoder"]})


@pytest.mark.parametrize(
    ("module", "role"),
    [
        (None, "language"),
        ("default", "language"),
        ("text_decoder", "language"),
        ("model.language_model.layers", "language"),
        ("vision_tower", "vision"),
        ("model.visual.blocks", "vision"),
        ("model.vision_tower.vision_model.encoder.layers", "vision"),
        ("audio_tower.layers", "audio"),
        ("encoder", "encoder"),
        ("model.decoder.layers", "decoder"),
        ("multi_modal_projector", "projector"),
    ],
)
def test_roles(module: str | None, role: str) -> None:
    assert role_of(module) == role


def test_layers() -> None:
    assert has_layers(["a.0.w", "a.1.w"]) and has_layers(["a.layers.0.mlp.2.w"])
    assert not has_layers(["visual.merger.mlp.0.weight", "visual.merger.mlp.2.weight", "norm.weight"])


def modules(**given: Any) -> dict[str, Any]:
    return {"merge_method": "task_arithmetic", "base_model": "a", "modules": given, "parameters": {"weight": 1}}


def test_slices_of_modules() -> None:
    def sources(*ranges: list[int]) -> dict[str, Any]:
        return {"slices": [{"sources": [{"model": m, "layer_range": r} for m in "ab"]} for r in ranges]}

    recipe = load_recipe(
        modules(text_decoder=sources([0, 2], [1, 2]), projector=sources([0, 0]), vision={"models": [{"model": "a"}]})
    )
    assert [part.module for part in recipe.slices] == ["text_decoder", "text_decoder", "projector", "vision"]
    assert [(part.start, part.is_first, part.is_last) for part in recipe.slices[:2]] == [
        (0, True, False),
        (2, False, True),
    ]
    assert [part.is_base_alone for part in recipe.slices] == [False, False, False, True]
    assert {module: [layer for _, layer in of] for module, of in recipe.origins.items()} == {
        "text_decoder": [0, 1, 1],
        "projector": [],
    }
    with pytest.raises(
        ValueError, match=r"recipe.slices\[0\].sources\[0\].layer_range must be \[first layer, layer behind"
    ):
        load_recipe({**modules(), "modules": None, **sources([0, 0])})
