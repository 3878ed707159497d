"""Routed layers of ViT-B/32 on 8 images of 50 tokens, with 8 experts: FusionBench's modules and ours, forward.

WEMoE merges a feed-forward network for every image. Bound: base and task vectors read once, the networks of all images
written once and read once. SMILE has experts of rank 16 beside a linear layer; bound: the weight and all factors read
once, tokens read and results written once, or, which takes longer, the products at the rate of a large one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from conftest import Measure
from torch import Tensor, nn

from surgery_kernels.routed import smile, wemoe

WIDTH, TOKENS, IMAGES, NUM_EXPERTS, RANK = 768, 50, 8, 8, 16
NUM_PARAMS = 8 * WIDTH * WIDTH + 5 * WIDTH
NAMES = ("wemoe", "smile")

Model = Callable[[Tensor], Tensor]


class Block(nn.Module):
    """What of a model these methods see."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.mlp(tokens)


def models() -> list[nn.Module]:
    """The base, then the experts."""
    torch.manual_seed(0)
    base = Block()
    experts = [deepcopy(base) for _ in range(NUM_EXPERTS)]
    with torch.no_grad():
        for parameter in (p for expert in experts for p in expert.parameters()):
            parameter.add_(torch.randn_like(parameter), alpha=0.002)
    return [base, *experts]


@functools.cache  # FusionBench takes the experts apart for a while
def both(name: str) -> tuple[Model, Model]:
    """FusionBench's, and ours with the same routers."""
    base, *experts = models()
    named = {str(t): expert for t, expert in enumerate(experts)}
    if name == "smile":
        linear = pytest.importorskip("fusion_bench.models.smile_moe.linear_from_module")
        ours = smile(base, named, rank=RANK, gate_rank=1)
        layers = [[model.mlp[i] for model in models()] for i in (0, 2)]
        routed = [linear.SmileMoELinear(of[0], of[1:], gate_k=1, k=RANK, full_matrices=False) for of in layers]
        return nn.Sequential(routed[0], nn.GELU(), routed[1]), ours
    we_moe = pytest.importorskip("fusion_bench.models.we_moe")
    merged = wemoe(base, named, networks=[["mlp.0", "mlp.2"]])
    theirs = we_moe.WeightEnsemblingMoE(WIDTH, base.mlp, [expert.mlp for expert in experts], 0.3, batch_first=True)
    for own, their in zip(merged.routers[0].parameters(), theirs.gate.parameters(), strict=True):
        own.data.normal_(std=0.05)
        their.data.copy_(own)
    return theirs, merged


def describe(name: str, contender: str) -> dict[str, Any]:
    factors = NUM_EXPERTS * (RANK + 1) * 10 * WIDTH
    size = (NUM_EXPERTS + 1 + 2 * IMAGES) * NUM_PARAMS if name == "wemoe" else NUM_PARAMS + factors
    return {
        "op": f"paper {name}, forward",
        "num_params": NUM_PARAMS,
        "num_tasks": NUM_EXPERTS,
        "dtype": "fp32",
        "contender": contender,
        "least_bytes": 4 * (size + 2 * IMAGES * TOKENS * WIDTH),
    }


@torch.no_grad()
@pytest.mark.parametrize("contender", ["fusion_bench", "ours"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.benchmark(group="papers")
def test_routed(measure: Measure, rounds: int, name: str, contender: str) -> None:
    theirs, ours = both(name)
    tokens = torch.randn(IMAGES, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
    expected = theirs(tokens)

    def check(result: Tensor) -> float:
        """All but tokens that are as near to one expert as to another."""
        far = (result - expected).norm(dim=-1) > 1e-4 * expected.norm(dim=-1)
        share = far.float().mean().item()
        assert share < 0.01
        return share

    call = ours if contender == "ours" else theirs
    measure(
        lambda: call(tokens),
        ours=None if contender == "ours" else lambda: ours(tokens),
        check=check,
        rounds=rounds,
        extra=describe(name, contender),
    )
