"""Fisher, RegMean, RegMean++ and AdaMerging of FusionBench, as they are and on our ops."""

from __future__ import annotations

from collections import defaultdict
from copy import deepcopy
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.integrations.fusion_bench.pools import of_untied

pytestmark = pytest.mark.any_isa

ROWS = 40


def inputs_of(task: str) -> Tensor:
    return torch.randn(ROWS, 24, generator=torch.Generator().manual_seed(int(task[-1])))


def grams(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    hidden = model.first(x).tanh()
    return {name: (rows.T @ rows / len(rows)).detach() for name, rows in (("first", x), ("second", hidden))}


def near(actual: dict[str, Tensor], expected: dict[str, Tensor], base: dict[str, Tensor], share: float) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        change = (tensor - base[name]).abs().max()
        assert change > 0 and (actual[name] - tensor).abs().max() < share * change, name


def both(integration: ModuleType, run: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    expected = run()
    with integration.accelerated():
        return run(), expected


@pytest.mark.parametrize("normalize", [True, False])
def test_fisher(integration: ModuleType, normalize: bool) -> None:
    from fusion_bench.method.fisher_merging.fisher_merging import FisherMergingAlgorithm
    from fusion_bench.modelpool import BaseModelPool

    class Algorithm(FisherMergingAlgorithm):
        def get_fisher_weights(self, model_name: str, model: nn.Module, **options: Any) -> dict[str, Tensor]:
            squares: dict[str, Tensor] = defaultdict(float)  # type: ignore[arg-type]
            for row in inputs_of(model_name)[:6]:
                gradients = torch.autograd.grad(model(row).log_softmax(-1).square().sum(), list(model.parameters()))
                for (name, _), gradient in zip(model.named_parameters(), gradients, strict=True):
                    squares[name] = squares[name] + gradient.square()
            return {name: squares[name] for name in options["param_names_to_merge"]}

    class Pool(BaseModelPool):
        def load_train_dataset(self, name: str, *args: Any, **kwargs: Any) -> Any:
            return None

    models = of_untied(3)
    options = {"exclude_param_names_regex": ["second.bias"], "normalize_fisher_weight": normalize}
    options |= {"minimal_fisher_weight": 1e-6, "num_fisher_examples": 6}

    def run() -> dict[str, Tensor]:
        merged = Algorithm(**options).run(Pool(deepcopy(models))).state_dict()
        assert torch.equal(merged.pop("second.bias"), models["_pretrained_"].state_dict()["second.bias"])
        return merged

    actual, expected = both(integration, run)
    near(actual, expected, models["_pretrained_"].state_dict(), 1e-4)


@pytest.mark.parametrize("ratio", [0.6, 1.0])
@pytest.mark.parametrize("transpose", [True, False])
def test_regmean(integration: ModuleType, ratio: float, transpose: bool) -> None:
    """Either way round, as of GPT-2's Conv1D."""
    from fusion_bench.method.regmean import regmean

    models = list(of_untied(3).values())[1:]
    parameters = {name: [model.state_dict()[name] for model in models] for name in models[0].state_dict()}
    if not transpose:
        parameters |= {name: [x.T for x in xs] for name, xs in parameters.items() if name.endswith("weight")}
    of_models = [grams(model, inputs_of(f"task_{t}")) for t, model in enumerate(models)]

    def run() -> dict[str, Tensor]:
        return regmean.merging_with_regmean_weights(parameters, of_models, ratio, transpose)

    actual, expected = both(integration, run)
    near(actual, expected, {name: xs[0] for name, xs in parameters.items()}, 1e-3)


def test_regmean_of_few_rows(integration: ModuleType) -> None:
    """FusionBench inverts a singular matrix; ours is the experts' mean where no input says anything."""
    from fusion_bench.method.regmean import regmean

    models = list(of_untied(2).values())[1:]
    parameters = {name: [model.state_dict()[name] for model in models] for name in models[0].state_dict()}
    of_models = [grams(model, inputs_of("task_0")[:3]) for model in models]
    with integration.accelerated():
        merged = regmean.merging_with_regmean_weights(parameters, of_models, 1.0)
    mean = torch.stack(parameters["first.weight"]).mean(0)
    blind = torch.linalg.svd(inputs_of("task_0")[:3]).Vh[3:]
    torch.testing.assert_close(merged["first.weight"] @ blind.T, mean @ blind.T, rtol=1e-3, atol=1e-4)


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(24, 24)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(24, 24), nn.Tanh()) for _ in range(2))


def test_regmean_plus_plus(integration: ModuleType) -> None:
    """Block after block; each algorithm of FusionBench's says what its layers are."""
    from fusion_bench.method.regmean_plusplus.regmean_plusplus import RegMeanAlgorithmPlusPlus
    from fusion_bench.modelpool import BaseModelPool

    class Algorithm(RegMeanAlgorithmPlusPlus):
        def merge_embedding_layer(self, models_to_merge_dict: dict[str, nn.Module]) -> dict[str, Tensor]:
            states = [model.embed.state_dict(prefix="embed.") for model in models_to_merge_dict.values()]
            return {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}

        def get_input_for_first_layer(self, model: Any, train_dataset: Tensor) -> list[Tensor]:
            return [model.embed(train_dataset)]

        def get_layers(self, model: Any) -> Any:
            return model.blocks

        def update_merged_params_dict(self, merged_params_dict: Any, new_merged_params: Any, layer_idx: int) -> Any:
            return merged_params_dict | {f"blocks.{layer_idx}.{name}": x for name, x in new_merged_params.items()}

        def layer_batches_forward(self, layer: Any, batches_input: list[Tensor]) -> list[Tensor]:
            return [layer(x) for x in batches_input]

        def get_regmean_weights(self, name: str, layer: Any, batches_input: list[Tensor], **_: Any) -> Any:
            (x,) = batches_input
            return {"0": x.T @ x / len(x)}

    class Pool(BaseModelPool):
        def load_train_dataset(self, name: str, *args: Any, **kwargs: Any) -> Any:
            return inputs_of(name)

    torch.manual_seed(0)
    models = {"_pretrained_": Blocks(), "task_0": Blocks(), "task_1": Blocks()}
    options = {"num_regmean_examples": ROWS, "exclude_param_names_regex": [], "reduce_non_diagonal_ratio": 0.9}

    def run() -> dict[str, Tensor]:
        return Algorithm(**options, weight_transpose=True).run(Pool(deepcopy(models))).state_dict()

    actual, expected = both(integration, run)
    near(actual, expected, models["_pretrained_"].state_dict(), 1e-3)


@pytest.mark.parametrize("clamp", [True, False])
@pytest.mark.parametrize("by_layer", [True, False])
def test_adamerging(integration: ModuleType, by_layer: bool, clamp: bool) -> None:
    """Their wrapper of models, its merge, its gradients task by task, and what Adam makes of them."""
    from fusion_bench.models.wrappers.layer_wise_fusion import LayerWiseMergedModel, get_layer_wise_weights
    from fusion_bench.models.wrappers.task_wise_fusion import TaskWiseMergedModel, get_task_wise_weights

    models = of_untied(3)

    def run() -> dict[str, Tensor]:
        pretrained, *experts = deepcopy(list(models.values()))
        weight = get_layer_wise_weights(3, 4, 0.3) if by_layer else get_task_wise_weights(3, 0.3)
        wrapped = (LayerWiseMergedModel if by_layer else TaskWiseMergedModel)(
            weight, pretrained_model=pretrained, finetuned_models=experts, clamp_weights=clamp
        )
        optimizer = torch.optim.Adam([wrapped.merge_weight], lr=0.02)
        wrapped.merge_weights()
        buffers: set[int] = set()
        for _ in range(4):
            for task in ("task_0", "task_1", "task_2"):
                log_p = wrapped(inputs_of(task)).log_softmax(-1)
                (-(log_p.exp() * log_p).sum(-1).mean()).backward(retain_graph=True)
            optimizer.step()
            optimizer.zero_grad()
            wrapped.merge_weights()
            buffers.add(next(wrapped.task_vectors[0].parameters()).data_ptr())
        assert len(buffers) == 1  # task vectors are laid side by side once
        learned = {"learned": wrapped.merge_weight.detach().clone()}
        return learned | wrapped.merge_and_unload().state_dict()

    actual, expected = both(integration, run)
    start = models["_pretrained_"].state_dict() | {"learned": torch.full_like(expected["learned"], 0.3)}
    near(actual, expected, start, 2e-3)


def test_adamerging_leaves_masks_to_fusion_bench(integration: ModuleType) -> None:
    from fusion_bench.models.wrappers.task_wise_fusion import TaskWiseMergedModel, get_task_wise_weights

    models = of_untied(2)
    masks = {name: torch.zeros_like(p) for name, p in models["_pretrained_"].named_parameters()}
    pretrained, *experts = deepcopy(list(models.values()))
    wrapped = TaskWiseMergedModel(get_task_wise_weights(2, 0.3), pretrained_model=pretrained, finetuned_models=experts)
    with integration.accelerated():
        merged = wrapped.merge_weights(masks)
    assert all(torch.equal(merged[name], x) for name, x in models["_pretrained_"].state_dict().items())
