"""The numbers of every tensor: against mergekit's own plan, and where a recipe has none."""

from __future__ import annotations

import importlib
import re
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery_kernels.merging import Method, Parameter
from surgery_kernels.merging.depths import depths, num_layers
from surgery_kernels.merging.method import NONE_GIVEN
from surgery_kernels.recipes import Recipe, load_recipe
from surgery_kernels.recipes.parameters import check_given, resolve_methods
from surgery_kernels.recipes.recipe import RECIPE_METHODS
from surgery_kernels.recipes.slices import Output

pytestmark = pytest.mark.any_isa

Plan = dict[str, tuple[dict[str, Any], dict[str, dict[str, float]]]]  # by tensor: shared, and those of each model


@pytest.fixture(scope="module")
def mergekit() -> ModuleType:
    pytest.importorskip("mergekit", reason="mergekit is not installed", exc_type=ImportError)
    for module in ("architecture", "config", "options", "parameter_resolver", "plan"):
        importlib.import_module(f"mergekit.{module}")
    return importlib.import_module("mergekit")


def llama(layers: int) -> SimpleNamespace:
    return SimpleNamespace(architectures=["LlamaForCausalLM"], model_type="llama", num_hidden_layers=layers)


def plan_of(mergekit: ModuleType, recipe: dict[str, Any], config: SimpleNamespace, architecture: Any = None) -> Plan:
    """What mergekit's planner asks its resolver for, tensor by tensor, without models on the disk."""

    class Recorder(mergekit.plan.MergePlanner):
        plan: Plan

        def plan_tensor(self, weight: Any, weights_in: list[Any], models: list[Any], cfg_reader: Any) -> None:
            shared, of_models = mergekit.parameter_resolver.resolve_parameters(
                self._method.spec,
                tensor_name=weight.name,
                inputs={model: w.name for model, w in zip(models, weights_in, strict=True)},
                sources=cfg_reader.parameter_sources,
                base_model=cfg_reader.base_model,
                t=cfg_reader.t,
            )
            self.plan[weight.name] = shared, {str(model): values for model, values in of_models.items()}

        def _out_module_arch(self, module: str) -> Any:
            return self.configured(self.arch_info.modules[module])

        def _model_arch(self, model: Any) -> Any:
            return SimpleNamespace(get_module=self._out_module_arch)

        def configured(self, module: Any) -> Any:
            return mergekit.architecture.ConfiguredModuleArchitecture.model_construct(
                info=module.architecture, config=config, weight_prefix=module.weight_prefix
            )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mergekit.config.ModelReference, "config", lambda *_, **__: config)
        recorder = Recorder(
            mergekit.config.MergeConfiguration.model_validate(yaml.safe_load(yaml.safe_dump(recipe))),
            architecture or mergekit.architecture.arch_info_for_config(config),
            mergekit.options.MergeOptions(),
            config,
        )
        recorder.plan = {}
        recorder._plan()
    return recorder.plan


def resolved(recipe: Recipe, names: list[str], layers: int | None = None) -> dict[str, Method]:
    """Of all slices; every model has the same names."""
    return {
        name: method
        for part in recipe.slices
        for name, method in resolve_methods(recipe, part, part.outputs(names, layers)).items()
    }


def experts_of(recipe: Recipe, names: list[str]) -> dict[str, list[str]]:
    """What is merged into every tensor."""
    return {
        output.name: [str(expert.model) for expert in part.experts]
        for part in recipe.slices
        for output in part.outputs(names, None)
    }


def check(recipe: dict[str, Any], plan: Plan, methods: dict[str, Method], names: list[str]) -> None:
    experts = experts_of(load_recipe(recipe), names)
    assert methods.keys() == plan.keys()
    for name, (shared, of_models) in plan.items():
        method = methods[name]
        for parameter in known_to_mergekit(type(method)):
            actual = getattr(method, parameter.name)
            if parameter.per_model:
                expected = [of_models[expert][parameter.key] for expert in experts[name]]
                assert (actual or [None] * len(expected)) == expected, (name, parameter.key)
            else:
                assert actual == shared[parameter.key], (name, parameter.key)


def known_to_mergekit(method: type[Method]) -> list[Parameter]:
    return [parameter for parameter in method.parameters() if parameter.key not in (None, *OURS)]


def setting(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """One value, several over the layers, or either for what a filter finds."""
    gradient = values | st.lists(values, min_size=1, max_size=4)
    filters = st.sampled_from([None, "*", "", "mlp", "self_attn", "layers.1.", "embed", "norm", "lm_head", "absent"])
    rule = st.builds(lambda value: {"value": value}, gradient) | st.builds(
        lambda name, value: {"filter": name, "value": value}, filters, gradient
    )
    return gradient | rule | st.lists(rule, min_size=1, max_size=4)


OURS = ("arithmetic",)  # parameters that mergekit does not have
NUMBERS = setting(st.floats(0.0625, 3) | st.sampled_from([1, True, "0.5", "1e-1"]))
SHARES = setting(st.floats(0.25, 0.75) | st.sampled_from(["0.25", "5e-1"]))
WHOLE = setting(st.integers(1, 20))
FLAGS = setting(st.sampled_from([True, False, 1, 0, "yes", "off"]))


def values(parameter: Parameter) -> st.SearchStrategy[Any]:
    if parameter.kind is bool:
        return FLAGS
    if parameter.kind is int:
        return WHOLE
    if parameter.name == "epsilon":  # density - epsilon and density + epsilon stay in (0, 1)
        return setting(st.floats(0.0625, 0.1875))
    return NUMBERS if 3.0 in parameter.range else SHARES


@st.composite
def recipes(draw: st.DrawFn) -> dict[str, Any]:
    registry = importlib.import_module("mergekit.merge_methods.registry")
    known = [method.spec.name for method in registry.registered_methods()]
    method = RECIPE_METHODS[draw(st.sampled_from(sorted(RECIPE_METHODS.keys() & known)))]
    parameters = {parameter.key: values(parameter) for parameter in known_to_mergekit(method)}
    of_models = {
        parameter.key: parameters[parameter.key] for parameter in known_to_mergekit(method) if parameter.per_model
    }
    of_model = st.fixed_dictionaries({}, optional=of_models)
    least, most = method.num_experts
    number = draw(st.integers(least, min(least + 2, most or least + 2)))
    names = ["a", "b", "c", "d"][:number]
    has_base = method.base == "required" or (method.base == "optional" and draw(st.booleans()))
    if has_base and (draw(st.booleans()) or method.base == "optional"):
        names.insert(draw(st.integers(0, number)), "base")
    recipe = {"merge_method": method.name, "models": [{"model": name, "parameters": draw(of_model)} for name in names]}
    if has_base or (method.base == "none" and (most is None or number < most) and draw(st.booleans())):
        recipe["base_model"] = "base"
    needed = {
        p.key: parameters[p.key]
        for p in known_to_mergekit(method)
        if not p.per_model and p.recipe_default is NONE_GIVEN
    }
    weights = draw(st.sampled_from([{}, {key: of_models[key] for key in of_models if key == "weight"}]))
    optional = {key: of for key, of in parameters.items() if key not in needed | weights}
    ignored = dict.fromkeys(method.ignored, FLAGS)
    recipe["parameters"] = draw(st.fixed_dictionaries(needed | weights, optional=optional | ignored))
    if not has_base or "base" in names:  # mergekit wants to see it in slices
        shape = draw(st.sampled_from(["models", "slices", "modules"]))
        if shape != "models":
            recipe["slices"] = draw(slices(recipe.pop("models"), st.fixed_dictionaries({}, optional=parameters)))
        if shape == "modules":
            module = {"slices": recipe.pop("slices"), "parameters": recipe.pop("parameters")}
            recipe["modules"] = {"default": module}
    return recipe


LAYERS = 5  # of every model that slices are cut from


@st.composite
def slices(draw: st.DrawFn, models: list[dict[str, Any]], parameters: st.SearchStrategy[Any]) -> list[Any]:
    def of_length(length: int) -> dict[str, Any]:
        starts = [draw(st.integers(0, LAYERS - length)) for _ in models]
        cut = zip(starts, draw(st.permutations(models)), strict=True)
        sources = [{**source, "layer_range": [start, start + length]} for start, source in cut]
        return {"sources": sources, **draw(st.fixed_dictionaries({}, optional={"parameters": parameters}))}

    return [of_length(length) for length in draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))]


@settings(max_examples=150)
@given(recipe=recipes(), layers=st.sampled_from([1, 2, LAYERS]))
def test_same_numbers_as_mergekit(mergekit: ModuleType, recipe: dict[str, Any], layers: int) -> None:
    layers = layers if "models" in recipe else LAYERS
    names = llama_names(layers)
    try:
        plan = plan_of(mergekit, recipe, llama(layers))
    except RuntimeError as error:
        missing = re.fullmatch(r"Missing required parameter (\w+) for (?:(\w+)\.)?(.*)", str(error))
        assert missing, error
        with pytest.raises(ValueError, match=f"{missing[1]} must be given .* got none for ") as ours:
            resolved(load_recipe(recipe), names, layers)
        assert missing[2] is None or missing[2] in str(ours.value)
    except ValueError as error:  # of pydantic: a number of iterations that lies between those of two layers
        assert "int_from_float" in str(error), error
    else:
        check(recipe, plan, resolved(load_recipe(recipe), names, layers), names)


def llama_names(layers: int) -> list[str]:
    """In the order of mergekit's plan, which stops at the first without a weight."""
    attention, mlp = (f"self_attn.{x}_proj" for x in "qkvo"), (f"mlp.{x}_proj" for x in ("up", "gate", "down"))
    of_layer = ["input_layernorm", *attention, "post_attention_layernorm", *mlp]
    inside = [f"model.layers.{layer}.{x}.weight" for layer in range(layers) for x in of_layer]
    return ["model.embed_tokens.weight", *inside, "model.norm.weight", "lm_head.weight"]


class Config(SimpleNamespace):
    """Has every key that counts layers: four of them, two in encoders of images and sound."""

    num_hidden_layers = n_layer = n_layers = num_layers = num_decoder_layers = decoder_layers = 4
    encoder_layers = depth = 2

    def __getattr__(self, name: str) -> Any:
        if name.endswith("_config"):
            return Config(num_hidden_layers=2) if name == "vision_config" else Config()
        raise AttributeError(name)


# Of the first phi mergekit counts layers from 1, since layers.0 is the embedding; and it plans mlp.0 and mlp.2 of the
# mergers of Qwen2-VL twice, in each of two layers.
NUMBERED_OTHERWISE = {"mixformer-sequential", "qwen2_vl", "qwen2_5_vl"}


def test_depths_are_those_of_the_architectures_of_mergekit(mergekit: ModuleType) -> None:
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [{"model": "a"}],
        "parameters": {"weight": [0, 1]},
    }
    json_definitions = importlib.import_module("mergekit.architecture.json_definitions")
    checked = 0
    for architecture in json_definitions.JSON_ARCHITECTURES:
        if architecture.expected_model_type in NUMBERED_OTHERWISE:
            continue
        plan = plan_of(mergekit, recipe, Config(), architecture)
        expected = {name: of_models["a"]["weight"] for name, (_, of_models) in plan.items()}
        assert depths(expected) == expected, architecture.architectures
        checked += 1
    assert checked > 50


def test_depths_of_several_stacks() -> None:
    names = ["shared.weight", *(f"encoder.block.{i}.layer.1.wo" for i in range(3)), "decoder.block.0.layer.0.wo"]
    expected = [0.0, 0.0, 0.5, 1.0, 1.0]
    assert list(depths(names).values()) == expected
    assert list(depths(names, num_layers=3).values()) == expected


def test_layers_beyond_those_of_the_configuration_are_as_the_last() -> None:
    names = ["model.layers.0.a", "model.layers.1.a", "model.layers.2.a", "model.layers.3.a"]
    assert list(depths(names, num_layers=3).values()) == [0.0, 0.5, 1.0, 1.0]
    assert list(depths(names, num_layers=1).values()) == [1.0, 1.0, 1.0, 1.0]


def test_number_of_layers_in_a_configuration() -> None:
    assert num_layers({"num_hidden_layers": 32, "n_layer": 1}) == 32
    assert num_layers({"n_layer": 12}) == num_layers({"num_layers": 12}) == num_layers({"n_layers": 12}) == 12
    assert num_layers({"num_hidden_layers": None}) is num_layers({}) is num_layers({"n_layer": 0}) is None


def ties(**recipe: Any) -> dict[str, Any]:
    return {"merge_method": "ties", "base_model": "base", "models": [{"model": "a"}, {"model": "b"}], **recipe}


def test_defaults() -> None:
    for name, normalize in (("linear", True), ("task_arithmetic", False), ("ties", True)):
        recipe = ties(merge_method=name, parameters={"weight": 0.5})
        (method,) = resolved(load_recipe(recipe), ["w"]).values()
        assert (method.name, method.normalize, method.weights) == (name, normalize, [0.5] * (2 + (name == "linear")))
    assert (method.density, method.lam, method.rescale, method.semantics) == ([1.0, 1.0], 1.0, False, "mergekit")


def test_order_of_the_tensors() -> None:
    names = ["z", "model.layers.1.a", "b", "model.layers.0.a"]
    assert list(resolved(load_recipe(ties(parameters={"weight": 1})), names)) == names
    assert resolved(load_recipe(ties()), []) == {}


def test_missing_weight() -> None:
    models = [
        {"model": "a", "parameters": {"weight": 1}},
        {"model": "b", "parameters": {"weight": {"filter": "mlp", "value": 1}}},
    ]
    message = r"recipe.models\[1\].parameters.weight must be given for every tensor, got none for norm of b"
    with pytest.raises(ValueError, match=message):
        resolved(load_recipe(ties(models=models)), ["mlp", "norm"])
    message = (
        "recipe.parameters.weight must be given for the base_model base, which linear merges too, got none for norm"
    )
    recipe = ties(merge_method="linear", models=models[:1])
    with pytest.raises(ValueError, match=message):
        resolved(load_recipe(recipe), ["norm"])


def test_a_number_of_the_merge_under_a_model() -> None:
    """Where mergekit ignores it, and says that it is missing."""
    recipe = load_recipe(
        {
            "merge_method": "slerp",
            "base_model": "a",
            "models": [{"model": "a"}, {"model": "b", "parameters": {"t": 0.5}}],
        }
    )
    assert recipe.notices == ("recipe.models[1].parameters.t is ignored: slerp for one model has no such key",)
    message = (
        "recipe.parameters.t must be given for every tensor, got none for {}: it is one number for all models, and "
        "does not count under one of them"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message.format('any'))}$"):
        check_given(recipe)
    with pytest.raises(ValueError, match=f"^{re.escape(message.format('w'))}$"):
        resolve_methods(recipe, recipe.slices[0], [Output("w", 0.0)])


def test_weights_of_linear_without_a_sum() -> None:
    models = [{"model": "a", "parameters": {"weight": [1, 0.3]}}, {"model": "b", "parameters": {"weight": -0.3}}]
    recipe = {"merge_method": "linear", "models": models}
    names = ["model.layers.0.w", "model.layers.1.w"]
    message = "weights must have a sum other than 0 unless normalize is false, got 0.3, -0.3 for model.layers.1.w"
    with pytest.raises(ValueError, match=message):
        resolved(load_recipe(recipe), names)
    methods = resolved(load_recipe({**recipe, "parameters": {"normalize": False}}), names)
    assert methods["model.layers.1.w"].weights == [0.3, -0.3]


def test_one_density_where_the_threshold_is_over_the_model() -> None:
    parameters = {"weight": [0, 1], "density": [{"filter": "mlp", "value": 0.5}, {"value": 0.25}]}
    message = "density must be the same for all tensors of a in scope: model, got 0.25 for norm and 0.5 for mlp"
    with pytest.raises(ValueError, match=message):
        resolved(load_recipe(ties(scope="model", parameters=parameters)), ["norm", "mlp"])
    models = [{"model": "a", "parameters": {"density": 0.5}}, {"model": "b", "parameters": {"density": 0.25}}]
    methods = resolved(load_recipe(ties(scope="model", models=models, parameters=parameters)), ["norm", "mlp"])
    assert [method.density for method in methods.values()] == [[0.5, 0.25]] * 2
