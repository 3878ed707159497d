"""FusionBench's Concrete algorithms: on our ops with their own draws, and our methods against them."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from surgery_kernels import _C, merge_state_dicts
from surgery_kernels.reference.combine import mask_of
from tests.integrations.fusion_bench.concrete import OPTIONS, TASKS, batch, entropy, models, run

pytestmark = pytest.mark.any_isa

ALGORITHMS = {
    "ConcreteTaskArithmeticForCLIP": ("ConcreteTaskArithmeticAlgorithmForCLIP", {"method": "concrete_task_arithmetic"}),
    "ConcreteTaskWiseAdaMergingForCLIP": (
        "ConcreteTaskWiseAdaMergingForCLIP",
        {"method": "concrete_adamerging", "granularity": "task"},
    ),
    "ConcreteLayerWiseAdaMergingForCLIP": (
        "ConcreteLayerWiseAdaMergingForCLIP",
        {"method": "concrete_adamerging", "granularity": "layer"},
    ),
}


def stock(name: str) -> Any:
    from fusion_bench.method import concrete_subspace

    return getattr(concrete_subspace, name)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_on_our_ops(integration: ModuleType, name: str) -> None:
    """With its options, and its masks: torch draws them."""
    states = []
    for algorithm in (stock(ALGORITHMS[name][0]), getattr(integration, name)):
        torch.manual_seed(0)
        before = _C.bytes_read()
        states.append(run(algorithm).state_dict())
    assert _C.bytes_read() > before
    for key, expected in states[0].items():
        torch.testing.assert_close(states[1][key], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [*ALGORITHMS, "CLIPLayerWiseAdaMerging", "CLIPTaskWiseAdaMerging"])
def test_options_of_a_target(integration: ModuleType, name: str) -> None:
    """FusionBench's classes take a configuration as one argument, which `_target_` cannot give."""
    from fusion_bench.utils import instantiate
    from omegaconf import DictConfig

    target = f"surgery_kernels.integrations.fusion_bench.{name}"
    algorithm = instantiate({"_target_": target, "name": "any", **OPTIONS})
    assert type(algorithm) is getattr(integration, name)
    assert OPTIONS.items() <= dict(algorithm.config).items()
    assert getattr(integration, name)(DictConfig({"lr": 3})).config.lr == 3


def test_a_mask_that_lacks_a_tensor_is_theirs(integration: ModuleType) -> None:
    from fusion_bench.models.wrappers.task_wise_fusion import TaskWiseMergedModel, get_task_wise_weights

    pretrained, *experts = models().values()
    module = TaskWiseMergedModel(get_task_wise_weights(2, 0.3), pretrained, experts)
    with integration.accelerated(), pytest.raises(KeyError):
        module.merge_weights({"0.weight": torch.ones(9, 6)})


class OurDraws:
    """In place of FusionBench's: draw k is that of our methods under seed 0, differentiable in the logits."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, mask_model: Any, mask_type: str, temperature: float) -> dict[str, Tensor]:
        logits = dict(mask_model.named_parameters())
        offsets = torch.tensor([0, *(x.numel() for x in logits.values())]).cumsum(0)
        flat = torch.cat([x.detach().flatten() for x in logits.values()])
        drawn = mask_of(flat, offsets, temperature, self.count).double()
        self.count += 1
        noise = drawn.logit() * temperature - flat.double()
        parts = noise.split([x.numel() for x in logits.values()])
        return {
            name: ((x.double() + part.view(x.shape)) / temperature).sigmoid().float()
            for (name, x), part in zip(logits.items(), parts, strict=True)
        }


def objective(merged: dict[str, Tensor], step: int) -> Tensor:
    model = models()["_pretrained_"]
    return sum(entropy(functional_call(model, merged, (batch(task, step),))) for task in TASKS)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_our_methods_learn_what_theirs_learn(integration: ModuleType, name: str, monkeypatch: Any) -> None:
    """Where FusionBench merges before it sets its coefficients back, they are set back first: its gradient ahead would
    be that of the step before."""
    from fusion_bench.models.masks import MaskModel

    theirs, ours = ALGORITHMS[name]

    def draw_ours() -> None:
        draws = OurDraws()
        monkeypatch.setattr(MaskModel, "sample_mask", lambda self, **options: draws(self, **options))

    draw_ours()
    learning: list[Any] = []

    def began(algorithm: Any, module: Any) -> None:
        if module is None or "AdaMerging" not in name:
            learning.clear()
            return
        learning.append(module)
        start, merge = module.merge_weight.data.clone(), module.merge_weights

        def merge_weights(task_vector_mask: dict[str, Tensor]) -> Any:
            if learning and not any(m.requires_grad for m in task_vector_mask.values()):
                module.merge_weight.data = start.clone()
            return merge(task_vector_mask)

        module.merge_weights = merge_weights

    expected = run(stock(theirs), began).state_dict()
    states = [model.state_dict() for model in models().values()]
    options: dict[str, Any] = {"lam": OPTIONS["scaling_factor"], "steps": OPTIONS["max_steps"], "lr": OPTIONS["lr"]}
    if "granularity" in ours:
        options |= {"adamerging_lr": OPTIONS["adamerging_lr"], "adamerging_steps": OPTIONS["max_adamerging_steps"]}
    merged = merge_state_dicts(states[0], states[1:], objective=objective, **ours, **options)
    for key, tensor in expected.items():
        torch.testing.assert_close(merged[key], tensor, rtol=2e-3, atol=2e-3)
        assert (tensor - states[0][key]).abs().max() > 0.05
    if "AdaMerging" in name:
        draw_ours()
        as_it_is = run(stock(theirs)).state_dict()
        assert max((as_it_is[key] - tensor).abs().max() for key, tensor in expected.items()) > 0.01


def test_fusion_bench_fails_where_something_requires_no_gradient(integration: ModuleType) -> None:
    from fusion_bench.models.masks import MaskModel

    frozen = models()["_pretrained_"]
    frozen[0].bias.requires_grad_(False)
    with pytest.raises(RuntimeError, match="mutated during iteration"):
        MaskModel(frozen, parameter_type="logits")
