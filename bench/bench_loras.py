"""KnOTS with TIES inside, of 8 LoRAs of rank 16 on the matrices of one block of ViT-B/32: the authors' formula on dense
task vectors in eager PyTorch, the same with FusionBench's helper, ours from the factors.

Bound: what a result of rank 128 must read and write: all factors once, and its own.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from bench_spectral import SHAPES
from conftest import Measure
from inputs import NUM_TASKS
from torch import Tensor

from surgery_kernels.merging import LowRank, merge_loras

RANK, DENSITY = 16, 0.2

Align = Callable[[list[Tensor]], tuple[Tensor, list[Tensor]]]
Loras = list[dict[str, LowRank]]


def aligned(vectors: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """U and every S V_t."""
    u, s, v = torch.linalg.svd(torch.cat(vectors, 1).double(), full_matrices=False)
    kept = s > 1e-5
    blocks = (s[kept, None] * v[kept]).float()
    return u[:, kept].float(), list(blocks.split(vectors[0].shape[1], 1))


def by_fusion_bench() -> Align:
    knots = pytest.importorskip(
        "fusion_bench.method.knots.knots_utils", reason="fusion-bench is not installed", exc_type=ImportError
    )

    def align(vectors: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        u, s, rights = knots.subspace_alignment(vectors, eps=1e-5)
        return u, [s[:, None] * right for right in rights]

    return align


def knots_ties(align: Align, experts: Loras) -> dict[str, Tensor]:
    """TIES over all blocks of an expert together."""
    spaces = {name: align([expert[name].product for expert in experts]) for name in experts[0]}
    x = torch.stack([torch.cat([blocks[t].flatten() for _, blocks in spaces.values()]) for t in range(len(experts))])
    lowest = x.shape[1] - int(x.shape[1] * DENSITY)
    x = x * (x.abs() >= x.abs().kthvalue(lowest, dim=1, keepdim=True).values)
    sign = x.sum(0).sign()
    sign[sign == 0] = sign.sum().sign()
    x = x * torch.where(sign > 0, x > 0, x < 0)
    mean = x.sum(0) / (x != 0).sum(0).clamp(min=1)
    parts = mean.split([blocks[0].numel() for _, blocks in spaces.values()])
    return {name: u @ part.view_as(blocks[0]) for part, (name, (u, blocks)) in zip(parts, spaces.items(), strict=True)}


@pytest.fixture(scope="module")
def experts() -> Loras:
    generator = torch.Generator().manual_seed(0)

    def factor(*shape: int) -> Tensor:
        return 0.02 * torch.randn(shape, generator=generator)

    return [
        {name: LowRank(factor(m, RANK), factor(RANK, c)) for name, (m, c) in SHAPES.items()} for _ in range(NUM_TASKS)
    ]


@pytest.mark.parametrize("contender", ["eager", "fusion_bench", "ours"])
@pytest.mark.benchmark(group="papers")
def test_knots(measure: Measure, experts: Loras, contender: str) -> None:
    def ours() -> dict[str, LowRank]:
        return merge_loras(experts, method="knots", density=DENSITY)

    expected = {name: merged.product for name, merged in ours().items()}

    def check(result: dict[str, Tensor] | dict[str, LowRank]) -> float:
        for name, wanted in expected.items():
            found = result[name]
            found = found.product if isinstance(found, LowRank) else found
            assert (found - wanted).norm() < 1e-3 * wanted.norm(), name
        return 0.0

    call: Callable[[], dict[str, Tensor] | dict[str, LowRank]] = ours
    if contender != "ours":
        align = aligned if contender == "eager" else by_fusion_bench()
        call = lambda: knots_ties(align, experts)  # noqa: E731
    measure(
        call,
        ours=ours if contender != "ours" else None,
        check=check,
        rounds=5 if contender == "ours" else 1,
        warm_up=contender == "ours",
        extra={
            "op": f"paper knots, LoRAs of rank {RANK}",
            "num_params": sum(m * c for m, c in SHAPES.values()),
            "num_tasks": NUM_TASKS,
            "dtype": "fp32",
            "contender": contender,
            "least_bytes": 2 * NUM_TASKS * 4 * RANK * sum(m + c for m, c in SHAPES.values()),
        },
    )
