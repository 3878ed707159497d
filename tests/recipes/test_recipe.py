"""Recipes: what they hold, and what a wrong one says, in one sentence."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery_kernels.recipes import load_recipe, parse_recipe
from surgery_kernels.recipes.model_reference import Location, ModelReference
from surgery_kernels.recipes.recipe import KEYS as TOP_KEYS
from surgery_kernels.recipes.recipe import RECIPE_METHODS
from surgery_kernels.recipes.tokenizer import TokenizerSettings

pytestmark = pytest.mark.any_isa

TEXT = """\
merge_method: ties
base_model: org/base
models:
  - model: org/expert_a@main
    parameters: {weight: 0.6, density: [0.3, 0.7]} # over the layers
  - model: ./expert_b+./adapter
parameters:
  weight:
    - {filter: mlp, value: 4e-1}
    - value: 1
  lambda: 0.9
  normalize: yes
  int8_mask: true
dtype: float32
out_dtype: torch.bfloat16
tokenizer_source: base
scope: tensor
"""
BASE = ModelReference(model=Location(path="org/base"))
EXPERT_A = ModelReference(model=Location(path="org/expert_a", revision="main"))
EXPERT_B = ModelReference(model=Location(path="./expert_b"), lora=Location(path="./adapter"))


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yml"
    path.write_text(TEXT, encoding="utf-8")
    for source in (path, str(path)):
        recipe = load_recipe(source)
        assert recipe.merge_method == "ties"
        assert (recipe.base_model, recipe.base, recipe.donor) == (BASE, BASE, BASE)
        assert recipe.experts == (EXPERT_A, EXPERT_B)
        assert recipe.references == (BASE, EXPERT_A, EXPERT_B)
        assert (recipe.dtype, recipe.out_dtype) == (torch.float32, torch.bfloat16)
        assert (recipe.tokenizer, recipe.scope) == (TokenizerSettings("base"), "tensor")
        assert recipe.source == TEXT


def test_a_mapping() -> None:
    recipe = load_recipe({"merge_method": "linear", "models": [{"model": "a"}], "parameters": {"weight": 1}})
    assert recipe.source == "merge_method: linear\nmodels:\n- model: a\nparameters:\n  weight: 1\n"
    assert parse_recipe(recipe.source) == recipe
    assert (recipe.base_model, recipe.dtype, recipe.out_dtype, recipe.tokenizer) == (None,) * 4
    assert str(recipe.donor) == "a"


def test_merge_keys_of_yaml_are_not_keys_twice() -> None:
    recipe = parse_recipe(
        "merge_method: linear\nparameters: &all {weight: 1}\n"
        "models: [{model: a, parameters: {<<: *all, weight: 2}}, {model: b, parameters: {<<: *all}}]"
    )
    assert [expert.settings["weight"][0].values for expert in recipe.slices[0].experts] == [(2.0,), (1.0,)]


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties"])
def test_the_base_among_the_models(method: str) -> None:
    models = [{"model": "base"}, {"model": "a"}]
    recipe = load_recipe({"merge_method": method, "base_model": "base", "models": models})
    assert list(map(str, recipe.experts)) == (["base", "a"] if method == "linear" else ["a"])
    assert list(map(str, recipe.references)) == ["base", "a"]


def test_linear_sums_the_base_as_well() -> None:
    recipe = load_recipe({"merge_method": "linear", "base_model": "base", "models": [{"model": "a"}, {"model": "b"}]})
    assert list(map(str, recipe.experts)) == ["a", "b", "base"]
    assert recipe.base is None
    assert list(map(str, recipe.references)) == ["base", "a", "b"]


@pytest.mark.parametrize(
    ("written", "path", "revision", "lora"),
    [
        ("org/model", "org/model", None, None),
        ("org/model@v1", "org/model", "v1", None),
        ("./model+org/adapter@v2", "./model", None, "org/adapter@v2"),
        ("a@b+c@d", "a", "b", "c@d"),
        ({"model": {"path": "at@home", "revision": "v1"}}, "at@home", "v1", None),
        ({"model": "a@b", "lora": {"path": "c+"}}, "a", "b", "c+"),
    ],
)
def test_references(written: Any, path: str, revision: str | None, lora: str | None) -> None:
    (reference,) = load_recipe({"merge_method": "linear", "models": [{"model": written}]}).experts
    assert (reference.model.path, reference.model.revision) == (path, revision)
    assert (reference.lora and str(reference.lora)) == lora
    if isinstance(written, str):
        assert str(reference) == written


@pytest.mark.parametrize("name", ["float64", "float32", "float16", "bfloat16"])
def test_dtypes(name: str) -> None:
    for written in (name, f"torch.{name}"):
        recipe = load_recipe({"merge_method": "linear", "models": [{"model": "a"}], "dtype": written})
        assert recipe.dtype == getattr(torch, name)


TOP = ", ".join(sorted(TOP_KEYS))
B = "./expert_b+./adapter"
REFERENCE = "(or {model: {path: ...}})"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", f" must be a mapping with keys among {TOP}, got None"),
        ("[ties]", f" must be a mapping with keys among {TOP}, got ['ties']"),
        ("a: [1,", " must be valid YAML, got an error in line 1: expected the node content, but found"),
        ("a: 1\nb: *c", " must be valid YAML, got an error in line 2: found undefined alias 'c'"),
        ("a: \0", " must be valid YAML, got unacceptable character #x0000"),
        ("a: 2026-13-01", " must be valid YAML, got month must be in 1..12"),
        (5000 * "[", " must be valid YAML, got maximum recursion depth exceeded"),
        (TEXT + "slices: [{}]", " must have one of models, slices and modules, got models and slices"),
        ("merge_method: linear\nmodels: a", ".models must be a list, got 'a'"),
        ("merge_method: linear\nmodels: []", " must have one of models, slices and modules, got none"),
        ("gate_mode: random\nexperts: []", ".base_model must be given, got none"),
        ("gate_mode: random\nbase_model: a", ".experts must be given, got none"),
        ("genome: {}", " must be of a merge, got 'genome' of mergekit-evolve: run it with that command"),
        (
            "merge_method: linear\nmodels: [a]",
            ".models[0] must be a mapping with keys among layer_range, model, parameters, revision, got 'a'",
        ),
        ("merge_method: linear\nmodels: [{}]", ".models[0].model must be given, got none"),
        (
            "merge_method: model_stock\nbase_model: a\nmodels: [{model: a}]",
            ".models must be at least 2 besides the base for model_stock, got none",
        ),
        ("merge_method: linear\nmodels: [{model: a}]\nscope: model", ".scope must be 'tensor' for linear, got 'model'"),
    ],
)
def test_errors(text: str, message: str) -> None:
    with pytest.raises(ValueError, match="^recipe" + re.escape(message)) as error:
        parse_recipe(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("merge_method: ties\n", "", ".merge_method must be given, got none"),
        (": ties", ": sleep", f".merge_method must be one of {', '.join(map(repr, RECIPE_METHODS))}, got 'sleep'"),
        ("base_model: org/base\n", "", ".base_model must be given for ties, got none"),
        ("org/base", "{path: x}", ".base_model.model must be given, got none"),
        ("org/base", "{model: {path: 3}}", ".base_model.model.path must be a string, got 3"),
        ("org/base", "a@b@c", f".base_model must be path or path@revision {REFERENCE}, got 'a@b@c'"),
        ("org/base", "a@", f".base_model must be path or path@revision {REFERENCE}, got 'a@'"),
        ("org/base", "''", f".base_model must be path or path@revision {REFERENCE}, got ''"),
        ("org/base", "a+b+c", f".base_model must be model or model+adapter {REFERENCE}, got 'a+b+c'"),
        (B, "", ".models[1].model must be given, got none"),
        (B, "3", ".models[1].model must be a folder or a hub id, got 3"),
        ("weight: 0.6", "weight: x", ".models[0].parameters.weight must be a number, got 'x'"),
        ("weight: 0.6", "weight: ", ".models[0].parameters.weight must be a number, got None"),
        ("weight: 0.6", "weight: .nan", ".models[0].parameters.weight must be finite, got nan"),
        ("weight: 0.6", "weight: []", ".models[0].parameters.weight must be a value or a list of at least one, got []"),
        ("weight: 0.6", "weight: [1, [2]]", ".models[0].parameters.weight[1] must be a number, got [2]"),
        ("0.7", "-1", ".models[0].parameters.density[1] must be in [0, 1], got -1"),
        ("4e-1", "[1, x]", ".parameters.weight[0].value[1] must be a number, got 'x'"),
        ("- value: 1", "- filter: x", ".parameters.weight[1].value must be given, got none"),
        ("- value: 1", "- 1", ".parameters.weight[1] must be a mapping with keys among filter, value, got 1"),
        ("- value: 1", "- vlaue: 1", ".parameters.weight[1].value must be given, got none"),
        ("filter: mlp", "filter: 3", ".parameters.weight[0].filter must be a part of tensor names, got 3"),
        ("0.9", "{value: .inf}", ".parameters.lambda.value must be finite, got inf"),
        ("0.9", "1" + 400 * "0", ".parameters.lambda must be a number, got 10000"),
        ("yes", "2", ".parameters.normalize must be true or false, got 2"),
        ("float32", "bf16", ".dtype must be one of float64, float32, float16, bfloat16, got 'bf16'"),
        ("torch.bfloat16", "int64", ".out_dtype must be one of float64, float32, float16, bfloat16, got 'int64'"),
        ("torch.bfloat16", "[]", ".out_dtype must be one of float64, float32, float16, bfloat16, got []"),
        (": tensor", ": layer", ".scope must be one of 'tensor', 'model', got 'layer'"),
    ],
)
def test_errors_after_a_change(old: str, new: str, message: str) -> None:
    assert old in TEXT
    test_errors(TEXT.replace(old, new), message)


@pytest.mark.parametrize(
    ("old", "new", "notice"),
    [
        ("scope: tensor", "out_dype: float16", ".out_dype is ignored: did you mean 'out_dtype'?"),
        ("scope: tensor", "7: x", ".7 is ignored: a recipe has no such key"),
        (
            "  - model: ./",
            "  - revision: v1\n    model: ./",
            ".models[1].revision is ignored, as by mergekit: write ./expert_b@v1+./adapter to have it",
        ),
        (
            "  - model: ./",
            "  - layer_range: [0, 8]\n    model: ./",
            ".models[1].layer_range is ignored, as by mergekit: slices pick layers, models are whole",
        ),
        (
            "  - model: ./",
            "  - depth: 3\n    model: ./",
            ".models[1].depth is ignored: a model of a merge has no such",
        ),
        (
            "org/base",
            "{model: {path: a, branch: b}}",
            ".base_model.model.branch is ignored: a location has no such key",
        ),
        ("weight: 0.6", "wieght: 1", ".models[0].parameters.wieght is ignored: did you mean 'weight'?"),
        ("weight: 0.6", "lambda: 1", ".models[0].parameters.lambda is ignored: ties for one model has no such key"),
        ("- value: 1", "- {value: 1, t: 2}", ".parameters.weight[1].t is ignored: a rule has no such key"),
        ("scope: tensor", "dtype: float16", ": line 14 has 'dtype', which line 17 has again and replaces"),
        ("weight: 0.6", "weight: 1, weight: 2", ": line 5 has 'weight', which line 5 has again and replaces"),
        ("normalize", "gamma", ".parameters.gamma is ignored: ties has no such key"),
        ("0.7", "1.5", ".models[0].parameters.density[1] is 1.5: more than 1 counts as that"),
        (B, "org/expert_a@main", ".models have org/expert_a@main more than once: it takes part as often"),
    ],
)
def test_notices(old: str, new: str, notice: str) -> None:
    """What mergekit ignores."""
    assert old in TEXT and not parse_recipe(TEXT).notices
    text = TEXT.replace(old, new)
    recipe = parse_recipe(text)
    (said,) = recipe.notices
    assert said.startswith(f"recipe{notice}") and "\n" not in said
    with pytest.raises(ValueError, match=re.escape(f"recipe must have no notices to be strict, got: {said}")):
        parse_recipe(text, strict=True)


def test_errors_of_files_and_mappings(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="recipe must be a YAML file, got .*absent.yml"):
        load_recipe(tmp_path / "absent.yml")
    with pytest.raises(FileNotFoundError, match="recipe must be a YAML file, got "):
        load_recipe(tmp_path)
    (tmp_path / "latin.yml").write_bytes("model: é".encode("latin-1"))
    with pytest.raises(ValueError, match="recipe must be text in UTF-8, got "):
        load_recipe(tmp_path / "latin.yml")
    with pytest.raises(ValueError, match="recipe must hold strings, numbers, lists and mappings, got "):
        load_recipe({"merge_method": "linear", "models": [{"model": tmp_path}]})


KEYS = ["model", "parameters", "weight", "density", "lambda", "normalize", "value", "filter", "path", "lora", "ties"]
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from([*KEYS, "a@b+c", "1e-1"])
    | st.text(max_size=3)
)
TREES = st.recursive(LEAVES, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(KEYS), x, max_size=3))


@settings(max_examples=100)
@given(data=st.data())
def test_whatever_is_wrong_is_said_in_one_sentence(data: st.DataObject) -> None:
    document = node = yaml.safe_load(TEXT)
    key = data.draw(st.sampled_from([*document, "slices", 7]))
    while isinstance(node.get(key) if isinstance(node, dict) else node[key], (dict, list)) and data.draw(st.booleans()):
        node = node[key]
        key = data.draw(st.sampled_from([*node, "weight"] if isinstance(node, dict) else range(len(node))))
    node[key] = data.draw(TREES)
    try:
        load_recipe(document)
    except ValueError as error:
        assert re.fullmatch(r"recipe.* must .*, got .*", str(error))


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties", "sce", "ram"])
def test_the_base_alone(method: str) -> None:
    recipe = parse_recipe(f"""
merge_method: {method}
base_model: a+lora
slices: [{{sources: [{{model: a+lora, layer_range: [0, 2], parameters: {{weight: 0.5}}}}]}}]
""")
    assert (recipe.merge_method, recipe.base, [str(model) for model in recipe.experts]) == (
        "passthrough",
        None,
        ["a+lora"],
    )
    assert "recipe merges nothing into a+lora: the result is that alone" in recipe.notices


def test_the_base_alone_in_one_slice() -> None:
    """As mergekit, which takes it as it is."""
    recipe = parse_recipe("""
merge_method: ties
base_model: a
slices:
  - sources: [{model: a, layer_range: [0, 1]}]
  - sources: [{model: a, layer_range: [1, 2]}, {model: b, layer_range: [1, 2]}]
parameters: {weight: 1}
""")
    assert recipe.merge_method == "ties" and not recipe.notices
    assert [part.is_base_alone for part in recipe.slices] == [True, False]
