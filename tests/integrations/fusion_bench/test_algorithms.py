"""FusionBench's own algorithms against ours."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from copy import deepcopy
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery_kernels import _C
from tests.cases import assert_same
from tests.integrations.fusion_bench.pools import of_untied
from tests.untied import untied

pytestmark = pytest.mark.any_isa


def theirs(name: str) -> Any:
    return getattr(importlib.import_module("fusion_bench.method"), name)


class Network(nn.Module):
    """With tied weights, a running mean and an integer buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(24, 24)
        self.norm = nn.BatchNorm1d(24)
        self.tied = nn.Linear(24, 24, bias=False)
        self.tied.weight = self.first.weight


def pool(num_tasks: int = 3, dtype: torch.dtype = torch.float32, steps: int = 0) -> dict[str, nn.Module]:
    """Models whose counters of batches are `steps` apart."""
    pretrained = Network().to(dtype)
    models = {"_pretrained_": pretrained} | {f"task_{t}": deepcopy(pretrained) for t in range(num_tasks)}
    for name, tensor in pretrained.state_dict().items():
        if tensor.is_floating_point():
            base, experts = untied(tensor.shape, num_tasks, dtype)
            values = [base, *experts]
        else:
            values = [torch.tensor(40 + steps * t) for t in range(num_tasks + 1)]
        for model, value in zip(models.values(), values, strict=True):
            model.state_dict()[name].copy_(value)
    return models


def merged(algorithm: Any, models: dict[str, nn.Module], **options: Any) -> dict[str, Tensor]:
    from fusion_bench.modelpool import BaseModelPool

    return algorithm(**options).run(BaseModelPool(deepcopy(models))).state_dict()


def assert_same_states(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_same(actual[name], expected[name], name)


@pytest.mark.parametrize("steps", [0, 5])
@pytest.mark.parametrize("merge_func", ["sum", "mean", "max"])
def test_ties(integration: ModuleType, merge_func: str, steps: int) -> None:
    for num_tasks, threshold, dtype in ((1, 20, torch.float32), (3, 0.57, torch.float32), (3, 35, torch.bfloat16)):
        models = pool(num_tasks, dtype, steps)
        options = {"scaling_factor": 0.3, "threshold": threshold, "remove_keys": [], "merge_func": merge_func}
        expected = merged(theirs("TiesMergingAlgorithm"), models, **options)
        before = _C.bytes_read()
        assert_same_states(merged(integration.TiesMerging, models, **options), expected)
        assert _C.bytes_read() > before


def test_task_arithmetic(integration: ModuleType) -> None:
    for num_tasks, dtype in ((1, torch.float32), (4, torch.float32), (3, torch.float64)):
        models = pool(num_tasks, dtype)
        expected = merged(theirs("TaskArithmeticAlgorithm"), models, scaling_factor=0.3)
        before = _C.bytes_read()
        assert_same_states(merged(integration.TaskArithmetic, models, scaling_factor=0.3), expected)
        assert _C.bytes_read() > before


def test_task_arithmetic_rounds_less(integration: ModuleType) -> None:
    models = pool(3, torch.bfloat16)
    exact = merged(
        theirs("TaskArithmeticAlgorithm"), {k: m.double() for k, m in deepcopy(models).items()}, scaling_factor=0.3
    )
    stock = merged(theirs("TaskArithmeticAlgorithm"), models, scaling_factor=0.3)
    ours = merged(integration.TaskArithmetic, models, scaling_factor=0.3)
    for name, tensor in exact.items():
        assert (ours[name] - tensor).abs().max() <= (stock[name] - tensor).abs().max()


def test_where_the_result_is(integration: ModuleType) -> None:
    from fusion_bench.modelpool import BaseModelPool

    models = pool()
    before = deepcopy(models["_pretrained_"].state_dict())
    copied = integration.TaskArithmetic(scaling_factor=0.3, inplace=False).run(BaseModelPool(models))
    assert copied is not models["_pretrained_"]
    assert_same_states(models["_pretrained_"].state_dict(), before)
    assert integration.TaskArithmetic(scaling_factor=0.3).run(models) is models["_pretrained_"]
    ties = integration.TiesMerging(scaling_factor=0.3, threshold=20, remove_keys=[], merge_func="sum")
    assert ties.run(BaseModelPool(models)) is models["_pretrained_"]
    assert ties.run(models) is not models["_pretrained_"]  # a plain dict is copied, as by FusionBench


def test_configuration(integration: ModuleType) -> None:
    from fusion_bench.utils import instantiate

    options = {"scaling_factor": 0.3, "threshold": 20, "remove_keys": [], "merge_func": "sum"}
    target = "surgery_kernels.integrations.fusion_bench"
    ties = instantiate({"_target_": f"{target}.TiesMerging", **options})
    assert type(ties) is integration.TiesMerging
    assert {"_target_": f"{target}.TiesMerging", **options}.items() <= dict(ties.config).items()
    assert (
        type(instantiate({"_target_": f"{target}.TaskArithmetic", "scaling_factor": 0.3})) is integration.TaskArithmetic
    )


def test_removed_keys(integration: ModuleType) -> None:
    class T5(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transformer = nn.ModuleDict({"shared": nn.Embedding(8, 4)})
            self.encoder = nn.Embedding(8, 4)

    models = {"_pretrained_": T5(), "task_0": T5(), "task_1": T5()}
    options = {"scaling_factor": 0.3, "threshold": 20, "remove_keys": ["encoder.weight"], "merge_func": "mean"}
    assert_same_states(
        merged(integration.TiesMerging, models, **options), merged(theirs("TiesMergingAlgorithm"), models, **options)
    )


def test_leaves_other_models_to_fusion_bench(integration: ModuleType) -> None:
    before = _C.bytes_read()
    options = {"scaling_factor": 0.3, "threshold": 20, "remove_keys": [], "merge_func": "sum"}
    on_meta = {name: nn.Linear(3, 2, device="meta") for name in ("_pretrained_", "task")}
    assert merged(integration.TiesMerging, on_meta, **options)["weight"].is_meta
    assert merged(integration.TaskArithmetic, on_meta, scaling_factor=0.3)["weight"].is_meta
    different = {"_pretrained_": nn.Linear(3, 2), "task": nn.Linear(3, 2, bias=False)}
    with pytest.raises(RuntimeError, match="size"):
        merged(integration.TiesMerging, different, **options)
    with pytest.raises(ValueError, match="(?i)key"):
        merged(integration.TaskArithmetic, different, scaling_factor=0.3)
    with pytest.raises(ValueError, match="Dtype mismatch"):
        merged(integration.TaskArithmetic, pool(steps=5), scaling_factor=0.3)
    assert _C.bytes_read() == before


def test_errors(integration: ModuleType) -> None:
    options = {"scaling_factor": 0.3, "threshold": 120, "remove_keys": [], "merge_func": "sum"}
    with pytest.raises(ValueError, match=r"^threshold must be in \(0, 100\], got 120$"):
        merged(integration.TiesMerging, pool(), **options)
    with pytest.raises(
        ValueError, match=r"^reduce must be one of 'mean', 'sum', 'max', 'magmax', 'unique', got 'median'$"
    ):
        merged(integration.TiesMerging, pool(), **{**options, "threshold": 20, "merge_func": "median"})


@pytest.mark.parametrize("name", ["SimpleAverage", "WeightedAverage", "ExPO", "MagMax", "EMRMerging"])
def test_classes_of_their_own(integration: ModuleType, name: str) -> None:
    from fusion_bench.utils import instantiate

    of_theirs = name if name == "EMRMerging" else f"{name}Algorithm"
    options = ALGORITHMS[of_theirs][1]
    made = instantiate({"_target_": f"surgery_kernels.integrations.fusion_bench.{name}", **options})
    before = _C.bytes_read()
    actual = made.run(pool_for(of_theirs)).state_dict()
    assert _C.bytes_read() > before
    for key, tensor in merged_by(of_theirs, pool_for(of_theirs)).items():
        torch.testing.assert_close(actual[key], tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("num_tasks", [1, 3])
def test_emr(integration: ModuleType, num_tasks: int) -> None:
    """Task by task the models of FusionBench, which takes no buffers."""
    emr_merging = importlib.import_module("fusion_bench.method.emr_merging")
    models = of_untied(num_tasks, torch.float32)
    inputs = torch.randn(5, 24)
    results = [algorithm().run(deepcopy(models)) for algorithm in (emr_merging.EMRMerging, integration.EMRMerging)]
    for t in range(num_tasks):
        outputs = []
        for result in results:
            result.backbone.forward = nn.Sequential(result.backbone.first, result.backbone.second).forward
            result.set_task(f"task_{t}")
            outputs.append(result(inputs))
        torch.testing.assert_close(outputs[1], outputs[0])


def test_tall_masks_are_the_papers(integration: ModuleType) -> None:
    from fusion_bench.utils import instantiate

    from surgery_kernels import merge_state_dicts

    models = of_untied(3, torch.float32)
    states = [model.state_dict() for model in models.values()]
    ours = instantiate(
        {"_target_": "surgery_kernels.integrations.fusion_bench.TallMaskTaskArithmetic", "tall_mask_lambda": 0.4}
    ).run(deepcopy(models))
    with pytest.raises(TypeError, match="Tensor type mismatch"):  # 0.2.33 refuses the tensors that it makes itself
        theirs("TallMaskTaskArithmeticAlgorithm")(0.4).run(deepcopy(models))
    for t in range(3):
        expected = merge_state_dicts(states[0], states[1:], method="tall_masks", selectivity=0.4, task=t)
        for key, tensor in expected.items():
            torch.testing.assert_close(ours["models"][f"task_{t}"].state_dict()[key], tensor, rtol=1e-6, atol=1e-7)


# of every algorithm that install() takes over: the module, the class, and options
ALGORITHMS: dict[str, tuple[str, dict[str, Any]]] = {
    "TiesMergingAlgorithm": (
        "ties_merging", {"scaling_factor": 0.3, "threshold": 20, "remove_keys": [], "merge_func": "sum"}
    ),
    "TaskArithmeticAlgorithm": ("task_arithmetic", {"scaling_factor": 0.3}),
    "SimpleAverageAlgorithm": ("simple_average", {}),
    "WeightedAverageAlgorithm": ("weighted_average", {"normalize": True, "weights": [0.2, 0.5, 0.6]}),
    "ExPOAlgorithm": ("linear", {"extrapolation_factor": 0.3}),
    "MagMaxAlgorithm": ("magmax", {"scaling_factor": 0.5}),
    "EMRMerging": ("emr_merging", {}),
    "SlerpMergeAlgorithm": ("slerp", {"t": 0.3}),
    "ModelStock": ("model_stock", {}),
    "DareTaskArithmetic": (
        "dare", {"scaling_factor": 0.3, "sparsity_ratio": 0.4, "only_on_linear_weights": False}
    ),
    "DareSimpleAverage": ("dare", {"sparsity_ratio": 0.4, "only_on_linear_weights": True}),
    "DareTiesMerging": (
        "dare",
        {
            "scaling_factor": 0.3, "sparsity_ratio": 0.4, "only_on_linear_weights": True, "rescale": True,
            "threshold": 30, "remove_keys": [], "merge_func": "mean",
        },
    ),
}  # fmt: skip


def pool_for(name: str, dtype: torch.dtype = torch.float32) -> dict[str, nn.Module]:
    if name == "SlerpMergeAlgorithm":
        models = pool(1, dtype)
    else:
        models = (of_untied if name.startswith(("Dare", "ModelStock", "EMR")) else pool)(3, dtype)
    if name == "WeightedAverageAlgorithm":  # which takes no integer buffer but 0
        for model in models.values():
            model.norm = nn.Identity()
    return models


def merged_by(name: str, models: dict[str, nn.Module], **more: Any) -> dict[str, Tensor]:
    module, options = ALGORITHMS[name]
    algorithm = getattr(importlib.import_module(f"fusion_bench.method.{module}"), name)
    torch.manual_seed(7)
    return merged(algorithm, models, **{**options, **more})


@pytest.mark.parametrize("name", ALGORITHMS)
def test_install(installed: Callable[..., None], name: str) -> None:
    models = pool_for(name)
    before = _C.bytes_read()
    expected = merged_by(name, models)
    assert _C.bytes_read() == before
    installed(exact_draws=True)
    installed(exact_draws=True)
    actual = merged_by(name, models)
    assert _C.bytes_read() > before
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(actual[key], tensor, rtol=2e-6, atol=2e-6)
        if name not in ("SlerpMergeAlgorithm", "ModelStock", "EMRMerging", "DareTaskArithmetic", "DareSimpleAverage"):
            assert_same(actual[key], tensor, key)


@pytest.mark.parametrize("name", ["SimpleAverageAlgorithm", "ExPOAlgorithm", "MagMaxAlgorithm", "SlerpMergeAlgorithm"])
def test_install_rounds_less(installed: Callable[..., None], name: str) -> None:
    models = pool_for(name, torch.bfloat16)
    exact = merged_by(name, {key: model.double() for key, model in deepcopy(models).items()})
    stock = merged_by(name, models)
    installed()
    for key, tensor in merged_by(name, models).items():
        assert (tensor - exact[key]).abs().max() <= (stock[key] - exact[key]).abs().max()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_gpu_tensors_take_the_triton_kernels(installed: Callable[..., None], device: torch.device, name: str) -> None:
    installed(exact_draws=True)
    expected = merged_by(name, pool_for(name))
    before = _C.bytes_read()
    actual = merged_by(name, {key: model.to(device) for key, model in pool_for(name).items()})
    assert _C.bytes_read() == before
    for key, tensor in expected.items():
        torch.testing.assert_close(actual[key].cpu(), tensor, rtol=2e-6, atol=2e-6)


def test_language_models_build_on_them(installed: Callable[..., None]) -> None:
    from fusion_bench.method.linear import SimpleAverageForCausalLM, TaskArithmeticForCausalLM

    installed()
    for algorithm, options in ((SimpleAverageForCausalLM, {}), (TaskArithmeticForCausalLM, {"scaling_factor": 0.3})):
        before = _C.bytes_read()
        merged(algorithm, pool(), **options)
        assert _C.bytes_read() > before


@pytest.mark.parametrize("only_on_linear_weights", [False, True])
def test_own_draws(installed: Callable[..., None], only_on_linear_weights: bool) -> None:
    models = of_untied(1, torch.float32)
    options = {"only_on_linear_weights": only_on_linear_weights, "scaling_factor": 1.0}
    changes = {key: models["task_0"].state_dict()[key] - x for key, x in models["_pretrained_"].state_dict().items()}
    installed()
    kept = {}
    for share in (0.4, 1.0):
        actual = merged_by("DareTaskArithmetic", models, sparsity_ratio=share, **options)
        for key, x in models["_pretrained_"].state_dict().items():
            whole = only_on_linear_weights and "bias" in key
            factor = (actual[key] - x) / changes[key]
            scale = torch.full_like(factor, 1 if whole else 1 / 0.6) * (factor != 0)
            torch.testing.assert_close(factor, scale, rtol=1e-3, atol=0)
            kept[key, share] = (factor != 0).float().mean().item()
            assert whole <= (kept[key, share] == 1)
    assert abs(kept["first.weight", 0.4] - 0.6) < 5 * (0.24 / 576) ** 0.5
    assert kept["first.weight", 1.0] == 0


def test_leaves_the_rest_of_an_installation_to_fusion_bench(installed: Callable[..., None]) -> None:
    weighted = {"normalize": False, "weights": [0.2, 0.5, 0.6]}
    models = pool_for("WeightedAverageAlgorithm")
    installed()
    before = _C.bytes_read()
    with pytest.raises(ValueError, match="Number of weights"):
        merged_by("WeightedAverageAlgorithm", models, normalize=False, weights=[1.0])
    assert merged_by("WeightedAverageAlgorithm", pool(), **weighted)["norm.num_batches_tracked"].item() == 52
    with pytest.raises(AssertionError, match="pretrained"):
        merged_by("ExPOAlgorithm", {key: model for key, model in models.items() if key != "_pretrained_"})
    assert _C.bytes_read() == before


def test_without_fusion_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fusion_bench.compat.modelpool", None)
    for name in [name for name in sys.modules if name.startswith("surgery_kernels.integrations.fusion_bench")]:
        monkeypatch.delitem(sys.modules, name)
    message = r"^fusion_bench must be installed in a version .* run `pip install 'surgery-kernels\[fusion-bench\]'`$"
    with pytest.raises(ImportError, match=message):
        importlib.import_module("surgery_kernels.integrations.fusion_bench")
