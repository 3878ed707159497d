"""What users of mergekit, PEFT and FusionBench call, with the toolkit's own code and with ours inside it, 8 experts.

mergekit: one tensor of the model through the registered method, without reading and writing files, which both share.
PEFT: `add_weighted_adapter` on adapters of rank 16. FusionBench: `run` on the modules of a pool.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import Measure
from inputs import NUM_TASKS, flat_inputs, num_params_of, state_dict, vit_b32_shapes
from torch import Tensor, nn

try:  # transformers looks for it; its wheels for CUDA lack two operators where there is no GPU
    import torchvision  # noqa: F401
except RuntimeError:
    for _operator in ("nms", "qnms"):
        torch.library.define(f"torchvision::{_operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

DENSITY = 0.2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NUM_PARAMS = 1 << 20
MERGEKIT = [  # random masks take most of the time of the last four, and they stay mergekit's
    ("ties", "fp32"), ("ties", "bf16"), ("task_arithmetic", "fp32"), ("task_arithmetic", "bf16"),
    ("breadcrumbs", "fp32"), ("breadcrumbs_ties", "fp32"),
    ("dare_ties", "fp32"), ("dare_linear", "fp32"), ("della", "fp32"), ("della_linear", "fp32"),
]  # fmt: skip
PEFT = ["ties", "magnitude_prune", "linear", "dare_ties", "dare_linear"]
LAYERS, WIDTH, RANK = 8, 512, 16

pytestmark = pytest.mark.parametrize("contender", ["toolkit", "ours"])

Call = Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Pair:
    """One merge of a toolkit, by its own code and with ours."""

    op: str
    num_params: int
    dtype: str
    toolkit: Call
    ours: Call
    drawn_alike: Call | None = None  # ours with the toolkit's random masks, where `ours` draws others

    def measure(self, measure: Measure, contender: str, rounds: int) -> None:
        expected = (self.drawn_alike or self.ours)()
        measure(
            getattr(self, contender),
            ours=self.ours if contender == "toolkit" else None,
            check=lambda result: differing_share(self.toolkit() if self.drawn_alike else result, expected),
            rounds=rounds if contender == "toolkit" else 4 * rounds,
            warm_up=contender == "ours",
            small=True,
            extra={
                "op": self.op,
                "num_params": self.num_params,
                "num_tasks": NUM_TASKS,
                "dtype": self.dtype,
                "contender": contender,
            },
        )


def differing_share(theirs: list[Tensor], ours: list[Tensor]) -> float:
    """The share of parameters that differ by more than a rounding: at ties, or where one decided an election."""
    flat, mine = (torch.cat([x.flatten() for x in tensors]) for tensors in (theirs, ours))
    differs = (flat - mine).abs() > 8 * torch.finfo(flat.dtype).eps * mine.abs().max()
    share = differs.float().mean().item()
    assert share < 0.01
    return share


@pytest.mark.parametrize(("method", "dtype"), MERGEKIT)
@pytest.mark.benchmark(group="mergekit")
def test_mergekit(
    measure: Measure, rounds: int, monkeypatch: pytest.MonkeyPatch, method: str, dtype: str, contender: str
) -> None:
    pytest.importorskip("mergekit", reason="mergekit is not installed", exc_type=ImportError)
    integration = importlib.import_module("surgery_kernels.integrations.mergekit")
    monkeypatch.setattr(integration.registry, "_METHODS", dict(integration.registry._METHODS))
    stock = integration.registry.get(method)
    integration.install()
    tensors = flat_inputs(NUM_PARAMS, DTYPES[dtype])
    group = integration.TensorGroup.from_tensors([x.view(1 << 10, -1) for x in (tensors[0], *tensors[1])], base_index=0)

    def merge(registered: Any) -> Call:
        def call() -> list[Tensor]:
            torch.manual_seed(0)
            return list(registered([group], parameters={"density": DENSITY, "weight": 1 / NUM_TASKS}))

        return call

    pair = Pair(f"mergekit {method}", NUM_PARAMS, dtype, merge(stock), merge(integration.registry.get(method)))
    pair.measure(measure, contender, rounds)


@pytest.mark.parametrize("combination", PEFT)
@pytest.mark.benchmark(group="peft")
def test_peft(measure: Measure, rounds: int, combination: str, contender: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed", exc_type=ImportError)
    integration = importlib.import_module("surgery_kernels.integrations.peft")
    torch.manual_seed(0)
    network = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    config = peft.LoraConfig(r=RANK, target_modules=[str(i) for i in range(LAYERS)], init_lora_weights=False)
    names = [f"task_{t}" for t in range(NUM_TASKS)]
    model = peft.get_peft_model(network, config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    options = {} if combination == "linear" else {"density": DENSITY}

    def merge() -> list[Tensor]:
        torch.manual_seed(0)
        model.add_weighted_adapter(names, [1.0] * NUM_TASKS, "merged", combination, **options)
        merged = [x.detach().clone() for name, x in model.named_parameters() if ".merged." in name]
        model.delete_adapter("merged")
        return merged

    alike = integration.accelerated(exact_draws=True)(merge) if combination.startswith("dare") else None
    ours = integration.accelerated()(merge)
    pair = Pair(f"PEFT {combination}", 2 * LAYERS * RANK * WIDTH, "fp32", merge, ours, alike)
    pair.measure(measure, contender, rounds)


class Parameters(nn.Module):
    """The parameters of a model, without its computation."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.names = nn.ParameterDict({name.replace(".", "/"): nn.Parameter(x) for name, x in tensors.items()})


@pytest.mark.parametrize("algorithm", ["TiesMerging", "TaskArithmetic"])
@pytest.mark.benchmark(group="fusion_bench")
def test_fusion_bench(measure: Measure, algorithm: str, contender: str) -> None:
    pytest.importorskip("fusion_bench", reason="fusion-bench is not installed", exc_type=ImportError)
    integration = importlib.import_module("surgery_kernels.integrations.fusion_bench")
    from fusion_bench.modelpool import BaseModelPool

    shapes = vit_b32_shapes(layers=2)
    base, experts = flat_inputs(num_params_of(shapes), torch.float32)
    names = ["_pretrained_", *(f"task_{t}" for t in range(NUM_TASKS))]
    models = {name: Parameters(state_dict(flat, shapes)) for name, flat in zip(names, (base, *experts), strict=True)}
    options: dict[str, Any] = {"scaling_factor": 0.3}
    if algorithm == "TiesMerging":
        options |= {"threshold": 20, "remove_keys": [], "merge_func": "sum"}

    def merge(cls: Any) -> Call:
        def call() -> list[Tensor]:
            pool = BaseModelPool(models | {"_pretrained_": copy.deepcopy(models["_pretrained_"])})
            return list(cls(**options).run(pool).state_dict().values())

        return call

    stock = getattr(importlib.import_module("fusion_bench.method"), f"{algorithm}Algorithm")
    ours = getattr(integration, algorithm)
    pair = Pair(f"FusionBench {algorithm}", num_params_of(shapes), "fp32", merge(stock), merge(ours))
    pair.measure(measure, contender, rounds=1)
