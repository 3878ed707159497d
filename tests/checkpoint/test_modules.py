"""Recipes with modules, over small models of several stacks, beside mergekit's own command."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from surgery_kernels.checkpoint import merge
from surgery_kernels.checkpoint.plan import plan_merge
from surgery_kernels.checkpoint.writing import writer
from surgery_kernels.recipes import load_recipe
from tests.checkpoints import files_in, save_safetensors
from tests.failing import after, no_room
from tests.llama_checkpoints import Merges, assert_same_bits, loaded

pytestmark = [pytest.mark.any_isa, pytest.mark.filterwarnings("ignore:(recipe|config)")]

TEXT = {
    "vocab_size": 24, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 4,
}  # fmt: skip
VISION = {
    "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
QWEN = {"depth": 2, "embed_dim": 8, "hidden_size": 8, "num_heads": 2, "patch_size": 4, "intermediate_size": 12}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 10000.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "Gemma3ForConditionalGeneration": {
        "text_config": TEXT, "vision_config": {**VISION, "vision_use_head": False}, "mm_tokens_per_image": 4,
    },
    "Mistral3ForConditionalGeneration": {
        "text_config": {**TEXT, "model_type": "mistral"},
        "vision_config": {**VISION, "model_type": "pixtral", "head_dim": 4},
        "spatial_merge_size": 1,
    },
    "Qwen2VLForConditionalGeneration": {
        "text_config": {**TEXT, "rope_parameters": ROPE}, "vision_config": {**QWEN, "mlp_ratio": 2},
    },
    "Qwen2_5_VLForConditionalGeneration": {
        "text_config": {**TEXT, "rope_parameters": ROPE},
        "vision_config": {**QWEN, "out_hidden_size": 8, "fullatt_block_indexes": [1]},
    },
    "LlavaForConditionalGeneration": {
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": {**VISION, "model_type": "siglip_vision_model"},
    },
    "T5ForConditionalGeneration": {
        "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 2, "vocab_size": 20,
        "feed_forward_proj": "gated-gelu",
    },
}  # fmt: skip


def save(folder: Path, architecture: str) -> list[str]:
    of_model = getattr(transformers, architecture)
    folders = [str(folder / name) for name in ("base", "a", "b")]
    for seed, each in enumerate(folders):
        torch.manual_seed(seed)
        model = of_model(of_model.config_class(**FAMILIES[architecture]))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
        model.save_pretrained(each)
        rename(Path(each), RENAMED.get(architecture, {}))
    return folders


# Gemma 3 as it is published; LLaVA as transformers 5 has it, without which mergekit leaves its language model out.
RENAMED = {
    "Gemma3ForConditionalGeneration": {r"^vision_tower\.": "vision_tower.vision_model."},
    "LlavaForConditionalGeneration": {
        r"^language_model\.lm_head": "lm_head",
        r"^language_model\.model": "model.language_model",
        r"^(vision_tower|multi_modal_projector)": r"model.\1",
    },
}


def rename(folder: Path, names: dict[str, str]) -> None:
    tensors = load_file(folder / "model.safetensors")
    for old, new in names.items():
        tensors = {re.sub(old, new, name): tensor for name, tensor in tensors.items()}
    save_safetensors(folder, tensors)


def listed(folders: list[str], *ranges: tuple[int, int]) -> dict[str, Any]:
    """All models of a merge, whole or with stretches of layers."""
    if not ranges:
        return {"models": [{"model": each} for each in folders]}
    return {"slices": [{"sources": [{"model": each, "layer_range": list(of)} for each in folders]} for of in ranges]}


GRADIENT = {"weight": [{"filter": "mlp", "value": [0.25, 1]}, {"value": [1, 0.5, 0]}]}


def recipe(folders: list[str], modules: dict[str, Any], **keys: Any) -> dict[str, Any]:
    method = {"merge_method": "task_arithmetic", "base_model": folders[0], "parameters": GRADIENT}
    return {**method, "modules": modules, **keys}


DESCRIBED = ("Gemma3ForConditionalGeneration", "Mistral3ForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration")


@pytest.mark.parametrize("architecture", DESCRIBED)  # Qwen 2's number of layers is not where mergekit looks for it
def test_text_and_vision(merges: Merges, tmp_path: Path, architecture: str) -> None:
    folders = save(tmp_path, architecture)
    given = {
        "text_decoder": listed(folders, (0, 2), (1, 2)),
        "vision_tower": {**listed(folders), "parameters": {"weight": [0.1, 0.7]}},
        "multi_modal_projector": {**listed(folders[:2]), "parameters": {"weight": 0.5}},
    }
    assert_same_bits(*merges(recipe(folders, given)))


def test_encoder_and_decoder(merges: Merges, tmp_path: Path) -> None:
    folders = save(tmp_path, "T5ForConditionalGeneration")
    given = {
        "encoder": listed(folders, (0, 2), (1, 2)),
        "decoder": {**listed(folders), "parameters": {"weight": [0.1, 0.7]}},
        "shared": listed(folders, (0, 0)),
    }
    assert_same_bits(*merges(recipe(folders, given)))


def test_stacks_that_mergekit_infers(merges: Merges, tmp_path: Path) -> None:
    folders = save(tmp_path, "LlavaForConditionalGeneration")
    given = {
        "model.language_model.layers": listed(folders, (0, 2), (1, 2)),
        "model.vision_tower.encoder.layers": {**listed(folders), "parameters": {"weight": [0.1, 0.7]}},
        "default": listed(folders),
    }
    assert_same_bits(*merges(recipe(folders, given)))


@pytest.mark.parametrize("architecture", FAMILIES)
def test_configurations_count_the_layers_of_every_module(tmp_path: Path, architecture: str) -> None:
    (folder, *_) = save(tmp_path, architecture)
    is_t5 = architecture == "T5ForConditionalGeneration"
    language, other = ("encoder", "decoder") if is_t5 else ("text_decoder", "vision_tower")
    if architecture == "LlavaForConditionalGeneration":
        language, other = "language_model.model.layers", "vision_tower.encoder.layers"
    given = {language: listed([folder], (0, 2), (1, 3)), other: listed([folder], (0, 1))}
    merge({"merge_method": "passthrough", "modules": given}, tmp_path / "out")
    of_model = getattr(transformers, architecture)
    if architecture != "Gemma3ForConditionalGeneration":  # as it is published
        model, loading = of_model.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not any(loading.values()), loading
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    if is_t5:
        assert (config["num_layers"], config["num_decoder_layers"]) == (4, 1)
    else:
        assert config["text_config"]["num_hidden_layers"] == 4
        assert [config["vision_config"].get(key) for key in ("num_hidden_layers", "depth")].count(1) == 1
    expected, found = loaded(Path(folder)), loaded(tmp_path / "out")
    for name in expected.keys() & found.keys():
        if not any(f".{number}." in name for number in range(9)):
            assert torch.equal(found[name], expected[name]), name


def small(folder: Path, **config: Any) -> str:
    names = ["model.layers.0.w", "model.layers.1.w", "model.norm.w", "vision_tower.layers.0.w", "vision_tower.post.w"]
    tensors = {name: torch.full((3,), float(i)) for i, name in enumerate(names)}
    kind = {"architectures": ["Mistral3ForConditionalGeneration"], "torch_dtype": "float32", **config}
    return str(save_safetensors(folder, tensors, config=kind))


def test_modules_that_are_left_out(tmp_path: Path) -> None:
    """mergekit writes none of them, which makes no model."""
    folder, other = small(tmp_path / "base"), small(tmp_path / "other")
    given = {"text_decoder": listed([folder, other])}
    with plan_merge(load_recipe(recipe([folder], given))) as plan:
        assert plan.notices == [
            f"recipe.modules has no vision_tower, which mergekit would leave out: it is that of {folder}"
        ]
    merge(recipe([folder], given, dtype="bfloat16"), tmp_path / "out")
    found = loaded(tmp_path / "out")
    for name, tensor in loaded(Path(folder)).items():
        assert found[name].dtype == torch.bfloat16 and torch.equal(found[name].float(), tensor)


def test_a_module_of_the_base_alone(tmp_path: Path) -> None:
    """Beside one that is merged; what a cast makes infinite is found in it too."""
    folder, other = small(tmp_path / "base"), small(tmp_path / "other")
    tensors = loaded(Path(other))
    save_safetensors(Path(other), {name: tensor + 1 for name, tensor in tensors.items()})
    given = {"text_decoder": listed([folder, other]), "vision_tower": listed([folder])}
    whole = {**recipe([folder], given), "parameters": {"weight": 1}}
    merge(whole, tmp_path / "out")
    for name, tensor in loaded(tmp_path / "out").items():
        assert torch.equal(tensor, tensors[name] + ("vision" not in name))
    save_safetensors(Path(folder), {**tensors, "vision_tower.post.w": torch.full((3,), 1e6)})
    with pytest.raises(RuntimeError, match=r"must be finite, got 3 .* 'vision_tower.post.w' in float16"):
        merge({**whole, "dtype": "float16"}, tmp_path / "half")


def test_slices_of_a_model_with_several_modules(tmp_path: Path) -> None:
    folder = small(tmp_path / "base")
    message = (
        "must be of a model with one stack of layers to pick layers from, got vision_tower, text_decoder: give the "
        "slices of each under recipe.modules"
    )
    with pytest.raises(ValueError, match=message):
        plan_merge(load_recipe({"merge_method": "passthrough", **listed([folder], (0, 1))}))
    with pytest.raises(
        ValueError, match="recipe.modules must be among those of .*base, vision_tower, text_decoder, got"
    ):
        plan_merge(load_recipe({"merge_method": "passthrough", "modules": {"default": listed([folder])}}))
    with pytest.raises(ValueError, match=r"layer_range must be of the 1 layers of .*base, got \[0, 2\]"):
        plan_merge(load_recipe({"merge_method": "passthrough", "modules": {"vision_tower": listed([folder], (0, 2))}}))


def test_a_module_without_layers_is_whole(tmp_path: Path) -> None:
    tensors = {
        "model.layers.0.w": torch.ones(2),
        "visual.blocks.0.w": torch.ones(2),
        "visual.merger.mlp.0.w": torch.ones(2),
    }
    tensors["visual.merger.mlp.2.w"] = torch.zeros(2)
    config = {"architectures": ["Qwen2VLForConditionalGeneration"]}
    folder = str(save_safetensors(tmp_path / "base", tensors, config=config))
    # mergekit counts two layers, and names none
    given = {
        "text_decoder": listed([folder]),
        "vision_tower": listed([folder]),
        "multi_modal_projector": listed([folder], (0, 2)),
    }
    merge({"merge_method": "passthrough", "modules": given}, tmp_path / "out")
    found = loaded(tmp_path / "out")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    given["multi_modal_projector"] = listed([folder], (0, 1), (0, 1))
    with pytest.raises(
        ValueError, match="recipe.modules.multi_modal_projector must be one slice of a module without lay"
    ):
        plan_merge(load_recipe({"merge_method": "passthrough", "modules": given}))


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_dtype_in_configurations_within(tmp_path: Path, key: str) -> None:
    inner = {
        "text_config": {key: "float32", "hidden_size": 8},
        "vision_config": {key: "float32"},
        "llm_config": {"a": 1},
    }
    folder = small(tmp_path / "base", **inner)
    merge({"merge_method": "passthrough", "models": [{"model": folder}], "dtype": "bfloat16"}, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16" and "dtype" not in config
    assert config["text_config"] == {key: "bfloat16", "hidden_size": 8}
    assert config["vision_config"] == {key: "bfloat16"} and config["llm_config"] == {"a": 1}


def test_layers_that_no_configuration_counts(tmp_path: Path) -> None:
    folder = small(tmp_path / "base")
    given = {"text_decoder": listed([folder]), "vision_tower": listed([folder], (0, 1), (0, 1))}
    with plan_merge(load_recipe({"merge_method": "passthrough", "modules": given})) as plan:
        assert plan.notices == [
            f"config.json of {folder} does not say how many layers vision_tower has: set it by hand"
        ]


def test_going_on_with_what_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, other = small(tmp_path / "base"), small(tmp_path / "other")
    given = recipe([folder], {"text_decoder": listed([folder, other], (1, 2), (0, 2))}, dtype="bfloat16")
    merge(given, tmp_path / "whole")
    monkeypatch.setattr(writer, "SYNC_BYTES", 1)
    with monkeypatch.context() as patch:
        patch.setattr(writer.Writer, "_put", after(3, writer.Writer._put, no_room))
        with pytest.raises(OSError, match="No space left"):
            merge(given, tmp_path / "out")
    merge(given, tmp_path / "out", resume=True)
    assert files_in(tmp_path / "out")["model.safetensors"] == files_in(tmp_path / "whole")["model.safetensors"]
