"""What the papers' methods make of 8 experts of 4M entries, as matrices of a ViT's shapes: one read, or about three.

The others are the official formulas in eager PyTorch on the flattened model, and compiled; and FusionBench's functions,
which has neither PCB nor Consensus, and whose TALL masks run by its helper for flat tensors alone. Bound: base and
experts are read as often as the method must, and what it makes is written once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import Measure
from inputs import NUM_TASKS, flat_inputs
from torch import Tensor

from surgery_kernels.merging import METHODS, Scope
from surgery_kernels.merging.methods.masks import Packable

SHAPES = ((3072, 768), (768, 768), (768, 768), (768, 512), (50, 768), (768,))
SIZE = sum(math.prod(shape) for shape in SHAPES)
NAMES = [str(i) for i in range(len(SHAPES))]
SELECTIVITY, DENSITY, CLIP = 0.4, 0.05, 0.01


def parts(flat: Tensor) -> list[Tensor]:
    """The tensors of a model that lies flat."""
    sizes = [math.prod(shape) for shape in SHAPES]
    return [part.view(shape) for part, shape in zip(flat.split(sizes), SHAPES, strict=True)]


def emr(base: Tensor, experts: list[Tensor]) -> tuple[Tensor, ...]:
    """The shared vector, masks and scales."""
    x = torch.stack(experts) - base
    sign = torch.where(x.sum(0) > 0, 1.0, -1.0)
    masks = x * sign > 0
    shared = sign * (x.abs() * masks).amax(0)
    return base + shared, masks, x.abs().sum(1) / (masks * shared.abs()).sum(1)


def tall(base: Tensor, experts: list[Tensor]) -> tuple[Tensor, ...]:
    """The sum of the task vectors, and masks."""
    x = torch.stack(experts) - base
    total = x.sum(0)
    return base + total, x.abs() > SELECTIVITY * (total - x).abs()


def consensus(base: Tensor, experts: list[Tensor]) -> tuple[Tensor, ...]:
    x = torch.stack(experts) - base
    total = x.sum(0)
    needed = x.abs() > SELECTIVITY * (total - x).abs()
    return (base + total * (needed.sum(0) >= 2),)


def pcb(base: Tensor, experts: list[Tensor]) -> tuple[Tensor, ...]:
    x = torch.stack(experts) - base
    magnitudes = _clamped(x.abs(), CLIP, CLIP)
    norms = _spread(magnitudes)
    signed = x.sign() * norms
    agreement = torch.stack([torch.tanh(s * signed).sum(0) for s in signed])
    weights = _spread(_clamped(torch.exp(len(x) * norms**2) * agreement, 1 - DENSITY, 0))
    return (base + (weights * x.sign() * magnitudes).sum(0) / weights.sum(0).clamp(min=1e-12),)


def _clamped(x: Tensor, low: float, high: float) -> Tensor:
    ordered, size = x.sort(dim=1).values, x.shape[1]
    return x.clamp(ordered[:, int(size * low), None], ordered[:, int(size * (1 - high) - 1), None])


def _spread(x: Tensor) -> Tensor:
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    return (x - low) / (high - low)


def fusion_bench_emr(base: Tensor, experts: list[Tensor]) -> tuple[Tensor, ...]:
    from fusion_bench.method.emr_merging.utils import emr_merge

    shared, masks, rescalers = emr_merge([dict(zip(NAMES, parts(expert - base), strict=True)) for expert in experts])
    return base + torch.cat([x.reshape(-1) for x in shared.values()]), masks, rescalers


def fusion_bench_tall(base: Tensor, experts: list[Tensor]) -> tuple[Tensor, ...]:
    from fusion_bench.method.tall_mask.utils import generate_task_masks

    stacked = torch.stack(experts)
    vectors = stacked - base
    masks = generate_task_masks(vectors, stacked, base, tall_mask_lambda=SELECTIVITY)
    return base + vectors.sum(0), masks


@dataclass(frozen=True)
class Case:
    official: Callable[[Tensor, list[Tensor]], tuple[Tensor, ...]]
    reads: int
    options: dict[str, Any]
    packs: bool = False  # masks of all experts, not one model
    fusion_bench: Callable[[Tensor, list[Tensor]], tuple[Tensor, ...]] | None = None


CASES = {
    "emr": Case(emr, 1, {"task": 0}, packs=True, fusion_bench=fusion_bench_emr),
    "tall_masks": Case(tall, 1, {"task": 0, "selectivity": SELECTIVITY}, True, fusion_bench_tall),
    "consensus_ta": Case(consensus, 1, {"selectivity": SELECTIVITY}),
    "pcb": Case(pcb, 3, {"density": DENSITY, "clip": CLIP}),
}


def ours(name: str, base: Tensor, experts: list[Tensor]) -> Callable[[], Tensor]:
    """Gives the merged model, flat."""
    case, out = CASES[name], torch.empty_like(base)
    of_experts = [list(of_tensor) for of_tensor in zip(*map(parts, experts), strict=True)]
    scope = Scope(NAMES, parts(base), of_experts, parts(out), {name: name for name in NAMES})
    method = METHODS[name](**case.options)
    method.check(len(experts))
    bits = [torch.empty(len(experts), -(-math.prod(shape) // 8), dtype=torch.uint8) for shape in SHAPES]

    def merge() -> Tensor:
        method.pack(scope, bits) if isinstance(method, Packable) else method.merge(scope)
        return out

    return merge


ROWS = [
    (name, contender)
    for name, case in CASES.items()
    for contender in ("eager", "compiled", "fusion_bench", "ours")
    if contender != "fusion_bench" or case.fusion_bench
]


@pytest.mark.parametrize(("name", "contender"), ROWS)
@pytest.mark.benchmark(group="papers")
def test_paper(measure: Measure, rounds: int, name: str, contender: str, capsys: pytest.CaptureFixture[str]) -> None:
    base, experts = flat_inputs(SIZE, torch.float32)
    assert base is not None
    case, fused = CASES[name], ours(name, base, experts)
    theirs = case.official
    if contender == "compiled":
        torch.compiler.reset()
        theirs = torch.compile(case.official, dynamic=False)
    elif contender == "fusion_bench":
        pytest.importorskip("fusion_bench", reason="fusion-bench is not installed", exc_type=ImportError)
        assert case.fusion_bench is not None
        theirs = case.fusion_bench
    call = fused if contender == "ours" else lambda: theirs(base, experts)[0]
    expected = case.official(base, experts)[0]

    def check(result: Tensor) -> float:
        """All but what rounding puts on the other side of a limit."""
        share = ((result - expected).abs() > 1e-6).float().mean().item()
        assert share < 1e-4
        return share

    measure(
        call,
        ours=None if contender == "ours" else fused,
        check=check,
        rounds=3 if name == "pcb" else rounds,
        extra={
            "op": f"paper {name}",
            "num_params": SIZE,
            "num_tasks": NUM_TASKS,
            "dtype": "fp32",
            "contender": contender,
            "least_bytes": (case.reads * (NUM_TASKS + 1) + 1) * base.nbytes + (SIZE * NUM_TASKS // 8) * case.packs,
        },
    )
    capsys.readouterr()  # FusionBench prints
