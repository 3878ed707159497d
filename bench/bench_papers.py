"""What the papers' methods make of 8 experts of 4M entries, as matrices of a ViT's shapes: one read, or about three.

The others are the official formulas in eager PyTorch on the flattened model, and compiled. Bound: base and experts are
read as often as the method must, and what it makes is written once.
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
SELECTIVITY, DENSITY, CLIP = 0.4, 0.05, 0.01


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


@dataclass(frozen=True)
class Case:
    official: Callable[[Tensor, list[Tensor]], tuple[Tensor, ...]]
    reads: int
    options: dict[str, Any]
    packs: bool = False  # masks of all experts, not one model


CASES = {
    "emr": Case(emr, 1, {"task": 0}, packs=True),
    "tall_masks": Case(tall, 1, {"task": 0, "selectivity": SELECTIVITY}, packs=True),
    "consensus_ta": Case(consensus, 1, {"selectivity": SELECTIVITY}),
    "pcb": Case(pcb, 3, {"density": DENSITY, "clip": CLIP}),
}


def ours(name: str, base: Tensor, experts: list[Tensor]) -> Callable[[], Tensor]:
    """Gives the merged model, flat."""
    case, out = CASES[name], torch.empty_like(base)
    sizes = [math.prod(shape) for shape in SHAPES]

    def parts(flat: Tensor) -> list[Tensor]:
        return [part.view(shape) for part, shape in zip(flat.split(sizes), SHAPES, strict=True)]

    names = [str(i) for i in range(len(SHAPES))]
    of_experts = [list(of_tensor) for of_tensor in zip(*map(parts, experts), strict=True)]
    scope = Scope(names, parts(base), of_experts, parts(out), {name: name for name in names})
    method = METHODS[name](**case.options)
    method.check(len(experts))
    bits = [torch.empty(len(experts), -(-size // 8), dtype=torch.uint8) for size in sizes]

    def merge() -> Tensor:
        method.pack(scope, bits) if isinstance(method, Packable) else method.merge(scope)
        return out

    return merge


@pytest.mark.parametrize("contender", ["eager", "compiled", "ours"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.benchmark(group="papers")
def test_paper(measure: Measure, rounds: int, name: str, contender: str) -> None:
    base, experts = flat_inputs(SIZE, torch.float32)
    assert base is not None
    case, fused = CASES[name], ours(name, base, experts)
    torch.compiler.reset()
    official = torch.compile(case.official, dynamic=False) if contender == "compiled" else case.official
    call = fused if contender == "ours" else lambda: official(base, experts)[0]
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
