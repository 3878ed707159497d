"""SMILE and WEMoE of FusionBench, as they are and on our layers."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery_kernels.routed.smile import SmileLinear
from surgery_kernels.routed.wemoe import MergedLinear
from tests.encoders import clip, made, perturbed, samples

pytestmark = pytest.mark.any_isa


def pool(num_tasks: int = 3) -> tuple[Any, Any]:
    from fusion_bench.modelpool import BaseModelPool

    one = made(clip)
    experts = {f"task{t}": perturbed(one.model, t) for t in range(num_tasks)}
    return one, BaseModelPool({"_pretrained_": one.model, **experts})


@torch.no_grad()
def features(one: Any, model: nn.Module) -> Tensor:
    return one.representation(model.eval()(one.inputs))


@pytest.mark.parametrize("options", [{"k": 3}, {"k": -1}, {"k": 2, "routing_use_diff": False}])
def test_smile(integration: ModuleType, options: dict[str, Any]) -> None:
    from fusion_bench.method import SmileUpscalingAlgorithm

    one, models = pool()
    options = {"device": "cpu", "gate_k": 2, "k": 4} | options
    theirs = SmileUpscalingAlgorithm(**options).run(deepcopy(models))
    before = deepcopy(models._models["task1"].state_dict())
    ours = integration.SmileUpscaling(**options).run(models)
    assert type(ours) is type(one.model) and any(isinstance(module, SmileLinear) for module in ours.modules())
    torch.testing.assert_close(features(one, ours), features(one, theirs), rtol=1e-3, atol=1e-4)
    assert all(torch.equal(x, before[name]) for name, x in models._models["task1"].state_dict().items())


class Averaged(nn.Module):
    """A layer that has experts, one that is averaged, and a parameter beside them that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(5, 5), nn.LayerNorm(5)
        self.scale = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x)) * self.scale


def test_the_rest_is_averaged(integration: ModuleType) -> None:
    """FusionBench fails where a model has activations that are modules."""
    from fusion_bench.method import SmileUpscalingAlgorithm
    from fusion_bench.modelpool import BaseModelPool

    torch.manual_seed(0)
    base = Averaged()
    models = BaseModelPool({"_pretrained_": base, "a": perturbed(base, 1), "b": perturbed(base, 2)})
    options = {"device": "cpu", "gate_k": 1, "k": 2, "average_experts": True}
    theirs = SmileUpscalingAlgorithm(**options).run(deepcopy(models))
    ours = integration.SmileUpscaling(**options).run(models)
    x = torch.randn(7, 5)
    torch.testing.assert_close(ours(x), theirs(x))
    assert torch.equal(ours.scale, base.scale) and not torch.equal(ours.norm.weight, base.norm.weight)
    one, of_clip = pool()
    with pytest.raises(ValueError, match="State dict at index 0 is empty"):
        SmileUpscalingAlgorithm(**options).run(deepcopy(of_clip))
    assert features(one, integration.SmileUpscaling(**options).run(of_clip)).isfinite().all()


def test_subclasses_with_layers_of_their_own_stay_fusion_benchs(integration: ModuleType) -> None:
    from fusion_bench.method import SmileUpscalingAlgorithm

    class Other(SmileUpscalingAlgorithm):
        def _upscale_linear_layer(self, pretrained_model: nn.Module, finetuned_models: Any, name: str) -> None:
            pass

    one, models = pool()
    with integration.accelerated():
        result = Other(device="cpu").run(models)
    assert not any(isinstance(module, SmileLinear) for module in result.modules())


def test_wemoe_is_trained_by_fusion_bench(integration: ModuleType) -> None:
    """Its loop, its optimizer and its objective, with heads in the place of CLIP's."""
    from fusion_bench.utils import instantiate

    one, models = pool(2)

    class Algorithm(integration.CLIPWeightEnsemblingMoE):  # type: ignore[name-defined]
        def on_test_time_adaptation_start(self) -> None:
            self.seen: list[bool] = []

        def get_shuffled_test_loader_iter(self, task: str) -> Any:
            return iter([(samples(5, 3, 8, 8, seed=len(task)), torch.zeros(5))])

        def compute_logits(self, module: Any, batch: Any, task: str) -> Tensor:
            layers = [layer for layer in module.modules() if isinstance(layer, MergedLinear)]
            logits = one.representation(module(batch[0]))
            self.seen.append(any(layer.per_sample for layer in layers))
            return logits

    options = {"init_lambda": 0.3, "router_hidden_layers": 2, "batch_reduce": True, "optimizer": "adam", "lr": 1e-3}
    named = instantiate({"_target_": f"{integration.__name__}.CLIPWeightEnsemblingMoE", **options})
    assert type(named) is integration.CLIPWeightEnsemblingMoE and named.config == options
    algorithm = Algorithm(**options, max_steps=2, use_grad_accumulate=True)
    torch.manual_seed(0)
    model = algorithm.run(models)
    assert type(model) is type(one.model) and algorithm.seen == [False] * 4
    routers = [
        layer.router for layer in model.modules() if isinstance(layer, MergedLinear) and layer.router is not None
    ]
    assert len(routers) == 2
    together = features(one, model)
    alone = torch.cat([features(replace(one, inputs=sample[None]), model) for sample in one.inputs])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    model.batch_reduce = True
    assert not torch.allclose(features(one, model), together, rtol=1e-4, atol=1e-5)
