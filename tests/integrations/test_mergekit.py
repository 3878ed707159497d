"""mergekit's own methods against ours inside mergekit, and its command."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from surgery_kernels import _C
from tests.cases import assert_same, bits, gaussian, grid, inputs, option_id, weights_of
from tests.untied import untied

pytestmark = pytest.mark.any_isa

METHODS = [
    "task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "della_linear", "della",
]  # fmt: skip


@pytest.fixture
def integration() -> ModuleType:
    pytest.importorskip("mergekit", reason="mergekit is not installed", exc_type=ImportError)
    return importlib.import_module("surgery_kernels.integrations.mergekit")


@pytest.fixture
def registered(integration: ModuleType, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The methods that mergekit knows in this test; it knows its own again afterwards."""
    monkeypatch.setattr(integration.registry, "_METHODS", dict(integration.registry._METHODS))
    return integration.registry._METHODS


@pytest.fixture
def pair(integration: ModuleType, registered: dict[str, Any]) -> Callable[[str], tuple[Any, Any]]:
    """mergekit's method and ours."""
    stock = dict(registered)
    integration.install()
    return lambda name: (stock[name], registered[name])


def merged(method: Any, base: Tensor, experts: list[Tensor], **parameters: Any) -> Tensor:
    from mergekit.merge_methods import TensorGroup

    torch.manual_seed(7)
    (result,) = method([TensorGroup.from_tensors([base, *experts], base_index=0)], parameters=parameters)
    return result


OPTIONS: list[dict[str, Any]] = [
    {},
    {"normalize": True, "lambda": 0.4},
    {"normalize": False, "rescale": True, "lambda": -1.7},
    {"rescale": False, "int8_mask": True, "density": [0.29, 0.57, 1.5, 0.3]},
]


@pytest.mark.parametrize("options", OPTIONS, ids=option_id)
@pytest.mark.parametrize("name", METHODS)
def test_same_as_mergekit(pair: Any, name: str, options: dict[str, Any]) -> None:
    for num_tasks in (1, 4):
        for shape in ((67, 61), (511,)):
            base, experts = untied(shape, num_tasks, torch.float32)
            density = options.get("density", [0.3] * 4)[:num_tasks]
            parameters = {**options, "density": density, "weight": weights_of(num_tasks)}
            expected, actual = (merged(method, base, experts, **parameters) for method in pair(name))
            assert_same(actual, expected, f"{num_tasks} experts of {shape}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=option_id)
@pytest.mark.parametrize("name", METHODS)
def test_same_as_mergekit_in_other_dtypes(pair: Any, name: str, dtype: torch.dtype) -> None:
    for num_tasks in (1, 2, 3, 4):
        base, experts = untied((40, 37), num_tasks, dtype)
        for lam, normalize in ((0.6, True), (1.0, False)):
            parameters = {
                "density": 0.3, "weight": weights_of(num_tasks), "lambda": lam, "normalize": normalize,
                "rescale": False,
            }  # fmt: skip
            expected, actual = (merged(method, base, experts, **parameters) for method in pair(name))
            assert torch.equal(bits(actual), bits(expected)), f"{num_tasks} experts, {parameters}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=option_id)
@pytest.mark.parametrize("name", ["task_arithmetic", "dare_linear", "dare_ties", "della_linear", "della"])
def test_ties_do_not_matter_without_a_threshold(pair: Any, name: str, dtype: torch.dtype) -> None:
    base, experts = inputs(gaussian, (67, 61), 4, dtype)
    base[0], experts[0][0], experts[1][0] = -0.0, -0.0, 0.0
    parameters = {"density": 0.5, "weight": [0.7, -0.3, 0.1, 1.1], "lambda": 0.6}
    expected, actual = (merged(method, base, experts, **parameters) for method in pair(name))
    assert torch.equal(bits(actual), bits(expected))


def test_weights_that_cancel(pair: Any) -> None:
    base, experts = untied((40, 37), 2, torch.float32)
    for name in METHODS:
        parameters = {"density": 0.3, "weight": [0.5, -0.5], "normalize": True, "rescale": False}
        expected, actual = (merged(method, base, experts, **parameters) for method in pair(name))
        assert_same(actual, expected, name)
        experts_of_16_bits = [expert.half() for expert in experts]
        halves = merged(pair(name)[1], base.half(), experts_of_16_bits, **parameters)
        assert halves.isfinite().all()  # 1e-8 is 0 in float16: mergekit's own sums without an election are not


@pytest.mark.parametrize("gamma", [0.0, 0.01, 0.9])
def test_breadcrumbs(pair: Any, gamma: float) -> None:
    base, experts = untied((67, 61), 2, torch.float32)
    for density in (1e-5, 0.25, 0.999, 1.0):
        parameters = {"density": density, "gamma": gamma, "weight": 1.0, "rescale": density == 0.25}
        expected, actual = (merged(method, base, experts, **parameters) for method in pair("breadcrumbs"))
        assert_same(actual, expected, f"density {density}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=option_id)
def test_tied_entries_are_kept_in_flat_order(pair: Any, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    argsort = torch.argsort
    monkeypatch.setattr(torch, "argsort", lambda x, descending: argsort(x, descending=descending, stable=True))
    base, experts = inputs(grid, (67, 61), 4, dtype)
    expected, actual = (merged(method, base, experts, density=0.3, weight=weights_of(4)) for method in pair("ties"))
    assert_same(actual, expected)


def test_breadcrumbs_keep_as_many_tied_entries(pair: Any) -> None:
    base, experts = inputs(grid, (67, 61), 1, torch.float32)
    stock, ours = (merged(method, base, experts, density=0.3, gamma=0.1, weight=1.0) for method in pair("breadcrumbs"))
    assert not torch.equal(ours, stock)
    assert_same(*((x - base).abs().flatten().sort().values for x in (ours, stock)))


OTHERS: list[tuple[str, int, bool, dict[str, Any]]] = [  # name, experts, whether there is a base, parameters
    ("linear", 4, False, {"weight": [0.3, 0.7, -0.2, 0.5]}),
    ("slerp", 1, True, {"t": 0.3}),
    ("nuslerp", 2, True, {"weight": [0.3, 0.9]}),
    ("multislerp", 3, True, {"weight": 1.0}),
    ("karcher", 3, False, {}),
    ("model_stock", 3, True, {}),
    ("passthrough", 1, False, {"scale": 0.5}),
    ("nearswap", 1, True, {"t": 0.1}),
    ("sce", 3, True, {}),
    ("ram", 3, True, {}),
    ("ramplus_tl", 3, True, {}),
    ("arcee_fusion", 1, True, {}),
]


@pytest.mark.parametrize(("name", "num_tasks", "has_base", "parameters"), OTHERS)
def test_other_methods(pair: Any, name: str, num_tasks: int, has_base: bool, parameters: dict[str, Any]) -> None:
    """In float64 nothing is lost to rounding: what differs is the order of additions."""
    from mergekit.merge_methods import TensorGroup

    base, experts = untied((40, 37), num_tasks, torch.float64)
    tensors = [base, *experts] if has_base else experts
    group = TensorGroup.from_tensors(tensors, base_index=0 if has_base else None)
    (expected,), (actual,) = (method([group], parameters=parameters) for method in pair(name))
    tolerance = 1e-6 if name == "ramplus_tl" else 1e-9
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


ALL = OTHERS + [
    (name, 2, True, {"weight": [0.5, 0.25]} | ({} if name == "task_arithmetic" else {"density": 0.3}))
    for name in METHODS
]


@pytest.fixture
def left_to_mergekit(integration: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the methods that our ops do not take from here on, once for every tensor."""
    left = []
    method = integration.Fused._method

    def recorded(self: Any, *arguments: Any) -> Any:
        taken = method(self, *arguments)
        left.extend([] if taken else [self.spec.name])
        return taken

    monkeypatch.setattr(integration.Fused, "_method", recorded)
    return left


@pytest.mark.parametrize(("name", "num_tasks", "has_base", "parameters"), ALL)
def test_api_in_memory(
    pair: Any, left_to_mergekit: list[str], name: str, num_tasks: int, has_base: bool, parameters: dict[str, Any]
) -> None:
    """mergekit's own functions for tensors and state dicts, where tensors of one shape may be merged at once."""
    from mergekit.merge_methods import api

    shapes = {"a": (40, 37), "b": (40, 37), "c": (63,)}
    drawn = {key: untied(shape, num_tasks, torch.float64) for key, shape in shapes.items()}
    drawn["b"] = drawn["a"][0], [expert + 0.25 for expert in drawn["a"][1]]
    models = [
        {key: ([base] * has_base + experts)[i] for key, (base, experts) in drawn.items()} | {"steps": torch.tensor(3)}
        for i in range(has_base + num_tasks)
    ]
    results = []
    stock, _ = pair(name)
    for method in (stock, name):  # a name is what install() replaces
        torch.manual_seed(7)
        options = {"parameters": parameters}
        merged = api.merge_state_dicts(models, method, base=0 if has_base else None, **options)
        tensors = [model["c"] for model in models]
        alone = api.merge_tensors(tensors, method, base_index=0 if has_base else None, **options)
        results.append(merged | {"alone": alone})
    expected, actual = results
    assert list(actual) == ["a", "b", "c", "steps", "alone"] == list(expected)
    # mergekit's random methods and ramplus_tl divide in float32
    tolerance = 1e-6 if name == "ramplus_tl" or name.startswith(("dare", "della")) else 1e-9
    for key, tensor in expected.items():
        torch.testing.assert_close(actual[key], tensor, rtol=tolerance, atol=tolerance)
    assert not left_to_mergekit


@pytest.mark.parametrize(("name", "num_tasks", "has_base", "parameters"), ALL)
def test_gpu_tensors_take_the_triton_kernels(
    pair: Any,
    left_to_mergekit: list[str],
    device: torch.device,
    name: str,
    num_tasks: int,
    has_base: bool,
    parameters: dict[str, Any],
) -> None:
    from mergekit.merge_methods.api import merge_tensors

    base, experts = untied((20, 17), num_tasks, torch.float32)
    tensors = [base, *experts] if has_base else experts
    options = {"parameters": parameters, "base_index": 0 if has_base else None}
    torch.manual_seed(7)
    expected = merge_tensors(tensors, pair(name)[0], **options)
    before = _C.bytes_read()
    torch.manual_seed(7)
    merged = merge_tensors([x.to(device) for x in tensors], name, **options)
    assert merged.device.type == device.type
    assert _C.bytes_read() == before
    assert not left_to_mergekit
    torch.testing.assert_close(merged.cpu(), expected, rtol=1e-5, atol=1e-5)


def test_nan_stays_where_it_is(pair: Any) -> None:
    base, experts = untied((40, 37), 3, torch.float32)
    experts[1][3, 5] = torch.nan
    for name in ("ties", "task_arithmetic", "breadcrumbs_ties"):
        expected, actual = (merged(method, base, experts, density=0.3, weight=1.0) for method in pair(name))
        assert expected.isnan().sum() == 1
        assert_same(actual, expected, name)


def test_many_experts(pair: Any) -> None:
    base, experts = untied((40, 37), 9, torch.float32)
    for name in METHODS:
        # dyadic weights: all sums are exact, in whatever order torch adds
        parameters = {"density": 0.3, "weight": [1.0, 0.5, 0.25] * 3, "rescale": False, "normalize": False}
        expected, actual = (merged(method, base, experts, **parameters) for method in pair(name))
        if name in ("dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "ties", "task_arithmetic"):
            assert_same(actual, expected, name)
        else:
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_runs_on_our_ops(pair: Any, name: str) -> None:
    base, experts = untied((40, 37), 2, torch.float32)
    stock, ours = pair(name)
    before = _C.bytes_read()
    merged(stock, base, experts, density=0.3, weight=1.0)
    assert _C.bytes_read() == before
    merged(ours, base, experts, density=0.3, weight=1.0)
    assert _C.bytes_read() > before


def test_leaves_the_rest_to_mergekit(pair: Any) -> None:
    stock, ours = pair("ties")
    base, experts = untied((40, 37), 2, torch.float32)
    before = _C.bytes_read()
    assert merged(ours, base, [], weight=[]) is base
    for density, lam in ((0.0, 1.0), (0.3, torch.inf)):
        parameters = {"density": density, "weight": 1.0, "lambda": lam}
        assert_same(merged(ours, base, experts, **parameters), merged(stock, base, experts, **parameters))
    leaf = experts[0].clone().requires_grad_()
    merged(ours, base, [leaf, experts[1]], density=0.3, weight=1.0).sum().backward()
    assert leaf.grad is not None
    assert _C.bytes_read() == before


def test_leaves_other_devices_to_mergekit(pair: Any) -> None:
    from mergekit.merge_methods import TensorGroup

    base, experts = untied((40, 37), 2, torch.float32)
    group = TensorGroup.from_tensors([x.to("meta") for x in (base, *experts)], base_index=0)
    numbers = {name: {1: 1.0, 2: 1.0} for name in ("weight", "density")}
    options = {"lambda": 1.0, "normalize": True, "rescale": False, "int8_mask": False}
    for method in pair("ties"):
        assert method.merge_group(group, **numbers, **options).device.type == "meta"


def test_install(integration: ModuleType, registered: dict[str, Any]) -> None:
    stock = dict(registered)
    integration.install()
    once = dict(registered)
    integration.install()
    assert list(registered) == list(stock)
    assert all(registered[name] is once[name] for name in stock)
    assert all(registered[name] is not stock[name] for name in stock) and len(stock) == 20
    assert all(registered[name].spec == stock[name].spec for name in stock)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `base`, `first` and `second` with a model of two thousand parameters each."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed", exc_type=ImportError)
    folder = tmp_path_factory.mktemp("models")
    config = transformers.LlamaConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=64, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    tensors = {name: untied(tensor.shape, 2, torch.float32) for name, tensor in model.state_dict().items()}
    for i, name in enumerate(("base", "first", "second")):
        model.load_state_dict({key: [base, *experts][i] for key, (base, experts) in tensors.items()})
        model.save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("name", METHODS)
def test_command(
    integration: ModuleType,
    registered: dict[str, Any],
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    experts = [
        {"model": str(models / model), "parameters": {"weight": w}} for model, w in (("first", 1), ("second", 0.5))
    ]
    merge = {
        "merge_method": name, "base_model": str(models / "base"), "models": experts,
        "parameters": {"density": 0.4}, "dtype": "float32",
    }  # fmt: skip
    (tmp_path / "merge.yaml").write_text(json.dumps(merge))  # JSON is YAML
    results = {}
    for command, main in (("stock", integration.run_yaml.main), ("ours", integration.main)):
        options = ["--no-copy-tokenizer", "--quiet", "--random-seed", "3"]
        monkeypatch.setattr(
            sys, "argv", ["mergekit-yaml", str(tmp_path / "merge.yaml"), str(tmp_path / command), *options]
        )
        before = _C.bytes_read()
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 0
        assert (_C.bytes_read() > before) == (command == "ours")
        results[command] = load_file(tmp_path / command / "model.safetensors")
    assert results["ours"].keys() == results["stock"].keys()
    for key, expected in results["stock"].items():
        assert_same(results["ours"][key], expected, key)


def test_without_mergekit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mergekit.merge_methods", None)
    monkeypatch.delitem(sys.modules, "surgery_kernels.integrations.mergekit", raising=False)
    message = r"^mergekit must be installed in a version .* run `pip install 'surgery-kernels\[mergekit\]'`$"
    with pytest.raises(ImportError, match=message):
        importlib.import_module("surgery_kernels.integrations.mergekit")
