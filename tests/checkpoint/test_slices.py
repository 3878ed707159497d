"""Slices: layers picked, repeated and merged, beside mergekit's own command; and configurations that follow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from surgery_kernels.checkpoint import merge
from surgery_kernels.checkpoint.layer_lists import FULL_ATTENTION_EVERY, followed
from surgery_kernels.checkpoint.plan import plan_merge
from surgery_kernels.recipes import load_recipe
from tests.cases import assert_same
from tests.checkpoints import save_lora, save_safetensors
from tests.llama_checkpoints import (
    EMBEDDING,
    HEAD,
    LAYERS,
    Merges,
    assert_same_bits,
    gaussians,
    loaded,
    models,
    save,
    written,
)

pytestmark = [pytest.mark.any_isa, pytest.mark.filterwarnings("ignore:recipe")]

Sources = list[tuple[int, int, int]]  # number of the model, first layer, layer behind the last


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    return save(tmp_path, models(gaussians, torch.bfloat16))


def slices(folders: list[str], *given: Sources, **keys: Any) -> list[dict[str, Any]]:
    return [
        {"sources": [{"model": folders[m], "layer_range": [first, end]} for m, first, end in sources], **keys}
        for sources in given
    ]


def same(merges: Merges, given: dict[str, Any]) -> dict[str, torch.Tensor]:
    stock, ours = merges(given)
    assert_same_bits(stock, ours)
    return ours


FRANKENMERGES: list[list[Sources]] = [
    [[(0, 0, 2)], [(0, 1, 3)]],
    [[(1, 0, 3)], [(2, 1, 2)], [(2, 1, 2)], [(1, 2, 3)]],
    [[(3, 2, 3)]],
    [[(0, 0, 3)] for _ in range(5)],  # more than ten layers
]


@pytest.mark.parametrize("given", FRANKENMERGES)
def test_passthrough(merges: Merges, tmp_path: Path, folders: list[str], given: list[Sources]) -> None:
    ours = same(merges, {"merge_method": "passthrough", "slices": slices(folders, *given), "dtype": "float16"})
    count = sum(end - first for ((_, first, end),) in given)
    assert len({name.split(".")[2] for name in ours if ".layers." in name}) == count
    theirs, config = written(tmp_path, "config.json")
    assert config["num_hidden_layers"] == theirs["num_hidden_layers"] == count
    first, last = (loaded(Path(folders[part[0][0]])) for part in (given[0], given[-1]))
    assert_same(ours[EMBEDDING], first[EMBEDDING].half())
    assert_same(ours[HEAD], last[HEAD].half())


def test_scales(merges: Merges, folders: list[str]) -> None:
    """Of sources, slices and the recipe, the nearest; filters see the names of the input."""
    given = slices(folders, [(0, 0, 2)], [(1, 0, 2)], [(2, 1, 2)])
    given[0]["sources"][0]["parameters"] = {"scale": [{"filter": "o_proj", "value": 0}, {"filter": "down", "value": 2}]}
    given[1]["parameters"] = {
        "scale": [{"filter": "layers.1.", "value": "5e-1"}, {"filter": "q_proj", "value": [1, 3]}]
    }
    same(
        merges, {"merge_method": "passthrough", "slices": given, "parameters": {"scale": {"filter": "k_", "value": 4}}}
    )


def test_gradients_start_again(merges: Merges, folders: list[str]) -> None:
    given = slices(folders, [(0, 0, 3), (1, 0, 3)], [(1, 1, 3), (0, 0, 2)], [(0, 1, 2), (1, 2, 3)])
    given[1]["parameters"] = {"t": [{"filter": "mlp", "value": [0.2, 1]}]}
    recipe = {"merge_method": "nearswap", "base_model": folders[0], "parameters": {"t": [0, 0.125, 0.5]}}
    ours = same(merges, {**recipe, "slices": given})
    assert_same(
        ours["model.layers.0.mlp.up_proj.weight"], loaded(Path(folders[0]))["model.layers.0.mlp.up_proj.weight"]
    )


@pytest.mark.parametrize("form", ["slices", "modules", "models"])
def test_modules(merges: Merges, folders: list[str], form: str) -> None:
    """The settings of a module come between those of its slices and those of the recipe."""
    whole = slices(folders, [(0, 0, LAYERS), (1, 0, LAYERS), (2, 0, LAYERS)])
    whole[0]["sources"][1]["parameters"] = {"weight": [0.5, 1]}
    recipe: dict[str, Any] = {"merge_method": "task_arithmetic", "base_model": folders[0]}
    weight = {"weight": [{"filter": "mlp", "value": 0.25}], "lambda": 0.5}
    if form == "slices":
        recipe |= {"slices": whole, "parameters": {"weight": 0.75, **weight}}
    else:
        listed = [{key: source[key] for key in source if key != "layer_range"} for source in whole[0]["sources"]]
        module = {"slices": whole} if form == "modules" else {"models": listed}
        recipe |= {"modules": {"default": {**module, "parameters": weight}}, "parameters": {"weight": 0.75}}
    if form == "slices":
        recipe["parameters"]["weight"] = [*weight["weight"], {"value": 0.75}]
    same(merges, recipe)


def test_a_base_for_one_slice(merges: Merges, folders: list[str]) -> None:
    given = slices(folders, [(0, 0, 2), (1, 0, 2)], [(2, 1, 3), (3, 0, 2)])
    given[1]["base_model"] = folders[3]
    same(
        merges,
        {"merge_method": "task_arithmetic", "base_model": folders[0], "slices": given, "parameters": {"weight": 0.5}},
    )


def test_a_base_that_no_slice_lists(folders: list[str], tmp_path: Path) -> None:
    """The same layers of it; mergekit has none."""
    recipe = {"merge_method": "task_arithmetic", "base_model": folders[0], "parameters": {"weight": 0.5}}
    merge({**recipe, "slices": slices(folders, [(1, 1, 3), (2, 1, 3)])}, tmp_path / "unlisted")
    merge({**recipe, "slices": slices(folders, [(0, 1, 3), (1, 1, 3), (2, 1, 3)])}, tmp_path / "listed")
    unlisted, listed = loaded(tmp_path / "unlisted"), loaded(tmp_path / "listed")
    for name, tensor in listed.items():
        assert_same(unlisted[name], tensor, name)
    different = {**recipe, "slices": slices(folders, [(1, 0, 2), (2, 1, 3)])}
    with pytest.raises(ValueError, match=r"recipe.slices\[0\].sources must list the base_model .* where layers differ"):
        load_recipe(different)


def test_adapters(folders: list[str], tmp_path: Path) -> None:
    """A model with an adapter is a model like any other, and its layers are those of the model below."""
    module = "model.layers.1.mlp.up_proj"
    down, up = torch.randn(2, 8), torch.randn(16, 2)
    adapter = save_lora(tmp_path / "adapter", {module: (down, up)}, r=2, lora_alpha=2)
    given = slices([f"{folders[1]}+{adapter}", folders[2]], [(0, 1, 3)], [(1, 0, 1)])
    merge({"merge_method": "passthrough", "slices": given, "dtype": "float32"}, tmp_path / "out")
    merged, below = loaded(tmp_path / "out"), loaded(Path(folders[1]))
    expected = below[f"{module}.weight"].float() + up @ down
    torch.testing.assert_close(merged["model.layers.0.mlp.up_proj.weight"], expected, rtol=0.01, atol=0.01)
    assert_same(merged["model.layers.1.mlp.up_proj.weight"], below["model.layers.2.mlp.up_proj.weight"].float())


LISTS = {
    "layer_types": ["full_attention", "sliding_attention", "linear_attention"],
    "mlp_only_layers": [0, 2],
    "hybrid_override_pattern": "M-*",
    "eos_token_id": [1, 2, 3],
}


def test_lists_of_a_configuration_follow_the_layers(tmp_path: Path) -> None:
    state_dicts = models(gaussians, torch.float32, 1)
    base, other = save(tmp_path, state_dicts, **LISTS)
    config = json.loads((tmp_path / "expert0" / "config.json").read_text())
    (tmp_path / "expert0" / "config.json").write_text(
        json.dumps({**config, "layer_types": ["a", "b", "c"], "mlp_only_layers": []})
    )
    given = slices([base, other], [(0, 0, 3)], [(1, 1, 2)], [(0, 2, 3)])
    merge({"merge_method": "passthrough", "slices": given}, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["num_hidden_layers"] == 5
    assert written["layer_types"] == [*LISTS["layer_types"], "b", "linear_attention"]
    assert written["mlp_only_layers"] == [0, 2, 4]
    assert written["hybrid_override_pattern"] == "M-*-*"
    assert written["eos_token_id"] == [1, 2, 3]


def test_lists_that_are_understood(tmp_path: Path) -> None:
    """An older configuration of Gemma 2 says nothing of its layers, every second of which sees everything."""
    (folder,) = save(tmp_path, models(gaussians, torch.float32, 0), model_type="gemma2")
    for given, expected in (
        ([[(0, 0, 2)], [(0, 0, 2)], [(0, 2, 3)]], ["sliding", "full", "sliding", "full", "sliding"]),
        ([[(0, 1, 3)], [(0, 1, 2)]], ["full", "sliding", "full"]),
    ):
        out = tmp_path / f"out{len(expected)}"
        merge({"merge_method": "passthrough", "slices": slices([folder], *given)}, out)
        written = json.loads((out / "config.json").read_text())
        assert written["layer_types"] == [f"{attention}_attention" for attention in expected]
    merge({"merge_method": "passthrough", "slices": slices([folder], [(0, 0, 2)])}, tmp_path / "shorter")
    assert "layer_types" not in json.loads((tmp_path / "shorter" / "config.json").read_text())


@pytest.mark.parametrize("model_type", FULL_ATTENTION_EVERY)
def test_lists_that_transformers_understands(model_type: str) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed", exc_type=ImportError)
    config = transformers.AutoConfig.for_model(model_type).get_text_config()
    count = config.num_hidden_layers
    given = {"model_type": model_type, "num_hidden_layers": count}
    assert followed(given, [(given, 0)] * 2 + [(given, layer) for layer in range(2, count)])["layer_types"] == [
        config.layer_types[0],
        config.layer_types[0],
        *config.layer_types[2:],
    ]


@pytest.mark.parametrize("key", ["text_config", "llm_config", "language_config"])
def test_a_configuration_within_another(tmp_path: Path, key: str) -> None:
    tensors = models(gaussians, torch.float32, 0)[0]
    inner = {"num_hidden_layers": LAYERS, "layer_types": ["a", "b", "c"]}
    folder = str(save_safetensors(tmp_path / "base", tensors, config={"model_type": "x", key: inner}))
    merge({"merge_method": "passthrough", "slices": slices([folder], [(0, 2, 3)])}, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == {"model_type": "x", key: {"num_hidden_layers": 1, "layer_types": ["c"]}}


def test_a_configuration_that_counts_layers(tmp_path: Path) -> None:
    """What cannot follow the layers is said, where they are others."""
    (folder,) = save(tmp_path, models(gaussians, torch.float32, 0), sliding_window_pattern=2, decoder_sparse_step=1)

    def notices(*given: Sources) -> list[str]:
        with plan_merge(load_recipe({"merge_method": "passthrough", "slices": slices([folder], *given)})) as plan:
            return plan.notices

    assert notices([(0, 0, 2)]) == []
    said = f"config.json of {folder} tells layers apart by sliding_window_pattern, which does not follow them"
    assert notices([(0, 0, 2)], [(0, 1, 3)]) == [said]
    save(tmp_path, models(gaussians, torch.float32, 0), sliding_window_pattern=2, layer_types=["a", "b", "c"])
    assert notices([(0, 0, 2)], [(0, 1, 3)]) == []


@pytest.mark.filterwarnings("error")
def test_python_warns_of_what_the_command_prints(folders: list[str], tmp_path: Path) -> None:
    given = {"merge_method": "passthrough", "slices": slices(folders, [(0, 0, 3)]), "dype": "float16"}
    with pytest.warns(UserWarning, match="^recipe.dype is ignored: did you mean 'dtype'") as said:
        merge(given, tmp_path / "out")
    assert len(said) == 1 and said[0].filename == __file__
    with pytest.raises(ValueError, match="^recipe must have no notices to be strict, got: recipe.dype is ignored"):
        merge(given, tmp_path / "strict", strict=True)


def test_errors(folders: list[str], tmp_path: Path) -> None:
    def refused(given: list[dict[str, Any]], message: str, method: str = "passthrough") -> None:
        with pytest.raises(ValueError, match=message):
            plan_merge(load_recipe({"merge_method": method, "slices": given, "parameters": {"weight": 1}}))

    at = r"recipe.slices\[0\].sources"
    refused(slices(folders, [(0, 1, 4)]), rf"{at}\[0\].layer_range must be of the 3 layers of .*base, got \[1, 4\]")
    refused(slices(folders, [(0, 2, 2)]), rf"{at}\[0\].layer_range must be \[first layer, layer behind the last\], got")
    refused(slices(folders, [(0, -1, 2)]), rf"{at}\[0\].layer_range must be \[first layer, layer behind the last\]")
    refused([{"sources": [{"model": "a"}]}], rf"{at}\[0\].layer_range must be given, got none")
    refused([{}], r"recipe.slices\[0\].sources must be given, got none")
    two = slices(folders, [(0, 0, 2), (1, 0, 3)])
    refused(two, f"{at} must have equally many layers, got 2 of .*base, 3 of .*expert0", "linear")
    refused(slices(folders, [(0, 0, 2), (1, 0, 2)]), f"{at} must be exactly 1 for passthrough, got .*base, .*expert0")
    stacks = {"encoder.0.w": torch.ones(2), "decoder.0.w": torch.ones(2)}
    several = str(save_safetensors(tmp_path / "several", stacks))
    refused(
        slices([several], [(0, 0, 1)]),
        r".* must be of a model with one stack of layers to pick layers from, got (en|de)coder, (en|de)coder",
    )


def test_slices_that_make_no_model(folders: list[str], tmp_path: Path) -> None:
    tensors = loaded(Path(folders[0]))

    def refused(changed: dict[str, torch.Tensor], message: str) -> None:
        other = str(save_safetensors(tmp_path / "other", changed))
        given = {"merge_method": "passthrough", "slices": slices([folders[0], other], [(0, 0, 2)], [(1, 1, 3)])}
        with pytest.raises(ValueError, match=f"^recipe.slices must be of models {message}$"):
            plan_merge(load_recipe(given))

    untied = {name: tensor for name, tensor in tensors.items() if name != HEAD}
    refused(untied, f"with the same tensors, got '{HEAD}' in .*base alone")
    bias = "model.layers.{}.mlp.up_proj.bias"
    biases = {bias.format(layer): torch.ones(16) for layer in range(LAYERS)}
    refused({**tensors, **biases}, f"with the same tensors, got '{bias.format('[*]')}' in .*other alone")
    rows = tensors[EMBEDDING][:-1].clone()
    refused(
        {**tensors, EMBEDDING: rows},
        rf"whose tensors have the same shapes, got \[40, 8\] of '{EMBEDDING}' in .*base and \[39, 8\] in .*other",
    )


@pytest.mark.parametrize("base", ["third", "none"])
def test_slerp_between_two_that_are_not_the_base(folders: list[str], tmp_path: Path, base: str) -> None:
    """As old recipes have it, which mergekit refuses now."""
    first, second, third = folders[:3]
    recipe = {
        "merge_method": "slerp",
        "parameters": {"t": [0.25, 0.5]},
        "models": [{"model": first}, {"model": second}],
    }
    merge({**recipe, "base_model": first}, tmp_path / "expected")
    (Path(third) / "generation_config.json").write_text("{}")
    given = {**recipe, "base_model": third} if base == "third" else recipe
    merge(given, tmp_path / "out")
    (notice,) = load_recipe(given).notices
    why = f": {third} gives the files beside the weights" if base == "third" else ", without a base_model"
    assert notice == f"recipe.models are merged from {first} to {second}{why}"
    assert (tmp_path / "out" / "generation_config.json").exists() == (base == "third")
    expected = loaded(tmp_path / "expected")
    for name, tensor in loaded(tmp_path / "out").items():
        assert_same(tensor, expected[name], name)
    with pytest.raises(ValueError, match="recipe.models must be exactly 1 besides the base for nearswap, got "):
        load_recipe({**recipe, "merge_method": "nearswap", "base_model": third})
    with pytest.raises(ValueError, match="recipe.base_model must be given for nearswap, got none"):
        load_recipe({**recipe, "merge_method": "nearswap"})


def test_passthrough_with_a_base_that_names_the_donor(folders: list[str], tmp_path: Path) -> None:
    first, second = folders[:2]
    given = {"merge_method": "passthrough", "base_model": first, "models": [{"model": second}]}
    (notice,) = load_recipe(given).notices
    assert notice == f"recipe.models are merged without {first}, which gives the files beside the weights"
    merge(given, tmp_path / "out")
    for name, tensor in loaded(Path(second)).items():
        assert_same(loaded(tmp_path / "out")[name], tensor, name)


def test_a_model_twice(folders: list[str], tmp_path: Path) -> None:
    """Each time with its own parameters."""
    twice = [{"model": folders[m], "parameters": {"weight": w}} for m, w in ((1, 0.25), (2, 1.0), (1, 0.75))]
    once = [{"model": folders[m], "parameters": {"weight": 1.0}} for m in (1, 2)]
    recipe = {"merge_method": "linear", "dtype": "float32"}
    merge({**recipe, "models": twice}, tmp_path / "twice")
    merge({**recipe, "models": once}, tmp_path / "once")
    expected = loaded(tmp_path / "once")
    for name, tensor in loaded(tmp_path / "twice").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)
