"""FusionBench's algorithms that are one of our methods, classes of ours that it lacks, and lazy models."""

from __future__ import annotations

import importlib
import sys
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery_kernels import _C, merge_state_dicts
from surgery_kernels.merging import METHODS
from tests.integrations.fusion_bench.pools import of_untied

pytestmark = pytest.mark.any_isa

TARGET = "surgery_kernels.integrations.fusion_bench"
EXCLUDED = ["second.weight"]
# class -> options; what both give is compared
SAME: dict[str, dict[str, Any]] = {
    "IsotropicMergingInCommonSubspace": {"scaling_factor": 0.7, "exclude_keys": EXCLUDED},
    "IsotropicMergingInCommonAndTaskSubspace": {
        "scaling_factor": 0.7, "common_space_fraction": 0.5, "exclude_keys": None
    },
    "TaskSingularVectorMerging": {"alpha": 0.7, "exclude_keys": EXCLUDED},
    "WUDIMerging": {"iter_num": 20, "exclude_keys": EXCLUDED},
}  # fmt: skip


def made(name: str, **options: Any) -> Any:
    from fusion_bench.utils import instantiate

    return instantiate({"_target_": f"{TARGET}.{name}", **options})


def stock(integration: ModuleType, name: str) -> Any:
    module, _, found = integration.NAMES[name].rpartition(".")
    return getattr(importlib.import_module(f"fusion_bench.method.{module}"), found)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in model.state_dict().items()}


@pytest.mark.parametrize("name", SAME)
def test_is_fusion_benchs(integration: ModuleType, name: str) -> None:
    from fusion_bench.modelpool import BaseModelPool

    models, options = of_untied(3), SAME[name]
    expected = state(stock(integration, name)(**options).run(BaseModelPool(deepcopy(models))))
    ours = made(name, **options)
    assert type(ours) is getattr(integration, name) and ours.config["_target_"] == f"{TARGET}.{name}"
    actual = state(ours.run(BaseModelPool(deepcopy(models))))
    base = models["_pretrained_"].state_dict()
    for key, tensor in expected.items():
        change = (tensor - base[key]).abs().max()
        assert change > 0 and (actual[key] - tensor).abs().max() < 1e-4 * change, key
    method = {"Isotropic": "iso", "TaskSingu": "tsv", "WUDIMergi": "wudi"}[name[:9]]
    with_ours = merge_state_dicts(
        base,
        [model.state_dict() for key, model in models.items() if key != "_pretrained_"],
        method={"iso": "iso_cts" if "Task" in name else "iso_c", "tsv": "tsv_m", "wudi": "wudi"}[method],
        exclude=tuple(options["exclude_keys"] or ()),
        **({"steps": 20} if method == "wudi" else {"lam": 0.7}),
        **({"common": 0.5} if "Task" in name and method == "iso" else {}),
    )
    assert all(torch.equal(actual[key], tensor) for key, tensor in with_ours.items())


@pytest.mark.parametrize("options", [{"alpha": [0.5, 0.7, 1.0]}, {"alpha": 0.7, "return_single_task_models": True}])
def test_leaves_options_that_are_not_ours_to_fusion_bench(integration: ModuleType, options: dict[str, Any]) -> None:
    from fusion_bench.modelpool import BaseModelPool

    models = of_untied(3)
    name = "TaskSingularVectorMerging"
    expected = stock(integration, name)(**options).run(BaseModelPool(deepcopy(models)))
    actual = made(name, **options).run(BaseModelPool(deepcopy(models)))
    if isinstance(actual, nn.Module):
        actual, expected = {"merged": actual}, {"merged": expected}
    for one, other in zip(actual.values(), expected.values(), strict=True):
        for key, tensor in other.state_dict().items():
            assert torch.equal(one.state_dict()[key], tensor)


def test_few_rows_keep_a_direction_of_every_model(integration: ModuleType) -> None:
    """FusionBench keeps int(rows / models) directions: none of a matrix of two rows and three models."""
    from fusion_bench.modelpool import BaseModelPool

    pretrained = nn.Linear(8, 2)
    models = {"_pretrained_": pretrained} | {f"task_{t}": nn.Linear(8, 2) for t in range(3)}
    base = pretrained.weight.detach().clone()
    name = "TaskSingularVectorMerging"
    theirs = stock(integration, name)().run(BaseModelPool(deepcopy(models)))
    ours = made(name).run(BaseModelPool(deepcopy(models)))
    torch.testing.assert_close(theirs.weight.detach(), base)
    assert (ours.weight.detach() - base).norm() > 0.1


def test_linear_interpolation(integration: ModuleType) -> None:
    from fusion_bench.modelpool import BaseModelPool

    models = of_untied(1)
    with pytest.raises(AssertionError, match="exactly 2"):  # of 0.2.33, of which a list is never 2
        stock(integration, "LinearInterpolation")(t=0.25).run(BaseModelPool(deepcopy(models)))
    actual = state(made("LinearInterpolation", t=0.25).run(BaseModelPool(deepcopy(models))))
    first, second = (state(model) for model in models.values())
    for key, tensor in actual.items():
        torch.testing.assert_close(tensor, 0.75 * first[key] + 0.25 * second[key])
    with pytest.raises(ValueError, match=r"^modelpool must have exactly 2 models, got 3$"):
        made("LinearInterpolation", t=0.25).run(BaseModelPool(of_untied(2)))


def lacking() -> list[str]:
    """Without importing FusionBench; the classes here are held against the declarations below."""
    theirs = ["Average", "TaskArithmetic", "Ties", "ExPO", "MagMax", "Slerp", "ModelStock", "Emr", "TallMasks", "Dni"]
    theirs += ["DareLinear", "DareTies", "IsoC", "IsoCts", "TsvM", "Wudi"]
    return [m.__name__ for m in METHODS.values() if m.__name__ not in theirs and not m.from_inputs]


@pytest.mark.parametrize("name", lacking())
def test_methods_that_fusion_bench_lacks(integration: ModuleType, name: str) -> None:
    """Every declaration is a class; its options are the parameters."""
    from fusion_bench.modelpool import BaseModelPool

    method = next(m for m in METHODS.values() if m.__name__ == name)
    least, most = method.num_experts
    required = {"weights": 0.25} if name in ("Linear", "Dni") else {}
    required |= {p.name: 0.3 for p in method.parameters() if p.required and p.name not in required}
    has_base = method.base == "required"
    models = of_untied((most or 3) if has_base or method.base == "none" else 2)
    if not has_base and method.base == "none":
        models.pop("_pretrained_")
    before = {key: state(model) for key, model in models.items()}
    made_class = made(name, **required)
    assert isinstance(made_class.config, dict | type(made_class.config)) and made_class.method is method
    found = made_class.run(BaseModelPool(models))
    states = list(before.values())
    if method.base == "optional":
        has_base = True
    base, experts = (states[0], states[1:]) if has_base else (None, states)
    for key, tensor in merge_state_dicts(base, experts, method=method.name, **required).items():
        assert torch.equal(found.state_dict()[key], tensor), key


def test_unknown_options_are_named(integration: ModuleType) -> None:
    with pytest.raises(TypeError, match=r"^options of pcb must be among .*, got 'speed'$"):
        integration.Pcb(speed=0.2)
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = integration.Nothing


def test_every_name_is_a_class(integration: ModuleType) -> None:
    from fusion_bench.method import _available_algorithms

    for name, path in integration.NAMES.items():
        of_theirs = path.rpartition(".")[2]
        assert of_theirs in [*_available_algorithms, "EMRMerging"]  # which FusionBench forgets
        assert of_theirs.replace("Algorithm", "") == name
        if "ResNet" not in name or sys.version_info >= (3, 12):  # whose module needs that Python
            assert issubclass(getattr(integration, name), stock(integration, name))
    assert integration.ISO_C_Merge is integration.IsotropicMergingInCommonSubspace


LAZY: dict[str, dict[str, Any]] = {
    "SimpleAverage": {},
    "TaskArithmetic": {"scaling_factor": 0.3},
    "TiesMerging": {"scaling_factor": 0.3, "threshold": 20, "remove_keys": [], "merge_func": "sum"},
    "MagMax": {},
    "ModelStock": {},
    "WeightedAverage": {"normalize": True, "weights": [0.2, 0.5, 0.6]},
    "ExPO": {"extrapolation_factor": 0.3},
    "DareTaskArithmetic": {"scaling_factor": 0.3, "sparsity_ratio": 0.4, "only_on_linear_weights": False},
    **SAME,
    "EMRMerging": {},
    "Pcb": {},
    "Breadcrumbs": {"density": 0.5},
}


@pytest.mark.parametrize("name", LAZY)
def test_lazy_models(integration: ModuleType, name: str, tmp_path: Path) -> None:
    from fusion_bench.modelpool import BaseModelPool

    from tests.integrations.fusion_bench.pools import lazy

    models = of_untied(3)
    torch.manual_seed(3)
    expected = state(made(name, **LAZY[name]).run(BaseModelPool(deepcopy(models))))
    before = _C.bytes_read()
    torch.manual_seed(3)
    found = made(name, **LAZY[name]).run(lazy(models, tmp_path))
    assert isinstance(found, nn.Module) and (
        _C.bytes_read() > before or "WUDI" in name or "Task" in name or "Iso" in name
    )
    for key, tensor in state(found).items():
        assert torch.equal(tensor, expected[key]), key


@pytest.mark.parametrize("name", SAME)
def test_gpu_tensors(integration: ModuleType, device: torch.device, name: str) -> None:
    from fusion_bench.modelpool import BaseModelPool

    models = of_untied(3)
    expected = state(made(name, **SAME[name]).run(BaseModelPool(deepcopy(models))))
    actual = made(name, **SAME[name]).run(BaseModelPool({key: model.to(device) for key, model in models.items()}))
    for key, tensor in expected.items():
        torch.testing.assert_close(actual.state_dict()[key].cpu(), tensor, rtol=1e-4, atol=1e-5)
